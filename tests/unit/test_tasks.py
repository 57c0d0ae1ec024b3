"""Batches, losses and what is supervised, on tiny random models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CAPTIONS,
    edit_json,
    resolve_folder,
    save_images,
    save_tiny_llama,
    save_tiny_qwen2_5_vl,
)

from layersense.calibration.database import Row
from layersense.errors import LayersenseError
from layersense.models.tasks import get_task
from layersense.models.tasks.image_text_to_text import ImageTextToText
from layersense.models.tasks.protocol import IGNORED, Batch, Loaded, Sampling, Task

IMAGE_TEXT = Sampling(max_length=128, modality="image_text")
TEXT = Sampling(max_length=128, modality="text")
SIZES = ((120, 90), (90, 120), (200, 60), (64, 64), (448, 448))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = save_tiny_qwen2_5_vl(tmp_path_factory.mktemp("vlm"))
    task = get_task("image-text-to-text")
    return task.load(resolve_folder(folder, task.name), dtype="auto", device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = save_tiny_llama(tmp_path_factory.mktemp("llama"))
    task = get_task("causal-lm")
    return task.load(resolve_folder(folder, task.name), dtype="auto", device="cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    paths = save_images(tmp_path_factory.mktemp("images"), SIZES)
    return [Row(path, caption) for path, caption in zip(paths, CAPTIONS, strict=True)]


def losses(task: Task, loaded: Loaded, batches: Sequence[Batch]) -> list[float]:
    with torch.no_grad():
        return [task.loss(task.forward(loaded.model, batch), batch).item() for batch in batches]


def supervised_text(loaded: Loaded, batch: Batch) -> list[str]:
    """Decode the labelled positions of each sample, special tokens shown."""
    return [loaded.processor.tokenizer.decode(labels[labels != IGNORED]) for labels in batch.labels]


@pytest.mark.parametrize("sampling", [IMAGE_TEXT, TEXT])
def test_caption_and_end_of_turn_alone_are_supervised(
    vlm: Loaded, rows: list[Row], sampling: Sampling
) -> None:
    (batch,) = ImageTextToText().batches(vlm, rows, sampling, 8)
    assert supervised_text(vlm, batch) == [f"{caption}<|im_end|>" for caption in CAPTIONS]
    ids, labels = batch.inputs["input_ids"], batch.labels
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
    # The prompt and the image stand before the labels, in the user's turn.
    before = vlm.processor.tokenizer.decode(ids[0, : int((labels[0] != IGNORED).nonzero()[0])])
    assert before.startswith("<|im_start|>user\n")
    assert before.endswith("Describe the image.<|im_end|>\n<|im_start|>assistant\n")
    assert ("<|image_pad|>" in before) == (sampling is IMAGE_TEXT)


def test_a_batch_is_what_the_processor_makes_of_it(vlm: Loaded, rows: list[Row]) -> None:
    (batch,) = ImageTextToText().batches(vlm, rows, IMAGE_TEXT, 8)
    from PIL import Image
    from qwen_vl_utils import process_vision_info

    conversations: list[list[dict[str, Any]]] = [
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "image": Image.open(row.image_path),  # type: ignore[arg-type]
                        "min_pixels": 56 * 56,
                        "max_pixels": 112 * 112,
                    },
                    {"type": "text", "text": "Describe the image."},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": row.caption}]},
        ]
        for row in rows
    ]
    texts = [
        vlm.processor.apply_chat_template(conversation, tokenize=False).removesuffix("\n")
        for conversation in conversations
    ]
    images, _ = process_vision_info(conversations)
    expected = vlm.processor(
        text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"
    )
    assert set(batch.inputs) == set(expected) >= {"mm_token_type_ids", "image_grid_thw"}
    for key, value in expected.items():
        torch.testing.assert_close(batch.inputs[key], value, msg=key)


def test_the_count_of_a_batch_is_right(vlm: Loaded, rows: list[Row]) -> None:
    (batch,) = ImageTextToText().batches(vlm, rows, IMAGE_TEXT, 8)
    tokenizer = vlm.processor.tokenizer
    expected = sum(len(tokenizer(caption).input_ids) + 1 for caption in CAPTIONS)
    assert batch.n_tokens == expected
    assert (batch.n_samples, batch.n_truncated) == (5, 0)
    assert batch.n_positions == batch.inputs["input_ids"].numel()
    assert batch.n_padding == int((batch.inputs["attention_mask"] == 0).sum()) > 0


@pytest.mark.parametrize("sampling", [IMAGE_TEXT, TEXT])
def test_the_loss_does_not_depend_on_the_batch_size(
    vlm: Loaded, rows: list[Row], sampling: Sampling
) -> None:
    task = ImageTextToText()
    single = losses(task, vlm, task.batches(vlm, rows, sampling, 1))
    for batch_size in (2, 4):
        batches = task.batches(vlm, rows, sampling, batch_size)
        assert len(batches) == -(-5 // batch_size)
        together = losses(task, vlm, batches)
        expected = [sum(single[start : start + batch_size]) for start in range(0, 5, batch_size)]
        assert together == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_models_own_mean_times_the_tokens(vlm: Loaded, rows: list[Row]) -> None:
    task = ImageTextToText()
    (batch,) = task.batches(vlm, rows, IMAGE_TEXT, 8)
    with torch.no_grad():
        own = vlm.model(**batch.inputs, labels=batch.labels).loss.item()
    assert losses(task, vlm, [batch]) == pytest.approx([own * batch.n_tokens], rel=1e-5)


def test_supervised_logits_are_those_that_the_loss_reads(vlm: Loaded, rows: list[Row]) -> None:
    task = ImageTextToText()
    (batch,) = task.batches(vlm, rows[:2], IMAGE_TEXT, 2)
    with torch.no_grad():
        output = task.forward(vlm.model, batch)
    logits = task.supervised_logits(output, batch)
    assert logits.shape == (batch.n_tokens, output.logits.shape[-1])
    expected = [
        output.logits[row, position - 1]
        for row, position in (batch.labels != IGNORED).nonzero().tolist()
    ]
    assert torch.equal(logits, torch.stack(expected))


@pytest.mark.parametrize("key", ["mm_token_type_ids", "image_grid_thw", "pixel_values"])
def test_the_vision_inputs_matter(vlm: Loaded, rows: list[Row], key: str) -> None:
    task = ImageTextToText()
    (batch,) = task.batches(vlm, rows[:1], IMAGE_TEXT, 1)
    changed = dict(batch.inputs)
    if key == "mm_token_type_ids":
        del changed[key]
    elif key == "image_grid_thw":
        changed[key] = changed[key][:, [0, 2, 1]]
    else:
        changed[key] = changed[key].flip(0)
    with torch.no_grad():
        logits = [
            task.supervised_logits(task.forward(vlm.model, one), one)
            for one in (batch, replace(batch, inputs=changed))
        ]
    assert not torch.allclose(*logits, atol=1e-4)


def test_texts_alone_have_no_vision_inputs(vlm: Loaded, rows: list[Row]) -> None:
    without = [replace(row, image_path=None) for row in rows]
    (batch,) = ImageTextToText().batches(vlm, without, TEXT, 8)
    assert not {key for key in batch.inputs if "pixel" in key or "image" in key}
    assert not batch.inputs["mm_token_type_ids"].any()


def test_truncation_cuts_the_caption_alone(vlm: Loaded, rows: list[Row]) -> None:
    task = ImageTextToText()
    (whole,) = task.batches(vlm, rows[2:3], IMAGE_TEXT, 1)
    length = whole.n_positions
    start = length - whole.n_tokens
    for kept in (1, whole.n_tokens - 1):
        (cut,) = task.batches(vlm, rows[2:3], replace(IMAGE_TEXT, max_length=start + kept), 1)
        assert (cut.n_tokens, cut.n_truncated) == (kept, 1)
        assert torch.equal(cut.inputs["pixel_values"], whole.inputs["pixel_values"])
        assert torch.equal(cut.labels, whole.labels[:, : start + kept])
        assert torch.isfinite(torch.tensor(losses(task, vlm, [cut]))).all()
    with pytest.raises(LayersenseError, match=rf"take {start} tokens of the {start} .*max_pixels"):
        task.batches(vlm, rows[2:3], replace(IMAGE_TEXT, max_length=start), 1)


def test_pixels_follow_the_run(vlm: Loaded, rows: list[Row]) -> None:
    def pixels(**limits: int) -> int:
        (batch,) = ImageTextToText().batches(vlm, rows[-1:], replace(IMAGE_TEXT, **limits), 1)
        (grid,) = batch.inputs["image_grid_thw"].tolist()
        assert batch.inputs["pixel_values"].shape[0] == grid[1] * grid[2]
        return grid[1] * grid[2] * 14 * 14

    assert pixels() == 112 * 112
    assert pixels(max_pixels=56 * 56) == 56 * 56
    assert pixels(min_pixels=196 * 196) == 196 * 196
    assert pixels(max_pixels=28 * 28) == 28 * 28
    with pytest.raises(LayersenseError, match="`min_pixels` 9 of the run is more than"):
        pixels(min_pixels=9, max_pixels=8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"caption": " "}, "is empty"),
        ({"caption": "a <|image_pad|> b"}, "holds <|image_pad|>, which Qwen2Tokenizer reserves"),
        ({"caption": "the end<|im_end|>"}, "holds <|im_end|>"),
        ({"image_path": None}, "the dataset of the run holds texts alone; set `modality: text`"),
    ],
)
def test_a_bad_row_is_told_before_any_scoring(
    vlm: Loaded, rows: list[Row], change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(LayersenseError) as error:
        ImageTextToText().batches(vlm, [*rows, replace(rows[0], **change)], IMAGE_TEXT, 2)
    assert expected in str(error.value)


def test_batches_are_the_same_whatever_is_cached(
    vlm: Loaded, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ImageTextToText()
    cached = task.batches(vlm, rows, IMAGE_TEXT, 2)
    monkeypatch.setattr("layersense.models.tasks.image_text_to_text.CACHE_BYTES", 0)
    anew = task.batches(replace(vlm, prepared={}), rows, IMAGE_TEXT, 2)
    assert len(cached) == len(anew) == 3
    for one, other in zip(cached, anew, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)
    assert [batch.n_samples for batch in anew[1:]] == [2, 1]
    assert anew[-1].n_samples == 1
    with pytest.raises(IndexError):
        anew[3]


def test_a_row_is_prepared_once_for_all_batches_that_have_it(
    vlm: Loaded, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, prepared = ImageTextToText(), []
    prepare = ImageTextToText.prepare
    monkeypatch.setattr(
        ImageTextToText,
        "prepare",
        lambda self, *about: (prepared.append(about[1]), prepare(self, *about))[1],
    )
    loaded = replace(vlm, prepared={})
    calibration = task.batches(loaded, rows, IMAGE_TEXT, 2)
    assert prepared == rows
    scoring = task.batches(loaded, rows[:3], IMAGE_TEXT, 1)
    assert [batch.n_samples for batch in [*calibration, *scoring]] == [2, 2, 1, 1, 1, 1]
    assert prepared == rows
    # Other settings make other samples.
    task.batches(loaded, rows[:1], replace(IMAGE_TEXT, prompt="What is this?"), 1)
    assert prepared == [*rows, rows[0]]


def test_a_moved_batch_shares_no_gradients(vlm: Loaded, rows: list[Row]) -> None:
    batches = ImageTextToText().batches(vlm, rows[:1], IMAGE_TEXT, 1)
    moved = batches[0].to("cpu", torch.bfloat16)
    assert moved.inputs["pixel_values"].dtype == torch.bfloat16
    assert moved.inputs["input_ids"].dtype == torch.int64
    batches[0].to("cpu", torch.float32).inputs["pixel_values"].requires_grad_(True)
    assert not batches[0].inputs["pixel_values"].requires_grad


# Language models


def test_packing_supervises_every_position_and_loses_nothing(llama: Loaded) -> None:
    task = get_task("causal-lm")
    sampling = Sampling(max_length=16, modality="text")
    rows = [Row(None, caption) for caption in CAPTIONS]
    batches = task.batches(llama, rows, sampling, 2)
    blocks = [block for batch in batches for block in batch.inputs["input_ids"]]
    joined = "</s>".join(CAPTIONS) + "</s>"
    assert llama.processor.decode(torch.cat(blocks)) == joined
    assert {len(block) for block in blocks[:-1]} == {16}
    for batch in batches:
        assert torch.equal(batch.labels, batch.inputs["input_ids"])
        assert batch.n_tokens == batch.n_samples * (batch.labels.shape[1] - 1)
        assert (batch.n_padding, batch.n_truncated) == (0, 0)


def test_packing_is_the_same_for_every_batch_size(llama: Loaded) -> None:
    task = get_task("causal-lm")
    rows = [Row(None, caption) for caption in CAPTIONS]
    totals = []
    for batch_size in (1, 2, 4):
        batches = task.batches(llama, rows, Sampling(max_length=8, modality="text"), batch_size)
        totals.append((sum(losses(task, llama, batches)), sum(b.n_tokens for b in batches)))
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    assert totals[2] == pytest.approx(totals[0], rel=1e-5)


def test_a_lone_last_token_is_left_out(llama: Loaded) -> None:
    task = get_task("causal-lm")
    n_tokens = len(llama.processor(CAPTIONS[0]).input_ids) + 1
    row = Row(None, CAPTIONS[0])
    batches = task.batches(llama, [row], Sampling(max_length=n_tokens - 1, modality="text"), 4)
    assert [batch.labels.shape for batch in batches] == [(1, n_tokens - 1)]


def test_blocks_begin_as_the_tokenizer_begins(tmp_path: Path) -> None:
    task = get_task("causal-lm")
    checkpoint = resolve_folder(save_tiny_llama(tmp_path, bos=True), task.name)
    loaded = task.load(checkpoint, dtype="auto", device="cpu")
    rows = [Row(None, caption) for caption in CAPTIONS]
    batches = task.batches(loaded, rows, Sampling(max_length=16, modality="text"), 2)
    blocks = [block for batch in batches for block in batch.inputs["input_ids"]]
    assert {int(block[0]) for block in blocks} == {loaded.processor.bos_token_id}
    rest = torch.cat([block[1:] for block in blocks])
    assert loaded.processor.decode(rest) == "</s>".join(CAPTIONS) + "</s>"


def test_language_models_refuse_what_they_cannot_do(llama: Loaded) -> None:
    task = get_task("causal-lm")
    row = Row(None, CAPTIONS[0])
    with pytest.raises(LayersenseError, match=r"modality image_text: .* takes text"):
        task.batches(llama, [row], IMAGE_TEXT, 1)
    with pytest.raises(LayersenseError, match=r"`max_length` 65 .* more than the 64 positions"):
        task.batches(llama, [row], Sampling(max_length=65, modality="text"), 1)
    with pytest.raises(LayersenseError, match="its text is empty"):
        task.batches(
            llama, [replace(row, caption="\n")], Sampling(max_length=8, modality="text"), 1
        )
    with pytest.raises(LayersenseError, match="fewer than two tokens"):
        task.batches(llama, [], Sampling(max_length=8, modality="text"), 1)


# Loading


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_load(tmp_path: Path, tied: bool) -> None:
    task = get_task("causal-lm")
    checkpoint = resolve_folder(save_tiny_llama(tmp_path, tied=tied), task.name)
    loaded = task.load(checkpoint, dtype="bfloat16", device="cpu")
    model: Any = loaded.model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not model.training
    assert loaded.warnings == ()
    assert checkpoint.n_parameters == sum(p.numel() for p in model.parameters())


def test_a_sharded_checkpoint_loads(tmp_path: Path) -> None:
    task = get_task("causal-lm")
    folder = save_tiny_llama(tmp_path, shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    checkpoint = resolve_folder(folder, task.name)
    loaded = task.load(checkpoint, dtype="auto", device="cpu")
    assert checkpoint.n_parameters == sum(p.numel() for p in loaded.model.parameters())


def load_changed(folder: Path, change: Any) -> Loaded:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    task = get_task("causal-lm")
    return task.load(resolve_folder(folder, task.name), dtype="auto", device="cpu")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(LayersenseError, match=f"holds no weights for {name}, which Llama"):
        load_changed(save_tiny_llama(tmp_path), lambda weights: weights.pop(name))


def test_unused_weights_are_told(tmp_path: Path) -> None:
    loaded = load_changed(
        save_tiny_llama(tmp_path), lambda weights: weights.update({"extra": torch.ones(1)})
    )
    assert loaded.warnings == (
        f"{tmp_path}: holds weights that LlamaForCausalLM does not use: extra",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = value

    with pytest.raises(LayersenseError, match=r"not every weight of model\.norm\.weight is finite"):
        load_changed(save_tiny_llama(tmp_path), spoil)


def test_what_transformers_refuses_is_one_sentence(tmp_path: Path) -> None:
    task = get_task("causal-lm")
    folder = save_tiny_llama(tmp_path)
    checkpoint = resolve_folder(folder, task.name)
    edit_json(folder / "config.json", hidden_size=32)
    with pytest.raises(LayersenseError, match="transformers cannot load it") as error:
        task.load(checkpoint, dtype="auto", device="cpu")
    assert "\n" not in str(error.value)
    edit_json(folder / "config.json", model_type="clip", hidden_size=None)
    with pytest.raises(LayersenseError, match="transformers cannot load it"):
        task.load(checkpoint, dtype="auto", device="cpu")


def test_a_lost_tokenizer_is_refused(tmp_path: Path) -> None:
    task = get_task("causal-lm")
    folder = save_tiny_llama(tmp_path)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(LayersenseError, match="names no end token"):
        task.load(resolve_folder(folder, task.name), dtype="auto", device="cpu")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LayersenseError, match="its tokenizer cannot be loaded"):
        task.load(resolve_folder(folder, task.name), dtype="auto", device="cpu")


def test_a_lost_processor_or_chat_template_is_refused(tmp_path: Path) -> None:
    task = get_task("image-text-to-text")
    folder = save_tiny_qwen2_5_vl(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(LayersenseError, match="has no chat template"):
        task.load(resolve_folder(folder, task.name), dtype="auto", device="cpu")
    (folder / "processor_config.json").unlink()
    with pytest.raises(LayersenseError, match="its processor cannot be loaded"):
        task.load(resolve_folder(folder, task.name), dtype="auto", device="cpu")


def test_tasks_have_names() -> None:
    assert get_task("causal-lm").unit("text") == "caption"
    assert get_task("image-text-to-text").unit("image_text") == "caption"
    with pytest.raises(LayersenseError, match=r"write one of causal-lm, .* or your own"):
        get_task("fill-mask")
