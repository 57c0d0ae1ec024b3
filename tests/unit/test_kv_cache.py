"""Formats of the key-value cache: ModelOpt's own, on language models and decoders alone."""

import pytest

from layersense.errors import LayersenseError
from layersense.quantization.kv_cache import (
    KV_CACHES,
    cache_config,
    cached_attention,
)
from layersense.recipes.quant_config import make_cache


@pytest.mark.parametrize("name", KV_CACHES)
def test_attributes_are_those_of_modelopts_presets(name):
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt.recipe import load_config

    from layersense.quantization.modelopt_formats import modelopt_attributes

    (entry,) = load_config(f"configs/ptq/presets/kv/{name}").quant_cfg
    ours = type(entry.cfg)(**modelopt_attributes(KV_CACHES[name]))
    assert ours.model_dump(exclude={"effective_bits"}) == entry.cfg.model_dump(
        exclude={"effective_bits"}
    )
    assert entry.quantizer_name == "*[kv]_bmm_quantizer"


def test_attention_that_keeps_keys_and_values():
    assert cached_attention(
        [
            "model.visual.blocks.0.attn.qkv",
            "model.language_model.layers.0.self_attn.q_proj",
            "model.language_model.layers.0.self_attn.v_proj",
            "model.language_model.layers.0.mlp.up_proj",
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.1.EncDecAttention.k",
            "lm_head",
        ]
    ) == [
        "model.language_model.layers.0.self_attn",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ]


def test_a_cache_names_its_quantizers_in_full():
    config = cache_config("fp8_cast", ["h.1.attn", "m[0].attn"])
    assert [entry["quantizer_name"] for entry in config["quant_cfg"]] == [
        "*",
        "h.1.attn.k_bmm_quantizer",
        "h.1.attn.v_bmm_quantizer",
        "m[[]0].attn.k_bmm_quantizer",
        "m[[]0].attn.v_bmm_quantizer",
    ]
    assert config["algorithm"] is None  # the range of the type is the scale
    assert cache_config("fp8", [])["algorithm"] == {"method": "max"}


def test_a_model_without_a_cache_is_told():
    assert make_cache("none", []) is None
    with pytest.raises(LayersenseError, match="leave kv_cache of the scheme out"):
        make_cache("fp8", ["features.0.conv"])
