"""Size of a large study: seconds and memory of its dry run, and of its summary tables.

    python benchmarks/scale.py [models] [schemes]

200 models × 16 schemes by default. Works in a copy of the repository in a temporary folder. The
tables are made of one manifest, repeated under other names. Prints Markdown.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("Snakefile", "workflow", "profiles", "envs", "config")
GROUPS = 250
"""Layer groups of each manifest: about those of Qwen2.5-VL-3B."""


def main() -> None:
    models, schemes = (int(word) for word in (sys.argv[1:] or ("200", "16")))
    print(f"| what, {models} × {schemes} | seconds | peak RSS, MB |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory(prefix="layersense-scale-") as folder:
        root = Path(folder)
        for name in COPIED:
            source = REPOSITORY / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(source, root / name, ignore=ignore)
            else:
                shutil.copy2(source, root / name)
        seconds, peak = dry_run(root, models, schemes)
        print(f"| dry run | {seconds:.1f} | {peak} |", flush=True)
        for share in (10, 1):
            count = models * schemes // share
            seconds, peak, size = tables(root, count)
            what = f"`sensitivity.parquet` of {count:,} tables, {size / 1e6:.0f} MB"
            print(f"| {what} | {seconds:.1f} | {peak} |", flush=True)


def dry_run(root: Path, models: int, schemes: int) -> tuple[float, int]:
    config = {
        "datasets": {"sample": {"source": "sample", "calibration": 96, "heldout": 16}},
        "models": {
            f"model-{i}": {"checkpoint": f"owner/model-{i}", "task": "image-text-to-text"}
            for i in range(models)
        },
        "schemes": {
            f"fp8-{i}": {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 8.5 + i / 4}
            for i in range(schemes)
        },
        "runs": {
            f"run-{i}": {
                "model": f"model-{i}",
                "dataset": "sample",
                "schemes": [f"fp8-{j}" for j in range(schemes)],
            }
            for i in range(models)
        },
    }
    file = root / "large.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--resources", "gpu=8"]
    command += ["--configfile", str(file), "--dry-run", "--quiet"]
    return measured(command, root)


def tables(root: Path, count: int) -> tuple[float, int, int]:
    """Concatenate ``count`` layer tables by the code that the rule runs."""
    prepare = f"""
import pyarrow as pa, pyarrow.parquet as pq
from layersense.manifests.tables import LAYERS
empty = dict.fromkeys(LAYERS.names)
rows = [empty | {{"run": "run", "scheme": "scheme", "score": i / 7, "format": "FP8",
                 "layer": f"model.layers.{{i}}.mlp"}} for i in range({2 * GROUPS})]
pq.write_table(pa.Table.from_pylist(rows, schema=LAYERS), "one.parquet", compression="zstd")
"""
    environment = {**os.environ, "PYTHONPATH": str(root / "workflow")}
    subprocess.run([sys.executable, "-c", prepare], cwd=root, env=environment, check=True)
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
    seconds, peak = measured([sys.executable, "-c", code], root)
    return seconds, peak, (root / "all.parquet").stat().st_size


def measured(command: list[str], root: Path) -> tuple[float, int]:
    """Return wall seconds and the peak memory of a command, in MB."""
    environment = {**os.environ, "PYTHONPATH": str(root / "workflow")}
    start = time.perf_counter()
    with (root / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit((root / "output.txt").read_text())
    return seconds, usage.ru_maxrss // 1024


if __name__ == "__main__":
    main()
