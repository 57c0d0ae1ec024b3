"""Recipes put onto a model: from quant_config.json, by switching, and as ModelOpt's search did."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from searched import search
from tiny_models import CAPTIONS, resolve_folder, save_tiny_llama

from layersense import paths
from layersense.calibration.database import Row
from layersense.errors import LayersenseError
from layersense.models.tasks import get_task
from layersense.models.tasks.protocol import Sampling
from layersense.quantization.formats import known_formats
from layersense.recipes.quant_config import (
    QuantConfig,
    enable_entries,
    make_cache,
    make_parts,
)
from layersense.scoring.fused.quantizers import Quantizers
from layersense.verification.apply import _beside
from layersense.verification.replay import (
    Calibration,
    Switchboard,
    apply_config,
    check_applied,
    enabled_quantizers,
)

FP8, INT8, INT4 = (
    "FP8_ALL_LAYERS_CFG",
    "INT8_ALL_LAYERS_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG",
)
AWQ, SMOOTH = "INT4_AWQ_ALL_LAYERS_CFG", "INT8_SMOOTHQUANT_ALL_LAYERS_CFG"

MODULES = {
    f"model.layers.{block}.{first}.quant_recipe": [
        f"model.layers.{block}.{part}.{name}" for name in names
    ]
    for block in (0, 1)
    for first, part, names in (
        ("self_attn.q_proj", "self_attn", ("q_proj", "k_proj", "v_proj")),
        ("self_attn.o_proj", "self_attn", ("o_proj",)),
        ("mlp.gate_proj", "mlp", ("gate_proj", "up_proj")),
        ("mlp.down_proj", "mlp", ("down_proj",)),
    )
} | {"lm_head.quant_recipe": ["lm_head"]}
TYPES = {name: "Linear" for names in MODULES.values() for name in names}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return resolve_folder(save_tiny_llama(tmp_path_factory.mktemp("llama")), "causal-lm")


@pytest.fixture
def loaded(checkpoint):
    return get_task("causal-lm").load(checkpoint, dtype="float32", device="cpu")


def calibration(loaded):
    rows = [
        Row(image_path=None, caption=text, position=index)
        for index, text in enumerate(CAPTIONS * 4)
    ]
    task = get_task("causal-lm")
    batches = task.batches(loaded, rows, Sampling(max_length=16, modality="text"), 2)
    return Calibration(task, batches, torch.device("cpu"), torch.float32)


def make_config(recipe, kv_cache="none"):
    formats = {name: known_formats()[name] for name in sorted(set(recipe.values()) - {"NONE"})}
    parts = make_parts(recipe, formats, MODULES, TYPES)
    cache = make_cache(kv_cache, TYPES)
    return QuantConfig(
        run="r",
        scheme="s",
        model_name="tiny",
        model="./tiny",
        model_digest="d",
        dataset_name="texts",
        dataset_digest="t",
        settings={},
        recipe_digest="x",
        effective_bits=8.0,
        parts=parts,
        enable=enable_entries([*parts, *([cache] if cache else [])]),
        kv_cache=cache,
    )


def recipe_of(*formats):
    """Give the groups the formats in turn."""
    return {handle: formats[i % len(formats)] for i, handle in enumerate(MODULES)}


def outputs(loaded, data):
    with torch.no_grad():
        return [data.task.forward(loaded.model, batch).logits for batch in data.batches[:3]]


def test_enabled_quantizers_are_the_recipe_module_by_module(loaded):
    recipe = recipe_of(FP8, "NONE", INT4)
    config = make_config(recipe)
    apply_config(loaded.model, config, calibration(loaded))
    check_applied(loaded.model, config)
    found = enabled_quantizers(loaded.model)
    for handle, format in recipe.items():
        for name in MODULES[handle]:
            if format == "NONE":
                assert name not in found
            elif format == FP8:
                assert set(found[name]) == {"weight_quantizer", "input_quantizer"}
                assert found[name]["weight_quantizer"]["num_bits"] == (4, 3)
            else:
                assert set(found[name]) == {"weight_quantizer"}
                assert found[name]["weight_quantizer"]["num_bits"] == 4
                assert found[name]["weight_quantizer"]["block_sizes"][-1] == 128
    assert set(found) == {
        name for h, names in MODULES.items() if recipe[h] != "NONE" for name in names
    }


@pytest.mark.parametrize(
    "formats",
    [(FP8, "NONE", INT4), (INT8, FP8), (AWQ, FP8, "NONE"), (SMOOTH, INT4), (AWQ, SMOOTH, INT8)],
    ids=lambda formats: "-".join(name.split("_ALL")[0] for name in formats),
)
def test_outputs_equal_those_of_the_searchs_own_model(checkpoint, formats):
    """`auto_quantize` calibrates and chooses; the same recipe from its config does the same."""
    task = get_task("causal-lm")
    recipe = recipe_of(*formats)
    searched = task.load(checkpoint, dtype="float32", device="cpu")
    data = calibration(searched)
    search(searched.model, data, recipe)
    expected = outputs(searched, data)

    replayed = task.load(checkpoint, dtype="float32", device="cpu")
    apply_config(replayed.model, make_config(recipe), calibration(replayed))
    plain = outputs(task.load(checkpoint, dtype="float32", device="cpu"), data)
    for ours, theirs, none in zip(outputs(replayed, data), expected, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert (ours - none).abs().max() > 100 * (ours - theirs).abs().max()


def test_what_is_not_as_the_recipe_says_is_told(loaded):
    config = make_config(recipe_of(FP8, "NONE"))
    apply_config(loaded.model, config, calibration(loaded))
    q_proj = loaded.model.model.layers[0].self_attn.q_proj
    q_proj.input_quantizer.disable()
    with pytest.raises(LayersenseError, match=r"layers\.0\.self_attn\.q_proj: the model's input"):
        check_applied(loaded.model, config)
    q_proj.input_quantizer.enable()
    loaded.model.model.layers[0].self_attn.o_proj.weight_quantizer.enable()
    with pytest.raises(LayersenseError, match=r"self_attn\.o_proj: is quantized"):
        check_applied(loaded.model, config)


def test_a_config_for_another_model_is_refused(loaded):
    config = make_config(recipe_of(FP8))
    config.parts[0].modules.append("model.layers.7.mlp.down_proj")
    with pytest.raises(LayersenseError, match=r"has no module model\.layers\.7"):
        apply_config(loaded.model, config, calibration(loaded))


def test_no_pattern_catches_a_neighbour():
    """`h.1` must not catch `h.10`, nor a bracket in a name stand for a set."""
    names = ["h.1.fc", "h.10.fc", "h.1.fc2", "m[1].fc", "m1.fc"]
    modules = {f"{name}.quant_recipe": [name] for name in names}
    formats = {FP8: known_formats()[FP8]}
    for name in names:
        recipe = {f"{name}.quant_recipe": FP8}
        (part,) = make_parts(recipe, formats, modules, dict.fromkeys(names, "Linear"))
        patterns = [entry["quantizer_name"] for entry in part.config["quant_cfg"][1:]]
        caught = {
            other
            for other in names
            for pattern in patterns
            if fnmatch(f"{other}.weight_quantizer", pattern)
        }
        assert caught == {name}


def test_switching_equals_applying(checkpoint):
    task = get_task("causal-lm")
    recipes = [recipe_of(FP8, "NONE", INT4), recipe_of(INT4, FP8), recipe_of("NONE", AWQ, FP8)]
    loaded = task.load(checkpoint, dtype="float32", device="cpu")
    data = calibration(loaded)
    plain = outputs(loaded, data)
    board = Switchboard.of(loaded.model, MODULES)
    for name in (FP8, INT4, AWQ):
        board.calibrate(known_formats()[name], list(MODULES), TYPES, data)
    for before, after in zip(plain, outputs(loaded, data), strict=True):
        assert torch.equal(before, after)
    for recipe in [*recipes, recipes[0]]:
        board.switch(recipe)
        switched = outputs(loaded, data)
        fresh = task.load(checkpoint, dtype="float32", device="cpu")
        apply_config(fresh.model, make_config(recipe), calibration(fresh))
        for ours, theirs in zip(switched, outputs(fresh, data), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert (switched[0] - plain[0]).abs().max() > 1e-4
    board.clear()
    for before, after in zip(plain, outputs(loaded, data), strict=True):
        assert torch.equal(before, after)


def test_verification_quantizes_with_the_ranges_that_were_scored(checkpoint):
    formats = [known_formats()[name] for name in (FP8, INT8, INT4, AWQ, SMOOTH)]
    task = get_task("causal-lm")
    one, other = (task.load(checkpoint, dtype="float32", device="cpu") for _ in range(2))
    board = Switchboard.of(one.model, MODULES)
    for format in formats:
        board.calibrate(format, list(MODULES), TYPES, calibration(one))
    scored, data = Quantizers(other.model, formats), calibration(other)

    def forward(count):
        for batch in data.batches[:count]:
            task.forward(other.model, batch)

    scored.calibrate(forward, len(data.batches))
    compared = 0
    for format in formats:
        scored.activate(scored.recipes[format.name])
        for name in TYPES:
            ours = board.choices[format.name][name]
            for kind in ("weight_quantizer", "input_quantizer"):
                theirs = getattr(other.model.get_submodule(name), kind)
                assert ours[kind].is_enabled == theirs.is_enabled
                if not theirs.is_enabled:
                    continue
                for attribute in ("_amax", "_pre_quant_scale"):
                    expected = getattr(theirs, attribute, None)
                    assert (getattr(ours[kind], attribute, None) is None) == (expected is None)
                    if expected is not None:
                        torch.testing.assert_close(getattr(ours[kind], attribute), expected)
                        compared += 1
    assert compared >= 6 * len(TYPES)


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_cast"])
def test_the_cache_is_quantized_with_the_layers_and_without_them(checkpoint, kv_cache):
    task = get_task("causal-lm")
    recipe = recipe_of(AWQ, FP8, "NONE")
    loaded = task.load(checkpoint, dtype="float32", device="cpu")
    data = calibration(loaded)
    plain = outputs(loaded, data)
    board = Switchboard.of(loaded.model, MODULES)
    for name in (FP8, AWQ):
        board.calibrate(known_formats()[name], list(MODULES), TYPES, data)
    board.calibrate_cache(make_cache(kv_cache, TYPES), data)
    for before, after in zip(plain, outputs(loaded, data), strict=True):
        assert torch.equal(before, after)
    board.switch({}, kv_cache)
    alone = outputs(loaded, data)
    assert (alone[0] - plain[0]).abs().max() > 1e-4
    board.switch(recipe)
    layers = outputs(loaded, data)
    board.switch(recipe, kv_cache)
    both = outputs(loaded, data)
    assert (both[0] - layers[0]).abs().max() > 1e-4

    fresh = task.load(checkpoint, dtype="float32", device="cpu")
    config = make_config(recipe, kv_cache)
    apply_config(fresh.model, config, calibration(fresh))
    check_applied(fresh.model, config)
    for ours, theirs in zip(both, outputs(fresh, data), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found = enabled_quantizers(fresh.model)
    attention = {f"model.layers.{block}.self_attn" for block in (0, 1)}
    for name in attention:
        assert set(found[name]) == {"k_bmm_quantizer", "v_bmm_quantizer"}
    amax = fresh.model.model.layers[0].self_attn.k_bmm_quantizer.amax
    assert (amax is None or float(amax) == 448.0) == (kv_cache == "fp8_cast")
    fresh.model.model.layers[1].self_attn.v_bmm_quantizer.disable()
    with pytest.raises(
        LayersenseError, match=r"layers\.1\.self_attn: the model's quantizers of keys"
    ):
        check_applied(fresh.model, config)
    board.clear()
    for before, after in zip(plain, outputs(loaded, data), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("folders", ["study/results/run/mix", "study/results/run/mix/refined", ""])
def test_a_recipe_finds_model_and_data_in_the_results_that_it_lies_in(tmp_path, folders):
    place = tmp_path / folders
    place.mkdir(parents=True, exist_ok=True)
    model = tmp_path / "study/results/models/demo/model.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}")
    found = _beside(place / "quant_config.json", paths.model("demo"))
    assert (found == model) is bool(folders)
    assert str(_beside(Path("/quant_config.json"), paths.model("demo"))).endswith("model.json")
