"""Pickled checkpoints of ultralytics, and what their descriptions may name."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

if find_spec("ultralytics") is None:
    pytest.skip(
        "YOLO needs ultralytics: pip install --no-deps -r envs/yolo.lock", allow_module_level=True
    )

pytestmark = pytest.mark.slow  # importing torch and ultralytics takes seconds

torch = pytest.importorskip("torch")

import tiny_families as families  # noqa: E402
from tiny_models import resolve_folder  # noqa: E402

from layersense.errors import LayersenseError  # noqa: E402
from layersense.models.checkpoints import read_checkpoint  # noqa: E402
from layersense.models.resolve import resolve_model  # noqa: E402
from layersense.models.tasks import get_task  # noqa: E402
from layersense.models.yolo import describe, import_ultralytics, save_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.seeded(families.yolo11, tmp_path_factory.mktemp("yolo"))


def load(folder: Path) -> Any:
    return get_task("object-detection").load(
        resolve_folder(folder, "object-detection"), dtype="auto", device="cpu"
    )


@pytest.fixture
def pickled(folder: Path, tmp_path: Path) -> Path:
    """What training writes: the model whole, in half precision, with how it was trained."""
    model = load(folder).model
    model.names = dict(enumerate(families.CATEGORIES))
    file = tmp_path / "best.pt"
    arguments = {"box": 3.0, "cls": 0.25, "imgsz": 160, "epochs": 1}
    torch.save({"model": copy.deepcopy(model).half(), "ema": None, "train_args": arguments}, file)
    return file


def settings(file: Path, trusted: bool) -> dict[str, Any]:
    return {
        "source": "checkpoint", "checkpoint": str(file), "task": "object-detection",
        "revision": None, "trust_remote_code": trusted,
    }  # fmt: skip


def test_pillow_stays_as_it_is() -> None:
    import_ultralytics()
    assert Image.open.__module__ == "PIL.Image"


def test_a_pickle_becomes_a_checkpoint_of_safetensors(
    folder: Path, pickled: Path, tmp_path: Path
) -> None:
    record = tmp_path / "models" / "yolo" / "model.json"
    resolve_model("yolo", settings(pickled, True), record)
    checkpoint = read_checkpoint(record)
    assert (checkpoint.id, checkpoint.trust_remote_code) == (str(pickled), True)
    assert checkpoint.dtype == "float32"
    assert sorted(file.name for file in Path(checkpoint.path).iterdir()) == [
        "config.json", "model.safetensors"
    ]  # fmt: skip
    config = json.loads((Path(checkpoint.path) / "config.json").read_text())
    assert config["gains"] == {"box": 3.0, "cls": 0.25}
    assert config["image"] == {"size": 160}
    made = get_task("object-detection").load(checkpoint, dtype="auto", device="cpu")
    assert made.model.args.box == 3.0
    assert made.model.args.dfl == 1.5  # the default
    before = load(folder).model.state_dict()
    for key, value in made.model.state_dict().items():
        assert torch.equal(value, before[key].half().float() if value.is_floating_point()
                           else before[key]), key  # fmt: skip


def test_nothing_is_loaded_without_consent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch pwned",)

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "best.pt"
    torch.save({"model": Evil()}, file)
    with pytest.raises(LayersenseError, match="set `trust_remote_code: true`"):
        resolve_model("yolo", settings(file, False), tmp_path / "model.json")
    assert not Path("pwned").exists()
    with pytest.raises(LayersenseError, match="is no checkpoint of ultralytics"):
        resolve_model("yolo", settings(file, True), tmp_path / "model.json")
    assert Path("pwned").exists()  # which is what the consent is for


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "__import__('os').system('touch pwned')"},
        {"activation": "nn.SiLU(__import__('os'))"},
        {"backbone": [[-1, 1, "torch_load", ["evil.pt"]]]},
        {"backbone": [[-1, 1, "nn.functional.relu", []]]},
    ],
)
def test_a_description_names_layers_alone(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "network": {**config["network"], **change}})
    )
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(LayersenseError, match="which is no layer"):
        load(tmp_path)


def test_other_models_of_ultralytics_are_refused(tmp_path: Path) -> None:
    from ultralytics.nn.tasks import DetectionModel, SegmentationModel, yaml_model_load

    def model(kind: Any, name: str) -> Any:
        network = yaml_model_load(name) | {"scales": {"n": [0.33, 0.0625, 256]}, "scale": "n"}
        return kind(network, verbose=False)

    with pytest.raises(LayersenseError, match=r"SegmentationModel with a Segment at its end"):
        save_checkpoint(model(SegmentationModel, "yolo11-seg.yaml"), tmp_path)
    fused = model(DetectionModel, "yolo11.yaml").fuse(verbose=False)
    with pytest.raises(LayersenseError, match="fused for inference"):
        save_checkpoint(fused, tmp_path)


@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        ("model.10.m.0.attn.qkv.conv", 11, ("backbone", 10, "conv")),  # YOLO11's attention
        ("model.10.conv", 10, ("neck", 10, "conv")),  # YOLOv5's first convolution of the neck
        ("model.2.cv2.0.cv1.conv", 9, ("backbone", 2, "conv")),  # YOLOv9's branches
        ("model.23.cv2.0.2", 11, ("head", 23, "box_head")),
        ("model.23.one2one_cv3.1.0.0.conv", 11, ("head", 23, "class_head")),
    ],
)
def test_layers_are_named_by_the_description(
    name: str, backbone: int, expected: tuple[str, int, str]
) -> None:
    layer = describe(backbone, 23, [name])
    assert (layer.subsystem, layer.block, layer.kind) == expected
