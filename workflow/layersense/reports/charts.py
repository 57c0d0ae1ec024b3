"""The charts of a report, as Vega-Lite specifications made by Altair.

One specification serves the page, where names of CSS variables stand for colours and parameters
are set from the page's controls, and, with other colours (:func:`on_paper`), the files in
``figures/``. A chart names its data, ``scores`` and so on; :func:`datasets` makes them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil, floor, log10
from pathlib import Path
from statistics import median
from typing import Any, Literal

import altair as alt
import vl_convert
from altair.utils.schemapi import debug_mode

from layersense.files import atomic_write
from layersense.quantization.formats import NONE
from layersense.reports.measured import Measured, Rows
from layersense.reports.result import MANY_FORMATS, Frontier, Result, Score
from layersense.reports.text import percent, short_format, size

Spec = dict[str, Any]
Chart = alt.LayerChart | alt.FacetChart

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
"""Version of Vega-Lite that Altair writes, as vl-convert names it."""
SMALL = 60
"""Groups up to which the heat map has a named row for each; above, they lie along its width."""
COLUMNS = 300
"""Columns of a heat map along the width at most; more groups share columns."""
BLOCKS = "blocks"
"""Chart that only pages have: the large model's blocks under one format, which a control sets."""
SHAPES = [
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-right",
    "stroke",
    "wedge",
]
"""Subsystems differ by shape as well as by colour."""
COLOURS = ["#0072B2", "#D55E00", "#00805E", "#B8558C", "#7A6A00", "#4D4D4D", "#3B8FC4", "#9A5B00"]
"""After Okabe and Ito's palette for all kinds of colour vision, darkened to 3:1 on white."""
SCHEME: Literal["cividis"] = "cividis"
"""Colours of the heat map, made for all kinds of colour vision (Nuñez et al., 2018)."""
DIGITS = 4
"""Significant digits of numbers in a chart's data."""
KINDS = {
    "frontier": "best at its bits",
    "scheme": "this recipe",
    "uniform": "one format everywhere",
    "head_kept": "… with the head kept",
    "edges_kept": "… with both ends kept",
}
"""Kind of a row of ``frontier.parquet`` → what the chart calls it."""
RANDOM = "random, at its bits"
"""What the chart calls recipes that are drawn at random, which are measured alone."""
BETTER = "from measured damage"
"""What the chart calls recipes that follow from what was measured."""
MEASURED = {
    **KINDS,
    "rival": KINDS["frontier"],
    "outer_first": "outer blocks first, at its bits",
    "random": RANDOM,
    "solved": BETTER,
    "refined": BETTER,
}
"""Role of a recipe in ``verification.parquet`` → what the chart calls it."""
UNDRAWN = ("cache",)
"""Roles that the chart leaves to the table: what nothing predicts has no place on its axes."""
SAID = 6
"""Rank correlations that the chart names at most; the table has them all."""
MISSING = ("zero", "not reached", "not finite")
"""States that have no place on a logarithmic axis and are drawn below it."""


@dataclass(frozen=True)
class Look:
    """Colours of everything but the data's own."""

    ink: str
    muted: str
    grid: str
    surface: str
    empty: str
    accent: str
    subsystems: Sequence[str]
    font: str


PAGE = Look(
    ink="var(--ink)",
    muted="var(--muted)",
    grid="var(--grid)",
    surface="var(--surface)",
    empty="var(--empty)",
    accent="var(--accent)",
    subsystems=[f"var(--series-{index})" for index in range(len(COLOURS))],
    font="system-ui, sans-serif",
)
"""In the page, where the theme decides."""
PAPER = Look(
    ink="#1c2126",
    muted="#57606a",
    grid="#e3e6ea",
    surface="#ffffff",
    empty="#d5d9de",
    accent="#B3261E",
    subsystems=COLOURS,
    font="Liberation Sans, DejaVu Sans, Arial, sans-serif",
)
"""In files."""


def write_scripts(out: Path) -> None:
    """Write Vega, Vega-Lite and Vega-Embed as one script, for pages to inline.

    Bundling takes longer than rendering a page, so that all pages share the file.
    """
    bundle = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]
    atomic_write(out, bundle)


def datasets(
    result: Result, frontier: Frontier | None = None, measured: Measured | None = None
) -> dict[str, Rows]:
    """Return the rows of each named data source, in the order of groups and formats."""
    return {
        "scores": _scores(result),
        "spans": _spans(result),
        "frontier": _frontier_rows(result, frontier) if frontier else [],
        "recipes": _recipe_rows(result, frontier, measured) if frontier and measured else [],
        "singles": _single_rows(measured) if measured else [],
        "correlations": _correlation_rows(measured) if measured else [],
    }


def charts(
    result: Result, frontier: Frontier | None = None, measured: Measured | None = None
) -> dict[str, Spec]:
    """Return the charts of a result for a page, by name, in the order in which they are shown."""
    rows = datasets(result, frontier, measured)
    known = [row["score"] for row in rows["scores"] if row["state"] == "score"]
    missing = any(row["state"] in MISSING for row in rows["scores"])
    bounds = (min(known), max(known)) if known else (0.1, 1.0)
    unit = "score"
    # The specifications are valid (a test has Altair check them), and checking takes longer than
    # making them.
    with debug_mode(False):
        specs = {
            "depth": _depth(result, bounds, missing, unit),
            **_heatmaps(result, bounds, unit),
        }
        if frontier:
            specs["frontier"] = _frontier(rows["frontier"], rows["recipes"])
        if measured:
            specs["measured"] = _measured(result, rows["singles"])
        return {name: _finish(chart) for name, chart in specs.items()}


def on_paper(spec: Spec) -> Spec:
    """Return a chart of a page in the colours and the font of files."""
    text = json.dumps(spec)
    for name, value in _pairs(PAGE, PAPER):
        text = text.replace(name, value)
    found: Spec = json.loads(text)
    return found


def _pairs(one: Look, other: Look) -> Iterator[tuple[str, str]]:
    for field in fields(Look):
        a, b = getattr(one, field.name), getattr(other, field.name)
        yield from [(a, b)] if isinstance(a, str) else zip(a, b, strict=True)


def compiled(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return Vega specifications, which a page draws without compiling them first."""
    return {
        name: vl_convert.vegalite_to_vega(spec, vl_version=VEGA_LITE)
        for name, spec in specs.items()
    }


def _scores(result: Result) -> Rows:
    rows = []
    for group in result.groups:
        worst = group.worst.format if group.worst else next(iter(group.scores), None)
        for name in (*result.formats, NONE):
            entry = group.scores.get(name)
            if entry is None and name != NONE:
                continue
            rows.append(
                {
                    "order": group.index,
                    "layer": group.layer,
                    "label": result.labels[group.layer],
                    "subsystem": group.subsystem,
                    "block": group.block,
                    "kind": group.kind,
                    "row": f"{group.subsystem} · {group.kind}",
                    "column": "no block" if group.block is None else str(group.block),
                    "format": name,
                    "name": short_format(name),
                    "worst": name == worst,
                    "selected": name == (group.selected or ""),
                    "choice": short_format(group.selected or "unknown"),
                    "quantized": group.quantized,
                    **_values(entry),
                }
            )
    return rows


def _values(entry: Score | None) -> dict[str, Any]:
    if entry is None:  # NONE: nothing to measure
        names = ("score", "low", "high", "share", "error", "per_mb")
        return {"state": "none", **dict.fromkeys(names)}
    score = entry.score if entry.state == "score" else None
    low, high = (entry.interval or (None, None)) if score else (None, None)
    return {
        "state": entry.state,
        "score": _round(score),
        "low": _low(score, low) if score else None,
        "high": _round(high),
        "share": _round(entry.share),
        "error": _round(entry.error) if score else None,
        "per_mb": _round(entry.per_mb) if score else None,
    }


def _frontier_rows(result: Result, frontier: Frontier) -> Rows:
    weights = {group.handle: group.n_weights or 0 for group in result.groups}
    return [
        {
            "kind": KINDS[point.kind],
            "label": point.label,
            "bits": _round(point.bits),
            "size": size(point.bytes),
            "damage": _round(point.damage),
            "low": _round(max(point.low, point.damage / 100)),
            "high": _round(point.high),
            "gap": _round(point.gap),
            "knee": point.knee,
            "shares": _recipe_shares(frontier.recipe(point), weights),
        }
        for point in frontier.points
        if point.damage > 0  # a recipe that quantizes nothing has no place on a logarithm
    ]


def _recipe_rows(result: Result, frontier: Frontier, measured: Measured) -> Rows:
    """Return the measured recipes, and where each stands on the axis of the predicted damage."""
    weights = {group.handle: group.n_weights or 0 for group in result.groups}
    shares = {
        point.digest: _recipe_shares(frontier.recipe(point), weights) for point in frontier.points
    }
    return [
        {
            "kind": MEASURED[row["role"]],
            "label": row["label"],
            "bits": _round(row["effective_bits"]),
            "predicted": _round(row["predicted"]),
            "kl": _round(row["kl"]),
            "low": _low(row["kl"], row["kl_low"]),
            "high": _round(row["kl_high"]),
            "shares": shares.get(row["recipe_digest"], "not listed"),
        }
        for row in measured.all_recipes
        if row["role"] not in UNDRAWN
        if row["kl"] and row["kl"] > 0  # what does no damage has no place on a logarithm
    ]


def _single_rows(measured: Measured) -> Rows:
    """Return the groups that were measured alone; what has no logarithm is marked."""
    return [
        {
            "layer": row["layer"],
            "subsystem": row["subsystem"],
            "kind": row["layer_kind"],
            "format": row["format"],
            "name": short_format(row["format"]),
            "score": _round(row["predicted"]),
            "kl": _round(row["kl"]),
            "kl_low": _low(row["kl"], row["kl_low"]),
            "kl_high": _round(row["kl_high"]),
            "low": _low(row["predicted"], row["predicted_low"]),
            "high": _round(row["predicted_high"]),
            "positive": bool(row["predicted"] and row["predicted"] > 0 and row["kl"] > 0),
        }
        for row in measured.groups
        if row["predicted"] is not None and row["kl"] is not None
    ]


def _correlation_rows(measured: Measured) -> Rows:
    """Return what the chart says of each format and subsystem; ``""`` stands for all of them."""
    return [
        {
            "format": entry.format,
            "subsystem": entry.subsystem or "",
            "text": f"ρ {entry.spearman:.2f} ({entry.spearman_low:.2f} to "
            f"{entry.spearman_high:.2f}), {entry.groups} × {short_format(entry.format)}",
        }
        for entry in measured.correlations
    ]


def _low(value: float, low: float | None) -> float | None:
    """Return the lower end of an interval; that of a wide one is zero, which has no logarithm."""
    return None if low is None else _round(max(low, value / 100))


def _recipe_shares(recipe: Mapping[str, str], weights: Mapping[str, int]) -> str:
    """Return how much of the weights takes which format: ``INT4 63.2 %, FP8 36.8 %``."""
    totals: dict[str, int] = {}
    for handle, name in recipe.items():
        totals[name] = totals.get(name, 0) + weights.get(handle, 0)
    total = sum(totals.values())
    ordered = sorted(totals, key=lambda name: -totals[name])
    return ", ".join(f"{short_format(name)} {percent(totals[name] / total)}" for name in ordered)


def _spans(result: Result) -> Rows:
    """Return the runs of neighbouring groups of one subsystem."""
    spans: Rows = []
    for group in result.groups:
        if spans and spans[-1]["subsystem"] == group.subsystem:
            spans[-1]["end"] = group.index + 0.5
        else:
            start, end = group.index - 0.5, group.index + 0.5
            spans.append({"subsystem": group.subsystem, "start": start, "end": end})
    return spans


def _shown() -> tuple[alt.Parameter, alt.Parameter]:
    """Return the parameters that the page's controls set; empty is all, and the worst format."""
    return alt.param(name="shown_subsystem", value=""), alt.param(name="shown_format", value="")


BY_SUBSYSTEM = "shown_subsystem == '' || datum.subsystem == shown_subsystem"
BY_FORMAT = "shown_format == '' ? datum.worst : datum.format == shown_format"
TOOLTIP = [
    alt.Tooltip("layer:N"),
    alt.Tooltip("subsystem:N"),
    alt.Tooltip("kind:N"),
    alt.Tooltip("block:Q"),
    alt.Tooltip("format:N"),
    alt.Tooltip("score:Q", format=".3~g"),
    alt.Tooltip("interval:N", title="95 % interval"),
    alt.Tooltip("share:Q", format=".2~p", title="share of the format's total"),
    alt.Tooltip("state:N"),
    alt.Tooltip("choice:N", title="recipe takes"),
]
INTERVAL = (
    "datum.high == null ? 'unknown' : format(datum.low, '.3~g') + ' to ' + "
    "format(datum.high, '.3~g')"
)


def _depth(result: Result, bounds: tuple[float, float], missing: bool, unit: str) -> Chart:
    """Every group in model order on a logarithmic axis; what has no logarithm stands below it."""
    lowest = 10.0 ** floor(log10(bounds[0]))
    highest = bounds[1] * 2
    decades = range(floor(log10(lowest)), ceil(log10(bounds[1])) + 1)
    step = max(1, ceil(len(decades) / 8))
    ticks = [10.0**exponent for exponent in decades[::step] if 10.0**exponent <= highest]
    # A strip of its own below the axis, a tenth of it high, for what has no logarithm.
    strip = lowest / 10 ** (0.10 * max(1.0, log10(highest / lowest)))
    bottom = strip / 10 ** (0.06 * max(1.0, log10(highest / lowest))) if missing else lowest
    names = list(dict.fromkeys(group.subsystem for group in result.groups))
    y_scale = alt.Scale(type="log", domain=[bottom, highest], nice=False, clamp=True)
    last = len(result.groups) - 0.5
    x = alt.X(
        "order:Q",
        title="layer groups in model order →",
        scale=alt.Scale(domain=[-0.5, last], nice=False, zero=False),
        axis=alt.Axis(labels=False, ticks=False, grid=False),
    )
    y = alt.Y(
        "score:Q",
        title=unit,
        scale=y_scale,
        axis=alt.Axis(
            values=([strip] if missing else []) + ticks,
            labelExpr=f"datum.value < {lowest!r} * 0.999 ? 'no score' : format(datum.value, '~e')",
        ),
    )
    palette = _cycle(PAGE.subsystems, len(names))
    colours = alt.Scale(domain=names, range=palette)
    # Beside the scale: a second channel on it would draw a second legend.
    colour_of = f"{json.dumps(dict(zip(names, palette, strict=True)))}[datum.subsystem]"
    colour = alt.Color(
        "subsystem:N",
        title=None,
        scale=colours,
        legend=alt.Legend(orient="top", symbolType="circle"),
    )
    shape = alt.Shape(
        "subsystem:N",
        title=None,
        scale=alt.Scale(domain=names, range=_cycle(SHAPES, len(names))),
        legend=alt.Legend(orient="top"),
    )
    base = (
        alt.Chart(alt.NamedData("scores"))
        .transform_filter("datum.state != 'none' && datum.state != 'unknown'")
        .transform_filter(BY_SUBSYSTEM)
        .transform_filter(BY_FORMAT)
        .transform_calculate(interval=INTERVAL)
        .encode(x=x)
    )
    scored = base.transform_filter("datum.state == 'score'")
    bands = (
        alt.Chart(alt.NamedData("spans"))
        .transform_filter(BY_SUBSYSTEM)
        .transform_calculate(colour=colour_of)
        .mark_rect(opacity=0.07)
        .encode(x=alt.X("start:Q"), x2="end:Q", fill=alt.Fill("colour:N", scale=None))
    )
    bars = scored.mark_rule(strokeWidth=1.5, opacity=0.7).encode(
        y=alt.Y("low:Q", scale=y_scale, title=unit), y2="high:Q", color=colour
    )
    taken = scored.transform_filter("datum.quantized").mark_point(filled=True, size=55, opacity=1)
    left = (
        scored.transform_filter("!datum.quantized")
        .transform_calculate(colour=colour_of)
        .mark_point(filled=True, size=55, opacity=1, fill=PAGE.surface, strokeWidth=2)
    )
    points = [
        taken.encode(y=y, color=colour, shape=shape, tooltip=TOOLTIP),
        left.encode(y=y, stroke=alt.Stroke("colour:N", scale=None), shape=shape, tooltip=TOOLTIP),
    ]
    layers: list[Any] = [bands, bars, *points]
    if missing:
        nothing = base.transform_filter(
            "datum.state == 'zero' || datum.state == 'not reached' || datum.state == 'not finite'"
        ).transform_calculate(
            mark="datum.state == 'zero' ? '0' : datum.state == 'not reached' ? '×' : '!'"
        )
        layers.append(
            nothing.mark_text(fontSize=12, fontWeight="bold").encode(
                y=alt.Y(datum=strip, scale=y_scale), text="mark:N", color=colour, tooltip=TOOLTIP
            )
        )
        layers.append(
            alt.Chart(alt.NamedData("spans"))
            .mark_rule(strokeDash=[2, 3], color=PAGE.muted)
            .encode(y=alt.Y(datum=(strip * lowest) ** 0.5, scale=y_scale))
        )
    return alt.layer(*layers).properties(height=280)


def _heatmaps(result: Result, bounds: tuple[float, float], unit: str) -> dict[str, Chart]:
    """Layers × formats; for a model of many groups, blocks × kinds of layers too."""
    colour = alt.Color(
        "score:Q",
        title=unit,
        scale=alt.Scale(type="log", domain=list(bounds), scheme=SCHEME, nice=False),
        legend=alt.Legend(
            orient="top", format="~e", gradientLength=180, tickCount=4, titleOrient="top"
        ),
    )
    base = alt.Chart(alt.NamedData("scores")).transform_filter(BY_SUBSYSTEM)
    if len(result.groups) <= SMALL:
        return {"heatmap": _rows(base, colour, result)}
    blocks = _blocks(base, colour, result)
    if len(result.formats) == 1:
        return {"heatmap": blocks}
    return {"heatmap": _along(base, colour, result), BLOCKS: blocks}


def _rows(base: alt.Chart, colour: alt.Color, result: Result) -> Chart:
    """A row for each layer, a column for each format."""
    names = [short_format(name) for name in (*result.formats, NONE)]
    x = alt.X(
        "name:N",
        title=None,
        sort=names,
        axis=alt.Axis(
            orient="top",
            labelAngle=-60 if len(result.formats) > MANY_FORMATS else -30,
            labelLimit=240,
            labelPadding=4,
            ticks=False,
            domain=False,
        ),
    )
    y = alt.Y(
        "label:N",
        title=None,
        sort=[result.labels[group.layer] for group in result.groups],
        axis=alt.Axis(labelLimit=230, ticks=False, domain=False),
    )
    base = base.transform_calculate(interval=INTERVAL).encode(x=x, y=y)
    cells = (
        base.transform_filter("datum.state == 'score'")
        .mark_rect(stroke=PAGE.surface, strokeWidth=1)
        .encode(color=colour, tooltip=TOOLTIP)
    )
    empty = (
        base.transform_filter("datum.state != 'score' && datum.state != 'none'")
        .mark_rect(stroke=PAGE.surface, strokeWidth=1, fill=PAGE.empty)
        .encode(tooltip=TOOLTIP)
    )
    words = (
        base.transform_filter("datum.state != 'score' && datum.state != 'none'")
        .transform_calculate(word="datum.state == 'zero' ? '0' : datum.state")
        .mark_text(fontSize=9, color=PAGE.ink)
        .encode(text="word:N", tooltip=TOOLTIP)
    )
    chosen = (
        base.transform_filter("datum.selected")
        .mark_point(shape="circle", filled=True, size=42, fill="#ffffff", stroke="#000000",
                    strokeWidth=1.2, opacity=1)
        .encode(tooltip=TOOLTIP)
    )  # fmt: skip
    return alt.layer(cells, empty, words, chosen).properties(height=alt.Step(16))


def _along(base: alt.Chart, colour: alt.Color, result: Result) -> Chart:
    """A row for each format, the layers in model order from left to right, as along the depth."""
    count = len(result.groups)
    step = ceil(count / COLUMNS)
    x = alt.X(
        "start:Q",
        title="layer groups in model order →",
        scale=alt.Scale(domain=[-0.5, count - 0.5], nice=False, zero=False),
        axis=alt.Axis(labels=False, ticks=False, grid=False, domain=False),
    )
    y = alt.Y(
        "name:N",
        title=None,
        sort=[short_format(name) for name in result.formats],
        axis=alt.Axis(labelLimit=230, ticks=False, domain=False),
    )
    measured = base.transform_filter("datum.state != 'none' && datum.state != 'unknown'")
    # In a column of several groups, what hurts most: as large as it is, and by its name.
    cell = (
        measured.transform_calculate(
            column=f"floor(datum.order / {step})", rank="datum.score == null ? -1 : datum.score"
        )
        .transform_aggregate(
            top="argmax(rank)",
            groups="count()",
            first="min(order)",
            last="max(order)",
            groupby=["column", "subsystem", "name"],
        )
        .transform_calculate(
            start="datum.first - 0.5",
            # Under the next one's edge, or the ground shows through between them.
            end=f"min(datum.last + {0.5 + 0.2 * step}, {count - 0.5})",
            **{
                name: f"datum.top.{name}"
                for name in ("score", "low", "high", "state", "share", "layer", "kind", "block",
                             "format", "choice")
            },
        )
        .transform_calculate(interval=INTERVAL)
        .encode(x=x, x2="end:Q", y=y, tooltip=_tooltip(step))
    )  # fmt: skip
    chosen = (
        base.transform_filter("datum.selected && datum.state != 'none'")
        .transform_calculate(start="datum.order", interval=INTERVAL)
        .mark_point(shape="circle", filled=True, size=9, fill="#ffffff", stroke="#000000",
                    strokeWidth=0.7, opacity=1, aria=False)
        .encode(x=x, y=y, tooltip=TOOLTIP)
    )  # fmt: skip
    spans = alt.Chart(alt.NamedData("spans")).transform_filter(BY_SUBSYSTEM)
    wide = spans.transform_filter(f"datum.end - datum.start > {0.08 * count!r}")
    return alt.layer(
        cell.transform_filter("datum.state == 'score'").mark_rect(aria=False).encode(color=colour),
        cell.transform_filter("datum.state != 'score'").mark_rect(aria=False, fill=PAGE.empty),
        chosen,
        spans.transform_filter("datum.start > 0")
        .mark_rule(color=PAGE.surface, strokeWidth=2)
        .encode(x=alt.X("start:Q")),
        wide.transform_calculate(middle="(datum.start + datum.end) / 2")
        .mark_text(color=PAGE.muted, fontSize=11, baseline="bottom", y=-4)
        .encode(x=alt.X("middle:Q"), text="subsystem:N"),
    ).properties(height=alt.Step(18))


def _tooltip(step: int) -> list[alt.Tooltip]:
    """Return what a cell of ``step`` groups says of the one that hurts most."""
    return TOOLTIP if step == 1 else [alt.Tooltip("groups:Q", title="worst of groups"), *TOOLTIP]


def _blocks(base: alt.Chart, colour: alt.Color, result: Result) -> Chart:
    """A row for each kind of layer, a column for each block, under the chosen format."""
    blocks = {group.block for group in result.groups}
    columns = [str(block) for block in sorted(block for block in blocks if block is not None)]
    columns += ["no block"] if None in blocks else []
    # Fewer labels where there are many blocks.
    step = ceil(len(columns) / 24)
    labels = columns[::step] + (["no block"] if None in blocks else [])
    x = alt.X(
        "column:N",
        title="block",
        sort=columns,
        scale=alt.Scale(domain=columns),
        axis=alt.Axis(labelAngle=0, ticks=False, domain=False, values=labels, labelOverlap=True),
    )
    y = alt.Y(
        "row:N", title=None, sort=None, axis=alt.Axis(labelLimit=170, ticks=False, domain=False)
    )
    cell = (
        base.transform_filter(BY_FORMAT)
        .transform_filter("datum.state != 'none' && datum.state != 'unknown'")
        .transform_aggregate(
            score="max(score)",
            scored="valid(score)",
            groups="count()",
            layers="values(layer)",
            groupby=["row", "column", "subsystem", "kind"],
        )
        .encode(x=x, y=y)
    )
    tooltip = [
        alt.Tooltip("subsystem:N"),
        alt.Tooltip("kind:N"),
        alt.Tooltip("column:N", title="block"),
        alt.Tooltip("score:Q", format=".3~g", title="largest score"),
        alt.Tooltip("groups:Q"),
        alt.Tooltip("scored:Q", title="groups with a score above zero"),
    ]
    cells = (
        cell.transform_filter("datum.scored > 0")
        .mark_rect(stroke=PAGE.surface, strokeWidth=0.5)
        .encode(color=colour, tooltip=tooltip)
    )
    empty = (
        cell.transform_filter("datum.scored == 0")
        .mark_rect(stroke=PAGE.surface, strokeWidth=0.5, fill=PAGE.empty)
        .encode(tooltip=tooltip)
    )
    return alt.layer(cells, empty).properties(height=alt.Step(20))


def _frontier(predicted: Rows, measured: Rows) -> Chart:
    """Damage against bits: the best at every budget, the choice, baselines; what was measured.

    Measured damage has an axis of its own, of as many decades as that of the predicted, so that
    equal ratios are equally far apart; the median measured recipe stands where it was predicted.
    """
    ratios = [row["kl"] / row["predicted"] for row in measured if row["predicted"]]
    ratio = median(ratios) if ratios else 1.0
    ends = [(row["low"], row["high"]) for row in predicted]
    ends += [((row["low"] or row["kl"]) / ratio, (row["high"] or row["kl"]) / ratio)
             for row in measured]  # fmt: skip
    low = min((low for low, _ in ends if low), default=0.1) / 1.3
    high = max((high for _, high in ends if high), default=1.0) * 1.3
    x = alt.X("bits:Q", title="effective bits per weight", scale=alt.Scale(zero=False, nice=False))
    y_scale = alt.Scale(type="log", nice=False, domain=[low, high])
    axis = alt.Axis(format="~e", tickCount=6, orient="left")
    y = alt.Y("damage:Q", title="predicted damage", scale=y_scale, axis=axis)
    base = alt.Chart(alt.NamedData("frontier")).encode(x=x)
    tooltip = [
        alt.Tooltip("label:N"),
        alt.Tooltip("kind:N"),
        alt.Tooltip("bits:Q", format=".3~f"),
        alt.Tooltip("size:N", title="searched weights"),
        alt.Tooltip("damage:Q", format=".3~g", title="predicted damage"),
        alt.Tooltip("low:Q", format=".3~g", title="95 % interval from"),
        alt.Tooltip("high:Q", format=".3~g", title="to"),
        alt.Tooltip("gap:Q", format=".2~p", title="could be better by at most"),
        alt.Tooltip("shares:N", title="share of the weights"),
    ]
    line = base.transform_filter(f"datum.kind == '{KINDS['frontier']}'")
    names = [*KINDS.values(), *([RANDOM, BETTER] if measured else [])]
    marks = [PAGE.muted, PAGE.accent, *PAGE.subsystems[1:4], PAGE.subsystems[6], PAGE.subsystems[5]]
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=names, range=marks[: len(names)]),
        legend=alt.Legend(orient="top", columns=2, labelLimit=240),
    )
    shapes = [
        "circle",
        "diamond",
        "square",
        "triangle-up",
        "cross",
        "triangle-down",
        "triangle-right",
    ]
    shape = alt.Shape(
        "kind:N", title=None, scale=alt.Scale(domain=names, range=shapes[: len(names)])
    )
    chart = alt.layer(
        line.mark_area(opacity=0.18, color=PAGE.muted).encode(
            y=alt.Y("low:Q", scale=y_scale, axis=axis, title="predicted damage"), y2="high:Q"
        ),
        line.mark_line(color=PAGE.muted, strokeWidth=1.5).encode(y=y),
        base.mark_point(filled=True, opacity=1).encode(
            y=y,
            color=colour,
            shape=shape,
            size=alt.condition(
                f"datum.kind == '{KINDS['frontier']}'", alt.value(18), alt.value(110)
            ),
            tooltip=tooltip,
        ),
        base.transform_filter("datum.knee")
        .mark_point(shape="circle", size=170, filled=False, stroke=PAGE.ink, strokeWidth=1.5)
        .encode(y=y, tooltip=tooltip),
        base.transform_filter("datum.knee")
        .mark_text(dy=-16, color=PAGE.ink, text="knee")
        .encode(y=y),
    )
    if measured:
        right = _measured_recipes(x, colour, shape, [low * ratio, high * ratio])
        chart = alt.layer(chart, right).resolve_scale(y="independent")
    return chart.properties(height=300)


def _measured_recipes(x: alt.X, colour: alt.Color, shape: alt.Shape, domain: list[float]) -> Chart:
    """The measured recipes on an axis of their own, at the right; hollow, as predicted else."""
    axis = alt.Axis(format="~e", tickCount=6, orient="right", grid=False)
    scale = alt.Scale(type="log", nice=False, domain=domain)
    base = alt.Chart(alt.NamedData("recipes")).encode(x=x)
    tooltip = [
        alt.Tooltip("label:N"),
        alt.Tooltip("bits:Q", format=".3~f"),
        alt.Tooltip("kl:Q", format=".3~g", title="measured KL"),
        alt.Tooltip("low:Q", format=".3~g", title="95 % interval from"),
        alt.Tooltip("high:Q", format=".3~g", title="to"),
        alt.Tooltip("predicted:Q", format=".3~g", title="predicted damage"),
        alt.Tooltip("shares:N", title="share of the weights"),
    ]
    title = "measured damage, KL (hollow)"
    return alt.layer(
        base.transform_filter(f"datum.kind != '{RANDOM}'")
        .mark_rule(strokeWidth=1.2)
        .encode(y=alt.Y("low:Q", scale=scale, axis=axis, title=title), y2="high:Q", color=colour),
        base.mark_point(filled=False, strokeWidth=1.8, opacity=1).encode(
            y=alt.Y("kl:Q", scale=scale, axis=axis, title=title),
            color=colour,
            shape=shape,
            size=alt.condition(f"datum.kind == '{RANDOM}'", alt.value(30), alt.value(110)),
            tooltip=tooltip,
        ),
    )


def _measured(result: Result, singles: Rows) -> Chart:
    """Scores of single groups against the damage that quantizing them alone did."""
    x_domain, y_domain = (_domain([row[name] for row in singles]) for name in ("score", "kl"))
    names = list(dict.fromkeys(group.subsystem for group in result.groups))
    base = (
        alt.Chart(alt.NamedData("singles"))
        .transform_filter(BY_SUBSYSTEM)
        .transform_filter("shown_format == '' || datum.format == shown_format")
    )
    axis = alt.Axis(format="~e", tickCount=6)
    x_scale = alt.Scale(type="log", nice=False, domain=x_domain, clamp=True)
    y_scale = alt.Scale(type="log", nice=False, domain=y_domain, clamp=True)
    x = alt.X("score:Q", title="predicted: score", scale=x_scale, axis=axis)
    y = alt.Y("kl:Q", title="measured: KL, alone", scale=y_scale, axis=axis)
    colour = alt.Color(
        "subsystem:N",
        title=None,
        scale=alt.Scale(domain=names, range=_cycle(PAGE.subsystems, len(names))),
        legend=alt.Legend(orient="top", symbolType="circle", symbolOpacity=1),
    )
    shape = alt.Shape(
        "subsystem:N",
        title=None,
        scale=alt.Scale(domain=names, range=_cycle(SHAPES, len(names))),
        legend=alt.Legend(orient="top", symbolOpacity=1),
    )
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("subsystem:N"),
        alt.Tooltip("kind:N"),
        alt.Tooltip("format:N"),
        alt.Tooltip("score:Q", format=".3~g"),
        alt.Tooltip("low:Q", format=".3~g", title="95 % interval from"),
        alt.Tooltip("high:Q", format=".3~g", title="to"),
        alt.Tooltip("kl:Q", format=".3~g", title="measured KL"),
        alt.Tooltip("kl_low:Q", format=".3~g", title="95 % interval from"),
        alt.Tooltip("kl_high:Q", format=".3~g", title="to"),
    ]
    placed = base.transform_filter("datum.positive")
    said = (
        alt.Chart(alt.NamedData("correlations"))
        .transform_filter("datum.subsystem == shown_subsystem")
        .transform_filter("shown_format == '' || datum.format == shown_format")
        .transform_aggregate(lines="values(text)")
        .transform_calculate(text=f"slice(pluck(datum.lines, 'text'), 0, {SAID})")
        .mark_text(
            align="left",
            baseline="top",
            x=8,
            y=6,
            color=PAGE.ink,
            fontSize=11,
            limit=alt.expr("width - 12"),
        )
        .encode(text="text:N")
    )
    return alt.layer(
        placed.mark_rule(strokeWidth=1, opacity=0.35).encode(
            x=alt.X("low:Q", scale=x_scale, title="predicted: score"),
            x2="high:Q",
            y=y,
            color=colour,
        ),
        placed.mark_rule(strokeWidth=1, opacity=0.35).encode(
            y=alt.Y("kl_low:Q", scale=y_scale, title="measured: KL, alone"), y2="kl_high:Q", x=x,
            color=colour,
        ),
        placed.mark_point(filled=True, size=50, opacity=0.9).encode(
            x=x, y=y, color=colour, shape=shape, tooltip=tooltip
        ),
        base.transform_filter("!datum.positive")
        .mark_text(text="0", fontSize=12, fontWeight="bold")
        .encode(x=x, y=y, color=colour, tooltip=tooltip),
        said,
    ).properties(height=320)  # fmt: skip


def _domain(values: Sequence[float]) -> list[float]:
    """Return the ends of a logarithmic axis with room at both; zeros stand at its lower end."""
    known = [value for value in values if value > 0]
    return [min(known) / 3, max(known) * 2] if known else [0.1, 1.0]


def _finish(chart: Chart) -> Spec:
    """Return the specification: parameters, width of its container, fonts and colours."""
    chart = (
        chart.add_params(*_shown())
        .properties(
            width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
        )
        .configure(font=PAGE.font, background="transparent")
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=PAGE.muted,
            titleColor=PAGE.muted,
            titleFontWeight="normal",
            gridColor=PAGE.grid,
            domainColor=PAGE.grid,
            tickColor=PAGE.grid,
            labelFontSize=11,
        )
        .configure_legend(labelColor=PAGE.ink, titleColor=PAGE.muted, titleFontWeight="normal")
    )
    spec: Spec = chart.to_dict(validate=False)
    return spec


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[index % len(values)] for index in range(count)]


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
