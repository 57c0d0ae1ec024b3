"""The search for better recipes, over models whose damage is known in closed form."""

import itertools
import re
from zlib import crc32

import numpy as np
import pytest
import score_files as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from result_files import measured
from test_verification import FP8, INT4, OPTIONS, decide

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import encode_manifest, plain_name
from layersense.quantization.formats import NONE
from layersense.recipes.decide import with_recipe
from layersense.recipes.menu import Menu
from layersense.reports.measured import read_measured
from layersense.verification.analysis import Betterment
from layersense.verification.plan import make_plan, whole_digest
from layersense.verification.refine import halves, mean_kl, search, single_damages, write_refined
from layersense.verification.store import Damage, MeasuredRecipe, write_verification
from layersense.verification.table import REFINED, SOLVED, read_summary, verification_table

UNITS = 12


def chosen(manifest):
    return {h: plain_name(group.selected) for h, group in manifest.layer_sensitivity.items()}


def walk(manifest, kl_of, swaps, units=UNITS):
    """Measure what the search asks for until it is through; return it and all that was asked."""
    found = measured([manifest], OPTIONS)
    singles = make_plan([manifest], OPTIONS).singles
    found.before.positions = [10] * units

    def damage(recipe):
        kl = [10 * value for value in kl_of(recipe)]
        return Damage(digest="x", kl=kl, agree=[0] * units, correct=None, loss=[20.0, 20.0])

    for format, handles in singles.items():
        for handle in handles:
            found.singles[format][handle].damage = damage({handle: format})
    found.recipes = {}
    asked = []
    while wanted := search(manifest, found, singles, swaps).wanted:
        for recipe in wanted:
            digest = whole_digest(recipe, "none")
            assert digest not in found.recipes, "asked for what is measured"
            found.recipes[digest] = MeasuredRecipe(recipe=recipe, damage=damage(recipe))
            asked.append(recipe)
    return search(manifest, found, singles, swaps), asked, found


def additive(manifest, interaction=0.0, noise=0.0, seed=0):
    """Damage adds up, but for pairs of neighbours that are both quantized."""
    random = np.random.default_rng(seed)
    names = list(manifest.layer_sensitivity)
    alone = {(h, f): float(random.uniform(0.1, 2)) for h in names for f in (FP8, INT4)}
    pairs = {pair: float(random.uniform(-1, 3)) for pair in itertools.pairwise(names)}

    def kl_of(recipe):
        quantized = {handle: name for handle, name in recipe.items() if name != NONE}
        total = sum(alone[item] for item in quantized.items())
        total += interaction * sum(v for (a, b), v in pairs.items() if {a, b} <= set(quantized))
        total = max(total, 0.01)
        draw = np.random.default_rng(crc32(str(sorted(quantized.items())).encode()))
        return [total * (1 + noise * float(draw.normal())) for _ in range(UNITS)]

    return kl_of


def all_recipes(manifest):
    """Every recipe of the menu that costs no more than the scheme's own."""
    menu = Menu.of_manifest(manifest)
    limit = menu.budget_cost(menu.choice(chosen(manifest))) * (1 + 1e-9)
    for names in itertools.product(*menu.options):
        recipe = dict(zip(menu.handles, names, strict=True))
        if menu.budget_cost(menu.choice(recipe)) <= limit:
            yield recipe


@pytest.mark.parametrize("seed", range(4))
def test_where_damage_adds_up_the_solved_recipe_is_the_best_of_all(seed):
    manifest = decide(effective_bits=8)
    kl_of = additive(manifest, seed=seed)
    state, _, _ = walk(manifest, kl_of, swaps=0)
    best = min(kl_of(recipe)[0] for recipe in all_recipes(manifest))
    assert kl_of(state.solved)[0] == pytest.approx(best)
    assert state.refined is None
    assert state.measured == 0


@pytest.mark.parametrize("seed", range(4))
def test_swaps_find_what_interactions_hide(seed):
    manifest = decide(effective_bits=8)
    kl_of = additive(manifest, interaction=1.0, seed=seed)
    state, asked, _ = walk(manifest, kl_of, swaps=60)
    best = min(kl_of(recipe)[0] for recipe in all_recipes(manifest))
    own, solved, refined = (
        kl_of(recipe)[0] for recipe in (chosen(manifest), state.solved, state.refined)
    )
    assert refined <= min(own, solved)
    assert refined <= 1.05 * best
    assert state.measured <= 60
    limit = Menu.of_manifest(manifest).budget_cost(
        Menu.of_manifest(manifest).choice(chosen(manifest))
    )
    for recipe in asked:
        menu = Menu.of_manifest(manifest)
        assert menu.budget_cost(menu.choice(recipe)) <= limit * (1 + 1e-6)


def test_interactions_are_really_hidden_from_single_groups():
    """Else the test before proves nothing."""
    manifest = decide(effective_bits=8)
    gains = []
    for seed in range(4):
        kl_of = additive(manifest, interaction=1.0, seed=seed)
        state, _, _ = walk(manifest, kl_of, swaps=60)
        gains.append(kl_of(state.refined)[0] / kl_of(state.solved)[0])
    assert min(gains) < 0.9


def test_noise_is_not_worth_a_swap():
    """Each recipe's units are drawn around the same mean: nothing is better than anything."""
    manifest = decide(effective_bits=8)

    def kl_of(recipe):
        draw = np.random.default_rng(crc32(str(sorted(recipe.items())).encode()))
        return list(draw.uniform(0.5, 1.5, size=UNITS))

    state, _, found = walk(manifest, kl_of, swaps=12)
    tuning, _ = halves(UNITS)

    def on_tuning(recipe):
        entry = found.recipes[whole_digest(recipe, "none")]
        return mean_kl(entry.damage, found.before.positions, tuning)

    start = min((chosen(manifest), state.solved), key=on_tuning)
    assert state.refined == start or on_tuning(state.refined) < on_tuning(start)


@given(st.integers(0, 10_000), st.integers(1, 25))
@settings(max_examples=25, deadline=None)
def test_a_search_ends_is_told_again_alike_and_keeps_to_its_number(seed, swaps):
    manifest = decide(effective_bits=8)
    kl_of = additive(manifest, interaction=0.5, noise=0.1, seed=seed)
    state, asked, found = walk(manifest, kl_of, swaps)
    assert len(asked) <= swaps + 2  # the scheme's own and the solved one beside them
    assert state.measured <= swaps
    singles = make_plan([manifest], OPTIONS).singles
    assert search(manifest, found, singles, swaps) == state
    less = search(manifest, found, singles, swaps // 2)
    assert less.wanted == [] or less.measured < swaps


def test_groups_that_are_not_measured_go_by_their_score_in_units_of_damage():
    manifest = decide()
    found = measured([manifest], OPTIONS, scale=lambda handle, format: 3.0)
    menu = Menu.of_manifest(manifest)
    tuning, _ = halves(4)
    every = {format: list(menu.handles) for format in (FP8, INT4)}
    whole = single_damages(menu, manifest, found, every, tuning)
    few = {format: handles[::2] for format, handles in every.items()}
    partly = single_damages(menu, manifest, found, few, tuning)
    # Here damage is the same multiple of every score, so that the ratio says all.
    assert partly == pytest.approx(whole, rel=1e-6)
    assert (whole[:, -1] == 0).all()


def test_too_few_rows_give_no_search():
    manifest = decide()
    found = measured([manifest], OPTIONS)
    found.before.positions = found.before.positions[:3]
    assert search(manifest, found, {}, 5).solved is None


def test_another_recipe_of_the_menu_in_a_manifest():
    manifest = decide(effective_bits=8)
    menu = Menu.of_manifest(manifest)
    recipe = next(r for r in all_recipes(manifest) if r != chosen(manifest) and FP8 in r.values())
    other = with_recipe(manifest, recipe)
    assert chosen(other) == recipe
    bits = {FP8: 8, INT4: 4.125, NONE: 16}
    spent = sum(sf.MODULES[h.removesuffix(".quant_recipe")][1] * bits[f] for h, f in recipe.items())
    total = sum(size for _, size in sf.MODULES.values())
    assert other.autoquant_state.constraints["effective_bits"] == pytest.approx(spent / total)
    assert other.autoquant_state.budget.used == pytest.approx(spent / total)
    assert other.autoquant_state.score == pytest.approx(menu.damage(menu.choice(recipe)).score)
    saved = manifest.autoquant_state.checkpoint_bytes - other.autoquant_state.checkpoint_bytes
    assert saved == pytest.approx(2 * (manifest.autoquant_state.cost - other.autoquant_state.cost))
    assert {name: layer.format for name, layer in other.layers.items() if layer.quantized} == {
        module: recipe[handle]
        for handle, group in other.layer_sensitivity.items()
        for module in group.module_names
        if recipe[handle] != NONE
    }
    with pytest.raises(LayersenseError, match="takes more than the scheme's own"):
        with_recipe(manifest, dict.fromkeys(recipe, NONE))


def test_the_refined_manifest_and_the_words(tmp_path):
    manifest = decide(effective_bits=8)
    kl_of = additive(manifest, interaction=1.0, seed=1)
    state, _, found = walk(manifest, kl_of, swaps=20)
    options = config.Verify(**{**OPTIONS.model_dump(), "refine": 20})
    files = tmp_path / "manifest.json", tmp_path / "verification.json", tmp_path / "out.json"
    files[0].write_bytes(encode_manifest(manifest))
    write_verification(files[1], found)
    write_refined(files[0], files[1], options, files[2])
    assert chosen(read_own_manifest(files[2])) == state.refined
    for entry in found.recipes.values():
        entry.damage.agree = [0] * UNITS
    table = verification_table([manifest], found, options)
    rows = {row["role"]: row for row in table.to_pylist() if row["kind"] == "recipe"}
    assert rows["refined"]["kl"] == pytest.approx(kl_of(state.refined)[0])
    summary = read_summary_of(table, tmp_path)
    better = summary.verdicts[0].betterment
    assert better.kl == pytest.approx(kl_of(chosen(manifest))[0])
    assert better.own_ratio == pytest.approx(better.kl / better.kl_solved)
    assert better.refined_ratio == pytest.approx(kl_of(state.refined)[0] / kl_of(state.solved)[0])
    assert re.search(r"refined one comes to [\d.]+ times", better.sentence)
    # Half of the rows chose both, so that all rows flatter them.
    shown = read_measured(tmp_path / "verification.parquet", "mix", [FP8, INT4])
    assert re.search(
        f"recipes ({SOLVED} and {REFINED}|{REFINED} and {SOLVED}), so", shown.tuned_note
    )
    with pytest.raises(LayersenseError, match="`refine` of the run's `verify` is 0"):
        write_refined(files[0], files[1], OPTIONS, files[2])


@pytest.mark.parametrize(
    ("own", "refined", "words"),
    [
        ((1.2, 1.1, 1.3), None, "half of the rows that tuned neither, the recipe's KL is 1.2"),
        ((1.0, 1.0, 1.0), None, "Measured damage of single groups gives the very same recipe."),
        ((1.0, 1.0, 1.0), (0.9, 0.8, 0.95), "comes to 0.9 times (0.8 to 0.95) its KL on the h"),
        ((1.2, 1.1, 1.3), (1.0, 1.0, 1.0), "gives; none of 6 measured recipes is better than that"),
        ((0.7, 0.6, 0.9), (0.7, 0.6, 0.9), "; none of 6 measured recipes is better than the sch"),
    ],
)  # fmt: skip
def test_what_measuring_won_is_told_in_words(own, refined, words):
    names = ("refined_ratio", "refined_ratio_low", "refined_ratio_high")
    more = dict(zip(names, refined, strict=True)) if refined else {}
    better = Betterment(
        kl=1.0, kl_solved=1.0, measured=6,
        **dict(zip(("own_ratio", "own_ratio_low", "own_ratio_high"), own, strict=True)), **more,
    )  # fmt: skip
    assert words in better.sentence


def read_summary_of(table, folder):
    import pyarrow.parquet as pq

    pq.write_table(table, folder / "verification.parquet")
    return read_summary(folder / "verification.parquet")
