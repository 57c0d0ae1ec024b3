"""Write a config for a checkpoint and data of the user's own (no torch)."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from layersense.calibration.records import Records
from layersense.config import DatasetSection, Run
from layersense.config_docs import REPOSITORY, SCHEMA
from layersense.errors import LayersenseError
from layersense.files import atomic_write
from layersense.models.checkpoints import guess_task, is_path, is_pickle, read_config
from layersense.validation import load_config_file

DEFAULT_OUT = Path("config/my-model.yaml")
SAMPLE_ROWS = (96, 16)
"""Calibration and held-out rows that the embedded sample of 135 captions affords."""
_TABLES = (".csv", ".jsonl", ".ndjson")
_COCO_KINDS = ("captions", "instances")
"""How the names of COCO's files begin, before `_` and the split."""


@dataclass
class _Data:
    """A dataset that was recognised."""

    name: str
    keys: dict[str, Any]
    """Its entry in the config."""
    comment: str

    @property
    def has_images(self) -> bool:
        """Whether its rows have images."""
        return bool(self.keys["source"] != "text")


def write_config(
    checkpoint: str,
    data: Path | None = None,
    out: Path | None = None,
    *,
    device: Literal["cuda", "cpu"] | None = None,
) -> str:
    """Write a commented, valid config of about a dozen lines; return what to do next.

    The task follows from the checkpoint's ``config.json``, the kind of dataset from what lies in
    the folder: COCO's layout, one file of COCO's form and images, one table beside images, or a
    JSONL file of texts.

    Args:
        checkpoint: hub id or directory.
        data: folder, or file, with the calibration data; None takes the embedded sample.
        out: file to write; None is ``config/my-model.yaml``. It must not exist.
        device: where to score; None is ``cuda`` if this machine has an NVIDIA GPU, else ``cpu``.

    Raises:
        LayersenseError: the checkpoint or the data cannot be used, or ``out`` is there already.
    """
    out = out or DEFAULT_OUT
    if out.exists():
        raise LayersenseError(
            f"{out}: is there already and is not overwritten; name another file with --out"
        )
    config, directory = _checkpoint_config(checkpoint)
    task = guess_task(config)
    found = _sample() if data is None else _recognise(data)
    device_comment = "" if device else "  # no GPU is seen here; `cuda` where there is one"
    device = device or _device()
    model = _name(Path(checkpoint).expanduser().resolve().name if directory else checkpoint)
    run: dict[str, Any] = {"model": model, "dataset": found.name, "schemes": ["fp8"]}
    if task == "image-text-to-text" and not found.has_images:
        run["modality"] = "text"
    if (positions := _few_positions(config, task)) is not None:
        run["max_length"] = positions
    entry: dict[str, Any] = {"checkpoint": checkpoint, "task": task}
    if directory and not checkpoint.startswith((".", "/", "~")):
        entry["checkpoint"] = f"./{checkpoint}"
    lines = [
        *_schema_line(out),
        f"# Every key: config/README.md. Check with `{_snakemake()} -n --configfile {out}`, then "
        "run it.",
        "datasets:",
        f"  {_entry(found.name, found.keys)}  # {found.comment}",
        "models:",
        f"  {_entry(model, entry)}  # a {config['architectures'][0]}",
        "schemes:",
        f"  {_entry('fp8', {'quant_formats': ['FP8_ALL_LAYERS_CFG'], 'effective_bits': 11.0})}",
        "runs:",
        f"  {_entry(f'{model}.{found.name}', run)[:-1]},",
        f"    device: {device}}}" + (device_comment if device == "cpu" else ""),
    ]
    text = "\n".join(lines) + "\n"
    atomic_write(out, text)
    try:
        load_config_file(out)
    except LayersenseError:
        out.unlink()
        raise
    gpu = " --resources gpu=1" if device == "cuda" else ""
    return (
        f"{out} is written: {config['architectures'][0]} ({task}) on {found.comment}. Next:\n"
        f"  {_snakemake()} -n --configfile {out}\n"
        f"  {_snakemake()} --cores 8{gpu} --configfile {out}"
    )


# --- the checkpoint ------------------------------------------------------------------------------


def _checkpoint_config(checkpoint: str) -> tuple[dict[str, Any], bool]:
    """Return a checkpoint's ``config.json``, and whether the checkpoint is a directory."""
    if is_pickle(checkpoint):
        raise LayersenseError(
            f"{checkpoint}: is a pickle, which can run code when it is loaded, so its config is "
            "yours to write: copy config/examples/yolo-coco.yaml"
        )
    if is_path(checkpoint):
        folder, directory = Path(checkpoint).expanduser(), True
    else:
        folder, directory = _fetch_config(checkpoint), False
    config = read_config(folder)
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise LayersenseError(
            f"{folder / 'config.json'}: names no `architectures`, so its task is unknown; copy it "
            "again from the original checkpoint"
        )
    return config, directory


def _few_positions(config: dict[str, Any], task: str) -> int | None:
    """Return the positions of a model that has fewer than a run's default `max_length`."""
    if task not in ("causal-lm", "seq2seq-lm"):
        return None
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    default = Run.model_fields["max_length"].default
    return positions if isinstance(positions, int) and positions < default else None


def _fetch_config(hub_id: str) -> Path:
    import httpx
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json")).parent
    except errors.HFValidationError as error:
        raise LayersenseError(
            f"{hub_id}: is neither a directory nor a hub id; write a directory as ./…, /… or ~/…, "
            "a hub id as owner/name"
        ) from error
    except errors.GatedRepoError as error:
        raise LayersenseError(
            f"{hub_id}: is gated; accept its conditions on https://huggingface.co/{hub_id} and log "
            "in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LayersenseError(
            f"{hub_id}: is not on the hub, or private, and there is no such directory; correct it"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise LayersenseError(
            f"{hub_id}: holds no config.json, so it is no checkpoint in Hugging Face form; name "
            "another"
        ) from error
    except (errors.LocalEntryNotFoundError, httpx.TransportError, errors.HfHubHTTPError) as error:
        raise LayersenseError(
            f"{hub_id}: the hub cannot be reached and its config.json is not in the local cache; "
            "connect to the network, or give a directory as ./…"
        ) from error


# --- the data ------------------------------------------------------------------------------------


def _sample() -> _Data:
    calibration, heldout = SAMPLE_ROWS
    keys = {"source": "sample", "calibration": calibration, "heldout": heldout}
    return _Data("sample", keys, "the embedded sample; your own data by --data")


def _recognise(data: Path) -> _Data:
    """Return what kind of dataset a folder or file is."""
    data = data.expanduser()
    if data.is_file():
        return _coco_file(data) if data.suffix.lower() == ".json" else _table(data, data.parent)
    if not data.is_dir():
        raise LayersenseError(f"{data}: is not there; give a folder or a file with --data")
    if (found := _coco_layout(data)) is not None:
        return found
    tables = sorted(path for path in data.iterdir() if path.suffix.lower() in _TABLES)
    listings = _coco_listings(data)
    if len(tables) + len(listings) == 1:
        return _table(tables[0], data) if tables else _coco_file(listings[0], data)
    expected = (
        "expected COCO's `annotations/` with captions_*.json or instances_*.json, or one JSON file "
        "like those, or one CSV or JSONL table with `image` and `text`, or one JSONL file with "
        "`text`"
    )
    names = ", ".join(str(path.relative_to(data)) for path in [*tables, *listings])
    raise LayersenseError(
        f"{data}: {expected}, found {names or 'none of these'}; name the one file with --data"
    )


class _Listing(msgspec.Struct):
    """What tells a COCO file from other JSON, and captions from instances."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


def _read_listing(file: Path) -> _Listing:
    from layersense.calibration.records import decode, read_bytes

    return decode(read_bytes(file, "COCO file"), _Listing, str(file), "a COCO file")


def _coco_layout(root: Path) -> _Data | None:
    """Return the first split of COCO's own layout, None if there is none."""
    for file in sorted((root / "annotations").glob("*.json")):
        kind, _, split = file.stem.partition("_")
        if kind in _COCO_KINDS and split and (root / split).is_dir():
            return _coco({"source": "coco", "root": str(root), "split": split}, file)
    return None


def _coco_listings(root: Path) -> list[Path]:
    """Return the COCO files in a folder, or else in the folders there, one for each split."""
    found: dict[tuple[Path, str], Path] = {}
    for pattern in ("*.json", "*/*.json"):
        for file in sorted(root.glob(pattern)):
            try:
                _read_listing(file)
            except LayersenseError:
                continue  # some other JSON
            kind, _, split = file.stem.partition("_")
            found.setdefault((file.parent, split if kind in _COCO_KINDS else file.stem), file)
        if found:
            break
    return list(found.values())


def _coco_file(file: Path, root: Path | None = None) -> _Data:
    """Return the dataset of a COCO file of any name, with its images wherever they are near it."""
    try:
        listing = _read_listing(file)
    except LayersenseError as error:
        raise LayersenseError(
            f"{error}, or, if it was never meant as one: texts go into a .jsonl file, an object "
            "with `text` in each line"
        ) from error
    if not listing.images or not listing.annotations:
        raise LayersenseError(f"{file}: lists no images or no annotations; name another file")
    if root is None:
        root = file.parent.parent if file.parent.name == "annotations" else file.parent
    kind, _, split = file.stem.partition("_")
    keys = {"source": "coco", "root": str(root)}
    if kind in _COCO_KINDS and split and file.parent == root / "annotations":
        keys["split"] = split
    else:
        # A split of its own: COCO's captions that lie beside it are not taken for its siblings.
        keys["split"] = _name(file.stem)
        keys["captions" if "caption" in listing.annotations[0] else "instances"] = str(file)
    name = str(listing.images[0].get("file_name"))
    folders = [file.parent, root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
    images = next((folder for folder in folders if (folder / name).is_file()), None)
    if images is None:
        raise LayersenseError(
            f"{file}: lists the image {name!r}, which lies neither in {root} nor in a folder "
            "there; write the config by hand and say where the images are by the key `images` "
            "(config/README.md)"
        )
    return _coco({**keys, "images": str(images)}, file)


def _coco(keys: dict[str, Any], file: Path) -> _Data:
    """Return a COCO dataset, which is read whole: its errors are better known now."""
    from layersense.calibration.build import read_records
    from layersense.config import CocoDataset

    records = read_records(CocoDataset.model_validate(keys))
    rows = _rows(records, file)
    return _Data(_name(Path(keys["root"]).resolve().name), {**keys, **rows}, f"COCO, {file.name}")


def _table(table: Path, folder: Path) -> _Data:
    """Return the dataset of a table, which is read whole: its errors are better known now."""
    from layersense.calibration.tables import read_table, read_texts

    if table.suffix.lower() not in _TABLES:
        raise LayersenseError(f"{table}: expected a .csv or .jsonl file, or COCO's .json")
    if table.suffix.lower() != ".csv" and "image" not in _first_row(table):
        records = read_texts(table)
        keys: dict[str, Any] = {"source": "text", "file": str(table), **_rows(records, table)}
        return _Data(_name(table.stem), keys, f"{len(records.captions)} texts")
    records = read_table(table, folder)
    keys = {
        "source": "images",
        "images": str(folder),
        "table": str(table),
        **_rows(records, table),
    }
    return _Data(_name(folder.resolve().name), keys, f"{len(records.images)} photographs")


def _first_row(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise LayersenseError(
            f"{path}: line 1 is no JSON object; expected one with `text`, or `image` and `text`"
        )
    return row


def _rows(records: Records, file: Path) -> dict[str, int]:
    """Return the sizes of the splits that all photographs, or texts, fill.

    Each has a row at least, so that both splits hold what is asked. Defaults are left out.
    """
    from layersense.calibration.sampling import photographs

    rows = photographs(records, seed=0)
    if (units := sum(rows.values())) < 10:
        raise LayersenseError(
            f"{file}: holds {units} photographs or texts, which is too few to measure on; give at "
            "least 10, better some hundreds"
        )
    fields = DatasetSection.model_fields
    return {split: count for split, count in rows.items() if count < fields[split].default}


# --- words ---------------------------------------------------------------------------------------


def _device() -> Literal["cuda", "cpu"]:
    """Return ``cuda`` if the NVIDIA driver shows a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return "cuda" if pynvml.nvmlDeviceGetCount() else "cpu"
    except pynvml.NVMLError:
        return "cpu"


def _snakemake() -> str:
    """Return how to call Snakemake here, which finds a Snakefile in the working folder alone."""
    ours = REPOSITORY / "Snakefile"
    if Path("Snakefile").exists() or Path("workflow/Snakefile").exists() or not ours.is_file():
        return "snakemake"
    return f"snakemake --snakefile {shlex.quote(os.path.relpath(ours))}"


def _name(text: str) -> str:
    """Return the last part of a hub id or path as a name of the config, in lower case."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.rsplit("/", 1)[-1].lower()).strip("-._")
    return name[:60] or "mine"


def _schema_line(out: Path) -> Iterator[str]:
    """Yield the line by which editors find the schema, if it is there."""
    if SCHEMA.is_file():
        relative = os.path.relpath(SCHEMA, out.parent.resolve())
        yield f"# yaml-language-server: $schema={relative}"


def _flow(value: Any) -> str:
    """Return a mapping as YAML in one line, quoted where YAML needs it."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return str(text).strip()


def _entry(name: str, value: dict[str, Any]) -> str:
    """Return an entry of a section as YAML in one line."""
    return _flow({name: value})[1:-1]
