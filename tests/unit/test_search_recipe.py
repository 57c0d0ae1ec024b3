"""ModelOpt's search recipes as schemes: against its loader, and by hand."""

import json
import re

import pytest
import score_files as sf

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.schema import plain_name
from layersense.quantization.formats import LIBRARY
from layersense.recipes.decide import build_manifest
from layersense.recipes.search_recipe import library, read_recipe, scheme_of
from layersense.validation import load_config

FP8, INT8, INT4 = sf.FORMATS
NVFP4 = "NVFP4_ALL_LAYERS_CFG"
BUILT_IN = [path for path in json.loads(LIBRARY.read_bytes()) if path.startswith("general/")]
OWN = """
metadata: {recipe_type: auto_quantize}
imports:
  fp8: configs/ptq/presets/model/fp8
  int8: configs/ptq/presets/model/int8
  cache: configs/ptq/presets/kv/fp8_cast
  base: configs/auto_quantize/units/base_cost_excluded_layers
auto_quantize:
  constraints: {effective_bits: 9.0}
  candidate_formats: [{$import: fp8}]
  module_search_spaces:
    - module_name_patterns: ["*lm_head*"]
      candidate_formats: [{$import: int8}]
      allow_no_quant: false
  disabled_layers: ["*patch_embed*"]
  cost_excluded_layers: [{$import: base}]
  kv_cache: {$import: cache}
"""


def pythonic(value):
    """What ModelOpt's loader makes of spellings: axes as integers, `e4m3` as a pair."""
    if isinstance(value, dict):
        return {
            int(key) if isinstance(key, str) and key.lstrip("-").isdigit() else key: pythonic(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [pythonic(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"e\dm\d", value):
        return (int(value[1]), int(value[3]))
    return value


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    return str(file)


def test_the_committed_library_is_modelopts():
    pytest.importorskip("modelopt.torch.quantization")
    from layersense.quantization.generate_registry import generate_library

    assert generate_library() == library()


@pytest.mark.parametrize("name", BUILT_IN)
def test_imports_mean_what_modelopts_loader_makes_of_them(name):
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt.recipe import load_recipe
    from modelopt.recipe.config import ModelOptAutoQuantizeRecipe

    ours = ModelOptAutoQuantizeRecipe.model_validate(pythonic(read_recipe(name)))
    assert ours.auto_quantize == load_recipe(name).auto_quantize


def test_modelopts_loader_reads_an_own_file_the_same_way(own):
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt.recipe import load_recipe
    from modelopt.recipe.config import ModelOptAutoQuantizeRecipe

    ours = ModelOptAutoQuantizeRecipe.model_validate(pythonic(read_recipe(own)))
    assert ours.auto_quantize == load_recipe(own).auto_quantize


def test_a_recipe_of_modelopt_is_a_scheme():
    found = scheme_of("general/auto_quantize/nvfp4_fp8_at_5p4bits")
    assert found["quant_formats"] == [NVFP4, FP8]
    assert found["effective_bits"] == 5.4
    assert "*visual*" in found["exclude"]
    assert found["cost_excluded"] == ["*visual*", "*mtp*", "*vision_tower*"]
    experts = scheme_of("general/auto_quantize/w4a16_nvfp4_fp8_at_6p0bits-active_moe.yaml")
    assert experts["active_expert_ratio"] == 0.03125
    assert {name for path in BUILT_IN for name in scheme_of(path)["quant_formats"]} == {
        NVFP4, FP8, "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_ALL_LAYERS_CFG",
        "W4A16_NVFP4_ALL_LAYERS_CFG", "W4A8_AWQ_BETA_ALL_LAYERS_CFG",
    }  # fmt: skip


def test_an_own_recipe_decides_as_it_says(own):
    keys = scheme_of(own)
    assert keys.pop("kv_cache") == "fp8_cast"
    scheme = config.Scheme(**{**keys, "search_spaces": [
        config.SearchSpace(**space) for space in keys["search_spaces"]
    ]})  # fmt: skip
    manifest = build_manifest(sf.make_scores(), "demo", "own", scheme, {})
    recipe = {h: plain_name(g.selected) for h, g in manifest.layer_sensitivity.items()}
    assert recipe["lm_head.quant_recipe"] == INT8  # the one format that it may take
    assert recipe["model.visual.patch_embed.proj.quant_recipe"] == "NONE"
    # Vision does not count, so that nothing speaks for quantizing it.
    assert {format for handle, format in recipe.items() if ".visual." in handle} == {"NONE"}
    budget = manifest.autoquant_state.budget
    language = {name: n for name, (_, n) in sf.MODULES.items() if ".visual." not in name}
    assert budget.counted_weights == sum(language.values())
    bits = sum(
        n * (16 if recipe[f"{name}.quant_recipe"] == "NONE" else 8) for name, n in language.items()
    )
    assert budget.used == pytest.approx(bits / sum(language.values()))
    assert budget.used <= 9.0


def test_experts_count_by_the_share_that_runs():
    modules = {
        "model.layers.0.mlp.experts": (["model.layers.0.mlp.experts"], 1000),
        "model.layers.0.mlp.down_proj": (["model.layers.0.mlp.down_proj"], 100),
    }
    scores = sf.make_scores(modules, dict.fromkeys(modules, 1.0))
    scheme = config.Scheme(quant_formats=[FP8], effective_bits=8, active_expert_ratio=0.25)
    budget = build_manifest(scores, "demo", "moe", scheme, {}).autoquant_state.budget
    assert budget.counted_weights == 0.25 * 1000 + 100
    assert budget.used == pytest.approx(8)


def test_what_a_group_shares_is_matched_as_a_whole():
    space = config.SearchSpace(layers=["*q_proj"], quant_formats=[FP8])
    scheme = config.Scheme(quant_formats=[FP8], effective_bits=16, search_spaces=[space])
    with pytest.raises(LayersenseError, match=r"matches .*q_proj and not .*k_proj.* all or none"):
        build_manifest(sf.make_scores(), "demo", "x", scheme, {})
    both = [config.SearchSpace(layers=["*head"], quant_formats=[FP8])] * 2
    scheme = config.Scheme(quant_formats=[FP8], effective_bits=16, search_spaces=both)
    with pytest.raises(LayersenseError, match="2 entries of search_spaces match lm_head"):
        build_manifest(sf.make_scores(), "demo", "x", scheme, {})


def test_a_config_expands_its_recipes_and_keys_beside_them_win(own):
    data = {
        "datasets": {"sample": {"source": "sample"}},
        "models": {"demo": {"source": "demo"}},
        "schemes": {"own": {"recipe": own, "effective_bits": 10.0}},
        "runs": {"r": {"model": "demo", "dataset": "sample", "schemes": ["own"]}},
    }
    scheme = load_config(data, "c.yaml", check_files=False).schemes["own"]
    assert scheme.effective_bits == 10.0
    assert scheme.all_formats == [FP8, INT8]
    assert scheme.kv_cache == "fp8_cast"
    data["schemes"]["own"]["recipe"] = "general/auto_quantize/none_of_them"
    with pytest.raises(LayersenseError, match=r"schemes\.own\.recipe: .*neither a file nor one of"):
        load_config(data, "c.yaml", check_files=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("auto_quantize}", "ptq}"), "is no search recipe"),
        (("fp8: configs/ptq/presets/model/fp8", "fp8: configs/none"), "imports configs/none"),
        (("[{$import: fp8}]", "[{$import: fp4}]"), r"\$import fp4 is not among its imports"),
        (("  constraints:", "  costs: 1\n  constraints:"), "has no key `costs`"),
        (("imports:", "quantize: {quant_cfg: []}\nimports:"), "fixed baseline"),
        (
            ("[{$import: fp8}]", "[{$import: fp8, effective_bits: 7.5}]"),
            r"bills FP8_ALL_LAYERS_CFG at 7\.5 bits .*which takes 8",
        ),
        ((OWN, ""), "is empty"),
        ((OWN, "[]"), "expected a mapping"),
        (("{recipe_type: auto_quantize}", "auto_quantize"), r"is no search recipe"),
        (("  fp8: configs/ptq/presets/model/fp8", "  fp8: 3"), "imports: expected names and paths"),
        (("[{$import: fp8}]", "[{$import: [[fp8]]}]"), r"\$import \[\['fp8'\]\] is not among"),
        (("{$import: cache}", "{$import: base}"), r"\$import base is no mapping"),
        (("bits: 9.0", "bits: many"), r"auto_quantize: Expected `float`.*constraints\.effective"),
        (('    - module_name_patterns: ["*lm_head*"]', "    - module_names: []"),
         "missing required field `module_name_patterns`"),
        (("candidate_formats: [{$import: fp8}]", "candidate_formats:"), "Expected `array`"),
        (("[{$import: fp8}]", "[{quant_cfg: [{cfg: {num_bits: 8}}]}]"),
         "missing required field `quantizer_name`"),
        (("[{$import: fp8}]", "&a [*a]"), "is nested too deeply"),
    ],
)  # fmt: skip
def test_what_a_scheme_cannot_say_is_told(tmp_path, change, message):
    file = tmp_path / "broken.yaml"
    file.write_text(OWN.replace(*change))
    with pytest.raises(LayersenseError, match=message):
        scheme_of(str(file))
