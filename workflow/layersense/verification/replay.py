"""Put a recipe onto a model: from its config, or by switching between calibrated formats."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.algorithms import QuantRecipe
from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from torch import nn

from layersense.calibration.database import Row, open_database
from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.tasks import get_task
from layersense.models.tasks.protocol import Batch, Loaded, Task
from layersense.quantization.formats import Format
from layersense.quantization.kv_cache import KV_CACHES, QUANTIZERS
from layersense.quantization.modelopt_formats import modelopt_attributes
from layersense.recipes.quant_config import Cache, Part, QuantConfig, make_parts
from layersense.scoring.measurement import sampling_of

Quantizers = dict[str, nn.Module]
"""Attribute of a module, such as ``weight_quantizer``, → quantizer."""
NOTHING = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None}


@dataclass(frozen=True)
class Calibration:
    """What calibrates: the batches of the calibration split, in order."""

    task: Task
    batches: Sequence[Batch]
    device: torch.device
    dtype: torch.dtype

    def loop(self, share: float) -> Callable[[nn.Module], None]:
        """Return a forward loop over the first ``share`` of the batches, at least one."""
        count = max(1, int(len(self.batches) * share))

        @torch.no_grad()
        def forward_loop(model: nn.Module) -> None:
            for index in range(count):
                self.task.forward(model, self.batches[index].to(self.device, self.dtype))

        return forward_loop


def apply_config(model: nn.Module, config: QuantConfig, calibration: Calibration) -> nn.Module:
    """Quantize a model as a ``quant_config.json`` says, by `mtq.quantize` alone.

    Raises:
        LayersenseError: a module of the config is not in the model.
    """
    names = {name for name, _ in model.named_modules()}
    for part in config.parts:
        if missing := [name for name in part.modules if name not in names]:
            raise LayersenseError(
                f"quant_config.json of {config.run}, {config.scheme}: the model has no module "
                f"{missing[0]}; apply it to {config.model}, which it was made for"
            )
    with quiet():
        for part in config.parts:
            model = mtq.quantize(
                model, modelopt_part(part), calibration.loop(part.calibration_share)
            )
        if config.kv_cache is not None:
            model = mtq.quantize(model, pythonic(config.kv_cache.config), calibration.loop(1.0))
            _check_cached(model, config.kv_cache)
        if config.enable:
            set_quantizer_by_cfg(model, list(config.enable))
    return model


def _check_cached(model: nn.Module, cache: Cache) -> None:
    """Check that all attention modules have quantizers for keys and values.

    Raises:
        LayersenseError: ModelOpt gave one none.
    """
    for name in cache.modules:
        if not set(QUANTIZERS) <= set(_quantizers(model.get_submodule(name))):
            raise LayersenseError(
                f"{name}: ModelOpt cannot quantize keys and values of "
                f"{type(model.get_submodule(name)).__name__}; leave kv_cache of the scheme out"
            )


def modelopt_part(part: Part) -> dict[str, Any]:
    """Return a part's config in Python's terms."""
    return pythonic(part.config)


def pythonic(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of `mtq.quantize` in Python's terms: axes as integers, pairs as tuples."""
    entries = []
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg")
        if isinstance(cfg, list):
            entry = {**entry, "cfg": [modelopt_attributes(stage) for stage in cfg]}
        elif cfg is not None:
            entry = {**entry, "cfg": modelopt_attributes(cfg)}
        entries.append(entry)
    return {"quant_cfg": entries, "algorithm": config["algorithm"]}


def enabled_quantizers(model: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """Return module → attribute (``weight_quantizer``…) → what that quantizer does, of those on.

    Of quantizers in a row, and of the many that fused experts have, the first one's attributes.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer | SequentialQuantizer | nn.ModuleList):
            continue  # told by the module that has them
        for attribute, quantizer in _quantizers(module).items():
            first = quantizer
            while isinstance(first, SequentialQuantizer | nn.ModuleList):
                first = first[0]
            if isinstance(first, TensorQuantizer) and first.is_enabled:
                found.setdefault(name, {})[attribute] = {
                    "num_bits": first.num_bits,
                    "axis": first.axis,
                    "block_sizes": first.block_sizes,
                }
    return found


def check_applied(model: nn.Module, config: QuantConfig) -> None:
    """Check that exactly the recipe's modules are quantized, each as its format says.

    Raises:
        LayersenseError: a module is quantized otherwise; the first one is named.
    """
    found = enabled_quantizers(model)
    for part in config.parts:
        for name in part.modules:
            there = found.pop(name, {})
            for kind, stages in (("weight", part.weight), ("input", part.input)):
                own = [entry for attribute, entry in there.items() if kind in attribute]
                expected = modelopt_attributes(stages[0]) if stages else None
                if bool(own) != bool(expected) or any(
                    entry["num_bits"] != expected["num_bits"]
                    or _has_blocks(entry["block_sizes"]) != _has_blocks(expected.get("block_sizes"))
                    for entry in own
                    if expected
                ):
                    raise LayersenseError(
                        f"{name}: the model's {kind} quantizers are {own or 'off'}, which is not "
                        f"{part.format}; this is a defect of layersense or ModelOpt"
                    )
    if config.kv_cache is not None:
        expected = modelopt_attributes(KV_CACHES[config.kv_cache.format])["num_bits"]
        for name in config.kv_cache.modules:
            there = found.pop(name, {})
            if {key: entry["num_bits"] for key, entry in there.items()} != dict.fromkeys(
                QUANTIZERS, expected
            ):
                raise LayersenseError(
                    f"{name}: the model's quantizers of keys and values are {there or 'off'}, "
                    f"which is not {config.kv_cache.format}; this is a defect of layersense or "
                    "ModelOpt"
                )
    if found:
        raise LayersenseError(
            f"{next(iter(found))}: is quantized, and the recipe leaves it alone ({len(found)} such "
            "modules); this is a defect of layersense or ModelOpt"
        )


def _has_blocks(block_sizes: Mapping[Any, Any] | None) -> bool:
    """Return whether scales are shared by blocks; one as long as the tensor is none to ModelOpt."""
    return any(isinstance(size, int) for size in (block_sizes or {}).values())


@dataclass
class Switchboard:
    """A model whose layer groups switch between calibrated formats.

    Every format is calibrated once, on all groups that have it, as ModelOpt's search does; then
    each group's quantizers are exchanged at will. Nothing rewrites weights: the scales of AWQ and
    SmoothQuant stay in the quantizers.

    Attributes:
        model: the model, all of it unquantized until something is switched.
        modules: handle → names of the group's modules.
        choices: format → module → quantizers.
        caches: format of the key-value cache → attention module → quantizers.
    """

    model: nn.Module
    modules: Mapping[str, list[str]]
    choices: dict[str, dict[str, Quantizers]] = field(default_factory=dict)
    caches: dict[str, dict[str, Quantizers]] = field(default_factory=dict)
    _cache: str = "none"
    _off: dict[str, Quantizers] = field(default_factory=dict)
    _on: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, modules: Mapping[str, list[str]]) -> "Switchboard":
        """Give every layer its quantizers, all of them off."""
        QuantRecipe.disable_folding_pqs_to_weights()
        with quiet():
            model = mtq.quantize(model, NOTHING)
        board = cls(model, modules)
        for names in modules.values():
            for name in names:
                board._off[name] = _quantizers(board._module(name))
        return board

    def calibrate(
        self, format: Format, handles: Sequence[str], types: Mapping[str, str], share: Calibration
    ) -> None:
        """Calibrate a format on ``handles`` and keep it, switched off.

        Args:
            format: the format.
            handles: the groups that have it.
            types: module → class name in the original model.
            share: the batches.
        """
        (part,) = make_parts(
            dict.fromkeys(handles, format.name), {format.name: format}, self.modules, types
        )
        self.clear()
        for name in part.modules:
            module = self._module(name)
            for attribute, quantizer in self._off[name].items():
                setattr(module, attribute, _fresh(quantizer))
        config = modelopt_part(part)
        with quiet():
            set_quantizer_by_cfg(self.model, config["quant_cfg"])
            mtq.calibrate(self.model, config["algorithm"], share.loop(part.calibration_share))
        self.choices[format.name] = {name: _quantizers(self._module(name)) for name in part.modules}
        for name in part.modules:
            self._install(name, self._off[name])

    def calibrate_cache(self, cache: Cache, calibration: Calibration) -> None:
        """Calibrate a format of the key-value cache and keep it, switched off.

        Raises:
            LayersenseError: ModelOpt cannot quantize the cache of this model.
        """
        self.clear()
        _check_cached(self.model, cache)
        for name in cache.modules:
            module = self._module(name)
            self._off.setdefault(name, {key: _quantizers(module)[key] for key in QUANTIZERS})
            self._install(name, {key: TensorQuantizer() for key in QUANTIZERS})
        config = pythonic(cache.config)
        with quiet():
            set_quantizer_by_cfg(self.model, config["quant_cfg"])
            mtq.calibrate(self.model, config["algorithm"], calibration.loop(1.0))
        self.caches[cache.format] = {
            name: {key: _quantizers(self._module(name))[key] for key in QUANTIZERS}
            for name in cache.modules
        }
        for name in cache.modules:
            self._install(name, self._off[name])

    def switch(self, recipe: Mapping[str, str], kv_cache: str = "none") -> None:
        """Quantize as ``recipe`` says; groups that it does not name stay unquantized.

        Args:
            recipe: handle → format.
            kv_cache: format of the key-value cache.
        """
        if kv_cache != self._cache:
            for name in self.caches.get(self._cache, {}):
                self._install(name, self._off[name])
            for name, quantizers in self.caches.get(kv_cache, {}).items():
                self._install(name, quantizers)
            self._cache = kv_cache
        wanted = {handle: name for handle, name in recipe.items() if name in self.choices}
        for handle in [handle for handle, name in self._on.items() if wanted.get(handle) != name]:
            for name in self.modules[handle]:
                self._install(name, self._off[name])
            del self._on[handle]
        for handle, format in wanted.items():
            if self._on.get(handle) != format:
                for name in self.modules[handle]:
                    self._install(name, self.choices[format][name])
                self._on[handle] = format

    def clear(self) -> None:
        """Switch everything off."""
        self.switch({})

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _install(self, name: str, quantizers: Quantizers) -> None:
        module = self._module(name)
        for attribute, quantizer in quantizers.items():
            setattr(module, attribute, quantizer)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep ModelOpt's warnings off the terminal: scoring has reported them already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _quantizers(module: nn.Module) -> Quantizers:
    """Return a module's own quantizers, and the lists of them that fused experts have."""
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(child, TensorQuantizer | SequentialQuantizer)
        or (
            isinstance(child, nn.ModuleList)
            and len(child)
            and isinstance(child[0], TensorQuantizer | SequentialQuantizer)
        )
    }


def _fresh(quantizer: nn.Module) -> nn.Module:
    if isinstance(quantizer, nn.ModuleList):
        return nn.ModuleList(TensorQuantizer() for _ in quantizer)
    fresh: nn.Module = TensorQuantizer()
    return fresh


def load_calibration(
    config: QuantConfig, checkpoint: Checkpoint, database_file: Path
) -> tuple[Loaded, Calibration]:
    """Load a model and its calibration batches as the search read them.

    Raises:
        LayersenseError: the data is another one than the recipe was made on, or an input cannot
            be read.
    """
    settings = config.settings
    task = get_task(checkpoint.task)
    loaded = task.load(checkpoint, dtype=settings["dtype"], device=settings["device"])
    with open_database(database_file) as database:
        if database.meta["digest"] != config.dataset_digest:
            raise LayersenseError(
                f"{database_file}: holds other rows than the recipe was made on; run `snakemake` "
                "to bring both up to date"
            )
        rows = database.rows(
            task.unit(settings["modality"]),
            "calibration",
            limit=settings["sampling"]["calibration_samples"],
        )
        database.check_images(rows)
    return loaded, calibration_of(loaded, task, rows, settings)


def calibration_of(
    loaded: Loaded, task: Task, rows: Sequence[Row], settings: Mapping[str, Any]
) -> Calibration:
    """Return the calibration batches of ``rows``, as scoring makes them."""
    dtype = next(p.dtype for p in loaded.model.parameters() if p.is_floating_point())
    return Calibration(
        task,
        task.batches(
            loaded,
            rows,
            sampling_of(settings),
            settings["sampling"]["calibration_batch_size"],
        ),
        torch.device(settings["device"]),
        dtype,
    )
