"""Read the config's YAML, and say where it is none."""

from pathlib import Path
from typing import Any

import yaml

from layersense.config import Config
from layersense.config_problems import either, shown
from layersense.errors import LayersenseError


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read one YAML file, without checking what it says.

    Raises:
        LayersenseError: it is missing, not UTF-8, not YAML or no mapping, or a key stands twice
            in one mapping (all are named, with their lines).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LayersenseError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise LayersenseError(
            f"{path}: cannot be read ({error.strerror}); give the config with --configfile"
        ) from error
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            repeated = _repeated_keys(root)
            data = loader.construct_document(root) if root is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise LayersenseError(f"{path}: is not YAML: {_yaml_problem(error)}") from error
    if repeated:
        raise LayersenseError(
            f"{path}: a key stands twice and the first would be lost; rename or remove one of "
            f"them ({'; '.join(repeated)})"
        )
    if not isinstance(data, dict):
        raise LayersenseError(
            f"{path}: expected a mapping with {either(Config.model_fields)}, found {shown(data)}"
        )
    return data


def _repeated_keys(root: yaml.Node | None) -> list[str]:
    """Return where a key stands twice in one mapping: PyYAML keeps the last one, silently."""
    found = []
    seen: set[int] = set()  # a node with an anchor stands in several places
    nodes = [root] if root is not None else []
    while nodes:
        node = nodes.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            nodes += [key, value]
            if isinstance(key, yaml.ScalarNode):
                word, line = (key.tag, key.value), key.start_mark.line + 1
                if word in first:
                    found.append((line, f"`{key.value}` stands in line {first[word]} already"))
                first.setdefault(word, line)
    return [f"line {line}: {text}" for line, text in sorted(found)]


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        # The parser stops where it can go on no more, which is often a line after the slip.
        return f"{place}; {_yaml_hint(str(error.problem))}"
    return " ".join(str(error).split())


def _yaml_hint(problem: str) -> str:
    if "'\\t'" in problem:
        return "indent by spaces, YAML takes no tabs"
    return (
        "look at this line and the one before: keys of one mapping have the same indent and end "
        "in a colon and a space, and brackets and quotes are closed"
    )
