"""Formats: what they are called, how many bits they cost and what they need (no torch).

The formats that come with ModelOpt stand in ``registry.json``, which
``python -m layersense.quantization.generate_registry`` writes. A format's name is its base's with
``_ALL_LAYERS_CFG`` for ``_DEFAULT_CFG`` or ``_CFG``, and this name is the only one a scheme may
use: ModelOpt's own names (``FP8_DEFAULT_CFG``) stand for configs that leave layers out by name,
which `auto_quantize` ignores and `mtq.quantize` obeys, so a scheme that says them is told the name
of the all-layers form. Configs that differ from another only in the layers they name
(``NVFP4_MLP_ONLY_CFG``) have an all-layers form equal to the other's: its name is an alias, and
:func:`resolve_format` answers with the one format, whose ``name`` is the label in every output.
Pairs of types (``W8A8_FP8_INT8``) are formats too, see :mod:`layersense.quantization.pairs`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from layersense.config import OwnFormat
from layersense.errors import LayersenseError
from layersense.quantization.pairs import grid, is_pair, pair_hint, parse_pair

NONE = "NONE"
"""The name of "not quantized", which every layer group can take."""
REGISTRY = Path(__file__).with_name("registry.json")
LIBRARY = Path(__file__).with_name("recipe_library.json")
"""ModelOpt's YAML files that its search recipes are made of, under their paths in its library."""

Attributes = dict[str, Any]
"""Attributes of one quantizer, in JSON: ModelOpt's `QuantizerAttributeConfig` without those that
are null, (E, M) pairs as lists, the axes of `block_sizes` as strings."""

FLOATS = ((5, 2), (4, 3), (3, 2), (2, 3), (2, 1), (1, 2))
"""Exponent and mantissa bits that ModelOpt can emulate."""
INTEGER_BITS = range(2, 9)
_E8M0 = [8, 0]
_E4M3 = [4, 3]
_E2M1 = [2, 1]
# A block's scale that is not quantized itself is stored in 16 bits; E8M0 has no sign.
_BITS_OF_SCALE = {(): 16, (4, 3): 8, (8, 0): 8}


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """One ModelOpt quantization config with a name."""

    name: str
    weight: tuple[Attributes, ...]
    """Quantizers that a weight passes, one after the other; nearly always one."""
    input: tuple[Attributes, ...]
    """Quantizers that an activation passes; none if activations stay as they are."""
    algorithm: dict[str, Any] | None
    """Calibration algorithm: `method` and its parameters; None if nothing is calibrated."""
    effective_bits: float
    """Bits that a weight takes, with its share of the scales; see :func:`effective_bits`."""
    weight_format: str
    """Short label of the weight's type, such as ``FP8``."""
    act_format: str
    """The same of the activation's, ``NONE`` if activations are not quantized."""
    extensions: tuple[str, ...]
    """Kernels that it needs on a CUDA device: `int`, `fp8`, `nvfp4`, `mx`."""
    needs_cuda: bool
    """Whether it has no implementation for the CPU."""


class _Known(msgspec.Struct, kw_only=True):
    base: str
    aliases: list[str]
    weight: list[Attributes]
    input: list[Attributes]
    algorithm: dict[str, Any] | None


class Registry(msgspec.Struct, kw_only=True):
    """What is committed of ModelOpt, so that a config can be checked without importing it."""

    modelopt: str
    """The version that it was generated from."""
    attributes: list[str]
    """Attributes of a quantizer."""
    algorithms: dict[str, list[str]]
    """Calibration algorithms that `auto_quantize` accepts, with their parameters."""
    excluded_classes: list[str]
    """Classes that ModelOpt can quantize but `auto_quantize` never searches: embeddings, norms,
    pooling, activations, recurrent layers, some containers of experts."""
    formats: dict[str, _Known]
    """All-layers form → what it is made of."""
    refused: dict[str, str]
    """ModelOpt's configs that are no layer formats → the reason."""


@cache
def registry() -> Registry:
    """Return the committed registry."""
    return msgspec.json.decode(REGISTRY.read_bytes(), type=Registry)


def all_layers_name(base: str) -> str:
    """Return the name of the all-layers form of ModelOpt's config ``base``."""
    return base.removesuffix("_CFG").removesuffix("_DEFAULT") + "_ALL_LAYERS_CFG"


@cache
def known_formats() -> Mapping[str, Format]:
    """Return every format that comes with ModelOpt, by name, without the aliases."""
    return MappingProxyType(
        {
            name: _format(name, tuple(known.weight), tuple(known.input), known.algorithm)
            for name, known in registry().formats.items()
        }
    )


class UnknownFormatError(LayersenseError):
    """There is no format of this name."""

    def __init__(self, name: str, hint: str) -> None:
        """Keep the rest of the sentence, which says what may be meant."""
        super().__init__(f"there is no format `{name}`{hint}")
        self.hint = hint


def resolve_format(name: str, own: Mapping[str, OwnFormat]) -> Format:
    """Return the format called ``name`` in a config whose own formats are ``own``.

    Raises:
        LayersenseError: there is no such format, or the own format of this name is not valid.
    """
    if name in own:
        return _own_format(name, own[name])
    formats = known_formats()
    if name in formats:
        return formats[name]
    aliases, bases, refused = _aliases(), _bases(), registry().refused
    if name in aliases:
        return formats[aliases[name]]
    if is_pair(name):
        pair = parse_pair(name)
        act = pair.act_attributes
        return _format(
            pair.name, (pair.weight_attributes,), (act,) if act else (), {"method": "max"}
        )
    if name in bases:
        raise LayersenseError(
            f"format `{name}` leaves layers out by name, which ModelOpt's search ignores; "
            f"write `{bases[name]}`, and leave layers out by a scheme's `exclude`"
        )
    for config, reason in refused.items():
        if name in (config, all_layers_name(config)):
            raise LayersenseError(f"format `{name}` cannot be measured: {reason}")
    words = [*own, *formats, *aliases, *(pair.name for pair in grid())]
    hint = _longer(name, words) or _nearest(name, words) or _nearest(name.upper(), words)
    raise UnknownFormatError(name, hint + pair_hint(name))


@cache
def grid_formats() -> Mapping[str, Format]:
    """Return the pairs of types at their default granularities, by name."""
    return MappingProxyType({pair.name: resolve_format(pair.name, {}) for pair in grid()})


def format_settings(format: Format) -> dict[str, Any]:
    """Return, in JSON, all that determines what ``format`` does and costs; for digests."""
    return {
        "weight": list(format.weight),
        "input": list(format.input),
        "algorithm": format.algorithm,
        "effective_bits": format.effective_bits,
    }


def format_from_settings(name: str, settings: Mapping[str, Any]) -> Format:
    """Return the format called ``name`` whose :func:`format_settings` are ``settings``."""
    return _format(name, tuple(settings["weight"]), tuple(settings["input"]), settings["algorithm"])


def check_device(format: Format, device: str) -> None:
    """Check that ``format`` can be measured on ``device`` (``cpu`` or ``cuda``).

    Raises:
        LayersenseError: it needs CUDA.
    """
    if format.needs_cuda and device == "cpu":
        raise LayersenseError(
            f"format `{format.name}` needs CUDA, because ModelOpt has no CPU code for "
            f"{'NVFP4' if 'nvfp4' in format.extensions else 'MX'}; set `device: cuda` or take "
            "another format"
        )


def effective_bits(weight: Iterable[Mapping[str, Any]]) -> float:
    """Return the bits that one weight takes: element bits + scale bits / block length.

    Scales of a whole tensor or channel count as nothing, a block's scale that is not quantized
    itself as 16 bits. Of several quantizers in a row the narrowest is what is stored.

    Args:
        weight: attributes of the quantizers that a weight passes.
    """
    return min(_element_bits(stage) + _scale_bits(stage) for stage in weight)


def bits_of_shape(weight: Iterable[Mapping[str, Any]], shape: Sequence[int]) -> float:
    """Return the bits that one weight of a tensor takes, with the scales of all its blocks.

    That is more than :func:`effective_bits` where a block is longer than what there is: ModelOpt
    lays blocks along axes of the weight as it is, so that a convolution of 3 × 3, whose last axis
    is 3 long, has a scale for each 3 weights.

    Args:
        weight: attributes of the quantizers that a weight passes.
        shape: the weight's shape.
    """
    return min(_element_bits(stage) + _scale_bits(stage, shape) for stage in weight)


def activation_bits(format: Format) -> int:
    """Return the bits of one activation as the layer computes with it; 16 if it is left alone."""
    return min(map(_element_bits, format.input), default=16)


def block_lengths(stage: Mapping[str, Any]) -> dict[int, int | None]:
    """Return axis → length of the blocks that share a scale; None is as long as the tensor."""
    blocks = stage.get("block_sizes") or {}
    return {int(key): length for key, length in blocks.items() if _is_axis(key)}


def _element_bits(stage: Mapping[str, Any]) -> int:
    bits: int | list[int] = stage["num_bits"]
    return bits if isinstance(bits, int) else 1 + sum(bits)


def _scale_bits(stage: Mapping[str, Any], shape: Sequence[int] = ()) -> float:
    """Return the bits of a weight's share of its scale; of whole blocks without ``shape``."""
    lengths = block_lengths(stage)
    if not lengths or None in lengths.values():  # None: the block is as long as the tensor
        return 0.0
    scale = _BITS_OF_SCALE[tuple(_block(stage, "scale_bits") or ())]
    share = 1.0
    for axis, length in lengths.items():
        if length:
            share *= ceil(shape[axis] / length) / shape[axis] if shape else 1 / length
    return scale * share


def _is_axis(key: str) -> bool:
    return re.fullmatch(r"-?\d+", key) is not None


def _is_nvfp4(stage: Mapping[str, Any]) -> bool:
    return (stage["num_bits"], _block(stage, "scale_bits")) == (_E2M1, _E4M3)


def _block(stage: Mapping[str, Any], key: str) -> Any:
    return (stage.get("block_sizes") or {}).get(key)


def _label(stages: tuple[Attributes, ...]) -> str:
    if not stages:
        return NONE
    stage = min(stages, key=_element_bits)
    if _is_nvfp4(stage):
        return "NVFP4"
    mx = "MX" if _block(stage, "scale_bits") == _E8M0 else ""
    bits = stage["num_bits"]
    if isinstance(bits, int):
        return f"{mx}INT{bits}"
    usual = bits in ([4, 3], [3, 2], [2, 1])
    return f"{mx}FP{1 + sum(bits)}" + ("" if usual else f"_E{bits[0]}M{bits[1]}")


def _extension(stage: Mapping[str, Any]) -> str:
    """Return the kernel that a quantizer calls on CUDA, as in ModelOpt's `TensorQuantizer`."""
    if _is_nvfp4(stage):
        return "nvfp4"
    if _block(stage, "type") == "dynamic":
        return "mx"
    return "int" if isinstance(stage["num_bits"], int) else "fp8"


def _format(
    name: str,
    weight: tuple[Attributes, ...],
    input: tuple[Attributes, ...],
    algorithm: dict[str, Any] | None,
) -> Format:
    extensions = tuple(sorted({_extension(stage) for stage in weight + input}))
    return Format(
        name=name,
        weight=weight,
        input=input,
        algorithm=algorithm,
        effective_bits=effective_bits(weight),
        weight_format=_label(weight),
        act_format=_label(input),
        extensions=extensions,
        needs_cuda=not {"nvfp4", "mx"}.isdisjoint(extensions),
    )


@cache
def _aliases() -> Mapping[str, str]:
    """Return alias → name of the format."""
    return {
        all_layers_name(alias): name
        for name, known in registry().formats.items()
        for alias in known.aliases
    }


@cache
def _bases() -> Mapping[str, str]:
    """Return ModelOpt's name → name of the format."""
    return {
        base: name
        for name, known in registry().formats.items()
        for base in (known.base, *known.aliases)
    }


def _nearest(word: str, words: Iterable[str]) -> str:
    """Return an ending of a sentence that names the nearest of ``words``."""
    found = get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean `{found[0]}`?" if found else ""


def _longer(word: str, words: Iterable[str]) -> str:
    """Return the same of the shortest of ``words`` that only go on, as ``W8A8`` does."""
    found = [f"`{longer}`" for longer in words if longer.startswith(f"{word.upper()}_")]
    if not found:
        return ""
    *rest, last = sorted(found, key=len)[:4]
    return f"; did you mean {', '.join(rest)}{' or ' if rest else ''}{last}?"


# --- own formats -------------------------------------------------------------------------------


def _own_format(name: str, own: OwnFormat) -> Format:
    where = f"formats.{name}"
    taken = {NONE, *known_formats(), *_aliases(), *_bases(), *registry().refused}
    if name in taken or is_pair(name):
        raise LayersenseError(
            f"{where}: this name belongs to layersense or ModelOpt; call your format otherwise"
        )
    base = known_formats().get(_bases().get(own.base) or _aliases().get(own.base) or own.base)
    if base is None:
        refused = registry().refused
        if own.base in refused:
            raise LayersenseError(
                f"{where}.base: `{own.base}` cannot be measured: {refused[own.base]}"
            )
        raise LayersenseError(
            f"{where}.base: there is no ModelOpt format `{own.base}`"
            f"{_nearest(own.base, [*_bases(), *known_formats(), *_aliases()])}"
        )
    weight = _changed(f"{where}.weight", base.weight, own.weight)
    if not weight:
        raise LayersenseError(
            f"{where}.weight: the weight stays unquantized, so the format saves nothing; "
            "leave `enable: false` out"
        )
    return _format(
        name,
        weight,
        _changed(f"{where}.input", base.input, own.input),
        _algorithm(where, own.algorithm, base.algorithm),
    )


def _changed(
    where: str, stages: tuple[Attributes, ...], changes: Mapping[str, Any]
) -> tuple[Attributes, ...]:
    if not changes:
        return stages
    if len(stages) > 1:
        raise LayersenseError(
            f"{where}: the base passes it through {len(stages)} quantizers in a row, which cannot "
            "be changed; take another base"
        )
    merged = dict(stages[0]) if stages else {}
    for key, value in changes.items():
        if key == "effective_bits":
            raise LayersenseError(
                f"{where}.{key}: it follows from `num_bits` and `block_sizes`; leave it out"
            )
        if key not in registry().attributes:
            raise LayersenseError(
                f"{where}.{key}: ModelOpt's quantizers have no such attribute"
                f"{_nearest(key, registry().attributes)}"
            )
        merged[key] = _attribute(f"{where}.{key}", key, value)
    merged = {key: value for key, value in merged.items() if value is not None}
    if not merged.pop("enable", True):
        return ()
    if "num_bits" not in merged:
        raise LayersenseError(
            f"{where}.num_bits: is missing, as the base does not quantize here; "
            "give a number of bits or a pair such as [4, 3]"
        )
    _check_stage(where, merged)
    return (merged,)


def _attribute(where: str, key: str, value: Any) -> Any:
    if value is None:
        return None
    if key == "enable" and not isinstance(value, bool):
        raise LayersenseError(f"{where}: expected true or false, not `{value}`")
    if key == "num_bits":
        return _bits(where, value)
    if key == "block_sizes":
        return _blocks(where, value)
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise LayersenseError(
            f"{where}: expected what JSON can hold (numbers, words, lists, mappings); {error}"
        ) from error


def _bits(where: str, value: Any) -> int | list[int]:
    """Read a number of bits, a pair [E, M], or the pair as ModelOpt's recipes write it, `e4m3`."""
    if isinstance(value, int) and not isinstance(value, bool) and value in INTEGER_BITS:
        return value
    pair = value
    if isinstance(value, str) and (match := re.fullmatch(r"[eE](\d)[mM](\d)", value)):
        pair = [int(match[1]), int(match[2])]
    if isinstance(pair, list | tuple) and tuple(pair) in FLOATS:
        return list(pair)
    floats = ", ".join(f"[{e}, {m}]" for e, m in FLOATS)
    raise LayersenseError(
        f"{where}: `{value}` is no bit width; expected an integer from {INTEGER_BITS.start} to "
        f"{INTEGER_BITS.stop - 1}, or exponent and mantissa bits, one of {floats}"
    )


def _blocks(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise LayersenseError(
            f"{where}: expected a mapping such as {{-1: 128, type: static}}, not `{value}`"
        )
    blocks = {}
    for key, item in value.items():
        if _is_axis(str(key)):
            whole = isinstance(item, int) and not isinstance(item, bool) and item > 0
            valid = item is None or whole
            expected = "a positive number of elements, or null for all of them"
        elif key == "type":
            valid, expected = item in ("static", "dynamic"), "`static` or `dynamic`"
        elif key == "scale_bits":
            item = _scale(item)
            valid, expected = item in (_E4M3, _E8M0), "`[4, 3]` or `[8, 0]`"
        elif key == "four_over_six":
            valid, expected = isinstance(item, bool | int), "true or false"
        else:
            raise LayersenseError(
                f"{where}.{key}: expected an axis such as -1, `type`, `scale_bits` or "
                f"`four_over_six`{_nearest(str(key), ['type', 'scale_bits', 'four_over_six'])}"
            )
        if not valid:
            raise LayersenseError(f"{where}.{key}: expected {expected}, not `{value[key]}`")
        blocks[str(key)] = item
    if not any(_is_axis(key) for key in blocks):
        raise LayersenseError(f"{where}: names no axis; add a block length such as `-1: 128`")
    return blocks


def _scale(value: Any) -> Any:
    if isinstance(value, str) and (match := re.fullmatch(r"[eE](\d)[mM](\d)", value)):
        return [int(match[1]), int(match[2])]
    return list(value) if isinstance(value, list | tuple) else value


def _check_stage(where: str, stage: Mapping[str, Any]) -> None:
    blocks, bits = stage.get("block_sizes"), stage["num_bits"]
    if blocks and "axis" in stage:
        raise LayersenseError(
            f"{where}: `axis` and `block_sizes` exclude each other; set one of them to null"
        )
    dynamic = _block(stage, "type") == "dynamic"
    if dynamic and "scale_bits" not in (blocks or {}):
        raise LayersenseError(
            f"{where}.block_sizes: dynamic blocks need `scale_bits`; add `scale_bits: [8, 0]` (MX) "
            "or `[4, 3]` (NVFP4)"
        )
    if isinstance(bits, list) and bits != _E4M3 and not dynamic and not _is_nvfp4(stage):
        raise LayersenseError(
            f"{where}: `num_bits: {bits}` works only with dynamic blocks; add `block_sizes` with "
            "`type: dynamic` and `scale_bits`"
        )


def _algorithm(
    where: str, own: str | Mapping[str, Any] | None, base: dict[str, Any] | None
) -> dict[str, Any] | None:
    if own is None:
        return base
    algorithm = {"method": own} if isinstance(own, str) else dict(own)
    method, known = algorithm.get("method"), registry().algorithms
    if not isinstance(method, str) or method not in known:
        raise LayersenseError(
            f"{where}.algorithm: `{method}` is none that ModelOpt's search accepts "
            f"({', '.join(known)}){_nearest(str(method), known)}"
        )
    for key in algorithm:
        if key not in ("method", *known[method]):
            raise LayersenseError(
                f"{where}.algorithm.{key}: `{method}` has no such parameter"
                f"{_nearest(key, known[method])}"
            )
    return algorithm
