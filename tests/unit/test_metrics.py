"""The task's own metric: by hand, by task, and measured where it lacks."""

import math
from types import SimpleNamespace

import msgspec
import pytest
import torch
from result_files import measured
from test_verification import OPTIONS, decide

from layersense.errors import LayersenseError
from layersense.models.tasks import get_task
from layersense.models.tasks.metrics import MeanIoU, TopChoice, metric_of
from layersense.models.tasks.protocol import IGNORED, Batch
from layersense.verification.job import Wanted
from layersense.verification.plan import make_plan
from layersense.verification.store import Verification
from layersense.verification.table import verification_table


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
    assert metric.value(records) == pytest.approx(2 / 4)  # 3 right, 4 wrong, 2 right; 4 wrong
    whole = batch_of(torch.tensor([[3, 4], [2, IGNORED]]))  # an encoder-decoder does not shift
    assert metric.value(metric.records(None, logits_of([3, 4, 1]), whole)) == pytest.approx(2 / 3)
    # Positions without labels, as a task of the user's own may have, are not judged.
    assert math.isnan(metric.value(metric.records(None, logits_of([0] * 7), whole)))


def test_mean_iou_counts_pixels_over_all_photographs():
    metric = MeanIoU()
    one = batch_of(torch.tensor([[[0, 0], [1, IGNORED]]]))
    other = batch_of(torch.tensor([[[1, 1], [0, 0]]]))
    records = metric.records(None, logits_of([0, 1, 1]), one)
    records += metric.records(None, logits_of([1, 1, 0, 2]), other)
    records = msgspec.json.decode(msgspec.json.encode(records))  # as a killed job leaves them
    # 0: 2 in both, 4 labelled, 2 chosen; 1: 3 in both, 3 labelled, 4 chosen; 2: chosen once.
    assert metric.value(records) == pytest.approx((2 / 4 + 3 / 4 + 0 / 1) / 3)


def test_each_task_says_what_it_is_judged_by():
    def find(output, size):
        return []

    found = {
        name: metric_of(get_task(name), SimpleNamespace(processor=SimpleNamespace(find=find)))
        for name in (
            "causal-lm", "image-text-to-text", "seq2seq-lm", "image-classification",
            "semantic-segmentation", "object-detection",
        )
    }  # fmt: skip
    assert {name: metric and metric.name for name, metric in found.items()} == {
        "causal-lm": "token accuracy",
        "image-text-to-text": "token accuracy",
        "seq2seq-lm": "token accuracy",
        "image-classification": "top-1 accuracy",
        "semantic-segmentation": "mean IoU",
        "object-detection": "mAP@[.5:.95]",
    }
    # A checkpoint whose processor does not sort out what it found.
    nothing = SimpleNamespace(processor=SimpleNamespace(find=None))
    assert metric_of(get_task("object-detection"), nothing) is None
    assert metric_of(SimpleNamespace(name="mine"), None) is None
    wrong = SimpleNamespace(name="mine", metric=lambda loaded: SimpleNamespace(name="x"))
    with pytest.raises(LayersenseError, match="lacks unit, higher_is_better, records, value"):
        metric_of(wrong, None)


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
    del content["before"]["metric"]
    for entry in content["recipes"].values():
        del entry["damage"]["metric"]
    old = msgspec.json.decode(msgspec.json.encode(content), type=Verification)
    assert wanted.missing_singles(old) == []
    assert wanted.missing_recipes(old) == wanted.recipes
    assert set(verification_table([manifest], old, OPTIONS)["metric"].to_pylist()) == {None}
    # A task without a metric has been asked: nothing lacks.
    for entry in old.recipes.values():
        entry.damage.metric = None
    assert (
        wanted.missing_recipes(msgspec.json.decode(msgspec.json.encode(old), type=Verification))
        == {}
    )
