"""The calibration database: its schema, and how everything else reads it."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from layersense.calibration.images import read_image
from layersense.calibration.sampling import SPLITS, UNITS, Split, Unit
from layersense.errors import LayersenseError

APPLICATION_ID = 0x4C736E73
"""`Lsns`, in the SQLite header."""
USER_VERSION = 1
SAMPLE = Path(__file__).resolve().parent.parent / "resources" / "coco-sample"
"""The embedded sample; a database of it stays readable when the repository moves."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE images (
    image_id INTEGER PRIMARY KEY,
    file_name TEXT NOT NULL UNIQUE,
    width INTEGER,
    height INTEGER,
    sha256 TEXT  -- of the file's bytes; NULL where no sample holds the image
);
CREATE TABLE captions (
    caption_id INTEGER PRIMARY KEY,
    image_id INTEGER REFERENCES images,
    caption TEXT NOT NULL CHECK (caption <> '')
);
CREATE TABLE categories (
    category_id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    supercategory TEXT NOT NULL
);
CREATE TABLE boxes (
    box_id INTEGER PRIMARY KEY,
    image_id INTEGER NOT NULL REFERENCES images,
    category_id INTEGER NOT NULL REFERENCES categories,
    x REAL NOT NULL, y REAL NOT NULL,  -- pixels, top left corner
    width REAL NOT NULL CHECK (width >= 0),
    height REAL NOT NULL CHECK (height >= 0),
    area REAL,
    is_crowd INTEGER NOT NULL CHECK (is_crowd IN (0, 1))
);
CREATE TABLE segments (
    box_id INTEGER PRIMARY KEY REFERENCES boxes,
    segmentation TEXT NOT NULL  -- JSON: polygons, or COCO's run lengths
);
CREATE TABLE samples (
    unit TEXT NOT NULL CHECK (unit IN ('caption', 'image', 'pair')),
    split TEXT NOT NULL CHECK (split IN ('calibration', 'heldout')),
    position INTEGER NOT NULL CHECK (position >= 0),
    image_id INTEGER REFERENCES images,
    caption_id INTEGER REFERENCES captions,
    target_caption_id INTEGER REFERENCES captions,
    PRIMARY KEY (unit, split, position),
    CHECK (unit <> 'caption' OR (caption_id NOTNULL AND target_caption_id ISNULL)),
    CHECK (unit <> 'image'
           OR (image_id NOTNULL AND caption_id ISNULL AND target_caption_id ISNULL)),
    CHECK (unit <> 'pair' OR (image_id NOTNULL AND caption_id NOTNULL
                              AND target_caption_id NOTNULL AND caption_id <> target_caption_id))
);
CREATE UNIQUE INDEX no_row_twice ON samples (
    unit, coalesce(image_id, 'none'), coalesce(caption_id, 'none'),
    coalesce(target_caption_id, 'none')
);
CREATE INDEX samples_by_image ON samples (image_id, split);
CREATE TRIGGER splits_share_no_image BEFORE INSERT ON samples
WHEN EXISTS (SELECT 1 FROM samples WHERE image_id = NEW.image_id AND split <> NEW.split)
BEGIN SELECT raise(ABORT, 'an image stands in one split only'); END;
CREATE TRIGGER captions_are_of_the_image BEFORE INSERT ON samples
WHEN EXISTS (SELECT 1 FROM captions WHERE caption_id IN (NEW.caption_id, NEW.target_caption_id)
             AND image_id IS NOT NEW.image_id)
BEGIN SELECT raise(ABORT, 'a sample holds captions of its own image only'); END;
CREATE TRIGGER samples_stay BEFORE UPDATE ON samples
BEGIN SELECT raise(ABORT, 'samples are drawn once and never changed'); END;
"""
"""Created before the rows, so that every row is checked."""

INDEXES = "CREATE INDEX boxes_by_image ON boxes (image_id);"
"""Created after the rows, which is faster."""


@dataclass(frozen=True)
class Object:
    """One object that an image shows; pixels of the file, from the top left corner."""

    category: str
    """Name of its class."""
    bbox: tuple[float, float, float, float]
    """Left, top, width, height."""
    is_crowd: bool = False
    """Whether it is a region of many objects, which detectors do not count."""
    segmentation: str | None = None
    """Its mask as JSON: polygons, or COCO's run lengths."""


@dataclass(frozen=True)
class Row:
    """One calibration row."""

    image_path: Path | None
    """Where the photograph lies; None in a dataset of texts."""
    caption: str | None
    """The text; None for the unit `image`."""
    target: str | None = None
    """Another caption of the same image, for the unit `pair`."""
    image_id: int | None = None
    caption_id: int | None = None
    position: int = 0
    objects: tuple[Object, ...] = ()
    """What the image shows, for the unit `image` of a source with boxes."""
    texts: tuple[str, ...] = ()
    """All texts of the image, for the unit `image`."""


class Database:
    """A calibration database, read-only; close it, or use it in a ``with`` block."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        with self._readable():
            self.meta: dict[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
        root = self.meta.get("images_root", "")
        self._root = SAMPLE if self.meta.get("source") == "sample" else Path(root)

    def count(self, unit: Unit, split: Split) -> int:
        """Return how many rows a unit has in a split."""
        _check_words(self.path, unit, split)
        with self._readable():
            found = self._connection.execute(
                "SELECT count(*) FROM samples WHERE unit = ? AND split = ?", (unit, split)
            ).fetchone()
        return int(found[0])

    def rows(self, unit: Unit, split: Split, limit: int | None = None) -> list[Row]:
        """Return the rows of a unit in a split, by position: all of them, or the first ``limit``.

        Raises:
            LayersenseError: there are fewer than ``limit``, or the file is damaged.
        """
        there = self.count(unit, split)
        if limit is not None and limit > there:
            raise LayersenseError(
                f"{self.path}: holds {there} {split} rows of unit {unit!r}, but {limit} were "
                "asked for; ask for fewer, or enlarge the dataset in the config"
            )
        query = (
            "SELECT file_name, c.caption, t.caption, s.image_id, s.caption_id, position "
            "FROM samples s LEFT JOIN images USING (image_id) "
            "LEFT JOIN captions c ON c.caption_id = s.caption_id "
            "LEFT JOIN captions t ON t.caption_id = s.target_caption_id "
            "WHERE unit = ? AND split = ? ORDER BY position LIMIT ?"
        )
        with self._readable():
            found = self._connection.execute(
                query, (unit, split, there if limit is None else limit)
            ).fetchall()
        plain = [Row(None if name is None else self._root / name, *rest) for name, *rest in found]
        return self._with_objects(plain) if unit == "image" else plain

    def check_images(self, rows: Iterable[Row]) -> None:
        """Refuse photographs that are not those that the rows were drawn with, by their digests.

        A result names the digest of the database, so it must be measured on these bytes.

        Raises:
            LayersenseError: one was changed, has gone or cannot be read.
        """
        with self._readable():
            digests = dict(self._connection.execute("SELECT image_id, sha256 FROM images"))
        shown = {row.image_id: row.image_path for row in rows if row.image_path is not None}
        for image, path in shown.items():
            assert path is not None
            if hashlib.sha256(read_image(path)).hexdigest() != digests[image]:
                raise LayersenseError(
                    f"{path}: is not the image that {self.path} was built with, it was changed "
                    f"since; restore it, or delete {self.path} and run the same command, which "
                    "measures anew"
                )

    def texts(self, images: Sequence[int]) -> list[tuple[str, ...]]:
        """Return all texts of each image, in the order of the source's ids."""
        found: dict[int, list[str]] = {image: [] for image in images}
        with self._readable():
            for image_id, text in self._connection.execute(
                "SELECT image_id, caption FROM captions WHERE image_id IS NOT NULL "
                "ORDER BY caption_id"
            ):
                if image_id in found:
                    found[image_id].append(text)
        return [tuple(found[image]) for image in images]

    def _with_objects(self, rows: list[Row]) -> list[Row]:
        """Return rows of images with what each shows, in the order of the source's ids."""
        objects: dict[int, list[Object]] = {}
        texts: dict[int, list[str]] = {}
        with self._readable():
            for image_id, name, x, y, width, height, is_crowd, mask in self._connection.execute(
                "SELECT image_id, name, x, y, width, height, is_crowd, segmentation FROM boxes "
                "JOIN categories USING (category_id) LEFT JOIN segments USING (box_id) WHERE "
                "image_id IN (SELECT image_id FROM samples WHERE unit = 'image') ORDER BY box_id"
            ):
                objects.setdefault(image_id, []).append(
                    Object(name, (x, y, width, height), bool(is_crowd), mask)
                )
            for image_id, text in self._connection.execute(
                "SELECT image_id, caption FROM captions WHERE image_id IN "
                "(SELECT image_id FROM samples WHERE unit = 'image') ORDER BY caption_id"
            ):
                texts.setdefault(image_id, []).append(text)
        return [
            replace(
                row,
                objects=tuple(objects.get(row.image_id or 0, ())),
                texts=tuple(texts.get(row.image_id or 0, ())),
            )
            for row in rows
        ]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> "Database":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise LayersenseError(_damaged(self.path, error)) from error


def open_database(path: str | Path) -> Database:
    """Open a calibration database for reading.

    Raises:
        LayersenseError: it is missing, no SQLite database, not one of layersense, of another
            schema version, or damaged.
    """
    file = Path(path)
    try:
        with file.open("rb") as opened:
            header = opened.read(100)
        size = file.stat().st_size
    except OSError as error:
        raise LayersenseError(
            f"{path}: the calibration database cannot be read ({error.strerror or error}); "
            "run `snakemake` to build it"
        ) from error
    if len(header) < 100 or not header.startswith(b"SQLite format 3\x00"):
        raise LayersenseError(f"{path}: is not an SQLite database; delete it and build it again")
    if int.from_bytes(header[68:72]) != APPLICATION_ID:
        raise LayersenseError(
            f"{path}: is an SQLite database, but no calibration database of layersense; move it "
            "away and build the dataset again"
        )
    version = int.from_bytes(header[60:64])
    if version != USER_VERSION:
        raise LayersenseError(
            f"{path}: has schema version {version}, this layersense reads {USER_VERSION}; delete "
            "it and build it again"
        )
    page = int.from_bytes(header[16:18])
    if size < int.from_bytes(header[28:32]) * (65536 if page == 1 else page):
        raise LayersenseError(_damaged(file, "it is cut short"))
    uri = f"file:{quote(str(file.resolve()))}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True)
    connection.execute("PRAGMA foreign_keys = ON")
    try:
        return Database(file, connection)
    except LayersenseError:
        connection.close()
        raise


def _check_words(path: Path, unit: str, split: str) -> None:
    for word, words in ((unit, UNITS), (split, SPLITS)):
        if word not in words:
            raise LayersenseError(f"{path}: has no {word!r}, but one of {', '.join(words)}")


def _damaged(path: Path, why: object) -> str:
    return f"{path}: the calibration database is damaged ({why}); delete it and build it again"
