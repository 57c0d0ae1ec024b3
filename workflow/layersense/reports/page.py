"""HTML pages that work from one file: Jinja2 with autoescape, scripts and data inlined."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from layersense.errors import LayersenseError
from layersense.reports.text import bits, count, number, percent, plain, short_format, size

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    # Vega compiles its expressions, and DataTables comes as a module, imported from a blob.
    "script-src 'unsafe-inline' 'unsafe-eval' blob:; base-uri 'none'; form-action 'none'"
)
"""What a page may do: nothing that reaches the network."""


def render_page(template: Path, context: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    """Render an HTML template.

    Whatever it prints is escaped, and on one line. ``style(name)`` and ``script(name)`` inline a
    file, from beside the template or from ``files``, and ``module(name)`` a script as JSON, to be
    imported.

    Args:
        template: Jinja2 template.
        context: what it may print.
        files: name → file that is not beside the template.

    Raises:
        LayersenseError: the template or a file cannot be read, or the template is wrong.
    """

    def read(name: str) -> str:
        path = files.get(name, template.with_name(name))
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise LayersenseError(f"{path}: cannot be read ({error.strerror})") from error

    environment = Environment(
        autoescape=True,
        finalize=_one_line,
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (bits, count, number, percent, plain, size, short_format)
    environment.filters.update({function.__name__: function for function in filters})
    environment.globals.update(
        style=lambda name: Markup(read(name).replace("</", "<\\/")),  # noqa: S704
        script=lambda name: Markup(inline_script(read(name))),  # noqa: S704
        module=read,
        policy=CONTENT_SECURITY_POLICY,
    )
    try:
        return environment.get_template(template.name).render(context)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise LayersenseError(
            f"{template}{place}: is no valid template ({error.message}); correct it"
        ) from error


def _one_line(value: Any) -> Any:
    """Return text without control characters and direction marks, which escapes leave."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def inline_script(source: str) -> str:
    """Return JavaScript that no HTML parser takes for the end of a script.

    What ends one can stand in strings and regular expressions alone, where a backslash before the
    slash changes nothing.
    """
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def pack(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as columns, texts as indices into their distinct values: a tenth of the size.

    Returns:
        Column → its values, or for texts ``{"values": distinct ones, "codes": indices}``.
    """
    table = list(rows)
    packed: dict[str, Any] = {}
    for name in table[0] if table else ():
        column = [row[name] for row in table]
        if all(isinstance(value, str) for value in column):
            codes = {value: code for code, value in enumerate(dict.fromkeys(column))}
            packed[name] = {"values": list(codes), "codes": [codes[value] for value in column]}
        else:
            packed[name] = column
    return packed
