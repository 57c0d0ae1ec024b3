"""The command line: help is cheap, failures begin with one sentence."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.main import get_command

from layersense import __version__
from layersense.cli import _quiet, app

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = ("torch", "torchvision", "transformers", "modelopt", "pandas", "pyarrow", "scipy")


def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "layersense", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


def test_every_rule_has_its_command() -> None:
    rules = Path(__file__).resolve().parents[2] / "workflow/rules"
    text = "".join(file.read_text() for file in rules.glob("*.smk"))
    named = {part.split()[0] for part in text.split("-m layersense ")[1:]}
    assert named <= set(COMMANDS)
    people = {
        "import", "init", "reach", "estimate", "show", "diff", "validate", "doctor", "apply",
        "check",
    }  # fmt: skip
    assert set(COMMANDS) - named == people


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = f"""
import io, sys
from contextlib import redirect_stdout
from layersense.cli import app
for command in [None, *{COMMANDS!r}]:
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            app([command, "--help"] if command else ["--help"])
        except SystemExit as end:
            assert not end.code, (command, end.code)
    text = out.getvalue()
    assert "Usage:" in text, command
    assert not command or command in text, command
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_help_says_first_what_people_call() -> None:
    text = call("--help").stdout
    assert text.count("For people:") == text.count("Steps of the workflow") == 1
    people, rules = text.split("For people:")[1].split("Steps of the workflow")
    named = {line.split()[0] for line in people.splitlines() if line.strip()}
    assert {"init", "doctor", "show"} <= named
    listed = named | {line.split()[0] for line in rules.splitlines()[1:] if line.strip()}
    assert listed == set(COMMANDS)
    assert "…" not in people
    assert "..." not in people


def test_it_says_its_version() -> None:
    assert call("--version").stdout == f"layersense {__version__}\n"


def test_a_warning_that_no_reader_can_mend_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE"):  # what it sets besides is put back
        monkeypatch.setenv(name, "1")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _quiet()
        for text in ("`torch.jit.script` is deprecated. Please switch", "another"):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["another"]


def test_no_argument_shows_help() -> None:
    done = call()
    assert "validate" in done.stdout + done.stderr


def test_known_error_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text('{"architectures": ["Unheard"]}')
    done = call("init", "./checkpoint", cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert "Unheard" in lines[0]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_unexpected_error_is_a_sentence_and_then_the_traceback() -> None:
    """Settings that the rule would never write, so that nothing treats them as bad input."""
    done = call("dataset", "photos", "--settings", '{"source": "sample", "x": 1}', "--out", "x")
    assert done.returncode == 1
    first = done.stderr.splitlines()[0]
    assert first.startswith("error: layersense dataset: ValidationError: ")
    sentence, traceback, _ = done.stderr.partition("Traceback (most recent call last):")
    assert "please report it with the lines below" in sentence
    assert traceback


def test_settings_that_are_no_json_are_a_usage_error() -> None:
    done = call("dataset", "photos", "--settings", "[1]", "--out", "x")
    assert done.returncode == 2
    assert "expected a JSON object" in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_accepts_foreign_manifests(shared_data: Path) -> None:
    files = sorted(map(str, (shared_data / "manifests").glob("*.json")))
    assert len(files) == 2
    done = call("validate", *files)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [f"{file}: ok" for file in files]


def test_validate_checks_configs_too(tmp_path: Path) -> None:
    good = "datasets: {a: {source: sample}}\nmodels: {m: {source: demo}}\n" + (
        "schemes: {s: {quant_formats: [FP8_ALL_LAYERS_CFG], effective_bits: 9}}\n"
        "runs: {r: {model: m, dataset: a, schemes: [s], device: cpu}}\n"
    )
    (tmp_path / "good.yaml").write_text(good)
    (tmp_path / "typo.yml").write_text(good.replace("effective_bits", "effective_bit"))
    (tmp_path / "broken.yaml").write_text(good.replace("device: cpu}}", "device: cpu"))
    names = ("good.yaml", "typo.yml", "broken.yaml")
    done = call("validate", *names, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("good.yaml: ok\n")
    assert "did you mean `effective_bits`?" in done.stdout
    assert "broken.yaml: is not YAML: line 5" in done.stdout
    assert call("validate", "good.yaml", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"scheme": {', "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({"schema_version": 99}), "99"),
        (None, "there is no such manifest"),
    ],
)
def test_validate_names_broken_files_and_goes_on(
    tmp_path: Path, content: str | None, expected: str
) -> None:
    file = tmp_path / "manifest.json"
    if content is not None:
        file.write_text(content)
    done = call("validate", str(file), str(file))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{file}: ") and expected in line for line in lines)
    assert "Traceback" not in done.stderr
