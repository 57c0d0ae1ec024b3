"""Seconds of scoring of a small model of every family, on the CPU, through the workflow.

``python benchmarks/families.py``: the config and the models of tests/workflow/test_every_family.py.
"""

import csv
import json
import sys
from pathlib import Path

import yaml
from studies import REPOSITORY, machine, measured, repository_copy, snakemake

sys.path[:0] = [str(REPOSITORY / "tests" / folder) for folder in ("unit", "workflow")]

import tiny_families  # noqa: E402
from test_every_family import FAMILIES, config  # noqa: E402

PHASES = ("load", "dry pass", "insert quantizers", "calibrate", "score")
"""Of a scoring job; forward and backward passes are part of `score`."""
LIMIT = 60
"""Seconds that a family's demo may score."""


def main() -> None:
    """Make the models, run the workflow, print a row for each family."""
    with repository_copy() as root:
        for name, (builder, _, _) in FAMILIES.items():
            folder = root / "checkpoints" / name
            tiny_families.seeded(getattr(tiny_families, builder), folder)
        (root / "config" / "config.yaml").write_text(yaml.safe_dump(config()))
        whole = measured(snakemake("tables"), root).seconds
        rows = [(task, builder, *_seconds(root, name))
                for name, (builder, task, _) in FAMILIES.items()]  # fmt: skip
    print(f"{machine()}; the whole workflow {whole:.0f} s, limit {LIMIT} s of scoring each\n")
    print("| task | model | layer groups | scoring job, s | … without imports | of it scored |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in sorted(rows):
        print("| {} | {} | {} | {:.1f} | {:.1f} | {:.1f} |".format(*row))
    if max(row[3] for row in rows) > LIMIT:
        sys.exit(f"a family's scoring job took more than {LIMIT} s")


def _seconds(root: Path, name: str) -> tuple[int, float, float, float]:
    """Return layer groups, and the seconds of the job, of its phases, and of scoring alone."""
    run = f"{name}.sample"
    with (root / "results/benchmarks/score" / f"{run}.tsv").open() as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    manifest = json.loads((root / "results" / run / "fp8_int4/manifest.json").read_bytes())
    # Both formats were measured in one pass and share its phases.
    seconds = next(iter(manifest["run"].values()))["seconds"]
    phases = [seconds.get(phase, 0.0) for phase in PHASES]
    return len(manifest["layer_sensitivity"]), float(row["s"]), sum(phases), seconds["score"]


if __name__ == "__main__":
    main()
