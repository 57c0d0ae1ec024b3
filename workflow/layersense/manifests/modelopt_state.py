"""ModelOpt's own AutoQuantize state, as ``auto_quantize`` saves or returns it (no torch).

A saved state is a pickle within a zip, and a pickle can run code when it is loaded. This reader
builds nothing but dictionaries, lists, sets and numbers: every class that the file names becomes an
inert placeholder, and tensors are not read at all.
"""

import io
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

from layersense.errors import LayersenseError

SUFFIXES = (".pt", ".pth")
MOST_BYTES = 2**30
"""Largest pickle that is read; a state of ten thousand groups takes some megabytes."""
MOST_NESTED = 20
"""Containers within each other that are read; a state has some four."""


class _Inert:
    """Stands for an object of any class, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _: Any) -> None:
        """Take what a list would."""

    def extend(self, _: Any) -> None:
        """Take what a list would."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Take what a dictionary would."""

    def __hash__(self) -> int:
        return id(self)


class _Recipe(_Inert):
    """Stands for ModelOpt's ``QuantRecipe``, which keeps its label."""

    @property
    def label(self) -> str | None:
        """The label, if the object has one."""
        state = self.state if isinstance(self.state, dict) else {}
        label = state.get("_str_repr")
        return label if isinstance(label, str) else None


_PLAIN: dict[str, Any] = {
    "OrderedDict": OrderedDict,
    "defaultdict": defaultdict,
    "dict": dict,
    "set": set,
    "list": list,
}


class _Reader(pickle.Unpickler):
    """Resolves no class of the file's choice."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a placeholder for a class; the containers are harmless."""
        if module in ("collections", "builtins", "__builtin__") and name in _PLAIN:
            return _PLAIN[name]
        return _Recipe if name == "QuantRecipe" else _Inert

    def persistent_load(self, _: Any) -> None:
        """Leave a tensor's storage alone."""


def read_state(path: str | Path) -> dict[str, Any]:
    """Return a saved state with labels in the place of recipes, tensors left out.

    Raises:
        LayersenseError: it is missing, no file that torch saved, or holds no dictionary.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > MOST_BYTES:
                raise LayersenseError(
                    f"{path}: is a zip, but not as torch saves a state; give the file that "
                    "`auto_quantize(…, checkpoint=…)` wrote"
                )
            data = archive.read(names[0])
        content = _Reader(io.BytesIO(data)).load()
    except FileNotFoundError as error:
        raise LayersenseError(f"{path}: there is no such file; correct its path") from error
    except LayersenseError:
        raise
    except Exception as error:
        # Broken pickles raise whatever the operation that met the damage raises.
        raise LayersenseError(
            f"{path}: cannot be read as a state that torch saved ({type(error).__name__}); copy it "
            "again, or save it by `torch.save`"
        ) from error
    if not isinstance(content, dict) or "candidate_stats" not in content:
        raise LayersenseError(
            f"{path}: holds no `candidate_stats`, so it is no state of AutoQuantize; give the file "
            "that `auto_quantize(…, checkpoint=…)` wrote"
        )
    kept = ("method", "candidate_stats", "best", "constraints")
    known: dict[int, Any] = {}
    return {key: _plain(content[key], known) for key in kept if key in content}


def _plain(value: Any, known: dict[int, Any], depth: int = 0) -> Any:
    """Return plain data: recipes by their labels, other placeholders as None.

    Args:
        value: what was read.
        known: identity → what was made of a container; a pickle may hold one many times over, and
            within itself.
        depth: in how many containers it stands.
    """
    if isinstance(value, _Inert):
        return value.label if isinstance(value, _Recipe) else None
    if isinstance(value, dict | list | tuple):
        if depth > MOST_NESTED:
            return None
        if id(value) not in known:
            known[id(value)] = None
            known[id(value)] = (
                {
                    key: _plain(item, known, depth + 1)
                    for key, item in value.items()
                    if isinstance(key, str)
                }
                if isinstance(value, dict)
                else [_plain(item, known, depth + 1) for item in value]
            )
        return known[id(value)]
    return value if isinstance(value, str | int | float | bool) else None
