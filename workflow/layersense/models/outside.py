"""Tasks of the user's own, named as ``package.module:Class`` (no torch)."""

import importlib
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from layersense.config import OUTSIDE_TASK
from layersense.errors import LayersenseError

MEMBERS = (
    "name", "modalities", "unit", "load", "batches", "forward", "loss", "supervised_logits",
    "describe",
)  # fmt: skip
"""What a task has; see :class:`layersense.models.tasks.protocol.Task`."""


def is_outside(task: str) -> bool:
    """Return whether ``task`` names a class rather than a task of layersense."""
    return re.fullmatch(OUTSIDE_TASK, task) is not None


def find_module(task: str) -> Path | None:
    """Return the file that defines a task of the user's own, without running any of it.

    It is looked for where Snakemake was started, then where Python finds packages.
    """
    places: list[str] | None = ["", *sys.path]
    found = None
    for part in task.partition(":")[0].split("."):
        found = PathFinder.find_spec(part, places)
        if found is None:
            return None
        places = list(found.submodule_search_locations or [])
    if found is None or found.origin is None:
        return None
    return Path(found.origin)


def load_task(task: str) -> Any:
    """Import a task of the user's own and make one.

    Raises:
        LayersenseError: it cannot be imported or lacks a member of the protocol.
    """
    module_name, _, class_name = task.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed `layersense` command does not look here by itself
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise LayersenseError(
            f"task {task}: {module_name} cannot be imported ({error}); start Snakemake in the "
            "folder that holds it, or install it"
        ) from error
    made = getattr(module, class_name, None)
    if not isinstance(made, type):
        raise LayersenseError(
            f"task {task}: {module.__file__} defines no class {class_name}; correct `task`"
        )
    instance = made()
    if missing := [member for member in MEMBERS if not hasattr(instance, member)]:
        raise LayersenseError(
            f"task {task}: {class_name} has no `{missing[0]}`, which every task has; see "
            "docs/tasks.md"
        )
    return instance
