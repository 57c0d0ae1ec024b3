"""The JSON schema of the manifest, generated: ``python -m layersense.manifests.json_schema``."""

from pathlib import Path
from typing import Any

import msgspec

from layersense.files import write_json
from layersense.manifests.schema import Manifest

PATH = Path(__file__).resolve().parents[2] / "schemas" / "manifest.schema.json"


def manifest_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a manifest."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "layersense manifest",
        **msgspec.json.schema(Manifest),
    }


if __name__ == "__main__":
    write_json(PATH, manifest_schema())
