"""ModelOpt's quantizers of every format on one model, calibrated with statistics taken once."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from modelopt.torch.opt import apply_mode
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization import model_calib
from modelopt.torch.quantization._auto_quantize_cost import (
    COST_MODEL_WEIGHT,
    get_auto_quantize_cost_model,
)
from modelopt.torch.quantization.algorithms import (
    AutoQuantizeGradientSearcher,
    QuantRecipe,
)
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
from modelopt.torch.quantization.mode import QuantizeModeRegistry
from modelopt.torch.quantization.model_quant import calibrate
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.quantization.formats import Format, block_lengths
from layersense.quantization.modelopt_formats import modelopt_config
from layersense.scoring.measurement import layer_groups, timed

logger = logging.getLogger(__name__)

UNQUANTIZED = QuantRecipe(quant_cfg=None)
SHARED_ALGORITHMS = ("max", "smoothquant", "mse")
"""Calibration algorithms that need nothing of the data but each channel's largest magnitude."""

Statistics = dict[tuple[nn.Module, str], Tensor]
"""Module and name of its quantizer → magnitudes, shape (1, …, channels, …)."""
ForwardLoop = Callable[[int], None]
"""Runs the first n calibration batches through the model."""


class Quantizers:
    """The layer groups of a model, with calibrated quantizers for every format.

    Args:
        model: the model; its linears, convolutions and experts are converted in place.
        formats: what to measure; two of the same settings share their quantizers.
    """

    def __init__(self, model: nn.Module, formats: Sequence[Format]) -> None:
        self.model = model
        self.recipes = {f.name: QuantRecipe(modelopt_config(f), name=f.name) for f in formats}
        self.formats = {self.recipes[f.name]: f for f in reversed(formats)}
        apply_mode(model, mode="auto_quantize", registry=QuantizeModeRegistry)
        set_quantizer_by_cfg(model, [{"quantizer_name": "*", "enable": False}])
        searcher = AutoQuantizeGradientSearcher()
        searcher.model = model
        searcher.config = {"cost": {}}
        searcher._cost_model = get_auto_quantize_cost_model(COST_MODEL_WEIGHT)
        searcher.insert_hparams_after_merge_rules(model, sorted(self.formats))
        self.groups = layer_groups(model)
        self.activate(UNQUANTIZED)

    def activate(self, recipe: QuantRecipe) -> None:
        """Put the quantizers of ``recipe`` into every group."""
        for hparam in self.groups.values():
            hparam.active = recipe

    def calibrate(self, forward: ForwardLoop, n_batches: int) -> dict[str, float]:
        """Calibrate every format by its own algorithm, as stock does.

        The formats that need only each channel's largest magnitude share one pass over the data;
        if none of them quantizes activations statically, there is no such pass. AWQ and its like
        run their own passes, on a quarter of the batches, as in ``auto_quantize``.

        Args:
            forward: runs calibration batches through the model.
            n_batches: how many there are.

        Returns:
            Wall seconds by phase: ``calibrate`` and, for each format with passes of its own,
            ``calibrate NAME``.

        Raises:
            LayersenseError: an activation was not finite.
        """
        seconds: dict[str, float] = {}
        with _unfolded_scales(), torch.no_grad():
            shared = [recipe for recipe in self.formats if self._shares_statistics(recipe)]
            with timed(seconds, "calibrate"):
                statistics: Statistics = {}
                if any(self._needs_statistics(recipe) for recipe in shared):
                    statistics = self._take_statistics(forward, n_batches)
                for recipe in shared:
                    self._calibrate(recipe, lambda: self._replay(statistics))
            for recipe in self.formats:
                if recipe in shared:
                    continue
                name = self.formats[recipe].name
                awq = "awq" in str(recipe.config.algorithm)
                count = max(1, n_batches // 4) if awq else n_batches
                logger.info("calibrating %s by its own passes over %d batches", name, count)
                with timed(seconds, f"calibrate {name}"):
                    self._calibrate(recipe, lambda count=count: forward(count))  # type: ignore[misc]
        self.activate(UNQUANTIZED)
        return seconds

    def _shares_statistics(self, recipe: QuantRecipe) -> bool:
        format = self.formats[recipe]
        method = format.algorithm["method"] if format.algorithm else "max"
        return method in SHARED_ALGORITHMS and not has_static_blocks(format)

    def _needs_statistics(self, recipe: QuantRecipe) -> bool:
        # Dynamic ranges and MX scales come from the tensor at hand.
        return any(
            stage.get("type") != "dynamic"
            and (stage.get("block_sizes") or {}).get("scale_bits") != [8, 0]
            for stage in self.formats[recipe].input
        )

    def _calibrate(self, recipe: QuantRecipe, forward: Callable[[], None]) -> None:
        self.activate(recipe)
        calibrate(
            self.model,
            algorithm=recipe.config.algorithm,
            forward_loop=lambda _: forward(),
        )
        # As in stock: formats are mixed later, so no single one is the model's mode.
        ModeloptStateManager(self.model).state_dict().pop()

    def _take_statistics(self, forward: ForwardLoop, n_batches: int) -> Statistics:
        """Return each channel's largest magnitude at every input quantizer that saw data."""
        recorders: dict[tuple[nn.Module, str], TensorQuantizer] = {}
        for module, name in self._input_quantizers():
            recorder = TensorQuantizer(QuantizerAttributeConfig(axis=_channel_axis(module)))
            recorder._calibrator = _ChannelMaximum(axis=_channel_axis(module))
            recorder.disable_quant()
            recorder.enable_calib()
            setattr(module, name, recorder)
            recorders[module, name] = recorder
        forward(n_batches)
        names = {module: name for name, module in self.model.named_modules()}
        statistics: Statistics = {}
        for (module, name), recorder in recorders.items():
            maximum = recorder._calibrator.compute_amax()
            if maximum is None:
                continue
            if not torch.isfinite(maximum).all():
                raise LayersenseError(
                    f"{names[module]}: its input is not finite on the calibration data; check the "
                    "checkpoint's weights, or set another `dtype` of the run"
                )
            statistics[module, name] = maximum
        return statistics

    def _replay(self, statistics: Statistics) -> None:
        """Show each quantizer one tensor that has every channel's largest magnitude."""
        for module, name in self._input_quantizers():
            if (module, name) in statistics:
                getattr(module, name)(statistics[module, name])

    def _input_quantizers(self) -> Iterator[tuple[nn.Module, str]]:
        for hparam in self.groups.values():
            for module in hparam.quant_modules:
                for name, child in module.named_children():
                    if name.endswith("input_quantizer") and isinstance(child, nn.Module):
                        yield module, name


def has_static_blocks(format: Format) -> bool:
    """Return whether activations have a calibrated range for each block of the batch's shape."""
    return any(
        isinstance(length, int)
        for stage in format.input
        if stage.get("type") != "dynamic"
        and (stage.get("block_sizes") or {}).get("type") != "dynamic"
        for length in block_lengths(stage).values()
    )


def asks_device(format: Format, several: bool) -> bool:
    """Return whether ModelOpt asks the device for the smallest range when it quantizes.

    Its function for integers with ranges along several axes does (``_tensor_quant``): weights in
    blocks of two axes, inputs with a range for each token where there are several sequences.

    Args:
        format: the format.
        several: whether an input has more than one dimension longer than 1 before its last.
    """

    def by_token(stage: Mapping[str, Any]) -> bool:
        return None in block_lengths(stage).values() or isinstance(stage.get("axis"), list)

    weights = [stage for stage in format.weight if isinstance(stage["num_bits"], int)]
    inputs = [stage for stage in format.input if isinstance(stage["num_bits"], int)]
    return any(len(block_lengths(stage)) > 1 for stage in weights) or (
        several and any(by_token(stage) for stage in inputs)
    )


class _ChannelMaximum(MaxCalibrator):  # type: ignore[misc]
    """ModelOpt's maximum without its three questions to the device for each tensor."""

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        x = x[None] if x.dim() == 1 else x
        axis = self._axis % x.dim()
        others = [dim for dim in range(x.dim()) if dim != axis]
        # Magnitudes through both extremes: no copy of the tensor.
        most = torch.maximum(x.amax(others, keepdim=True), -x.amin(others, keepdim=True))
        before = self.compute_amax()
        self._calib_amax = most if before is None else torch.maximum(before, most)


def _channel_axis(module: nn.Module) -> int:
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return 1 if convolution else -1


@contextmanager
def _unfolded_scales() -> Iterator[None]:
    """Keep AWQ's and SmoothQuant's scales in the quantizers: the weights serve all formats."""
    before = model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS
    QuantRecipe.disable_folding_pqs_to_weights()
    try:
        yield
    finally:
        model_calib._ENABLE_FOLDING_PQS_TO_WEIGHTS = before
