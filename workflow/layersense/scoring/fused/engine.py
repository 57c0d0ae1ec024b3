"""The fused engine: load, calibrate once, score every format from one backward pass."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from modelopt.torch.quantization.algorithms import QuantRecipe
from torch import Tensor, nn

from layersense.errors import LayersenseError, is_out_of_memory
from layersense.models.devices import check_together
from layersense.models.tasks.protocol import Batch, Loaded
from layersense.quantization.formats import Format
from layersense.scoring.fused.attention import batch_windows
from layersense.scoring.fused.batches import Aligned, prefetched
from layersense.scoring.fused.check import StockCheck
from layersense.scoring.fused.coupling import Coupling, couples_samples
from layersense.scoring.fused.fit import (
    Pass,
    can_checkpoint,
    first_fit,
    missing_memory,
    smaller,
)
from layersense.scoring.fused.held import expected_peaks, held_by_running, held_by_shapes
from layersense.scoring.fused.quantizers import Quantizers
from layersense.scoring.fused.taps import Taps
from layersense.scoring.inventory import Inventory, take_inventory
from layersense.scoring.measurement import (
    BatchStatistics,
    Measurement,
    Result,
    collected_warnings,
    describe_work,
    floating_dtype,
    format_scores,
    load,
    timed,
)
from layersense.scoring.progress import Progress
from layersense.scoring.reach import log_reach
from layersense.scoring.scores import Fit, FormatScores

logger = logging.getLogger(__name__)

TIMED_BATCH = 2
"""The batch (from 0) on which the formats' seconds are taken, once everything is warm."""


def measure(
    measurement: Measurement, formats: Sequence[Format]
) -> Iterator[tuple[Inventory, dict[str, FormatScores]]]:
    """Score every layer group under all ``formats`` in one pass over the data.

    The yielded entries lack ``digest`` and ``settings``, which the caller knows. When memory runs
    out the batch is split, then activations are recomputed, then fewer formats are scored at a
    time, from the sample where it stood; no score depends on it.

    Raises:
        LayersenseError: one sample and one format do not fit into memory, an activation is not
            finite, or the check against stock fails.
    """
    yield _Engine(measurement, formats).run()


@dataclass
class _Scored:
    """What was scored so far."""

    batches: list[Tensor] = field(default_factory=list)
    """Scores of each batch, (groups, formats)."""
    seen: list[BatchStatistics] = field(default_factory=list)


class _Engine:
    def __init__(self, measurement: Measurement, formats: Sequence[Format]) -> None:
        self.measurement, self.formats = measurement, formats
        self.task, self.device = measurement.task, measurement.device
        self.seconds: dict[str, float] = {}
        self._peaks: tuple[float, float | None] | None = None
        """Expected peaks in bytes, with activations kept and with them recomputed."""
        self.batches = Aligned(self._cut)

    def prepare(self) -> None:
        """Load the model and calibrate its quantizers: all that comes before the first step."""
        what = self.measurement
        with timed(self.seconds, "load"):
            self.loaded: Loaded = load(what)
        with timed(self.seconds, "dry pass"):
            log_reach(what, self.loaded)
        with timed(self.seconds, "load"):
            self.model: nn.Module = self.loaded.model
            self.dtype = floating_dtype(self.model)
            self.model.requires_grad_(False)
            batch_windows(self.model)
            calibration = self.task.batches(
                self.loaded, what.calibration_rows, what.sampling, what.calibration_batch_size
            )
            self.scoring = self.batches.of(what.score_batch_size)
        self.types = {name: type(module).__name__ for name, module in self.model.named_modules()}
        with timed(self.seconds, "insert quantizers"):
            self.quantizers = Quantizers(self.model, self.formats)
            check_together(
                {name: hparam.quant_modules for name, hparam in self.quantizers.groups.items()}
            )
        self._log_start(len(calibration), len(self.scoring))
        self._calibrate(calibration)
        self.taps = Taps(self.quantizers)
        self.check = StockCheck(self.taps)
        self.coupling = Coupling(
            self.task,
            self.model,
            [site.module for site in self.taps.sites],
            lambda size, start: self.batches.at(size, start).to(self.device, self.dtype),
        )

    def run(self) -> tuple[Inventory, dict[str, FormatScores]]:
        """Measure everything."""
        with collected_warnings() as self.messages:
            self.prepare()
            scored = self._score()
        inventory = take_inventory(self.loaded, self.quantizers.groups, self.types, self.task)
        self._log_seconds()
        return inventory, {
            format.name: format_scores(
                self.measurement, format, self._result(format, scored), scored.seen
            )
            for format in self.formats
        }

    # --- calibration ---------------------------------------------------------------------------

    def _calibrate(self, batches: Sequence[Batch]) -> None:
        def forward(count: int) -> None:
            progress = Progress("calibrate", total=count, unit="batch", device=self.device)
            for batch in prefetched(batches, count):
                self.task.forward(self.model, batch.to(self.device, self.dtype))
                progress.step()
            progress.close()

        try:
            self.seconds |= self.quantizers.calibrate(forward, len(batches))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise LayersenseError(
                f"a calibration batch of {self.measurement.calibration_batch_size} samples does "
                f"not fit into memory ({missing_memory(str(error))} needed); reduce "
                "`calibration_batch_size`, `max_length` or `max_pixels` of the run, or use a "
                "larger GPU"
            ) from error

    # --- scoring -------------------------------------------------------------------------------

    def _score(self) -> _Scored:
        scored, start = _Scored(), 0
        self.passes = [self._first_pass()]
        progress = Progress(
            f"score {len(self.formats)} format(s)",
            total=len(self.scoring),
            unit="batch",
            device=self.device,
        )
        with timed(self.seconds, "score"), self.taps.attached():
            for index, batch in enumerate(prefetched(self.scoring)):
                scored.seen.append(BatchStatistics.of(batch))
                timed_batch = min(TIMED_BATCH, len(self.scoring) - 1)
                self.taps.stopwatch = {} if index == timed_batch else None
                scored.batches.append(self._score_batch(start, batch))
                start += batch.n_samples
                if self.taps.stopwatch:
                    self.seconds |= {
                        f"ΔY {name}, one batch": duration
                        for name, duration in self.taps.stopwatch.items()
                    }
                progress.step()
        progress.close()
        return scored

    def _score_batch(self, start: int, batch: Batch) -> Tensor:
        """Return one batch's scores, (groups, formats), whatever memory makes of the passes."""
        total = torch.zeros(len(self.taps.handles), len(self.taps.recipes), dtype=torch.float64)
        todo = [(what, 0) for what in self.passes]
        self.passes = []
        while todo:
            what, done = todo.pop(0)
            while done < batch.n_samples:
                whole = done == 0 and what.fit.micro_batch >= batch.n_samples
                micro = batch if whole else self.batches.at(what.fit.micro_batch, start + done)
                failure = self._step(what, micro, total)
                if failure is None:
                    done += micro.n_samples
                    continue
                parts = self._smaller(what, start + done, micro, failure)
                todo = [(part, done) for part in parts] + todo
                break
            else:
                self.passes.append(what)
        return total

    def _step(self, what: Pass, batch: Batch, total: Tensor) -> str | None:
        """Add one forward and backward pass to ``total``; return the message if memory ran out."""
        self.taps.activate(what.recipes)
        loss = there = None
        try:
            there = batch.to(self.device, self.dtype)
            with self._checkpointing(what.fit.checkpointing), torch.enable_grad():
                with timed(self.seconds, "forward"):
                    loss = self.task.loss(self.task.forward(self.model, there), there)
                self.check.begin()
                if loss.requires_grad:
                    with timed(self.seconds, "backward"):
                        loss.backward()  # type: ignore[no-untyped-call]
            scores = self.taps.take()
            self.check.end(scores)
        except RuntimeError as error:
            message = str(error)
            self.check.cancel()
            if _overwrites(message) and not self.taps.copies:
                logger.info("the model overwrites tensors in place; inputs and outputs are copied")
                self.taps.copies = True
            elif not is_out_of_memory(error):
                raise
        else:
            total += scores
            return None
        # Outside of the handler, whose traceback keeps the graph alive.
        del loss, there
        self.taps.forget()
        if _overwrites(message):
            return self._step(what, batch, total)
        again = self.taps.graphs.held
        self.taps.graphs.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if again:
            logger.info("out of memory: recorded CUDA graphs are dropped")
            return self._step(what, batch, total)
        return message

    def _smaller(self, what: Pass, first: int, batch: Batch, failure: str) -> list[Pass]:
        """Return what to do instead of a pass over a batch that begins with a sample."""
        parts = smaller(
            what,
            coupled=self._coupled(),
            splittable=min(what.fit.micro_batch, batch.n_samples) > 1
            and self.coupling.is_splittable(),
            checkpointable=can_checkpoint(self.model),
        )
        if not parts:
            raise LayersenseError(
                f"format {self.quantizers.formats[what.recipes[0]].name}: "
                f"{self._which(first, batch)} not fit into memory ({missing_memory(failure)} "
                "needed); reduce `max_length` or `max_pixels` of the run, or use a larger "
                f"{'GPU' if self.device.type == 'cuda' else 'machine'}"
            )
        for part in parts:
            logger.warning("out of memory: %s", part.back_offs[-1])
        return parts

    def _which(self, first: int, batch: Batch) -> str:
        """Say which samples a batch holds, and how long they are; ends with a verb."""
        length = f"of {batch.n_positions // batch.n_samples} positions"
        if batch.n_samples > 1:
            last = first + batch.n_samples
            return f"scoring samples {first + 1} to {last}, {length} each and not to be split, do"
        image = ""
        if "pixel_values" in batch.inputs:  # then a sample is a row
            image = f" ({self.measurement.score_rows[first].image_path})"
        return f"scoring sample {first + 1}{image}, {length}, does"

    def _first_pass(self) -> Pass:
        fit = Fit(
            micro_batch=self.measurement.score_batch_size,
            checkpointing=False,
            formats=len(self.taps.recipes),
        )
        if self.device.type == "cuda" and self._peaks is not None:
            gpus = range(self.measurement.gpus)
            there = float(sum(map(torch.cuda.memory_allocated, gpus)))
            usable = float(
                sum(torch.cuda.mem_get_info(g)[0] + torch.cuda.memory_reserved(g) for g in gpus)
            )
            fit = self._guess(fit, there, usable)
        return Pass(tuple(self.taps.recipes), fit)

    def _guess(self, fit: Fit, there: float, usable: float) -> Fit:
        """Return how the first pass is tried.

        Args:
            fit: how it goes where memory is no matter.
            there: bytes that are allocated already.
            usable: bytes in all.
        """
        assert self._peaks is not None
        kept, recomputed = self._peaks
        weights = float(sum(parameter.nbytes for parameter in self.model.parameters()))
        more = max(0.0, there - weights)  # such as the calibrated ranges of blocks
        found = first_fit(
            fit,
            weights=weights + more,
            kept=kept + more,
            recomputed=None if recomputed is None else recomputed + more,
            usable=usable,
            splittable=lambda: not self._coupled() and self.coupling.is_splittable(),
        )
        if found.checkpointing:
            logger.info(
                "activations are recomputed from the start: keeping them is expected to take "
                "%.1f GiB of %.1f",
                (kept + more) / 2**30,
                usable / 2**30,
            )
        if found.micro_batch < fit.micro_batch:
            logger.info("batches are split from the start, %d samples at a time", found.micro_batch)
        return found

    def _coupled(self) -> list[QuantRecipe]:
        return [r for r, format in self.quantizers.formats.items() if couples_samples(format)]

    def _cut(self, size: int) -> Sequence[Batch]:
        what = self.measurement
        return self.task.batches(self.loaded, what.score_rows, what.sampling, size)

    @contextmanager
    def _checkpointing(self, on: bool) -> Iterator[None]:
        """Let the model recompute activations; Hugging Face models do so in train mode only."""
        if not on:
            yield
            return
        model = self.model
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False
            model.gradient_checkpointing_disable()  # type: ignore[operator]

    # --- results -------------------------------------------------------------------------------

    def _result(self, format: Format, scored: _Scored) -> Result:
        recipe = self.quantizers.recipes[format.name]
        column = self.taps.column[recipe]
        table = torch.stack(scored.batches)[:, :, column].T.tolist()
        what = next(part for part in self.passes if recipe in part.recipes)
        own = f"calibrate {format.name}"
        return Result(
            batch_scores=dict(zip(self.taps.handles, table, strict=True)),
            reached={handle: self.taps.reached(handle) for handle in self.taps.handles},
            costs={
                handle: float(hparam.get_cost(recipe))
                for handle, hparam in self.quantizers.groups.items()
            },
            fit=what.fit,
            agreement=self.check.agreement,
            back_offs=what.back_offs,
            warnings=[*self.loaded.warnings, *self.messages],
            seconds={
                phase: duration
                for phase, duration in self.seconds.items()
                if not phase.startswith("calibrate ") or phase == own
            },
        )

    def _log_start(self, n_calibration: int, n_scoring: int) -> None:
        names = [format.name for format in self.formats]
        logger.info("%s", describe_work(self.quantizers.groups.values(), names))
        logger.info("%d calibration and %d scoring batches", n_calibration, n_scoring)
        self._peaks = self._expected_peaks()
        if self._peaks is not None:
            kept, recomputed = self._peaks
            logger.info(
                "expected peak memory about %.3g GiB%s",
                kept / 2**30,
                ""
                if recomputed is None
                else f", {recomputed / 2**30:.3g} GiB if activations are recomputed",
            )

    def _expected_peaks(self) -> tuple[float, float | None] | None:
        """Return the expected peaks in bytes; None if even a forward pass does not fit."""
        groups, batch = self.quantizers.groups, self.scoring[0]
        config = getattr(self.model, "config", None)
        held = held_by_shapes(groups, self.task.describe, batch, config)
        if held is None:
            try:
                there = batch.to(self.device, self.dtype)
                held = held_by_running(groups, lambda: self.task.forward(self.model, there))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                return None
        return expected_peaks(self.model, groups, held, batch.n_tokens)

    def _log_seconds(self) -> None:
        logger.info(
            "where the time went: %s",
            ", ".join(f"{phase} {duration:.2f} s" for phase, duration in self.seconds.items()),
        )


def _overwrites(message: str) -> bool:
    return "inplace operation" in message or "modified inplace" in message
