"""What the database itself enforces, and how it is opened."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from layersense.calibration.build import build_database
from layersense.calibration.database import APPLICATION_ID, INDEXES, TABLES, open_database
from layersense.config import SampleDataset
from layersense.errors import LayersenseError


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "sample.sqlite"
    build_database("s", SampleDataset(source="sample", calibration=96, heldout=16), path)
    return path


@pytest.fixture
def empty() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.executescript(TABLES + INDEXES)
    connection.execute("INSERT INTO images (image_id, file_name) VALUES (1, 'a'), (2, 'b')")
    connection.execute("INSERT INTO captions VALUES (1, 1, 'x'), (2, 1, 'y'), (3, 2, 'z')")
    connection.execute("INSERT INTO captions VALUES (4, NULL, 'alone')")
    return connection


def insert(connection: sqlite3.Connection, *row: object) -> None:
    connection.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", row)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (("caption", "heldout", 0, 1, 2, None), "one split only"),
        (("image", "heldout", 0, 1, None, None), "one split only"),
        (("caption", "calibration", 1, 1, 1, None), "UNIQUE"),
        (("caption", "calibration", 0, 1, 2, None), "UNIQUE"),
        (("caption", "calibration", 1, 1, 3, None), "captions of its own image"),
        (("pair", "calibration", 0, 1, 1, 3), "captions of its own image"),
        (("pair", "calibration", 0, 1, 1, 1), "CHECK"),
        (("pair", "calibration", 0, 1, 1, None), "CHECK"),
        (("image", "calibration", 0, None, None, None), "CHECK"),
        (("caption", "calibration", 1, 1, None, None), "CHECK"),
        (("image", "calibration", 0, 9, None, None), "FOREIGN KEY"),
        (("word", "calibration", 0, 1, 2, None), "CHECK"),
        (("caption", "test", 0, 2, 3, None), "CHECK"),
    ],
)
def test_wrong_row_is_refused_by_the_database(
    empty: sqlite3.Connection, row: tuple[object, ...], why: str
) -> None:
    insert(empty, "caption", "calibration", 0, 1, 1, None)
    with pytest.raises(sqlite3.IntegrityError, match=why):
        insert(empty, *row)
    assert empty.execute("SELECT count(*) FROM samples").fetchone() == (1,)


def test_text_without_image_stands_once_in_all(empty: sqlite3.Connection) -> None:
    insert(empty, "caption", "calibration", 0, None, 4, None)
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(empty, "caption", "heldout", 0, None, 4, None)


def test_split_cannot_be_changed_afterwards(empty: sqlite3.Connection) -> None:
    insert(empty, "caption", "calibration", 0, 1, 1, None)
    with pytest.raises(sqlite3.IntegrityError, match="never changed"):
        empty.execute("UPDATE samples SET split = 'heldout'")


def test_rows_come_in_position_order(sample: Path) -> None:
    with open_database(sample) as database:
        rows = database.rows("caption", "calibration")
        assert [row.position for row in rows] == list(range(96)) == list(range(len(rows)))
        assert database.rows("caption", "calibration", limit=7) == rows[:7]
        assert all(row.image_path and row.image_path.is_file() and row.caption for row in rows)
        assert all(row.target is None for row in rows)
        pairs = database.rows("pair", "heldout")
        assert pairs
        assert all(row.target and row.target != row.caption for row in pairs)
        images = database.rows("image", "calibration") + database.rows("image", "heldout")
        assert len({row.image_path for row in images}) == 27
        assert {row.caption for row in images} == {None}


def test_limit_beyond_what_is_there_names_both_numbers(sample: Path) -> None:
    with (
        open_database(sample) as database,
        pytest.raises(LayersenseError, match=r"sample\.sqlite: holds 16 heldout .* 17 were"),
    ):
        database.rows("caption", "heldout", limit=17)


def test_unknown_unit_is_refused(sample: Path) -> None:
    with (
        open_database(sample) as database,
        pytest.raises(LayersenseError, match=r"'word'.*caption, image, pair"),
    ):
        database.rows("word", "heldout")  # type: ignore[arg-type]


def test_database_is_read_only(sample: Path) -> None:
    before, beside = sample.read_bytes(), set(sample.parent.iterdir())
    with (
        open_database(sample) as database,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        database._connection.execute("DELETE FROM samples")
    assert sample.read_bytes() == before
    assert set(sample.parent.iterdir()) == beside


def test_name_with_uri_characters_opens(sample: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copy(sample, tmp_path / "a?b#c%20.sqlite"))
    with open_database(odd) as database:
        assert database.meta["source"] == "sample"


def test_other_files_are_refused(sample: Path, tmp_path: Path) -> None:
    good = sample.read_bytes()
    files = {
        "text": b"hello",
        "empty": b"",
        "other": good[:68] + b"abcd" + good[72:],
        "newer": good[:60] + (99).to_bytes(4) + good[64:],
        "short": good[:-4096],
        "garbled": good[:100] + bytes(len(good) - 100),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, why in (
        ("missing", "cannot be read .*No such file"),
        ("text", "not an SQLite database"),
        ("empty", "not an SQLite database"),
        ("other", "no calibration database of layersense"),
        ("newer", "schema version 99, this layersense reads 1"),
        ("short", "damaged .*cut short"),
        ("garbled", "damaged .*malformed"),
    ):
        with pytest.raises(LayersenseError, match=f"{name}: .*{why}"):
            open_database(tmp_path / name)


def test_application_id_is_in_the_header(sample: Path) -> None:
    with sqlite3.connect(sample) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
