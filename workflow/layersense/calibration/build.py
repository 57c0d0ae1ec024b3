"""Build a calibration database from any source.

`images`, `captions`, `boxes`, `segments` and `categories` hold all that the source lists, so that
a draw can be audited with SQL; `samples` holds what was drawn, and only images in it are opened.
"""

import hashlib
import logging
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from layersense.calibration.archives import (
    find_in_zips,
    find_member,
    image_folder,
    is_file,
    is_folder,
)
from layersense.calibration.coco import merge, read_coco
from layersense.calibration.database import (
    APPLICATION_ID,
    INDEXES,
    SAMPLE,
    TABLES,
    USER_VERSION,
    open_database,
)
from layersense.calibration.images import decode_image, read_image
from layersense.calibration.records import Image, Records
from layersense.calibration.sampling import Sample, draw
from layersense.calibration.tables import read_table, read_texts
from layersense.config import CocoDataset, Dataset, ImagesDataset, TextDataset
from layersense.errors import LayersenseError
from layersense.files import atomic_path, canonical_json, digest_json, exclusive

logger = logging.getLogger(__name__)

_WORKERS = 4


@dataclass(frozen=True)
class _Checked:
    """A sampled image that was opened."""

    sha256: str
    width: int
    height: int


def build_database(name: str, dataset: Dataset, path: str | Path) -> None:
    """Read a source, draw its samples, check their images and write ``path`` in one step.

    Of several processes that build the same at the same time one does, and the others wait for it.

    Args:
        name: the dataset's name in the config.
        dataset: its entry in the config; relative paths are relative to the working directory.
        path: the database to write.

    Raises:
        LayersenseError: the source or a sampled image is unusable, more rows are asked for than
            there are, or ``path`` cannot be written. Nothing is left behind then.
    """
    file = Path(path)
    lock = file.with_name(f".{file.name}.lock")
    with exclusive(
        lock,
        "another job builds this dataset; waiting for it",
        "several jobs that build this dataset all do the whole work",
    ) as waited:
        if waited and _is_of(file, dataset):
            logger.info("%s: was built meanwhile", path)
            return
        records = read_records(dataset)
        samples = draw_samples(name, dataset, records)
        for what, count in (
            ("empty", records.empty_captions),
            ("repeated", records.repeated_captions),
        ):
            if count:
                logger.warning("%s: %d %s texts are left out", records.listing, count, what)
        images = check_images(records, samples)
        write_database(name, dataset, records, samples, images, path)


def _is_of(path: Path, dataset: Dataset) -> bool:
    """Return whether a database is there and was built from the same entry of the config."""
    try:
        with open_database(path) as database:
            return database.meta.get("settings") == _settings_digest(dataset)
    except LayersenseError:
        return False


def _settings_digest(dataset: Dataset) -> str:
    return digest_json(dataset.model_dump(mode="json", exclude={"fetch"}))


def draw_samples(name: str, dataset: Dataset, records: Records) -> list[Sample]:
    """Return the samples that the config asks for.

    Raises:
        LayersenseError: fewer rows than asked for are there.
    """
    return draw(
        records,
        calibration=dataset.calibration,
        heldout=dataset.heldout,
        seed=dataset.seed,
        name=name,
    )


def read_records(dataset: Dataset) -> Records:
    """Return all that the source of ``dataset`` lists.

    Raises:
        LayersenseError: a file is missing or not what it should be.
    """
    if isinstance(dataset, CocoDataset):
        return _read_coco(dataset)
    if isinstance(dataset, ImagesDataset):
        return read_table(_path(dataset.table), _folder(dataset.images))
    if isinstance(dataset, TextDataset):
        return read_texts(_path(dataset.file))
    notes = SAMPLE / "annotations"
    parts = (
        read_coco(
            notes / f"captions_{split}.json",
            notes / f"instances_{split}.json",
            SAMPLE,
            prefix=f"{split}/",
        )
        for split in ("train2017", "val2017")
    )
    return merge(parts, listing=SAMPLE, images_root=SAMPLE)


def sampled_images(records: Records, samples: list[Sample]) -> list[Image]:
    """Return the images that any sample holds, by id."""
    wanted = {sample.image_id for sample in samples}
    return [image for image in records.images if image.id in wanted]


def check_images(records: Records, samples: list[Sample]) -> dict[int, _Checked]:
    """Open every sampled image; return its digest and size by image id.

    Raises:
        LayersenseError: one is missing, empty, damaged or of another size than its boxes are for.
    """
    root = records.images_root
    if root is None:
        return {}
    chosen = sampled_images(records, samples)
    _check_there(records, root, chosen)
    boxed = {box.image_id for box in records.boxes}

    def check(image: Image) -> _Checked:
        path = root / image.file_name
        try:
            data = read_image(path)
            width, height = decode_image(data, path).size
        except LayersenseError as error:
            raise LayersenseError(f"{error} (image {image.key!r} of {records.listing})") from error
        listed = {image.width, image.height}
        if image.id in boxed and None not in listed and listed != {width, height}:
            raise LayersenseError(
                f"{path}: is {width}×{height} pixels, but {records.listing} has boxes for "
                f"{image.width}×{image.height} in image {image.id}; use the images that belong "
                "to the instances"
            )
        return _Checked(hashlib.sha256(data).hexdigest(), width, height)

    with ThreadPoolExecutor(_WORKERS) as pool:
        return {
            image.id: found for image, found in zip(chosen, pool.map(check, chosen), strict=True)
        }


def _check_there(records: Records, root: Path, chosen: list[Image]) -> None:
    """Refuse a draw of which several images are missing, in one sentence for all.

    Raises:
        LayersenseError: they are; it says how many, and where they are if that is near.
    """
    try:
        missing = [image for image in chosen if not is_file(root / image.file_name)]
    except OSError:
        return  # no permission, of which reading tells more
    if len(missing) < 2:
        return  # a single one is told of as it is read
    name = missing[0].file_name
    if len(missing) < len(chosen):
        raise LayersenseError(
            f"{root / name}: there is no such image, nor {len(missing) - 1} more of the "
            f"{len(chosen)} that are drawn from {records.listing}; restore them or drop their rows"
        )
    last = Path(name).name
    near = [root.parent / name, *sorted(root.parent.glob(f"*/{last}")), *root.glob(f"*/{last}")]
    seen = next((file for file in near if file.is_file()), None)
    raise LayersenseError(
        f"{root}: holds none of the {len(chosen)} images that are drawn from {records.listing}, "
        f"such as {name!r}; set `images` of the dataset to the folder that these names are "
        f"relative to{f', one of them is {seen}' if seen else ''}"
    )


def write_database(
    name: str,
    dataset: Dataset,
    records: Records,
    samples: list[Sample],
    images: dict[int, _Checked],
    path: str | Path,
) -> None:
    """Write the database to ``path`` in one step.

    Raises:
        LayersenseError: the disk is full or ``path`` cannot be written.
    """
    meta = _meta(name, dataset, records, samples)
    meta["digest"] = _digest(records, samples, images)
    with atomic_path(path) as temporary:
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                _fill(connection, records, samples, images, meta)
        except sqlite3.OperationalError as error:
            kind = getattr(error, "sqlite_errorname", "")
            if not kind.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN")):
                raise
            raise LayersenseError(
                f"{path}: cannot be written ({error}); free disk space or choose another folder"
            ) from error


def coco_files(dataset: CocoDataset) -> tuple[Path | None, Path | None, Path]:
    """Return captions, instances and image folder of a COCO dataset, each on disk or in a zip.

    What the config names is taken. Else captions and instances are those of `annotations/` under
    the root, or in a zip there or in the root; one of the two may be missing. The images are in
    the folder of the split, or in the zip of its name.

    Raises:
        LayersenseError: a zip is damaged.
    """
    root = _path(dataset.root)
    notes = root / "annotations"

    def find(named: str | None, kind: str) -> Path | None:
        if named is not None:
            return _path(named)
        name = f"{kind}_{dataset.split}.json"
        return notes / name if (notes / name).exists() else find_in_zips([notes, root], name)

    captions = find(dataset.captions, "captions")
    instances = find(dataset.instances, "instances")
    images = _path(dataset.images) if dataset.images else root / dataset.split
    packed = images.with_name(f"{images.name}.zip")
    if dataset.images is None and not images.exists() and packed.is_file():
        images = packed
    return captions, instances, images


def source_files(dataset: Dataset) -> list[Path]:
    """Return the files that list what a dataset holds; an edit of one makes the database stale.

    Files in a zip are that zip. Images are not among them, but for a zip of them: the database
    holds their digests, by which jobs notice one that changed. Of a dataset that fetches, the
    record of what was fetched stands for all. Files in the working directory are relative to it,
    as a study may be moved.

    Raises:
        LayersenseError: a zip is damaged.
    """
    files: list[Path | None]
    if isinstance(dataset, ImagesDataset):
        files = [_path(dataset.table), _packed(_path(dataset.images))]
    elif isinstance(dataset, TextDataset):
        files = [_path(dataset.file)]
    elif isinstance(dataset, CocoDataset) and dataset.fetch is None:
        captions, instances, images = coco_files(dataset)
        files = [
            *(file and (_packed(file) or file) for file in (captions, instances)),
            _packed(images),
        ]
    else:
        files = []
    here = Path.cwd()
    return [
        file.relative_to(here) if file.is_relative_to(here) else file
        for file in dict.fromkeys(files)
        if file is not None
    ]


def _packed(path: Path) -> Path | None:
    """Return the zip that a path means or goes through, if any."""
    if path.is_file() and is_folder(path):
        return path
    place = find_member(path)
    return None if place is None else place[0]


def _read_coco(dataset: CocoDataset) -> Records:
    captions, instances, images = coco_files(dataset)
    if captions is None and instances is None:
        captions = _path(dataset.root) / "annotations" / f"captions_{dataset.split}.json"
    return read_coco(captions, instances, _folder(images))


def _path(text: str | Path) -> Path:
    return Path(text).expanduser().absolute()


def _folder(text: str | Path) -> Path:
    path = _path(text)
    if not is_folder(path):
        raise LayersenseError(f"{path}: there is no such image folder or zip; correct its path")
    return image_folder(path)


def _meta(name: str, dataset: Dataset, records: Records, samples: list[Sample]) -> dict[str, str]:
    meta = {
        "dataset": name,
        "source": dataset.source,
        "settings": _settings_digest(dataset),
        "split": dataset.split if isinstance(dataset, CocoDataset) else "",
        "seed": str(dataset.seed),
        "images_root": "" if dataset.source == "sample" else str(records.images_root or ""),
        "images": str(len(records.images)),
        "captions": str(len(records.captions)),
        "boxes": str(len(records.boxes)),
        "empty_captions": str(records.empty_captions),
        "repeated_captions": str(records.repeated_captions),
    }
    for sample in samples:
        key = f"samples.{sample.unit}.{sample.split}"
        meta[key] = str(int(meta.get(key, "0")) + 1)
    return meta


def _digest(records: Records, samples: list[Sample], images: dict[int, _Checked]) -> str:
    """Return the SHA-256 over the sampled rows, their images' bytes and those images' boxes.

    It goes by content, so neither ids nor folders that the user's own files got by chance enter.
    """
    chosen = {image.id: image for image in records.images if image.id in images}
    names = {key: image.file_name for key, image in chosen.items()}
    wanted = {s.caption_id for s in samples} | {s.target_caption_id for s in samples}
    texts = {c.id: c.text for c in records.captions if c.id in wanted}
    categories = {category.id: category.name for category in records.categories}
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(canonical_json(values).encode() + b"\n")

    for s in samples:
        image = None if s.image_id is None else names[s.image_id]
        caption = None if s.caption_id is None else texts[s.caption_id]
        target = None if s.target_caption_id is None else texts[s.target_caption_id]
        add(s.unit, s.split, s.position, image, caption, target)
    for key in sorted(names, key=names.__getitem__):
        add(names[key], images[key].sha256)
    for box in records.boxes:
        if box.image_id in names:
            mask = "" if box.segmentation is None else bytes(box.segmentation).decode()
            category = categories[box.category_id]
            add(names[box.image_id], category, box.bbox, box.area, box.iscrowd, mask)
    return digest.hexdigest()


def _fill(
    connection: sqlite3.Connection,
    records: Records,
    samples: list[Sample],
    images: dict[int, _Checked],
    meta: dict[str, str],
) -> None:
    # The file is new and renamed only when whole, so a journal would protect nothing.
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {USER_VERSION}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.executescript(f"BEGIN; {TABLES}")
    insert = connection.executemany
    insert("INSERT INTO meta VALUES (?, ?)", sorted(meta.items()))
    insert("INSERT INTO images VALUES (?, ?, ?, ?, ?)", _image_rows(records, images))
    insert(
        "INSERT INTO captions VALUES (?, ?, ?)",
        ((c.id, c.image_id, c.text) for c in records.captions),
    )
    insert(
        "INSERT INTO categories VALUES (?, ?, ?)",
        ((c.id, c.name, c.supercategory) for c in records.categories),
    )
    insert(
        "INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        ((b.id, b.image_id, b.category_id, *b.bbox, b.area, b.iscrowd) for b in records.boxes),
    )
    insert(
        "INSERT INTO segments VALUES (?, ?)",
        (
            (b.id, bytes(b.segmentation).decode())
            for b in records.boxes
            if b.segmentation is not None
        ),
    )
    insert("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", map(astuple, samples))
    connection.execute(INDEXES)
    connection.commit()


def _image_rows(
    records: Records, images: dict[int, _Checked]
) -> Iterator[tuple[int, str, int | None, int | None, str | None]]:
    for image in records.images:
        found = images.get(image.id)
        if found is None:
            yield image.id, image.file_name, image.width, image.height, None
        else:
            width = found.width if image.width is None else image.width
            height = found.height if image.height is None else image.height
            yield image.id, image.file_name, width, height, found.sha256
