"""The charts of a report as SVG and PNG, without a browser."""

import re
from pathlib import Path

import vl_convert

from layersense.files import atomic_write
from layersense.reports.charts import PAPER, VEGA_LITE, Rows, Spec, charts, datasets
from layersense.reports.result import Frontier, Result

WIDTH = 900
"""Of a figure, in pixels."""
SCALE = 2
"""Pixels of a PNG for each of the figure."""


def write_figures(result: Result, folder: Path, frontier: Frontier | None = None) -> None:
    """Write each chart of a result as ``{name}.svg`` and ``{name}.png``."""
    rows = datasets(result, frontier)
    for name, spec in charts(result, PAPER, frontier).items():
        write_figure(spec, rows, folder / f"{name}.svg", folder / f"{name}.png")


def write_figure(spec: Spec, rows: dict[str, Rows], svg: Path, png: Path) -> None:
    """Write one chart over its named data."""
    figure = {
        **spec,
        "datasets": rows,
        "width": WIDTH,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": PAPER.surface,
        "padding": 12,
    }
    atomic_write(svg, stable_ids(vl_convert.vegalite_to_svg(figure, vl_version=VEGA_LITE)))
    atomic_write(png, vl_convert.vegalite_to_png(figure, vl_version=VEGA_LITE, scale=SCALE))


def stable_ids(svg: str) -> str:
    """Return an SVG whose ids are numbered from 0: Vega counts them on from figure to figure."""
    names = dict.fromkeys(re.findall(r'\bid="((?:clip|gradient_)\d+)"', svg))
    numbers = {name: f"id{index}" for index, name in enumerate(names)}
    return re.sub(
        r'(\bid="|url\(#|href="#)((?:clip|gradient_)\d+)',
        lambda match: match[1] + numbers.get(match[2], match[2]),
        svg,
    )
