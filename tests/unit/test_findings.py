"""Each finding, provoked from data; and none from sound data."""

import ast
from pathlib import Path

import numpy as np
import pytest
import score_files as sf

import layersense
from layersense import config
from layersense.manifests.codes import Code
from layersense.manifests.findings import DETECTORS, Evidence, find
from layersense.manifests.stability import ranking_stability
from layersense.recipes.decide import build_manifest
from layersense.scoring.scores import Layer

FP8, INT8, INT4 = sf.FORMATS


def findings(scores, expected=None, **scheme):
    scheme = {"quant_formats": [FP8], "effective_bits": 16, **scheme}
    manifest = build_manifest(scores, "demo", "mix", config.Scheme(**scheme), expected or {})
    return {finding.code: finding for finding in manifest.findings}


def test_sound_scores_have_no_finding():
    assert findings(sf.make_scores(), quant_formats=list(sf.FORMATS)) == {}


@pytest.mark.parametrize(
    ("modality", "reached", "why", "fix"),
    [
        ("text", "not_called", "text alone", "image_text"),
        ("image_text", "not_called", "No calibration sample ran", "Add data"),
        ("image_text", "no_gradient", "no gradient", "kl_div"),
        ("image_text", "scored", "Gradients reach it and are zero", "labels"),
    ],
)
def test_a_subsystem_at_zero_is_explained(modality, reached, why, fix):
    scores = sf.make_scores()
    scores.dataset.modality = modality
    sf.set_reached(scores, "model.visual", reached)
    found = findings(scores)
    assert set(found) == {"subsystem-at-zero"}
    finding = found["subsystem-at-zero"]
    assert finding.severity == "warning"
    assert "All 3 groups of the vision subsystem" in finding.what
    assert why in finding.why
    assert fix in finding.fix
    assert finding.layers == [name for name in sf.MODULES if "visual" in name]


@pytest.mark.parametrize(
    ("reached", "why"), [("not_called", "No calibration sample"), ("no_gradient", "no gradient")]
)
def test_single_unreached_groups_are_named(reached, why):
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual.blocks.0.mlp", reached)
    found = findings(scores)
    assert set(found) == {"unreached-groups"}
    assert found["unreached-groups"].layers == ["model.visual.blocks.0.mlp.down_proj"]
    assert why in found["unreached-groups"].why


def test_a_true_zero_is_no_unreached_group():
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual.blocks.0.mlp", "scored")
    found = findings(scores)
    assert set(found) == {"zero-score"}
    assert found["zero-score"].layers == ["model.visual.blocks.0.mlp.down_proj"]


def test_layers_never_searched_come_with_their_reason():
    scores = sf.make_scores()
    for name, reason in (("embed", "no form"), ("pos", "no form"), ("norm", "it is a norm")):
        scores.layers[name] = Layer(module_type="X", n_weights=32_025, reason=reason)
    manifest = build_manifest(
        scores, "demo", "mix", config.Scheme(quant_formats=[FP8], effective_bits=16), {}
    )
    found = [finding for finding in manifest.findings if finding.code == "never-searched"]
    assert [finding.layers for finding in found] == [["embed", "pos"], ["norm"]]
    assert [finding.why for finding in found] == ["No form.", "It is a norm."]
    assert "2 layers with 15.4 % of the weights" in found[0].what


def test_reductions_for_memory_are_told_once_for_all_formats():
    scores = sf.make_scores()
    for entry in scores.formats.values():
        entry.back_offs = ["batch size 4 → 2"]
    found = findings(scores, quant_formats=[FP8, INT8])
    assert set(found) == {"reduced-for-memory"}
    assert f"{FP8} and {INT8} was measured: batch size 4 → 2." in found["reduced-for-memory"].what


def test_simulated_kernels():
    scores = sf.make_scores()
    scores.formats[FP8].kernel = "simulated"
    scores.formats[INT4].kernel = "compiled"
    found = findings(scores, quant_formats=[FP8, INT4])
    assert set(found) == {"simulated-kernel"}
    assert INT4 not in found["simulated-kernel"].what
    assert "nvcc" in found["simulated-kernel"].why


@pytest.mark.parametrize(("bits", "severity"), [(16, "info"), (4.2, "warning")])
def test_blocks_that_a_kernel_cuts_short_are_told(bits, severity):
    scores = sf.make_scores()
    for name, layer in scores.layers.items():
        # 3 × 3 kernels: a scale for each 3 weights, 4 + 16 / 3 bits. Rows of 128 are whole blocks.
        layer.shape = [64, 64, 3, 3] if "patch_embed" in name else [64, 256]
    found = findings(scores, quant_formats=[FP8, INT4], effective_bits=bits)
    assert set(found) == {"cut-blocks"}
    finding = found["cut-blocks"]
    assert finding.what == (
        f"Under {INT4} a weight of 1 layer takes up to 9.33 bits with its scales, not the 4.125 "
        "that are billed, because a row is shorter than a block; the recipe quantizes "
        f"{0 if bits == 16 else 1} of 1 so."
    )
    assert (finding.severity, finding.formats) == (severity, [INT4])
    assert finding.layers == ["model.visual.patch_embed.proj"]


@pytest.mark.parametrize(
    ("value", "code"), [(None, "score-not-finite"), (1e20, "score-clamped"), (9e19, None)]
)
def test_a_score_that_is_clamped_or_not_finite(value, code):
    scores = sf.make_scores()
    scores.formats[FP8].groups["lm_head.quant_recipe"].batch_scores[2] = value
    found = findings(scores)
    errors = [finding for finding in found.values() if finding.severity == "error"]
    assert [finding.code for finding in errors] == ([code] if code else [])
    assert all(finding.layers == ["lm_head"] for finding in errors)


def test_tied_weights():
    scores = sf.make_scores()
    scores.layers["embed"] = Layer(module_type="Embedding", n_weights=1, reason="an embedding")
    scores.layers["lm_head"].tied_to = "embed"
    found = findings(scores)
    assert found["tied-weights"].layers == ["lm_head", "embed"]
    scores.layers["other"] = Layer(
        module_type="Embedding", n_weights=1, reason="an embedding", tied_to="embed"
    )
    scores.layers["lm_head"].tied_to = None
    assert "tied-weights" not in findings(scores)  # neither of the two is searched


@pytest.mark.parametrize(("share", "found"), [(0.51, True), (0.5, False)])
def test_high_padding(share, found):
    scores = sf.make_scores()
    scores.formats[FP8].batches.padding_share = share
    assert ("high-padding" in findings(scores)) is found


@pytest.mark.parametrize(("cut", "severity"), [(0, None), (1, "info"), (2, "warning")])
def test_truncated_texts(cut, severity):
    scores = sf.make_scores()
    scores.formats[FP8].batches.truncated = cut  # of 16
    finding = findings(scores).get("truncated-texts")
    assert (finding.severity if finding else None) == severity


def test_a_single_batch_has_no_error():
    scores = sf.make_scores()
    for entry in scores.formats.values():
        entry.batches.tokens = entry.batches.tokens[:1]
        for group in entry.groups.values():
            group.batch_scores = group.batch_scores[:1]
    assert set(findings(scores)) == {"too-few-batches"}


def noisy(gap, noise, n_groups=60, n_batches=16, common=0.0):
    """Groups whose scores differ by the factor ``gap``, with log-normal noise in each batch."""
    random = np.random.default_rng(1)
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(n_groups)]
    damage = {name: gap**index for index, name in enumerate(names)}
    scores = sf.make_scores({name: ([name], 1024) for name in names}, damage, formats=(FP8,))
    scores.formats[FP8].batches.tokens = [10] * n_batches
    shared = np.exp(common * random.standard_normal(n_batches))
    for name, group in zip(names, scores.formats[FP8].groups.values(), strict=True):
        own = np.exp(noise * random.standard_normal(n_batches))
        group.batch_scores = (10 * damage[name] * shared * own).tolist()
    return scores


def test_a_ranking_that_noise_could_reverse():
    found = findings(noisy(gap=1.001, noise=0.5))
    assert "noisy-ranking" in found
    assert found["noisy-ranking"].layers


def test_a_clear_ranking_is_not_called_noisy():
    assert "noisy-ranking" not in findings(noisy(gap=1.5, noise=0.1))


def test_batches_that_raise_all_scores_alike_reverse_nothing():
    """Each group's own standard error is large here; the order is certain all the same."""
    scores = noisy(gap=1.05, noise=0.0, common=1.0)
    assert "noisy-ranking" not in findings(scores)


def test_stability_agrees_with_repeated_sampling():
    """The probability is that of another top set when the batches are drawn again."""
    scores = noisy(gap=1.03, noise=0.3)
    manifest = build_manifest(
        scores, "demo", "mix", config.Scheme(quant_formats=[FP8], effective_bits=16), {}
    )
    importance = {entry.name: entry.importance for entry in manifest.sensitivity_ranking}
    stability = ranking_stability(importance, scores.formats)
    assert stability is not None
    top, probability = stability.top, stability.other_set
    table = np.array([group.batch_scores for group in scores.formats[FP8].groups.values()])
    handles = np.array(list(scores.groups))
    random = np.random.default_rng(99)
    changed, counts = 0, dict.fromkeys(scores.groups, 0)
    for _ in range(2000):
        drawn = table[:, random.integers(0, table.shape[1], table.shape[1])].sum(axis=1)
        found = set(handles[np.argsort(-drawn)[: len(top)]])
        changed += found != set(top)
        for handle in found:
            counts[handle] += 1
    assert len(top) == 10
    assert 0.05 < probability < 1
    assert probability == pytest.approx(changed / 2000, abs=0.06)
    for handle, group in manifest.layer_sensitivity.items():
        assert group.top_probability == pytest.approx(counts[handle] / 2000, abs=0.06)


def test_no_probability_where_there_is_no_ranking():
    scores = sf.make_scores(formats=(FP8,))
    missed = "model.visual.patch_embed.proj"
    sf.set_reached(scores, missed, "no_gradient")
    scheme = config.Scheme(quant_formats=[FP8], effective_bits=16)
    groups = build_manifest(scores, "demo", "mix", scheme, {}).layer_sensitivity
    assert groups[f"{missed}.quant_recipe"].top_probability is None
    known = [g.top_probability for g in groups.values() if g.top_probability is not None]
    assert sorted(known) == [0.0] * 5 + [1.0]
    for group in scores.formats[FP8].groups.values():
        group.batch_scores = group.batch_scores[:1]
    scores.formats[FP8].batches.tokens = [10]
    single = build_manifest(scores, "demo", "mix", scheme, {}).layer_sensitivity
    assert {group.top_probability for group in single.values()} == {None}


def test_halves_of_the_data_that_name_other_groups_are_told():
    scores = noisy(gap=1.001, noise=0.5)
    found = findings(scores)["halves-disagree"]
    rows = {h: g.batch_scores for h, g in scores.formats[FP8].groups.items()}
    even, odd = (
        set(sorted(rows, key=lambda handle: -sum(rows[handle][half::2]))[:10]) for half in (0, 1)
    )
    assert {f"{name}.quant_recipe" for name in found.layers} == even ^ odd
    assert "halves-disagree" not in findings(noisy(gap=1.5, noise=0.1))


def test_the_samples_named_would_settle_the_ranking():
    """Two groups at the edge of the list, a known distance apart: n = n₀ (1.96 s/d)²."""
    scores = noisy(gap=1.03, noise=0.3, n_batches=64)
    scores.formats[FP8].batches.samples = [4] * 64
    importance = {h: sum(g.batch_scores) for h, g in scores.formats[FP8].groups.items()}
    stability = ranking_stability(importance, scores.formats)
    assert stability is not None
    ranking = sorted(importance, key=lambda handle: -importance[handle])
    last, outside = (
        np.array(scores.formats[FP8].groups[handle].batch_scores) for handle in ranking[9:11]
    )
    difference = last - outside
    error = difference.std() / np.sqrt(64)
    expected = 256 * (1.96 * error / difference.mean()) ** 2
    assert stability.samples_needed == pytest.approx(expected, rel=0.2)


def test_other_settings_are_named_by_key_path():
    scores = sf.make_scores()
    now = {
        name: {
            "dtype": "bfloat16",
            "sampling": {"batch_size": 4, "seed": 3},
            "format": entry.settings["format"],
        }
        for name, entry in scores.formats.items()
    }
    found = findings(scores, expected=now, quant_formats=[FP8, INT8])
    assert set(found) == {"measured-with-other-settings"}
    what = found["measured-with-other-settings"].what
    assert "dtype (measured float32, now bfloat16)" in what
    assert "sampling.seed (measured 0, now 3)" in what
    assert "batch_size" not in what
    assert FP8 in what
    assert INT8 in what
    same = {name: entry.settings for name, entry in scores.formats.items()}
    assert findings(scores, expected=same) == {}


def test_demo_model_and_remote_code():
    scores = sf.make_scores()
    scores.model.trained_on_calibration = True
    scores.model.trust_remote_code = True
    found = findings(scores)
    assert {code: finding.severity for code, finding in found.items()} == {
        "trained-on-calibration": "info",
        "remote-code": "warning",
    }


def test_warnings_of_the_engine_are_passed_on():
    scores = sf.make_scores()
    scores.formats[FP8].warnings = ["weights look odd"]
    assert "weights look odd" in findings(scores)["engine-warning"].what


def test_an_unproven_choice():
    scores = sf.make_scores()
    manifest = build_manifest(
        scores, "demo", "mix", config.Scheme(quant_formats=[FP8], effective_bits=11), {}
    )
    manifest.autoquant_state.gap = 0.02
    codes = {finding.code: finding for finding in find(Evidence(scores, manifest, {}))}
    assert "2.0 %" in codes["unproven-choice"].what


def test_findings_say_what_why_and_how_to_fix_worst_first():
    scores = sf.make_scores()
    scores.model.trust_remote_code = True
    scores.model.trained_on_calibration = True
    scores.formats[FP8].groups["lm_head.quant_recipe"].batch_scores[0] = None
    manifest = build_manifest(
        scores, "demo", "mix", config.Scheme(quant_formats=[FP8], effective_bits=16), {}
    )
    assert [finding.severity for finding in manifest.findings] == ["error", "warning", "info"]
    for finding in manifest.findings:
        assert all(text.endswith(".") for text in (finding.what, finding.why, finding.fix))
    assert len(set(DETECTORS)) == len(DETECTORS)


@pytest.mark.parametrize(
    ("patterns", "severity", "said"),
    [
        ({"exclude": ["*lm_haed*"]}, "warning", "Write `*lm_head*` instead."),
        ({"exclude": ["visual"]}, "warning", "Write `*visual*` instead."),
        ({"include": ["*", "*LM_HEAD"]}, "warning", "Write `*lm_head*` instead."),
        ({"exclude": ["*mtp*"]}, "info", "shared with a model that has such layers"),
        ({"cost_excluded": ["*visuals.blocks*"]}, "warning", "Write `*visual.blocks*` instead."),
        ({"cost_excluded": ["*layers.0.lm_head*"]}, "info", "shared with a model"),
        (
            {"search_spaces": [{"layers": ["*.down_porj"], "quant_formats": [FP8]}]},
            "warning",
            "Write `*down_proj*` instead.",
        ),
        ({"exclude": ["lm_hed", "*visual*", "language_model"]}, "warning",
         "Write `*lm_head*` and `*language_model*` instead."),
    ],
)  # fmt: skip
def test_a_pattern_that_names_no_layer_is_told(patterns, severity, said):
    finding = findings(sf.make_scores(), **patterns)["idle-pattern"]
    assert finding.severity == severity
    assert said in finding.fix
    assert "nothing." in finding.what


def test_a_slip_is_told_apart_from_a_pattern_of_another_model():
    scheme = config.Scheme(
        quant_formats=[FP8], effective_bits=16, exclude=["*mtp*", "visual", "*audio*"]
    )
    found = [
        (finding.severity, finding.what)
        for finding in build_manifest(sf.make_scores(), "demo", "mix", scheme, {}).findings
    ]
    assert found == [
        ("warning", "`visual` of `exclude` names no layer of this model, and does nothing."),
        ("info", "`*mtp*` of `exclude` and `*audio*` of `exclude` name no layer of this model, and "
         "do nothing."),
    ]  # fmt: skip


def test_patterns_that_name_layers_and_those_of_a_recipe_are_no_finding():
    scores = sf.make_scores()
    scores.layers["embed"] = Layer(module_type="Embedding", n_weights=1, reason="it is one")
    patterns = {"include": ["model.*", "lm_*"], "exclude": ["*embed*", "*.qkv", "lm_head"]}
    assert "idle-pattern" not in findings(scores, **patterns)
    recipe = {"recipe": "general/auto_quantize/x", "exclude": ["*mtp*", "*router*"]}
    assert "idle-pattern" not in findings(scores, **recipe)


def test_every_code_is_in_use_and_none_is_made_up_beside_the_list():
    folder = Path(layersense.__file__).parent
    given = [
        ast.unparse(keyword.value)
        for file in folder.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Finding"
        for keyword in call.keywords
        if keyword.arg == "code"
    ]
    assert sorted(set(given)) == sorted(f"Code.{code.name}" for code in Code)
    assert [code.name for code in Code] == [code.upper().replace("-", "_") for code in Code]
