"""Draw the samples of a dataset by seeded hash.

How a row comes into the sample:

- **Split.** A photograph (a text, where there are no photographs) is ranked by the hash of seed
  and its own key; the lowest :data:`HELDOUT_SHARE` of all are held out, the rest calibrate. So
  membership depends on what is listed and on the seed, never on the sizes asked for; and as it
  is a share of ranks, not a threshold of hashes, a small dataset always fills both splits (27
  photographs: 5 held out, 22 calibrate).
- **Order.** Within a split, the rows of a unit are ranked by another hash of their own key, and
  the first n are the sample. So it is independent of file order, and the first rows of a larger
  sample are the smaller one.
- **Keys** are COCO's ids; file name and text for the user's own files.
- **Units.** `caption`: a caption with its image. `image`: each image once. `pair`: a caption and
  another one of the same image, the one whose hash with the first is lowest; each caption is the
  source of one pair.
- **Sizes** count rows of the primary unit: captions, or images where there are no captions. The
  other units hold up to as many.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from layersense.calibration.records import Caption, Image, Records
from layersense.errors import LayersenseError

T = TypeVar("T", bound=Image | Caption)

HELDOUT_SHARE = 0.2

Unit = Literal["caption", "image", "pair"]
Split = Literal["calibration", "heldout"]
UNITS: tuple[Unit, ...] = ("caption", "image", "pair")
SPLITS: tuple[Split, ...] = ("calibration", "heldout")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a sample, by ids."""

    unit: Unit
    split: Split
    position: int
    image_id: int | None
    caption_id: int | None
    target_caption_id: int | None


def draw(records: Records, *, calibration: int, heldout: int, seed: int, name: str) -> list[Sample]:
    """Return the samples of every unit and split; see the module.

    Args:
        records: all that the source lists.
        calibration: rows of the primary unit in the calibration split.
        heldout: rows of the primary unit in the held-out split.
        seed: seed of all hashes.
        name: the dataset's name in the config, for messages.

    Raises:
        LayersenseError: fewer rows than asked for are there.
    """
    held = _heldout(records, seed)
    siblings: dict[int, list[Caption]] = {}
    for caption in records.captions:
        if caption.image_id is not None:
            siblings.setdefault(caption.image_id, []).append(caption)
    primary = "caption" if records.captions else "image"
    samples: list[Sample] = []
    for split, asked in zip(SPLITS, (calibration, heldout), strict=True):
        inside = split == "heldout"
        captions = [c for c in records.captions if (_group(c) in held) is inside]
        images = [i for i in records.images if (i.id in held) is inside]
        there = len(captions if primary == "caption" else images)
        if asked > there:
            raise LayersenseError(
                f"{records.listing}: dataset {name} asks for {asked} {split} rows, but only "
                f"{there} {primary}s are in that split (a fifth of the images or texts is held "
                f"out); set `{split}` to at most {there}"
            )
        for position, caption in enumerate(_first(asked, captions, seed, "caption")):
            samples.append(Sample("caption", split, position, caption.image_id, caption.id, None))
        for position, image in enumerate(_first(asked, images, seed, "image")):
            samples.append(Sample("image", split, position, image.id, None, None))
        paired = [c for c in captions if c.image_id is not None and len(siblings[c.image_id]) > 1]
        for position, source in enumerate(_first(asked, paired, seed, "pair")):
            assert source.image_id is not None
            target = _target(source, siblings[source.image_id], seed)
            samples.append(Sample("pair", split, position, source.image_id, source.id, target.id))
    return samples


def photographs(records: Records, seed: int) -> dict[Split, int]:
    """Return how many photographs, or texts, of each split give a row: so many are there to ask.

    Where there are captions, a photograph without one gives none.
    """
    held = _heldout(records, seed)
    groups = {_group(c) for c in records.captions} or {i.id for i in records.images}
    return {"calibration": len(groups - held), "heldout": len(groups & held)}


def _group(caption: Caption) -> int:
    """Return what a split is disjoint by: the image, or the text itself where there is none."""
    return caption.id if caption.image_id is None else caption.image_id


def _heldout(records: Records, seed: int) -> set[int]:
    groups: Sequence[Image | Caption] = records.images or records.captions
    size = round(HELDOUT_SHARE * len(groups))
    if len(groups) > 1:
        size = max(size, 1)
    return {group.id for group in _first(size, groups, seed, "split")}


def _first(n: int, rows: Iterable[T], seed: int, purpose: str) -> list[T]:
    """Return the ``n`` rows whose keys have the lowest hashes, in that order."""
    rank = _ranking(seed, purpose)
    return heapq.nsmallest(n, rows, key=lambda row: rank(row.key))


def _target(source: Caption, captions: list[Caption], seed: int) -> Caption:
    rank = _ranking(seed, f"target/{source.key}")
    return min((c for c in captions if c.id != source.id), key=lambda c: rank(c.key))


def _ranking(seed: int, purpose: str) -> Callable[[int | str], bytes]:
    start = hashlib.sha256(f"{seed}/{purpose}/".encode())

    def rank(key: int | str) -> bytes:
        state = start.copy()
        state.update(str(key).encode())
        return state.digest()

    return rank
