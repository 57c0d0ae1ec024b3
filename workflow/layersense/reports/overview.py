"""All results side by side: what ``index.html`` and ``summary.md`` both say of them."""

from collections.abc import Iterator, Sequence
from math import log10
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from layersense.manifests.tables import readable
from layersense.reports.result import Result, make_result, read_table, values_of
from layersense.verification.table import read_summary

DECADES = 4
"""Below the largest score of a result by which a cell of its strip is as dark as can be."""
KEY = ("run", "scheme")
"""Columns of a table that tell results apart."""
NAMED = 3
"""Most sensitive layers that a page of all results names of each."""
BLOCKS = "▁▂▃▄▅▆▇█"
"""From low to high."""
EMPTY = "·"
"""A cell without a score."""


_COUNTS = {"error": "errors", "warning": "warnings", "info": "infos"}
"""Severity of a finding → column of ``runs.parquet`` that counts it."""


def read_runs(runs: Path, verifications: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of a ``runs.parquet`` together with what was measured of their recipes.

    Args:
        runs: the table.
        verifications: the ``verification.parquet`` of each verified run.

    Returns:
        Its rows, with ``kl``, of the scheme's recipe on held-out rows, None where it is not
        measured or not finite; counts of findings hold those of verification.

    Raises:
        LayersenseError: a table cannot be read.
    """
    rows: list[dict[str, Any]] = [{**row, "kl": None} for row in read_table(runs).to_pylist()]
    own: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["imported"]:
            own.setdefault(row["run"], []).append(row)
    for path in verifications:
        measured = read_table(path, columns=["run", "scheme", "role", "kl"]).to_pylist()
        damage = {entry["scheme"]: entry["kl"] for entry in measured if entry["role"] == "scheme"}
        summary = read_summary(path)
        for row in own.get(measured[0]["run"], ()):
            row["kl"] = damage.get(row["scheme"])
            for finding in summary.findings_of(row["quant_formats"], row["scheme"]):
                row[_COUNTS[finding.severity]] += 1
    return rows


def read_results(sensitivity: Path) -> Iterator[Result]:
    """Yield the results of a ``sensitivity.parquet`` one by one, without what metadata say.

    Raises:
        LayersenseError: it cannot be read.
    """
    with readable(sensitivity), pq.ParquetFile(sensitivity) as file:
        begun: pa.Table | None = None
        for index in range(file.num_row_groups):
            for part in _by_result(file.read_row_group(index)):
                # A large table may go on in the next row group.
                if begun is not None and _key(begun) == _key(part):
                    begun = pa.concat_tables([begun, part]).unify_dictionaries()
                    continue
                if begun is not None:
                    yield make_result(begun, sensitivity)
                begun = part
        if begun is not None:
            yield make_result(begun, sensitivity)


def _by_result(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the parts of a table that have one run and scheme, in their order."""
    keys = list(zip(*(values_of(table.column(name)) for name in KEY), strict=True))
    starts = [row for row in range(len(keys)) if row == 0 or keys[row] != keys[row - 1]]
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        yield table.slice(start, end - start)


def _key(table: pa.Table) -> tuple[str, ...]:
    return tuple(table.column(name)[0].as_py() for name in KEY)


def most_sensitive(result: Result) -> list[str]:
    """Return the layers with the largest scores, those without any left out."""
    return [group.layer for group in result.ranked[:NAMED] if group.importance]


def heat(result: Result, cells: int) -> list[float | None]:
    """Return a result's sensitivity along depth in ``cells`` cells at most.

    A cell is the worst of the groups that share it, as the decimal logarithm of its share in the
    largest score, not below -:data:`DECADES`; None where none of them has a score above zero.
    """
    values = [group.importance for group in result.groups]
    per_cell = -(-len(values) // cells)
    largest = max((value for value in values if value), default=0.0)
    found: list[float | None] = []
    for start in range(0, len(values), per_cell):
        known = [value for value in values[start : start + per_cell] if value]
        found.append(max(-DECADES, log10(max(known) / largest)) if known else None)
    return found


def text_strip(cells: list[float | None]) -> str:
    """Return a strip of :func:`heat` as text, a letter for each cell."""
    steps = len(BLOCKS) - 1
    return "".join(
        EMPTY if cell is None else BLOCKS[round(steps * (1 + cell / DECADES))] for cell in cells
    )
