"""Read the user's own files: a table of images and texts, or texts alone."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import msgspec

from layersense.calibration.records import (
    Caption,
    Image,
    Records,
    check_file_name,
    clean_text,
    decode,
    read_bytes,
)
from layersense.errors import LayersenseError

_BOM = b"\xef\xbb\xbf"
_COLUMNS = ("image", "text")


class _ImageRow(msgspec.Struct):
    image: str
    text: str


class _TextRow(msgspec.Struct):
    text: str


def read_table(table: Path, images_root: Path) -> Records:
    """Read a CSV or JSONL table with the columns ``image`` and ``text``; others are ignored.

    An image may have several rows; a row that repeats another is left out and counted.

    Raises:
        LayersenseError: the table is missing, of another kind or shape, or a row has no text or
            an image name that leaves the folder; the message names the line.
    """
    suffix = table.suffix.lower()
    if suffix == ".csv":
        rows = _csv_rows(table)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _jsonl_rows(table, _ImageRow, "a row with the texts `image` and `text`")
    else:
        raise LayersenseError(f"{table}: ends in {suffix!r}, but .csv or .jsonl was expected")
    records = Records(listing=table, images_root=images_root)
    pairs: set[tuple[str, str]] = set()
    for line, row in rows:
        where = f"{table}: line {line}"
        pair = (check_file_name(row.image, where), _text(row.text, where))
        records.repeated_captions += pair in pairs
        pairs.add(pair)
    names = sorted({name for name, _ in pairs})
    ids = {name: number for number, name in enumerate(names, start=1)}
    records.images = [Image(ids[name], name, name, None, None) for name in names]
    records.captions = [
        Caption(number, f"{name}\n{text}", ids[name], text)
        for number, (name, text) in enumerate(sorted(pairs), start=1)
    ]
    return records


def read_texts(file: Path) -> Records:
    """Read a JSONL file with the key ``text``; a text that repeats another is left out, counted.

    Raises:
        LayersenseError: the file is missing or of another shape, or a text is empty; the message
            names the line.
    """
    records = Records(listing=file, images_root=None)
    texts: set[str] = set()
    for line, row in _jsonl_rows(file, _TextRow, "a row with the text `text`"):
        text = _text(row.text, f"{file}: line {line}")
        records.repeated_captions += text in texts
        texts.add(text)
    records.captions = [
        Caption(number, text, None, text) for number, text in enumerate(sorted(texts), start=1)
    ]
    return records


def _text(text: str, where: str) -> str:
    cleaned = clean_text(text)
    if not cleaned:
        raise LayersenseError(f"{where}: has an empty text; write one or remove the line")
    return cleaned


def _jsonl_rows(path: Path, kind: type, what: str) -> Iterator[tuple[int, "_ImageRow"]]:
    data = read_bytes(path, "JSONL file").removeprefix(_BOM)
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, decode(line, kind, f"{path}: line {number}", what)


def _csv_rows(path: Path) -> Iterator[tuple[int, _ImageRow]]:
    data = read_bytes(path, "CSV file").removeprefix(_BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LayersenseError(
            f"{path}: line {line} is not UTF-8 text; save the table as UTF-8"
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        if not set(_COLUMNS) <= set(header) or len(set(header)) < len(header):
            raise LayersenseError(
                f"{path}: line 1 has the columns {list(header)}, but `image` and `text` were "
                "expected, separated by commas, each once"
            )
        for row in reader:
            if None in row or None in row.values():
                raise LayersenseError(
                    f"{path}: line {reader.line_num} has {'more' if None in row else 'fewer'} "
                    f"fields than the {len(header)} of the header; put a text that holds a comma "
                    "in double quotes"
                )
            yield reader.line_num, _ImageRow(image=row["image"], text=row["text"])
    except csv.Error as error:
        raise LayersenseError(
            f"{path}: line {reader.reader.line_num} is not CSV ({error}); check its quotes"
        ) from error
