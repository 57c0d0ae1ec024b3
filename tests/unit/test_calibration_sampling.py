"""Properties of the draw, on small made-up datasets."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layersense.calibration.records import Caption, Image, Records
from layersense.calibration.sampling import Sample, draw
from layersense.errors import LayersenseError


def records(per_image: list[int]) -> Records:
    """Make images with the given numbers of captions."""
    made = Records(Path("made.json"), Path("images"))
    for key, captions in enumerate(per_image, start=1):
        made.images.append(Image(key, key, f"{key}.jpg", None, None))
        for _ in range(captions):
            number = 1000 + len(made.captions)
            made.captions.append(Caption(number, number, key, f"text {number}"))
    return made


def available(made: Records, seed: int) -> dict[str, int]:
    """Count the captions of each split, by asking for too many."""
    counts = {}
    for split in ("calibration", "heldout"):
        asked = {"calibration": 0, "heldout": 0, split: 10**6}
        with pytest.raises(LayersenseError) as told:
            draw(made, **asked, seed=seed, name="d")
        counts[split] = int(str(told.value).split("but only ")[1].split()[0])
    return counts


shapes = st.lists(st.integers(0, 5), min_size=2, max_size=30).filter(any)


@given(shapes, st.integers(0, 9), st.randoms(use_true_random=False), st.data())
def test_draw(shape: list[int], seed: int, dice: random.Random, data: st.DataObject) -> None:
    made = records(shape)
    there = available(made, seed)
    assert sum(there.values()) == len(made.captions)
    sizes = {split: data.draw(st.integers(0, n)) for split, n in there.items()}
    samples = draw(made, **sizes, seed=seed, name="d")

    dice.shuffle(made.images)
    dice.shuffle(made.captions)
    assert draw(made, **sizes, seed=seed, name="d") == samples, "depends on the order of the file"

    full = draw(made, **there, seed=seed, name="d")
    for unit in ("caption", "image", "pair"):
        for split in ("calibration", "heldout"):
            few = [s for s in samples if (s.unit, s.split) == (unit, split)]
            all_ = [s for s in full if (s.unit, s.split) == (unit, split)]
            assert few == all_[: len(few)], "a smaller sample is not the start of a larger one"
            assert [s.position for s in few] == list(range(len(few)))

    images = {split: {s.image_id for s in full if s.split == split} for split in there}
    assert not images["calibration"] & images["heldout"]
    assert max(Counter((s.unit, s.caption_id, s.image_id) for s in full).values()) == 1

    owner = {caption.id: caption.image_id for caption in made.captions}
    assert {s.caption_id for s in full if s.unit == "caption"} == set(owner)
    for sample in full:
        if sample.unit == "pair":
            assert sample.caption_id != sample.target_caption_id
            assert owner[sample.caption_id] == owner[sample.target_caption_id] == sample.image_id


@given(st.integers(0, 10**9))
def test_small_dataset_fills_both_splits_with_any_seed(seed: int) -> None:
    samples = draw(records([5] * 27), calibration=96, heldout=16, seed=seed, name="d")
    captions = Counter(s.split for s in samples if s.unit == "caption")
    assert captions == {"calibration": 96, "heldout": 16}


def test_seed_decides() -> None:
    made = records([5] * 30)
    one, two = (draw(made, calibration=50, heldout=9, seed=s, name="d") for s in (0, 1))
    assert one != two


def test_draw_is_not_biased_to_an_end_of_the_file() -> None:
    samples = draw(records([1] * 1000), calibration=400, heldout=100, seed=3, name="d")
    drawn = [s.image_id for s in samples if s.unit == "caption"]
    # 500 of 1000 ids without replacement: mean 500.5, standard error 9.1
    assert abs(sum(i for i in drawn if i) / len(drawn) - 500.5) < 5 * 9.1


def test_images_count_where_there_are_no_captions() -> None:
    samples = draw(records([0] * 10), calibration=8, heldout=2, seed=0, name="d")
    assert {s.unit for s in samples} == {"image"}
    assert sorted(s.image_id for s in samples if s.image_id) == list(range(1, 11))


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(
        LayersenseError, match=r"made\.json: dataset mine asks for 9 calibration rows, but only 8"
    ):
        draw(records([1] * 10), calibration=9, heldout=0, seed=0, name="mine")


def test_texts_without_images_are_split_too() -> None:
    made = Records(Path("t.jsonl"), None)
    made.captions = [Caption(i, f"text {i}", None, f"text {i}") for i in range(10)]
    samples = draw(made, calibration=8, heldout=2, seed=0, name="d")
    assert samples.count(Sample("caption", "heldout", 0, None, samples[-2].caption_id, None)) == 1
    assert {s.caption_id for s in samples} == set(range(10))
    assert {s.unit for s in samples} == {"caption"}
