"""What is wrong with a config, in sentences: faults of type in our own words, and what is left.

What types a config has is told by :mod:`layersense.config`, and found by pydantic; what depends on
several entries is found by :mod:`layersense.validation`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from layersense import config as models
from layersense.config import TASK_MODALITIES, Config

Path_ = tuple[str | int, ...]
"""Keys and indices that lead to a value of the config."""

Part = dict[str, Any]
"""An entry with its defaults; a key whose value is wrong or missing is absent."""

DATASETS: dict[str, type[BaseModel]] = {
    "sample": models.SampleDataset,
    "coco": models.CocoDataset,
    "images": models.ImagesDataset,
    "text": models.TextDataset,
}
MODELS: dict[str, type[BaseModel]] = {
    "demo": models.DemoModel,
    "checkpoint": models.CheckpointModel,
}
ENTRIES: dict[str, type[BaseModel]] = {
    "formats": models.OwnFormat,
    "schemes": models.Scheme,
    "runs": models.Run,
    "manifests": models.ImportedManifest,
}


class Problems:
    """What is wrong with a config, collected: sentences, and the paths of what is not to be used.

    Args:
        data: content of the config.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.problems: list[str] = []
        self.bad: set[Path_] = set()

    def add(self, path: Path_, expected: str, found: Any = None, words: Iterable[str] = ()) -> None:
        """Note a problem: what was expected at ``path``; ``found`` is rendered unless None."""
        text = f"{key_path(path)}: {expected}"
        if found is not None:
            text += f", found {shown(found)}"
        known = [word for word in words if isinstance(word, str)]  # YAML keys may be numbers
        if isinstance(found, str) and (near := get_close_matches(found, known, 1, 0.5)):
            text += f"; did you mean `{near[0]}`?"
        if text not in self.problems:
            self.problems.append(text)

    # --- types and keys ---

    def add_errors(self, errors: Iterable[ErrorDetails]) -> None:
        """Note what pydantic found, in our own words."""
        for error in errors:
            path, value, context = self._where(error), error["input"], error.get("ctx", {})
            self.bad.add(path)
            kind = error["type"]
            if kind == "extra_forbidden":
                fields = self._fields(path[:-1])
                self.add(path, f"expected one of the keys {either(fields)}", path[-1], fields)
            elif kind == "missing":
                description = self._description(path)
                self.add(path, f"expected this key ({description}), found nothing")
            elif kind in ("union_tag_invalid", "union_tag_not_found") and isinstance(value, dict):
                kinds = list(DATASETS if path[0] == "datasets" else MODELS)
                path = (*path, "source")
                self.bad.add(path)
                if "source" in value:
                    self.add(path, f"expected {either(kinds)}", value["source"], kinds)
                else:
                    self.add(path, f"expected this key ({either(kinds)}), found nothing")
            elif kind == "literal_error":
                words = self._words(path)
                self.add(path, f"expected {either(words)}", value, words)
            elif kind == "string_pattern_mismatch" and path[-1] == "task":
                expected = (
                    f"expected {either(TASK_MODALITIES)}, or a class as `package.module:Class`"
                )
                self.add(path, expected, value, TASK_MODALITIES)
            elif path[-1] == "[key]":
                self.bad.add(path[:-1])
                self.add(
                    path[:-1],
                    "expected a name of at most 100 letters, digits, dots, underscores and "
                    "hyphens that starts with a letter or digit (put numbers, `yes` and `no` in "
                    "quotes)",
                    path[-2],
                )
            else:
                expected = _expected(kind, context, error["msg"])
                self.add(path, expected + self._slip(kind, path, value), _Any(value))

    def _slip(self, kind: str, path: Path_, value: Any) -> str:
        """Return what was probably meant by a value of another type, in brackets."""
        if kind == "list_type" and isinstance(value, str):
            return f" (`[{value}]`)"
        if kind != "model_type":
            return ""
        if value is True and not any(
            f.is_required() for f in self._model(path).model_fields.values()
        ):
            return " (`{}` for the defaults)"
        if len(path) == 2 and path[1] in self._model(path).model_fields:
            return f" of keys (`{path[1]}` is a key of the entry above it: indent it further)"
        return ""

    def _where(self, error: ErrorDetails) -> Path_:
        """Return the path of an error, without the tag that pydantic adds for a union's member."""
        path = tuple(error["loc"])
        tags = {"datasets": DATASETS, "models": MODELS}.get(str(path[0]) if path else "")
        if tags is not None and len(path) > 2 and path[2] in tags:
            path = path[:2] + path[3:]
        return path

    def _model(self, path: Path_) -> type[BaseModel]:
        """Return the model of the mapping at ``path``."""
        if not path:
            return Config
        section = str(path[0])
        if section == "report":
            return models.Report
        if section == "datasets" and path[2:3] == ("fetch",):
            return models.Fetch
        if section in ("datasets", "models"):
            entry = self.data[section][path[1]]
            kinds = DATASETS if section == "datasets" else MODELS
            return kinds[entry.get("source", "checkpoint")]
        if path[2:3] == ("cost_table",):
            return models.CostTable
        if path[2:3] == ("search_spaces",):
            return models.SearchSpace
        if path[2:3] == ("verify",):
            return models.Verify
        return ENTRIES[section]

    def _fields(self, path: Path_) -> list[str]:
        return list(self._model(path).model_fields)

    def _description(self, path: Path_) -> str:
        text = self._model(path[:-1]).model_fields[str(path[-1])].description or ""
        return " ".join(text.split()).split("; ")[0].rstrip(".")

    def _words(self, path: Path_) -> list[str]:
        """Return the words of a literal, or of a literal that may be left out."""
        annotation = self._model(path[:-1]).model_fields[str(path[-1])].annotation
        args = [arg for arg in get_args(annotation) if arg is not type(None)]
        return [word for arg in args for word in ([arg] if isinstance(arg, str) else get_args(arg))]

    # --- entries ---

    def section(self, name: str) -> dict[Any, Any]:
        """Return a section as it was written, empty if it is no mapping."""
        section = self.data.get(name)
        return section if isinstance(section, dict) else {}

    def part(self, section: str, name: Any) -> Part:
        """Return what is valid of an entry, with the defaults of what was left out."""
        entry = self.section(section).get(name)
        if not isinstance(entry, dict) or (section, name, "source") in self.bad:
            return {}
        fields = self._model((section, name)).model_fields
        defaults = {key: field.default for key, field in fields.items() if not field.is_required()}
        part = {
            key: value
            for key, value in {**defaults, **entry}.items()
            if (section, name, key) not in self.bad
        }
        for path in self.bad:  # single items of a list, or something within them
            if len(path) < 4 or path[:2] != (section, name):
                continue
            key, index = str(path[2]), path[3]
            if isinstance(part.get(key), list) and isinstance(index, int):
                part[key] = [None if i == index else item for i, item in enumerate(part[key])]
        return part

    def items(self, section: str) -> Iterator[tuple[str, Part]]:
        """Yield the entries of a section that can be looked at."""
        for name in self.section(section):
            if isinstance(name, str):
                yield name, self.part(section, name)


class _Any:
    """A found value that is shown even if it is None."""

    def __init__(self, value: Any) -> None:
        self.value = value


def key_path(path: Path_) -> str:
    """Return ``runs."a.b".schemes[0]`` for a path; names with a dot are quoted."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            name = str(key)
            text += ("." if text else "") + (f'"{name}"' if "." in name else name)
    return text or "the whole"


def shown(value: Any) -> str:
    """Return a short rendering of a value, as YAML shows it."""
    if isinstance(value, _Any):
        value = value.value
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 80 else text[:77] + '…"'
    return f"`{value}`"


def either(words: Iterable[str]) -> str:
    """Return words as `a`, `b` or `c`."""
    quoted = [f"`{word}`" for word in words]
    return " or ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))


def _expected(kind: str, context: Mapping[str, Any], message: str) -> str:
    """Return what pydantic expected, in our own words."""
    words = {
        "string_type": "text (put it in quotes)",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "union_tag_not_found": "a mapping",
        "finite_number": "a finite number",
        "greater_than": "more than {gt:g}",
        "greater_than_equal": "at least {ge:g}",
        "less_than": "less than {lt:g}",
        "less_than_equal": "at most {le:g}",
        "string_too_short": "some text",
        "too_short": "at least {min_length} entry",
        "string_pattern_mismatch": "a name of letters, digits, dots, underscores and hyphens",
    }
    if kind in words:
        return f"expected {words[kind].format(**context)}"
    return message[:1].lower() + message[1:]
