"""Size of a large study: seconds and memory of its dry run, and of its summary tables.

    python benchmarks/scale.py [models] [schemes]

200 models × 16 schemes by default. Works in a copy of the repository in a temporary folder. The
tables are made of one manifest, repeated under other names. Prints Markdown.
"""

import json
import shutil
import sys
from pathlib import Path

import yaml
from studies import Measured, large_config, machine, measured, repository_copy, snakemake

GROUPS = 250
"""Layer groups of each manifest: about those of Qwen2.5-VL-3B."""


def main() -> None:
    models, schemes = (int(word) for word in (sys.argv[1:] or ("200", "16")))
    print(machine(), end="\n\n")
    print(f"| what, {models} × {schemes} | seconds | of CPU | peak RSS, MB |")
    print("| --- | ---: | ---: | ---: |")
    with repository_copy() as root:
        done, jobs = dry_run(root, models, schemes)
        row(f"DAG and dry run, {jobs:,} jobs", done)
        for share in (10, 1):
            count = models * schemes // share
            done, size = tables(root, count)
            row(f"`sensitivity.parquet` of {count:,} tables, {size / 1e6:.0f} MB", done)


def row(what: str, done: Measured) -> None:
    """Print a row of the table."""
    figures = f"{done.seconds:.1f} | {done.cpu_seconds:.1f} | {done.peak_mb}"
    print(f"| {what} | {figures} |", flush=True)


def dry_run(root: Path, models: int, schemes: int) -> tuple[Measured, int]:
    (root / "large.yaml").write_text(yaml.safe_dump(large_config(models, schemes)))
    arguments = ["--configfile", "large.yaml", "--resources", "gpu=8", "--dry-run"]
    done = measured(snakemake(*arguments), root)
    counts = dict(line.split() for line in done.output.splitlines() if len(line.split()) == 2)
    assert counts["page"] == str(models * schemes)
    return done, int(counts["total"])


def tables(root: Path, count: int) -> tuple[Measured, int]:
    """Concatenate ``count`` layer tables by the code that the rule runs."""
    prepare = f"""
import pyarrow as pa, pyarrow.parquet as pq
from layersense.manifests.tables import LAYERS
empty = dict.fromkeys(LAYERS.names)
rows = [empty | {{"run": "run", "scheme": "scheme", "score": i / 7, "format": "FP8",
                 "layer": f"model.layers.{{i}}.mlp"}} for i in range({2 * GROUPS})]
pq.write_table(pa.Table.from_pylist(rows, schema=LAYERS), "one.parquet", compression="zstd")
"""
    measured([sys.executable, "-c", prepare], root)
    names = []
    for index in range(count):
        name = f"tables/{index}.parquet"
        (root / "tables").mkdir(exist_ok=True)
        target = root / name
        target.unlink(missing_ok=True)
        shutil.copyfile(root / "one.parquet", target)
        names.append(name)
    (root / "names.json").write_text(json.dumps(names))
    code = (
        "import json; from layersense.manifests.tables import write_sensitivity; "
        "write_sensitivity(json.load(open('names.json')), 'all.parquet')"
    )
    done = measured([sys.executable, "-c", code], root)
    return done, (root / "all.parquet").stat().st_size


if __name__ == "__main__":
    main()
