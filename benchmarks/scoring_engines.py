"""Compare the engines on a model's true shape: seconds for a step, peak memory, kernel time.

    python benchmarks/scoring_engines.py [--shape qwen2.5-vl-3b …] [--formats 16] [--parts …]

Random weights in bfloat16, made on the GPU; batches of 4 images of 640×480, or of 4 texts of 512
tokens. Both engines run in one process on the same batches. Step times are medians over batches of
different shapes, after one batch that compiles and loads kernels; the fused engine sees each batch
three times: it launches kernels, records them, replays them. Parts: ``steps`` of the fused engine;
its whole ``job``, from the load to the scores, on 128 calibration and 32 scoring batches; steps of
``stock``. Needs a CUDA GPU with 80 GB and
nvcc.
"""

import argparse
import gc
import io
import logging
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

START = time.monotonic()

import torch  # noqa: E402
from random_models import SHAPES, make_model  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from layersense.calibration.build import build_database  # noqa: E402
from layersense.calibration.database import open_database  # noqa: E402
from layersense.config import SampleDataset  # noqa: E402
from layersense.models.checkpoints import Checkpoint  # noqa: E402
from layersense.models.tasks.causal_lm import CausalLM  # noqa: E402
from layersense.models.tasks.image_text_to_text import ImageTextToText  # noqa: E402
from layersense.models.tasks.protocol import Loaded, Sampling  # noqa: E402
from layersense.quantization.formats import resolve_format  # noqa: E402
from layersense.scoring import fused as fused_engine  # noqa: E402
from layersense.scoring import modelopt_engine  # noqa: E402
from layersense.scoring.fused.engine import _Engine  # noqa: E402
from layersense.scoring.fused.fit import Pass  # noqa: E402
from layersense.scoring.measurement import Measurement  # noqa: E402
from layersense.scoring.scores import Fit  # noqa: E402

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
BATCHES = 5
"""Scoring batches: one to warm up, the others timed."""
STOCK = (1, 4)
"""Formats in one call of the stock engine; more do not fit 80 GB."""


class RandomImageText(ImageTextToText):
    """The task on random weights."""

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: object) -> Loaded:
        """Make the model on the GPU."""
        return Loaded(*make_model(checkpoint.id), checkpoint.id)


class RandomText(CausalLM):
    """The same for texts."""

    load = RandomImageText.load


def make_measurement(shape: str, calibration: int, scoring: int) -> Measurement:
    """Return the measurement of some calibration and scoring batches of 4 samples."""
    text = not SHAPES[shape].vision
    database = Path(tempfile.mkdtemp()) / "sample.sqlite"
    build_database("sample", SampleDataset(source="sample", calibration=64, heldout=4), database)
    with open_database(database) as opened:
        rows = opened.rows("caption", "calibration", limit=64)
    # The sample is small: its rows come again, and a text block takes many of them.
    rows = rows * (4 * max(calibration, scoring) * (50 if text else 1) // len(rows) + 1)
    samples = 50 if text else 1
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
        device=torch.device("cuda"),
        seed=0,
    )


def synchronized() -> float:
    """Return the time once the GPU is idle."""
    torch.cuda.synchronize()
    return time.monotonic()


def say(*words: object) -> None:
    """Print a line with the seconds since the start."""
    sys.stdout.write(f"[{time.monotonic() - START:5.0f} s] {' '.join(map(str, words))}\n")
    sys.stdout.flush()


def fused(what: Measurement, count: int) -> None:
    """Print the fused engine's times for 1, 2, 4, … formats."""
    engine = _Engine(what, [resolve_format(name, {}) for name in FORMATS[:count]])
    with redirect_stdout(io.StringIO()):
        engine.prepare()
    say("fused, before the first step:", {k: round(v, 1) for k, v in engine.seconds.items()})
    recipes = [engine.quantizers.recipes[name] for name in FORMATS[:count]]
    total = torch.zeros(len(engine.taps.handles), len(recipes), dtype=torch.float64)
    batches = [
        engine._micro_batch(4, 4 * index).to(what.device, engine.dtype) for index in range(BATCHES)
    ]

    def step(number: int, checkpointing: bool, batch: int) -> float:
        fit = Fit(micro_batch=4, checkpointing=checkpointing, formats=number)
        start = synchronized()
        failure = engine._step(Pass(tuple(recipes[:number]), fit), batches[batch], total)
        assert failure is None, failure
        return synchronized() - start

    with engine.taps.attached():
        step(0, False, 0)
        alone = [step(0, False, i) for _ in range(2) for i in range(1, BATCHES)]
        say("forward and backward alone:", table(alone))
        numbers = sorted({number for number in (1, 2, 4, 8) if number < count} | {count})
        for checkpointing in (False, True):
            for number in numbers:
                if checkpointing and number != count:
                    continue
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                step(number, checkpointing, 0)
                rounds = [
                    [step(number, checkpointing, i) for i in range(1, BATCHES)] for _ in range(3)
                ]
                first, second = (statistics.median(times) for times in rounds[:2])
                say(
                    f"fused, {number} formats, checkpointing {checkpointing}:",
                    table(rounds[2]),
                    f"launched {first:.2f}, recorded {second:.2f} s/step",
                )
        engine.taps.stopwatch = {}
        step(count, False, 1)
        shown = {name[:-15]: round(v, 3) for name, v in engine.taps.stopwatch.items()}
        engine.taps.stopwatch = None
        say("ΔY of each format, seconds a step (synchronized):", shown)
        for number in (0, 1, count):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                seconds = step(number, False, 2)
            say(f"{number} formats: {busy(profiler) / seconds:.0%} of a step has a kernel running")


def busy(profiler: profile) -> float:
    """Return the seconds in which at least one kernel ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    total = end = 0.0
    for first, last in spans:
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total / 1e6


def stock(what: Measurement, count: int) -> None:
    """Print the stock engine's times for one joint call of ``count`` formats."""
    times: list[float] = []
    original = modelopt_engine._Steps.forward_backward

    def timed(self: object, model: object, index: int) -> None:
        start = synchronized()
        original(self, model, index)  # type: ignore[arg-type]
        times.append(synchronized() - start)

    modelopt_engine._Steps.forward_backward = timed  # type: ignore[method-assign]
    start = time.monotonic()
    with redirect_stdout(io.StringIO()):
        formats = [resolve_format(name, {}) for name in FORMATS[:count]]
        for _, entries in modelopt_engine.measure(what, formats):
            seconds = entries[FORMATS[0]].seconds
    say(f"stock, {count} formats:", table(times[1:]), seconds, f"{time.monotonic() - start:.0f} s")
    modelopt_engine._Steps.forward_backward = original  # type: ignore[method-assign]


def table(times: list[float]) -> str:
    """Return median, range and peak memory."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    return (
        f"{statistics.median(times):.2f} s/step ({min(times):.2f} to {max(times):.2f}), "
        f"peak {peak:.1f} GiB"
    )


def job(what: Measurement, count: int) -> None:
    """Print the fused engine's whole job."""
    start = time.monotonic()
    with redirect_stdout(io.StringIO()):
        formats = [resolve_format(name, {}) for name in FORMATS[:count]]
        for _, entries in fused_engine.measure(what, formats):
            seconds = {
                key: round(s, 1) for entry in entries.values() for key, s in entry.seconds.items()
            }
    say(f"fused, whole job of {count} formats: {time.monotonic() - start:.0f} s,", seconds)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=["qwen2.5-vl-3b"])
    parser.add_argument("--formats", type=int, default=16, help="how many of the 16 formats")
    parser.add_argument("--parts", choices=["steps", "job", "stock"], nargs="+", default=["steps"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    count = arguments.formats
    say("imports;", torch.cuda.get_device_name(), "torch", torch.__version__)
    for shape in arguments.shape:
        what = make_measurement(shape, 1, BATCHES)
        runs = {
            "steps": [partial(fused, what, count)],
            "job": [partial(job, make_measurement(shape, 128, 32), count)],
            "stock": [partial(stock, what, number) for number in STOCK],
        }
        for run in (run for part in arguments.parts for run in runs[part]):
            say(shape)
            run()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
