"""``recipe.yaml``, read back by ModelOpt's own loader."""

import pytest
import score_files as sf
import yaml

from layersense import config
from layersense.manifests.schema import encode_manifest
from layersense.quantization.formats import format_settings, known_formats
from layersense.recipes.decide import build_manifest
from layersense.recipes.quant_config import quant_config
from layersense.recipes.recipe_yaml import ptq_recipe, write_recipe

FP8, INT8, INT4 = sf.FORMATS
AWQ, NVFP4 = "INT4_AWQ_ALL_LAYERS_CFG", "NVFP4_ALL_LAYERS_CFG"


def decide(swap=(), **scheme):
    """A mix of FP8 and INT4; ``swap`` measures one format under the settings of another."""
    scores = sf.make_scores(formats=(FP8, INT4))
    for name, entry in scores.formats.items():
        entry.settings["format"] = format_settings(known_formats()[dict(swap).get(name, name)])
        entry.settings.update(modality="text", device="cpu")
    scheme = {"quant_formats": [FP8, INT4], "effective_bits": 7, **scheme}
    return build_manifest(scores, "demo", "mix", config.Scheme(**scheme), {})


@pytest.fixture(scope="module")
def load_recipe():
    pytest.importorskip("modelopt.torch.quantization")
    from modelopt.recipe import load_recipe

    return load_recipe


@pytest.mark.parametrize("swap", [(), ((FP8, NVFP4),), ((INT4, AWQ),)], ids=str)
@pytest.mark.parametrize("kv_cache", ["none", "fp8", "nvfp4_cast"])
def test_modelopts_loader_reads_what_the_parts_say(load_recipe, tmp_path, swap, kv_cache):
    from layersense.verification.replay import pythonic

    manifest = decide(swap, kv_cache=kv_cache)
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    write_recipe(tmp_path / "manifest.json", tmp_path / "recipe.yaml")
    read = load_recipe(tmp_path / "recipe.yaml").quantize
    found = quant_config(manifest)
    replayed = [*found.parts, *([found.kv_cache] if found.kv_cache else [])]
    entry = type(read.quant_cfg[0])
    expected = [entry(quantizer_name="*", enable=False)] + [
        entry(**one)
        for part in replayed
        for one in pythonic(part.config)["quant_cfg"]
        if "cfg" in one
    ]
    assert read.quant_cfg == expected
    assert len({one.quantizer_name for one in read.quant_cfg}) == len(read.quant_cfg)


def test_one_algorithm_is_what_a_file_can_say():
    plain = ptq_recipe(quant_config(decide()))
    assert plain["quantize"]["algorithm"] == {"method": "max"}
    assert "quant_config.json" not in plain["metadata"]["description"]
    mixed = ptq_recipe(quant_config(decide(((INT4, AWQ),))))
    assert mixed["quantize"]["algorithm"]["method"] == "awq_lite"
    assert "quant_config.json beside it replays it" in mixed["metadata"]["description"]


def test_types_are_spelled_as_in_modelopts_recipes(tmp_path):
    (tmp_path / "manifest.json").write_bytes(encode_manifest(decide()))
    write_recipe(tmp_path / "manifest.json", tmp_path / "recipe.yaml")
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert content["metadata"]["recipe_type"] == "ptq"
    cfgs = [entry["cfg"] for entry in content["quantize"]["quant_cfg"] if "cfg" in entry]
    assert {"num_bits": "e4m3", "axis": None} in cfgs
    assert any(cfg.get("block_sizes", {}).get(-1) == 128 for cfg in cfgs)
