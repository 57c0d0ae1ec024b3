"""Recipes at every budget, against brute force and arithmetic by hand."""

import itertools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import score_files as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.schema import encode_manifest
from layersense.recipes import frontier as module
from layersense.recipes.decide import build_manifest
from layersense.recipes.frontier import frontier_table, knee, write_frontier
from layersense.recipes.menu import Menu, recipe_digest
from layersense.recipes.solver import Problem, corners, lower_bounds, solve

FP8, INT8, INT4 = sf.FORMATS
BITS = {FP8: 8, INT8: 8, INT4: 4.125, "NONE": 16}
TOTAL = sum(weights for _, weights in sf.MODULES.values())


def decide(scores=None, **scheme):
    scheme = {"quant_formats": [FP8, INT4], "effective_bits": 6, **scheme}
    return build_manifest(scores or sf.make_scores(), "demo", "mix", config.Scheme(**scheme), {})


def rows(manifest, kind=None):
    found = frontier_table(manifest).to_pylist()
    return [row for row in found if kind in (None, row["kind"])]


def every_recipe(formats):
    """(bits, damage) of every recipe of the synthetic model."""
    names = list(sf.MODULES)
    for choice in itertools.product([*formats, "NONE"], repeat=len(names)):
        bits = sum(
            sf.MODULES[name][1] * BITS[format] for name, format in zip(names, choice, strict=True)
        )
        damage = sum(
            sf.DAMAGE[name] * 1.005 * (sf.FACTORS[format] if format != "NONE" else 0)
            for name, format in zip(names, choice, strict=True)
        )
        yield bits / TOTAL, damage


def test_no_recipe_of_all_is_better_than_the_frontier_at_its_bits():
    recipes = list(every_recipe([FP8, INT4]))
    points = rows(decide(), "frontier")
    assert [point["point"] for point in points] == list(range(len(points)))
    assert (points[0]["effective_bits"], points[-1]["effective_bits"]) == (4.125, 16)
    for point in points:
        best = min(
            damage for bits, damage in recipes if bits <= point["effective_bits"] * (1 + 1e-12)
        )
        assert point["predicted_damage"] == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert point["lower_bound"] <= best * (1 + 1e-12)
        assert point["gap"] <= 1e-9


def test_baselines_are_what_their_names_say():
    manifest = decide()
    handles = list(manifest.layer_sensitivity)
    found = {row["label"]: row for row in rows(manifest) if row["format"]}
    # Block 0 is the first and the last one of both towers: the patch embedding alone is left.
    edges = found[f"{FP8} with first and last block and head kept"]
    assert dict(zip(handles, edges["recipe"], strict=True)) == {
        handle: FP8 if "patch_embed" in handle else "NONE" for handle in handles
    }
    everywhere = found[f"{INT4} everywhere"]
    assert everywhere["recipe"] == [INT4] * 7
    assert everywhere["effective_bits"] == 4.125
    assert everywhere["within_budget"]
    head = found[f"{FP8} with the head kept"]
    bits = (8 * (TOTAL - 131072) + 16 * 131072) / TOTAL
    assert head["effective_bits"] == pytest.approx(bits)
    assert not head["within_budget"]
    best = min(
        damage for found_bits, damage in every_recipe([FP8, INT4]) if found_bits <= bits + 1e-9
    )
    assert head["lower_bound"] <= best
    assert head["gap"] >= (head["predicted_damage"] - best) / head["predicted_damage"] - 1e-12


def test_the_scheme_stands_in_it_once_with_its_own_recipe():
    manifest = decide()
    (row,) = rows(manifest, "scheme")
    chosen = [group.selected.split("(")[0] for group in manifest.layer_sensitivity.values()]
    assert row["recipe"] == chosen
    assert row["predicted_damage"] == manifest.autoquant_state.score
    assert row["effective_bits"] == manifest.autoquant_state.constraints["effective_bits"]
    assert row["within_budget"]
    assert row["recipe_digest"] == recipe_digest(
        dict(zip(manifest.layer_sensitivity, chosen, strict=True))
    )


def test_groups_that_may_not_be_quantized_are_in_no_recipe():
    manifest = decide(exclude=["lm_head"], effective_bits=12)
    head = list(manifest.layer_sensitivity).index("lm_head.quant_recipe")
    assert {row["recipe"][head] for row in rows(manifest)} == {"NONE"}


def test_the_interval_is_that_of_the_batches_sums():
    """All groups rise and fall together over the batches, so their errors add up."""
    manifest = decide()
    (row,) = rows(manifest, "scheme")
    totals = [
        row["predicted_damage"] / 1.005 * t * s for t, s in zip(sf.TOKENS, sf.SPREAD, strict=True)
    ]
    ratio = sum(totals) / 40
    residuals = [total - ratio * t for total, t in zip(totals, sf.TOKENS, strict=True)]
    error = math.sqrt(4 / 3 * sum(r * r for r in residuals)) / 40
    margin = stats.t.ppf(0.975, 3) * error
    assert row["damage_low"] == pytest.approx(row["predicted_damage"] - margin)
    assert row["damage_high"] == pytest.approx(row["predicted_damage"] + margin)
    assert manifest.autoquant_state.score_low == pytest.approx(row["damage_low"])


def test_independent_noise_cancels_in_a_sum():
    scores = sf.make_scores(formats=(FP8,))
    handles = list(scores.formats[FP8].groups)
    for number, handle in enumerate(handles[:6]):
        # Pairs whose noise is opposite: the sum is the same in every batch.
        sign = 1 if number % 2 else -1
        scores.formats[FP8].groups[handle].batch_scores = [
            tokens * (1 + sign * 0.5 * (-1) ** batch) for batch, tokens in enumerate(sf.TOKENS)
        ]
    scores.formats[FP8].groups[handles[6]].batch_scores = [float(t) for t in sf.TOKENS]
    (row,) = rows(decide(scores, quant_formats=[FP8], effective_bits=8), "scheme")
    assert row["predicted_damage"] == pytest.approx(7.0, rel=0.2)
    assert row["damage_high"] - row["damage_low"] < 1e-9


def test_one_batch_has_no_interval():
    scores = sf.make_scores()
    for entry in scores.formats.values():
        entry.batches.tokens = [40]
        for group in entry.groups.values():
            group.batch_scores = [sum(group.batch_scores)]
    (row,) = rows(decide(scores), "scheme")
    assert row["damage_low"] is row["damage_high"] is None
    with pytest.raises(LayersenseError, match=r"`risk: 1` needs a standard error"):
        decide(scores, risk=1.0)


def test_formats_measured_on_other_batches_add_their_errors():
    scores = sf.make_scores()
    one = decide(scores).autoquant_state
    entry = scores.formats[INT4]
    # INT4 after a back-off: the same rows in twice as many batches.
    entry.batches.tokens = [half for t in sf.TOKENS for half in (t / 2, t / 2)]
    for group in entry.groups.values():
        group.batch_scores = [half for s in group.batch_scores for half in (s / 2, s / 2)]
    two = decide(scores).autoquant_state
    assert two.score == pytest.approx(one.score)
    assert two.score_low is not None
    assert two.score_low < two.score < two.score_high


def noisy(handle, format, factor):
    """Scores whose ``handle`` is as before on average under ``format`` and wild between batches."""
    scores = sf.make_scores(formats=(FP8, INT4))
    group = scores.formats[format].groups[handle]
    total = sum(group.batch_scores)
    group.batch_scores = [
        total * tokens / 40 * (1 + factor * (-1) ** batch) for batch, tokens in enumerate(sf.TOKENS)
    ]
    return scores


def test_risk_avoids_what_is_uncertain_and_keeps_what_is_predicted_apart():
    handle = "model.language_model.layers.0.self_attn.q_proj.quant_recipe"
    scores = noisy(handle, INT4, 8.0)
    budget = 7.5
    calm, wary = (decide(scores, effective_bits=budget, risk=risk) for risk in (0.0, 2.0))
    plain = calm.layer_sensitivity[handle].selected.split("(")[0]
    careful = wary.layer_sensitivity[handle].selected.split("(")[0]
    assert (plain, careful) == (INT4, FP8)
    state = wary.autoquant_state
    assert state.score >= calm.autoquant_state.score
    errors = sum(
        group.scores_se[group.formats.index(group.selected)]
        for group in wary.layer_sensitivity.values()
    )
    assert state.minimized == pytest.approx(state.score + 2 * errors)
    assert state.lower_bound <= state.minimized
    (row,) = rows(wary, "scheme")
    assert row["minimized"] == pytest.approx(state.minimized)


def test_flips_are_the_groups_whose_choice_other_rows_could_turn():
    # Noise that all groups share turns nothing.
    assert not any(g.flips_to for g in decide(effective_bits=7.5).layer_sensitivity.values())
    handle = "model.language_model.layers.0.self_attn.q_proj.quant_recipe"
    unsure = decide(noisy(handle, INT4, 8.0), effective_bits=7.5)
    group = unsure.layer_sensitivity[handle]
    assert group.flips_to is not None
    assert group.flips_to != group.selected.split("(")[0]


def test_the_knee_is_farthest_below_the_line():
    # From (0, 10) to (10, 0); (2, 3) is 5 below the line, (5, 1.5) is 3.5.
    assert knee([0, 2, 5, 10], [10, 3, 1.5, 0]) == 1
    assert knee([0, 5, 10], [10, 5, 0]) is None
    assert knee([0, 10], [1, 0]) is None
    (row,) = (row for row in rows(decide()) if row["knee"])
    assert row["kind"] == "frontier"


def test_many_corners_are_thinned_evenly():
    random = np.random.default_rng(0)
    costs = np.tile([4.125, 8.0, 16.0], (300, 1)) * random.choice([1, 4], (300, 1))
    scores = np.sort(10 ** random.uniform(-6, 3, (300, 3)), axis=1)[:, ::-1].copy()
    scores[:, -1] = 0
    problem = Problem(scores, costs)
    points = corners(problem, 64)
    assert 64 <= len(points) <= 128
    assert points[0].cost == pytest.approx(costs[:, 0].sum())
    assert points[-1].score == 0
    assert all(a.cost < b.cost for a, b in itertools.pairwise(points))
    assert all(a.score > b.score for a, b in itertools.pairwise(points))
    for point in points[::16]:
        assert point.gap <= 1e-9
        assert solve(problem, point.cost).score == pytest.approx(point.score, rel=1e-9)


option = st.tuples(st.integers(0, 99), st.integers(0, 40))


@given(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_corners_and_bounds_agree_with_brute_force(groups):
    problem = Problem.of(
        [[float(score) for score, _ in group] for group in groups],
        [[float(cost) for _, cost in group] for group in groups],
    )
    everything = [
        (sum(cost for _, cost in choice), sum(score for score, _ in choice))
        for choice in itertools.product(*groups)
    ]
    for point in corners(problem, 64):
        best = min(score for cost, score in everything if cost <= point.cost)
        assert point.score == best
        assert point.lower_bound <= best
    for budget in (0, 10, 30, 80):
        possible = [score for cost, score in everything if cost <= budget]
        (bound,) = lower_bounds(problem, [budget])
        assert bound <= min(possible) if possible else math.isinf(bound)


def test_objective_max_has_a_frontier_of_its_own():
    manifest = decide(objective="max", effective_bits=8)
    points = rows(manifest, "frontier")
    recipes = {}
    names = list(sf.MODULES)
    for choice in itertools.product([FP8, INT4, "NONE"], repeat=len(names)):
        pairs = list(zip(names, choice, strict=True))
        bits = sum(sf.MODULES[name][1] * BITS[format] for name, format in pairs) / TOTAL
        recipes[choice] = (
            bits,
            max(sf.DAMAGE[n] * 1.005 * (sf.FACTORS[f] if f != "NONE" else 0) for n, f in pairs),
        )
    for point in points:
        allowed = point["effective_bits"] * (1 + 1e-12)
        best = min(worst for bits, worst in recipes.values() if bits <= allowed)
        assert point["predicted_damage"] == pytest.approx(best)
    # Of the smallest recipe the head is the worst, and the interval is that of its score.
    error = manifest.layer_sensitivity["lm_head.quant_recipe"].scores_se[0]
    margin = stats.t.ppf(0.975, 3) * error
    assert points[0]["damage_high"] == pytest.approx(points[0]["predicted_damage"] + margin)


def test_the_file_says_its_units_and_whose_recipes_it_holds(tmp_path):
    manifest = decide()
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    write_frontier(tmp_path / "manifest.json", tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.schema.remove_metadata().equals(module.FRONTIER.remove_metadata())
    metadata = table.schema.metadata
    assert json.loads(metadata[b"layersense.handles"]) == list(manifest.layer_sensitivity)
    assert metadata[b"layersense.budget_unit"] == b"effective bits"
    assert set(json.loads(metadata[b"layersense.units"])) <= set(table.column_names)
    write_frontier(tmp_path / "manifest.json", tmp_path / "again.parquet")
    assert (tmp_path / "f.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_a_menu_of_a_manifest_is_the_one_it_was_decided_over():
    manifest = decide(exclude=["lm_head"], effective_bits=12)
    menu = Menu.of_manifest(manifest)
    assert menu.options[-1] == ["NONE"]
    assert menu.options[0] == [INT4, FP8, "NONE"]
    recipe = menu.recipe(menu.choice(dict.fromkeys(menu.handles, INT4)))
    assert set(recipe.values()) == {INT4, "NONE"}
