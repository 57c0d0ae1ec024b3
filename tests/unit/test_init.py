"""`layersense init`: a config for one's own checkpoint and data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layersense.calibration.build import read_records
from layersense.calibration.sampling import draw
from layersense.config import Config
from layersense.config_file import read_config_file
from layersense.errors import LayersenseError
from layersense.init import write_config
from layersense.validation import load_config

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
    Path("Snakefile").touch()
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


@pytest.mark.parametrize(
    ("positions", "length"),
    [({"max_position_embeddings": 64}, 64), ({"n_positions": 256}, 256),
     ({"max_position_embeddings": 2048}, 512), ({}, 512)],
)  # fmt: skip
def test_a_run_is_no_longer_than_the_models_positions(
    positions: dict[str, int], length: int
) -> None:
    write_config(checkpoint({**LLM, **positions}), texts(20), device="cpu")
    (run,) = written().runs.values()
    assert run.max_length == length


def test_a_vision_language_model_on_texts_is_told_so() -> None:
    write_config(checkpoint(), texts(20), device="cpu")
    (run,) = written().runs.values()
    assert run.modality == "text"


def test_outside_the_clone_it_says_where_the_snakefile_is(repository: Path) -> None:
    message = write_config(checkpoint(), out=Path("mine.yaml"), device="cpu")
    (found,) = set(re.findall(r"snakemake --snakefile (\S+) (?:-n|--cores 8)", message))
    assert Path(found).resolve() == repository / "Snakefile"
    assert found in Path("mine.yaml").read_text()


def test_no_data_means_the_sample() -> None:
    write_config(checkpoint(), device="cpu")
    (dataset,) = written().datasets.values()
    assert dataset.source == "sample"


def test_coco_is_recognised(shared_data: Path) -> None:
    write_config(checkpoint(), shared_data / "coco2017-tiny", device="cpu")
    (dataset,) = written().datasets.values()
    assert dataset.model_dump()["root"] == str(shared_data / "coco2017-tiny")
    assert (dataset.source, dataset.calibration, dataset.heldout) == ("coco", 40, 10)


DETECTOR = {"architectures": ["YolosForObjectDetection"]}


def listing(file: Path, images: Path, count: int = 12, key: str = "instances") -> None:
    """Write a COCO file of as many photographs; the last two have no annotation."""
    for folder in (file.parent, images):
        folder.mkdir(parents=True, exist_ok=True)
    names = [f"Straße {number}.png" for number in range(count)]
    for name in names:
        Image.new("RGB", (8, 8)).save(images / name)
    boxes: dict[str, Any] = {"category_id": 1, "bbox": [1, 1, 2, 2]}
    what = boxes if key == "instances" else {"caption": "A street."}
    content = {
        "images": [{"id": i, "file_name": name, "x": None} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, **what} for i in range(count - 2)],
        "categories": [{"id": 1, "name": "cat"}],
        "info": {},
    }
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "images", "given"),
    [
        ("annotations/instances_val.json", "val", "."),
        ("annotations/instances_default.json", "images", "."),
        (
            "annotations/instances_default.json",
            "images/default",
            "annotations/instances_default.json",
        ),
        ("annotations.json", "images", "."),
        ("labels/mine.json", "Meine Bilder", "."),
        ("train/_annotations.coco.json", "train", "."),
        ("train/_annotations.coco.json", "train", "train/_annotations.coco.json"),
    ],
)
def test_layouts_of_other_tools_with_boxes_alone(file: str, images: str, given: str) -> None:
    root = Path("Eigene Daten")
    listing(root / file, root / images)
    (root / "info.json").write_text("{}")  # JSON of another kind
    write_config(checkpoint(DETECTOR), root / given, device="cpu")
    (dataset,) = written().datasets.values()
    assert (dataset.source, dataset.calibration, dataset.heldout) == ("coco", 10, 2)
    records = read_records(dataset)
    assert records.images_root is not None
    assert records.images_root.resolve() == (root / images).resolve()
    assert (len(records.images), len(records.boxes), len(records.captions)) == (12, 10, 0)


def test_photographs_without_a_caption_are_no_rows() -> None:
    root = Path("data")
    listing(root / "annotations" / "captions_a.json", root / "moved", count=22, key="captions")
    write_config(checkpoint(), root, device="cpu")
    dataset = written().datasets["data"]
    assert dataset.calibration + dataset.heldout == 20
    sizes = {"calibration": dataset.calibration, "heldout": dataset.heldout}
    draw(read_records(dataset), **sizes, seed=0, name="data")  # raises if there are fewer


def test_captions_and_instances_of_one_split_are_one_dataset() -> None:
    root = Path("data")
    for key in ("captions", "instances"):
        listing(root / "annotations" / f"{key}_a.json", root / "moved", key=key)
    write_config(checkpoint(DETECTOR), root, device="cpu")
    records = read_records(written().datasets["data"])
    assert (len(records.boxes), len(records.captions)) == (10, 10)


def test_boxes_alone_are_no_data_for_a_model_of_words() -> None:
    listing(Path("data") / "annotations.json", Path("data") / "images")
    with pytest.raises(LayersenseError, match="dataset `data` has no captions"):
        write_config(checkpoint(LLM), Path("data"), device="cpu")


def test_several_files_of_coco_are_a_question() -> None:
    for split in ("train", "valid"):
        listing(Path("data") / split / "_annotations.coco.json", Path("data") / split)
    with pytest.raises(LayersenseError, match=r"found train/_ann.*, valid/_ann.*name the one file"):
        write_config(checkpoint(DETECTOR), Path("data"), device="cpu")


def test_images_that_are_nowhere_near() -> None:
    listing(Path("data") / "annotations.json", Path("elsewhere"))
    with pytest.raises(LayersenseError, match=r"lists the image 'Straße 0\.png'.*key `images`"):
        write_config(checkpoint(DETECTOR), Path("data"), device="cpu")


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
        ({"a.json": '["one", "two"]'}, "found none of these"),
    ],
)
def test_unusable_data(files: dict[str, str], expected: str) -> None:
    Path("data").mkdir()
    for name, content in files.items():
        (Path("data") / name).write_text(content)
    with pytest.raises(LayersenseError, match=expected):
        write_config(checkpoint(), Path("data"), device="cpu")
    assert not Path("config").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('["one", "two"]', "is not a COCO file.*texts go into a .jsonl file"),
        ('{"images": [], "annotations": []}', "lists no images or no annotations"),
    ],
)
def test_json_that_is_no_listing(content: str, expected: str) -> None:
    Path("texts.json").write_text(content)
    with pytest.raises(LayersenseError, match=expected):
        write_config(checkpoint(), Path("texts.json"), device="cpu")


def test_a_missing_folder() -> None:
    with pytest.raises(LayersenseError, match="is not there"):
        write_config(checkpoint(), Path("nowhere"), device="cpu")
