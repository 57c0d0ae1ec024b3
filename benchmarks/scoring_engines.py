"""Compare the engines on models' true shapes: seconds for a step, peak memory, kernel time.

    python benchmarks/scoring_engines.py --rows rows.jsonl [--shape …] [--formats …] [--parts …]
    python benchmarks/scoring_engines.py --rows rows.jsonl --table

Random weights in bfloat16, made on the GPU; batches of 4 images of 640×480, or of 4 texts of 512
tokens. Each row is printed, and added to the file, as soon as it is measured, and what is in the
file is not measured again: the same command goes on where a time limit ended it. ``--table``
measures nothing and prints the rows as Markdown.

Step times are medians over batches of different shapes, after one batch that compiles and loads
kernels; the fused engine sees each batch three times: it launches kernels, records them, replays
them. Parts, all on the same batches and all in one process:

- ``steps`` of the fused engine for each number of formats, and with checkpointing for 4 and for
  the most. What comes before them, AWQ's own search among it, is the row ``prepare``;
- ``profile``: the share of a step with a kernel running, and which kernels the GPU waits for;
- ``job``: the fused engine from the load to the scores, without the formats of AWQ;
- ``stock``: steps of the stock engine, 1 and 4 formats in a joint call.

On a GPU ModelOpt's extensions are built first. The shapes ``tiny`` and ``tiny-text`` run on a CPU,
too, without the formats that need CUDA and without kernel times.
"""

import argparse
import gc
import io
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

START = time.monotonic()
os.environ.setdefault("TQDM_DISABLE", "1")  # ModelOpt's bars

import torch  # noqa: E402
from random_models import SHAPES, make_model  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cuda_extensions import use_all  # noqa: E402
from layersense.calibration.build import build_database  # noqa: E402
from layersense.calibration.database import open_database  # noqa: E402
from layersense.config import SampleDataset  # noqa: E402
from layersense.models.checkpoints import Checkpoint  # noqa: E402
from layersense.models.tasks.causal_lm import CausalLM  # noqa: E402
from layersense.models.tasks.image_text_to_text import ImageTextToText  # noqa: E402
from layersense.models.tasks.protocol import Batch, Loaded, Sampling  # noqa: E402
from layersense.quantization.formats import resolve_format  # noqa: E402
from layersense.scoring import fused as fused_engine  # noqa: E402
from layersense.scoring import modelopt_engine  # noqa: E402
from layersense.scoring.environment import peak_memory_bytes  # noqa: E402
from layersense.scoring.fused.engine import _Engine  # noqa: E402
from layersense.scoring.fused.fit import Pass  # noqa: E402
from layersense.scoring.fused.graphs import Graphs  # noqa: E402
from layersense.scoring.measurement import Measurement  # noqa: E402
from layersense.scoring.scores import Fit  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = [
    f"{name}_ALL_LAYERS_CFG"
    for name in (
        "FP8",
        "INT8",
        "NVFP4",
        "INT4_BLOCKWISE_WEIGHT_ONLY",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "W4A16_NVFP4",
        "MXFP8",
        "MXFP4",
        "INT8_WEIGHT_ONLY",
        "INT8_SMOOTHQUANT",
        "W4A8_NVFP4_FP8",
        "MXFP6",
        "MXINT8",
        "INT4_AWQ",
        "W4A8_AWQ_BETA",
        "NVFP4_AWQ_LITE",
    )
]
CAPTIONS_IN_A_TEXT = 12
"""Captions that fill a text of 512 tokens of the small tokenizer, and some."""
BATCHES = 5
"""Scoring batches: one to warm up, the others timed."""
STOCK = (1, 4)
"""Formats in one call of the stock engine; more do not fit 80 GB."""
CHECKPOINTED = 4
"""Formats, beside the most, that are also scored with checkpointing."""
PARTS = ("steps", "profile", "job", "stock")
MARKER = "spin_kernel"
"""The kernel of ``torch.cuda._sleep``, which marks the end of a forward pass."""
TOP = 5
"""Kernels that a profile names."""


class Marked:
    """Random weights, and on request a mark on the GPU where the forward pass ends."""

    marks = False

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: object) -> Loaded:
        """Make the model on the GPU, if there is one."""
        return Loaded(*make_model(checkpoint.id), checkpoint.id)

    def loss(self, output: Any, batch: Batch) -> torch.Tensor:
        """Return the task's loss."""
        loss: torch.Tensor = super().loss(output, batch)  # type: ignore[misc]
        if self.marks:
            torch.cuda._sleep(1)
        return loss


class RandomImageText(Marked, ImageTextToText):
    """Photographs with captions."""


class RandomText(Marked, CausalLM):
    """Texts."""


# --- rows ----------------------------------------------------------------------------------------


class Rows:
    """What was measured, a line of JSON each; a file of them is taken up and added to.

    Args:
        file: where they are kept; None keeps none.
        device: name of what measures.
    """

    def __init__(self, file: Path | None, device: str) -> None:
        self.file, self.device = file, device
        self.rows: list[dict[str, Any]] = []
        if file is not None and file.exists():
            text = file.read_text()
            for line in text.splitlines():
                # The last line may be a part of one: its writer was killed.
                with suppress(json.JSONDecodeError):
                    self.rows.append(json.loads(line))
            if text and not text.endswith("\n"):
                file.write_text(f"{text}\n")

    def wants(self, shape: str, part: str, formats: int, checkpointing: bool = False) -> bool:
        """Return whether a row is not there."""
        key = self._key(shape, part, formats, checkpointing)
        return not any(key.items() <= row.items() for row in self.rows)

    def add(
        self, shape: str, part: str, formats: int, checkpointing: bool = False, **figures: Any
    ) -> None:
        """Print a row and keep it."""
        row = {**self._key(shape, part, formats, checkpointing), **figures}
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
        how = " with checkpointing" if checkpointing else ""
        say(f"{shape}, {part}, {formats} formats{how}:", json.dumps(figures))

    def _key(self, shape: str, part: str, formats: int, checkpointing: bool) -> dict[str, Any]:
        return {
            "device": self.device,
            "shape": shape,
            "part": part,
            "formats": formats,
            "checkpointing": checkpointing,
        }


def say(*words: object) -> None:
    """Print a line with the seconds since the start."""
    sys.stdout.write(f"[{time.monotonic() - START:5.0f} s] {' '.join(map(str, words))}\n")
    sys.stdout.flush()


# --- measuring -----------------------------------------------------------------------------------


def make_measurement(shape: str, calibration: int, scoring: int) -> Measurement:
    """Return the measurement of some calibration and scoring batches of 4 samples."""
    text = SHAPES[shape].vision is None
    database = Path(tempfile.mkdtemp()) / "sample.sqlite"
    build_database("sample", SampleDataset(source="sample", calibration=64, heldout=4), database)
    with open_database(database) as opened:
        rows = opened.rows("caption", "calibration", limit=64)
    # The sample is small: its rows come again, and a text block takes many of them.
    samples = CAPTIONS_IN_A_TEXT if text else 1
    rows = rows * (4 * max(calibration, scoring) * samples // len(rows) + 1)
    checkpoint = Checkpoint(
        path="",
        id=shape,
        revision=None,
        digest="",
        task="causal-lm" if text else "image-text-to-text",
        architecture="",
        n_parameters=0,
        dtype="bfloat16",
        trust_remote_code=False,
        size_bytes=0,
    )
    return Measurement(
        checkpoint=checkpoint,
        task=RandomText() if text else RandomImageText(),
        sampling=Sampling(
            max_length=512,
            modality="text" if text else "image_text",
            min_pixels=307200,
            max_pixels=307200,
        ),
        method="gradient",
        calibration_rows=rows[: 4 * calibration * samples],
        score_rows=rows[: 4 * scoring * samples],
        calibration_batch_size=4,
        score_batch_size=4,
        dtype="bfloat16",
        device=DEVICE,
        seed=0,
    )


def synchronized() -> float:
    """Return the time once the GPU is idle."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def clean() -> None:
    """Give back what ran before, and measure the peak anew."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def figures(times: Sequence[float]) -> dict[str, float]:
    """Return median and range in seconds a step, and the peak in GiB."""
    return {
        "seconds": round(statistics.median(times), 4),
        "fastest": round(min(times), 4),
        "slowest": round(max(times), 4),
        "peak_gib": round(peak_memory_bytes(DEVICE) / 2**30, 1),
    }


class Stepper:
    """A fused engine that is ready to score, and its batches on the GPU."""

    def __init__(self, shape: str, names: Sequence[str]) -> None:
        what = make_measurement(shape, 1, BATCHES)
        self.task = what.task
        self.engine = engine = _Engine(what, [resolve_format(name, {}) for name in names])
        with redirect_stdout(io.StringIO()):
            engine.prepare()
        self.recipes = [engine.quantizers.recipes[name] for name in names]
        self._total = torch.zeros(
            len(engine.taps.handles), len(engine.taps.recipes), dtype=torch.float64
        )
        self._batches = [
            engine.batches.at(4, 4 * index).to(DEVICE, engine.dtype) for index in range(BATCHES)
        ]

    def step(self, number: int, batch: int, checkpointing: bool = False) -> float:
        """Score the first formats on a batch; return the seconds.

        Raises:
            MemoryError: they do not fit.
        """
        fit = Fit(micro_batch=4, checkpointing=checkpointing, formats=number)
        what = Pass(tuple(self.recipes[:number]), fit)
        start = synchronized()
        failure = self.engine._step(what, self._batches[batch], self._total)
        if failure is not None:
            raise MemoryError(failure)
        return synchronized() - start


def fused(
    rows: Rows, shape: str, parts: Sequence[str], names: Sequence[str], counts: list[int]
) -> None:
    """Measure the fused engine's steps and profiles, as far as they are not there."""
    most = counts[-1]
    every = [(number, False) for number in (0, *counts)]
    every += [(number, True) for number in sorted({min(CHECKPOINTED, most), most})]
    timed = [how for how in every if "steps" in parts and rows.wants(shape, "steps", *how)]
    profiled = [
        number
        for number in sorted({0, counts[0], most})
        if "profile" in parts and DEVICE.type == "cuda" and rows.wants(shape, "profile", number)
    ]
    if not timed and not profiled:
        return
    clean()
    most = max([number for number, _ in timed] + profiled + counts[:1])
    stepper = Stepper(shape, names[:most])
    engine = stepper.engine
    if rows.wants(shape, "prepare", most):
        rows.add(shape, "prepare", most, phases={k: round(v, 1) for k, v in engine.seconds.items()})
    with engine.taps.attached():
        for number, checkpointing in timed:
            time_steps(rows, shape, stepper, number, checkpointing)
        for number in profiled:
            profile_step(rows, shape, stepper, number)
        if "profile" in parts and rows.wants(shape, "ΔY", most):
            engine.taps.stopwatch = {}
            stepper.step(most, 1)
            rows.add(
                shape,
                "ΔY",
                most,
                synchronized={name: round(took, 4) for name, took in engine.taps.stopwatch.items()},
            )


def time_steps(rows: Rows, shape: str, stepper: Stepper, number: int, checkpointing: bool) -> None:
    """Measure steps of some formats: launched, recorded, replayed."""
    taps = stepper.engine.taps
    taps.graphs = Graphs()  # those of other numbers of formats would count in the peak
    clean()
    try:
        stepper.step(number, 0, checkpointing)
        rounds = [
            [stepper.step(number, index, checkpointing) for index in range(1, BATCHES)]
            for _ in range(3)
        ]
    except MemoryError as error:
        rows.add(shape, "steps", number, checkpointing, failure=str(error))
        return
    launched, recorded = (round(statistics.median(times), 4) for times in rounds[:2])
    rows.add(
        shape,
        "steps",
        number,
        checkpointing,
        **figures(rounds[2]),
        launched=launched,
        recorded=recorded,
        graphs=taps.graphs.on,  # off where memory ran out with them
    )


def profile_step(rows: Rows, shape: str, stepper: Stepper, number: int) -> None:
    """Say how much of a replayed step a kernel runs, and what the GPU waits for."""
    stepper.engine.taps.graphs = Graphs()
    for _ in range(3):
        stepper.step(number, 2)
    stepper.task.marks = True  # type: ignore[attr-defined]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = stepper.step(number, 2)
    stepper.task.marks = False  # type: ignore[attr-defined]
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    rows.add(shape, "profile", number, seconds=round(seconds, 4), **timeline(spans, seconds))


def timeline(spans: Sequence[tuple[float, float, str]], seconds: float) -> dict[str, Any]:
    """Return what a step's kernels say of its time.

    Args:
        spans: start and end in microseconds and name of each kernel, in the order of their starts.
        seconds: what the step took.

    Returns:
        Shares of the step with a kernel running, in all, in the forward pass and after it (each
        with its own length in seconds); how many kernels there are and how long the middle one is,
        in microseconds; the kernels that run longest and those that the GPU waits for longest, in
        milliseconds.
    """
    busy: Counter[bool] = Counter()
    running: Counter[str] = Counter()
    waited: Counter[str] = Counter()
    marks = [end for _, end, name in spans if MARKER in name]
    split = marks[0] if marks else float("-inf")
    last = spans[0][0] if spans else 0.0
    for start, end, name in spans:
        busy[start >= split] += max(0.0, end - max(start, last))
        running[short(name)] += end - start
        waited[short(name)] += max(0.0, start - last)
        last = max(last, end)
    whole = seconds * 1e6
    found: dict[str, Any] = {
        "busy": round(sum(busy.values()) / whole, 3),
        "kernels": len(spans),
        "median_us": round(statistics.median(end - start for start, end, _ in spans), 1),
    }
    if marks:
        forward, after = split - spans[0][0], last - split
        found |= {
            "forward_seconds": round(forward / 1e6, 4),
            "forward_busy": round(busy[False] / forward, 3),
            "backward_seconds": round(after / 1e6, 4),
            "backward_busy": round(busy[True] / after, 3),
        }
    for key, counted in (("longest_ms", running), ("waited_for_ms", waited)):
        found[key] = {name: round(took / 1e3, 1) for name, took in counted.most_common(TOP)}
    return found


def short(kernel: str) -> str:
    """Return a kernel's name without its template's and its own arguments."""
    words = kernel.removeprefix("void ").replace("at::native::", "").split("(")[0]
    return words if len(words) <= 70 else f"{words[:69]}…"


def job(rows: Rows, shape: str, names: Sequence[str], batches: tuple[int, int]) -> None:
    """Measure the fused engine's whole job."""
    names = [name for name in names if "AWQ" not in name]
    if not rows.wants(shape, "job", len(names)):
        return
    clean()
    what = make_measurement(shape, *batches)
    start = time.monotonic()
    phases: dict[str, float] = {}
    with redirect_stdout(io.StringIO()):
        for _, entries in fused_engine.measure(what, [resolve_format(n, {}) for n in names]):
            for entry in entries.values():
                phases |= {phase: round(took, 1) for phase, took in entry.seconds.items()}
    took = round(time.monotonic() - start, 1)
    peak = round(peak_memory_bytes(DEVICE) / 2**30, 1)
    rows.add(shape, "job", len(names), seconds=took, peak_gib=peak, batches=batches, phases=phases)


def stock(rows: Rows, shape: str, names: Sequence[str], count: int) -> None:
    """Measure the stock engine's steps in one joint call."""
    names = names[:count]
    if not rows.wants(shape, "stock", len(names)):
        return
    clean()
    times: list[float] = []
    original = modelopt_engine._Steps.forward_backward

    def timed(self: Any, model: Any, index: int) -> None:
        start = synchronized()
        original(self, model, index)
        times.append(synchronized() - start)

    modelopt_engine._Steps.forward_backward = timed  # type: ignore[method-assign]
    phases: dict[str, float] = {}
    try:
        with redirect_stdout(io.StringIO()):
            formats = [resolve_format(name, {}) for name in names]
            what = make_measurement(shape, 1, BATCHES)
            for _, entries in modelopt_engine.measure(what, formats):
                for entry in entries.values():
                    phases |= {phase: round(took, 1) for phase, took in entry.seconds.items()}
    finally:
        modelopt_engine._Steps.forward_backward = original  # type: ignore[method-assign]
    rows.add(shape, "stock", len(names), **figures(times[1:]), phases=phases)


# --- the table -----------------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the rows as Markdown."""
    ordered = sorted(rows, key=lambda row: (row["device"], list(SHAPES).index(row["shape"])))
    for (device, shape), group in groupby(ordered, key=lambda row: (row["device"], row["shape"])):
        there = list(group)
        yield f"\n{shape}, {device}\n"
        yield "| formats | engine | s/step | range | launched, s/step | peak GiB |"
        yield "| ---: | --- | ---: | --- | ---: | ---: |"
        for row in there:
            if row["part"] not in ("steps", "stock"):
                continue
            engine = "stock" if row["part"] == "stock" else "fused"
            engine += ", checkpointing" if row["checkpointing"] else ""
            if "failure" in row:
                yield f"| {row['formats']} | {engine} | does not fit | | | |"
                continue
            launched = f"{row['launched']:.2f}" if "launched" in row else ""
            yield (
                f"| {row['formats']} | {engine} | {row['seconds']:.2f} "
                f"| {row['fastest']:.2f}–{row['slowest']:.2f} | {launched} | {row['peak_gib']} |"
            )
        for row in there:
            if row["part"] not in ("steps", "stock"):
                told = {key: value for key, value in row.items() if key not in KEYS}
                yield f"\n{row['part']}, {row['formats']} formats: {json.dumps(told)}"


KEYS = ("device", "shape", "part", "formats", "checkpointing")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, help="file of rows to take up and to add to")
    parser.add_argument("--table", action="store_true", help="print the file's rows and end")
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=["qwen2.5-vl-3b"])
    parser.add_argument("--formats", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=["steps", "profile"])
    parser.add_argument(
        "--job-batches", type=int, nargs=2, default=[128, 32], help="to calibrate and to score"
    )
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    rows = Rows(asked.rows, name)
    if asked.table:
        print("\n".join(tables(rows.rows)))
        return
    say("imports;", name, "torch", torch.__version__)
    names = FORMATS
    if DEVICE.type == "cuda":
        say("extensions:", ", ".join(f"{n} {built.state}" for n, built in use_all().items()))
    else:
        names = [name for name in FORMATS if not resolve_format(name, {}).needs_cuda]
    counts = sorted({min(number, len(names)) for number in asked.formats})
    # What matters most, and takes least, comes first: a time limit may end the rest.
    for shape in asked.shape:
        fused(rows, shape, asked.parts, names, counts)
        if "stock" in asked.parts:
            for count in STOCK:
                stock(rows, shape, names, min(count, counts[-1]))
        if "job" in asked.parts:
            job(rows, shape, names[: counts[-1]], tuple(asked.job_batches))


if __name__ == "__main__":
    main()
