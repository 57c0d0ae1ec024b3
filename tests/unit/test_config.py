"""The config: what is refused, in which words; the files that come with it; what is generated."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layersense import config_docs
from layersense.config_file import read_config_file
from layersense.errors import LayersenseError
from layersense.validation import check_gpus, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = [REPOSITORY / "config/config.yaml", *sorted((REPOSITORY / "config/examples").iterdir())]


def valid() -> dict[str, Any]:
    return {
        "datasets": {
            "sample": {"source": "sample", "calibration": 90, "heldout": 10},
            "texts": {"source": "text", "file": "no/texts.jsonl"},
        },
        "models": {
            "demo": {"source": "demo"},
            "llm": {"checkpoint": "owner/llm", "task": "causal-lm"},
        },
        "formats": {"MINE": {"base": "FP8_DEFAULT_CFG", "weight": {"axis": 0}}},
        "schemes": {
            "fp8": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 11},
            "nvfp4": {"quant_formats": ["NVFP4_ALL_LAYERS_CFG", "MINE"], "effective_bits": 6.0},
        },
        "runs": {
            "demo.a": {"model": "demo", "dataset": "sample", "schemes": ["fp8"], "device": "cpu"},
            "llm.a": {"model": "llm", "dataset": "sample", "schemes": ["fp8", "nvfp4"]},
        },
    }


def problems(data: Any, *, check_files: bool = False) -> list[str]:
    with pytest.raises(LayersenseError) as caught:
        load_config(data, "c.yaml", check_files=check_files)
    heading, *lines = str(caught.value).split("\n")
    assert heading == f"the config has {len(lines)} problem{'s' if len(lines) > 1 else ''}:"
    assert all(line.startswith("  c.yaml: ") for line in lines)
    return [line.removeprefix("  c.yaml: ") for line in lines]


def put(path: str, value: Any) -> dict[str, Any]:
    """The valid config with one key (``a/b/c``) changed."""
    data = valid()
    *parents, last = path.split("/")
    part = data
    for key in parents:
        part = part[key]
    part[last] = value
    return data


def test_a_valid_config_is_accepted_with_its_defaults() -> None:
    config = load_config(valid(), "c.yaml", check_files=False)
    assert config.runs["llm.a"].device == "cuda"
    assert config.schemes["fp8"].effective_bits == 11.0
    assert config.datasets["texts"].calibration == 512
    assert config.frozen is False


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("runs/demo.a/model", "dmo", 'runs."demo.a".model: expected the name of an entry of '
         '`models` (`demo` or `llm`), found "dmo"; did you mean `demo`?'),
        ("runs/demo.a/dataset", "smaple", 'runs."demo.a".dataset: expected the name of an entry of '
         '`datasets` (`sample` or `texts`), found "smaple"; did you mean `sample`?'),
        ("runs/demo.a/schemes", ["fp8", "fp9"], 'runs."demo.a".schemes[1]: expected the name of an '
         'entry of `schemes` (`fp8` or `nvfp4`), found "fp9"; did you mean `fp8`?'),
        ("runs/demo.a/schemes", ["fp8", "fp8"],
         'runs."demo.a".schemes[1]: names the scheme `fp8` twice'),
        ("runs/demo.a/schemes", "fp8", 'runs."demo.a".schemes: expected a list (`[fp8]`), '
         'found "fp8"'),
        ("runs/demo.a/schemes", [], 'runs."demo.a".schemes: expected at least 1 entry, found a '
         "list"),
        ("runs/demo.a/seed", "1", 'runs."demo.a".seed: expected a whole number, found "1"'),
        ("runs/demo.a/seed", None, 'runs."demo.a".seed: expected a whole number, found nothing'),
        ("runs/demo.a/seed", True, 'runs."demo.a".seed: expected a whole number, found `true`'),
        ("runs/demo.a/seed", -1, 'runs."demo.a".seed: expected at least 0, found `-1`'),
        ("runs/demo.a/method", "gradeint", 'runs."demo.a".method: expected `gradient` or `kl_div`, '
         'found "gradeint"; did you mean `gradient`?'),
        ("runs/demo.a/modality", "image", 'runs."demo.a".modality: expected `image_text`, '
         '`text`, `text_pair`, `image_boxes`, `image_labels` or `image_masks`, found "image"; did '
         "you mean `image_text`?"),
        ("models/llm/task", "causal_lm", "models.llm.task: expected `causal-lm`, "
         "`image-text-to-text`, `seq2seq-lm`, `image-classification`, `object-detection` or "
         '`semantic-segmentation`, or a class as `package.module:Class`, found "causal_lm"; did '
         "you mean `causal-lm`?"),
        ("models/llm/task", "my.module:Task", 'runs."llm.a".modality: expected `image_text`, '
         "`text`, `text_pair`, `image_boxes`, `image_labels` or `image_masks`, as "
         "`my.module:Task` is not looked into, found nothing"),
        ("runs/llm.a/modality", "image_text", 'runs."llm.a".modality: expected `text`, what a '
         'model with `task: causal-lm` takes, found "image_text"'),
        ("runs/demo.a/dataset", "texts", 'runs."demo.a".modality: dataset `texts` holds texts and '
         "no images; set `modality: text`, or take a dataset with images"),
        ("runs/demo.a/calibration_samples", 91, 'runs."demo.a".calibration_samples: expected at '
         "most 90, the calibration rows of dataset `sample`, found `91`"),
        ("runs/demo.a/score_samples", 91, 'runs."demo.a".score_samples: expected at most 90, the '
         "calibration rows that the run uses, found `91`"),
        ("runs/demo.a/heldout_samples", 11, 'runs."demo.a".heldout_samples: expected at most 10, '
         "its dataset's `heldout`, found `11`"),
        ("runs/llm.a/verify", {"captions": True}, 'runs."llm.a".verify.captions: lets a '
         "vision-language model write captions of photographs, which `task: causal-lm` does not; "
         "leave it out"),
        ("runs/demo.a", {"model": "demo", "dataset": "texts", "schemes": ["fp8"],
                         "modality": "text", "verify": {"captions": True}},
         'runs."demo.a".verify.captions: lets a vision-language model write captions of '
         "photographs, which texts alone are not; leave it out"),
        ("schemes/fp8/coverage_fraction", 0.5, "schemes.fp8.coverage_fraction: expected 1.0 or "
         "nothing under `coverage_mode: full`; set `coverage_mode: fraction` to limit the share, "
         "found `0.5`"),
        ("schemes/fp8/effective_bits", 7.5, "schemes.fp8.effective_bits: expected at least 8, the "
         "bits of `FP8_ALL_LAYERS_CFG`, the smallest format of the scheme, found `7.5`"),
        ("schemes/fp8/effective_bits", float("nan"),
         "schemes.fp8.effective_bits: expected a finite number, found `nan`"),
        ("schemes/fp8/effective_bits", 17,
         "schemes.fp8.effective_bits: expected at most 16, found `17`"),
        ("schemes/fp8/quant_formats", ["FP8_ALL_LAYERS_CFG"] * 2,
         "schemes.fp8.quant_formats[1]: names the format `FP8_ALL_LAYERS_CFG` twice"),
        ("schemes/fp8/quant_formats", ["FP8_ALL_LAYER_CFG"], "schemes.fp8.quant_formats[0]: "
         'expected a format (docs/formats.md lists them), found "FP8_ALL_LAYER_CFG"; did you mean '
         "`FP8_ALL_LAYERS_CFG`?"),
        ("schemes/fp8/search_spaces", [{"quant_formats": ["FP8_ALL_LAYERS_CFG"]}],
         "schemes.fp8.search_spaces[0].layers: expected this key (The layers, as shell patterns on "
         "module names), found nothing"),
        ("schemes/fp8/search_spaces",
         [{"layers": ["a"], "quant_formats": ["FP8_ALL_LAYERS_CFG"], "unquantised": False}],
         "schemes.fp8.search_spaces[0].unquantised: expected one of the keys `layers`, "
         '`quant_formats` or `unquantized`, found "unquantised"; did you mean `unquantized`?'),
        ("schemes/fp8/search_spaces", [{"layers": ["a"], "quant_formats": None}],
         "schemes.fp8.search_spaces[0].quant_formats: expected a list, found nothing"),
        ("schemes/fp8/search_spaces", [{"layers": ["a"], "quant_formats": "NVFP4"}],
         'schemes.fp8.search_spaces[0].quant_formats: expected a list (`[NVFP4]`), found "NVFP4"'),
        ("schemes/fp8/search_spaces", [{"layers": ["a"], "quant_formats": [4]}],
         "schemes.fp8.search_spaces[0].quant_formats[0]: expected text (put it in quotes), found "
         "`4`"),
        ("runs/demo.a/export", [3],
         'runs."demo.a".export[0]: expected text (put it in quotes), found `3`'),
        ("runs/demo.a", {"model": "demo", "dataset": "sample", "schemes": "fp8", "export": ["fp8"]},
         'runs."demo.a".schemes: expected a list (`[fp8]`), found "fp8"'),
        ("runs/demo.a/verify", {3: 4}, 'runs."demo.a".verify[3]: keys should be strings, found '
         "`3`"),
        ("models/llm/trust_remote_code", True, "models.llm.revision: expected a commit of "
         "owner/llm, because `trust_remote_code` would run whatever code the hub serves that day, "
         "found nothing"),
        ("models/llm", {"checkpoint": "./here", "task": "causal-lm", "revision": "main"},
         "models.llm.revision: a directory (./here) has no revisions; remove the key, found "
         '"main"'),
        ("models/llm/checkpoint", "data/models/llm", "models.llm.checkpoint: expected a hub id "
         "such as `owner/name`, or a directory that exists or is written as `./…`, `/…` or `~/…`, "
         'found "data/models/llm"'),
        ("models/llm/source", "checkpiont", "models.llm.source: expected `demo` or `checkpoint`, "
         'found "checkpiont"; did you mean `checkpoint`?'),
        ("models/llm", "owner/llm", 'models.llm: expected a mapping, found "owner/llm"'),
        ("datasets/texts", "file", 'datasets.texts: expected a mapping, found "file"'),
        ("datasets/texts", {"file": "x"}, "datasets.texts.source: expected this key (`sample`, "
         "`coco`, `images` or `text`), found nothing"),
        ("datasets/texts/source", "txt", "datasets.texts.source: expected `sample`, `coco`, "
         '`images` or `text`, found "txt"; did you mean `text`?'),
        ("datasets/SAMPLE", {"source": "sample"}, "datasets.SAMPLE: differs from `sample` only in "
         "letter case, and both would be one file on some machines; rename one of them"),
        ("formats/mine", {"base": "FP8_DEFAULT_CFG"}, "formats.mine: differs from `MINE` only in "
         "letter case, and both would be one file on some machines; rename one of them"),
        ("runs/device", "cpu", "runs.device: expected a mapping of keys (`device` is a key of the "
         'entry above it: indent it further), found "cpu"'),
        ("schemes/effective_bits", 6, "schemes.effective_bits: expected a mapping of keys "
         "(`effective_bits` is a key of the entry above it: indent it further), found `6`"),
        ("runs/demo.a/verify", True, 'runs."demo.a".verify: expected a mapping (`{}` for the '
         "defaults), found `true`"),
        ("formats", None, "formats: expected a mapping, found nothing"),
        ("runs/demo.a/gpus", 2, 'runs."demo.a".gpus: expected 1 under `device: cpu`, found `2`'),
        ("frozen", "perhaps", 'frozen: expected true or false, found "perhaps"'),
        ("reprot", {}, "reprot: expected one of the keys `datasets`, `models`, `formats`, "
         '`schemes`, `runs`, `manifests`, `report`, `extensions` or `frozen`, '
         'found "reprot"; did you mean `report`?'),
    ],
)  # fmt: skip
def test_one_problem_is_one_line(path: str, value: Any, expected: str) -> None:
    found = problems(put(path, value))
    if path == "formats":  # the scheme that names MINE has lost it
        found = [line for line in found if not line.startswith("schemes.")]
    assert found == [expected]


def test_unknown_keys_name_the_nearest() -> None:
    (line,) = problems(put("runs/demo.a/batchsize", 4))
    assert line.startswith('runs."demo.a".batchsize: expected one of the keys `model`, `dataset`')
    assert line.endswith('found "batchsize"; did you mean `batch_size`?')
    (line,) = problems(put("datasets/texts/flie", "x"))
    assert line.endswith("did you mean `file`?")


def test_a_missing_key_says_what_it_is_for() -> None:
    data = valid()
    del data["schemes"]["fp8"]["effective_bits"]
    (line,) = problems(data)
    assert line == (
        "schemes.fp8.effective_bits: expected this key (Budget: average bits per weight over all "
        "searched layers. A scheme has one budget: this, `size_gb` or `cost_table`) or another "
        "budget (`size_gb` or `cost_table`), found nothing"
    )


def test_a_format_that_the_target_does_not_read_is_refused() -> None:
    data = valid()
    data["schemes"]["fp8"]["target"] = "vllm"
    assert load_config(data, "c.yaml", check_files=False).schemes["fp8"].target == "vllm"
    data["schemes"]["fp8"]["quant_formats"] = ["INT8_ALL_LAYERS_CFG"]
    (line,) = problems(data)
    assert line.startswith("schemes.fp8.quant_formats: vLLM does not read `INT8_ALL_LAYERS_CFG`")
    data["schemes"]["fp8"]["target"] = "onnx"
    (line,) = problems(data)
    assert line.startswith("schemes.fp8.target: ")


def test_a_key_value_cache_needs_a_model_that_has_one() -> None:
    data = valid()
    data["schemes"]["fp8"]["kv_cache"] = "fp8"
    assert load_config(data, "c.yaml", check_files=False).schemes["fp8"].kv_cache == "fp8"
    data["schemes"]["fp8"]["target"] = "tensorrt"
    (line,) = problems(data)
    assert line.startswith("schemes.fp8.kv_cache: expected `none`: TensorRT reads no key-value")
    data["schemes"]["fp8"].update(target="vllm", kv_cache="nvfp4")
    line = next(line for line in problems(data) if "vLLM" in line)
    assert line.startswith("schemes.fp8.kv_cache: expected `none`, `fp8` or `fp8_cast`: vLLM reads")


def test_what_cannot_be_exported_is_refused() -> None:
    data = valid()
    run = data["runs"]["demo.a"]
    run["export"] = ["fp8"]
    assert load_config(data, "c.yaml", check_files=False).runs["demo.a"].export == ["fp8"]
    # Four-bit integers calibrated by `max` would be written as AWQ without its scales.
    data["schemes"]["fp8"]["quant_formats"] = ["INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"]
    (line,) = problems(data)
    assert line.startswith('runs."demo.a".export[0]: ModelOpt\'s exporter cannot write format')
    assert "`INT4_AWQ_ALL_LAYERS_CFG`" in line
    run["export"] = ["fp9"]
    (line,) = problems(data)
    assert line.endswith('found "fp9"; did you mean `fp8`?')


def test_a_scheme_has_one_budget() -> None:
    data = valid()
    data["schemes"]["fp8"]["size_gb"] = 3.0
    (line,) = problems(data)
    assert line == ("schemes.fp8.size_gb: expected one budget, and effective_bits is given already")
    del data["schemes"]["fp8"]["effective_bits"]
    assert load_config(data, "c.yaml", check_files=False).schemes["fp8"].size_gb == 3.0
    del data["schemes"]["fp8"]["size_gb"]
    data["schemes"]["fp8"]["cost_table"] = {"file": "t.csv", "at_most": 5.0, "units": "ms"}
    (line,) = problems(data)
    assert line.startswith("schemes.fp8.cost_table.units: expected one of the keys")


def test_a_misspelt_section_is_one_fault_and_not_those_of_all_who_name_its_entries() -> None:
    data = valid()
    data["scheme"] = data.pop("schemes")
    assert [line.partition(":")[0] for line in problems(data)] == ["schemes", "scheme"]


@pytest.mark.parametrize(
    ("there", "lacks", "task"),
    [
        ("instances", "captions", "causal-lm"),
        ("instances", "captions", "image-text-to-text"),
        ("captions", "instances", "object-detection"),
        ("captions", "instances", "image-classification"),
    ],
)
def test_a_file_of_coco_that_a_task_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, lacks: str, task: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("coco/train2017", "coco/annotations"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / f"coco/annotations/{there}_train2017.json").touch()
    data = valid()
    data["datasets"]["coco"] = {"source": "coco", "root": "coco"}
    data["models"]["other"] = {"checkpoint": "owner/name", "task": task}
    data["runs"]["other.coco"] = {"model": "other", "dataset": "coco", "schemes": ["fp8"]}
    file = tmp_path / f"coco/annotations/{lacks}_train2017.json"
    assert problems(data, check_files=True) == [
        f'runs."other.coco".dataset: dataset `coco` has no {lacks}, which a model with `task: '
        f"{task}` takes: {file} is not there; name the file by `{lacks}` of the dataset, or take "
        "another dataset"
    ]
    load_config({**data, "frozen": True}, "c.yaml")
    data["datasets"]["coco"]["fetch"] = {}
    load_config(data, "c.yaml")
    data["datasets"]["coco"]["fetch"] = None
    data["datasets"]["coco"][lacks] = "mine.json"
    (tmp_path / "mine.json").touch()
    load_config(data, "c.yaml")


def test_inputs_of_rules_have_no_braces(tmp_path: Path) -> None:
    file = tmp_path / "{old}.json"
    file.touch()
    data = valid()
    data["manifests"] = {"old": {"file": str(file)}}
    del data["schemes"]["fp8"]["effective_bits"]
    data["schemes"]["fp8"]["cost_table"] = {"file": str(file), "at_most": 1.0}
    lines = problems(data, check_files=True)
    assert [line.split(":")[0] for line in lines] == [
        "manifests.old.file",
        "schemes.fp8.cost_table.file",
    ]
    assert all("takes braces for wildcards; rename the file" in line for line in lines)


def test_missing_sections_are_all_named() -> None:
    assert [line.split(":")[0] for line in problems({})] == [
        "datasets", "models", "schemes", "runs",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["calibration", "Models", "logs", "benchmarks", "README.md"])
def test_reserved_names_of_runs(name: str) -> None:
    data = valid()
    data["runs"][name] = data["runs"].pop("llm.a")
    (line,) = problems(data)
    assert line.endswith("is the name of a file or folder of the workflow; rename it")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a b", "ü", "", 5, True, None, 1.5])
@pytest.mark.parametrize("section", ["datasets", "models", "schemes", "runs", "formats"])
def test_names_that_are_no_file_names(section: str, name: Any) -> None:
    data = valid()
    data[section][name] = copy.deepcopy(next(iter(data[section].values())))
    lines = problems(data)
    assert any("expected a name of at most 100 letters" in line for line in lines)


def test_all_problems_are_told_at_once_beside_wrong_types() -> None:
    data = valid()
    data["runs"]["demo.a"] |= {
        "batch_size": "four", "model": "nobody", "schemes": ["fp8", 3, "fp10"],
        "calibration_samples": 1000,
    }  # fmt: skip
    data["runs"]["llm.a"]["device"] = "cpu"
    data["schemes"]["nvfp4"]["effective_bits"] = "six"
    data["datasets"]["texts"]["seed"] = 1.5
    data["formats"]["BROKEN"] = {"base": "FP8_DEFUALT_CFG"}
    lines = problems(data)
    places = [line.split(": ")[0] for line in lines]
    assert sorted(places) == sorted(
        [
            'runs."demo.a".batch_size',
            'runs."demo.a".model',
            'runs."demo.a".schemes[1]',
            'runs."demo.a".schemes[2]',
            'runs."demo.a".calibration_samples',
            'runs."llm.a".device',
            "schemes.nvfp4.effective_bits",
            "datasets.texts.seed",
            "formats.BROKEN.base",
        ]
    )


def test_a_wrong_size_causes_no_second_problem() -> None:
    (line,) = problems(put("datasets/sample/calibration", "ninety"))
    assert line.startswith("datasets.sample.calibration")
    assert len(problems(put("runs/demo.a/calibration_samples", 0))) == 1


def test_score_samples_are_limited_by_the_rows_that_calibrate() -> None:
    data = valid()
    data["runs"]["demo.a"] |= {"calibration_samples": 20, "score_samples": 21}
    (line,) = problems(data)
    assert "expected at most 20, the calibration rows that the run uses" in line
    data["runs"]["demo.a"]["score_samples"] = 20
    load_config(data, "c.yaml", check_files=False)


def test_a_format_that_needs_cuda_is_refused_on_the_cpu() -> None:
    (line,) = problems(put("runs/llm.a/device", "cpu"))
    assert line.startswith('runs."llm.a".device: format `NVFP4_ALL_LAYERS_CFG` needs CUDA')


def test_refused_formats_say_why() -> None:
    (line,) = problems(put("schemes/fp8/quant_formats", ["FP8_DEFAULT_CFG"]))
    assert line.startswith("schemes.fp8.quant_formats[0]: ")
    assert "write `FP8_ALL_LAYERS_CFG`" in line
    (line,) = problems(put("schemes/fp8/quant_formats", ["FP8_KV_CFG"]))
    assert "cannot be measured" in line


def test_minimum_pixels_above_the_maximum() -> None:
    data = valid()
    data["runs"]["demo.a"] |= {"min_pixels": 10, "max_pixels": 9}
    assert problems(data) == ['runs."demo.a".min_pixels: expected at most `max_pixels`, 9, '
                              "found `10`"]  # fmt: skip


def test_files_of_used_entries_have_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = valid()
    load_config(data, "c.yaml")  # the texts are not there, and no run uses them
    data["datasets"] |= {
        "coco": {"source": "coco", "root": "coco"},
        "photos": {"source": "images", "images": "photos", "table": "photos/t.csv"},
    }
    data["models"]["llm"]["checkpoint"] = "./llm"
    for name in ("texts", "coco", "photos"):
        data["runs"][f"llm.{name}"] = {"model": "llm", "dataset": name, "schemes": ["fp8"]}
    lines = problems(data, check_files=True)
    assert lines == [
        f"models.llm.checkpoint: expected a folder, but {tmp_path}/llm is not there",
        f"datasets.texts.file: expected a file, but {tmp_path}/no/texts.jsonl is not there",
        f"datasets.coco.root: expected a folder, but {tmp_path}/coco is not there",
        f"datasets.photos.images: expected a folder, but {tmp_path}/photos is not there",
        f"datasets.photos.table: expected a file, but {tmp_path}/photos/t.csv is not there",
    ]
    # A laptop with results alone, which renders and measures nothing.
    far = {**data, "models": {**data["models"], "far": {"checkpoint": "data/models/llm",
                                                       "task": "causal-lm"}}}  # fmt: skip
    load_config({**far, "frozen": "true"}, "c.yaml")
    assert len(problems({**far, "frozen": "false"}, check_files=True)) == len(lines) + 1
    for folder in ("llm", "no", "coco/train2017", "coco/annotations", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("no/texts.jsonl", "photos/t.csv"):
        (tmp_path / file).touch()
    assert problems(data, check_files=True) == [
        "datasets.coco.captions: expected a file, but "
        f"{tmp_path}/coco/annotations/captions_train2017.json is not there"
    ]
    (tmp_path / "coco/annotations/captions_train2017.json").touch()
    load_config(data, "c.yaml")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())  # fmt: skip
    return [path] * bool(path) + [x for key, item in children for x in leaves(item, (*path, key))]


@given(
    st.sampled_from(leaves(valid())),
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 10**6), st.floats(), st.text(max_size=5),
        st.just([]), st.just({}), st.just([[]]), st.just({"source": []}), st.just({1: 2}),
        st.just({"checkpoint": 3, "source": "checkpoint"}),
    ),
)  # fmt: skip
def test_whatever_stands_in_a_config_is_answered(path: tuple[Any, ...], value: Any) -> None:
    data = valid()
    part: Any = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    try:
        load_config(data, "c.yaml", check_files=False)
    except LayersenseError as error:  # and no other exception
        found = str(error)
    else:
        return
    assert "c.yaml: " in found


# --- the file ---


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_equal_keys_are_refused_with_their_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "a: 1\nb:\n  c: 1\n  d: {e: 1, e: 2}\n  c: 2\na: 3\n")
    with pytest.raises(LayersenseError) as caught:
        read_config_file(file)
    message = str(caught.value)
    assert str(file) in message
    for part in ("line 6: `a` stands in line 1", "line 5: `c` stands in line 3", "`e` stands in"):
        assert part in message


def test_anchors_and_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    file = write(tmp_path, "a: &x {k: 1}\nb: *x\nc: {<<: *x, k: 2}\nd: {k: 3}\n")
    assert read_config_file(file) == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 2}, "d": {"k": 3}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", "brackets and quotes are closed"),
        ("a: [1\nb: 2\n", "is not YAML: line 2"),
        ("a:\n\t- b\n", "is not YAML: line 2, column 1"),
        ("a:\n\t- b\n", "indent by spaces"),
        ("a:\n  b: 1\n   c: 2\n", "keys of one mapping have the same indent"),
        ("- a\n", "expected a mapping with `datasets`"),
        ("", "found nothing"),
        (b"a: \xff\n", "is not UTF-8"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
        ("a: \x00\n", "is not YAML"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(LayersenseError, match=re.escape(expected)) as caught:
        read_config_file(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LayersenseError, match="cannot be read"):
        read_config_file(tmp_path / "none.yaml")


# --- GPUs ---


def test_gpu_limits_are_spoken_of() -> None:
    config = load_config(valid(), "c.yaml", check_files=False)
    (warning,) = check_gpus(config, None)
    assert "--resources gpu=1" in warning
    (warning,) = check_gpus(config, 0)
    assert "llm.a" in warning
    assert "demo.a" not in warning
    assert check_gpus(config, 1) == []
    data = valid()
    data["runs"]["llm.a"]["gpus"] = 2
    config = load_config(data, "c.yaml", check_files=False)
    assert check_gpus(config, 2) == []
    (warning,) = check_gpus(config, 1)
    assert "run llm.a asks for 2 GPUs" in warning
    frozen = load_config({**valid(), "frozen": "true"}, "c.yaml", check_files=False)
    assert frozen.frozen is True
    assert check_gpus(frozen, None) == []
    data = valid()
    del data["runs"]["llm.a"]
    assert check_gpus(load_config(data, "c.yaml", check_files=False), None) == []


@pytest.mark.parametrize(
    ("task", "lack"),
    [
        ("seq2seq-lm", "no two texts of one image; take a dataset of images with several"),
        ("object-detection", "texts and no boxes; take COCO with an instances file"),
        ("semantic-segmentation", "texts and no masks; take COCO with an instances file"),
        ("image-classification", "texts and no images; take a dataset with images"),
    ],
)
def test_data_has_to_hold_what_the_task_needs(task: str, lack: str) -> None:
    data = put("models/llm/task", task)
    data["runs"]["llm.a"]["dataset"] = "texts"
    (problem,) = problems(data)
    assert problem.startswith(f'runs."llm.a".modality: dataset `texts` holds {lack}')


def test_manifests_of_others_have_names_of_their_own() -> None:
    data = valid()
    data["manifests"] = {"demo.A": {"file": "x.json"}, "models": {"file": "y.json", "modle": "m"}}
    found = problems(data)
    assert found[0].startswith("manifests.models.modle: expected one of the keys `file`, `model`")
    assert found[1:] == [
        "manifests.models: is the name of a file or folder of the workflow; rename it",
        'manifests."demo.A": is the name of a run, too; rename one of them',
    ]
    data["manifests"] = {"elder": {"file": "no/elder.json"}}
    load_config(data, "c.yaml", check_files=False)
    assert any(line.startswith("manifests.elder.file: expected a file") for line in
               problems(data, check_files=True))  # fmt: skip


def test_detectors_have_no_kl_div() -> None:
    data = put("models/llm/task", "object-detection")
    data["runs"]["llm.a"]["method"] = "kl_div"
    (problem,) = problems(data)
    assert problem.startswith('runs."llm.a".method: expected `gradient`, because')


def test_a_task_of_ones_own_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "task.py").write_text("raise SystemExit('nobody may run this')\n")
    (tmp_path / "texts.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    data = put("models/llm/task", "mine.task:Task")
    data["datasets"]["texts"]["file"] = "texts.jsonl"
    data["runs"]["llm.a"]["modality"] = "text"
    load_config(data, "c.yaml")
    data["models"]["llm"]["task"] = "mine.tusk:Task"
    with pytest.raises(LayersenseError, match=r"models\.llm\.task: expected a class in a module"):
        load_config(data, "c.yaml")
    load_config({**data, "frozen": True}, "c.yaml")


# --- what comes with the repository ---


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_are_valid(file: Path) -> None:
    data = read_config_file(file)
    load_config(data, str(file), check_files=False)
    jsonschema.validate(data, json.loads(config_docs.SCHEMA.read_text()))
    modeline = file.read_text().splitlines()[0]
    assert modeline.startswith("# yaml-language-server: $schema=")
    assert (file.parent / modeline.split("=")[1]).resolve() == config_docs.SCHEMA


def test_the_default_config_shows_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(read_config_file(CONFIGS[0]), "config.yaml")
    scheme = config.schemes["fp8_autoquant_all_layers_fp8"]
    assert (scheme.quant_formats, scheme.effective_bits) == (["FP8_ALL_LAYERS_CFG"], 11.0)
    assert {run.device for run in config.runs.values()} == {"cpu"}
    assert config.runs["demo.captions"].modality == "text"
    assert len(config.runs["demo.image-text"].schemes) == 3


def test_own_photographs_take_at_most_twelve_lines() -> None:
    text = (REPOSITORY / "config/examples/own-photographs.yaml").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 12


def test_generated_files_are_up_to_date() -> None:
    fix = "run `python -m layersense.config_docs`"
    assert config_docs.SCHEMA.read_text() == config_docs.schema(), fix
    assert config_docs.README.read_text() == config_docs.readme(), fix


def test_the_reference_names_every_key() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", config_docs.README.read_text(), re.MULTILINE))
    schema = json.loads(config_docs.SCHEMA.read_text())
    keys = {key for part in schema["$defs"].values() for key in part["properties"]}
    assert keys == rows
    assert "\n| `undocumented" not in config_docs.readme()
    for part in schema["$defs"].values():
        assert all(value.get("description") for value in part["properties"].values())


def test_the_schema_refuses_what_the_models_refuse() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(config_docs.SCHEMA.read_text()))
    assert validator.is_valid(valid())
    for path, value in [
        ("runs/demo.a/batchsize", 4), ("schemes/fp8/effective_bits", 17), ("reprot", {}),
        ("models/llm/task", "x"), ("datasets/a b", {"source": "sample"}), ("runs", {}),
        ("datasets/texts/root", "x"),
    ]:  # fmt: skip
        assert not validator.is_valid(put(path, value)), path


def test_nothing_heavy_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys, layersense.validation, layersense.settings, layersense.config_docs, "
        "layersense.init;"
        "print([m for m in ('torch', 'transformers', 'modelopt', 'torchvision', 'snakemake') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
