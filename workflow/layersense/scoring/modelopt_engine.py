"""Engine ``modelopt``: stock ``mtq.auto_quantize``, the reference.

How stock has to be driven so that its scores mean what they say:

- the loss is a sum over supervised tokens, so scores do not depend on the scoring batch size;
- a forward-backward step of our own asks gradients of floating inputs and of embedding outputs,
  so that every tower gets some, and takes the accumulated scores away after each batch;
- dropout and layer-drop are zeroed, because gradient checkpointing puts modules into train mode;
- formats calibrated by ``max`` go in one joint call, the others each in one of its own on a
  freshly loaded model, because they rewrite weights and a quantized model is refused.
"""

import gc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.algorithms import QuantRecipe
from torch import nn

from layersense.errors import LayersenseError, is_out_of_memory
from layersense.models.tasks.protocol import Batch, Loaded, no_distribution
from layersense.progress import duration
from layersense.quantization.formats import Format
from layersense.quantization.modelopt_formats import joint_calls, modelopt_config
from layersense.scoring.in_progress import Completed
from layersense.scoring.inventory import Inventory, take_inventory
from layersense.scoring.measurement import (
    BatchStatistics,
    Measurement,
    Result,
    collected_warnings,
    describe_work,
    floating_dtype,
    format_scores,
    layer_groups,
    load,
    timed,
)
from layersense.scoring.progress import Progress
from layersense.scoring.reach import log_reach
from layersense.scoring.recorder import Recorder
from layersense.scoring.scores import Fit, FormatScores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """The formats of one ``auto_quantize`` call, and what was reduced to make it fit."""

    formats: Sequence[Format]
    score_batch_size: int
    back_offs: Sequence[str] = field(default=())
    first: bool = False
    """Whether nothing has run before it."""


def measure(
    measurement: Measurement, formats: Sequence[Format]
) -> Iterator[tuple[Inventory, dict[str, FormatScores]]]:
    """Score every layer group under ``formats``; yield after each ``auto_quantize`` call.

    The yielded entries lack ``digest`` and ``settings``, which the caller knows. On an
    out-of-memory error the scoring batch is halved, then the formats of the call are, and the
    call starts again on a freshly loaded model: neither changes a score.

    Raises:
        LayersenseError: one sample and one format do not fit into memory, or the model cannot be
            scored by this engine.
    """
    calls = [
        Call(formats=call, score_batch_size=measurement.score_batch_size, first=index == 0)
        for index, call in enumerate(joint_calls(formats))
    ]
    while calls:
        call = calls.pop(0)
        try:
            result = _measure_call(measurement, call)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            calls = [*_smaller_calls(call, error), *calls]
        else:
            yield result
            continue
        # Outside of the handler, whose traceback keeps the model alive; hooks make cycles.
        gc.collect()
        if measurement.device.type == "cuda":
            torch.cuda.empty_cache()


def _smaller_calls(call: Call, error: Exception) -> list[Call]:
    if call.score_batch_size > 1:
        size = call.score_batch_size // 2
        note = f"scoring batch reduced from {call.score_batch_size} to {size} samples"
        logger.warning("out of memory: %s", note)
        return [
            replace(call, score_batch_size=size, back_offs=(*call.back_offs, note), first=False)
        ]
    if len(call.formats) > 1:
        middle = len(call.formats) // 2
        note = f"{len(call.formats)} formats measured in two calls instead of one"
        logger.warning("out of memory: %s", note)
        return [
            replace(call, formats=part, back_offs=(*call.back_offs, note), first=False)
            for part in (call.formats[:middle], call.formats[middle:])
        ]
    raise LayersenseError(
        f"format {call.formats[0].name}: one sample does not fit into memory ({error}); reduce "
        "`max_length` or `max_pixels` of the run, or use a larger GPU"
    ) from error


def _measure_call(
    measurement: Measurement, call: Call
) -> tuple[Inventory, dict[str, FormatScores]]:
    task = measurement.task
    names = [format.name for format in call.formats]
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        loaded = load(measurement)
    if call.first:
        with timed(seconds, "dry pass"):
            log_reach(measurement, loaded)
    with timed(seconds, "load"):
        calibration = task.batches(
            loaded,
            measurement.calibration_rows,
            measurement.sampling,
            measurement.calibration_batch_size,
        )
        scoring = task.batches(
            loaded, measurement.score_rows, measurement.sampling, call.score_batch_size
        )
    _ask_gradients_of_embeddings(loaded.model)
    modules_before = {name: type(module).__name__ for name, module in loaded.model.named_modules()}
    configs = {format.name: modelopt_config(format) for format in call.formats}
    recipes = {name: QuantRecipe(config, name=name) for name, config in configs.items()}
    logger.info(
        "%s: %d calibration and %d scoring batches, formats %s",
        measurement.method,
        len(calibration),
        len(scoring),
        ", ".join(names),
    )
    steps = _Steps(measurement, loaded, calibration, scoring, recipes, seconds)
    with collected_warnings() as messages:
        mtq.auto_quantize(
            loaded.model,
            constraints={"effective_bits": 16.0},
            quantization_formats=list(configs.values()),
            # Indices, because calibration and scoring read different batches.
            data_loader=range(max(len(calibration), len(scoring))),
            forward_step=steps.forward,
            forward_backward_step=steps.forward_backward
            if measurement.method == "gradient"
            else None,
            num_calib_steps=len(calibration),
            num_score_steps=len(scoring) - steps.skipped,
            method=measurement.method,
            verbose=False,
        )
    steps.finish()
    recorder = steps.recorder
    inventory = take_inventory(loaded, recorder.hparams, modules_before, task)
    checkpointing = bool(getattr(loaded.model, "is_gradient_checkpointing", False))
    return inventory, {
        format.name: format_scores(
            measurement,
            format,
            Result(
                batch_scores=recorder.batch_scores[format.name],
                reached={handle: recorder.reached(handle) for handle in recorder.hparams},
                costs={
                    handle: float(hparam.get_cost(recipes[format.name]))
                    for handle, hparam in recorder.hparams.items()
                },
                fit=Fit(
                    micro_batch=call.score_batch_size,
                    checkpointing=checkpointing,
                    formats=len(call.formats),
                ),
                back_offs=call.back_offs,
                warnings=[*loaded.warnings, *messages],
                seconds=seconds,
            ),
            steps.seen,
        )
        for format in call.formats
    }


class _Steps:
    """The step functions that stock calls, and what they see."""

    def __init__(
        self,
        measurement: Measurement,
        loaded: Loaded,
        calibration: Sequence[Batch],
        scoring: Sequence[Batch],
        recipes: Mapping[str, QuantRecipe],
        seconds: dict[str, float],
    ) -> None:
        self.measurement = measurement
        self.model = loaded.model
        self.dtype = floating_dtype(self.model)
        self.calibration = calibration
        self.scoring = scoring
        self.recorder = Recorder(recipes, gradient=measurement.method == "gradient")
        self.seen: list[BatchStatistics] = []
        self.seconds = seconds
        self.seconds["calibrate"] = self.seconds["score"] = 0.0
        self.progress: Progress | None = None
        self._started = time.perf_counter()
        self._described = False
        """Whether the log says what is measured, which stock has put together by its first pass."""
        self._batch: Batch | None = None
        self._index = -1
        self._call = f"{', '.join(recipes)}; batches of {scoring[0].n_samples}"
        file = measurement.in_progress if measurement.method == "kl_div" else None
        self._file = file
        self._completed = file.read(self._call) if file else None
        # The last batch is scored anew in any case: stock has to have one.
        done = len(self._completed.seen) if self._completed else 0
        self.skipped = min(done, len(scoring) - 1)
        self._begun = 0
        """Passes of the first batch, beside that without quantizers, that are complete already."""
        if self._completed and self.skipped == done:
            self._begun = sum(map(len, self._completed.begun.values()))
        self._plain: torch.Tensor | None = None
        """The logits without quantizers, while they are needed."""
        if self.skipped or self._begun:
            logger.info(
                "%d of %d batches are complete already, and %d passes of the next",
                self.skipped,
                len(scoring),
                self._begun,
            )

    @torch.no_grad()
    def forward(self, model: nn.Module, index: int) -> torch.Tensor | None:
        """Calibrate on a batch; under ``kl_div`` also score, by the logits at supervised positions.

        Stock scores ``kl_div`` in inference mode and calibrates outside of it.
        """
        if not torch.is_inference_mode_enabled():
            if not self._described:
                self._described = True
                work = describe_work(layer_groups(model).values(), list(self.recorder.recipes))
                logger.info("%s", work)
            batch = self._to_device(self.calibration[index])
            self.measurement.task.forward(model, batch)
            return None
        index += self.skipped
        first = index != self._index
        if first:
            if self._index >= 0:
                self._end_batch()
            self._begin_batch(model, index)
        elif self._plain is not None and self._begun:
            # Complete: what differs by nothing adds nothing, and the recorder knows its score.
            self._begun -= 1
            return self._plain
        else:
            self._plain = None
            self._save()
        assert self._batch is not None
        task, started = self.measurement.task, time.perf_counter()
        logits = task.supervised_logits(task.forward(model, self._batch), self._batch)
        if logits.ndim != 2:
            raise no_distribution(task)
        if first and index == self.skipped:
            self._announce(time.perf_counter() - started)
            self._plain = logits if self._begun else None
        if self.progress is not None:
            self.progress.step()
        return logits

    @torch.enable_grad()
    def forward_backward(self, model: nn.Module, index: int) -> None:
        """Score one batch under ``gradient``."""
        batch = self._begin_batch(model, index)
        for value in batch.inputs.values():
            if value.is_floating_point():
                value.requires_grad_(True)
        task = self.measurement.task
        loss = task.loss(task.forward(model, batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._end_batch()

    def finish(self) -> None:
        """End the last batch and remove the hooks."""
        if self._batch is not None:
            self._end_batch()
        self.recorder.detach()
        if self.progress is not None:
            self.progress.close()
        self.seconds["score"] = time.perf_counter() - self._started

    def _announce(self, seconds: float) -> None:
        """Say how long ``kl_div`` will take: a forward pass for each group, format and batch."""
        logger.info(
            "kl_div runs the model %d times for each of %d batches: about %s",
            self._passes_each,
            len(self.scoring) - self.skipped,
            duration(self._passes_left() * seconds),
        )

    @property
    def _passes_each(self) -> int:
        return 1 + len(self.recorder.hparams) * len(self.recorder.recipes)

    def _passes_left(self) -> int:
        """Return how often ``kl_div`` runs the model from the first batch on."""
        return self._passes_each * (len(self.scoring) - self.skipped) - self._begun

    def _begin_batch(self, model: nn.Module, index: int) -> Batch:
        if not self.recorder.hparams:
            self.recorder.attach(model)
            if self._completed:
                self.recorder.take_up(self._completed, self.skipped)
                taken = self._completed.seen[: self.skipped]
                self.seen = [BatchStatistics(**batch) for batch in taken]
            now = time.perf_counter()
            self.seconds["calibrate"] = now - self._started
            self._started = now
            # A batch of `kl_div` may take half an hour: its passes are counted.
            by_pass = self.measurement.method == "kl_div"
            self.progress = Progress(
                f"score {len(self.recorder.recipes)} format(s)",
                total=self._passes_left() if by_pass else len(self.scoring),
                unit="pass" if by_pass else "batch",
                device=self.measurement.device,
            )
        batch = self.scoring[index]
        self.seen.append(BatchStatistics.of(batch))
        self._index, self._batch = index, self._to_device(batch)
        return self._batch

    def _end_batch(self) -> None:
        self.recorder.harvest()
        self._batch = self._plain = None
        self._save()
        if self.progress is not None and self.measurement.method == "gradient":
            self.progress.step()

    def _save(self) -> None:
        if self._file:
            self._file.save(self._call, self._complete)

    def _complete(self) -> Completed:
        seen = self.seen if self._batch is None else self.seen[:-1]
        return Completed(
            batch_scores=self.recorder.batch_scores,
            called=[h for h in self.recorder.hparams if self.recorder.reached(h) == "scored"],
            seen=[asdict(batch) for batch in seen],
            begun=self.recorder.begun(),
        )

    def _to_device(self, batch: Batch) -> Batch:
        return batch.to(self.measurement.device, self.dtype)


def _ask_gradients_of_embeddings(model: nn.Module) -> None:
    """Let every token embedding's output require a gradient, whatever its parameter is called.

    Stock enables gradients only for parameters with ``embed`` in their names.
    """

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(hook)
