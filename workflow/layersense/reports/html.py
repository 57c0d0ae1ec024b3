"""``report.html``: one scheme of one run, in one file that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from layersense import config
from layersense.files import atomic_write
from layersense.manifests.schema import Finding
from layersense.quantization.formats import NONE
from layersense.reports.charts import (
    BLOCKS,
    COLUMNS,
    KINDS,
    SMALL,
    Spec,
    charts,
    compiled,
    datasets,
)
from layersense.reports.figures import write_figures
from layersense.reports.measured import Measured, Rows, read_measured
from layersense.reports.page import pack, render_page
from layersense.reports.result import (
    Z95,
    Frontier,
    Group,
    Result,
    named_baselines,
    read_frontier,
    read_result,
)
from layersense.reports.sentences import (
    SEVERITIES,
    all_findings,
    budget_text,
    budget_unit,
    checkpoint_text,
    denominator_text,
    environment_rows,
    finding_counts,
    proof_text,
    score_text,
    score_unit,
    target_text,
    trust,
)
from layersense.reports.tables import FILES, data_table
from layersense.reports.text import plain, short_format

NAMED_LAYERS = 3
"""Most sensitive layers that the answer names."""
FORMAT_COLUMNS = 4
"""Formats that get a column of their own in the table of all groups; more stand in the details."""
SCATTER = "measured"
"""Chart that only what was measured has."""
FIGURELESS = (SCATTER, BLOCKS)
"""Charts of the page that its job writes no figure of."""


def write_page(
    layers: Path,
    report: config.Report,
    template: Path,
    scripts: Path,
    out: Path,
    figures: Path,
    frontier_path: Path | None = None,
    verification_path: Path | None = None,
) -> None:
    """Render the HTML report of one scheme, and its figures.

    One job does both: what they share, libraries to import and a table to read, takes longer than
    what they do.

    Args:
        layers: its ``layers.parquet``.
        report: how it should look.
        template: Jinja2 template; its style and scripts lie beside it.
        scripts: what :func:`layersense.reports.charts.write_scripts` wrote.
        out: HTML file to write.
        figures: folder to write the figures to.
        frontier_path: its ``frontier.parquet``; a report without it has no frontier.
        verification_path: the run's ``verification.parquet``, if it is verified.

    Raises:
        LayersenseError: an input cannot be read.
    """
    result = read_result(layers)
    frontier = read_frontier(frontier_path) if frontier_path else None
    measured = (
        read_measured(verification_path, result.scheme, result.formats)
        if verification_path
        else None
    )
    specs, rows = charts(result, frontier, measured), datasets(result, frontier, measured)
    context = page_context(result, report, specs, rows, frontier, measured)
    atomic_write(out, render_page(template, context, {**FILES, "vega.js": scripts}))
    write_figures({name: specs[name] for name in specs if name not in FIGURELESS}, rows, figures)


def write_scatter(layers: Path, verification: Path, figures: Path) -> None:
    """Write the figure of predicted against measured damage, which a verified run alone has.

    Raises:
        LayersenseError: a table cannot be read.
    """
    result = read_result(layers)
    measured = read_measured(verification, result.scheme, result.formats)
    specs = charts(result, None, measured)
    write_figures({SCATTER: specs[SCATTER]}, datasets(result, None, measured), figures)


def page_context(
    result: Result,
    report: config.Report,
    specs: Mapping[str, Spec],
    rows: Mapping[str, Rows],
    frontier: Frontier | None = None,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """Return what the template may print.

    Args:
        result: the result.
        report: how the page should look.
        specs: its charts.
        rows: the data of the charts, by name.
        frontier: its recipes over all budgets.
        measured: what was measured of it.
    """
    about = result.about
    found = all_findings(about.findings if about else (), measured)
    baselines = named_baselines(result.formats)
    return {
        "title": report.title,
        "top": report.top,
        "result": result,
        "about": about,
        "unit": score_unit(result.modality),
        "trust": trust([finding.severity for finding in found]) if about else None,
        "severities": SEVERITIES,
        "findings": [
            {**msgspec.structs.asdict(finding), "layers": [plain(name) for name in finding.layers]}
            for finding in found
        ],
        "counts": _counts(found),
        "damage": _damage(result, frontier),
        "most": [
            (group, result.share(group))
            for group in result.ranked[:NAMED_LAYERS]
            if group.importance is not None
        ],
        "unreached": _unreached(result),
        "per_mb": [
            (group, entry, score_text(entry))
            for group, entry in result.most_damage_per_mb()[: report.top]
        ],
        "provenance": _provenance(result),
        "NONE": NONE,
        "verification": measured,
        "measured": measured.chosen if measured else None,
        "frontier": frontier,
        "kinds": KINDS,
        "named": [
            point for point in frontier.points if point.kind in {"scheme", *baselines} or point.knee
        ]
        if frontier
        else [],
        "few_baselines": len(baselines) == 1,
        "asked": budget_text(about.state.budget) if about else None,
        "budget_unit": budget_unit(about.state.budget) if about else None,
        "proof": proof_text(about.state) if about else None,
        "checkpoint": checkpoint_text(about.state) if about else None,
        "denominator": denominator_text(about.state, about.scheme) if about else None,
        "target": target_text(about.state) if about else None,
        "flips": [
            (group.layer, group.selected, about.flips[group.handle])
            for group in result.ranked
            if about and group.handle in about.flips
        ],
        "small": len(result.groups) <= SMALL,
        "heatmap_width": _heatmap_width(result),
        "data": {
            "charts": compiled(specs),
            "datasets": {name: pack(entries) for name, entries in rows.items()},
            "table": _table(result),
            "details": [_details(group) for group in result.ranked],
        },
    }


def _heatmap_width(result: Result) -> tuple[int, int | None]:
    """Return the width in pixels below which the heat map scrolls, and the largest, if any."""
    if len(result.groups) <= SMALL:
        columns = len(result.formats) + 1
        return 200 + 20 * columns, 320 + 110 * columns
    if len(result.formats) > 1:
        return 200 + 2 * min(len(result.groups), COLUMNS), None
    return 0, None


def _counts(found: Sequence[Finding]) -> str:
    severities: list[str] = [finding.severity for finding in found]
    return finding_counts(*(severities.count(name) for name in SEVERITIES))


def _damage(result: Result, frontier: Frontier | None) -> dict[str, Any]:
    """Return the predicted damage with its interval, and what it is next to other recipes."""
    total = result.about.state.score if result.about else result.total.damage
    error = result.about.damage_se if result.about else None
    low, high = (max(0.0, total - Z95 * error), total + Z95 * error) if error else (None, None)
    for point in frontier.points if frontier else ():
        if point.kind == "scheme":  # one interval on a page
            low, high = point.low, point.high
    others = [other for other in result.alternatives if other.damage > 0 and other.complete]
    smallest = others[0] if others else None
    return {
        "total": total,
        "low": low,
        "high": high,
        "compared": (smallest, total / smallest.damage)
        if smallest and (not result.about or result.about.scheme.objective == "sum")
        else None,
    }


def _unreached(result: Result) -> dict[str, Any] | None:
    """Return which subsystems the loss did not reach at all, and how many groups in all."""
    missing = [group for group in result.groups if group.reached not in (None, "scored")]
    if not missing:
        return None
    return {
        "groups": len(missing),
        "subsystems": [part.name for part in result.by_subsystem if not part.reached],
    }


def _provenance(result: Result) -> list[tuple[str, str]]:
    """Return versions and hardware, each once where all formats agree."""
    return environment_rows(result.about.environment, short_format) if result.about else []


def _table(result: Result) -> dict[str, Any]:
    """Return the arguments of the table of all groups, the most sensitive first."""
    shown = result.formats if 1 < len(result.formats) <= FORMAT_COLUMNS else []
    ranked = result.ranked
    columns: dict[str, list[Any]] = {
        "Details": ["" for _ in ranked],
        "#": [result.places.get(group.handle) for group in ranked],
        "Layer": [group.layer for group in ranked],
        "Recipe takes": [short_format(group.selected or "–") for group in ranked],
        "Worst score": [group.importance for group in ranked],
        "Share, %": [_percent(result.share(group)) for group in ranked],
        **{short_format(name): [_score(group, name) for group in ranked] for name in shown},
        "Subsystem": [group.subsystem for group in ranked],
        "Block": [group.block for group in ranked],
        "Kind": [group.kind for group in ranked],
        "Weights": [group.n_weights for group in ranked],
        "Damage as chosen": [group.damage for group in ranked],
        "MB saved": [(group.before - group.after) / 1e6 for group in ranked],
        "Handle": [group.handle for group in ranked],
    }
    hidden = ["Damage as chosen", "MB saved", "Handle"]
    hidden += ["Block"] if all(group.block is None for group in ranked) else []
    return data_table(columns, hidden=hidden, order=[1, "asc"])


def _score(group: Group, name: str) -> float | None:
    entry = group.scores.get(name)
    return entry.score if entry and entry.state in ("score", "zero") else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _details(group: Group) -> dict[str, Any]:
    """Return what a row of the table opens, beside its scores: the handle, the modules."""
    return {
        "handle": group.handle,
        "modules": group.modules,
        "why": group.reason if not group.quantized else None,
        "order": group.index,
    }
