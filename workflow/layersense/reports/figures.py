"""The charts of a report as SVG and PNG, without a browser."""

import re
from collections.abc import Mapping
from pathlib import Path

import vl_convert

from layersense.files import atomic_write
from layersense.reports.charts import PAPER, VEGA_LITE, Spec, on_paper
from layersense.reports.measured import Rows

WIDTH = 900
"""Of a figure, in pixels."""
SCALE = 1.5
"""Pixels of a PNG for each of the figure."""


def write_figures(specs: Mapping[str, Spec], rows: dict[str, Rows], folder: Path) -> None:
    """Write charts over their named data as ``{name}.svg`` and ``{name}.png``."""
    for name, spec in specs.items():
        write_figure(on_paper(spec), rows, folder / f"{name}.svg", folder / f"{name}.png")


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
    picture = vl_convert.vegalite_to_svg(figure, vl_version=VEGA_LITE)
    atomic_write(svg, stable_ids(picture))
    # From the picture: to draw the chart again takes as long as all the rest.
    atomic_write(png, vl_convert.svg_to_png(picture, scale=SCALE))


def stable_ids(svg: str) -> str:
    """Return an SVG whose ids are numbered from 0: Vega counts them on from figure to figure."""
    names = dict.fromkeys(re.findall(r'\bid="((?:clip|gradient_)\d+)"', svg))
    numbers = {name: f"id{index}" for index, name in enumerate(names)}
    return re.sub(
        r'(\bid="|url\(#|href="#)((?:clip|gradient_)\d+)',
        lambda match: match[1] + numbers.get(match[2], match[2]),
        svg,
    )
