"""Tables of a page, by itables: its arguments for DataTables, and the files that a page inlines."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from itables.javascript import get_itable_arguments
from itables.utils import find_package_file

FILES = {
    "datatables.js": find_package_file("html/dt_bundle.js"),
    "datatables.css": find_package_file("html/dt_bundle.css"),
}
"""DataTables as itables bundles it."""


def data_table(
    columns: dict[str, list[Any]],
    *,
    hidden: Sequence[str] = (),
    order: Sequence[int | str] = (),
    page: int = 25,
) -> dict[str, Any]:
    """Return a table for the page's script: DataTables' arguments, headings, columns of numbers.

    Texts are escaped.

    Args:
        columns: heading → values.
        hidden: headings of columns that are searched and copied, and not shown.
        order: column and direction to sort by, as DataTables has it.
        page: rows on a page.
    """
    names = list(columns)
    values = [
        pa.array(column, pa.float64()) if _is_float(column) else pa.array(column)
        for column in columns.values()
    ]
    arguments = get_itable_arguments(
        pa.table(values, names=names),
        connected=False,
        maxBytes=0,
        maxColumns=0,
        showIndex=False,
        format_floats_in_python=False,
        text_in_header_can_be_selected=False,
        order=[list(order)] if order else [],
        pageLength=page,
        lengthMenu=[page, 4 * page, 1000],
        layout={
            "topStart": "search",
            "topEnd": {"buttons": [_copy(), {"extend": "colvis", "text": "Columns"}]},
            "bottomStart": "info",
            "bottomEnd": "paging",
        },
        columnDefs=[{"targets": [names.index(name) for name in hidden], "visible": False}],
    )
    kept = ("data_json", "table_html", "layout", "order", "pageLength", "lengthMenu", "columnDefs")
    numeric = [index for index, column in enumerate(columns.values()) if _is_float(column)]
    return {
        "arguments": {key: value for key, value in arguments.items() if key in kept}
        | {"classes": ["display", "compact"]},
        "columns": names,
        "numeric": numeric,
    }


def _copy() -> dict[str, Any]:
    return {
        "extend": "copyHtml5",
        "text": "Copy as CSV",
        "fieldSeparator": ",",
        "fieldBoundary": '"',
        "title": None,
        "escapeExcelFormula": True,
        "exportOptions": {"orthogonal": "export"},
    }


def _is_float(column: Sequence[Any]) -> bool:
    return any(isinstance(value, float) for value in column)
