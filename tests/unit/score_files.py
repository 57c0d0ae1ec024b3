"""Synthetic score files, so that what comes after scoring is tested without a model.

``make_scores()`` is a small vision-language model under FP8, INT8 and INT4; ``group()`` and
``format_scores()`` build others. All numbers are functions of the arguments alone.
"""

from collections.abc import Mapping, Sequence

from layersense.quantization.formats import format_settings, known_formats
from layersense.quantization.layers import describe_layer
from layersense.scoring.scores import (
    Batches,
    Dataset,
    Fit,
    FormatScores,
    Group,
    GroupScore,
    Layer,
    Model,
    Scores,
)

TOKENS = [10, 12, 8, 10]
"""Supervised tokens of the four batches; 40 in all."""
SPREAD = [0.9, 1.1, 1.0, 1.0]
"""How a group's score per token differs between batches; its mean by tokens is 1.005."""

FORMATS = {
    "FP8_ALL_LAYERS_CFG": (8.0, "FP8", "FP8"),
    "INT8_ALL_LAYERS_CFG": (8.0, "INT8", "INT8"),
    "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG": (4.125, "INT4/128", "16"),
}

MODULES: dict[str, tuple[list[str], int]] = {
    "model.visual.patch_embed.proj": (["model.visual.patch_embed.proj"], 37_632),
    "model.visual.blocks.0.attn.qkv": (["model.visual.blocks.0.attn.qkv"], 12_288),
    "model.visual.blocks.0.mlp.down_proj": (["model.visual.blocks.0.mlp.down_proj"], 16_384),
    "model.language_model.layers.0.self_attn.q_proj": (
        [f"model.language_model.layers.0.self_attn.{name}_proj" for name in "qkv"],
        24_576,
    ),
    "model.language_model.layers.0.mlp.gate_proj": (
        [f"model.language_model.layers.0.mlp.{name}_proj" for name in ("gate", "up")],
        65_536,
    ),
    "model.language_model.layers.0.mlp.down_proj": (
        ["model.language_model.layers.0.mlp.down_proj"],
        32_768,
    ),
    "lm_head": (["lm_head"], 131_072),
}
"""First module of each group → its modules and the elements of all their weights."""

DAMAGE = {
    "model.visual.patch_embed.proj": 0.5,
    "model.visual.blocks.0.attn.qkv": 0.02,
    "model.visual.blocks.0.mlp.down_proj": 0.04,
    "model.language_model.layers.0.self_attn.q_proj": 0.1,
    "model.language_model.layers.0.mlp.gate_proj": 0.2,
    "model.language_model.layers.0.mlp.down_proj": 1.0,
    "lm_head": 2.0,
}
"""Score per token under FP8; INT8 does twice this and INT4 eight times."""

FACTORS = {
    "FP8_ALL_LAYERS_CFG": 1.0,
    "INT8_ALL_LAYERS_CFG": 2.0,
    "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG": 8.0,
}


def make_group(modules: Sequence[str], n_weights: int) -> Group:
    """A layer group, named and placed as the engine would."""
    place = describe_layer(modules)
    return Group(
        module_names=list(modules),
        n_weights=n_weights,
        subsystem=place.subsystem,
        block=place.block,
        kind=place.kind,
    )


def make_format(
    name: str, groups: Mapping[str, GroupScore], tokens: Sequence[int] = TOKENS
) -> FormatScores:
    """One format's entry."""
    bits, weight, act = FORMATS[name]
    fp8 = known_formats()["FP8_ALL_LAYERS_CFG"]  # stands for those that a test makes up
    return FormatScores(
        digest=f"digest of {name}",
        settings={
            "dtype": "float32",
            "sampling": {"batch_size": 4, "seed": 0},
            "format": format_settings(known_formats().get(name, fp8)),
        },
        effective_bits=bits,
        weight_format=weight,
        act_format=act,
        kernel="native",
        batches=Batches(
            tokens=list(tokens), samples=[4] * len(tokens), padding_share=0.1, truncated=0
        ),
        groups=dict(groups),
        environment={
            "layersense": "0.1.0",
            "torch": "2.14.1",
            "modelopt": "0.47.0",
            "transformers": "5.14.1",
            "python": "3.11.2",
            "cpu": "x86_64",
            "host": "laptop",
        },
        seconds={"load": 1.5, "calibrate": 3.25, "score": 9.75},
        fit=Fit(micro_batch=4, checkpointing=False, formats=1),
        peak_memory_bytes=1_500_000_000,
        back_offs=[],
        warnings=[],
    )


def make_scores(
    modules: Mapping[str, tuple[list[str], int]] = MODULES,
    damage: Mapping[str, float] = DAMAGE,
    formats: Sequence[str] = tuple(FORMATS),
    run: str = "demo",
) -> Scores:
    """A score file in which everything was reached and nothing went wrong."""
    groups = {
        f"{name}.quant_recipe": make_group(members, n_weights)
        for name, (members, n_weights) in modules.items()
    }
    layers = {
        member: Layer(
            module_type="Linear",
            n_weights=n_weights // len(members),
            group=f"{name}.quant_recipe",
        )
        for name, (members, n_weights) in modules.items()
        for member in members
    }
    return Scores(
        run=run,
        method="gradient",
        engine="modelopt",
        model=Model(
            name="tiny-vlm",
            id="./tiny-vlm",
            revision=None,
            digest="m" * 64,
            task="image-text-to-text",
            architecture="Qwen2_5_VLForConditionalGeneration",
            n_parameters=400_000,
            dtype="float32",
            trust_remote_code=False,
        ),
        dataset=Dataset(
            name="sample",
            source="sample",
            digest="d" * 64,
            modality="image_text",
            unit="caption",
            calibration_samples=16,
            score_samples=16,
        ),
        layers=layers,
        groups=groups,
        formats={
            format: make_format(
                format,
                {
                    f"{name}.quant_recipe": GroupScore(
                        reached="scored",
                        batch_scores=[
                            value * FACTORS[format] * tokens * spread
                            for tokens, spread in zip(TOKENS, SPREAD, strict=True)
                        ],
                        cost=modules[name][1] * FORMATS[format][0] / 16,
                    )
                    for name, value in damage.items()
                },
            )
            for format in formats
        },
    )


def set_reached(scores: Scores, prefix: str, reached: str) -> None:
    """Let the loss miss every group whose handle starts with ``prefix``."""
    for entry in scores.formats.values():
        for handle, group in entry.groups.items():
            if handle.startswith(prefix):
                group.reached = reached  # type: ignore[assignment]
                group.batch_scores = [0.0] * len(group.batch_scores)
