"""The dry pass: what the loss of a few samples reaches, in seconds, before anything is calibrated.

It advises and decides nothing: what a score was reached by is seen by the engines themselves, over
all samples.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.models.checkpoints import read_checkpoint
from layersense.models.experts import is_fused
from layersense.models.tasks.protocol import Batch, Loaded
from layersense.scoring.measurement import Measurement, floating_dtype, load
from layersense.scoring.scores import Reached

logger = logging.getLogger(__name__)

SAMPLES = 4
"""Samples that are tried, one at a time, until everything is reached."""
_SHOWN = 3


@dataclass
class SubsystemReach:
    """What the loss reached of one subsystem."""

    subsystem: str
    layers: int = 0
    missed: dict[str, Reached] = field(default_factory=dict)
    """Layer → ``not_called`` or ``no_gradient``."""

    @property
    def unreached(self) -> bool:
        """Whether it will end without a score."""
        return len(self.missed) == self.layers

    def __str__(self) -> str:
        reached = self.layers - len(self.missed)
        return f"{self.subsystem} {reached} of {self.layers} layers"


def log_reach(measurement: Measurement, loaded: Loaded) -> None:
    """Say in the log what the loss reaches, with a warning for each subsystem that it does not.

    Scoring goes on where the pass does not fit into memory: it has ways of its own.
    """
    try:
        found, samples = dry_pass(measurement, loaded)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        first = str(error).partition("\n")[0]
        logger.info("the dry pass was left out (%s)", first)
        return
    finally:
        if measurement.device.type == "cuda":
            torch.cuda.empty_cache()
    for line in advice(found, samples):
        logger.warning("%s", line, extra={"phase": "dry pass"})
    logger.info("%s", summary(found, samples), extra={"phase": "dry pass"})


def summary(found: Sequence[SubsystemReach], samples: int) -> str:
    """Return one line that says what was reached of each subsystem."""
    return f"dry pass of {_samples(samples)}: the loss reaches {', '.join(map(str, found))}"


def advice(found: Sequence[SubsystemReach], samples: int) -> list[str]:
    """Return one line for each subsystem that the loss did not reach at all."""
    lines = []
    for part in found:
        if not part.unreached:
            continue
        names = list(part.missed)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        called = "no_gradient" in part.missed.values()
        why, fix = (
            ("ran, but no gradient of the loss comes back", "check the task's loss")
            if called
            else ("never ran", "check `modality` of the run and its data")
        )
        lines.append(
            f"dry pass: the {part.subsystem} subsystem {why} in {_samples(samples)}, so it would "
            f"get no score; {fix} before you wait for zeros ({', '.join(names[:_SHOWN])}{more})"
        )
    return lines


def dry_pass(measurement: Measurement, loaded: Loaded) -> tuple[list[SubsystemReach], int]:
    """Return what the loss reaches of each subsystem, and how many samples that took.

    Runs the model as it was loaded, one sample at a time, until every layer is reached or
    ``SAMPLES`` are tried. Weights, their ``requires_grad`` and the random state stay as they are.
    """
    task, device = measurement.task, measurement.device
    describe = loaded.describe or task.describe
    watch = _Watch(loaded.model, gradient=measurement.method == "gradient")
    dtype = floating_dtype(loaded.model)
    tried = 0
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), watch:
        for batch in _first_batches(measurement, loaded):
            tried += batch.n_samples
            _step(measurement, loaded.model, batch.to(device, dtype), watch)
            if not watch.missed():
                break
    missed = watch.missed()
    parts: dict[str, SubsystemReach] = {}
    for name in watch.layers:
        subsystem = describe([name]).subsystem
        part = parts.setdefault(subsystem, SubsystemReach(subsystem))
        part.layers += 1
        if name in missed:
            part.missed[name] = missed[name]
    return list(parts.values()), tried


def _first_batches(measurement: Measurement, loaded: Loaded) -> Sequence[Batch]:
    rows, sampling = measurement.score_rows, measurement.sampling
    try:
        return measurement.task.batches(loaded, rows[:SAMPLES], sampling, 1)
    except LayersenseError:
        # Some data is refused only if none of it will do, as photographs that show nothing.
        return measurement.task.batches(loaded, rows, sampling, 1)[:SAMPLES]


def _step(measurement: Measurement, model: nn.Module, batch: Batch, watch: "_Watch") -> None:
    if not watch.gradient:
        with torch.no_grad():
            measurement.task.forward(model, batch)
        return
    with torch.enable_grad():
        loss = measurement.task.loss(measurement.task.forward(model, batch), batch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]


class _Watch:
    """Sees which layers run, and which a gradient comes back to, while it is entered."""

    def __init__(self, model: nn.Module, *, gradient: bool) -> None:
        self.model, self.gradient = model, gradient
        self.layers = {name: module for name, module in model.named_modules() if _counts(module)}
        self._called: set[str] = set()
        self._reached: set[str] = set()
        self._undo: list[Any] = []
        self._required: list[nn.Parameter] = []

    def __enter__(self) -> "_Watch":
        # Gradients of weights are wanted by nobody, and would take as much memory as they do.
        self._required = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._required:
            parameter.requires_grad_(False)
        for name, module in self.layers.items():
            self._undo.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._undo:
            handle.remove()
        for parameter in self._required:
            parameter.requires_grad_(True)

    def missed(self) -> dict[str, Reached]:
        """Return layer → how it was missed so far."""
        reached = self._reached if self.gradient else self._called
        return {
            name: "no_gradient" if name in self._called else "not_called"
            for name in self.layers
            if name not in reached
        }

    def _hook(self, name: str) -> Any:
        def see(gradient: Tensor) -> None:
            if name not in self._reached and (gradient != 0).any():
                self._reached.add(name)

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            self._called.add(name)
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            if not (torch.is_grad_enabled() and first.is_floating_point()):
                return None
            if not first.requires_grad:
                # Nothing before it needs a gradient; that at this output is wanted all the same.
                first = first.detach().requires_grad_(True)
            first.register_hook(see)
            first = first.clone()  # which the model may overwrite
            return first if rest is None else (first, *rest)

        return hook


def _counts(module: nn.Module) -> bool:
    """Return whether a module is of the kinds that ModelOpt searches."""
    return (
        isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        or type(module).__name__ == "Conv1D"  # GPT-2's linear layer in transformers
        or is_fused(module)
    )


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"


def reach_run(
    settings: Mapping[str, Any], *, model_file: Path, database_file: Path, gpus: int = 1
) -> tuple[list[SubsystemReach], int]:
    """Load a run's model and make the dry pass alone; see :func:`dry_pass`.

    Args:
        settings: the run's part of the config, from ``settings.score_settings``.
        model_file: record of the checkpoint.
        database_file: calibration database.
        gpus: GPUs that the model is spread over.

    Raises:
        LayersenseError: an input is unusable, or one sample does not fit into memory.
    """
    from layersense.scoring.job import leased, prepare_measurement

    checkpoint = read_checkpoint(model_file)
    gpus = 1 if settings["device"] == "cpu" else gpus
    with leased(settings["device"], gpus):
        measurement, _ = prepare_measurement(settings, checkpoint, database_file, gpus=gpus)
        try:
            return dry_pass(measurement, load(measurement))
        except torch.OutOfMemoryError as error:
            raise LayersenseError(
                "one sample does not fit into memory without ModelOpt's savings; use "
                "`--device cpu`, or reduce `max_length` or `max_pixels` of the run"
            ) from error
