"""Vision-language models: a photograph and a prompt in, its caption out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layersense.calibration.images import open_image
from layersense.calibration.sampling import Unit
from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import first_line, load_model, load_processor
from layersense.models.tasks.batches import CACHE_BYTES, LazyBatches
from layersense.models.tasks.metrics import CiderD, TopChoice
from layersense.models.tasks.protocol import (
    IGNORED,
    Batch,
    Loaded,
    Metric,
    Sampling,
    WrittenMetric,
    check_modality,
)
from layersense.models.tasks.tokens import (
    count_supervised,
    pad_right,
    summed_cross_entropy,
    supervised_logits,
)

if TYPE_CHECKING:
    from layersense.calibration.database import Row
    from layersense.quantization.layers import LayerName

MOST_WRITTEN = 32
"""Tokens that a model may write for a photograph."""
_CAPTION = "a caption of layersense"
"""Stands for the caption while the chat template is rendered."""


@dataclass(frozen=True)
class Sample:
    """One conversation."""

    tokens: dict[str, Tensor]
    """Inputs with one entry a token, shape (T,): ``input_ids``, ``mm_token_type_ids``…"""
    features: dict[str, Tensor]
    """The other inputs, such as ``pixel_values``; batches concatenate them along dimension 0."""
    labels: Tensor
    """Token ids on the caption and the end of the turn, shape (T,); else ``IGNORED``."""
    truncated: bool


@dataclass(frozen=True)
class Frame:
    """A rendered conversation without its caption."""

    head: str
    """Everything before the caption."""
    tail: str
    """What ends the assistant's turn."""


class ImageTextToText:
    """User turn: image and a fixed prompt; assistant turn: the caption, which alone is supervised.

    Under the modality ``text`` it is the same without the image.
    """

    name = "image-text-to-text"
    modalities = frozenset({"image_text", "text"})

    def unit(self, modality: str) -> Unit:
        """Return the calibration database's unit: a caption is a sample."""
        check_modality(self, modality)
        return "caption"

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str) -> Loaded:
        """Load model and processor; see :class:`~layersense.models.tasks.protocol.Task`."""
        from transformers import AutoModelForImageTextToText

        model, warnings = load_model(
            AutoModelForImageTextToText, checkpoint, dtype=dtype, device=device
        )
        processor = load_processor(checkpoint)
        if getattr(processor, "chat_template", None) is None:
            raise LayersenseError(
                f"{checkpoint.path}: has no chat template; add chat_template.jinja of the "
                "original checkpoint, or give an instruction-tuned one"
            )
        return Loaded(model, processor, checkpoint.id, warnings)

    def batches(
        self, loaded: Loaded, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Sequence[Batch]:
        """Return the batches, padded on the right to the longest sample of each.

        Raises:
            LayersenseError: a caption is missing or holds a special token, an image cannot be
                used, or an image alone exceeds ``max_length``.
        """
        check_modality(self, sampling.modality)
        frame = self.frame(loaded.processor, sampling)
        return LazyBatches(
            len(rows),
            batch_size,
            prepare=lambda index: self.prepare(loaded.processor, rows[index], frame, sampling),
            size=lambda sample: sum(value.nbytes for value in sample.features.values()),
            collate=lambda samples: self.collate(loaded.processor, samples),
            cache_bytes=CACHE_BYTES,
            # The rows that are scored are among those of the calibration; a batch may be split.
            kept=loaded.prepared,
            key=lambda index: (rows[index], sampling),
        )

    def frame(self, processor: Any, sampling: Sampling) -> Frame:
        """Render the chat template once, around a stand-in for the caption.

        Raises:
            LayersenseError: the template does not show the assistant's turn once.
        """
        content = [{"type": "text", "text": sampling.prompt}]
        if sampling.modality == "image_text":
            content.insert(0, {"type": "image"})
        conversation = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": _CAPTION}]},
        ]
        parts = processor.apply_chat_template(conversation, tokenize=False).split(_CAPTION)
        if len(parts) != 2:
            raise LayersenseError(
                f"the chat template of {type(processor).__name__} shows the assistant's turn "
                f"{len(parts) - 1} times instead of once; use another checkpoint"
            )
        head, tail = parts
        tokenizer = processor.tokenizer
        bos = tokenizer.bos_token
        if (
            bos
            and not head.startswith(bos)
            and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        ):
            head = bos + head
        # White space after the end of the turn belongs to the next one.
        return Frame(head, tail.rstrip() or tokenizer.eos_token or "")

    def prepare(self, processor: Any, row: Row, frame: Frame, sampling: Sampling) -> Sample:
        """Turn a row into tokens, labels and image features.

        Raises:
            LayersenseError: see :meth:`batches`.
        """
        caption = (row.caption or "").strip()
        where = f"text of {_name(row)}"
        if not caption:
            raise LayersenseError(f"{where}: is empty; remove the row from the data")
        tokenizer = processor.tokenizer
        reserved = {*tokenizer.all_special_tokens, getattr(processor, "image_token", None)} - {None}
        if found := sorted(token for token in reserved if token in caption):
            raise LayersenseError(
                f"{where}: holds {found[0]}, which {type(tokenizer).__name__} reserves; remove it "
                "from the text"
            )
        text = frame.head + caption + frame.tail
        supervised = _tail(
            tokenizer(frame.head, add_special_tokens=False).input_ids,
            tokenizer(text, add_special_tokens=False).input_ids,
        )
        images = _images(processor, row, sampling) if sampling.modality == "image_text" else {}
        try:
            inputs = processor(text=[text], add_special_tokens=False, return_tensors="pt", **images)
        except ValueError as error:
            raise LayersenseError(
                f"{_name(row)}: {type(processor).__name__} cannot prepare it "
                f"({first_line(error)}); remove the row or set `max_pixels` of the run"
            ) from error
        ids = inputs["input_ids"][0]
        start = len(ids) - len(supervised)
        if ids[start:].tolist() != supervised:
            raise LayersenseError(
                f"{type(processor).__name__} changes the caption's tokens, so that they cannot "
                "be supervised; use another checkpoint"
            )
        if start >= sampling.max_length:
            raise LayersenseError(
                f"{_name(row)}: its image and the prompt take {start} tokens of the "
                f"{sampling.max_length} that `max_length` allows; set `max_pixels` of the run "
                f"lower, or `max_length` to more than {start}"
            )
        labels = torch.full_like(ids, IGNORED)
        labels[start:] = ids[start:]
        aligned = {key for key, value in inputs.items() if value.shape == (1, len(ids))}
        cut = slice(sampling.max_length)
        return Sample(
            tokens={key: inputs[key][0, cut] for key in sorted(aligned)},
            features={key: inputs[key] for key in sorted(set(inputs) - aligned)},
            labels=labels[cut],
            truncated=len(ids) > sampling.max_length,
        )

    def collate(self, processor: Any, samples: Sequence[Sample]) -> Batch:
        """Put samples into one batch, padded on the right to the longest."""
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        inputs = {
            key: pad_right(
                [sample.tokens[key] for sample in samples], pad if key == "input_ids" else 0
            )
            for key in samples[0].tokens
        }
        for key in samples[0].features:
            inputs[key] = _concatenate([sample.features[key] for sample in samples])
        labels = pad_right([sample.labels for sample in samples], IGNORED)
        return Batch(
            inputs=inputs,
            labels=labels,
            n_tokens=count_supervised(labels),
            n_samples=len(samples),
            n_padding=labels.numel() - sum(len(sample.labels) for sample in samples),
            n_truncated=sum(sample.truncated for sample in samples),
        )

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on the batch."""
        return model(**batch.inputs, use_cache=False)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the cross entropy summed over captions and ends of turns, in nats."""
        return summed_cross_entropy(output, batch)

    def supervised_logits(self, output: Any, batch: Batch) -> Tensor:
        """Return the logits that predict captions and ends of turns, (n_tokens, vocabulary)."""
        return supervised_logits(output, batch)

    def metrics(self, loaded: Loaded) -> Sequence[Metric | WrittenMetric]:
        """Return the share of tokens predicted right, given the true ones before; and CIDEr-D."""
        write = partial(write_captions, loaded.processor)
        return [TopChoice("token accuracy"), CiderD(write, MOST_WRITTEN)]

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""
        from layersense.quantization.layers import describe_layer

        return describe_layer(module_names)


def write_captions(processor: Any, model: nn.Module, batch: Batch) -> list[str]:
    """Return what a model writes for each sample of a batch of photographs.

    It is given what stands before the caption, and takes the most probable token each time
    (greedily, without the checkpoint's own settings of generation), up to the end of the turn or
    :data:`MOST_WRITTEN` tokens.
    """
    from transformers import GenerationConfig

    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    starts: list[int] = (batch.labels != IGNORED).int().argmax(dim=1).tolist()
    inputs = {}
    for key, value in batch.inputs.items():
        if value.shape == batch.labels.shape and not value.is_floating_point():
            fill = pad if key == "input_ids" else 0
            inputs[key] = _pad_left(
                [row[:start] for row, start in zip(value, starts, strict=True)], fill
            )
        else:
            inputs[key] = value
    inputs["attention_mask"] = _pad_left([batch.labels.new_ones(start) for start in starts], 0)
    own: Any = model
    ends = own.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    written = own.generate(
        **inputs,
        generation_config=GenerationConfig(
            max_new_tokens=MOST_WRITTEN,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_return_sequences=1,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
        ),
    )
    texts = tokenizer.batch_decode(written[:, max(starts) :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Put rows of tokens into one tensor, filled up on the left: what is written comes after."""
    return pad_right([row.flip(0) for row in rows], value).flip(1)


def _name(row: Row) -> str:
    return f"image {row.image_path}" if row.image_path else f"row {row.position}"


def _tail(head: list[int], whole: list[int]) -> list[int]:
    """Return the tokens of ``whole`` from the first that differs from ``head``.

    Where the caption's first characters merge with the last of the prompt into one token, that
    token counts as the caption's.
    """
    common = next(
        (
            position
            for position, (ours, theirs) in enumerate(zip(head, whole, strict=False))
            if ours != theirs
        ),
        len(head),
    )
    return whole[common:]


def _images(processor: Any, row: Row, sampling: Sampling) -> dict[str, Any]:
    """Return the processor's image arguments for a row, opened and resized."""
    if row.image_path is None:
        raise LayersenseError(
            "the dataset of the run holds texts alone; set `modality: text` of the "
            "run, or name a dataset with images"
        )
    image = open_image(row.image_path)
    own = processor.image_processor
    if not type(processor).__name__.startswith("Qwen"):
        if sampling.min_pixels is not None or sampling.max_pixels is not None:
            raise LayersenseError(
                f"{type(processor).__name__} takes no `min_pixels` or `max_pixels`; remove them "
                "from the run"
            )
        return {"images": [image]}
    from qwen_vl_utils import process_vision_info

    # Where only one limit is given, the processor's own other one must not contradict it.
    least, most = sampling.min_pixels, sampling.max_pixels
    if least is None:
        least = min(own.size["shortest_edge"], most or own.size["shortest_edge"])
    if most is None:
        most = max(own.size["longest_edge"], least)
    if least > most:
        raise LayersenseError(
            f"`min_pixels` {least} of the run is more than its `max_pixels` {most}; swap them"
        )
    content = {"type": "image", "image": image, "min_pixels": least, "max_pixels": most}
    try:
        images, _ = process_vision_info(
            [{"role": "user", "content": [content]}], image_patch_size=own.patch_size
        )
    except ValueError as error:
        raise LayersenseError(
            f"{_name(row)}: {image.width}×{image.height} pixels cannot be resized for the model "
            f"({first_line(error)}); remove the row from the data"
        ) from error
    return {"images": images, "do_resize": False}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along dimension 0, filling up the other dimensions with zeros."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    whole = tensors[0].new_zeros([sum(len(tensor) for tensor in tensors), *shape])
    start = 0
    for tensor in tensors:
        region = (slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        whole[region] = tensor
        start += len(tensor)
    return whole
