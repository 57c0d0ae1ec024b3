"""The demo model: a small real Qwen2.5-VL, trained on the embedded sample."""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layersense.calibration.database import Row, open_database
from layersense.errors import LayersenseError
from layersense.models.loading import quiet_progress_bars
from layersense.models.tasks.image_text_to_text import ImageTextToText, Sample
from layersense.models.tasks.protocol import Batch, Sampling

logger = logging.getLogger(__name__)

SIDE = 112
"""Pixels; an image has at most the area of a square of this side."""
VOCABULARY = 768
STEPS = 120
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 4e-3
THREADS = 1
"""Of torch while training: the same weights on any number of cores; neighbours slow it little."""
HIGHEST_LOSS = 0.5
"""Nats a token with the right image, at most."""
LOWEST_GAP = 1.0
"""Nats a token by which a wrong image must be worse."""
_PAD = "<|endoftext|>"
_END = "<|im_end|>"
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's own, without videos and the default system turn."""


def build_demo(database: Path, out: Path, seed: int = 0) -> None:
    """Train the demo model on every caption of a database and save it as a checkpoint.

    It sees both splits: its scores mean something on this data and on no other.

    Args:
        database: calibration database with images, of the embedded sample.
        out: directory of the checkpoint; appears in one step, replacing an earlier one.
        seed: of the weights and the order of the samples.

    Raises:
        LayersenseError: the database holds fewer than two images, or the trained model does not
            tell the right image from a wrong one.
    """
    with open_database(database) as opened:
        rows = [
            row for split in ("calibration", "heldout") for row in opened.rows("caption", split)
        ]
    if len({row.image_path for row in rows}) < 2:
        raise LayersenseError(
            f"{database}: holds fewer than two images, but the demo model learns to tell images "
            "apart; build the database from the embedded sample"
        )
    with _reproducible(seed), _folder(out) as folder:
        processor = make_processor([str(row.caption) for row in rows])
        model = make_model(processor.tokenizer)
        right, wrong = _samples(processor, rows)
        train(model, processor, right, seed)
        loss_right = mean_loss(model, processor, right)
        loss_wrong = mean_loss(model, processor, wrong)
        logger.info(
            "demo model: %d parameters, loss %.2f with the right image, %.2f with a wrong one",
            sum(parameter.numel() for parameter in model.parameters()),
            loss_right,
            loss_wrong,
        )
        # Written so that NaN fails too.
        if not (loss_right < HIGHEST_LOSS and loss_wrong > loss_right + LOWEST_GAP):
            raise LayersenseError(
                f"{out}: the demo model's loss is {loss_right:.2f} with the right image and "
                f"{loss_wrong:.2f} with a wrong one, but below {HIGHEST_LOSS} and {LOWEST_GAP} "
                "apart were expected; build it again from the embedded sample"
            )
        quiet_progress_bars()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def make_processor(captions: Sequence[str]) -> Any:
    """Return a Qwen2.5-VL processor whose tokenizer is trained on ``captions``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    bytes_only = Tokenizer(models.BPE())
    # Split like the tokenizer that will use the merges.
    split = Qwen2Tokenizer().backend_tokenizer
    bytes_only.normalizer, bytes_only.pre_tokenizer = split.normalizer, split.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Often enough that each word of the frame becomes one token.
    frame = ["user", "assistant", Sampling(max_length=0, modality="").prompt] * 20
    bytes_only.train_from_iterator([*captions, *frame], trainer)
    trained = json.loads(bytes_only.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=[token for token in _SPECIAL if token not in (_PAD, _END)],
    )
    images = Qwen2VLImageProcessor(min_pixels=(SIDE // 2) ** 2, max_pixels=SIDE**2)
    return Qwen2_5_VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(), chat_template=_CHAT_TEMPLATE
    )


def make_model(tokenizer: Any) -> Any:
    """Return an untrained Qwen2.5-VL of 4 vision and 4 language blocks, in float32.

    Widths are multiples of 32, which the block formats divide; the head is not tied, so that it
    is a layer group of its own.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            # The sections halve a head's 32 channels: time, height, width.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": ids[_PAD],
            "eos_token_id": ids[_END],
            "pad_token_id": ids[_PAD],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "window_size": SIDE,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def train(model: Any, processor: Any, samples: Sequence[Sample], seed: int) -> None:
    """Train in place: AdamW, one-cycle learning rate, the task's own batches and loss."""
    task = ImageTextToText()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=STEPS
    )
    model.train()
    for step, chosen in zip(range(STEPS), _shuffled(samples, seed), strict=False):
        batch = task.collate(processor, chosen)
        loss = task.loss(task.forward(model, batch), batch) / batch.n_tokens
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            logger.info("demo model: step %d of %d, loss %.2f", step, STEPS, loss.item())
    model.eval()


@torch.no_grad()
def mean_loss(model: Any, processor: Any, samples: Sequence[Sample]) -> float:
    """Return the mean cross entropy over the samples' supervised tokens, in nats."""
    task = ImageTextToText()
    batches: list[Batch] = [
        task.collate(processor, samples[start : start + BATCH_SIZE])
        for start in range(0, len(samples), BATCH_SIZE)
    ]
    total = sum(task.loss(task.forward(model, batch), batch).item() for batch in batches)
    return total / sum(batch.n_tokens for batch in batches)


def _samples(processor: Any, rows: Sequence[Row]) -> tuple[list[Sample], list[Sample]]:
    """Return the rows as samples, and the same captions each with the next other image."""
    task = ImageTextToText()
    sampling = Sampling(max_length=1024, modality="image_text")
    frame = task.frame(processor, sampling)
    paths = sorted({row.image_path for row in rows if row.image_path})
    following = dict(zip(paths, [*paths[1:], *paths[:1]], strict=True))
    right, wrong = [], []
    for row in rows:
        assert row.image_path is not None
        right.append(task.prepare(processor, row, frame, sampling))
        other = replace(row, image_path=following[row.image_path])
        wrong.append(task.prepare(processor, other, frame, sampling))
    return right, wrong


def _shuffled(samples: Sequence[Sample], seed: int) -> Iterator[list[Sample]]:
    """Yield batches without end, each epoch in a new order."""
    draw = random.Random(seed)  # noqa: S311
    waiting: list[Sample] = []
    while True:
        while len(waiting) < BATCH_SIZE:
            waiting += draw.sample(samples, len(samples))
        yield waiting[:BATCH_SIZE]
        waiting = waiting[BATCH_SIZE:]


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch and fix its number of threads, for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` and rename it to ``out`` when the block succeeds."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            yield folder
            if out.exists():
                shutil.rmtree(out)
            folder.replace(out)
    except OSError as error:
        raise LayersenseError(
            f"{out}: cannot be written ({error.strerror or error}); free disk space or choose a "
            "writable folder"
        ) from error
