"""The task's own metrics: by hand, by task, and measured where it lacks."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from result_files import measured
from test_verification import OPTIONS, decide

from layersense.errors import LayersenseError
from layersense.models.tasks import get_task
from layersense.models.tasks.metrics import MeanIoU, TopChoice, metrics_of
from layersense.models.tasks.protocol import IGNORED, Batch
from layersense.verification.job import Wanted
from layersense.verification.judging import Judge
from layersense.verification.plan import make_plan
from layersense.verification.store import METRICS_VERSION, Verification
from layersense.verification.table import verification_table


def value_of(metric, records):
    (value,) = metric.values(records, np.ones((1, len(records))))
    return value


def batch_of(labels):
    return Batch(
        inputs={}, labels=labels, n_tokens=1, n_samples=len(labels), n_padding=0, n_truncated=0
    )


def logits_of(chosen, classes=5):
    return torch.nn.functional.one_hot(torch.tensor(chosen), classes).float()


def test_token_accuracy_is_the_share_over_all_supervised_tokens():
    metric = TopChoice("token accuracy")
    # The first token predicts nothing: 3 and 4 are supervised in one row, 2 in the other.
    first = batch_of(torch.tensor([[1, 3, 4], [1, 2, IGNORED]]))
    records = metric.records(None, logits_of([3, 0, 2]), first)
    records += metric.records(None, logits_of([0]), batch_of(torch.tensor([[1, 4]])))
    assert value_of(metric, records) == pytest.approx(2 / 4)  # 3 right, 4 wrong, 2 right; 4 wrong
    whole = batch_of(torch.tensor([[3, 4], [2, IGNORED]]))  # an encoder-decoder does not shift
    assert value_of(metric, metric.records(None, logits_of([3, 4, 1]), whole)) == pytest.approx(
        2 / 3
    )
    # Positions without labels, as a task of the user's own may have, are not judged.
    assert np.isnan(value_of(metric, metric.records(None, logits_of([0] * 7), whole)))
    assert records == [[1, 2], [1, 1], [0, 1]]  # of each sample


def test_mean_iou_counts_pixels_over_all_photographs():
    metric = MeanIoU()
    one = batch_of(torch.tensor([[[0, 0], [1, IGNORED]]]))
    other = batch_of(torch.tensor([[[1, 1], [0, 0]]]))
    records = metric.records(None, logits_of([0, 1, 1]), one)
    records += metric.records(None, logits_of([1, 1, 0, 2]), other)
    records = msgspec.json.decode(msgspec.json.encode(records))  # as a killed job leaves them
    assert len(records) == 2
    assert np.isnan(value_of(metric, []))
    # 0: 2 in both, 4 labelled, 2 chosen; 1: 3 in both, 3 labelled, 4 chosen; 2: chosen once.
    assert value_of(metric, records) == pytest.approx((2 / 4 + 3 / 4 + 0 / 1) / 3)


def test_each_task_says_what_it_is_judged_by():
    def find(output, size):
        return []

    found = {
        name: metrics_of(get_task(name), SimpleNamespace(processor=SimpleNamespace(find=find)))
        for name in (
            "causal-lm", "image-text-to-text", "seq2seq-lm", "image-classification",
            "semantic-segmentation", "object-detection",
        )
    }  # fmt: skip
    assert {task: [one.name for one in given] for task, (given, _) in found.items()} == {
        "causal-lm": ["token accuracy"],
        "image-text-to-text": ["token accuracy"],
        "seq2seq-lm": ["token accuracy"],
        "image-classification": ["top-1 accuracy"],
        "semantic-segmentation": ["mean IoU"],
        "object-detection": ["mAP@[.5:.95]"],
    }
    # A checkpoint whose processor does not sort out what it found.
    nothing = SimpleNamespace(processor=SimpleNamespace(find=None))
    assert metrics_of(get_task("object-detection"), nothing) == ([], [])
    # What the model writes is judged by itself.
    assert {task: [one.name for one in written] for task, (_, written) in found.items()} == {
        **{task: [] for task in found}, "image-text-to-text": ["CIDEr-D"],
    }  # fmt: skip
    assert metrics_of(SimpleNamespace(name="mine"), None) == ([], [])
    wrong = SimpleNamespace(name="mine", metrics=lambda loaded: [SimpleNamespace(name="x")])
    with pytest.raises(LayersenseError, match="lacks unit, higher_is_better, records, values"):
        metrics_of(wrong, None)
    twice = SimpleNamespace(name="mine", metrics=lambda loaded: [MeanIoU(), MeanIoU()])
    with pytest.raises(LayersenseError, match="two of its metrics are called mean IoU"):
        metrics_of(twice, None)


@pytest.mark.parametrize(
    ("metric", "records", "before"),
    [
        (
            TopChoice("token accuracy"),
            [[1, 4], [3, 3], [0, 2], [2, 5], [4, 4]],
            [[2, 4], [3, 3], [1, 2], [5, 5], [4, 4]],
        ),
        (
            MeanIoU(),
            [[[n, 1], [n + 1, 4], [n + 3, 2]] for n in range(5)],
            [[[n + 1, 2], [n + 1, 4], [n + 2, 3]] for n in range(5)],
        ),
    ],
)
def test_an_interval_draws_all_records_of_a_photograph_together(metric, records, before):
    photographs = [7, 9, 7, 3, 9]
    found = Judge(metric, before, photographs).of(records)
    of = {number: [i for i, p in enumerate(photographs) if p == number] for number in (7, 9, 3)}
    values, differences = [], []
    for draw in np.random.default_rng(0).integers(0, 3, size=(1000, 3)):
        rows = [row for unit in draw for row in of[(7, 9, 3)[unit]]]  # repeated, not counted
        values.append(value_of(metric, [records[row] for row in rows]))
        differences.append(values[-1] - value_of(metric, [before[row] for row in rows]))
    assert found.value == pytest.approx(value_of(metric, records))
    assert found.difference == pytest.approx(found.value - value_of(metric, before))
    assert [found.low, found.high] == pytest.approx(list(np.percentile(values, [2.5, 97.5])))
    assert [found.difference_low, found.difference_high] == pytest.approx(
        list(np.percentile(differences, [2.5, 97.5]))
    )
    assert found.low < found.value < found.high
    assert Judge(metric, records, photographs).of(records).difference_high == 0.0


def test_one_photograph_has_no_interval_and_no_record_no_value():
    metric = TopChoice("token accuracy")
    alone = Judge(metric, [[2, 4], [2, 4]], [5, 5]).of([[1, 4], [2, 4]])
    assert (alone.value, alone.difference) == (3 / 8, -1 / 8)
    assert (alone.low, alone.high, alone.difference_low) == (None, None, None)
    assert Judge(metric, [], [5, 6]).of([]).value is None


def test_a_file_of_before_there_were_metrics_lacks_its_recipes_alone():
    manifest = decide()
    plan = make_plan([manifest], OPTIONS)
    wanted = Wanted(plan, [manifest], "context")
    held = measured([manifest], OPTIONS)
    for format, handle in wanted.singles:
        held.singles[format][handle].damage.digest = wanted.single_digest(format, handle)
    for digest, whole in wanted.recipes.items():
        held.recipes[digest].damage.digest = wanted.recipe_digest(whole)
    assert (wanted.missing_singles(held), wanted.missing_recipes(held)) == ([], {})
    content = msgspec.to_builtins(held)
    del content["before"]["metrics"]
    for entry in content["recipes"].values():
        del entry["damage"]["metrics"], entry["damage"]["metrics_version"]
    old = msgspec.json.decode(msgspec.json.encode(content), type=Verification)
    assert wanted.missing_singles(old) == []
    assert wanted.missing_recipes(old) == wanted.recipes
    table = verification_table([manifest], old, OPTIONS).to_pylist()
    assert not any(row["metrics"] for row in table)
    # A task without a metric has been asked: nothing lacks.
    for entry in old.recipes.values():
        entry.damage.metrics_version = METRICS_VERSION
    assert wanted.missing_recipes(old) == {}
    # Another metric since then: what lacks it is measured, and no single group.
    entry.damage.metrics_version = METRICS_VERSION - 1
    assert len(wanted.missing_recipes(old)) == 1
    assert wanted.missing_singles(old) == []


def test_resamples_with_nothing_to_judge_are_left_out_of_an_interval():
    """Three photographs, one of which has a box: where it is not drawn there is no precision."""

    class Sometimes:
        name, unit, higher_is_better = "mAP", "share", True

        def values(self, records, counts):
            there = counts @ np.array([record is not None for record in records])
            return np.where(there > 0, 0.5, np.nan)

    told = Judge(Sometimes(), [None, 1, None]).of([None, 1, None])
    assert (told.value, told.low, told.high) == (0.5, 0.5, 0.5)
    assert (told.difference, told.difference_low, told.difference_high) == (0.0, 0.0, 0.0)
