"""What a target restricts: the table, the choice against brute force, and its price."""

import itertools

import numpy as np
import pytest
import score_files as sf
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.schema import encode_manifest, plain_name
from layersense.quantization.formats import (
    NONE,
    format_settings,
    known_formats,
    resolve_format,
)
from layersense.recipes.baselines import baselines, random_recipes
from layersense.recipes.decide import build_manifest
from layersense.recipes.frontier import frontier_table
from layersense.recipes.menu import Menu
from layersense.recipes.targets import TARGETS, deployment, reads, runtimes
from layersense.reports.sentences import target_text
from layersense.reports.text import number

FP8, INT8, INT4 = sf.FORMATS
NVFP4 = "NVFP4_ALL_LAYERS_CFG"
NAMES = ["a", "b", "c"]


# --- the table -----------------------------------------------------------------------------------


def test_every_line_of_the_table_names_formats_that_exist_and_its_source():
    for runtime in TARGETS.values():
        for entry in (*runtime.together, *runtime.restricted):
            assert set(entry.formats) <= set(known_formats())
        for entry in (*runtime.together, *runtime.fused, *runtime.restricted):
            assert entry.source
        for entry in runtime.restricted:
            assert set(entry.formats) <= set(runtime.formats)
            assert entry.types or entry.words or entry.routers or entry.head


def test_a_format_counts_by_what_it_does():
    assert reads("vllm", resolve_format("W8A8_FP8_FP8", {})) == FP8
    assert reads("vllm", resolve_format("W8A8_INT8_FP8", {})) is None
    assert runtimes(known_formats()[INT8]) == ("TensorRT",)


def test_what_is_loaded_as_one_goes_together():
    modules = {
        # ModelOpt's own groups agree already.
        "l.0.q_proj": ["l.0.q_proj", "l.0.k_proj", "l.0.v_proj"],
        "v.0.query": ["v.0.query"],
        "v.0.key": ["v.0.key"],
        "v.0.value": ["v.0.value"],
        "v.1.query": ["v.1.query"],
        "moe.experts.0.w1": ["moe.experts.0.w1", "moe.experts.0.w3"],
        "moe.experts.0.w2": ["moe.experts.0.w2"],
        "moe.experts.1.w1": ["moe.experts.1.w1"],
        "l.0.o_proj": ["l.0.o_proj"],
    }
    formats = {FP8: known_formats()[FP8]}
    assert deployment("vllm", formats, modules, {}).fused == [
        ["v.0.query", "v.0.key", "v.0.value"],
        ["moe.experts.0.w1", "moe.experts.0.w2", "moe.experts.1.w1"],
    ]
    assert deployment("tensorrt", formats, modules, {}).fused == []


def test_tensorrt_gives_convolutions_fp8_and_int8_alone():
    formats = {name: known_formats()[name] for name in (FP8, INT8, INT4, NVFP4)}
    found = deployment(
        "tensorrt",
        formats,
        {"backbone.conv": ["backbone.conv"], "decoder.fc1": ["decoder.fc1"]},
        {"backbone.conv": "Conv2d", "decoder.fc1": "Linear"},
    )
    assert {handle: set(formats) for handle, formats in found.barred.items()} == {
        "backbone.conv": {INT4, NVFP4}
    }
    assert "TensorRT does not take convolutions" in found.barred["backbone.conv"][INT4]
    assert found.together == [[FP8, INT8, INT4, NVFP4]]


# --- the choice ----------------------------------------------------------------------------------


@st.composite
def restricted_menus(draw):
    """Menus of up to five groups, with sets of formats and groups that must agree."""
    count = draw(st.integers(1, 5))
    options = []
    for _ in range(count):
        own = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
        must = bool(own) and draw(st.integers(0, 4)) == 0  # be quantized
        options.append(sorted(own) if must else [*sorted(own), NONE])
    width = max(map(len, options))
    scores, costs = np.full((2, count, width), np.inf)
    for group, own in enumerate(options):
        size = draw(st.integers(1, 5))
        for index, name in enumerate(own):
            scores[group, index] = 0 if name == NONE else draw(st.integers(0, 20))
            costs[group, index] = size * {"a": 4, "b": 8, "c": 8, NONE: 16}[name]
    handles = [f"g{index}" for index in range(count)]
    together = draw(
        st.none()
        | st.lists(
            st.lists(st.sampled_from(NAMES), unique=True, max_size=3), min_size=1, max_size=3
        )
    )
    fused = []
    if count > 1 and draw(st.booleans()):
        fused.append(
            sorted(draw(st.lists(st.sampled_from(handles), unique=True, min_size=2, max_size=3)))
        )
    menu = Menu(
        handles=handles,
        options=options,
        scores=scores,
        errors=np.zeros_like(scores),
        costs=costs,
        budget_costs=costs,
        batched=[],
        total=float(sum(row[len(own) - 1] for row, own in zip(costs, options, strict=True))),
        objective=draw(st.sampled_from(["sum", "max"])),
        risk=0.0,
        together=together,
        fused=fused,
    )
    try:
        assert menu.arrangements
    except LayersenseError:  # groups that must be quantized may have nothing in common
        reject()
    return menu


def holds(menu, recipe):
    """Whether a checkpoint may hold a recipe."""
    used = set(recipe.values()) - {NONE}
    return (menu.together is None or any(used <= set(entry) for entry in menu.together)) and all(
        len({recipe[handle] for handle in handles}) == 1 for handles in menu.fused
    )


def every_recipe(menu):
    """(cost, damage) of every recipe that a checkpoint may hold."""
    for choice in itertools.product(*(range(len(options)) for options in menu.options)):
        recipe = menu.recipe(np.array(choice))
        if holds(menu, recipe):
            scores = [menu.scores[group, option] for group, option in enumerate(choice)]
            cost = sum(menu.costs[group, option] for group, option in enumerate(choice))
            yield cost, max(scores) if menu.objective == "max" else sum(scores)


@given(restricted_menus(), st.integers(0, 300))
@settings(max_examples=300, deadline=None)
def test_the_best_recipe_is_that_of_brute_force(menu, budget):
    fitting = [damage for cost, damage in every_recipe(menu) if cost <= budget]
    if not fitting:
        assert menu.lowest > budget
        assert menu.bounds([budget]) == [float("inf")]
        with pytest.raises(LayersenseError, match="cannot be met"):
            menu.best(budget)
        return
    solution = menu.best(budget)
    recipe = menu.recipe(solution.choice)
    assert holds(menu, recipe)
    assert menu.budget_cost(solution.choice) == solution.cost <= budget
    assert solution.score == min(fitting)
    assert solution.lower_bound <= min(fitting)
    assert solution.gap <= 1e-9
    (bound,) = menu.bounds([budget])
    assert bound <= min(fitting) * (1 + 1e-12)


@given(restricted_menus())
@settings(max_examples=150, deadline=None)
def test_every_point_of_the_frontier_can_be_held_and_is_the_best_at_its_cost(menu):
    assume(menu.objective == "sum")
    recipes = list(every_recipe(menu))
    points = menu.corners(64)
    assert [point.cost for point in points] == sorted(point.cost for point in points)
    assert points[-1].score == min(damage for _, damage in recipes)
    for point in points:
        assert holds(menu, menu.recipe(point.choice))
        best = min(damage for cost, damage in recipes if cost <= point.cost)
        assert point.lower_bound <= best * (1 + 1e-12)
        assert best <= point.score <= best * (1 + 1e-3)


@given(restricted_menus(), st.floats(4, 16))
@settings(max_examples=60, deadline=None)
def test_no_recipe_of_any_kind_breaks_the_target(menu, bits):
    for recipe in random_recipes(menu, bits, 5, width=2.0):
        assert holds(menu, recipe)
    for format in NAMES:
        recipe = menu.legal(dict.fromkeys(menu.handles, format))
        assert holds(menu, recipe)
        assert all(
            recipe[handle] in own for handle, own in zip(menu.handles, menu.options, strict=True)
        )


def test_of_formats_that_do_not_mix_the_frontier_takes_the_better_ones_everywhere():
    random = np.random.default_rng(0)
    count = 200
    sizes = random.integers(1, 5, count)
    few, many = 10 ** random.uniform(-3, 1, (2, count))
    scores = np.stack([few, many, np.zeros(count)], axis=1)
    costs = sizes[:, None] * np.array([8.0, 8.25, 16.0])
    menu = Menu(
        handles=[f"g{index}" for index in range(count)], options=[["a", "b", NONE]] * count,
        scores=scores, errors=np.zeros_like(scores), costs=costs, budget_costs=costs, batched=[],
        total=16.0 * sizes.sum(), objective="sum", risk=0.0, together=[["a"], ["b"]],
    )  # fmt: skip
    points = menu.corners(64)
    assert len(points) >= 64
    # Both sets are solved for themselves: what is left is less than a step between two corners.
    assert max(point.gap for point in points) < 1e-3
    assert {"a", "b"} <= {name for p in points for name in menu.recipe(p.choice).values()}


# --- a scheme ------------------------------------------------------------------------------------


def measured(formats=(FP8, INT8, INT4)):
    scores = sf.make_scores(formats=formats)
    for name, entry in scores.formats.items():
        entry.settings["format"] = format_settings(known_formats()[name])
    scores.layers["model.visual.patch_embed.proj"].module_type = "Conv3d"
    return scores


def decide(scores=None, **scheme):
    scheme = {"quant_formats": [FP8, INT8, INT4], "effective_bits": 8, **scheme}
    return build_manifest(scores or measured(), "demo", "mix", config.Scheme(**scheme), {})


def chosen(manifest):
    return {
        handle.removesuffix(".quant_recipe"): plain_name(group.selected)
        for handle, group in manifest.layer_sensitivity.items()
    }


def test_generic_restricts_nothing_and_says_nothing():
    manifest = decide()
    assert manifest.scheme.target == "generic"
    assert manifest.autoquant_state.deployment is None


def test_what_a_runtime_does_not_quantize_stays_and_the_price_is_a_number():
    manifest = decide(quant_formats=[FP8], target="vllm", effective_bits=10)
    recipe = chosen(manifest)
    assert all(format == NONE for name, format in recipe.items() if ".visual." in name)
    assert manifest.layers["model.visual.blocks.0.attn.qkv"].reason == (
        "vLLM does not quantize vision towers"
    )
    assert manifest.layers["model.visual.patch_embed.proj"].reason == (
        "vLLM does not quantize convolutions"
    )
    state, free = manifest.autoquant_state, decide(quant_formats=[FP8], effective_bits=10)
    assert state.deployment.minimized_without == pytest.approx(free.autoquant_state.minimized)
    assert state.minimized > state.deployment.minimized_without
    assert state.deployment.barred == 3
    assert encode_manifest(manifest)


def test_the_report_names_the_price():
    state = decide(quant_formats=[FP8], target="vllm", effective_bits=10).autoquant_state
    text = target_text(state)
    extra = state.minimized - state.deployment.minimized_without
    assert "loaded by vLLM (3 groups may take fewer formats)" in text
    assert f"adds {number(extra)} to the damage (+" in text
    state.deployment.minimized_without = state.minimized / 20
    assert "to the damage (20.0 times it)" in target_text(state)
    assert target_text(decide().autoquant_state) is None


def test_a_budget_that_a_target_puts_out_of_reach_says_why():
    with pytest.raises(LayersenseError, match=r"vLLM does not quantize vision towers.*that vLLM"):
        decide(quant_formats=[FP8], target="vllm", effective_bits=8)


def test_the_table_of_the_frontier_keeps_to_the_target():
    manifest = decide(target="tensorrt", effective_bits=7)
    handles = list(manifest.layer_sensitivity)
    patch = handles.index("model.visual.patch_embed.proj.quant_recipe")
    rows = frontier_table(manifest).to_pylist()
    assert {row["recipe"][patch] for row in rows} <= {FP8, INT8, NONE}
    assert any(INT4 in row["recipe"] for row in rows)
    menu = Menu.of_manifest(manifest)
    assert all(holds(menu, entry.recipe) for entry in baselines(menu, manifest.layer_sensitivity))
