"""One scheme over synthetic scores: coverage, constraints, budget, and what the manifest says."""

import math
import statistics

import pytest
import score_files as sf
from hypothesis import given
from hypothesis import strategies as st

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.schema import encode_manifest
from layersense.quantization.formats import format_settings, resolve_format
from layersense.recipes.decide import (
    Precision,
    build_manifest,
    monotone,
    score_per_token,
    solve_scheme,
)
from layersense.scoring.scores import write_scores

FP8, INT8, INT4 = sf.FORMATS
TOTAL = sum(weights for _, weights in sf.MODULES.values())


def decide(scores=None, **scheme):
    scores = scores or sf.make_scores()
    scheme = {"quant_formats": [FP8], "effective_bits": 16, **scheme}
    return build_manifest(scores, "demo", "mix", config.Scheme(**scheme), {})


def chosen(manifest):
    return {
        handle.removesuffix(".quant_recipe"): group.selected.split("(")[0]
        for handle, group in manifest.layer_sensitivity.items()
    }


def quantized(manifest):
    return {name for name, format in chosen(manifest).items() if format != "NONE"}


def test_scores_are_per_token_with_a_ratio_estimators_error():
    group = decide().layer_sensitivity["lm_head.quant_recipe"]
    assert group.formats == [f"{FP8}(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"]
    assert group.costs == [131072 / 2, 131072]
    assert group.scores == pytest.approx([2.0 * 1.005, 0.0])
    residuals = [
        2.0 * tokens * (spread - 1.005) for tokens, spread in zip(sf.TOKENS, sf.SPREAD, strict=True)
    ]
    expected = math.sqrt(4 / 3 * sum(r * r for r in residuals)) / 40
    assert group.scores_se == pytest.approx([expected, 0.0])


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30))
def test_with_equal_batches_the_error_is_that_of_a_mean(scores):
    value, error = score_per_token(scores, [7] * len(scores))
    assert value == pytest.approx(statistics.mean(scores) / 7)
    expected = statistics.stdev(scores) / math.sqrt(len(scores)) / 7
    assert error == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_one_batch_has_no_error_and_a_lost_batch_no_score():
    assert score_per_token([3.0], [2]) == (1.5, None)
    assert score_per_token([3.0, None], [2, 2]) == (None, None)


def test_solver_scores_never_rise_with_the_bits():
    rising = [Precision(bits, 8, "FP8") for bits in (4.0, 6.0, 8.0)] + [Precision(16.0, 16, None)]
    assert monotone([4.0, 5.0, 3.0, 0.0], rising) == [4.0, 4.0, 3.0, 0.0]
    assert monotone([None, 5.0, 6.0, 0.0], rising) == [None, 5.0, 5.0, 0.0]
    scores = sf.make_scores()
    # W8A8 made worse than W4A8: the solver sees W4A8's score for it, the table what was measured.
    # That of W4A16 stands for no W8A8.
    for group in scores.formats[FP8].groups.values():
        group.batch_scores = [value * 100 for value in group.batch_scores]
    group = decide(scores, quant_formats=[FP8, INT4]).layer_sensitivity["lm_head.quant_recipe"]
    assert [label.split("(")[0] for label in group.formats] == [INT4, FP8, "NONE"]
    assert group.scores == group.scores_solver == pytest.approx([16.08, 201.0, 0.0])
    narrow = format_settings(resolve_format("W4A8_INT4_FP8", {}))
    scores.formats[INT4].settings["format"] = narrow
    group = decide(scores, quant_formats=[FP8, INT4]).layer_sensitivity["lm_head.quant_recipe"]
    assert group.scores == pytest.approx([16.08, 201.0, 0.0])
    assert group.scores_solver == pytest.approx([16.08, 16.08, 0.0])


def test_narrower_activations_are_not_clamped_by_finer_ones():
    names = ("W4A16_INT4", "W4A4_INT4_INT4", "W8A4_INT8_FP4", "W8A4_INT8_INT4", "W8A8_INT8_INT8")
    precisions = [Precision.of(resolve_format(name, {})) for name in names]
    scores = [1.0, 7.0, 3.0, 5.0, 0.5]
    assert monotone(scores, precisions) == scores
    # INT4 of a token is no coarser than FP4 of 16 values, and coarser than INT8.
    assert monotone([1.0, 4.0, 5.0, 6.0, 8.0], precisions) == [1.0, 4.0, 5.0, 4.0, 4.0]


def test_the_budget_counts_all_searched_weights():
    manifest = decide(quant_formats=[FP8, INT4], effective_bits=6)
    bits = {FP8: 8, INT4: 4.125, "NONE": 16}
    spent = sum(sf.MODULES[name][1] * bits[format] for name, format in chosen(manifest).items())
    assert manifest.autoquant_state.constraints["effective_bits"] == pytest.approx(spent / TOTAL)
    assert spent / TOTAL <= 6
    assert manifest.autoquant_state.gap == pytest.approx(0, abs=1e-9)
    assert manifest.num_quantized_layers == sum(
        len(sf.MODULES[name][0]) for name in quantized(manifest)
    )


def test_at_16_bits_nothing_is_quantized_and_at_8_all_is():
    assert quantized(decide(effective_bits=16)) == set()
    assert quantized(decide(effective_bits=8)) == set(sf.MODULES)


def test_coverage_fraction_takes_the_least_sensitive_first():
    """By score: qkv (12,288), down (16,384), q_proj (24,576), gate (65,536) make 37.09 %."""
    manifest = decide(coverage_mode="fraction", coverage_fraction=0.371, effective_bits=13.04)
    least = {
        "model.visual.blocks.0.attn.qkv",
        "model.visual.blocks.0.mlp.down_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.mlp.gate_proj",
    }
    assert quantized(manifest) == least
    layers = manifest.layers
    assert layers["lm_head"].reason == "beyond the scheme's coverage fraction"
    assert layers["model.visual.blocks.0.attn.qkv"].reason is None
    # What does not fit into the rest is passed over: here gate, for the patch embedding.
    less = decide(coverage_mode="fraction", coverage_fraction=0.37, effective_bits=13.74)
    passed_over = "model.language_model.layers.0.mlp.gate_proj"
    assert quantized(less) == least - {passed_over} | {"model.visual.patch_embed.proj"}
    full = decide(coverage_mode="fraction", coverage_fraction=1.0, effective_bits=8)
    assert quantized(full) == set(sf.MODULES)


def test_coverage_goes_by_the_worst_format():
    scores = sf.make_scores(formats=(FP8, INT8))
    handle = "model.visual.blocks.0.attn.qkv.quant_recipe"
    scores.formats[INT8].groups[handle].batch_scores = [1e6] * 4
    manifest = decide(
        scores,
        quant_formats=[FP8, INT8],
        coverage_mode="fraction",
        coverage_fraction=0.37,
        effective_bits=14,
    )
    assert "model.visual.blocks.0.attn.qkv" not in quantized(manifest)
    assert manifest.sensitivity_ranking[-1].name == handle


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ({"exclude": ["lm_head"]}, {"lm_head"}),
        ({"exclude": ["*.v_proj"]}, {"model.language_model.layers.0.self_attn.q_proj"}),
        (
            {"include": ["*language_model*", "lm_head"]},
            {name for name in sf.MODULES if "visual" in name},
        ),
        (
            {"include": ["*visual*", "*.q_proj", "*.gate_proj"]},
            {name for name in sf.MODULES if "visual" not in name},
        ),
    ],
)
def test_patterns_hold_for_all_modules_of_a_group(patterns, kept):
    lowest = sum(weights * (16 if name in kept else 8) for name, (_, weights) in sf.MODULES.items())
    manifest = decide(effective_bits=lowest / TOTAL, **patterns)
    assert set(sf.MODULES) - quantized(manifest) == kept


def test_routers_stay_out_unless_asked_for():
    modules = {**sf.MODULES, "model.layers.1.mlp.gate": (["model.layers.1.mlp.gate"], 1024)}
    damage = {**sf.DAMAGE, "model.layers.1.mlp.gate": 1e-6}
    scores = sf.make_scores(modules, damage)
    assert "model.layers.1.mlp.gate" not in quantized(decide(scores, effective_bits=8.03))
    assert "model.layers.1.mlp.gate" in quantized(decide(scores, effective_bits=8, routers=True))


@pytest.mark.parametrize("reached", ["not_called", "no_gradient"])
def test_unreached_groups_stay_unquantized_and_unranked(reached):
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual", reached)
    vision = {name for name in sf.MODULES if "visual" in name}
    manifest = decide(scores, effective_bits=10)
    assert not quantized(manifest) & vision
    assert {entry.name.removesuffix(".quant_recipe") for entry in manifest.sensitivity_ranking} == (
        set(sf.MODULES) - vision
    )
    group = manifest.layer_sensitivity["model.visual.blocks.0.attn.qkv.quant_recipe"]
    assert (group.reached, group.scores) == (reached, [0.0, 0.0])
    assert vision <= quantized(decide(scores, effective_bits=10, unreached="quantize"))


def test_a_score_that_is_not_finite_keeps_its_group_unquantized():
    scores = sf.make_scores()
    scores.formats[FP8].groups["lm_head.quant_recipe"].batch_scores[1] = None
    manifest = decide(scores, effective_bits=12)
    assert "lm_head" not in quantized(manifest)
    group = manifest.layer_sensitivity["lm_head.quant_recipe"]
    assert group.scores == [None, 0.0]
    assert group.batch_scores[0][1] is None


def test_a_group_can_hold_only_none():
    scores = sf.make_scores()
    for entry in scores.formats.values():
        del entry.groups["lm_head.quant_recipe"]
    manifest = decide(scores, effective_bits=12)
    group = manifest.layer_sensitivity["lm_head.quant_recipe"]
    assert group.formats == [group.selected] == ["NONE(effective-bits: 16.0)"]


def test_a_budget_out_of_reach_names_the_lowest_and_what_limits_it():
    lowest = (16 * 131072 + 8 * (TOTAL - 131072)) / TOTAL
    with pytest.raises(LayersenseError, match="cannot be met") as error:
        decide(effective_bits=9, exclude=["lm_head"])
    message = str(error.value)
    named = float(message.split("lowest reachable are ")[1].split()[0])
    assert lowest <= named <= lowest + 1e-4
    assert "40.9% of the searched weights" in message
    assert "exclude" in message
    assert quantized(decide(effective_bits=named, exclude=["lm_head"]))  # what it names, works
    assert "data" not in message


def test_a_budget_out_of_reach_for_want_of_data_says_so():
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual", "not_called")
    with pytest.raises(LayersenseError, match="the calibration data never ran it") as error:
        decide(scores, effective_bits=8)
    assert "; give the run data that reaches them, raise effective_bits" in str(error.value)


def test_a_format_that_was_not_measured_is_named():
    scores = sf.make_scores(formats=(FP8,))
    with pytest.raises(LayersenseError, match=f"run demo, scheme mix: format {INT8} .*snakemake"):
        decide(scores, quant_formats=[FP8, INT8])


def test_objective_max_minimises_the_largest_score():
    manifest = decide(effective_bits=12, objective="max")
    picked = quantized(manifest)
    worst = max(sf.DAMAGE[name] for name in picked) * 1.005
    assert manifest.autoquant_state.score == pytest.approx(worst)
    # Everything but the head takes 16 − 8 · 59 % = 11.3 bits; 2.0 is not needed.
    assert "lm_head" not in picked


def test_solve_scheme_writes_equal_bytes_for_equal_scores(tmp_path):
    scores = sf.make_scores()
    write_scores(tmp_path / "scores.json", scores)
    entry = scores.formats[FP8].settings
    settings = {
        **config.Scheme(quant_formats=[FP8], effective_bits=11).model_dump(mode="json"),
        "method": "gradient",
        "solver_version": 1,
        "expected": {
            "settings": {key: value for key, value in entry.items() if key != "format"},
            "formats": {FP8: entry["format"]},
        },
    }
    for name in ("one", "two"):
        solve_scheme("demo", "fp8", settings, tmp_path / "scores.json", tmp_path / name)
    written = (tmp_path / "one").read_bytes()
    assert written == (tmp_path / "two").read_bytes()
    scheme = config.Scheme(quant_formats=[FP8], effective_bits=11)
    expected = build_manifest(scores, "demo", "fp8", scheme, {FP8: entry})
    assert written == encode_manifest(expected)
    assert expected.findings == []
