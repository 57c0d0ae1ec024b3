"""Formats of the key-value cache: which quantizers, and on which layers (no torch).

A cache is quantized uniformly, after the layers have their formats: keys and values on their way
into attention, by two quantizers that ModelOpt puts into attention modules (`k_bmm_quantizer`,
`v_bmm_quantizer`). No weight changes and no bit of the budget is spent.
"""

import glob
from collections.abc import Iterable, Mapping
from typing import Any

from layersense.quantization.formats import Attributes
from layersense.quantization.layers import describe_layer

CACHE_TASKS = ("causal-lm", "image-text-to-text", "seq2seq-lm")
"""Tasks whose models keep keys and values between tokens."""
QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")

_FP8: Attributes = {"num_bits": [4, 3]}
_NVFP4: Attributes = {
    "num_bits": [2, 1],
    "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]},
}
KV_CACHES: Mapping[str, Attributes] = {
    "fp8": _FP8,
    "fp8_cast": {**_FP8, "use_constant_amax": True},
    "nvfp4": _NVFP4,
    "nvfp4_cast": {**_NVFP4, "use_constant_amax": True},
}
"""Name → attributes of both quantizers, those of ModelOpt's
``modelopt_recipes/configs/ptq/presets/kv``; a test compares them. ``_cast`` takes the type's own
range for the scale and needs no calibration."""


def needs_cuda(name: str) -> bool:
    """Return whether a cache's format has no implementation for the CPU."""
    return name.startswith("nvfp4")


def cached_attention(layers: Iterable[str]) -> list[str]:
    """Return the attention modules whose keys and values are cached, by the names of all layers.

    They are what holds query, key or value projections in a language model or a decoder: a vision
    tower and an encoder see all of their input at once and keep nothing.
    """
    found: dict[str, None] = {}
    for name in layers:
        layer = describe_layer([name])
        if layer.kind == "qkv" and layer.subsystem in ("language", "decoder"):
            found[name.rpartition(".")[0]] = None
    return list(found)


def cache_config(name: str, attention: Iterable[str]) -> dict[str, Any]:
    """Return a config of `mtq.quantize` that turns on the cache's quantizers and nothing else."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for module in attention:
        entries += [
            {"quantizer_name": f"{glob.escape(module)}.{quantizer}", "cfg": KV_CACHES[name]}
            for quantizer in QUANTIZERS
        ]
    algorithm = None if name.endswith("_cast") else {"method": "max"}
    return {"quant_cfg": entries, "algorithm": algorithm}
