"""Text of reports: numbers, sizes, one-line names, and Markdown with its escaping."""

import html
import re
import unicodedata
from collections.abc import Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from layersense.errors import LayersenseError


class Markdown(str):
    """Text that is Markdown already and must not be escaped again."""

    __slots__ = ()


def escape(value: object) -> Markdown:
    """Return ``value`` as Markdown that reads as it is: on one line, with nothing active in it."""
    if isinstance(value, Markdown):
        return value
    text = html.escape(plain(str(value)), quote=False)
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    # Between letters an underscore is plain on GitHub, and snake_case stays readable.
    return Markdown(re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text))


def code(value: object) -> Markdown:
    """Return ``value`` as inline code that is safe in a table."""
    text = plain(str(value)).strip()
    if not text or "`" in text or "\\" in text:  # a code span has no escape for these
        return escape(text)
    return Markdown("`" + text.replace("|", "\\|") + "`")


def number(value: float | None) -> str:
    """Return ``value`` with three significant digits; ``–`` if there is none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    exponent = floor(log10(abs(float(f"{value:.2e}"))))
    if -4 <= exponent < 6:
        rounded = round(value, 2 - exponent)
        return f"{rounded:,.{max(0, 2 - exponent)}f}"
    return f"{value:.2e}"


def size(value: float | None) -> str:
    """Return bytes as kB, MB or GB (powers of ten) with three significant digits."""
    if value is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{number(value)} bytes"


def bits(value: float | None) -> str:
    """Return bits per weight with three decimals at most."""
    return "–" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def percent(value: float | None) -> str:
    """Return a share as percent; a share that is small but not zero stays visible."""
    if value is None:
        return "–"
    if 0 < abs(value) < 0.001:
        return "< 0.1 %"
    return f"{value * 100:.1f} %"


def count(value: float | None) -> str:
    """Return a whole number with thousands separated."""
    return "–" if value is None else f"{int(value):,}"


def short_format(name: str) -> str:
    """Return a format's name without the ending that every config of ModelOpt has."""
    for ending in ("_ALL_LAYERS_CFG", "_DEFAULT_CFG", "_CFG"):
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return name


def join(items: Sequence[str]) -> Markdown:
    """Return escaped items as ``a, b and c``."""
    parts = [escape(item) for item in items]
    if len(parts) < 2:
        return Markdown("".join(parts))
    return Markdown(f"{', '.join(parts[:-1])} and {parts[-1]}")


def render(template: str | Path, context: dict[str, Any]) -> str:
    """Render a Markdown template; whatever it prints is escaped unless it is :class:`Markdown`.

    Raises:
        LayersenseError: the template cannot be read or is wrong.
    """
    # Jinja2's own autoescape speaks HTML; `finalize` is the hook to escape for Markdown.
    environment = Environment(
        autoescape=False,  # noqa: S701
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (escape, code, number, size, bits, percent, count, join)
    environment.filters.update({function.__name__: function for function in filters})
    try:
        text = environment.from_string(Path(template).read_text(encoding="utf-8")).render(context)
    except OSError as error:
        raise LayersenseError(f"{template}: cannot be read ({error.strerror})") from error
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise LayersenseError(
            f"{template}{place}: is no valid template ({error.message}); correct it"
        ) from error
    return re.sub(r"\n{3,}", "\n\n", text)


def plain(text: str) -> str:
    """Return text on one line, without control characters and direction marks."""
    if text.isascii() and text.isprintable():
        return text if "  " not in text else re.sub(r" {2,}", " ", text)
    kept = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    return re.sub(r" {2,}", " ", kept)
