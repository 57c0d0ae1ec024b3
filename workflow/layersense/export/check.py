"""Check a checkpoint as it lies on the disk, in a process that knows nothing of its making."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from layersense.errors import LayersenseError
from layersense.export import vllm_rules
from layersense.export.allow import Written, tensor_bytes, tensors, writes
from layersense.export.onnx_check import check_onnx
from layersense.export.store import ONNX_FILE, Checked, Expected
from layersense.export.unpack import unpack
from layersense.quantization.formats import format_from_settings

SAME = 0.5
"""Difference below which an element is the simulated value: half a step of the format; what is left
is rounding to the model's own type."""
STEP = 1.5
"""Difference from which on an element is another value than a rounding of the same weight: the
exporter divides in the model's type, which rounds twice."""
MOST_DIFFERING = 0.1
"""Share of a layer's elements that may be the neighbouring value.

In bfloat16 a quotient has 16 values for each step of FP8, so that the first rounding moves up to
1/16 of them onto the middle between two neighbours, where the second one may take the other; small
layers scatter around that.
"""
CHUNK = 2**24
"""Elements that are unpacked at once."""
SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


class Files:
    """The tensors of a folder of safetensors, by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.where: dict[str, Any] = {}
        self.twice: list[str] = []
        for file in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if name in self.where:
                    self.twice.append(name)
                self.where[name] = opened

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return type and shape of a tensor."""
        part = self.where[name].get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = self.where[name].get_tensor(name)
        return tensor


def tensor_names(folder: Path) -> set[str]:
    """Return the names of the tensors in a folder of safetensors."""
    with ExitStack() as stack:
        return set(Files(folder, stack).where)


def check_checkpoint(
    folder: Path, expected: Expected, simulated: Iterator[tuple[str, Tensor]] | None
) -> Checked:
    """Return what is wrong with a checkpoint, and what was counted.

    Args:
        folder: the checkpoint.
        expected: what it should hold.
        simulated: name → tensor as the model computed with it; None if there is nothing to compare
            with any more.

    Raises:
        LayersenseError: a file cannot be read.
    """
    with ExitStack() as stack:
        try:
            there = Files(folder, stack)
            original = Files(Path(expected.original), stack)
            config = json.loads((folder / "config.json").read_bytes())
            separate = json.loads((folder / "hf_quant_config.json").read_bytes())
            return _check(there, original, config, separate, expected, simulated)
        except (OSError, ValueError, SafetensorError) as error:
            raise LayersenseError(
                f"{folder}: is no whole checkpoint ({error}); delete checkpoint.json beside it and "
                "run `snakemake export`"
            ) from error


def _check(
    there: Files,
    original: Files,
    config: Mapping[str, Any],
    separate: Mapping[str, Any],
    expected: Expected,
    simulated: Iterator[tuple[str, Tensor]] | None,
) -> Checked:
    written = {name: _written(name, settings) for name, settings in expected.formats.items()}
    layouts = {module: written[format] for module, format in expected.quantized.items()}
    found = [f"{name} stands in two files" for name in there.twice]
    found += _names(there, original, expected, layouts)
    for module, layout in layouts.items():
        found += _module(there, module, layout, expected)
    found += _configs(config, separate, expected, layouts)
    compared, differing, elements, worst = 0, 0, 0, 0.0
    missing = {f"{module}.weight" for module in layouts} if simulated is not None else set()
    for name, tensor in simulated or ():
        if name not in there:
            continue  # told above
        module = name.rpartition(".")[0]
        if module not in layouts:
            if not torch.equal(there.read(name), tensor):
                found.append(f"{name}: is not what the model computed with after the fusions")
            continue
        missing.discard(name)
        if any(problem.startswith(f"{module}: ") for problem in found):
            continue  # a tensor is missing or misshaped
        parts = {suffix: there.read(f"{module}.{suffix}") for suffix in _scales(there, module)}
        largest, other = _distance(layouts[module], {"weight": there.read(name), **parts}, tensor)
        compared += 1
        elements += tensor.numel()
        differing += other
        worst = max(worst, largest)
        if largest > STEP or other > MOST_DIFFERING * tensor.numel():
            found.append(
                f"{module}: the packed weight is not the simulated one: up to {largest:.3g} steps "
                f"of {layouts[module].algo} apart, {other / tensor.numel():.1%} of the elements"
            )
    if missing:
        found.append(f"{len(missing)} packed weights were not compared, {min(missing)} for one")
    found += _untouched(there, original, expected)
    sizes = {name: tensor_bytes(*there.describe(name)) for name in there.where}
    return Checked(
        problems=found,
        vllm=vllm_rules.problems(
            config,
            separate,
            _algorithms(layouts, expected),
            expected.mixtures,
            expected.unquantized,
        ),
        tensors=len(sizes),
        bytes=sum(sizes.values()),
        quantized_bytes=sum(
            size for name, size in sizes.items()
            if name.rpartition(".")[0] in layouts and name.rpartition(".")[2] != "bias"
        ),
        compared=compared,
        differing=differing / elements if elements else 0.0,
        worst_steps=worst,
    )  # fmt: skip


def _distance(layout: Written, found: Mapping[str, Tensor], simulated: Tensor) -> tuple[float, int]:
    """Return the largest difference in steps of the format, and how many elements differ."""
    outputs, inputs = simulated.shape
    # Some rows at a time: unpacked, a large head takes many times its bytes. 128 is the highest
    # block, and no byte holds parts of two such rows.
    rows = max(1, CHUNK // (128 * inputs)) * 128
    largest, differing = 0.0, 0
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        values, steps = unpack(
            layout, {name: _rows(layout, name, part, start, stop) for name, part in found.items()}
        )
        gap = (values - simulated[start:stop].float()).abs() / steps.clamp(min=1e-38)
        gap = gap.nan_to_num(torch.inf)
        largest = max(largest, float(gap.max()))
        differing += int((gap > SAME).sum())
    return largest, differing


def _rows(layout: Written, name: str, part: Tensor, start: int, stop: int) -> Tensor:
    """Return what belongs to some outputs of a packed weight."""
    if part.ndim == 0:
        return part
    height = 1
    if name == "weight" and layout.layout == "int4":
        height = 2
    elif name == "weight_scale" and layout.square and layout.block:
        height = layout.block
    return part[start // height : -(-stop // height)]


def _written(name: str, settings: Mapping[str, Any]) -> Written:
    found = writes(format_from_settings(name, settings))
    if found is None:
        raise LayersenseError(f"format {name}: cannot be exported")
    return found


def _names(
    there: Files, original: Files, expected: Expected, layouts: Mapping[str, Written]
) -> Iterator[str]:
    """Yield what is missing of the original's tensors, and what is there without reason."""
    scales = {f"{module}.{suffix}" for module in layouts for suffix in SCALES}
    wanted = set(expected.parameters)
    # What was one tensor before, or none of its own.
    made = {f"{module}.weight" for module in layouts} | set(expected.changed)
    for name in original.where:
        # What else the model does not know, it never loaded.
        if name in wanted and name not in there:
            yield f"{name}: is missing"
    for name in sorted(made - set(there.where)):
        if name not in original:
            yield f"{name}: is missing"
    caches = {name for pair in map(_cache_scales, expected.cached) for name in pair}
    for name in sorted(caches - set(there.where)):
        yield f"{name}: is missing"
    split = {
        f"{mixture}.{weight}"
        for mixture in expected.mixtures
        for weight in ("gate_up_proj", "down_proj")
    }
    known = wanted | scales | caches | (set(original.where) - split)
    if unknown := [name for name in there.where if name not in known]:
        yield f"{unknown[0]}: belongs to nothing in the model ({len(unknown)} such tensors)"


def _cache_scales(attention: str) -> tuple[str, str]:
    """Return the scales of keys and values, under the names that the exporter gives them."""
    return f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"


def _scales(there: Files, module: str) -> list[str]:
    return [
        suffix for suffix in ("weight_scale", "weight_scale_2") if f"{module}.{suffix}" in there
    ]


def _module(there: Files, module: str, layout: Written, expected: Expected) -> Iterator[str]:
    """Yield what is wrong with types, shapes and presence of a packed module's tensors."""
    wanted = tensors(layout, expected.shapes[module], expected.dtype)
    for suffix, (dtype, shape) in wanted.items():
        name = f"{module}.{suffix}"
        if name not in there:
            # The norm before the layer may have taken it up.
            if suffix != "pre_quant_scale":
                yield f"{module}: its {suffix} is missing"
            continue
        real_dtype, real_shape = there.describe(name)
        # A scale of one block alone is written as a number.
        same = real_shape == shape or (real_shape == () and prod(shape) == 1)
        if not same or (suffix != "pre_quant_scale" and real_dtype != dtype):
            yield (
                f"{module}: its {suffix} is {real_dtype} {list(real_shape)}, expected {dtype} "
                f"{list(shape)}"
            )
    for suffix in SCALES:
        if suffix not in wanted and f"{module}.{suffix}" in there:
            yield f"{module}: has a {suffix}, which {layout.algo} has not"
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        if f"{module}.{suffix}" in there and suffix in wanted:
            values = there.read(f"{module}.{suffix}").float()
            if not (torch.isfinite(values).all() and (values >= 0).all()):
                yield f"{module}: its {suffix} is negative or not finite"


def _configs(
    config: Mapping[str, Any],
    separate: Mapping[str, Any],
    expected: Expected,
    layouts: Mapping[str, Written],
) -> Iterator[str]:
    """Yield where the lists of quantized and excluded modules are not the recipe's."""
    section = separate.get("quantization", {})
    algos = {layout.algo for layout in layouts.values()}
    mixed = len(_kinds(layouts)) > 1
    algorithm = "MIXED_PRECISION" if mixed else next(iter(algos))
    if section.get("quant_algo") != algorithm:
        yield (
            f"hf_quant_config.json: quant_algo is {section.get('quant_algo')}, and the recipe "
            f"makes it {algorithm}"
        )
    if section.get("kv_cache_quant_algo") != expected.kv_cache:
        yield (
            f"hf_quant_config.json: kv_cache_quant_algo is {section.get('kv_cache_quant_algo')}, "
            f"and the scheme makes it {expected.kv_cache}"
        )
    if mixed:
        listed = {
            name: layer.get("quant_algo")
            for name, layer in section.get("quantized_layers", {}).items()
        }
        meant = _algorithms(layouts, expected)
        if listed != meant:
            odd = sorted(set(listed.items()) ^ set(meant.items()))
            yield f"hf_quant_config.json: quantized_layers are not the recipe's, {odd[0][0]} first"
    else:
        patterns = section.get("exclude_modules", [])
        for module in expected.unquantized:
            if not _matches(module, patterns):
                yield f"hf_quant_config.json: does not exclude {module}, which is not quantized"
        for module in layouts:
            if _matches(module, patterns):
                yield f"hf_quant_config.json: excludes {module}, which is quantized"
    if not config.get("architectures"):
        yield "config.json: names no architecture"


def _algorithms(layouts: Mapping[str, Written], expected: Expected) -> dict[str, str]:
    """Return the algorithm of each module as the lists name them: all experts of a layer as one."""
    found = {}
    for module, layout in layouts.items():
        mixture = next((name for name in expected.mixtures if module.startswith(f"{name}.")), None)
        found[mixture or module] = layout.algo
    return found


def _kinds(layouts: Mapping[str, Written]) -> set[tuple[str, int | None]]:
    return {(layout.algo, layout.block) for layout in layouts.values()}


def _matches(name: str, patterns: list[str]) -> bool:
    """Match as ModelOpt writes the list: whole names, or a prefix and a star."""
    return any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        for pattern in patterns
    )


def _untouched(there: Files, original: Files, expected: Expected) -> Iterator[str]:
    """Yield unquantized tensors that are not those of the original checkpoint."""
    packed = {f"{module}.weight" for module in expected.quantized}
    changed = set(expected.changed) | {
        # SmoothQuant and AWQ may divide what comes before a layer.
        f"{module}.bias" for module in expected.quantized
    }  # fmt: skip
    for name in original.where:
        if name in packed or name in changed or name not in there:
            continue
        ours, theirs = there.read(name), original.read(name)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours.dtype)):
            yield f"{name}: is not the original's, and nothing in the recipe changes it"


def send(stream: BinaryIO, expected: Expected, simulated: Iterable[Mapping[str, Tensor]]) -> None:
    """Write what a check needs into its standard input: some tensors at a time."""
    _send(stream, msgspec.json.encode(expected))
    for tensors_ in simulated:
        _send(stream, save({name: tensor.contiguous() for name, tensor in tensors_.items()}))
    stream.close()


def _send(stream: BinaryIO, body: bytes) -> None:
    stream.write(len(body).to_bytes(8, "little"))
    stream.write(body)


def receive(stream: BinaryIO) -> tuple[Expected, Iterator[dict[str, Tensor]]]:
    """Read what :func:`send` wrote."""
    head = _frame(stream)
    if head is None:
        raise LayersenseError("standard input: is empty; this option is for the export job")
    return msgspec.json.decode(head, type=Expected), _tensors(stream)


def _tensors(stream: BinaryIO) -> Iterator[dict[str, Tensor]]:
    while (body := _frame(stream)) is not None:
        yield load(body)


def _frame(stream: BinaryIO) -> bytes | None:
    size = stream.read(8)
    if not size:
        return None
    body = stream.read(int.from_bytes(size, "little"))
    if len(body) != int.from_bytes(size, "little"):
        raise LayersenseError("standard input: ends in the middle; the export job was stopped")
    return body


def check_streamed(folder: Path) -> Checked:
    """Check a folder against what the export job sends on standard input."""
    expected, simulated = receive(sys.stdin.buffer)
    if expected.onnx:
        batches = ({name: tensor.numpy() for name, tensor in batch.items()} for batch in simulated)
        return check_onnx(folder / ONNX_FILE, expected, batches)
    return check_checkpoint(folder, expected, (pair for some in simulated for pair in some.items()))
