"""The README's "your own model in three commands", taken from there and run."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conftest import make_project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

SAMPLE = Path("workflow/layersense/resources/coco-sample")
TEXTS = ("A red bus stands before a house.", "Two dogs run along a beach.", "A cat on a table.")


def section(repository: Path) -> str:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    return readme.partition("## Your own model in three commands\n")[2].partition("\n## ")[0]


def three_commands(repository: Path) -> list[str]:
    block = re.search(r"^```\n(.*?)^```$", section(repository), re.MULTILINE | re.DOTALL)
    assert block
    return block[1].splitlines()


def save_photographs(repository: Path, folder: Path) -> None:
    """A dozen photographs of the sample, and a table of what they show."""
    folder.mkdir()
    photographs = sorted((repository / SAMPLE).glob("*2017/*.jpg"))[:12]
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "text"])
        for number, photograph in enumerate(photographs):
            shutil.copy2(photograph, folder)
            table.writerow([photograph.name, TEXTS[number % len(TEXTS)]])


@pytest.mark.parametrize("kind", ["vision-language model", "language model"])
def test_three_commands_end_in_a_report(repository: Path, tmp_path: Path, kind: str) -> None:
    sys.path.insert(0, str(repository / "tests" / "unit"))
    from tiny_models import edit_json, save_tiny_llama, save_tiny_qwen2_5_vl

    project = make_project(tmp_path / "project", repository)
    if kind == "language model":
        # The same commands, on a folder of texts; as many positions as `max_length` by default.
        checkpoint = save_tiny_llama(project.root / "my-checkpoint")
        edit_json(checkpoint / "config.json", max_position_embeddings=512)
        (project.root / "photos").mkdir()
        lines = [f'{{"text": "{number} {" ".join(TEXTS)}"}}\n' for number in range(90)]
        (project.root / "photos/photos.jsonl").write_text("".join(lines))
    else:
        save_tiny_qwen2_5_vl(project.root / "my-checkpoint")
        save_photographs(repository, project.root / "photos")

    environment = {
        **project.environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    commands = three_commands(repository)
    assert [command.split()[0] for command in commands] == ["layersense", "snakemake", "snakemake"]
    init, dry_run, run = commands
    # No GPU, two cores; nothing else is changed.
    init += " --device cpu"
    run = run.replace("--cores 8 --resources gpu=1", "--cores 2")
    outputs = []
    for command in (init, dry_run, run):
        done = subprocess.run(
            command.split(),
            cwd=project.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
    # What the first command tells the user to type next are the other two.
    assert dry_run in outputs[0]
    assert run.split()[-1] in outputs[0]
    assert "score" in outputs[1]
    assert not any(name in outputs[2] for name in ("demo", "int8_all_layers"))

    named = re.findall(r"`(results/\S+\.md)`", section(repository))
    assert len(named) == 1
    report = project.root / named[0]
    assert "FP8_ALL_LAYERS_CFG" in report.read_text(encoding="utf-8")
    layers = pq.read_table(report.with_name("layers.parquet")).to_pandas()
    scores = layers[layers["format"] == "FP8_ALL_LAYERS_CFG"]
    assert (scores["reached"] == "scored").all()
    assert (scores["score"] > 0).all()
    subsystems = {"vision", "language"} if kind == "vision-language model" else {"language"}
    assert subsystems <= set(scores["subsystem"])
