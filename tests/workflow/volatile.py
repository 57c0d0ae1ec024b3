"""Results without what is declared to differ from run to run."""

import json
from pathlib import Path
from typing import Any

from layersense.manifests.schema import VOLATILE


def _drop(value: Any, keys: list[str]) -> None:
    key, *rest = keys
    for name in list(value) if key == "*" else [key]:
        if rest:
            _drop(value[name], rest)
        else:
            # A declared key that is not there would hide a difference elsewhere.
            del value[name]


def stable_manifest(path: Path) -> str:
    """Return a manifest's text without the keys that it declares volatile."""
    manifest = json.loads(path.read_bytes())
    for pattern in VOLATILE:
        _drop(manifest, pattern.split("."))
    return json.dumps(manifest, indent=1)


def stable_scores(path: Path) -> str:
    """Return a score file's text without the same keys, where a score file has them."""
    scores = json.loads(path.read_bytes())
    for pattern in VOLATILE:
        section, _, key = pattern.split(".")
        prefix = ["environment"] if section == "environment" else []
        _drop(scores, ["formats", "*", *prefix, key])
    return json.dumps(scores, indent=1)
