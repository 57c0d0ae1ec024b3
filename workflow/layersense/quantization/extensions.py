"""ModelOpt's CUDA extensions: which formats need which, and whether they are built (no torch).

ModelOpt compiles an extension when a quantizer first calls it, which takes a minute of each and
goes on unseen in the midst of a measurement. Here each is built by a job of its own into a folder
that all jobs share, once for each kind of GPU and version of torch and ModelOpt, and what came of
it stands in a record beside it: see :mod:`layersense.quantization.build`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from layersense.errors import LayersenseError
from layersense.files import BROKEN_JSON
from layersense.quantization.formats import Format

EXTENSIONS = {
    "int": "integers",
    "fp8": "FP8",
    "mx": "MX formats",
    "nvfp4": "NVFP4",
    "conv3d": "NVFP4 in 3-D convolutions",
}
"""Extension → what it quantizes."""
STAND_INS = frozenset({"fp8"})
"""Extensions for which ModelOpt has torch operations to fall back on."""
RETRY = "snakemake --forcerun extension"
"""The command that tries again to build what could not be built."""


class Built(msgspec.Struct, kw_only=True, frozen=True):
    """What came of building an extension."""

    extension: str
    state: Literal["built", "failed", "not needed"]
    """``not needed``: on this GPU a Triton kernel does it."""
    key: str
    """GPU architecture and versions that it was built for; the folder's name in the cache."""
    library: str | None = None
    """File of the extension, relative to the folder of the key."""
    reason: str = ""
    """What the compiler said, where it failed."""
    seconds: float = 0.0


def cache_folder(configured: str | None = None) -> Path:
    """Return where extensions are built: as configured, else where torch itself would."""
    folder = configured or os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    return Path(folder).expanduser().absolute()


def needed_extensions(formats: Iterable[Format], modality: str) -> list[str]:
    """Return the extensions that ``formats`` need on a GPU, in the order of :data:`EXTENSIONS`.

    Args:
        formats: what is measured.
        modality: what a batch holds; 3-D convolutions are met in vision towers alone.
    """
    needed: set[str] = set()
    for format in formats:
        needed |= set(extensions_of(format, modality))
    return [name for name in EXTENSIONS if name in needed]


def extensions_of(format: Format, modality: str) -> tuple[str, ...]:
    """Return the extensions that one format needs: see :func:`needed_extensions`."""
    needed = set(format.extensions)
    if "nvfp4" in needed:
        static = any(
            (stage.get("block_sizes") or {}).get("type") != "dynamic"
            for stage in format.weight + format.input
        )
        # The scales of static blocks pass FP8's.
        needed |= {"fp8"} if static else set()
        both = format.weight_format == format.act_format == "NVFP4"
        needed |= {"conv3d"} if both and modality not in ("text", "text_pair") else set()
    return tuple(name for name in EXTENSIONS if name in needed)


def why_left_out(format: Format, built: Mapping[str, Built], modality: str) -> str | None:
    """Return why ``format`` cannot be measured with what is built; None if it can.

    Args:
        format: the format.
        built: extension → what came of building it; one that is not in it counts as there.
        modality: what a batch holds.
    """
    failed = [
        built[name]
        for name in extensions_of(format, modality)
        if name in built and built[name].state == "failed" and name not in STAND_INS
    ]
    if not failed:
        return None
    reasons = "; ".join(dict.fromkeys(record.reason for record in failed))
    names = " and ".join(EXTENSIONS[record.extension] for record in failed)
    return f"ModelOpt's CUDA extension for {names} could not be built ({reasons})"


def sentence(built: Built) -> str:
    """Return in one sentence why an extension is not there; empty if it is."""
    if built.state != "failed":
        return ""
    return (
        f"ModelOpt's CUDA extension for {EXTENSIONS[built.extension]} could not be built on "
        f"{built.key} ({built.reason}); mend that and run `{RETRY}`"
    )


def is_complete(format: Format, built: Mapping[str, Built], modality: str) -> bool:
    """Return whether all of a format's extensions are known to be there."""
    return all(
        name in built and built[name].state != "failed" for name in extensions_of(format, modality)
    )


def read_built(path: str | Path) -> Built:
    """Read what came of building an extension.

    Raises:
        LayersenseError: the file is missing or damaged.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Built)
    except (OSError, *BROKEN_JSON) as error:
        raise LayersenseError(
            f"{path}: does not say what came of building an extension ({error}); run `{RETRY}`"
        ) from error


def read_all(paths: Sequence[str | Path]) -> dict[str, Built]:
    """Return extension → what came of building it, from several files."""
    return {record.extension: record for record in map(read_built, paths)}


def known_builds(cache: Path) -> list[Built]:
    """Return every record of a cache, by key and extension; damaged ones are left out."""
    found = []
    for file in sorted(cache.glob("*/*.json")):
        if file.stem in EXTENSIONS:
            try:
                found.append(read_built(file))
            except LayersenseError:
                continue
    return found
