"""``index.html``: all runs and schemes side by side, and any two of them compared."""

import base64
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import vl_convert

from layersense import config, paths
from layersense.files import atomic_write
from layersense.reports.charts import SCHEME, VEGA_LITE
from layersense.reports.compare import changed_label, compare, profile
from layersense.reports.overview import DECADES, heat, most_sensitive, read_results, read_runs
from layersense.reports.page import render_page
from layersense.reports.result import Result
from layersense.reports.sentences import finding_counts
from layersense.reports.tables import FILES, data_table
from layersense.reports.text import bits, plain, short_format, size

CELLS = 96
"""Cells of a heat strip at most."""


def write_index(
    runs: Path,
    sensitivity: Path,
    report: config.Report,
    template: Path,
    out: Path,
    verifications: Sequence[Path] = (),
) -> None:
    """Render the page that shows all runs and schemes side by side.

    Args:
        runs: ``runs.parquet``.
        sensitivity: ``sensitivity.parquet``.
        report: how the page should look.
        template: Jinja2 template; its style and scripts lie beside it.
        out: HTML file to write; links are relative to it.
        verifications: ``verification.parquet`` of each verified run.

    Raises:
        LayersenseError: an input cannot be read.
    """
    rows = read_runs(runs, verifications)
    context = index_context(rows, read_results(sensitivity), report)
    atomic_write(out, render_page(template, context, FILES))


def index_context(
    runs: list[dict[str, Any]], results: Iterator[Result], report: config.Report
) -> dict[str, Any]:
    """Return what the template may print.

    Args:
        runs: rows of :func:`~layersense.reports.overview.read_runs`.
        results: the results of ``sensitivity.parquet``, in any order.
        report: how the page should look.
    """
    profiles, strips, tops = {}, {}, {}
    for result in results:
        key = result.run, result.scheme
        profiles[key] = profile(result)
        strips[key] = strip(result)
        tops[key] = most_sensitive(result)
    rows = sorted(runs, key=lambda row: (row["model"] or "", row["run"], row["scheme"]))
    keys = [(plain(row["run"]), plain(row["scheme"])) for row in rows]
    details = [
        {
            # An imported manifest stands in the tables, and has no report.
            "link": None if row["imported"] else _link(row["run"], row["scheme"]),
            "strip": strips[key],
            "top": tops[key],
            "name": " / ".join(key) + (" (imported)" if row["imported"] else ""),
            "about": ", ".join(
                plain(row[name]) for name in ("model", "dataset", "modality", "method")
                if row[name]
            ),
            "versions": plain(row["versions"] or "versions unknown"),
        }
        for row, key in zip(rows, keys, strict=True)
    ]  # fmt: skip
    pairs = {}
    for i, j in combinations(range(len(keys)), 2):
        pairs[f"{i}-{j}"] = _pair(compare(profiles[keys[i]], profiles[keys[j]]))
    names = {finding: sum(row[finding] or 0 for row in rows) for finding in ("errors", "warnings")}
    return {
        "title": report.title,
        "results": details,
        "n_runs": len({key[0] for key in keys}),
        "models": list(dict.fromkeys(plain(row["model"] or "unknown") for row in rows)),
        "totals": names,
        "data": {
            "table": _table(rows),
            "results": details,
            "pairs": pairs,
        },
    }


def strip(result: Result) -> str:
    """Return a result's sensitivity along depth as a tiny PNG, in a ``data:`` URL.

    Dark blue is low, yellow is high, on a logarithmic scale below the result's own largest score;
    transparent is what has no score.
    """
    cells = heat(result, CELLS)
    count = len(cells)
    rows = [{"cell": cell, "heat": value} for cell, value in enumerate(cells) if value is not None]
    spec = {
        "width": count,
        "height": 6,
        "padding": 0,
        "background": "transparent",
        "view": {"stroke": None},
        "data": {"values": rows},
        "transform": [{"calculate": "datum.cell + 1", "as": "end"}],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {
                "field": "cell",
                "type": "quantitative",
                "axis": None,
                "scale": {"domain": [0, count], "nice": False, "zero": False},
            },
            "x2": {"field": "end"},
            "color": {
                "field": "heat",
                "type": "quantitative",
                "legend": None,
                "scale": {"domain": [-DECADES, 0], "scheme": SCHEME},
            },
        },
    }
    png = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {
        "Scheme": [plain(row["scheme"]) for row in rows],
        "Run": [plain(row["run"]) for row in rows],
        "Along depth": ["" for _ in rows],
        "Findings": [
            finding_counts(row["errors"], row["warnings"], row["infos"]) for row in rows
        ],
        "Bits": [row["effective_bits"] for row in rows],
        "Size": [f"{size(row['bytes_before'])} → {size(row['bytes_after'])}" for row in rows],
        "Saved, %": [_saved(row) for row in rows],
        "Quantized": [
            "–" if row["groups_quantized"] is None else f"{row['groups_quantized']} of "
            f"{row['groups']}" for row in rows
        ],
        "Predicted damage": [row["predicted_damage"] for row in rows],
        "Measured KL": [row["kl"] for row in rows],
        "Model": [plain(row["model"] or "unknown") for row in rows],
        "Data": [plain(", ".join(filter(None, (row["dataset"], row["modality"])))) for row in rows],
        "Method": [row["method"] or "–" for row in rows],
        "Asked": [
            "–" if asked is None else f"{bits(asked)} bits"
            for asked in (row["effective_bits_asked"] for row in rows)
        ],
    }  # fmt: skip
    # What is the same everywhere needs no column on the screen; search and copy have it.
    hidden = [name for name in ("Model", "Data", "Method") if len(set(columns[name])) == 1]
    # There is room for one of these.
    measured = any(kl is not None for kl in columns["Measured KL"])
    hidden.append("Quantized" if measured else "Measured KL")
    return data_table(columns, hidden=["Asked", *hidden], order=[], page=100)


def _saved(row: dict[str, Any]) -> float | None:
    before, after = row["bytes_before"], row["bytes_after"]
    return 100 * (1 - after / before) if before and after is not None else None


def _pair(comparison: Any) -> dict[str, Any]:
    found = asdict(comparison)
    found["verdict"] = comparison.verdict
    found["formats"] = [short_format(name) for name in comparison.formats]
    found["changed"] = [
        (layer, changed_label(short_format(before)), changed_label(short_format(after)))
        for layer, before, after in comparison.changed
    ]
    for entry in found["moved"]:
        for name in ("share_a", "share_b"):
            entry[name] = float(f"{entry[name]:.3g}")
    for name in ("correlation", "expected"):
        found[name] = None if found[name] is None else round(found[name], 3)
    return found


def _link(run: str, scheme: str) -> str:
    return posixpath.relpath(paths.report_page(run, scheme), posixpath.dirname(paths.index()))
