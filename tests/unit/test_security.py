"""What must never happen: code from data, words that reach a shell, secrets in outputs."""

import ast
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from layersense.errors import LayersenseError
from layersense.manifests.modelopt_state import read_state
from layersense.validation import load_config

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
    data = pickle.dumps({"candidate_stats": {}, "best": kind()})
    with zipfile.ZipFile("state.pt", "w") as archive:
        archive.writestr("state/data.pkl", data)
    assert read_state("state.pt") == {"candidate_stats": {}, "best": None}
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
