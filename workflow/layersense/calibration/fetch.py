"""Fetch COCO: the annotations once, then the images that a dataset draws, and no others."""

import logging
import os
import re
import zipfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from layersense.calibration.archives import find_member, image_folder, is_file, read_file
from layersense.calibration.build import coco_files, draw_samples, sampled_images
from layersense.calibration.coco import read_coco
from layersense.calibration.download import Downloader, RefusedError, Wanted, shown
from layersense.calibration.images import MAX_BYTES, decode_image
from layersense.calibration.records import Image, Records
from layersense.config import CocoDataset
from layersense.errors import LayersenseError
from layersense.files import exclusive, write_json
from layersense.progress import Progress

logger = logging.getLogger(__name__)

MAX_ANNOTATIONS = 4 * 2**30
_ZIP_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.zip")
_MEGABYTE = 1_000_000


def fetch_coco(name: str, dataset: CocoDataset, out: Path, connections: int = 4) -> None:
    """Fetch what a COCO dataset lacks, and record what it then has.

    Nothing that is there is fetched again, whoever put it there: a larger sample fetches what is
    new. One process at a time fetches into a root.

    Args:
        name: the dataset's name in the config.
        dataset: its entry.
        out: the record to write, JSON.
        connections: at most so many to the server at once.

    Raises:
        LayersenseError: an address is wrong, a server refuses or cannot be reached, what came is
            not what was expected, or the disk is full. What is complete stays.
    """
    root = Path(dataset.root).expanduser().absolute()
    with ExitStack() as stack:
        if not root.exists() or os.access(root, os.W_OK):
            # A root that nobody may write to can still hold all that is needed.
            lock = exclusive(
                root / ".fetch.lock",
                "another job fetches into this folder; waiting for it",
                "nothing keeps two jobs from fetching the same into this folder",
            )
            stack.enter_context(lock)
        downloader = stack.enter_context(Downloader(connections))
        captions, instances, images = coco_files(dataset)
        if captions is None and instances is None:
            _fetch_annotations(name, dataset, root / "annotations", downloader)
            captions, instances, images = coco_files(dataset)
        records = read_coco(captions, instances, image_folder(images))
        wanted = sampled_images(records, draw_samples(name, dataset, records))
        fetched = _fetch_images(records, wanted, downloader)
    record = {
        "captions": None if captions is None else str(captions),
        "instances": None if instances is None else str(instances),
        "images": str(images),
        "sampled": len(wanted),
        "fetched": fetched,
    }
    write_json(out, record)


def _fetch_annotations(
    name: str, dataset: CocoDataset, folder: Path, downloader: Downloader
) -> None:
    """Fetch the zip of annotations into ``folder``; it is read as it is."""
    url = dataset.annotations_url
    if url is None:
        raise LayersenseError(
            f"datasets.{name}: split {dataset.split} is none of COCO's own with annotations; say "
            "in `fetch.annotations` where its zip lies"
        )
    archive = unquote(urlsplit(url).path).rpartition("/")[2]
    if not _ZIP_NAME.fullmatch(archive):
        raise LayersenseError(
            f"datasets.{name}.fetch.annotations: {shown(url)} is not the address of a .zip; give "
            f"one that holds captions_{dataset.split}.json or instances_{dataset.split}.json"
        )
    kinds = [f"{kind}_{dataset.split}.json" for kind in ("captions", "instances")]
    bar: Progress | None = None

    def tell(there: int, whole: int | None) -> None:
        nonlocal bar
        if bar is None:
            bar = Progress("fetch annotations", (whole or there) // _MEGABYTE, "MB")
        bar.step(there // _MEGABYTE - bar.done)

    logger.info("fetching %s", shown(url))
    try:
        file = Wanted(url, folder / archive, MAX_ANNOTATIONS, partial(_check_zip, kinds))
        downloader.fetch(file, tell)
    finally:
        if bar is not None:
            bar.close()


def _check_zip(kinds: list[str], path: Path) -> None:
    """Refuse what is no zip, lacks the annotations, or has them damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member for member in archive.namelist() if member.rpartition("/")[2] in kinds]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise LayersenseError(f"it is not a whole zip file ({error})") from error
    if not names:
        raise RefusedError(f"the zip holds neither {' nor '.join(kinds)}")
    for name in names:
        read_file(path / name)  # compares the checksum


def _fetch_images(records: Records, wanted: list[Image], downloader: Downloader) -> int:
    """Fetch the images that are not there; return how many."""
    root = records.images_root
    assert root is not None
    missing = [image for image in wanted if not is_file(root / image.file_name)]
    for image in missing:
        if find_member(root / image.file_name) is not None:
            raise LayersenseError(
                f"{root / image.file_name}: is not in that zip, into which nothing can be fetched; "
                "unpack it, or name another folder in `images`"
            )
        if image.url is None:
            raise LayersenseError(
                f"{records.listing}: image {image.id} has no `coco_url` and is not in {root}; put "
                f"{image.file_name} there, or say where it lies"
            )
    logger.info("%d of %d sampled images are to be fetched", len(missing), len(wanted))
    if not missing:
        return 0
    files = [
        Wanted(image.url or "", root / image.file_name, MAX_BYTES, partial(_check_image, image))
        for image in missing
    ]
    progress = Progress("fetch images", len(missing), "image")
    try:
        refused = downloader.fetch_all(files, progress.step)
    finally:
        progress.close()
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise LayersenseError(
            f"{len(refused)} of {len(missing)} images could not be fetched, all others are there: "
            f"{refused[0]}{more}"
        )
    return len(missing)


def _check_image(image: Image, path: Path) -> None:
    """Refuse what is no whole image, or one of another size than is listed."""
    size = decode_image(path.read_bytes(), image.file_name).size
    # Whether it is listed upright or as it is stored is no matter of fetching.
    if None not in (image.width, image.height) and sorted(size) != sorted(
        (image.width or 0, image.height or 0)
    ):
        raise LayersenseError(
            f"{image.file_name} is {size[0]}×{size[1]} pixels, but {image.width}×{image.height} "
            "are listed"
        )
