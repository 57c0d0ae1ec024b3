"""Slices of the config: for each rule exactly what changes its output, as one JSON value.

Snakemake re-runs a job when its ``params:`` differ from those it ran with, and compares them as a
nameless set. Each rule therefore gets one string, the canonical JSON of a slice made here. A slice
holds no label and no resource, and defaults are resolved to what they mean, so that writing a
default out, renaming nothing but a label, or giving a job more memory re-runs nothing.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from layersense.config import ROW_MODALITIES, SCORE_SAMPLES, TASK_MODALITIES, Config, Engine, Run
from layersense.errors import LayersenseError
from layersense.files import BROKEN_JSON, canonical_json, digest_file, digest_json, write_json
from layersense.models.outside import find_module
from layersense.quantization.extensions import needed_extensions
from layersense.quantization.formats import format_from_settings, format_settings, resolve_format
from layersense.verification.store import METRICS_VERSION, PLAN_VERSION, VERIFICATION_VERSION

ENGINE_VERSIONS: dict[Engine, int] = {"fused": 2, "modelopt": 1}
"""Raised when an engine's numbers change, which measures everything again that it measured.

Code is no trigger: a comment edited in a scoring module must not cost a GPU hour.
"""

SOLVER_VERSION = 7
"""Raised when the solver's choice or the findings change for the same scores."""


def dataset_settings(config: Config, dataset: str) -> dict[str, Any]:
    """Return what determines a calibration database: the entry, but for how its files come."""
    return config.datasets[dataset].model_dump(mode="json", exclude={"fetch"})


def fetch_settings(config: Config, dataset: str) -> dict[str, Any]:
    """Return what determines which files a dataset fetches."""
    entry = config.datasets[dataset]
    return entry.model_dump(mode="json", exclude={"fetch": {"connections"}})


def model_settings(config: Config, model: str) -> dict[str, Any]:
    """Return what determines a resolved checkpoint: the whole entry."""
    return config.models[model].model_dump(mode="json")


def score_settings(config: Config, run: str) -> dict[str, Any]:
    """Return what determines the scores of a run, whatever the formats.

    Without the formats, because each is measured for itself; without the schemes, because a budget
    changes no score; without the held-out rows, which are not scored. ``batch_size`` is in it,
    although scores do not depend on it: the batch scores and standard errors do. What a batch
    cannot use is left out: pixels without images; the prompt of a task that has none (a
    vision-language model is prompted on captions alone, too). How many images or pairs a
    dataset holds is known once it is built: None is all of them, and ``score_samples`` a limit.
    """
    entry = config.runs[run]
    task = config.models[entry.model].task
    modality = entry.modality or TASK_MODALITIES[task][0]
    calibration, scored = _samples(config, entry, modality)
    sampling: dict[str, Any] = {
        "calibration_samples": calibration,
        "score_samples": scored,
        "batch_size": entry.batch_size,
        "calibration_batch_size": entry.calibration_batch_size,
        "max_length": entry.max_length,
        "seed": entry.seed,
    }
    outside = task not in TASK_MODALITIES
    if modality == "image_text" or outside:
        sampling["min_pixels"] = entry.min_pixels
        sampling["max_pixels"] = entry.max_pixels
    if task == "image-text-to-text" or outside:
        sampling["prompt"] = entry.prompt
    dataset = dataset_settings(config, entry.dataset)
    del dataset["heldout"]
    return {
        **({"task_digest": outside_digest(task)} if outside else {}),
        "model": model_settings(config, entry.model),
        "dataset": dataset,
        "modality": modality,
        "method": entry.method,
        "engine": entry.measured_by,
        "engine_version": ENGINE_VERSIONS[entry.measured_by],
        "dtype": entry.dtype,
        "device": entry.device,
        "sampling": sampling,
    }


def run_formats(config: Config, run: str) -> dict[str, dict[str, Any]]:
    """Return name → settings of the formats that the schemes of a run want, each once.

    An alias goes by the name of its format, which is the label in every output.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for scheme in config.runs[run].schemes:
        wanted.update(_scheme_formats(config, scheme))
    return wanted


def scheme_settings(config: Config, run: str, scheme: str) -> dict[str, Any]:
    """Return what determines the manifest of one scheme, beside the scores themselves.

    ``expected`` is what the scores should have been measured with. It changes only when the run is
    measured again anyway, except under ``frozen``, where it is what findings compare with.
    """
    formats = _scheme_formats(config, scheme)
    entry = config.schemes[scheme]

    def resolved(names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(resolve_format(name, config.formats).name for name in names))

    return {
        **entry.model_dump(mode="json"),
        "quant_formats": resolved(entry.quant_formats),
        "search_spaces": [
            {**space.model_dump(mode="json"), "quant_formats": resolved(space.quant_formats)}
            for space in entry.search_spaces
        ],
        "method": config.runs[run].method,
        "solver_version": SOLVER_VERSION,
        "expected": {"settings": score_settings(config, run), "formats": formats},
    }


def import_settings(config: Config, manifest: str) -> dict[str, Any]:
    """Return what determines an imported manifest, beside the file itself."""
    settings = config.manifests[manifest].model_dump(mode="json")
    del settings["file"]
    return settings


def verify_options(config: Config, run: str) -> dict[str, Any]:
    """Return how much of a run is verified: empty if nothing is."""
    verify = config.runs[run].verify
    return verify.model_dump(mode="json") if verify else {}


def verify_settings(config: Config, run: str) -> dict[str, Any]:
    """Return what determines a run's verification, beside its schemes' manifests.

    ``measured`` is what a measured number depends on; how much is verified decides only what is
    missing. Method and engine are not in it, because verification does not go by scores.
    """
    entry = config.runs[run]
    settings = score_settings(config, run)
    sampling = {**settings["sampling"]}
    del sampling["score_samples"]
    # Masks were once split into units of equally many pixels: all else is held as it was.
    units = {"units": "photographs"} if settings["modality"] == "image_masks" else {}
    return {
        "verify": verify_options(config, run),
        "plan": PLAN_VERSION,
        "metrics": METRICS_VERSION,
        "measured": {
            **{key: settings[key] for key in ("model", "dataset", "modality", "dtype", "device")},
            "sampling": sampling,
            "heldout_samples": entry.heldout_samples,
            "version": VERIFICATION_VERSION,
            **units,
        },
    }


def report_settings(config: Config) -> dict[str, Any]:
    """Return what determines how reports look."""
    return config.report.model_dump(mode="json")


class _Measured(msgspec.Struct):
    """One format's line in ``measured.json``."""

    settings: str
    """SHA-256 of the score settings."""
    format: dict[str, Any]
    """The format's settings."""


def measured_entry(settings: Mapping[str, Any], format: Mapping[str, Any]) -> dict[str, Any]:
    """Return a format's entry of ``measured.json``.

    Args:
        settings: the run's :func:`score_settings` when it was measured.
        format: the format's settings when it was measured.
    """
    return {"settings": digest_json(settings), "format": dict(format)}


def write_measured(
    path: str | Path, settings: Mapping[str, Any], formats: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write ``measured.json``: which formats the score file beside it holds, and with what.

    Args:
        path: the file.
        settings: the run's :func:`score_settings`.
        formats: name → settings of the formats that the score file holds.
    """
    write_json(path, {name: measured_entry(settings, format) for name, format in formats.items()})


def read_measured(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read ``measured.json``; a file that is missing or broken holds nothing.

    It is read while Snakemake parses, where an error would stop every other run too; the worst
    that an empty answer costs is a scoring job that finds all its digests present.
    """
    try:
        entries = msgspec.json.decode(Path(path).read_bytes(), type=dict[str, _Measured])
    except (OSError, *BROKEN_JSON):
        return {}
    return {name: msgspec.to_builtins(entry) for name, entry in entries.items()}


def tracked_formats(
    config: Config, run: str, measured: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the formats of a run's score file: those wanted, and those held that still match.

    This is a parameter of the scoring rule. Were it the wanted formats alone, removing a format
    from a scheme would change it and start a GPU job that has nothing to measure. A held format
    that is not wanted stays as long as its numbers are what the config would measure: the score
    settings are the same, and its name means the same, or nothing any more (an own format that was
    removed). One that was measured under another seed drops out, and is measured again when wanted.

    Args:
        config: the config.
        run: name of the run.
        measured: content of ``measured.json``, from :func:`read_measured`.
    """
    tracked = run_formats(config, run)
    current = digest_json(score_settings(config, run))
    for name, entry in measured.items():
        if name in tracked or entry["settings"] != current:
            continue
        try:
            meaning = format_settings(resolve_format(name, config.formats))
        except LayersenseError:
            meaning = None
        if meaning is None or canonical_json(meaning) == canonical_json(entry["format"]):
            tracked[name] = dict(entry["format"])
    return tracked


def run_extensions(
    config: Config, run: str, measured: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the CUDA extensions that the :func:`tracked_formats` of a run need on a GPU."""
    tracked = tracked_formats(config, run, measured)
    formats = [format_from_settings(name, format) for name, format in tracked.items()]
    return needed_extensions(formats, score_settings(config, run)["modality"])


def outside_digest(task: str) -> str:
    """Return the SHA-256 of the file that defines a task of the user's own.

    The user edits that file and raises no version of ours, so an edit measures again. It is empty
    where the file is not there, as may be under ``frozen``.
    """
    file = find_module(task)
    return "" if file is None else digest_file(file)


def _samples(config: Config, run: Run, modality: str) -> tuple[int | None, int]:
    """Return how many rows calibrate (None: all there are), and how many of them are scored."""
    if modality not in ROW_MODALITIES:
        return run.calibration_samples, run.score_samples or SCORE_SAMPLES
    calibration = run.calibration_samples or config.datasets[run.dataset].calibration
    return calibration, run.score_samples or min(SCORE_SAMPLES, calibration)


def _scheme_formats(config: Config, scheme: str) -> dict[str, dict[str, Any]]:
    resolved = [resolve_format(name, config.formats) for name in config.schemes[scheme].all_formats]
    return {format.name: format_settings(format) for format in resolved}
