"""Every family on the embedded sample: what its loss reaches, and that it is a sum over samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")

import tiny_families as families  # noqa: E402
from studies import FP8, Study, sample_database, study  # noqa: E402
from tiny_models import resolve_folder  # noqa: E402

from layersense.calibration.database import Object, Row, open_database  # noqa: E402
from layersense.config import Scheme  # noqa: E402
from layersense.errors import LayersenseError  # noqa: E402
from layersense.models.tasks import get_task  # noqa: E402
from layersense.models.tasks.images import photograph, to_tensor  # noqa: E402
from layersense.models.tasks.protocol import Loaded, Sampling  # noqa: E402
from layersense.recipes.decide import build_manifest  # noqa: E402

MODALITIES = {
    "seq2seq-lm": "text_pair",
    "object-detection": "image_boxes",
    "image-classification": "image_labels",
    "semantic-segmentation": "image_masks",
    "causal-lm": "text",
    "image-text-to-text": "image_text",
}
FAMILIES: dict[str, tuple[str, set[str]]] = {
    "t5": ("seq2seq-lm", {"encoder", "decoder", "head"}),
    "bart": ("seq2seq-lm", {"encoder", "decoder", "head"}),
    "yolos": ("object-detection", {"backbone", "head"}),
    "rt_detr": ("object-detection", {"backbone", "neck", "encoder", "decoder", "head"}),
    "ssdlite": ("object-detection", {"backbone", "head"}),
    "yolo26": ("object-detection", {"backbone", "neck", "head"}),
    "resnet": ("image-classification", {"backbone", "head"}),
    "vit": ("image-classification", {"backbone", "head"}),
    "convnext": ("image-classification", {"backbone", "head"}),
    "torchvision_resnet": ("image-classification", {"backbone", "head"}),
    "segformer": ("semantic-segmentation", {"backbone", "head"}),
    "lraspp": ("semantic-segmentation", {"backbone", "head"}),
    "deeplab": ("semantic-segmentation", {"backbone", "head"}),
    "smollm2": ("causal-lm", {"language", "head"}),
    "gpt2": ("causal-lm", {"language", "head"}),
    "qwen2": ("causal-lm", {"language", "head"}),
    "qwen3": ("causal-lm", {"language", "head"}),
    "gemma3": ("causal-lm", {"language", "head"}),
    "llava_onevision": ("image-text-to-text", {"vision", "projector", "language", "head"}),
    "qwen3_vl": ("image-text-to-text", {"vision", "projector", "language", "head"}),
    "qwen3_moe": ("causal-lm", {"language", "head"}),
    "mixtral": ("causal-lm", {"language", "head"}),
    "qwen3_vl_moe": ("image-text-to-text", {"vision", "projector", "language", "head"}),
}
"""Builder → task, subsystems."""
BY_ROW = [name for name, (task, _) in FAMILIES.items() if task != "causal-lm"]
"""Those of which a row is a sample; language models pack texts into blocks."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return families.builder(tmp_path_factory)


@pytest.fixture(scope="module")
def studied(shared: Path, checkpoint: Any) -> Any:
    done: dict[str, Study] = {}

    def get(name: str) -> Study:
        if name not in done:
            done[name] = study(shared, checkpoint(name), FAMILIES[name][0])
        return done[name]

    return get


def load(folder: Path, task_name: str) -> Loaded:
    return get_task(task_name).load(resolve_folder(folder, task_name), dtype="auto", device="cpu")


def sample_rows(shared: Path, task_name: str, count: int) -> list[Row]:
    unit = get_task(task_name).unit(MODALITIES[task_name])
    with open_database(sample_database(shared)) as database:
        return database.rows(unit, "calibration", limit=count)


def sampling(task_name: str) -> Sampling:
    return Sampling(max_length=256, modality=MODALITIES[task_name])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_subsystem_scores(studied: Any, name: str) -> None:
    result = studied(name)
    assert set(result.subsystems) == FAMILIES[name][1]
    assert all(score > 0 for score in result.subsystems.values())
    assert result.silent == {}
    assert not result.findings("subsystem-at-zero")
    assert not result.findings("score-not-finite")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_scored_or_listed_with_a_reason(
    studied: Any, checkpoint: Any, name: str
) -> None:
    layers = studied(name).scores.layers
    model = load(checkpoint(name), FAMILIES[name][0]).model
    quantizable = {
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert quantizable <= set(layers)
    for layer_name in quantizable:
        assert layers[layer_name].group is not None
    assert all(layer.group or layer.reason for layer in layers.values())


def test_heads_are_told_apart(studied: Any) -> None:
    for name in ("yolos", "rt_detr", "ssdlite", "yolo26"):
        heads = {
            group.kind
            for group in studied(name).scores.groups.values()
            if group.subsystem == "head"
        }
        assert heads == {"class_head", "box_head"}


def buffers(model: Any) -> dict[str, Any]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def losses(task: Any, loaded: Loaded, batches: Any) -> Iterator[float]:
    for batch in batches:
        yield task.loss(task.forward(loaded.model, batch), batch).item()


@pytest.mark.parametrize("name", [*BY_ROW, "retinanet", "fcos", "d_fine", "yolo"])
def test_the_loss_is_a_sum_over_samples_and_moves_no_statistics(
    checkpoint: Any, shared: Path, name: str
) -> None:
    task_name = FAMILIES.get(name, ("object-detection",))[0]
    task, loaded = get_task(task_name), load(checkpoint(name), task_name)
    rows = sample_rows(shared, task_name, 5)
    before = buffers(loaded.model)
    sums = []
    for batch_size in (1, 2, 5):
        batches = task.batches(loaded, rows, sampling(task_name), batch_size)
        sums.append(sum(losses(task, loaded, batches)))
        assert sum(batch.n_samples for batch in batches) == 5
        if task_name not in ("seq2seq-lm", "image-text-to-text"):
            assert [batch.n_tokens for batch in batches] == [batch.n_samples for batch in batches]
    assert sums[0] > 0
    assert sums[1:] == pytest.approx([sums[0]] * 2, rel=1e-4)
    assert not loaded.model.training
    for key, value in buffers(loaded.model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["yolos", "segformer"])
def test_scores_do_not_depend_on_the_batch(
    studied: Any, shared: Path, checkpoint: Any, name: str
) -> None:
    whole = study(shared, checkpoint(name), FAMILIES[name][0], batch_size=4)
    for handle, group in studied(name).manifest.layer_sensitivity.items():
        other = whole.manifest.layer_sensitivity[handle]
        assert other.scores[0] == pytest.approx(group.scores[0], rel=1e-3), handle


@pytest.mark.parametrize("name", ["yolos", "rt_detr", "d_fine"])
def test_one_photographs_loss_is_the_detectors_own(
    checkpoint: Any, shared: Path, name: str
) -> None:
    import transformers

    task, loaded = get_task("object-detection"), load(checkpoint(name), "object-detection")
    rows = sample_rows(shared, "object-detection", 3)
    own = transformers.AutoModelForObjectDetection.from_pretrained(checkpoint(name)).eval()
    batches = task.batches(loaded, rows, sampling("object-detection"), 1)
    with torch.no_grad():
        for ours, batch in zip(losses(task, loaded, batches), batches, strict=True):
            expected = own(**batch.inputs, labels=[dict(batch.targets[0])]).loss.item()
            assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["yolo", "yolo26"])
def test_one_photographs_loss_is_ultralytics_own(checkpoint: Any, shared: Path, name: str) -> None:
    task, loaded = get_task("object-detection"), load(checkpoint(name), "object-detection")
    model: Any = loaded.model
    for row in sample_rows(shared, "object-detection", 3):
        (batch,) = task.batches(loaded, [row], sampling("object-detection"), 1)
        (ours,) = losses(task, loaded, [batch])
        pixels = batch.inputs["pixel_values"]
        height, width = pixels.shape[-2:]
        # The longer edge becomes 160 pixels; both are filled up to multiples of the stride.
        image = photograph(row)
        edges = [round(edge * 160 / max(image.size)) for edge in image.size]
        assert [width, height] == [-(-edge // 32) * 32 for edge in edges]
        scale = torch.tensor([edges[0] / image.width, edges[1] / image.height] * 2)
        shown = [item for item in row.objects if not item.is_crowd]
        scaled = torch.tensor([item.bbox for item in shown]).reshape(-1, 4) * scale
        middles = torch.cat([scaled[:, :2] + scaled[:, 2:] / 2, scaled[:, 2:]], dim=1)
        classes = [families.CATEGORIES.index(item.category) for item in shown]
        own = {
            "img": pixels,
            "batch_idx": torch.zeros(len(shown)),
            "cls": torch.tensor(classes, dtype=torch.float32),
            "bboxes": middles / torch.tensor([width, height, width, height]),
        }
        assert ours == pytest.approx(model.loss(own)[0].sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["retinanet", "ssdlite", "fcos"])
def test_one_photographs_loss_is_torchvisions_own(checkpoint: Any, shared: Path, name: str) -> None:
    task, loaded = get_task("object-detection"), load(checkpoint(name), "object-detection")
    model: Any = loaded.model
    rows = sample_rows(shared, "object-detection", 2)
    for row in rows:
        (batch,) = task.batches(loaded, [row], sampling("object-detection"), 1)
        (ours,) = losses(task, loaded, [batch])
        corners = [(x, y, x + w, y + h) for shown in row.objects for x, y, w, h in (shown.bbox,)]
        names = [families.CATEGORIES.index(shown.category) + 1 for shown in row.objects]
        kept = [index for index, shown in enumerate(row.objects) if not shown.is_crowd]
        target = {
            "boxes": torch.tensor(corners)[kept],
            "labels": torch.tensor(names)[kept],
        }
        model.training = True  # of the outermost module alone: its BatchNorms stay as they are
        own = model([to_tensor(photograph(row))], [target])
        model.training = False
        assert ours == pytest.approx(sum(loss.item() for loss in own.values()), rel=1e-4)


def test_boxes_move_with_the_image(checkpoint: Any, tmp_path: Path) -> None:
    from PIL import Image

    wide, tall = tmp_path / "wide.png", tmp_path / "tall.png"
    Image.new("RGB", (120, 60), "white").save(wide)
    Image.new("RGB", (60, 120), "white").save(tall)
    rows = [
        Row(path, None, objects=(Object("cat", (15.0, 15.0, 30.0, 30.0)),)) for path in (wide, tall)
    ]
    task = get_task("object-detection")
    yolos = load(checkpoint("yolos"), "object-detection")
    (batch,) = task.batches(yolos, rows, sampling("object-detection"), 2)
    # 120×60 becomes 80×32 (YOLOS rounds to multiples of 16), 60×120 becomes 32×80; both are padded
    # to 80×80.
    assert batch.inputs["pixel_values"].shape == (2, 3, 80, 80)
    assert (batch.n_positions, batch.n_padding) == (2 * 80 * 80, 2 * 80 * 48)
    boxes = [target["boxes"][0].tolist() for target in batch.targets]
    assert boxes[0] == pytest.approx([0.25, 0.5 * 32 / 80, 0.25, 0.5 * 32 / 80])
    assert boxes[1] == pytest.approx([0.5 * 32 / 80, 0.25, 0.5 * 32 / 80, 0.25])
    ssd = load(checkpoint("ssdlite"), "object-detection")
    (batch,) = task.batches(ssd, rows[:1], sampling("object-detection"), 2)
    assert batch.targets[0]["boxes"][0].tolist() == pytest.approx([40, 80, 120, 240])
    assert batch.targets[0]["labels"].tolist() == [families.CATEGORIES.index("cat") + 1]


@pytest.mark.parametrize("name", ["retinanet", "d_fine"])
def test_modules_called_several_times_are_refused_by_the_stock_engine(
    shared: Path, checkpoint: Any, name: str
) -> None:
    with pytest.raises(LayersenseError, match="is called several times in one forward"):
        study(shared, checkpoint(name), "object-detection", engine="modelopt")


@pytest.mark.parametrize("name", ["retinanet", "fcos", "d_fine"])
def test_modules_called_several_times_are_scored_by_the_fused_engine(
    shared: Path, checkpoint: Any, name: str
) -> None:
    result = study(shared, checkpoint(name), "object-detection")
    assert {"backbone", "head"} <= set(result.subsystems)
    assert all(score > 0 for score in result.subsystems.values())


# Mixtures of experts


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "qwen3_vl_moe"])
def test_experts_are_one_group_and_routers_are_listed(
    studied: Any, checkpoint: Any, name: str
) -> None:
    result = studied(name)
    model = load(checkpoint(name), FAMILIES[name][0]).model
    experts = [name for name, module in model.named_modules() if name.endswith("mlp.experts")]
    mixtures = {
        group.module_names[0]: group
        for group in result.scores.groups.values()
        if group.kind == "experts"
    }
    assert list(mixtures) == experts
    for module_name, group in mixtures.items():
        module = model.get_submodule(module_name)
        weights = sum(p.numel() for p in module.parameters() if p.ndim > 2)
        assert group.n_weights == weights
        assert group.n_experts == module.num_experts
        assert group.experts_per_token == 2
        router = result.scores.layers[module_name.replace(".experts", ".gate")]
        assert router.group is None
        assert "TopKRouter" in (router.reason or "")


def test_active_parameters_leave_out_the_experts_that_do_not_work(
    studied: Any, checkpoint: Any
) -> None:
    about = studied("qwen3_moe").scores.model
    # Each of 2 layers has 6 experts, of which 2 work: gate, up and down are 32 × 32 each.
    assert about.n_parameters - about.n_active_parameters == 2 * 4 * 3 * 32 * 32
    assert studied("qwen3").scores.model.n_active_parameters is None


def test_experts_that_no_token_reached_are_named(shared: Path, checkpoint: Any) -> None:
    result = study(
        shared, checkpoint("many_experts"), "causal-lm", calibration_samples=1, score_samples=1
    )
    findings = result.findings("unreached-experts")
    assert len(findings) == 2  # one a layer
    tokens = result.scores.formats["FP8_ALL_LAYERS_CFG"].batches.tokens[0] + 1
    for finding in findings:
        group = result.scores.groups[f"{finding.layers[0]}.quant_recipe"]
        assert group.n_experts == 128
        assert 128 - tokens <= len(group.unreached_experts) < 128
        assert f"{len(group.unreached_experts)} of 128 experts" in finding.what
    assert not result.findings("unreached-groups")


def test_experts_of_linear_layers_are_one_group_too(shared: Path, checkpoint: Any) -> None:
    result, stock = (
        study(shared, checkpoint("own_mixture"), "causal-lm", trust_remote_code=True, engine=engine)
        for engine in ("fused", "modelopt")
    )
    mixtures = [group for group in result.scores.groups.values() if group.kind == "experts"]
    parts = ("gate_proj", "up_proj", "down_proj")
    assert [set(group.module_names) for group in mixtures] == [
        {f"model.layers.{layer}.mlp.experts.{n}.{part}" for n in range(4) for part in parts}
        for layer in range(2)
    ]
    assert {group.n_weights for group in mixtures} == {4 * 3 * 32 * 32}
    assert {group.n_experts for group in mixtures} == {4}
    # They are scored at the output of a block, and the router inside of it by itself.
    for handle, group in stock.manifest.layer_sensitivity.items():
        assert group.scores[0] > 0, handle
        ours = result.manifest.layer_sensitivity[handle]
        assert ours.scores[0] == pytest.approx(group.scores[0], rel=1e-3), handle
    # A router is scored, and stays as it is although all else may be quantized.
    assert "model.layers.1.mlp.gate.quant_recipe" in result.scores.groups
    for asked, bits in ((False, 8.5), (True, 8.0)):
        scheme = Scheme(quant_formats=[FP8], effective_bits=bits, routers=asked)
        manifest = build_manifest(result.scores, "run", "scheme", scheme, {})
        taken = {
            handle.split(".mlp.")[1]: group.selected.split("(")[0]
            for handle, group in manifest.layer_sensitivity.items()
            if ".mlp." in handle
        }
        assert taken["gate.quant_recipe"] == (FP8 if asked else "NONE")


# What a loss misses


@pytest.mark.parametrize(
    ("name", "task", "subsystem", "reached"),
    [
        ("t5", "EncoderOnly", "decoder", "not_called"),
        ("bart", "FrozenEncoder", "encoder", "no_gradient"),
        ("resnet", "FrozenBackbone", "backbone", "no_gradient"),
        ("segformer", "FrozenFeatures", "backbone", "no_gradient"),
    ],
)
def test_a_subsystem_that_the_loss_misses_is_told(
    shared: Path, checkpoint: Any, name: str, task: str, subsystem: str, reached: str
) -> None:
    modality = MODALITIES[FAMILIES[name][0]]
    result = study(shared, checkpoint(name), f"outside_tasks:{task}", modality=modality)
    assert result.subsystems[subsystem] == 0
    (finding,) = (
        finding
        for finding in result.findings("subsystem-at-zero")
        if f"of the {subsystem} subsystem" in finding.what
    )
    groups = {
        handle.removesuffix(".quant_recipe")
        for handle, group in result.scores.groups.items()
        if group.subsystem == subsystem
    }
    assert set(finding.layers) == groups
    assert {result.silent[layer] for layer in groups} == {reached}
    rest = set(result.subsystems) - {subsystem, "head"}
    assert all(result.subsystems[other] > 0 for other in rest)


@pytest.mark.parametrize(
    ("task", "missed"),
    [
        ("YoloFrozenBackbone", {"backbone": "no_gradient"}),
        ("YoloFrozenNeck", {"backbone": "no_gradient", "neck": "no_gradient"}),
        ("YoloFeatures", {"head": "not_called"}),
    ],
)
def test_a_part_of_yolo_that_the_loss_misses_is_told(
    shared: Path, checkpoint: Any, task: str, missed: dict[str, str]
) -> None:
    result = study(shared, checkpoint("yolo26"), f"outside_tasks:{task}", modality="image_boxes")
    assert {part for part, score in result.subsystems.items() if score == 0} == set(missed)
    found = {
        finding.what.split(" of the ")[1].split()[0]: {
            result.silent[name] for name in finding.layers
        }
        for finding in result.findings("subsystem-at-zero")
    }
    assert found == {part: {reached} for part, reached in missed.items()}


def test_yolos_constant_convolution_is_told(shared: Path, checkpoint: Any) -> None:
    result = study(shared, checkpoint("yolo"), "object-detection")
    assert {part for part, score in result.subsystems.items() if score > 0} == {
        "backbone", "neck", "head"
    }  # fmt: skip
    # It turns bins into a distance, only when boxes are decoded; its weights are 0, 1, 2, …
    assert result.silent == {"model.22.dfl.conv": "no_gradient"}
    (finding,) = result.findings("unreached-groups")
    assert finding.layers == ["model.22.dfl.conv"]


def test_both_engines_agree_on_yolo(shared: Path, checkpoint: Any) -> None:
    fused = study(shared, checkpoint("yolo"), "object-detection")
    stock = study(shared, checkpoint("yolo"), "object-detection", engine="modelopt")
    for handle, group in fused.manifest.layer_sensitivity.items():
        other = stock.manifest.layer_sensitivity[handle]
        assert other.scores[0] == pytest.approx(group.scores[0], rel=1e-3), handle


def test_a_class_loss_alone_leaves_yolos_box_head_at_zero(shared: Path, checkpoint: Any) -> None:
    result = study(
        shared, checkpoint("yolo26"), "outside_tasks:YoloClasses", modality="image_boxes"
    )
    boxes = {
        handle.removesuffix(".quant_recipe")
        for handle, group in result.scores.groups.items()
        if group.kind == "box_head" or "one2one" in handle
    }
    assert set(result.silent) == boxes
    (finding,) = result.findings("unreached-groups")
    assert set(finding.layers) == boxes
    assert all(score > 0 for score in result.subsystems.values())


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_texts_alone_leave_the_vision_tower_at_zero(
    shared: Path, checkpoint: Any, name: str
) -> None:
    result = study(shared, checkpoint(name), FAMILIES[name][0], modality="text")
    assert result.subsystems["language"] > 0
    missed = {"vision", "projector"}
    assert {part: result.subsystems[part] for part in missed} == dict.fromkeys(missed, 0)
    found = {finding.what.split(" of the ")[1].split()[0]: finding.why
             for finding in result.findings("subsystem-at-zero")}  # fmt: skip
    assert set(found) == missed
    assert found["vision"] == "The calibration data is text alone, so the vision tower never ran."


def test_a_class_loss_alone_leaves_the_box_head_at_zero(shared: Path, checkpoint: Any) -> None:
    result = study(shared, checkpoint("yolos"), "outside_tasks:ClassesOnly", modality="image_boxes")
    (finding,) = result.findings("unreached-groups")
    assert finding.layers == [f"bbox_predictor.layers.{index}" for index in range(3)]
    assert result.silent == dict.fromkeys(finding.layers, "no_gradient")
    assert all(score > 0 for score in result.subsystems.values())


# What is refused


def test_data_that_does_not_fit_a_model_is_one_sentence(shared: Path, checkpoint: Any) -> None:
    for name, what in (("yolos", "boxes"), ("segformer", "masks"), ("resnet", "named")):
        task_name = FAMILIES[name][0]
        task, loaded = get_task(task_name), load(checkpoint(name), task_name)
        rows = [replace(row, objects=(), texts=()) for row in sample_rows(shared, task_name, 1)]
        with pytest.raises(LayersenseError) as error:
            task.batches(loaded, rows, sampling(task_name), 1)
        assert str(error.value).count("\n") == 0
        assert ("nothing" if what == "named" else f"no {what}") in str(error.value)
        strange = [replace(rows[0], objects=(Object("dragon", (0, 0, 9, 9), False, "[]"),))]
        with pytest.raises(LayersenseError, match="dragon"):
            task.batches(loaded, strange, sampling(task_name), 1)


def test_a_table_names_the_models_own_classes(shared: Path, checkpoint: Any) -> None:
    task, loaded = get_task("image-classification"), load(checkpoint("vit"), "image-classification")
    (row,) = sample_rows(shared, "image-classification", 1)
    rows = [replace(row, objects=(), texts=(text,)) for text in ("Cat", "traffic_light")]
    (batch,) = task.batches(loaded, rows, sampling("image-classification"), 2)
    assert batch.labels.tolist() == [
        families.CATEGORIES.index("cat"), families.CATEGORIES.index("traffic light")
    ]  # fmt: skip
    output = task.forward(loaded.model, batch)
    logits = torch.log_softmax(output.float(), dim=-1)
    expected = -sum(logits[i, label] for i, label in enumerate(batch.labels.tolist()))
    assert task.loss(output, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(task.supervised_logits(output, batch), output.float())
    with pytest.raises(LayersenseError, match=r"no class for .*column `text`"):
        task.batches(
            loaded, [replace(rows[0], texts=("dragon",))], sampling("image-classification"), 1
        )


def test_several_categories_are_several_yes_or_no(shared: Path, checkpoint: Any) -> None:
    task, loaded = get_task("image-classification"), load(checkpoint("vit"), "image-classification")
    rows = sample_rows(shared, "image-classification", 3)
    (batch,) = task.batches(loaded, rows, sampling("image-classification"), 3)
    for labels, row in zip(batch.labels, rows, strict=True):
        shown = {families.CATEGORIES.index(item.category) for item in row.objects}
        assert set(labels.nonzero().flatten().tolist()) == shown
    output = task.forward(loaded.model, batch)
    logits = task.supervised_logits(output, batch)
    assert torch.allclose(logits.softmax(-1)[..., 0], output.sigmoid())
    run = {"method": "kl_div", "modality": "image_labels", "device": "cpu"}
    with pytest.raises(LayersenseError, match="no one output distribution"):
        study(shared, checkpoint("vit"), "image-classification", **run)


def test_detectors_that_sample_at_random_are_refused(tmp_path: Path) -> None:
    from torchvision.models import get_model

    from layersense.models.torchvision_models import save_checkpoint

    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = get_model(name, weights=None, weights_backbone=None, num_classes=3)
    save_checkpoint(name, model, tmp_path, categories=["no", "cat", "dog"], num_classes=3)
    with pytest.raises(LayersenseError, match="samples its proposals at random"):
        load(tmp_path, "object-detection")


def test_a_broken_torchvision_checkpoint_is_one_sentence(checkpoint: Any, tmp_path: Path) -> None:
    import json
    import shutil

    def change(**keys: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(checkpoint("torchvision_resnet"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **keys}))
        return folder

    for keys, message in (
        ({"architectures": ["resnet19"]}, "cannot build resnet19"),
        ({"arguments": {"colour": 3}}, "cannot build resnet18"),
        ({"arguments": {"num_classes": 3}}, "do not fit resnet18"),
        ({"architectures": ["resnet34"]}, "holds no weights for .* which resnet34 needs"),
    ):
        with pytest.raises(LayersenseError, match=message):
            load(change(**keys), "image-classification")


def test_texts_that_are_too_long_are_cut_and_counted(checkpoint: Any, shared: Path) -> None:
    task, loaded = get_task("seq2seq-lm"), load(checkpoint("bart"), "seq2seq-lm")
    rows = sample_rows(shared, "seq2seq-lm", 2)
    short = Sampling(max_length=8, modality="text_pair")
    (batch,) = task.batches(loaded, rows, short, 2)
    assert batch.n_truncated == 2
    assert batch.inputs["input_ids"].shape == (2, 8)
    assert batch.labels[:, -1].tolist() == [1, 1]  # the end token stays
    with pytest.raises(LayersenseError, match="is more than the 512 positions"):
        task.batches(loaded, rows, Sampling(max_length=513, modality="text_pair"), 2)
    with pytest.raises(LayersenseError, match="a text is empty"):
        task.batches(loaded, [replace(rows[0], target=" ")], short, 2)


def test_targets_are_supervised_whole_and_padding_never(checkpoint: Any, shared: Path) -> None:
    task, loaded = get_task("seq2seq-lm"), load(checkpoint("t5"), "seq2seq-lm")
    rows = sample_rows(shared, "seq2seq-lm", 4)
    (batch,) = task.batches(loaded, rows, sampling("seq2seq-lm"), 4)
    words = loaded.processor
    for labels, ids, row in zip(batch.labels, batch.inputs["input_ids"], rows, strict=True):
        assert words.decode(labels[labels != -100]) == f"{row.target}</s>"
        assert words.decode(ids[ids != words.pad_token_id]) == f"{row.caption}</s>"
    assert batch.n_tokens == int((batch.labels != -100).sum())
    with torch.no_grad():
        own = loaded.model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            labels=batch.labels,
        ).loss.item()
    (ours,) = losses(task, loaded, [batch])
    assert ours == pytest.approx(own * batch.n_tokens, rel=1e-5)


def test_a_network_whose_classes_are_numbers_is_told_so(checkpoint: Any, shared: Path) -> None:
    task, loaded = get_task("object-detection"), load(checkpoint("yolos"), "object-detection")
    numbered = replace(loaded.processor, classes={f"label {n}": n for n in range(80)})
    rows = sample_rows(shared, "object-detection", 2)
    with pytest.raises(LayersenseError, match="have no names: write the checkpoint with them"):
        task.batches(replace(loaded, processor=numbered), rows, sampling("object-detection"), 1)


# Tasks of the user's own


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_module:Task", "no_such_module cannot be imported"),
        ("outside_tasks:NoSuchClass", "defines no class NoSuchClass"),
        ("outside_tasks:Incomplete", "has no `modalities`, which every task has"),
    ],
)
def test_a_broken_task_is_one_sentence(task: str, message: str) -> None:
    with pytest.raises(LayersenseError, match=message):
        get_task(task)


def test_the_documented_task_works_as_an_outside_package(
    shared: Path, checkpoint: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (repository / "docs" / "tasks.md").read_text(encoding="utf-8")
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class " in block
    )
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth" / "task.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = study(
        shared,
        checkpoint("glpn"),
        "depth.task:Smoothness",
        modality="image_labels",
        batch_size=1,
        calibration_batch_size=1,
    )
    assert all(score > 0 for score in result.subsystems.values())
    assert set(result.subsystems) == {"backbone", "decoder", "head"}
    assert result.scores.dataset.unit == "image"
