"""Pairs of a weight's and an activation's type, by name (no torch).

``W8A8_FP8_INT8`` is FP8 weights with INT8 activations, ``W4A16_INT4`` INT4 weights with activations
as they are. The name says bits, then types; a granularity other than the default follows:
``W8A8_INT8_INT8_WTENSOR_ATOKEN``.
"""

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

from layersense.errors import LayersenseError

TYPES: dict[str, tuple[int, int | list[int]]] = {
    "FP4": (4, [2, 1]),
    "FP8": (8, [4, 3]),
    "INT4": (4, 4),
    "INT8": (8, 8),
}
"""Type → its bits, and ModelOpt's ``num_bits``."""
FP4_BLOCK = {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}
"""FP4 is NVFP4: blocks of 16 with an FP8 scale. ModelOpt emulates it in no other way."""
WEIGHT_GRANULARITIES = ("TENSOR", "CHANNEL", "GROUP64", "GROUP128")
ACT_GRANULARITIES = ("TENSOR", "TOKEN")
WEIGHT_DEFAULTS = {"FP4": "BLOCK16", "FP8": "TENSOR", "INT4": "GROUP128", "INT8": "CHANNEL"}
"""ModelOpt's own choice for each type."""
ACT_DEFAULTS = {"FP4": "BLOCK16", "FP8": "TENSOR", "INT4": "TOKEN", "INT8": "TENSOR"}
"""Static for a whole tensor, as ModelOpt has it; 4 bits need a scale for each token."""

_NAME = re.compile(
    r"W(?P<w_bits>\d+)A(?P<a_bits>\d+)_(?P<weight>[A-Z]+\d+)(?:_(?P<act>(?:FP|INT)\d+))?"
    r"(?:_W(?P<w_by>[A-Z]+\d*))?(?:_A(?P<a_by>[A-Z]+\d*))?"
)


_BEGINNING = re.compile(r"W\d+A\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """One pair; see the module."""

    weight: str
    """Type of the weights, a key of :data:`TYPES`."""
    act: str | None
    """Type of the activations; None leaves them as they are."""
    weight_by: str
    """What shares a scale: ``TENSOR``, ``CHANNEL``, ``GROUP64``, ``GROUP128`` or ``BLOCK16``."""
    act_by: str | None
    """``TENSOR`` (static), ``TOKEN`` or ``BLOCK16`` (both found on the fly); None without type."""

    @property
    def name(self) -> str:
        """The pair's one name: granularities only where they are not the default."""
        a_bits = TYPES[self.act][0] if self.act else 16
        parts = [f"W{TYPES[self.weight][0]}A{a_bits}", self.weight]
        if self.act:
            parts.append(self.act)
        if self.weight_by != WEIGHT_DEFAULTS[self.weight]:
            parts.append(f"W{self.weight_by}")
        if self.act and self.act_by != ACT_DEFAULTS[self.act]:
            parts.append(f"A{self.act_by}")
        return "_".join(parts)

    @property
    def weight_attributes(self) -> dict[str, Any]:
        """Attributes of the weight's quantizer."""
        attributes: dict[str, Any] = {"num_bits": TYPES[self.weight][1]}
        if self.weight == "FP4":
            return {**attributes, "block_sizes": dict(FP4_BLOCK)}
        if self.weight_by == "CHANNEL":
            return {**attributes, "axis": 0}
        if self.weight_by.startswith("GROUP"):
            length = int(self.weight_by.removeprefix("GROUP"))
            return {**attributes, "block_sizes": {"-1": length, "type": "static"}}
        return attributes

    @property
    def act_attributes(self) -> dict[str, Any] | None:
        """Attributes of the activation's quantizer; None leaves activations as they are."""
        if self.act is None:
            return None
        attributes: dict[str, Any] = {"num_bits": TYPES[self.act][1]}
        if self.act == "FP4":
            return {**attributes, "block_sizes": dict(FP4_BLOCK)}
        if self.act_by == "TOKEN":
            return {**attributes, "type": "dynamic", "block_sizes": {"-1": None}}
        return attributes


def is_pair(name: str) -> bool:
    """Return whether a format's name is written as a pair's, valid or not."""
    return _NAME.fullmatch(name) is not None


def pair_hint(name: str) -> str:
    """Return how pairs are written, as a sentence to append, if ``name`` begins like one."""
    if not _BEGINNING.match(name):
        return ""
    weights, acts = (
        _or(f"`_{letter}{option}`" for option in options)
        for letter, options in (("W", WEIGHT_GRANULARITIES), ("A", ACT_GRANULARITIES))
    )
    return (
        " (a pair is its bits, its types in capitals, and, where it is not the default, what "
        f"shares a scale: {weights} for weights, then {acts} for activations)"
    )


def parse_pair(name: str) -> Pair:
    """Return the pair that ``name`` says.

    Raises:
        LayersenseError: bits and types contradict each other, or there is no such type or
            granularity.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise LayersenseError(
            f"format `{name}`: expected a pair such as `W8A8_FP8_INT8` or `W4A16_INT4`"
        )
    weight, act, w_by, a_by = (match[key] for key in ("weight", "act", "w_by", "a_by"))
    for kind, found in (("weight", weight), ("activation", act)):
        if found is not None and found not in TYPES:
            raise LayersenseError(
                f"format `{name}`: ModelOpt has no {kind} type {found}; take {_or(TYPES)}"
            )
    if act is None and a_by is not None:
        raise LayersenseError(
            f"format `{name}`: activations of 16 bits have no scale; leave `_A{a_by}` out"
        )
    weight_by = w_by or WEIGHT_DEFAULTS[weight]
    act_by = a_by or (ACT_DEFAULTS[act] if act else None)
    _check_granularity(name, "weights", weight, weight_by, WEIGHT_GRANULARITIES)
    if act and act_by:
        _check_granularity(name, "activations", act, act_by, ACT_GRANULARITIES)
    pair = Pair(weight, act, weight_by, act_by)
    bits = (int(match["w_bits"]), int(match["a_bits"]))
    if bits != (TYPES[weight][0], TYPES[act][0] if act else 16):
        raise LayersenseError(
            f"format `{name}`: its bits are not those of its types; did you mean `{pair.name}`?"
        )
    return pair


def grid() -> list[Pair]:
    """Return every pair of types at its default granularities, 16-bit activations first."""
    acts = (None, "FP8", "INT8", "FP4", "INT4")
    return [
        Pair(weight, act, WEIGHT_DEFAULTS[weight], ACT_DEFAULTS[act] if act else None)
        for weight, act in product(("FP8", "INT8", "FP4", "INT4"), acts)
    ]


def _check_granularity(
    name: str, what: str, kind: str, granularity: str, known: tuple[str, ...]
) -> None:
    if kind == "FP4":
        if granularity != "BLOCK16":
            raise LayersenseError(
                f"format `{name}`: ModelOpt emulates FP4 {what} only in blocks of 16 with an FP8 "
                f"scale; leave `{granularity}` out"
            )
    elif granularity not in known:
        raise LayersenseError(
            f"format `{name}`: {what} have no granularity {granularity}; take {_or(known)}"
        )


def _or(words: Any) -> str:
    *rest, last = words
    return f"{', '.join(rest)} or {last}"
