"""Runtimes that a recipe is meant for, and what each of them can load (no torch).

:data:`TARGETS` is the one table of it; every line names its source. What it says becomes
constraints of a scheme's choice, see :class:`Deployment`: formats that a runtime does not read are
refused when the config is checked, and a recipe that it could not load is never chosen.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layersense.quantization.formats import Format, format_settings, known_formats
from layersense.quantization.kv_cache import KV_CACHES
from layersense.quantization.layers import is_router

VLLM = (
    "https://github.com/vllm-project/vllm, commit 00155cdecca722d98e34234c3d172725b7720b7d: "
    "vllm/model_executor/layers/quantization/modelopt.py"
)
TENSORRT_LLM = "https://github.com/NVIDIA/TensorRT-LLM: tensorrt_llm/_torch"
TENSORRT = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "work-with-quantized-types.html"
)
MODELOPT = "ModelOpt 0.47: modelopt_recipes/configs/auto_quantize/units/base_disabled_layers.yaml"
SUPPORT = "https://nvidia.github.io/Model-Optimizer/guides/0_support_matrix.html"


@dataclass(frozen=True)
class Together:
    """Formats that may stand together in one checkpoint, by name."""

    formats: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Fused:
    """Layers that the runtime loads as one, so that they take one format.

    ``layers`` are last parts of module names; those that share all parts before are one layer.
    """

    layers: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Restricted:
    """Layers that take fewer formats than others.

    Attributes:
        what: the layers, in words.
        formats: those that they may take.
        source: where this is from.
        types: a layer is one of them if its class's name starts with one of these,
        words: or its own name has one of these in it,
        routers: or it chooses the experts of a mixture,
        head: or it is the output head.
    """

    what: str
    formats: tuple[str, ...]
    source: str
    types: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    routers: bool = False
    head: bool = False

    def holds(self, name: str, module_type: str) -> bool:
        """Return whether a module is one of these layers."""
        return (
            (bool(self.types) and module_type.startswith(self.types))
            or any(word in name for word in self.words)
            or (self.routers and is_router([name]))
            or (self.head and name.rpartition(".")[2] in ("lm_head", "output_layer", "embed_out"))
        )


@dataclass(frozen=True)
class Cached:
    """Formats of the key-value cache that it can load."""

    formats: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Runtime:
    """What one runtime can load.

    A recipe is loadable if all its formats stand in one entry of ``together``, fused layers agree,
    no layer takes a format that a restriction withholds from it, and the key-value cache is one of
    ``caches`` or stays as it is.
    """

    title: str
    together: tuple[Together, ...]
    fused: tuple[Fused, ...] = ()
    restricted: tuple[Restricted, ...] = ()
    caches: tuple[Cached, ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of all formats that it reads."""
        return tuple(dict.fromkeys(name for entry in self.together for name in entry.formats))


FP8 = "FP8_ALL_LAYERS_CFG"
FP8_PER_CHANNEL = "FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG"
FP8_BLOCKS = "FP8_2D_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"
NVFP4 = "NVFP4_ALL_LAYERS_CFG"
NVFP4_AWQ = "NVFP4_AWQ_LITE_ALL_LAYERS_CFG"
W4A16_NVFP4 = "W4A16_NVFP4_ALL_LAYERS_CFG"
MXFP8 = "MXFP8_ALL_LAYERS_CFG"
INT8 = "INT8_ALL_LAYERS_CFG"
INT8_SMOOTH = "INT8_SMOOTHQUANT_ALL_LAYERS_CFG"
INT8_WEIGHTS = "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG"
INT4_AWQ = "INT4_AWQ_ALL_LAYERS_CFG"
INT4_BLOCKS = "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"
W4A8_AWQ = "W4A8_AWQ_BETA_ALL_LAYERS_CFG"

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_CACHES = tuple(KV_CACHES)
TOWERS = ("visual", "vision_tower", "vision_model")
"""Names by which runtimes know a vision tower."""

TARGETS: Mapping[str, Runtime] = {
    "vllm": Runtime(
        title="vLLM",
        together=(
            # A mix is `MIXED_PRECISION`; a layer of an algorithm that it does not know would be
            # taken for unquantized.
            Together(
                (FP8, NVFP4, W4A16_NVFP4),
                f"{VLLM}, ModelOptMixedPrecisionConfig.get_quant_method",
            ),
            Together((MXFP8,), f"{VLLM}, QUANT_ALGOS"),
            Together((FP8_PER_CHANNEL,), f"{VLLM}, QUANT_ALGOS"),
            Together((FP8_BLOCKS,), f"{VLLM}, QUANT_ALGOS"),
        ),
        fused=(
            Fused(_QKV, f"{VLLM}, _resolve_quant_algo; packed_modules_mapping of its Llama, Qwen"),
            Fused(_GATE_UP, f"{VLLM}, _resolve_quant_algo; packed_modules_mapping, the same"),
            Fused(
                ("query", "key", "value"),
                "the same: packed_modules_mapping of vllm/model_executor/models/bert.py",
            ),
            Fused(
                ("w1", "w3"),
                "the same: gate_up_proj in vllm/model_executor/models/internlm2.py",
            ),
            Fused(
                ("q_a_proj", "kv_a_proj_with_mqa"),
                "the same: fused_qkv_a_proj in vllm/model_executor/models/deepseek_v2.py",
            ),
            Fused(
                ("in_proj_qkv", "in_proj_z"),
                "ModelOpt 0.47: quant_grouping_rules in torch/quantization/algorithms.py",
            ),
            Fused(("in_proj_a", "in_proj_b"), "the same"),
        ),
        restricted=(
            Restricted(
                "convolutions",
                (),
                f"{VLLM}, get_quant_method: linear layers, experts and the head alone",
                types=("Conv",),
            ),
            Restricted(
                "vision towers",
                (),
                f"{VLLM}, get_quant_method: unquantized by name, except in a mix",
                words=TOWERS,
            ),
            Restricted(
                "routers",
                (),
                "built without a quant_config in vLLM's mixtures (models/mixtral.py, "
                "models/qwen2_moe.py)",
                routers=True,
            ),
        ),
        caches=(
            # It knows NVFP4, but not as ModelOpt writes it into config.json.
            Cached(("fp8", "fp8_cast"), f"{VLLM}, ModelOptQuantConfigBase.from_config"),
        ),
    ),
    "tensorrt-llm": Runtime(
        title="TensorRT-LLM",
        together=(
            # `MIXED_PRECISION` gives each linear layer its own algorithm.
            Together(
                (FP8, NVFP4, INT4_AWQ, W4A8_AWQ, INT8_WEIGHTS),
                f"{TENSORRT_LLM}/modules/linear.py, get_quant_method; "
                "model_config.py, _build_modelopt_quant_config",
            ),
            Together((NVFP4_AWQ,), SUPPORT),
            Together((INT8_SMOOTH,), SUPPORT),
            Together((FP8_PER_CHANNEL,), f"{TENSORRT_LLM}/modules/linear.py, get_quant_method"),
        ),
        fused=(
            Fused(_QKV, f"{TENSORRT_LLM}/modules/linear.py, WeightMode.FUSED_QKV_LINEAR"),
            Fused(_GATE_UP, f"{TENSORRT_LLM}/modules/linear.py, WeightMode.FUSED_GATE_UP_LINEAR"),
        ),
        restricted=(
            Restricted(
                "convolutions",
                (),
                f"{TENSORRT_LLM}/modules/linear.py: linear layers alone",
                types=("Conv",),
            ),
            Restricted("vision towers", (), MODELOPT, words=TOWERS),
            Restricted("routers", (), MODELOPT, routers=True),
            Restricted(
                "the output head",
                (),
                f"{TENSORRT_LLM}/modules/embedding.py, LMHead: built without a quant_config",
                head=True,
            ),
        ),
        caches=(Cached(_CACHES, f"{TENSORRT_LLM}/model_config.py, kv_cache_quant_algo"),),
    ),
    "tensorrt": Runtime(
        title="TensorRT",
        together=(
            # Each layer has Q/DQ nodes of its own.
            Together((FP8, INT8, INT8_SMOOTH, INT4_BLOCKS, INT4_AWQ, NVFP4, MXFP8), TENSORRT),
        ),
        restricted=(
            Restricted(
                "convolutions",
                (FP8, INT8),
                f"{TENSORRT}: 4-bit types and blocks are for matrix products alone",
                types=("Conv",),
            ),
        ),
    ),
}
"""Target → what it can load; ``generic`` is not in it and restricts nothing."""


@dataclass(frozen=True)
class Deployment:
    """What a target means for the groups and formats of one scheme.

    Attributes:
        together: sets of the scheme's formats, one of which all formats of a recipe must come
            from; None: any may stand together.
        fused: handles that must take one format, at least two each.
        barred: handle → format → why the group may not take it.
    """

    together: list[list[str]] | None
    fused: list[list[str]]
    barred: dict[str, dict[str, str]]


def reads(target: str, format: Format) -> str | None:
    """Return the name under which a target knows a format; None if it cannot read it.

    A format counts by what it does: ``W8A8_FP8_FP8`` is ``FP8_ALL_LAYERS_CFG``.
    """
    return _known(format, TARGETS[target].formats)


def runtimes(format: Format) -> tuple[str, ...]:
    """Return what loads a model in ``format``; nothing where it can be simulated only."""
    return tuple(
        runtime.title for name, runtime in TARGETS.items() if reads(name, format) is not None
    )


def deployment(
    target: str,
    formats: Mapping[str, Format],
    modules: Mapping[str, Sequence[str]],
    types: Mapping[str, str],
) -> Deployment:
    """Return what a target means for the groups of a scheme.

    Args:
        target: name of the target.
        formats: the scheme's formats by name.
        modules: handle → names of the group's modules.
        types: module → class name.
    """
    if target == "generic":
        return Deployment(None, [], {})
    runtime = TARGETS[target]
    known = {name: reads(target, format) for name, format in formats.items()}
    sets = [
        [name for name in formats if known[name] in entry.formats] for entry in runtime.together
    ]
    barred: dict[str, dict[str, str]] = {}
    for handle, names in modules.items():
        for name, meaning in known.items():
            if meaning is None:
                why = f"{runtime.title} does not read {name}"
            else:
                rule = next(
                    (
                        rule
                        for rule in runtime.restricted
                        if meaning not in rule.formats
                        and any(rule.holds(module, types.get(module, "")) for module in names)
                    ),
                    None,
                )
                if rule is None:
                    continue
                why = f"{runtime.title} does not take {rule.what} in this format"
                if not rule.formats:
                    why = f"{runtime.title} does not quantize {rule.what}"
            barred.setdefault(handle, {})[name] = why
    return Deployment([found for found in sets if found] or [[]], _fused(runtime, modules), barred)


def _fused(runtime: Runtime, modules: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the handles whose layers the runtime loads as one."""
    layers: dict[tuple[int, str], dict[str, None]] = {}
    for handle, names in modules.items():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            for number, rule in enumerate(runtime.fused):
                if leaf in rule.layers:
                    layers.setdefault((number, _expert(parent)), {})[handle] = None
            if runtime.fused and _expert(parent) != parent:
                layers.setdefault((-1, _expert(parent)), {})[handle] = None
    # Layers that share a group are tied by it. Each handle knows the list that it stands in.
    place: dict[str, list[str]] = {handle: [handle] for handle in modules}
    for handles in layers.values():
        first, *others = handles
        for other in others:
            smaller, larger = sorted((place[first], place[other]), key=len)
            if smaller is not larger:
                larger += smaller
                place.update(dict.fromkeys(smaller, larger))
    order = {handle: index for index, handle in enumerate(modules)}
    classes = {id(handles): handles for handles in place.values()}
    found = [sorted(entry, key=order.__getitem__) for entry in classes.values() if len(entry) > 1]
    return sorted(found, key=lambda entry: order[entry[0]])


def _expert(parent: str) -> str:
    """Return the name of a mixture's experts for that of one expert: they are loaded as one."""
    return re.sub(r"(\.experts)\.\d+(\..*)?$", r"\1", parent)


def _known(format: Format, names: Sequence[str]) -> str | None:
    settings, known = format_settings(format), known_formats()
    return next((name for name in names if format_settings(known[name]) == settings), None)
