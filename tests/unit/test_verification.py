"""What to verify, how it is measured, and what the table says of it."""

import itertools
import json
import math

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import score_files as sf
import torch
from result_files import measured
from scipy import stats
from tiny_models import CAPTIONS, resolve_folder, save_images, save_tiny_llama, save_tiny_qwen2_5_vl

from layersense import config
from layersense.calibration.database import Row
from layersense.errors import LayersenseError
from layersense.models.tasks import get_task
from layersense.models.tasks.metrics import TopChoice, unit_sizes
from layersense.models.tasks.protocol import IGNORED, Batch, Sampling
from layersense.quantization.formats import NONE, known_formats
from layersense.recipes.baselines import outer_first, random_recipes
from layersense.recipes.decide import build_manifest
from layersense.recipes.menu import Menu
from layersense.scoring.in_progress import InProgress
from layersense.verification import measure as module
from layersense.verification.analysis import (
    Correlation,
    Parts,
    correlate,
    difference_interval,
    mean_with_interval,
    repeatability,
)
from layersense.verification.measure import Measurer, kl_divergence
from layersense.verification.plan import Whole, make_plan, pick_groups
from layersense.verification.replay import Calibration, Switchboard
from layersense.verification.store import METRICS_VERSION, Completed
from layersense.verification.table import (
    SUMMARY_KEY,
    _findings,
    by_photograph,
    read_summary,
    verification_table,
)

FP8, INT8, INT4 = sf.FORMATS


def decide(scores=None, name="mix", **scheme):
    scheme = {"quant_formats": [FP8, INT4], "effective_bits": 6, **scheme}
    return build_manifest(scores or sf.make_scores(), "demo", name, config.Scheme(**scheme), {})


# --- plan ---


def test_groups_are_spread_over_subsystems_kinds_and_scores():
    modules, damage = {}, {}
    for block in range(30):
        for kind in ("mlp.down_proj", "self_attn.o_proj"):
            name = f"model.language_model.layers.{block}.{kind}"
            modules[name], damage[name] = ([name], 1024), 1.0 + block
    modules["lm_head"], damage["lm_head"] = (["lm_head"], 4096), 7.0
    manifest = decide(sf.make_scores(modules, damage), effective_bits=8)
    picked = pick_groups(manifest, FP8, 20)
    kinds = [manifest.layer_sensitivity[handle].kind for handle in picked]
    assert kinds.count("lm_head") == 1
    assert kinds.count("down") == kinds.count("o_proj") == 10
    for kind in ("mlp.down_proj", "self_attn.o_proj"):
        blocks = {int(handle.split(".")[3]) for handle in picked if kind in handle}
        assert {0, 29} <= blocks
    assert picked == [handle for handle in manifest.layer_sensitivity if handle in picked]


def test_an_edited_budget_or_coverage_picks_the_same_groups():
    one, other = decide(), decide(effective_bits=9, exclude=["lm_head"])
    assert pick_groups(one, FP8, 4) == pick_groups(other, FP8, 4)


def test_a_quantized_cache_is_in_every_recipe_of_its_scheme_and_stands_alone_once():
    plain, cached = (make_plan([decide(kv_cache=name)], OPTIONS) for name in ("none", "fp8"))
    assert {planned.kv_cache for planned in cached.recipes} == {"fp8"}
    assert {planned.kv_cache for planned in plain.recipes} == {"none"}
    (alone,) = (planned for planned in cached.recipes if planned.role == "cache")
    assert set(alone.recipe.values()) == {"NONE"}
    assert not {planned.digest for planned in plain.recipes} & {
        planned.digest for planned in cached.recipes
    }
    assert plain.singles == cached.singles


def test_unreached_groups_are_not_verified():
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual", "not_called")
    assert not any(
        "visual" in handle for handle in pick_groups(decide(scores, effective_bits=9), FP8, 40)
    )


def test_a_budget_edit_keeps_what_does_not_depend_on_it():
    def digests(bits, *roles):
        plan = make_plan([decide(effective_bits=bits)], config.Verify())
        return {planned.digest for planned in plan.recipes if planned.role in roles}

    fixed = ("frontier", "uniform", "head_kept", "edges_kept", "rival")
    assert digests(6, *fixed) == digests(8, *fixed)
    assert not digests(6, "random") & digests(8, "random")


def test_rivals_have_no_more_bits_than_what_they_are_compared_with():
    plan = make_plan([decide()], config.Verify())
    by_label = {planned.label: planned for planned in plan.recipes}
    rivals = [planned for planned in plan.recipes if planned.role == "rival"]
    assert rivals
    for rival in rivals:
        baseline = by_label[rival.rival_of]
        assert rival.effective_bits <= baseline.effective_bits * (1 + 1e-9)
        assert rival.predicted <= baseline.predicted


def test_a_budget_is_spent_from_the_outside_in():
    names = [f"model.language_model.layers.{block}.self_attn.o_proj" for block in range(5)]
    modules = {name: ([name], 1024) for name in [*names, "lm_head"]}
    scores = sf.make_scores(modules, dict.fromkeys(modules, 1.0))
    manifest = decide(scores, effective_bits=9.5)
    menu = Menu.of_manifest(manifest)
    # Six groups of the same size at 4.125 bits leave 32.25: the head and the first block take
    # 11.875 each, the last block and the second 3.875 each, and 0.75 is too little for another.
    recipe = outer_first(menu, manifest.layer_sensitivity, menu.total * 9.5 / 16)
    assert list(recipe.values()) == [NONE, FP8, INT4, INT4, FP8, NONE]
    assert outer_first(menu, manifest.layer_sensitivity, menu.total * 3.9 / 16) is None
    planned = [p for p in make_plan([manifest], OPTIONS).recipes if p.role == "outer_first"]
    assert [p.effective_bits <= 9.5 for p in planned] == [True]


def test_random_recipes_have_the_bits_and_respect_the_scheme():
    menu = Menu.of_manifest(decide(exclude=["lm_head"], effective_bits=12))
    recipes = random_recipes(menu, 11.5, 5, width=0.5)
    assert recipes
    for recipe in recipes:
        assert abs(menu.effective_bits(menu.choice(recipe)) - 11.5) <= 0.5
        assert recipe["lm_head.quant_recipe"] == "NONE"
    assert all(a != b for a, b in itertools.combinations(recipes, 2))
    assert recipes == random_recipes(menu, 11.5, 5, width=0.5)


# --- measuring ---


def test_kl_is_that_of_the_definition_and_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(7, 50, generator=generator)
    after = before + 0.1 * torch.randn(7, 50, generator=generator)
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (before, after))
    np.testing.assert_allclose(kl_divergence(before, after), (p * np.log(p / q)).sum(-1), rtol=1e-9)
    # Far below float32's rounding of a log-probability.
    tiny = before.clone()
    tiny[:, 0] += 1e-5
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (before, tiny))
    expected = stats.entropy(p, q, axis=-1)
    np.testing.assert_allclose(kl_divergence(before, tiny), expected, rtol=1e-2)
    assert expected.max() < 1e-10


def test_kl_in_chunks_is_the_same(monkeypatch):
    before, after = torch.randn(9, 30), torch.randn(9, 30)
    whole = kl_divergence(before, after)
    monkeypatch.setattr(module, "CHUNK", 60)
    assert torch.equal(kl_divergence(before, after), whole)


def batch_of(labels, n_samples):
    return Batch(
        inputs={}, labels=labels, n_tokens=1, n_samples=n_samples, n_padding=0, n_truncated=0
    )


def test_units_are_samples_where_positions_say_so():
    labels = torch.tensor([[5, 6, 7, IGNORED], [IGNORED, 5, IGNORED, IGNORED]])
    assert unit_sizes(batch_of(labels, 2), 3) == [2, 1]  # shifted by one, as language models do
    assert unit_sizes(batch_of(labels, 2), 4) == [3, 1]  # not shifted, as encoder-decoders do
    assert unit_sizes(batch_of(torch.tensor([3, 4, 5]), 3), 3) == [1, 1, 1]
    assert unit_sizes(batch_of(torch.zeros(2, 4, 4), 2), 32) == [16, 16]
    assert unit_sizes(batch_of(labels, 2), 7) == [7]
    # Of a mask the labelled pixels of each photograph, also where half of all would be even.
    masks = torch.tensor([[[1, IGNORED], [IGNORED, IGNORED]], [[1, 1], [2, IGNORED]]])
    assert unit_sizes(batch_of(masks, 2), 4) == [1, 3]


def make_board(task_name, checkpoint, rows, sampling):
    from test_replay import MODULES, TYPES

    task = get_task(task_name)
    loaded = task.load(checkpoint, dtype="float32", device="cpu")
    batches = task.batches(loaded, rows, sampling, 2)
    data = Calibration(task, batches, torch.device("cpu"), torch.float32)
    if task_name != "causal-lm":
        names = [
            name
            for name, child in loaded.model.named_modules()
            if isinstance(child, torch.nn.Linear)
        ]
        modules = {f"{name}.quant_recipe": [name] for name in names}
        types = dict.fromkeys(names, "Linear")
    else:
        modules, types = MODULES, TYPES
    board = Switchboard.of(loaded.model, modules)
    for name in (FP8, INT4):
        board.calibrate(known_formats()[name], list(modules), types, data)
    return board, data


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("llama"))
    rows = [Row(image_path=None, caption=text, position=i) for i, text in enumerate(CAPTIONS)]
    sampling = Sampling(max_length=16, modality="text")
    return make_board("causal-lm", resolve_folder(folder, "causal-lm"), rows, sampling)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    images = save_images(folder, ((64, 48), (48, 64), (56, 56), (80, 64)))
    rows = [
        Row(image_path=path, caption=text, position=i)
        for i, (path, text) in enumerate(zip(images, CAPTIONS, strict=False))
    ]
    checkpoint = resolve_folder(save_tiny_qwen2_5_vl(folder / "model"), "image-text-to-text")
    sampling = Sampling(max_length=128, modality="image_text")
    return make_board("image-text-to-text", checkpoint, rows, sampling)


def measurer(fixture):
    board, data = fixture
    return Measurer(
        board,
        data.task,
        data.batches,
        data.device,
        data.dtype,
        metrics=[TopChoice("token accuracy")],
    )


def test_measures_are_those_of_the_definition(llama):
    board, data = llama
    handle = "lm_head.quant_recipe"
    recipe = dict.fromkeys(board.modules, INT4)
    before, alone, whole = measurer(llama).measure([(FP8, handle)], {"all": Whole(recipe)})
    for damage, switched in ((alone[FP8, handle], {handle: FP8}), (whole["all"], recipe)):
        kl, agree, loss, correct = 0.0, 0, 0.0, 0
        for batch in data.batches:
            board.clear()
            with torch.no_grad():
                plain = data.task.forward(board.model, batch).logits[:, :-1].flatten(0, 1)
                board.switch(switched)
                found = data.task.forward(board.model, batch).logits[:, :-1].flatten(0, 1)
            targets = batch.labels[:, 1:].flatten()
            p, q = torch.log_softmax(plain.double(), -1), torch.log_softmax(found.double(), -1)
            kl += float((p.exp() * (p - q)).sum())
            agree += int((plain.argmax(-1) == found.argmax(-1)).sum())
            correct += int((found.argmax(-1) == targets).sum())
            loss -= float(q[torch.arange(len(targets)), targets].sum())
        assert sum(damage.kl) == pytest.approx(kl, rel=1e-9)
        assert kl > 0
        assert sum(damage.agree) == agree
        assert sum(damage.correct) == correct
        assert sum(damage.loss) == pytest.approx(loss, rel=1e-5)
        if damage is whole["all"]:  # groups alone are not judged by the task's metric
            (metric,) = damage.metrics
            assert metric.value == pytest.approx(correct / sum(before.positions))
            assert metric.difference == pytest.approx(
                (correct - sum(before.correct)) / sum(before.positions)
            )
            assert damage.metrics_version == METRICS_VERSION
        else:
            assert (damage.metrics, damage.metrics_version) == ([], 0)
    assert before.metrics[0].value == pytest.approx(sum(before.correct) / sum(before.positions))
    assert len(before.positions) == sum(batch.n_samples for batch in data.batches)
    assert sum(before.positions) == sum(batch.n_tokens for batch in data.batches)


@pytest.mark.parametrize("name", ["llama", "vlm"])
def test_reusing_the_forward_before_a_layer_changes_nothing(name, request):
    fixture = request.getfixturevalue(name)
    board, _ = fixture
    handles = list(board.modules)
    singles = [(FP8, handle) for handle in (*handles[:3], *handles[-4:])]
    fast = measurer(fixture)
    _, shared, _ = fast.measure(singles, {})
    assert fast.exact_reuse
    slow = measurer(fixture)
    slow.exact_reuse = False
    _, full, _ = slow.measure(singles, {})
    assert shared == full


def test_reuse_skips_the_blocks_before_the_layer(llama):
    board, data = llama
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(board.model.model.layers)
    ]
    try:
        runner = measurer((board, data))
        batch = data.batches[0]
        with module.Trace(board) as trace, torch.no_grad():
            data.task.forward(board.model, batch)
        assert calls == [0, 1]
        with trace.reuse("model.layers.1.mlp.down_proj.quant_recipe"), torch.no_grad():
            data.task.forward(runner.board.model, batch)
        assert calls == [0, 1, 1]
        with trace.reuse("model.layers.0.mlp.down_proj.quant_recipe"), torch.no_grad():
            data.task.forward(runner.board.model, batch)
        assert calls == [0, 1, 1, 0, 1]
    finally:
        for hook in hooks:
            hook.remove()


# --- analysis ---


def test_means_are_ratios_of_sums_with_an_interval_around_them():
    mean, low, high = mean_with_interval([2.0, 4.0, 6.0], [1, 2, 3])
    assert (mean, low, high) == (2.0, 2.0, 2.0)
    mean, low, high = mean_with_interval([1.0, 9.0, 5.0, 3.0], [2, 2, 2, 2])
    assert mean == 18 / 8
    assert low < mean < high
    assert mean_with_interval([1.0, None], [1, 1]) == (None, None, None)
    assert mean_with_interval([3.0], [2]) == (1.5, None, None)


def test_paired_differences_are_tighter_than_their_parts():
    noise = np.random.default_rng(0).uniform(1, 100, 40)
    low, high = difference_interval(noise.tolist(), (noise + 1).tolist(), [1] * 40)
    assert (low, high) == pytest.approx((1, 1))
    assert difference_interval([None, 1.0], [1.0, 1.0], [1, 1]) == (-math.inf, math.inf)


def test_correlations_agree_with_scipy():
    random = np.random.default_rng(1)
    x = 10 ** random.uniform(-6, 0, 40)
    y = x * random.uniform(0.2, 5, 40)
    found = correlate(FP8, None, x.tolist(), y.tolist())
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found.spearman_low < found.spearman < found.spearman_high <= 1
    assert correlate(FP8, None, [1, 2, 3], [1, 2, 3]) is None
    assert correlate(FP8, None, [1.0] * 9, list(range(9))) is None


def test_the_order_of_what_matters_is_told_apart_from_that_of_the_rest():
    damages = [1e-9 * n for n in range(1, 11)] + [1.0, 2.0, 3.0, 4.0, 5.0]
    scores = [1e-9 * n for n in range(10, 0, -1)] + [1.0, 2.0, 3.0, 4.0, 5.0]
    found = correlate(FP8, None, scores, damages)
    assert found.spearman < 0.9
    assert (found.main_groups, found.spearman_main) == (5, pytest.approx(1.0))
    assert found.ceiling is None
    few = correlate(FP8, None, [1.0, 2.0, 3.0, 4.0, 5.0], [1e-9, 1e-9, 1e-9, 1e-9, 1.0])
    assert (few.main_groups, few.spearman_main) == (1, None)


def test_what_a_measurement_repeats_is_what_another_one_shows():
    random = np.random.default_rng(0)
    truth = random.normal(size=(60, 1))
    weights = np.full(16, 2.0)

    def measure():
        return Parts(truth * 2 + random.normal(0, 5, (60, 16)), weights)

    repeated = [repeatability(measure()) for _ in range(20)]
    seen = []
    for _ in range(200):
        one, other = measure().sums.sum(axis=1), measure().sums.sum(axis=1)
        seen.append(stats.spearmanr(one, other).statistic)
    assert 0.5 < np.mean(seen) < 0.95
    assert np.mean(repeated) == pytest.approx(np.mean(seen), abs=0.05)
    # And a perfect score, measured without noise, shows the root of it.
    perfect = [stats.spearmanr(truth[:, 0], measure().sums.sum(axis=1)).statistic for _ in seen]
    assert np.mean(perfect) == pytest.approx(np.sqrt(np.mean(repeated)), abs=0.05)
    assert repeatability(Parts(np.ones((9, 8)), np.ones(8))) is None
    assert repeatability(Parts(truth[:, :1] * np.ones(3), np.ones(3))) is None
    assert repeatability(Parts(truth * np.ones(8), np.ones(8))) == pytest.approx(1.0)
    assert repeatability(Parts(np.full((9, 8), np.nan), np.ones(8))) is None


def test_a_low_correlation_says_whether_more_rows_would_settle_it():
    def finding(**keys):
        base = {"format": FP8, "subsystem": None, "groups": 36, "spearman": 0.8, "kendall": 0.6}
        bounds = {
            f"{name}_{end}": 0.7 for name in ("spearman", "kendall") for end in ("low", "high")
        }
        given = {"main_groups": 20, "spearman_main": 0.8, **base, **bounds, **keys}
        (found,) = _findings([Correlation(**given)])
        assert (found.code, found.formats) == ("score-predicts-badly", [FP8])
        return found

    harmless = finding(spearman_main=0.96)
    assert harmless.severity == "info"
    assert "ρ = 0.96 over the 20 of them that do 99.9 % of the damage" in harmless.what
    assert finding().severity == "warning"
    noisy = finding(score_repeats=0.9, damage_repeats=0.49)
    assert "would show 0.66: too few rows" in noisy.why
    assert noisy.fix.startswith("Verify on more rows")
    assert finding(score_repeats=0.49, damage_repeats=0.9).fix.startswith("Score more rows")
    wrong = finding(score_repeats=0.98, damage_repeats=0.98)
    assert "not for want of rows" in wrong.why


def test_units_of_one_photograph_are_drawn_together():
    manifest = decide()
    alone = measured([manifest], OPTIONS)
    together = measured([manifest], OPTIONS)
    together.before.photographs = [7, 3, 7, 3]
    joined = by_photograph(together)
    before, after = alone.before, joined.before
    assert before.positions == [3, 5, 4, 8]
    assert (after.positions, after.correct, after.photographs) == ([7, 13], [4, 6], [7, 3])
    kl = alone.singles[FP8]["lm_head.quant_recipe"].damage.kl
    assert joined.singles[FP8]["lm_head.quant_recipe"].damage.kl == pytest.approx(
        [kl[0] + kl[2], kl[1] + kl[3]]
    )
    tables = [verification_table([manifest], found, OPTIONS) for found in (alone, together)]
    one, other = (
        next(row for row in table.to_pylist() if row["label"] == f"lm_head under {FP8}")
        for table in tables
    )
    same = ("kl", "loss", "top1_agreement", "top1_accuracy")
    assert [one[name] for name in same] == pytest.approx([other[name] for name in same])
    ends = mean_with_interval([kl[0] + kl[2], kl[1] + kl[3]], [7, 13])
    assert (other["kl"], other["kl_low"], other["kl_high"]) == pytest.approx(ends)
    assert [read_summary_of(table).photographs for table in tables] == [None, 2]
    together.singles[FP8]["lm_head.quant_recipe"].damage.kl[2] = None
    assert by_photograph(together).singles[FP8]["lm_head.quant_recipe"].damage.kl[0] is None


# --- the table ---


OPTIONS = config.Verify(points=3, random=4)


def test_the_table_joins_layers_and_sets_measured_beside_predicted():
    manifest = decide()
    found = measured([manifest], OPTIONS)
    table = verification_table([manifest], found, OPTIONS)
    rows = table.to_pylist()
    before, *rest = rows
    assert (before["kind"], before["kl"]) == ("before", 0.0)
    assert before["perplexity"] == pytest.approx(math.exp(1.0))  # a loss of 20 over 20 tokens
    groups = [row for row in rest if row["kind"] == "group"]
    assert {(row["layer"], row["format"]) for row in groups} == {
        (name, format) for name in sf.MODULES for format in (FP8, INT4)
    }
    for row in groups:
        score = sf.DAMAGE[row["layer"]] * 1.005 * sf.FACTORS[row["format"]]
        assert row["predicted"] == pytest.approx(score)
        assert row["kl"] == pytest.approx(2 * score, rel=0.03)
        assert row["kl_low"] <= row["kl"] <= row["kl_high"]
        assert row["loss_difference"] == pytest.approx(0.25)
        assert row["top1_accuracy"] == pytest.approx(8 / 20)
    (own,) = (row for row in rest if row["role"] == "scheme")
    assert own["sum_of_singles"] == pytest.approx(own["kl"])
    accuracy, errors = own["metrics"]
    assert accuracy == {
        "name": "token accuracy", "unit": "share", "higher_is_better": True,
        "value": 0.4, "low": pytest.approx(0.35), "high": pytest.approx(0.44),
        "difference": -0.1, "difference_low": pytest.approx(-0.13),
        "difference_high": pytest.approx(-0.08),
    }  # fmt: skip
    assert (errors["name"], errors["value"], errors["low"]) == ("word errors", 14.25, None)
    assert [one["value"] for one in before["metrics"]] == [0.5, 12.5]
    assert all(row["metrics"] is None for row in groups)
    summary = read_summary_of(table)
    assert summary.verdicts[0].additivity == pytest.approx(1.0)
    overall = [entry for entry in summary.correlations if entry.subsystem is None]
    assert [entry.spearman for entry in overall] == pytest.approx([1.0, 1.0])
    assert summary.findings == []
    # Random recipes may hit the choice itself; what the solver chose against a baseline wins.
    assert {duel.outcome for duel in summary.duels if duel.ours != "mix"} == {"won"}
    sentence = summary.verdicts[0].sentence
    assert "random recipes, whose median KL is" in sentence
    # The recipe has its own bits, and the baselines theirs.
    assert (
        "; at its own bits the recipe does better than outer blocks first, at its bits" in sentence
    )
    assert f"; at the bits of each of these the solver's choice does better than {INT4}" in sentence


def read_summary_of(table):
    from layersense.verification.analysis import Summary

    return msgspec.json.decode(table.schema.metadata[SUMMARY_KEY], type=Summary)


def test_a_score_that_does_not_predict_is_a_finding_and_a_lost_duel_is_told():
    manifest = decide()
    # Whatever scores low does the damage.
    found = measured(
        [manifest], OPTIONS, scale=lambda h, f: sf.DAMAGE[h.removesuffix(".quant_recipe")] ** -2
    )
    table = verification_table([manifest], found, OPTIONS)
    summary = read_summary_of(table)
    assert {finding.code for finding in summary.findings} == {"score-predicts-badly"}
    assert any(duel.outcome == "lost" for duel in summary.duels)
    assert "does worse than" in summary.verdicts[0].sentence


def test_what_was_planned_and_not_measured_is_named(tmp_path):
    manifest = decide()
    found = measured([manifest], OPTIONS)
    del found.singles[FP8]["lm_head.quant_recipe"]
    (own,) = (planned for planned in make_plan([manifest], OPTIONS).recipes[:1])
    del found.recipes[own.digest]
    table = verification_table([manifest], found, OPTIONS)
    summary = read_summary_of(table)
    (finding,) = (entry for entry in summary.findings if entry.code == "not-verified")
    assert f"such as lm_head under {FP8}" in finding.what
    assert "not measured yet" in summary.verdicts[0].sentence
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(LayersenseError, match="cannot be read as a verification"):
        read_summary(tmp_path / "x.parquet")


def test_damage_that_is_not_finite_has_no_mean():
    manifest = decide()
    found = measured([manifest], OPTIONS)
    found.singles[FP8]["lm_head.quant_recipe"].damage.kl[1] = None
    rows = verification_table([manifest], found, OPTIONS).to_pylist()
    (row,) = (r for r in rows if r["layer"] == "lm_head" and r["format"] == FP8)
    assert row["kl"] is None
    assert json.dumps(row)


def own_damage(found, manifest):
    (own,) = (p for p in make_plan([manifest], OPTIONS).recipes if p.role == "scheme")
    return found.recipes[own.digest].damage


def test_loss_and_first_choices_have_intervals_too():
    manifest = decide()
    found = measured([manifest], OPTIONS)
    damage = own_damage(found, manifest)
    damage.loss, damage.agree = [14.0, 13.0], [3, 5, 2, 0]
    rows = verification_table([manifest], found, OPTIONS).to_pylist()
    (own,) = (row for row in rows if row["role"] == "scheme")
    # Two batches of 8 and 12 tokens: both drawn, the first twice (8 / 16), the second (6 / 24).
    assert own["loss_difference"] == pytest.approx(7 / 20)
    assert own["loss_difference_low"] == pytest.approx(0.25)
    assert own["loss_difference_high"] == pytest.approx(0.5)
    # Of 3, 5, 4 and 8 positions.
    assert own["top1_agreement"] == pytest.approx(0.5)
    assert 0 <= own["top1_agreement_low"] < 0.2
    assert own["top1_agreement_high"] == pytest.approx(1.0, abs=0.15)
    assert (rows[0]["loss_difference_low"], rows[0]["top1_agreement_high"]) == (0.0, 1.0)


def test_one_photograph_has_no_interval_and_decides_nothing():
    manifest = decide()
    found = measured([manifest], OPTIONS)
    found.before.photographs = [7, 7, 7, 7]
    table = verification_table([manifest], found, OPTIONS)
    summary = read_summary_of(table)
    assert summary.duels
    assert {(duel.outcome, duel.difference_low) for duel in summary.duels} == {("even", None)}
    assert "cannot be told apart on these rows from" in summary.verdicts[0].sentence
    rows = table.to_pylist()
    assert all(row["kl_low"] is None for row in rows if row["kind"] == "recipe")


def test_a_recipe_that_breaks_the_model_is_told_first():
    one, other = decide(name="one", effective_bits=6), decide(name="other", effective_bits=9)
    found = measured([one, other], OPTIONS)
    damage = own_damage(found, one)
    damage.kl[2], damage.loss[1] = None, None
    found.singles[INT4]["lm_head.quant_recipe"].damage.kl[1] = None
    summary = read_summary_of(verification_table([one, other], found, OPTIONS))
    broken, sound = summary.verdicts
    assert broken.sentence.startswith("With the recipe the model's outputs on these rows are not")
    assert [(f.code, f.severity) for f in broken.findings] == [("recipe-not-finite", "error")]
    assert not sound.findings
    assert "not finite" not in sound.sentence
    assert {d.outcome for d in summary.duels if d.ours == "one"} == {"lost"}
    (finding,) = (f for f in summary.findings if f.code == "damage-not-finite")
    assert (finding.layers, finding.formats) == (["lm_head"], [INT4])
    assert summary.findings_of([FP8]) == []


def test_what_breaks_the_model_loses():
    manifest = decide()
    found = measured([manifest], OPTIONS)
    (edges,) = (
        planned for planned in make_plan([manifest], OPTIONS).recipes
        if planned.role == "edges_kept" and planned.label.startswith(FP8)
    )  # fmt: skip
    found.recipes[edges.digest].damage.kl[0] = None
    summary = read_summary_of(verification_table([manifest], found, OPTIONS))
    (duel,) = (entry for entry in summary.duels if entry.theirs == edges.label)
    assert (duel.outcome, duel.kl_theirs) == ("won", None)


def test_a_recipe_is_not_compared_with_itself():
    # At 16 bits nothing is quantized, from the outside in or at random.
    manifest = decide(effective_bits=16)
    summary = read_summary_of(
        verification_table([manifest], measured([manifest], OPTIONS), OPTIONS)
    )
    assert not [duel for duel in summary.duels if duel.ours == "mix"]
    assert "random" not in summary.verdicts[0].sentence
    assert summary.verdicts[0].betterment is None  # nothing does no damage


def test_recipes_are_compared_within_the_budget_that_the_scheme_has(tmp_path):
    # Here INT4 is the slow one, so that what is as fast as FP8 has other bits.
    costs = {NONE: 4, FP8: 1, INT4: 3}
    lines = [f"{name},{format},{cost}" for name in sf.MODULES for format, cost in costs.items()]
    (tmp_path / "ms.csv").write_text("\n".join(["layer,format,cost", *lines]))
    table = {"file": str(tmp_path / "ms.csv"), "at_most": 15.0}
    manifest = decide(effective_bits=None, cost_table=table)
    summary = read_summary_of(
        verification_table([manifest], measured([manifest], OPTIONS), OPTIONS)
    )
    assert summary.verdicts[0].equal == "within the same ms"
    sentence = summary.verdicts[0].sentence
    assert "within the same ms the solver's choice does better than" in sentence
    assert "at the bits" not in sentence
    size = decide(effective_bits=None, size_gb=0.001)
    summary = read_summary_of(verification_table([size], measured([size], OPTIONS), OPTIONS))
    assert summary.verdicts[0].equal == "at equal size"
    sentence = summary.verdicts[0].sentence
    assert "at its own size the recipe does better than outer blocks first, at its size" in sentence


def test_the_file_round_trips(tmp_path):
    from layersense.manifests.schema import encode_manifest
    from layersense.verification.store import (
        context_digest,
        read_verification,
        write_verification,
    )
    from layersense.verification.table import write_verification_table

    manifest = decide()
    (tmp_path / "m.json").write_bytes(encode_manifest(manifest))
    found = measured([manifest], OPTIONS)
    write_verification(tmp_path / "v.json", found)
    assert read_verification(tmp_path / "v.json") == found
    settings = {"verify": OPTIONS.model_dump(mode="json"), "measured": {"heldout_samples": 4}}
    for name in ("one", "two"):
        write_verification_table(
            [tmp_path / "m.json"], tmp_path / "v.json", settings, tmp_path / name
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    # It was measured under other settings, until it was not.
    (stale,) = read_summary(tmp_path / "one").findings
    assert (stale.code, stale.severity) == ("verified-with-other-settings", "warning")
    found.before.digest = context_digest(
        settings["measured"], manifest.model.digest, manifest.dataset.digest
    )
    write_verification(tmp_path / "v.json", found)
    write_verification_table([tmp_path / "m.json"], tmp_path / "v.json", settings, tmp_path / "one")
    assert read_summary(tmp_path / "one").findings == []
    assert pq.read_table(tmp_path / "one").num_rows > 20
    (tmp_path / "v.json").write_text("{}")
    with pytest.raises(LayersenseError, match="is not a verification file of layersense"):
        read_verification(tmp_path / "v.json")


def test_the_html_report_shows_measured_beside_predicted(tmp_path, repository):
    from result_files import write_result

    from layersense.reports.html import write_page

    place = write_result(tmp_path)
    pq.write_table(
        verification_table([decide()], measured([decide()], OPTIONS), OPTIONS),
        tmp_path / "verification.parquet",
    )
    (tmp_path / "vega.js").write_text("")
    write_page(
        place / "layers.parquet",
        config.Report(),
        repository / "workflow/templates/report.html.j2",
        tmp_path / "vega.js",
        place / "report.html",
        place / "figures",
        place / "frontier.parquet",
        tmp_path / "verification.parquet",
    )
    text = (place / "report.html").read_text()
    summary = read_summary(tmp_path / "verification.parquet")
    assert summary.verdicts[0].sentence.split(",")[0] in text
    assert "KL on held-out rows" in text
    assert "not measured" not in text
    assert "FP8, all" in text
    assert ">Token accuracy</th>" in text
    assert ">Word errors (words)</th>" in text
    assert ">40.0 % (35.0 to 44.0)</td>" in text
    assert ">100.0 %</td>" in text
    assert ">\N{MINUS SIGN}10.0 (\N{MINUS SIGN}13.0 to \N{MINUS SIGN}8.0)</td>" in text
    assert "more is better, but of word errors less" in text


def markdown_report(folder, repository, **keys):
    """The report of a scheme that is verified."""
    from result_files import write_result, write_verification

    from layersense.reports.markdown import write_report

    place = write_result(folder, **keys)
    write_report(
        place / "manifest.json",
        place / "layers.parquet",
        place / "frontier.parquet",
        config.Report(),
        repository / "workflow/templates/layer-sensitivity-report.md.j2",
        folder / "report.md",
        write_verification(place),
    )
    return (folder / "report.md").read_text()


def test_the_markdown_report_shows_the_tasks_metrics_beside_each_recipe(tmp_path, repository):
    lines = markdown_report(tmp_path, repository).splitlines()
    (head,) = (n for n, line in enumerate(lines) if " Token accuracy |" in line)
    assert lines[head] == (
        "| Recipe | Bits | Token accuracy | Change, points | Word errors (words) | Change |"
    )
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[head:]))
    assert len(table) > 5
    assert {line.count("|") for line in table} == {table[0].count("|")}
    assert set(table[1]) == set("| -:")
    assert table[2] == "| unquantized | – | 50.0 % (45.0 to 54.0) | – | 12.5 | – |"
    told = "| 40.0 % (35.0 to 44.0) | −10.0 (−13.0 to −8.0) | 14.2 | – |"
    assert all(line.endswith(told.replace("−", "\N{MINUS SIGN}")) for line in table[3:])


def test_a_killed_measurement_goes_on_where_it_was(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("layersense.scoring.in_progress.SAVE_SECONDS", 0.0)
    board, data = llama
    singles = [(FP8, "lm_head.quant_recipe"), (INT4, "lm_head.quant_recipe")]
    recipes = {"all": Whole(dict.fromkeys(board.modules, INT4))}
    expected = measurer(llama).measure(singles, recipes)
    assert len(data.batches) > 1
    file = tmp_path / ".verification.json.in-progress"

    class KilledError(Exception):
        pass

    stopped = measurer(llama)
    whole_batch, measured = stopped._measure_batch, []

    def stop(batch, *arguments):
        if measured:
            raise KilledError
        measured.append(batch)
        whole_batch(batch, *arguments)

    stopped._measure_batch = stop
    with pytest.raises(KilledError):
        stopped.measure(singles, recipes, InProgress(file, "this", Completed))
    assert file.exists()

    again = measurer(llama)
    rest = []
    whole_of = again._measure_batch

    def count(batch, *arguments):
        rest.append(batch)
        whole_of(batch, *arguments)

    again._measure_batch = count
    assert again.measure(singles, recipes, InProgress(file, "this", Completed)) == expected
    assert len(rest) == len(data.batches) - 1
    # What another measurement left is not taken up.
    other = measurer(llama)
    assert other.measure(singles, recipes, InProgress(file, "other", Completed)) == expected


def test_the_report_says_what_a_quantized_cache_does(tmp_path, repository):
    text = markdown_report(tmp_path, repository, kv_cache="fp8")
    assert "which no score predicts: alone it has a KL of 0.50" in text
    # Measured damage gives the scheme's own recipe here, which no half of the rows chose.
    assert "| solved from measured damage |" in text
    assert "numbers here are too good" not in text
