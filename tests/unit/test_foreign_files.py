"""Readers of foreign files, fuzzed: whatever stands there is read, or refused in one sentence.

`make fuzz` runs these with many more examples; see tests/fuzz.py.
"""

import copy
import io
import json
import os
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from layersense.calibration.build import build_database
from layersense.calibration.coco import read_coco
from layersense.calibration.images import decode_image
from layersense.calibration.masks import decode_mask
from layersense.calibration.tables import read_table, read_texts
from layersense.config import Dataset
from layersense.config_file import read_config_file
from layersense.errors import LayersenseError
from layersense.manifests.read import read_manifest, validate_manifest
from layersense.validation import load_config

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(string.ascii_letters + "_", max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
MANIFEST_KEYS = st.sampled_from(
    ["scheme", "model", "dataset", "layers", "autoquant_state", "layer_sensitivity", "formats",
     "scores", "costs", "sensitivity_ranking", "schema_version", "num_quantized_layers", "name",
     "run", "environment", "findings", "x.quant_recipe", "NONE(effective-bits: 16.0)"]
)  # fmt: skip
COCO_KEYS = st.sampled_from(
    ["images", "annotations", "categories", "id", "image_id", "caption", "file_name", "width",
     "height", "bbox", "category_id", "area", "iscrowd", "segmentation", "name", "supercategory"]
)  # fmt: skip
FUZZ = settings(
    max_examples=int(os.environ.get("LAYERSENSE_FUZZ", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""`make fuzz` makes ten minutes of it; what it found is kept as tests at the end."""


def sentence_of(read: Callable[[], object]) -> str | None:
    """Return the sentence by which a reader refuses, None if it does not; all else is raised."""
    try:
        read()
    except LayersenseError as error:
        return str(error)
    return None


def like(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        JSON,
        lambda inner: st.dictionaries(keys, inner, max_size=6) | st.lists(inner, max_size=3),
        max_leaves=20,
    )


@FUZZ
@given(content=like(MANIFEST_KEYS) | st.dictionaries(MANIFEST_KEYS, like(MANIFEST_KEYS)))
def test_any_manifest_is_read_or_refused_in_a_sentence(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(content))
    assert all(isinstance(problem, str) for problem in validate_manifest(file))
    sentence = sentence_of(lambda: read_manifest(file))
    assert sentence is None or str(file) in sentence


@FUZZ
@given(content=like(COCO_KEYS) | st.dictionaries(COCO_KEYS, like(COCO_KEYS)))
def test_any_coco_file_is_read_or_refused_in_a_sentence(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    for captions, instances in ((file, None), (None, file)):
        sentence = sentence_of(partial(read_coco, captions, instances, tmp_path))
        assert sentence is None or str(file) in sentence


@FUZZ
@given(text=st.text(max_size=200) | JSON.map(yaml.safe_dump))
def test_any_config_is_read_or_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert sentence_of(lambda: load_config(read_config_file(file), str(file))) != ""


@FUZZ
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_in_a_sentence(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    for read in (read_manifest, read_config_file):
        assert sentence_of(partial(read, file)) != ""
    assert sentence_of(lambda: read_coco(file, None, tmp_path)) != ""


# --- what is nearly right


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in JSON."""
    keys = (
        content.keys()
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else ()
    )
    return [path, *(found for key in keys for found in places(content[key], (*path, key)))]


def changed(content: Any) -> st.SearchStrategy[Any]:
    """Return JSON with a few values replaced, or taken from elsewhere in it."""
    everywhere = places(content)[1:]

    def at(path: tuple[Any, ...]) -> Any:
        value = content
        for key in path:
            value = value[key]
        return value

    values = JSON | st.sampled_from(everywhere).map(at)

    def change(edits: list[tuple[tuple[Any, ...], Any]]) -> Any:
        new = copy.deepcopy(content)
        for path, value in edits:
            part = new
            try:
                for key in path[:-1]:
                    part = part[key]
                part[path[-1]] = copy.deepcopy(value)
            except (TypeError, KeyError, IndexError):  # an earlier edit took it away
                continue
        return new

    edit = st.tuples(st.sampled_from(everywhere), values)
    return st.lists(edit, min_size=1, max_size=3).map(change)


POLYGON = [[1.0, 2.0, 4.5, 2.0, 4.5, 6.0]]
RUNS = {"size": [10, 20], "counts": [5, 190, 5]}
PACKED = {"size": [10, 20], "counts": "a0P1a0"}
IMAGES = [
    {"id": i, "file_name": f"{i}.png", "width": 20, "height": 10, "coco_url": f"http://h/{i}.png"}
    for i in range(1, 5)
]
COCO = {
    "captions": {
        "images": IMAGES,
        "annotations": [{"id": 9 + i, "image_id": i, "caption": f"no. {i}"} for i in range(1, 5)],
    },
    "instances": {
        "images": IMAGES,
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 3.5, 4], "area": 14.0,
             "iscrowd": 0, "segmentation": mask}
            for i, mask in enumerate((POLYGON, RUNS, PACKED, []), start=1)
        ],
        "categories": [{"id": 1, "name": "thing", "supercategory": "things"}],
    },
}  # fmt: skip


@FUZZ
@given(content=changed(COCO))
def test_nearly_coco_is_built_or_refused_in_a_sentence(tmp_path: Path, content: Any) -> None:
    notes = tmp_path / "annotations"
    notes.mkdir(exist_ok=True)
    (tmp_path / "val2017").mkdir(exist_ok=True)
    for key in range(1, 5):
        file = tmp_path / f"val2017/{key}.png"
        if not file.exists():
            Image.new("RGB", (20, 10), (key, 0, 0)).save(file)
    for kind in COCO:
        part = content[kind] if isinstance(content, dict) else content
        (notes / f"{kind}_val2017.json").write_text(json.dumps(part))
    entry = {"source": "coco", "root": str(tmp_path), "split": "val2017"}
    dataset = TypeAdapter[Any](Dataset).validate_python({**entry, "calibration": 2, "heldout": 1})
    out = tmp_path / "d.sqlite"
    sentence = sentence_of(lambda: build_database("d", dataset, out))
    assert sentence is None or "\n" not in sentence
    out.unlink(missing_ok=True)


@FUZZ
@given(
    content=changed([POLYGON, RUNS, PACKED]) | JSON.map(lambda value: [value]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_any_mask_is_decoded_or_refused_in_a_sentence(
    content: list[Any], height: int, width: int
) -> None:
    for mask in content:
        text = json.dumps(mask)

        def decode(text: str = text) -> None:
            assert decode_mask(text, height, width, "image 1").shape == (height, width)

        assert sentence_of(decode) != ""


CONFIG: dict[str, Any] = {
    "datasets": {
        "coco": {"source": "coco", "root": "data", "split": "val2017", "fetch": {"connections": 2}},
        "own": {"source": "images", "images": "photos", "table": "table.csv", "calibration": 9},
    },
    "models": {"demo": {"source": "demo"}, "llm": {"checkpoint": "a/b", "task": "causal-lm"}},
    "formats": {"MINE": {"base": "INT8_DEFAULT_CFG", "weight": {"axis": None, "num_bits": 8}}},
    "schemes": {
        "bits": {"quant_formats": ["MINE", "FP8_ALL_LAYERS_CFG"], "effective_bits": 9.0},
        "ms": {"quant_formats": ["MINE"], "cost_table": {"file": "a.csv", "at_most": 1.0}},
    },
    "runs": {
        "one": {"model": "demo", "dataset": "coco", "schemes": ["bits", "ms"], "device": "cpu",
                "verify": {"groups": 4}, "score_samples": 4},
    },
    "manifests": {"elder": {"file": "old.json", "model": "m"}},
    "report": {"title": "t", "top": 3},
}  # fmt: skip


@FUZZ
@given(content=changed(CONFIG))
def test_nearly_a_config_is_read_or_refused_in_a_sentence(content: Any) -> None:
    if isinstance(content, dict):
        assert sentence_of(lambda: load_config(content, "config.yaml")) != ""


@FUZZ
@given(
    text=st.text(max_size=200)
    | st.lists(JSON).map(lambda rows: "\n".join(map(json.dumps, rows)))
    | st.text("image,tex\n\r\"';.png\x00", max_size=60).map("image,text\n".__add__),
    name=st.sampled_from(["table.csv", "table.jsonl"]),
)
def test_any_table_is_read_or_refused_in_a_sentence(tmp_path: Path, text: str, name: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    for read in (partial(read_table, file, tmp_path), partial(read_texts, file)):
        sentence = sentence_of(read)
        assert sentence is None or str(file) in sentence


def photographs() -> list[bytes]:
    found = []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((20, 10)).convert("RGB").save(buffer, kind)
        found.append(buffer.getvalue())
    return found


@FUZZ
@given(
    data=st.sampled_from(photographs()),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    end=st.integers(0, 30),
)
def test_any_image_is_read_or_refused_in_a_sentence(
    data: bytes, edits: list[tuple[int, int]], end: int
) -> None:
    bad = bytearray(data)
    for at, value in edits:
        bad[at % len(bad)] = value
    sentence = sentence_of(lambda: decode_image(bytes(bad[: len(bad) - end]), "a.png"))
    assert sentence is None or "a.png" in sentence
