"""The scoring job of a run: measure what is missing, keep what is there (torch only if needed)."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from layersense.calibration.database import open_database
from layersense.errors import LayersenseError
from layersense.files import digest_json, exclusive
from layersense.models.checkpoints import Checkpoint, read_checkpoint
from layersense.quantization.extensions import (
    RETRY,
    Built,
    cache_folder,
    is_complete,
    needed_extensions,
    sentence,
    why_left_out,
)
from layersense.quantization.formats import Format, check_device, format_from_settings
from layersense.scoring.in_progress import Completed, InProgress
from layersense.scoring.lease import lease, visible_devices
from layersense.scoring.scores import (
    Dataset,
    FormatScores,
    Model,
    Scores,
    read_scores,
    write_scores,
)

if TYPE_CHECKING:
    from layersense.scoring.measurement import Measurement

logger = logging.getLogger(__name__)


def score_run(
    run: str,
    settings: Mapping[str, Any],
    formats: Mapping[str, Mapping[str, Any]],
    *,
    model_file: Path,
    database_file: Path,
    out: Path,
    threads: int | None = None,
    gpus: int = 1,
    built: Mapping[str, Built] = MappingProxyType({}),
    cache: str | None = None,
) -> Scores:
    """Bring a run's score file up to date; return what it holds.

    A format's entry is reused only where its digest, over everything that determines it, matches.
    If all match, the job ends before it imports torch or leases a GPU. What an interrupted job had
    completed lies beside the file and is taken up.

    Args:
        run: name of the run.
        settings: the run's part of the config, from ``settings.score_settings``.
        formats: name → settings of each format to have in the file.
        model_file: record of the checkpoint.
        database_file: calibration database.
        out: score file.
        threads: CPU threads of torch; None leaves its default.
        gpus: how many GPUs the model is spread over.
        built: CUDA extension → what came of building it, as its own job found. A format that was
            simulated is measured again once its extension is there.
        cache: folder of the extensions, as configured.

    Raises:
        LayersenseError: an input is unusable, the model cannot be scored, or none of the formats
            can be measured here.
    """
    partial = out.with_name(f".{out.name}.partial")
    with only_job(out.with_name(f".{out.name}.lock")):
        checkpoint = read_checkpoint(model_file)
        with open_database(database_file) as database:
            dataset_digest = database.meta["digest"]
        digests = {
            name: digest_json(
                {
                    "settings": settings,
                    "format": format,
                    "checkpoint": checkpoint.digest,
                    "dataset": dataset_digest,
                }
            )
            for name, format in formats.items()
        }
        held = _held(out, partial, digests)
        if held is not None:
            _forget_simulated(held, formats, settings["modality"], built)
        in_progress = InProgress(
            out.with_name(f".{out.name}.in-progress"), digest_json(digests), Completed
        )
        missing = [name for name in formats if held is None or name not in held.formats]
        if missing:
            logger.info("to measure: %s", ", ".join(missing))
            for scores in _measure(
                run,
                settings,
                formats,
                digests,
                missing,
                held,
                checkpoint,
                model_file.parent.name,
                database_file,
                threads,
                gpus,
                in_progress,
                cache_folder(cache),
            ):
                write_scores(partial, scores)
                held = scores
        else:
            logger.info("all %d format(s) are measured already", len(formats))
        assert held is not None
        # Labels are no part of a digest: entries may have been measured under other names.
        held.run, held.model.name, held.dataset.name = (
            run,
            model_file.parent.name,
            database_file.stem,
        )
        held.left_out = {
            name: reason
            for name, reason in held.left_out.items()
            if name in formats and name not in held.formats
        }
        write_scores(out, held)
        partial.unlink(missing_ok=True)
        in_progress.path.unlink(missing_ok=True)
    return held


def _measure(
    run: str,
    settings: Mapping[str, Any],
    formats: Mapping[str, Mapping[str, Any]],
    digests: Mapping[str, str],
    missing: Sequence[str],
    held: Scores | None,
    checkpoint: Checkpoint,
    model_name: str,
    database_file: Path,
    threads: int | None,
    gpus: int,
    in_progress: InProgress[Completed],
    cache: Path,
) -> Iterator[Scores]:
    """Yield the score file's content after each step that completed some formats."""
    wanted = [format_from_settings(name, formats[name]) for name in missing]
    device = settings["device"]
    for format in wanted:
        check_device(format, device)
    with leased(device, gpus):
        start = time.monotonic()
        import torch

        from layersense.quantization.modelopt_formats import require_kernel, validate_format
        from layersense.scoring.engines import get_engine

        seconds = round(time.monotonic() - start, 3)
        logger.info(
            "torch, transformers and ModelOpt imported in %.0f s",
            seconds,
            extra={"phase": "import", "phase_seconds": seconds},
        )
        if threads:
            torch.set_num_threads(threads)
        built = extensions_here(wanted, settings, cache)
        left_out = {
            format.name: reason
            for format in wanted
            if (reason := why_left_out(format, built, settings["modality"]))
        }
        wanted = _without(wanted, left_out, held)
        for format in wanted:
            validate_format(format)
            require_kernel(format, device)
        measurement, dataset = prepare_measurement(
            settings, checkpoint, database_file, gpus=gpus, in_progress=in_progress
        )
        model = Model(
            name=model_name,
            id=checkpoint.id,
            revision=checkpoint.revision,
            digest=checkpoint.digest,
            task=checkpoint.task,
            architecture=checkpoint.architecture,
            n_parameters=checkpoint.n_parameters,
            dtype=checkpoint.dtype if settings["dtype"] == "auto" else settings["dtype"],
            trust_remote_code=checkpoint.trust_remote_code,
            trained_on_calibration=checkpoint.trained_on_calibration,
        )
        if not wanted:
            assert held is not None
            held.left_out = left_out
            yield held
            return
        measure = get_engine(settings["engine"])
        for inventory, entries in measure(measurement, wanted):
            if idle := inventory.idle_weights:
                model.n_active_parameters = model.n_parameters - idle
            for name, entry in entries.items():
                entry.digest = digests[name]
                entry.settings = {**settings, "format": formats[name]}
                if entry.kernel == "simulated":
                    entry.warnings += [why for why in map(sentence, built.values()) if why]
            _log_phases(entries)
            measured = {**(held.formats if held else {}), **entries}
            held = Scores(
                run=run,
                method=settings["method"],
                engine=settings["engine"],
                model=model,
                dataset=dataset,
                layers=inventory.layers,
                groups=inventory.groups,
                # In the order of the config, whatever was measured first.
                formats={name: measured[name] for name in formats if name in measured},
                left_out=left_out,
            )
            yield held


def prepare_measurement(
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    database_file: Path,
    *,
    gpus: int = 1,
    in_progress: InProgress[Completed] | None = None,
) -> tuple["Measurement", Dataset]:
    """Return what a run measures, and on what.

    Args:
        settings: the run's part of the config, from ``settings.score_settings``.
        checkpoint: the model.
        database_file: calibration database.
        gpus: GPUs that the model is spread over.
        in_progress: where completed batches of a long measurement are kept.

    Raises:
        LayersenseError: the dataset has no rows that the task needs.
    """
    import torch

    from layersense.models.tasks import get_task
    from layersense.scoring.measurement import Measurement, sampling_of

    task = get_task(checkpoint.task)
    unit = task.unit(settings["modality"])
    sampling = settings["sampling"]
    with open_database(database_file) as database:
        rows = database.rows(unit, "calibration", limit=sampling["calibration_samples"])
        if not rows:
            lack = "pairs (several texts of one photograph)" if unit == "pair" else f"{unit}s"
            raise LayersenseError(
                f"{database_file}: holds no {lack} to calibrate on, which task "
                f"{checkpoint.task} needs; take a dataset that has them"
            )
        database.check_images(rows)
        score_rows = rows[: sampling["score_samples"]]
        dataset = Dataset(
            name=database_file.stem,
            source=database.meta["source"],
            digest=database.meta["digest"],
            modality=settings["modality"],
            unit=unit,
            calibration_samples=len(rows),
            score_samples=len(score_rows),
        )
    return Measurement(
        checkpoint=checkpoint,
        task=task,
        sampling=sampling_of(settings),
        method=settings["method"],
        calibration_rows=rows,
        score_rows=score_rows,
        calibration_batch_size=sampling["calibration_batch_size"],
        score_batch_size=sampling["batch_size"],
        dtype=settings["dtype"],
        device=torch.device(settings["device"]),
        seed=sampling["seed"],
        in_progress=in_progress,
        gpus=gpus,
    ), dataset


def extensions_here(
    wanted: Sequence[Format], settings: Mapping[str, Any], cache: Path
) -> dict[str, Built]:
    """Return the CUDA extensions that ``wanted`` need, loaded into ModelOpt; none on a CPU."""
    if settings["device"] == "cpu":
        return {}
    from layersense.quantization.build import use

    return use(needed_extensions(wanted, settings["modality"]), cache)


def _without(
    wanted: Sequence[Format], left_out: Mapping[str, str], held: Scores | None
) -> list[Format]:
    """Return the formats that can be measured.

    Raises:
        LayersenseError: there is none, and none is held.
    """
    for name, reason in left_out.items():
        logger.warning("format %s is left out: %s", name, reason)
    measurable = [format for format in wanted if format.name not in left_out]
    if not measurable and not (held and held.formats):
        name, reason = next(iter(left_out.items()))
        raise LayersenseError(
            f"format `{name}`: {reason}, and no other format is left to measure; mend that, run "
            f"`{RETRY}`, or take an FP8 format, which torch can simulate"
        )
    return measurable


def _forget_simulated(
    held: Scores,
    formats: Mapping[str, Mapping[str, Any]],
    modality: str,
    built: Mapping[str, Built],
) -> None:
    """Forget entries that were simulated and whose extension can be had now."""
    for name, entry in list(held.formats.items()):
        if entry.kernel == "simulated" and is_complete(
            format_from_settings(name, formats[name]), built, modality
        ):
            logger.info("%s was simulated and its CUDA extension is there now", name)
            del held.formats[name]


def _log_phases(entries: Mapping[str, FormatScores]) -> None:
    """Put what a pass took into the structured log, a line for each phase."""
    passes: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for name, entry in entries.items():
        passes.setdefault(tuple(entry.seconds.items()), []).append(name)
    for phases, names in passes.items():
        together = ", ".join(names) if len(names) < 4 else f"{len(names)} formats"
        for phase, seconds in phases:
            logger.info(
                "%s: %s took %.1f s",
                together,
                phase,
                seconds,
                extra={
                    "phase": phase,
                    "formats": names,
                    "phase_seconds": seconds,
                    "phase_memory_mb": entries[names[0]].peak_memory_bytes // 10**6,
                },
            )


def _held(out: Path, partial: Path, digests: Mapping[str, str]) -> Scores | None:
    """Return the entries of both files whose digests match, or None if there are none."""
    found: Scores | None = None
    formats: dict[str, FormatScores] = {}
    for file in (out, partial):
        if not file.exists():
            continue
        try:
            scores = read_scores(file)
        except LayersenseError as error:
            logger.warning("%s; it is measured again", error)
            continue
        matching = {
            name: entry
            for name, entry in scores.formats.items()
            if entry.digest == digests.get(name)
        }
        if matching:
            found = scores
            formats.update(matching)
    if found is None:
        return None
    found.formats = {name: formats[name] for name in digests if name in formats}
    return found


@contextmanager
def only_job(lock_file: Path) -> Iterator[None]:
    """Let one job at a time work on a run.

    After SIGKILL of Snakemake its job's process lives on as an orphan; the successor waits for it
    and then finds its results.
    """
    with exclusive(
        lock_file,
        "another job works on this run; waiting for it",
        # Two jobs at once would cost time, not results: both write the same, in one step.
        "nothing keeps a second job from measuring the same; after a kill, see that no job of this "
        "run is left before starting again",
    ):
        yield


@contextmanager
def leased(device: str, gpus: int = 1) -> Iterator[None]:
    """Hold GPUs and show them alone to this process; nothing to do on a CPU."""
    if device == "cpu":
        yield
        return
    # The driver's order, so that an index means the same to NVML and to CUDA.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    with lease(visible_devices(), count=gpus) as identifiers:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(identifiers)
        logger.info("leased GPU %s", " and ".join(identifiers))
        yield
