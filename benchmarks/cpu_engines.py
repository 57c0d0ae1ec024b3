"""Compare the engines on the demo's model, data and sampling, on the CPU: nothing may be slower.

    python benchmarks/cpu_engines.py [--repeats 5] [--formats 1 2 3 5 7]

Both engines run in one process with one thread, turn by turn, on the demo's run with photographs.
A measurement goes from the load of the model to the scores; imports, which are the same, come
before. Seconds are the processor's, which neighbours disturb less than the clock's. The first
three formats are the demo's own. Prints Markdown.
"""

import argparse
import gc
import io
import logging
import statistics
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import yaml
from studies import REPOSITORY, machine

from layersense.calibration.build import build_database
from layersense.config import Config
from layersense.models.checkpoints import read_checkpoint
from layersense.models.resolve import resolve_model
from layersense.quantization.formats import known_formats, resolve_format
from layersense.scoring.engines import get_engine
from layersense.scoring.job import prepare_measurement
from layersense.scoring.measurement import Measurement
from layersense.settings import model_settings, run_formats, score_settings

RUN = "demo.image-text"
ENGINES = ("modelopt", "fused")


def prepared(folder: Path) -> tuple[Measurement, list[str]]:
    """Return the demo's measurement, and the names of all formats that a CPU can score."""
    config = Config.model_validate(
        yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    )
    run = config.runs[RUN]
    database = folder / "sample.sqlite"
    build_database(run.dataset, config.datasets[run.dataset], database)
    model = folder / "demo" / "model.json"
    resolve_model(run.model, model_settings(config, run.model), model)
    measurement, _ = prepare_measurement(
        score_settings(config, RUN), read_checkpoint(model), database
    )
    own = list(run_formats(config, RUN))
    others = [name for name, format in known_formats().items() if not format.needs_cuda]
    # ModelOpt's own search of AWQ is the same in both engines, and longer than all the rest.
    return measurement, own + [n for n in others if n not in own and "AWQ" not in n]


def seconds(engine: str, what: Measurement, names: list[str]) -> float:
    """Return what a measurement took."""
    gc.collect()
    start = time.process_time()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for _ in get_engine(engine)(what, [resolve_format(name, {}) for name in names]):
            pass
    return time.process_time() - start


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--formats", type=int, nargs="+", default=[1, 2, 3, 5, 7])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(machine(), end="\n\n")
    print("| formats | stock, s | fused, s | stock ÷ fused | range |")
    print("| ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        what, names = prepared(Path(folder))
        for engine in ENGINES:
            seconds(engine, what, names[:1])  # loads what is loaded once
        for count in dict.fromkeys(min(number, len(names)) for number in arguments.formats):
            times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
            for _ in range(arguments.repeats):
                for engine in ENGINES:
                    times[engine].append(seconds(engine, what, names[:count]))
            print(row(count, times), flush=True)
    print(f"\nFormats, in this order: {', '.join(names)}")


def row(count: int, times: dict[str, list[float]]) -> str:
    """Return one line of the table."""
    stock, fused = times["modelopt"], times["fused"]
    ratios = [theirs / ours for theirs, ours in zip(stock, fused, strict=True)]
    return (
        f"| {count} | {statistics.median(stock):.1f} | {statistics.median(fused):.1f} "
        f"| {statistics.median(ratios):.1f} | {min(ratios):.1f}–{max(ratios):.1f} |"
    )


if __name__ == "__main__":
    main()
