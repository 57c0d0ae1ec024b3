"""Budgets other than bits: a checkpoint's size, and costs that a user gives."""

import csv
import math

import pytest
import score_files as sf

from layersense import config
from layersense.errors import LayersenseError
from layersense.recipes.budgets import CheckpointSize, read_cost_table
from layersense.recipes.decide import build_manifest
from layersense.scoring.scores import Layer

FP8, INT8, INT4 = sf.FORMATS
COSTED = (FP8, INT4, "NONE")
TOTAL = sum(weights for _, weights in sf.MODULES.values())


def decide(scores=None, **scheme):
    scheme = {"quant_formats": [FP8, INT4], **scheme}
    return build_manifest(scores or sf.make_scores(), "demo", "mix", config.Scheme(**scheme), {})


def chosen(manifest):
    return {
        handle.removesuffix(".quant_recipe"): group.selected.split("(")[0]
        for handle, group in manifest.layer_sensitivity.items()
    }


def expected_bytes(recipe, width=4):
    """Bytes of all tensors: 400,000 parameters, those of MODULES searched."""
    per_weight = {FP8: 1, INT4: 4.125 / 8, "NONE": width}
    searched = sum(sf.MODULES[name][1] * per_weight[format] for name, format in recipe.items())
    return searched + (400_000 - TOTAL) * width


def test_size_counts_the_whole_checkpoint_in_its_own_type():
    manifest = decide(size_gb=700_000 / 1e9)
    state = manifest.autoquant_state
    assert state.checkpoint_bytes == pytest.approx(expected_bytes(chosen(manifest)))
    assert state.checkpoint_bytes_before == 1_600_000
    assert state.budget.kind == "size"
    assert state.budget.unit == "GB"
    assert state.budget.used == pytest.approx(state.checkpoint_bytes / 1e9)
    assert state.checkpoint_bytes <= 700_000
    assert state.gap <= 1e-9
    assert manifest.scheme.effective_bits is None
    # A larger checkpoint may be less damaged, never more.
    assert decide(size_gb=750_000 / 1e9).autoquant_state.score <= state.score


def test_a_size_out_of_reach_names_the_lowest():
    lowest = expected_bytes(dict.fromkeys(sf.MODULES, INT4)) / 1e9
    with pytest.raises(LayersenseError, match=r"0\.0004 GB cannot be met.*raise size_gb") as error:
        decide(size_gb=0.0004)
    named = float(str(error.value).split("lowest reachable are ")[1].split()[0])
    assert lowest <= named <= lowest + 1e-4
    fixed = math.ceil((400_000 - TOTAL) * 4 / 1e5) / 1e4
    assert f"{fixed:g} GB of it are never searched" in str(error.value)


@pytest.mark.parametrize("each", [1763.6631, 0.763663, 123_456.7891])
def test_the_lowest_that_is_named_can_be_asked_for(tmp_path, each):
    table = tmp_path / "costs.csv"
    write_table(table, [(name, format, each) for name in sf.MODULES for format in COSTED])
    budget = {"file": str(table), "at_most": each}
    with pytest.raises(LayersenseError, match="cannot be met") as error:
        decide(cost_table=config.CostTable(**budget))
    named = float(str(error.value).split("lowest reachable are ")[1].split()[0])
    assert named == pytest.approx(each * len(sf.MODULES), rel=1e-3)
    assert decide(cost_table=config.CostTable(**{**budget, "at_most": named})).autoquant_state


def test_a_tied_head_costs_nothing_until_it_is_quantized():
    scores = sf.make_scores()
    plain = decide(scores, effective_bits=16).autoquant_state.checkpoint_bytes
    scores.layers = {
        "model.embed": Layer(module_type="Embedding", n_weights=131072, reason="not searched"),
        **scores.layers,
    }
    scores.layers["lm_head"].tied_to = "model.embed"
    sensitivity = decide(scores, effective_bits=16).layer_sensitivity
    size = CheckpointSize.of(scores, sensitivity)
    assert size.groups["lm_head.quant_recipe"] == {"NONE": 0, FP8: 131072, INT4: 67584}
    # The stored tensors are the same 400,000 parameters, whatever is tied to them.
    assert size.of_recipe(dict.fromkeys(size.groups, "NONE")) == plain == 1_600_000


def write_table(path, rows, header=("layer", "format", "cost")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def latencies(by_group=True):
    """FP8 halves a group's milliseconds, INT4 slows it down."""
    for name, (members, weights) in sf.MODULES.items():
        names = [name] if by_group else members
        for member in names:
            base = weights / len(names) / 1e4
            yield member, "NONE", base
            yield member, FP8, base / 2
            yield member, INT4, base * 2


@pytest.mark.parametrize("by_group", [True, False])
def test_a_table_of_costs_is_a_budget_of_its_own(tmp_path, by_group):
    file = write_table(tmp_path / "ms.csv", latencies(by_group))
    budget = 0.75 * TOTAL / 1e4
    manifest = decide(cost_table=config.CostTable(file=str(file), at_most=budget))
    recipe = chosen(manifest)
    factor = {"NONE": 1, FP8: 0.5, INT4: 2}
    used = sum(sf.MODULES[name][1] / 1e4 * factor[format] for name, format in recipe.items())
    state = manifest.autoquant_state
    assert state.budget.used == pytest.approx(used)
    assert used <= budget
    assert (state.budget.kind, state.budget.unit) == ("table", "ms")
    assert INT4 not in recipe.values()  # more damage and more time
    assert FP8 in recipe.values()


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], ("layer", "cost"), "has no column format"),
        ([("a", FP8, "fast")], None, "line 2: the cost is 'fast'"),
        ([("a", FP8, "-1")], None, "line 2: the cost is '-1'"),
        ([("a", FP8, "nan")], None, "line 2: the cost is 'nan'"),
        ([("a", FP8, 1), ("a", FP8, 1)], None, "line 3: layer a under .* stands in the file twice"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, rows, header, message):
    columns = header or ("layer", "format", "cost")
    file = write_table(tmp_path / "t.csv", rows, columns)
    with pytest.raises(LayersenseError, match=rf"t\.csv.*{message}"):
        read_cost_table(file)


def test_a_layer_without_a_cost_is_named(tmp_path):
    rows = [row for row in latencies() if row[:2] != ("lm_head", FP8)]
    file = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(LayersenseError, match=f"has no cost of layer lm_head under {FP8}"):
        decide(cost_table=config.CostTable(file=str(file), at_most=100))


def test_rows_of_some_modules_do_not_stand_for_their_group(tmp_path):
    group = "model.language_model.layers.0.self_attn"
    rows = [row for row in latencies(by_group=False) if row[:2] != (f"{group}.k_proj", FP8)]
    file = write_table(tmp_path / "t.csv", rows)
    told = f"no cost of layer {group}.k_proj under {FP8}, which shares a format with {group}.q_proj"
    with pytest.raises(LayersenseError, match=told):
        decide(cost_table=config.CostTable(file=str(file), at_most=100))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(LayersenseError, match=r"no\.csv: cannot be read as a CSV table"):
        read_cost_table(tmp_path / "no.csv")
