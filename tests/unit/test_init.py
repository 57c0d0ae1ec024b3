"""`layersense init`: a config for one's own checkpoint and data."""

import json
from pathlib import Path
from typing import Any

import pytest

from layersense.calibration.build import read_records
from layersense.calibration.sampling import draw
from layersense.config import Config
from layersense.errors import LayersenseError
from layersense.init import write_config
from layersense.validation import load_config, read_config_file

VLM = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {}}
LLM = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(config: Any = VLM, folder: str = "my-checkpoint") -> str:
    Path(folder).mkdir()
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return f"./{folder}"


def photos(count: int = 40) -> Path:
    folder = Path("photos")
    folder.mkdir()
    rows = [f"{number}.jpg,A photo" for number in range(count)]
    (folder / "table.csv").write_text("\n".join(["image,text", *rows]) + "\n")
    return folder


def texts(count: int, file: str = "texts.jsonl") -> Path:
    lines = [json.dumps({"text": f"text {number}"}) for number in range(count)]
    Path(file).write_text("\n".join(lines) + "\n")
    return Path(file)


def written(out: Path = Path("config/my-model.yaml")) -> Config:
    return load_config(read_config_file(out), str(out))


def test_a_checkpoint_and_photographs() -> None:
    message = write_config(checkpoint(), photos(), device="cuda")
    assert "snakemake -n --configfile config/my-model.yaml" in message
    assert "--resources gpu=1" in message
    config = written()
    assert config.models["my-checkpoint"].task == "image-text-to-text"
    dataset = config.datasets["photos"]
    assert (dataset.source, dataset.calibration, dataset.heldout) == ("images", 32, 8)
    (run,) = config.runs.values()
    assert (run.device, run.modality) == ("cuda", None)
    lines = Path("config/my-model.yaml").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 12


@pytest.mark.parametrize("count", [10, 11, 12, 13, 27, 99, 320, 321])
def test_the_splits_hold_what_is_asked(count: int) -> None:
    write_config(checkpoint(), photos(count), device="cpu")
    dataset = written().datasets["photos"]
    sizes = {"calibration": dataset.calibration, "heldout": dataset.heldout}
    samples = draw(read_records(dataset), **sizes, seed=0, name="photos")
    for split, size in sizes.items():
        assert sum(s.unit == "image" and s.split == split for s in samples) == size


def test_a_language_model_on_texts() -> None:
    write_config(checkpoint(LLM), texts(1000), device="cpu")
    config = written()
    (dataset,) = config.datasets.values()
    assert (dataset.source, dataset.calibration, dataset.heldout) == ("text", 512, 64)
    assert config.models["my-checkpoint"].task == "causal-lm"


def test_a_vision_language_model_on_texts_is_told_so() -> None:
    write_config(checkpoint(), texts(20), device="cpu")
    (run,) = written().runs.values()
    assert run.modality == "text"


def test_no_data_means_the_sample() -> None:
    write_config(checkpoint(), device="cpu")
    (dataset,) = written().datasets.values()
    assert dataset.source == "sample"


def test_coco_is_recognised(shared_data: Path) -> None:
    write_config(checkpoint(), shared_data / "coco2017-tiny", device="cpu")
    (dataset,) = written().datasets.values()
    assert dataset.model_dump()["root"] == str(shared_data / "coco2017-tiny")
    assert (dataset.source, dataset.calibration, dataset.heldout) == ("coco", 40, 10)


@pytest.mark.parametrize("folder", ["2024", "no", "Mein Modell: neu #1", "ü", "a'b"])
def test_names_that_yaml_reads_otherwise(folder: str) -> None:
    write_config(checkpoint(folder=folder), photos(), device="cpu")
    (model,) = written().models.values()
    assert model.model_dump()["checkpoint"] == f"./{folder}"


def test_an_existing_file_is_kept() -> None:
    Path("mine.yaml").write_text("mine")
    with pytest.raises(LayersenseError, match="not overwritten"):
        write_config(checkpoint(), None, Path("mine.yaml"))
    assert Path("mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "names no `architectures`"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ([], "is not a JSON object"),
    ],
)
def test_unusable_checkpoints(config: Any, expected: str) -> None:
    with pytest.raises(LayersenseError, match=expected):
        write_config(checkpoint(config), device="cpu")
    assert not Path("config").exists()


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LayersenseError, match="the hub cannot be reached"):
        write_config("owner/there-is-none", device="cpu")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "found none of these"),
        ({"a.csv": "", "b.csv": ""}, "found a.csv, b.csv"),
        ({"a.csv": "image,caption\n"}, "line 1 has the columns"),
        ({"a.jsonl": "[]\n"}, "line 1 is no JSON object"),
        ({"a.jsonl": '{"text": "one"}\n'}, "too few"),
    ],
)
def test_unusable_data(files: dict[str, str], expected: str) -> None:
    Path("data").mkdir()
    for name, content in files.items():
        (Path("data") / name).write_text(content)
    with pytest.raises(LayersenseError, match=expected):
        write_config(checkpoint(), Path("data"), device="cpu")
    assert not Path("config").exists()


def test_a_missing_folder() -> None:
    with pytest.raises(LayersenseError, match="is not there"):
        write_config(checkpoint(), Path("nowhere"), device="cpu")
