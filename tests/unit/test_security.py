"""What must never happen: code from data, words that reach a shell, secrets in outputs."""

import ast
import json
import os
import pickle
import re
import string
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layersense.calibration.coco import read_coco
from layersense.errors import LayersenseError
from layersense.manifests.modelopt_state import read_state
from layersense.manifests.read import read_manifest, validate_manifest
from layersense.validation import load_config, read_config_file

EVIL = (
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a\nb",
    "{wildcards}",
    "../up",
    "a b",
    "-x",
)


UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RESTRICTED = "modelopt_state.py"
"""The one reader of a foreign pickle, which resolves none of the classes that it names."""
EVALUATORS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


def sources(repository: Path) -> list[Path]:
    found = [repository / "Snakefile"]
    for folder in ("workflow/layersense", "workflow/rules"):
        found += [
            file for pattern in ("*.py", "*.smk") for file in (repository / folder).rglob(pattern)
        ]
    return found


def test_nothing_unpickles_evaluates_or_calls_a_shell(repository: Path) -> None:
    for file in (repository / "workflow/layersense").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file}:{getattr(node, 'lineno', '?')}"
            if isinstance(node, ast.Import) and file.name != RESTRICTED:
                assert not UNPICKLERS & {alias.name.split(".")[0] for alias in node.names}, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in UNPICKLERS, where
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in EVALUATORS, where
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("shell") != "True", where
                assert given.get("weights_only") != "False", where
                assert "allow_pickle" not in given, where
                # A pickle of ultralytics, which the user has said to trust.
                assert given.get("safe_only") != "False" or file.name == "yolo.py", where


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


class EvilEval:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('pwned', 'w')",)


@pytest.mark.parametrize("kind", [Evil, EvilEval])
def test_a_saved_state_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"method": "gradient", "best": kind()})
    with zipfile.ZipFile("state.pt", "w") as archive:
        archive.writestr("state/data.pkl", data)
    assert read_state("state.pt") == {"method": "gradient", "best": None}
    assert not Path("pwned").exists()
    pickle.loads(data)  # the same bytes do run code where nothing forbids it
    assert Path("pwned").exists()


def test_torch_loads_weights_alone(repository: Path) -> None:
    for file in sources(repository):
        for call in re.findall(r"torch\.load\([^)]*\)", file.read_text()):
            assert "weights_only=True" in call, f"{file}: {call}"


def test_every_value_of_a_rule_is_quoted(repository: Path) -> None:
    """What stands in braces of a shell command is quoted, unless it is a number."""
    for file in (repository / "workflow/rules").glob("*.smk"):
        text = file.read_text()
        for command in re.findall(r"    shell:\n((?:        .*\n?)+)", text):
            for value in re.findall(r"\{([^{}]+)\}", command):
                assert value.endswith(":q") or value in ("threads", "PYTHON"), (
                    f"{file}: {{{value}}}"
                )


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("section", ["runs", "schemes", "models", "datasets", "formats"])
def test_a_name_that_is_no_name_is_refused(section: str, name: str) -> None:
    entries: dict[str, dict[str, Any]] = {
        "datasets": {"d": {"source": "sample", "calibration": 8, "heldout": 2}},
        "models": {"m": {"source": "demo"}},
        "formats": {},
        "schemes": {"s": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 11.0}},
        "runs": {"r": {"model": "m", "dataset": "d", "schemes": ["s"], "device": "cpu"}},
    }
    entry = next(iter(entries[section].values()), {"base": "FP8_DEFAULT_CFG"})
    entries[section][name] = entry
    with pytest.raises(LayersenseError, match="expected a name"):
        load_config(entries, "config.yaml")


def test_secrets_of_the_environment_reach_no_output(tmp_path: Path) -> None:
    """The log of a job that fails in an unknown way shows the most."""
    secrets = {
        name: f"planted-{name.lower()}-{index}"
        for index, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"))
    }
    log = tmp_path / "logs/a.log"
    done = subprocess.run(
        [sys.executable, "-m", "layersense", "dataset", "a", "--settings", '{"source": 1}'],
        env={**os.environ, **secrets, "LAYERSENSE_LOG": str(log)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    written = [done.stdout, done.stderr]
    written += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert log.with_suffix(".jsonl").exists()
    for text in written:
        assert "planted" not in text


# --- readers of foreign files --------------------------------------------------------------------

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
"""``LAYERSENSE_FUZZ=200000`` makes minutes of it; what it found is kept as tests below."""


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
