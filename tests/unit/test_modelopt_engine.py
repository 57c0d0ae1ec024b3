"""Engine `modelopt` against scores worked out by hand, and its promises one by one."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402
from toy_task import Toy, Twice, by_hand, int8, make, make_rows, measurement, totals  # noqa: E402

from layersense.errors import LayersenseError  # noqa: E402
from layersense.quantization.formats import resolve_format  # noqa: E402
from layersense.scoring import in_progress, modelopt_engine  # noqa: E402
from layersense.scoring.measurement import Measurement  # noqa: E402
from layersense.scoring.modelopt_engine import measure  # noqa: E402
from layersense.scoring.scores import FormatScores  # noqa: E402


@pytest.fixture(autouse=True)
def _no_dry_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward calls are counted here; the dry pass has tests of its own."""
    monkeypatch.setattr(modelopt_engine, "log_reach", lambda *_: None)


INT8 = "INT8_ALL_LAYERS_CFG"
FP8 = "FP8_ALL_LAYERS_CFG"
SMOOTH = "INT8_SMOOTHQUANT_ALL_LAYERS_CFG"


def run(what: Measurement, *names: str) -> dict[str, FormatScores]:
    entries: dict[str, FormatScores] = {}
    for _, part in measure(what, [resolve_format(name, {}) for name in names]):
        entries |= part
    return entries


@pytest.fixture(scope="module")
def reference() -> dict[str, FormatScores]:
    return run(measurement(), INT8, FP8)


def test_scores_are_those_worked_out_by_hand(reference: dict[str, FormatScores]) -> None:
    groups = reference[INT8].groups
    for name, expected in by_hand().items():
        assert groups[f"{name}.quant_recipe"].batch_scores == pytest.approx(expected, rel=1e-4)
        assert groups[f"{name}.quant_recipe"].reached == "scored"


def test_reached_tells_silent_zeros_apart(reference: dict[str, FormatScores]) -> None:
    for entry in reference.values():
        assert entry.groups["unused.quant_recipe"].reached == "not_called"
        assert entry.groups["aside.quant_recipe"].reached == "no_gradient"
        assert entry.groups["unused.quant_recipe"].batch_scores == [0.0, 0.0]


def test_cost_counts_true_bits(reference: dict[str, FormatScores]) -> None:
    assert reference[FP8].groups["first.quant_recipe"].cost == 32 * 48 * 8.0 / 16
    entry = run(measurement(), "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG")
    cost = entry["INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"].groups["first.quant_recipe"].cost
    assert cost == 32 * 48 * 4.125 / 16


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_do_not_depend_on_the_scoring_batch(
    reference: dict[str, FormatScores], batch_size: int
) -> None:
    other = run(measurement(score_batch_size=batch_size), INT8, FP8)
    for name in (INT8, FP8):
        assert totals(other[name]) == pytest.approx(totals(reference[name]), rel=1e-4)
        assert sum(other[name].batches.tokens) == 8
        assert len(other[name].batches.tokens) == 8 // batch_size


def test_a_joint_call_equals_single_calls(reference: dict[str, FormatScores]) -> None:
    for name in (INT8, FP8):
        assert run(measurement(), name)[name].groups == reference[name].groups


def test_smoothquant_is_measured_beside_others_on_a_fresh_model(
    reference: dict[str, FormatScores],
) -> None:
    together = run(measurement(), SMOOTH, INT8)
    assert together[INT8].groups == reference[INT8].groups
    assert together[SMOOTH].groups == run(measurement(), SMOOTH)[SMOOTH].groups
    assert together[SMOOTH].groups != reference[INT8].groups


def test_dropout_is_dead_even_in_train_mode(reference: dict[str, FormatScores]) -> None:
    assert run(measurement(Toy(train=True)), INT8)[INT8].groups == reference[INT8].groups


def test_the_same_seed_gives_the_same_scores(reference: dict[str, FormatScores]) -> None:
    again = run(measurement(), INT8, FP8)
    for name, entry in again.items():
        assert entry.groups == reference[name].groups
        assert entry.batches == reference[name].batches


def test_a_module_called_twice_is_refused() -> None:
    with pytest.raises(LayersenseError, match="layer: is called several times in one forward"):
        run(measurement(Toy(kind=Twice)), INT8)


def test_kl_div_is_the_divergence_of_one_group_quantized_alone() -> None:
    entry = run(measurement(method="kl_div"), INT8)[INT8]
    model, rows = make(), make_rows()
    inputs = torch.stack([row[0] for row in rows])
    amax = torch.nn.functional.gelu(
        model.second(functional.gelu(model.first(inputs)))
    ).abs().max()  # fmt: skip
    expected = []
    for start in (0, 4):
        x = inputs[start : start + 4]
        hidden = functional.gelu(model.second(functional.gelu(model.first(x))))
        rest = 0.1 * model.aside(x)
        plain = torch.log_softmax(model.last(hidden) + rest, dim=-1)
        weight = int8(model.last.weight, model.last.weight.abs().amax(dim=1, keepdim=True))
        quantized = functional.linear(int8(hidden, amax), weight, model.last.bias) + rest
        q = torch.log_softmax(quantized, dim=-1)
        expected.append((plain.exp() * (plain - q)).sum().item())
    assert entry.groups["last.quant_recipe"].batch_scores == pytest.approx(
        expected, rel=5e-3, abs=2e-6
    )
    assert entry.groups["unused.quant_recipe"].reached == "not_called"
    assert entry.groups["aside.quant_recipe"].reached == "scored"


def test_kl_div_does_not_depend_on_the_scoring_batch() -> None:
    whole = run(measurement(method="kl_div", score_batch_size=8), INT8)[INT8]
    parts = run(measurement(method="kl_div", score_batch_size=3), INT8)[INT8]
    assert totals(parts) == pytest.approx(totals(whole), rel=5e-3, abs=2e-6)


class Interrupted(Toy):
    """Stops at a forward call, as a killed job does."""

    stop_at = 0

    def forward(self, model: Any, batch: Any) -> Any:
        if self.calls + 1 == self.stop_at:
            raise KeyboardInterrupt
        return super().forward(model, batch)


def test_kl_div_says_first_how_long_it_will_take(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    clock = SimpleNamespace(perf_counter=count(0, 2).__next__)  # two seconds between two looks
    monkeypatch.setattr(modelopt_engine, "time", clock)
    run(measurement(method="kl_div", score_batch_size=2), INT8, FP8)
    told = [text for text in caplog.messages if text.startswith("kl_div runs the model")]
    # Five groups under two formats and once without any, 4 batches.
    assert told == ["kl_div runs the model 11 times for each of 4 batches: about 1 min 28 s"]


def test_kl_div_goes_on_where_a_killed_job_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_progress, "SAVE_SECONDS", 0.0)
    whole, undisturbed = Toy(), measurement(method="kl_div", score_batch_size=2)
    expected = run(replace(undisturbed, task=whole), INT8, FP8)
    calibration = 3 * 2  # batches × formats
    each = (whole.calls - calibration) // 4
    killed = Interrupted()
    killed.stop_at = calibration + 2 * each + 3  # in the third of four batches
    first = Interrupted()
    first.stop_at = calibration + 3  # one group and format of the first batch is complete
    file, early = tmp_path / "in-progress", tmp_path / "early"

    def kept(path, digest):
        return in_progress.InProgress(path, digest, in_progress.Completed)

    what = replace(undisturbed, in_progress=kept(file, "digest"))
    with pytest.raises(KeyboardInterrupt):
        run(replace(what, task=killed), INT8, FP8)
    started = replace(what, in_progress=kept(early, "digest"))
    with pytest.raises(KeyboardInterrupt):
        run(replace(started, task=first), INT8, FP8)
    complete = replace(what, in_progress=kept(tmp_path / "all", "digest"))
    run(complete, INT8, FP8)
    other = replace(what, in_progress=kept(file, "another measurement"))
    # What is complete of a batch is not run again either, but for the pass without quantizers.
    for again, passes in (
        (what, 2 * each - 1),
        (started, 4 * each - 1),
        (complete, each),
        (other, 4 * each),
    ):
        task = Toy()
        entries = run(replace(again, task=task), INT8, FP8)
        assert task.calls == calibration + passes
        for name, entry in expected.items():
            assert entries[name].groups == entry.groups
            assert entries[name].batches == entry.batches


def test_the_log_says_what_is_measured_and_counts_passes(caplog: pytest.LogCaptureFixture) -> None:
    """A batch takes half an hour where a model is large; a line after two of them comes late."""
    caplog.set_level("INFO")
    run(measurement(method="kl_div"), INT8, FP8)
    told = [text for text in caplog.messages if text.startswith("score 2 format(s): ")]
    assert [text.partition(": ")[2].partition(",")[0] for text in told] == ["2 of 22", "22 of 22"]
    assert "s/pass" in told[0]
    work = f"5 layer groups of 5 modules, 2 formats (20 quantizers): {INT8}, {FP8}"
    assert caplog.messages.count(work) == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("injected"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_out_of_memory_halves_the_batch_and_changes_no_score(
    reference: dict[str, FormatScores], error: Exception
) -> None:
    calibration = 3 * 2  # batches × formats
    entries = run(measurement(Toy(fail={calibration + 2}, error=error)), INT8, FP8)
    for name, entry in entries.items():
        assert entry.back_offs == ["scoring batch reduced from 4 to 2 samples"]
        assert totals(entry) == pytest.approx(totals(reference[name]), rel=1e-4)


def test_out_of_memory_at_one_sample_splits_the_formats(
    reference: dict[str, FormatScores],
) -> None:
    entries = run(measurement(Toy(fail={1}), score_batch_size=1), INT8, FP8)
    for name, entry in entries.items():
        assert entry.back_offs == ["2 formats measured in two calls instead of one"]
        assert totals(entry) == pytest.approx(totals(reference[name]), rel=1e-4)


def test_out_of_memory_with_nothing_to_reduce_is_one_sentence() -> None:
    with pytest.raises(LayersenseError, match="one sample does not fit into memory"):
        run(measurement(Toy(fail={1}), score_batch_size=1), INT8)


def test_a_non_finite_score_is_kept_as_such() -> None:
    rows = make_rows()
    rows[0] = (rows[0][0] * float("inf"), rows[0][1])
    what = measurement()
    entry = run(replace(what, score_rows=copy.copy(rows[:8])), INT8)[INT8]
    scores = entry.groups["first.quant_recipe"].batch_scores
    assert scores[0] is None
    assert scores[1] is not None


def test_the_inventory_lists_every_layer() -> None:
    inventory, _ = next(iter(measure(measurement(), [resolve_format(INT8, {})])))
    assert list(inventory.layers) == ["first", "second", "last", "unused", "aside"]
    assert inventory.layers["second"].n_weights == 48 * 64
    assert inventory.layers["second"].module_type == "Linear"
    assert inventory.groups["second.quant_recipe"].module_names == ["second"]
    assert all(layer.reason is None for layer in inventory.layers.values())
