"""What detectors find, by hand: average precision, divergence, the same queries again."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import studies
import tiny_families as families
import torch
import yaml
from studies import sample_database, study
from tiny_models import resolve_folder

from layersense import settings
from layersense.calibration.database import open_database
from layersense.manifests.schema import encode_manifest
from layersense.models.tasks import get_task
from layersense.models.tasks.detections import (
    CROWD,
    AveragePrecision,
    Detected,
    SameQueries,
    box_damage,
    distributions,
    from_middles,
)
from layersense.models.tasks.protocol import Batch, Sampling
from layersense.validation import load_config
from layersense.verification.job import verify_run
from layersense.verification.measure import kl_divergence
from layersense.verification.table import write_verification_table

FORMATS = ["FP8_ALL_LAYERS_CFG", "INT8_ALL_LAYERS_CFG"]
RUN = {"modality": "image_boxes", "calibration_samples": 8, "score_samples": 4, "batch_size": 2}


# --- average precision ---


def precision(found, truth, crowds=()):
    """AP of photographs of 200 × 100 pixels: what is found (corners, class, score), what is so.

    ``crowds`` are of the first photograph.
    """
    answers = [
        {
            "boxes": torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([row[4] for row in rows], dtype=torch.int64),
            "scores": torch.tensor([row[5] for row in rows]),
        }
        for rows in found
    ]

    def target(rows):
        boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
        return {"boxes": boxes, "labels": torch.tensor([row[4] for row in rows], dtype=torch.int64)}

    targets = tuple(target(rows) for rows in truth)
    if crowds:
        targets[0].update((CROWD + key, value) for key, value in target(crowds).items())
    sizes = []

    def find(output, size):
        sizes.append(size)
        return answers

    metric = AveragePrecision(find)
    images = torch.zeros(len(found), 3, 100, 200)
    batch = Batch({"pixel_values": images}, torch.zeros(0), 0, 0, 0, 0, targets=targets)
    (value,) = metric.values(metric.records(None, None, batch), np.ones((1, len(found))))
    assert sizes == [(100, 200)]
    return value


BOX = [10.0, 10.0, 60.0, 60.0]


def test_what_is_found_as_it_is_has_precision_1():
    other = [100.0, 20.0, 180.0, 90.0]
    truth = [[[*BOX, 3], [*other, 3]], [[*BOX, 7]]]
    found = [[[*other, 3, 0.4], [*BOX, 3, 0.9]], [[*BOX, 7, 0.2]]]
    assert precision(found, truth) == pytest.approx(1.0)


def test_a_wrong_box_before_the_right_one_halves_the_precision():
    found = [[[100.0, 20.0, 180.0, 90.0, 3, 0.9], [*BOX, 3, 0.8]]]
    assert precision(found, [[[*BOX, 3]]]) == pytest.approx(0.5)


def test_a_box_counts_up_to_its_intersection_over_union():
    # 50 × 50 pixels against 50 × 31 of them: 0.62, above three of the ten thresholds.
    found = [[[10.0, 10.0, 60.0, 41.0, 3, 0.9]]]
    assert precision(found, [[[*BOX, 3]]]) == pytest.approx(0.3)


def test_classes_count_alike_and_those_of_no_photograph_not_at_all():
    truth = [[[*BOX, 1], [*BOX, 2]]]
    assert precision([[[*BOX, 1, 0.9], [*BOX, 5, 0.99]]], truth) == pytest.approx(0.5)
    assert precision([[[*BOX, 5, 0.99]]], truth) == 0.0
    assert precision([[]], truth) == 0.0
    assert math.isnan(precision([[[*BOX, 1, 0.9]]], [[]]))


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    crowd = [100.0, 0.0, 200.0, 100.0, 3]
    found = [
        [[110.0, 20.0, 140.0, 90.0, 3, 0.9], [150.0, 20.0, 180.0, 90.0, 3, 0.8], [*BOX, 3, 0.7]]
    ]
    truth = [[[*BOX, 3]]]
    assert precision(found, truth) == pytest.approx(1 / 3)
    assert precision(found, truth, [crowd]) == pytest.approx(1.0)
    assert precision(found, truth, [[*crowd[:4], 7]]) == pytest.approx(1 / 3)
    assert math.isnan(precision(found, [[]], [crowd]))


def by_pycocotools(records):
    """AP as pycocotools itself tells it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), []
    classes = {row[4] for _, rows in records for row in rows}
    annotations = []
    for image, (boxes, rows) in enumerate(records):
        for *box, number, crowd in rows:
            annotations.append(
                {"image_id": image, "bbox": box, "category_id": number, "iscrowd": crowd,
                 "area": box[2] * box[3], "id": len(annotations) + 1}
            )  # fmt: skip
        found += [
            {"image_id": image, "bbox": box, "category_id": number, "score": score}
            for *box, number, score in boxes
            if number in classes
        ]
    truth.dataset = {
        "images": [{"id": image} for image in range(len(records))],
        "annotations": annotations,
        "categories": [{"id": number} for number in classes],
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_is_what_pycocotools_says_of_photographs_repeated(seed):
    generator = np.random.default_rng(seed)
    records = []
    for _ in range(6):
        truth = [
            [*generator.uniform(0, 50, 2), *generator.uniform(20, 60, 2), int(number), 0]
            for number in generator.integers(1, 4, size=generator.integers(0, 5))
        ]
        found = [
            [*(np.array(row[:4]) + generator.normal(0, 4, 4)), row[4], generator.uniform()]
            for row in truth * 2
            if generator.uniform() < 0.7
        ] + [
            [*generator.uniform(0, 50, 2), 30.0, 30.0, int(number), generator.uniform()]
            for number in generator.integers(1, 6, size=3)
        ]
        crowd = [*generator.uniform(0, 50, 2), 60.0, 60.0, int(generator.integers(1, 7)), 1]
        records.append([found, [*truth, crowd]])
    draws = generator.integers(0, 6, size=(8, 6))
    counts = np.array([np.ones(6), *(np.bincount(draw, minlength=6) for draw in draws)])
    values = AveragePrecision(None).values(records, counts)
    expected = [by_pycocotools([records[i] for i in draw]) for draw in [range(6), *draws]]
    assert values == pytest.approx(expected, abs=1e-9)
    assert 0.05 < values[0] < 0.95


# --- what differs ---


def detected(logits, boxes, nothing=None):
    return Detected(
        loss=lambda index, target: torch.zeros(()),
        logits=torch.tensor(logits),
        boxes=lambda: torch.tensor(boxes),
        raw=None,
        nothing=nothing,
    )


def test_classes_of_their_own_diverge_one_by_one():
    before = detected([[[0.0, 2.0]]], [[[0.0] * 4]])
    after = detected([[[1.0, -1.0]]], [[[0.0] * 4]])

    def bernoulli(p, q):
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    by_hand = bernoulli(sigmoid(0), sigmoid(1)) + bernoulli(sigmoid(2), sigmoid(-1))
    found = kl_divergence(distributions(before), distributions(after))
    assert found.tolist() == pytest.approx([by_hand])


@pytest.mark.parametrize(
    ("logits", "nothing", "there"),
    [
        ([0.0, math.log(3.0)], 0, 0.75),  # one class of two, the first of them is "nothing"
        ([0.0, math.log(3.0)], None, 0.75),  # the more probable of two that are yes or no
    ],
)
def test_boxes_differ_by_the_terms_of_the_loss_where_there_is_an_object(logits, nothing, there):
    before = detected([[logits]], [[[0.0, 0.0, 0.4, 0.5]]], nothing)
    after = detected([[logits]], [[[0.2, 0.0, 0.6, 0.5]]], nothing)
    # Half of each box is common: intersection 0.1, union 0.3, and the hull is all of the union.
    by_hand = there * (5 * (0.2 + 0.2) + 2 * (1 - 0.1 / 0.3))
    assert box_damage(before, after).tolist() == pytest.approx([by_hand], rel=1e-5)
    assert box_damage(before, before).tolist() == [0.0]


def test_a_box_without_area_does_not_differ_from_itself():
    flat = detected([[[1.0]]], [[[0.3, 0.3, 0.3, 0.2]]])
    assert box_damage(flat, flat).tolist() == [0.0]


def test_boxes_by_their_corners():
    corners = from_middles(torch.tensor([[0.5, 0.4, 0.2, 0.4]]))
    assert corners[0].tolist() == pytest.approx([0.4, 0.2, 0.6, 0.6])


def test_choices_are_noted_and_made_again():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    choices = SameQueries()
    with choices.noted():
        noted = torch.topk(scores, 2, dim=1).indices
    assert choices.any
    other = torch.tensor([[0.8, 0.1, 0.9, 0.2]])
    with choices.again():
        values, indices = other.topk(2, dim=1)
    assert indices.tolist() == noted.tolist() == [[1, 3]]
    assert values[0].tolist() == pytest.approx([0.1, 0.2])
    assert other.topk(2, dim=1).indices.tolist() == [[2, 0]]


# --- real detectors ---


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("detectors")


def verified(folder, name):
    """Score and verify a tiny detector; return the rows of its table."""
    checkpoint = getattr(families, name)(folder / name)
    task = "object-detection"
    found = study(folder, checkpoint, task, formats=FORMATS, **RUN)
    files = {
        "model_file": checkpoint / "study/model.json",
        "database_file": sample_database(folder),
    }
    manifests = [checkpoint / "study/manifest.json"]
    manifests[0].write_bytes(encode_manifest(found.manifest))
    run = {**RUN, "verify": {"groups": 12, "points": 1, "random": 2}}
    data = studies._config(str(checkpoint), task, run)
    data["schemes"]["scheme"]["quant_formats"] = FORMATS
    config = load_config(yaml.safe_load(yaml.safe_dump(data)), "test")
    out = checkpoint / "study/verification.json"
    options = settings.verify_settings(config, "run")
    verify_run("run", options, manifests, out=out, **files)
    table = out.with_suffix(".parquet")
    write_verification_table(manifests, out, options, table)
    return pq.read_table(table).to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolos", "rt_detr", "ssdlite", "yolo"])
def test_a_detector_is_verified(name, shared):
    rows = verified(shared, name)
    before, *_ = rows
    assert [one["name"] for one in before["metrics"]] == ["mAP@[.5:.95]"]
    groups = [row for row in rows if row["kind"] == "group"]
    assert {row["layer_kind"] for row in groups} & {"box_head", "other"}
    # What is quantized alone does damage, heads of boxes too, and what is not does none.
    boxes = [row["kl"] for row in groups if row["layer_kind"] == "box_head"]
    assert all(kl > 0 for kl in boxes)
    recipes = [row for row in rows if row["kind"] == "recipe"]
    (int8,) = (row for row in recipes if row["label"] == f"{FORMATS[1]} everywhere")
    assert int8["kl"] > max(row["kl"] for row in groups if row["format"] == FORMATS[1]) / 100
    assert all(row["metrics"][0]["value"] is not None for row in recipes)
    nothing = [row for row in recipes if row["effective_bits"] == 16]
    assert all(row["kl"] == 0 for row in nothing)


def loaded_with_batch(folder, name, photographs):
    checkpoint = getattr(families, name)(folder / f"{name}-alone")
    task = get_task("object-detection")
    loaded = task.load(
        resolve_folder(checkpoint, "object-detection"), dtype="float32", device="cpu"
    )
    with open_database(sample_database(folder)) as database:
        rows = database.rows("image", "calibration", limit=photographs)
    (batch,) = task.batches(loaded, rows, Sampling(0, "image_boxes"), photographs)
    return task, loaded, batch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolos", "ssdlite", "yolo"])
def test_crowds_are_resized_as_objects_are_and_read_by_no_loss(name, shared):
    task, loaded, _ = loaded_with_batch(shared, name, 1)
    with open_database(sample_database(shared)) as database:
        rows = database.rows("image", "calibration", limit=2)
    alone, _ = rows
    assert alone.objects
    crowded = replace(
        alone, objects=alone.objects + tuple(replace(o, is_crowd=True) for o in alone.objects)
    )
    # Beside another photograph, so that both are padded.
    before, after = (
        task.batches(loaded, [row, rows[1]], Sampling(0, "image_boxes"), 2)[0]
        for row in (alone, crowded)
    )
    target = after.targets[0]
    for key, value in before.targets[0].items():
        assert torch.equal(target[key], value)
        assert torch.equal(target[CROWD + key], value)
    with torch.no_grad():
        output = task.forward(loaded.model, after)
        assert torch.equal(task.loss(output, after), task.loss(output, before))
    records = AveragePrecision(lambda *_: [{
        "boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0),
    }] * 2).records(output, output.logits, after)  # fmt: skip
    truth = records[0][1]
    half = len(truth) // 2
    assert [row[5] for row in truth] == [0] * half + [1] * half
    assert [row[:5] for row in truth[:half]] == [row[:5] for row in truth[half:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssdlite"])
def test_torchvision_sorts_out_as_its_own_forward_does(name, shared):
    task, loaded, batch = loaded_with_batch(shared, name, 1)
    images = batch.inputs["pixel_values"]
    seen = SimpleNamespace(image_sizes=[tuple(images.shape[-2:])], tensors=images)
    loaded.model.transform.forward = lambda *_: (seen, None)
    loaded.model.transform.postprocess = lambda result, *_: result
    with torch.no_grad():
        (own,) = loaded.model(list(images))
        output = task.forward(loaded.model, batch)
        (found,) = loaded.processor.find(output, tuple(images.shape[-2:]))
    assert len(own["scores"])
    for key, value in own.items():
        assert torch.equal(found[key], value), key


@pytest.mark.slow
def test_detectors_that_choose_their_queries_are_compared_query_by_query(shared):
    """A change after the choice, which does not change it, is one that each query shows."""
    task, loaded, batch = loaded_with_batch(shared, "rt_detr", 2)
    choices = task.same_choices()
    with torch.no_grad():
        with choices.noted():
            before = task.forward(loaded.model, batch)
        # The scores by which queries are chosen turn round, and nothing else.
        head = loaded.model.model.enc_score_head
        head.weight.neg_()
        head.bias.neg_()
        free = task.forward(loaded.model, batch)
        with choices.again():
            again = task.forward(loaded.model, batch)
    assert not torch.allclose(free.logits, before.logits, atol=1e-4)
    assert torch.allclose(again.logits, before.logits, atol=1e-5)
    assert float(box_damage(before, again).max()) < 1e-4
