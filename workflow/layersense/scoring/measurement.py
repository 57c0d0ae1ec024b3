"""What both engines share: the measurement, what is remembered of a batch, and an entry."""

import math
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.opt.utils import named_hparams
from modelopt.torch.quantization.algorithms import QuantRecipeHparam
from torch import nn

from layersense.calibration.database import Row
from layersense.models.checkpoints import Checkpoint
from layersense.models.devices import spread_over
from layersense.models.tasks.protocol import Batch, Loaded, Sampling, Task
from layersense.quantization.formats import Format
from layersense.quantization.modelopt_formats import kernel_mode
from layersense.scoring.environment import describe_environment, peak_memory_bytes
from layersense.scoring.in_progress import Completed, InProgress
from layersense.scoring.scores import Agreement, Batches, Fit, FormatScores, GroupScore, Reached


@dataclass(frozen=True)
class Measurement:
    """What a run measures, apart from its formats."""

    checkpoint: Checkpoint
    task: Task
    sampling: Sampling
    method: str
    calibration_rows: Sequence[Row]
    score_rows: Sequence[Row]
    calibration_batch_size: int
    score_batch_size: int
    dtype: str
    device: torch.device
    seed: int
    in_progress: InProgress[Completed] | None = None
    """Where completed batches of a long measurement are kept."""
    gpus: int = 1
    """How many GPUs the model is spread over, the first that are visible."""


@dataclass(frozen=True)
class BatchStatistics:
    """What is remembered of a scoring batch once its tensors are gone."""

    n_tokens: int
    n_samples: int
    n_positions: int
    n_padding: int
    n_truncated: int

    @classmethod
    def of(cls, batch: Batch) -> "BatchStatistics":
        """Return the statistics of ``batch``."""
        return cls(
            batch.n_tokens,
            batch.n_samples,
            batch.n_positions,
            batch.n_padding,
            batch.n_truncated,
        )


@dataclass(frozen=True)
class Result:
    """What was measured of one format."""

    batch_scores: Mapping[str, Sequence[float]]
    """Handle → summed score of each batch."""
    reached: Mapping[str, Reached]
    costs: Mapping[str, float]
    """Handle → ModelOpt's cost under the format."""
    fit: Fit
    back_offs: Sequence[str]
    warnings: Sequence[str]
    seconds: Mapping[str, float]
    agreement: Agreement | None = None


def format_scores(
    measurement: Measurement, format: Format, result: Result, seen: Sequence[BatchStatistics]
) -> FormatScores:
    """Return the score file's entry of one format, without digest and settings.

    Args:
        measurement: what was measured.
        format: the format.
        result: what was measured of it.
        seen: statistics of the scoring batches.
    """
    device = measurement.device
    return FormatScores(
        digest="",
        settings={},
        effective_bits=format.effective_bits,
        weight_format=format.weight_format,
        act_format=format.act_format,
        kernel=kernel_mode(format, device.type),
        batches=Batches(
            tokens=[batch.n_tokens for batch in seen],
            samples=[batch.n_samples for batch in seen],
            padding_share=round(
                sum(batch.n_padding for batch in seen) / sum(batch.n_positions for batch in seen),
                6,
            ),
            truncated=sum(batch.n_truncated for batch in seen),
        ),
        groups={
            handle: GroupScore(
                reached=result.reached[handle],
                batch_scores=[score if math.isfinite(score) else None for score in scores],
                cost=result.costs[handle],
            )
            for handle, scores in result.batch_scores.items()
        },
        environment=describe_environment(device),
        seconds={phase: round(duration, 3) for phase, duration in result.seconds.items()},
        peak_memory_bytes=peak_memory_bytes(device),
        fit=result.fit,
        agreement=result.agreement,
        back_offs=list(result.back_offs),
        warnings=list(result.warnings),
    )


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """Return a run's sampling, from its score settings."""
    sampling = settings["sampling"]
    return Sampling(
        modality=settings["modality"],
        max_length=sampling["max_length"],
        min_pixels=sampling.get("min_pixels"),
        max_pixels=sampling.get("max_pixels"),
        prompt=sampling.get("prompt", ""),
        seed=sampling["seed"],
    )


def layer_groups(model: nn.Module) -> dict[str, QuantRecipeHparam]:
    """Return handle → layer group, of a model that ModelOpt's quantizers were put into."""
    return {
        handle: hparam
        for handle, hparam in named_hparams(model, unique=True)
        if isinstance(hparam, QuantRecipeHparam) and hparam.is_configurable
    }


def describe_work(groups: Collection[QuantRecipeHparam], formats: Sequence[str]) -> str:
    """Say what is measured: layer groups, modules, formats, quantizers."""
    modules = sum(len(hparam.quant_modules) for hparam in groups)
    return (
        f"{len(groups)} layer groups of {modules} modules, {len(formats)} formats "
        f"({2 * modules * len(formats)} quantizers): {', '.join(formats)}"
    )


def load(measurement: Measurement) -> Loaded:
    """Load the model, seeded, with every dropout at zero and activations that overwrite nothing."""
    torch.manual_seed(measurement.seed)
    if measurement.device.type == "cuda":
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
        # cuDNN's attention plans anew for each shape, that is, for nearly every batch: seconds.
        torch.backends.cuda.enable_cudnn_sdp(False)
    with spread_over(measurement.gpus):
        loaded = measurement.task.load(
            measurement.checkpoint, dtype=measurement.dtype, device=measurement.device
        )
    _disable_dropout(loaded.model)
    for module in loaded.model.modules():
        # A score needs the output that an activation in place would overwrite.
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    return loaded


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that floating-point inputs of ``model`` are given in."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall seconds of the block to ``seconds[phase]``."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what ModelOpt warns of, each message once, and keep it off the terminal."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for warning in caught:
        message = " ".join(str(warning.message).split())
        # ModelOpt calls every config that is not its own CUSTOM_n; ours have names.
        ours = "CUSTOM_" in message
        if "modelopt" in str(warning.filename) and not ours and message not in messages:
            messages.append(message)


def _disable_dropout(model: nn.Module) -> None:
    """Zero every dropout and layer-drop probability, in modules and in the configs they read."""
    holders: list[Any] = list(model.modules())
    config = getattr(model, "config", None)
    if config is not None:
        holders += [config, *(getattr(config, key) for key in getattr(config, "sub_configs", {}))]
    for holder in holders:
        for name, value in vars(holder).items():
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
