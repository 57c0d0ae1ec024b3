"""The export job of one scheme: write its checkpoint, check it, put it in place (no torch)."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from layersense.calibration.database import Row, open_database
from layersense.calibration.sampling import Unit
from layersense.errors import LayersenseError
from layersense.export.allow import ONNX_TASKS, make_plan
from layersense.export.card import CARD, model_card
from layersense.export.store import (
    EXPORT_VERSION,
    FOLDER,
    ONNX_FILE,
    Checked,
    Expected,
    Exported,
    OnnxMetric,
    read_exported,
    write_exported,
)
from layersense.files import atomic_write, digest_json
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import Manifest, plain_name
from layersense.manifests.tables import BYTES_PER_COST
from layersense.models.checkpoints import Checkpoint, read_checkpoint
from layersense.quantization.extensions import cache_folder
from layersense.quantization.formats import NONE, check_device, format_from_settings
from layersense.quantization.kv_cache import KV_CACHES
from layersense.recipes.menu import Recipe, recipe_digest
from layersense.recipes.quant_config import bits_of, quant_config, read_settings
from layersense.scoring.job import extensions_here, leased, only_job
from layersense.verification.plan import CACHE
from layersense.verification.table import MeasuredRecipes, read_measured_recipes

if TYPE_CHECKING:
    from layersense.models.tasks.protocol import ImageTask

logger = logging.getLogger(__name__)

PART, OLD = ".checkpoint.part", ".checkpoint.old"
"""Folders of a checkpoint in the making, and of one about to be deleted."""
NAMED = 3
"""Groups left unquantized that the log names; the card names all."""
MOST_SURPLUS = 0.01
"""Share of the predicted bytes by which a checkpoint may be off without a warning."""
MOST_APART = 0.01
"""Share by which a metric of an ONNX file may be off the simulated model's, beyond the noise of the
images."""
MOST_HELDOUT = 64
"""Held-out images that an ONNX file is compared on."""


def export_scheme(
    manifest_file: Path,
    *,
    model_file: Path,
    database_file: Path,
    verification_file: Path | None,
    out: Path,
    threads: int | None = None,
    gpus: int = 1,
    cache: str | None = None,
) -> Exported:
    """Bring ``checkpoint.json`` and the folder beside it up to date.

    A checkpoint of the same recipe, model, data and settings is kept; its card alone is written
    again. Nothing is loaded before it is clear that the recipe can be exported.

    Args:
        manifest_file: the recipe.
        model_file: record of the checkpoint that it is for.
        database_file: calibration database.
        verification_file: ``verification.parquet`` of the run, for the card; None where it is not
            verified.
        out: ``checkpoint.json``.
        threads: CPU threads of torch; None leaves its default.
        gpus: how many GPUs the model is spread over.
        cache: folder of the CUDA extensions, as configured.

    Raises:
        LayersenseError: the recipe cannot be exported, an input is unusable, the disk is full, or
            what was written is not what the recipe says.
    """
    manifest = read_own_manifest(manifest_file)
    make_plan(manifest)
    verification = read_measured_recipes(verification_file) if verification_file else None
    checkpoint = read_checkpoint(model_file)
    with open_database(database_file) as database:
        _check_inputs(manifest, checkpoint, database.meta["digest"], model_file, database_file)
    folder = out.with_name(FOLDER)
    digest = _digest(manifest)
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_job(out.with_name(f".{out.name}.lock")):
        _take_back(folder)
        held = _held(out, folder, digest)
        if held is None:
            held = _export(
                manifest, checkpoint, database_file, digest, verification, out,
                threads, gpus, cache_folder(cache),
            )  # fmt: skip
        else:
            logger.info("the checkpoint of this recipe is there already")
            held.run, held.scheme = manifest.run_name, manifest.scheme.name
            card = model_card(manifest, held, verification)
            atomic_write(folder / CARD, card)
            held.files[CARD] = len(card.encode())
        write_exported(out, held)
    return held


def recheck(out: Path, *, load_in_vllm: bool = False) -> list[str]:
    """Check a checkpoint that lies in place, all but the values of packed weights.

    Args:
        out: its ``checkpoint.json``.
        load_in_vllm: also load it in vLLM and let it write a few tokens.

    Returns:
        What is wrong with it, one sentence each.

    Raises:
        LayersenseError: it cannot be read, or vLLM is not installed.
    """
    exported = read_exported(out)
    folder = out.with_name(FOLDER)
    if not folder.is_dir():
        raise LayersenseError(f"{folder}: is not there; delete {out} and run `snakemake export`")
    if exported.expected.onnx:
        from layersense.export.onnx_check import check_onnx

        found = check_onnx(folder / ONNX_FILE, exported.expected, None)
    else:
        from layersense.export.check import check_checkpoint

        found = check_checkpoint(folder, exported.expected, None)
    problems = [*found.problems, *(f"vLLM: {problem}" for problem in found.vllm)]
    sizes = {name: size for name, size in _sizes(folder).items() if name != CARD}
    if sizes != {name: size for name, size in exported.files.items() if name != CARD}:
        problems.append(f"{folder}: holds other files than were written")
    if load_in_vllm and exported.expected.onnx:
        raise LayersenseError(f"{folder}: holds an ONNX file, which vLLM does not read")
    if load_in_vllm:
        from layersense.export.vllm_load import load_and_generate

        problems += load_and_generate(folder)
    return problems


def _export(
    manifest: Manifest,
    checkpoint: Checkpoint,
    database_file: Path,
    digest: str,
    verification: MeasuredRecipes | None,
    out: Path,
    threads: int | None,
    gpus: int,
    cache: Path,
) -> Exported:
    settings = read_settings(manifest)
    recipe = manifest.recipe
    is_onnx = manifest.model.task in ONNX_TASKS
    state = manifest.autoquant_state
    # The weights of an ONNX file stay as they are.
    _check_space(out.parent, state.checkpoint_bytes_before if is_onnx else state.checkpoint_bytes)
    with leased(settings["device"], gpus), _fresh_folder(out.with_name(PART)) as folder:
        start = time.monotonic()
        import torch

        from layersense.export import check, write
        from layersense.models.devices import spread_over
        from layersense.quantization.modelopt_formats import require_kernel
        from layersense.scoring.environment import describe_environment, peak_memory_bytes
        from layersense.verification.replay import (
            apply_config,
            calibration_of,
            check_applied,
            load_calibration,
        )

        device = torch.device(settings["device"])
        seconds = {"import": time.monotonic() - start}
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(settings["sampling"]["seed"])
        start = time.monotonic()
        config = quant_config(manifest, recipe)
        used = {part.format: manifest.run[part.format].settings["format"] for part in config.parts}
        formats = [format_from_settings(part.format, used[part.format]) for part in config.parts]
        for format in formats:
            check_device(format, settings["device"])
        extensions_here(formats, settings, cache)
        for format in formats:
            require_kernel(format, settings["device"])
        with spread_over(gpus):
            loaded, calibration = load_calibration(config, checkpoint, database_file)
        if is_onnx:
            from layersense.export import onnx_write

            rows = heldout_rows(database_file, calibration.task.unit(settings["modality"]))
            batches = calibration_of(loaded, calibration.task, rows, settings).batches
            task = cast("ImageTask", calibration.task)
            heldout = onnx_write.Heldout(loaded, task, batches, device, calibration.dtype)
        seconds["load"] = time.monotonic() - start
        start = time.monotonic()
        plan = make_plan(manifest, write.weight_shapes(loaded.model, manifest))
        for reason in list(plan.kept.values())[:NAMED]:
            logger.warning("stays unquantized: %s", reason)
        if more := max(0, len(plan.kept) - NAMED):
            logger.warning("%d more groups stay unquantized: %s names them", more, CARD)
        if not plan.written:
            raise LayersenseError(
                f"{manifest.run_name}, {manifest.scheme.name}: nothing of the recipe can be "
                f"written ({'; '.join(list(plan.kept.values())[:1]) or 'it quantizes nothing'}); "
                "ship the original checkpoint, or lower the budget"
            )
        config = quant_config(manifest, plan.recipe)
        model = apply_config(loaded.model, config, calibration)
        check_applied(model, config)
        del calibration
        seconds["quantize"] = time.monotonic() - start
        start = time.monotonic()
        if is_onnx:
            expected = onnx_write.expect(manifest, plan, used, checkpoint.path, heldout.called)
            onnx_write.write_folder(model, heldout, folder, checkpoint)
            quant_algo = " and ".join(sorted({found.algo for found in plan.written.values()}))
            heldout.simulate(model)
            simulated = heldout.frames()
        else:
            fused = write.fuse(model, plan, manifest, used, config.kv_cache, checkpoint.path)
            expected = fused.expected
            write.write_checkpoint_folder(model, folder, checkpoint, expected)
            quant_algo = write.quant_algo(folder)
            simulated = ({name: tensor} for name, tensor in fused.tensors.items())
        seconds["write"] = time.monotonic() - start
        start = time.monotonic()
        checked = _check_in_a_fresh_process(folder, expected, simulated, check.send)
        metrics = heldout.judge(folder / ONNX_FILE) if is_onnx else []
        _refuse(folder, metric_problems(metrics))
        seconds["check"] = time.monotonic() - start
        exported = Exported(
            run=manifest.run_name,
            scheme=manifest.scheme.name,
            digest=digest,
            recipe_digest=_verified_as(plan.recipe, manifest.scheme.kv_cache),
            quant_algo=quant_algo,
            effective_bits=config.effective_bits,
            effective_bits_asked=bits_of(manifest, recipe),
            kept=plan.kept,
            predicted_bytes=_predicted_bytes(manifest, plan.recipe),
            files={},
            expected=expected,
            checked=checked,
            metrics=metrics,
            seconds={phase: round(value, 3) for phase, value in seconds.items()},
            peak_memory_bytes=peak_memory_bytes(device),
            environment=describe_environment(device),
        )
        _warn(exported)
        try:
            card = model_card(manifest, exported, verification)
            (folder / CARD).write_text(card, encoding="utf-8")
            exported.files = _sizes(folder)
            _sync(folder)
            _put_in_place(folder, out.with_name(FOLDER))
        except OSError as error:
            raise write.no_space(folder, error) from error
    return exported


def _check_in_a_fresh_process(
    folder: Path,
    expected: Expected,
    simulated: Iterable[Mapping[str, Any]],
    send: Callable[..., None],
) -> Checked:
    """Check what lies on the disk in a process that has loaded nothing else.

    Raises:
        LayersenseError: it is not what it should be; the first problem is named.
    """
    # The check works on the CPU, and its log is no job's of its own.
    environment = {name: value for name, value in os.environ.items() if name != "LAYERSENSE_LOG"}
    with subprocess.Popen(
        [sys.executable, "-m", "layersense", "check", str(folder), "--simulated"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # It may have found a broken file before it has read everything.
        with suppress(BrokenPipeError):
            send(process.stdin, expected, simulated)
        output = process.stdout.read()
    if process.returncode:
        raise LayersenseError(
            f"{folder}: the check of the checkpoint failed, see the lines above; nothing was put "
            "in place"
        )
    checked = msgspec.json.decode(output.splitlines()[-1], type=Checked)
    _refuse(folder, checked.problems)
    return checked


def metric_problems(metrics: Iterable[OnnxMetric]) -> list[str]:
    """Return which metrics of an ONNX file are not the simulated model's, one sentence each.

    Few images tell little: a metric is off where the whole 95 % interval of its difference, image
    by image, lies more than :data:`MOST_APART` above or below zero.
    """
    return [
        f"in onnxruntime its {one.name} is {one.onnx:.1%}, and that of the simulated model "
        f"{one.simulated:.1%} on the same held-out images"
        for one in metrics
        if one.apart_low is not None
        and one.apart_high is not None
        and (one.apart_low > MOST_APART or one.apart_high < -MOST_APART)
    ]


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    """Refuse a checkpoint that is not what it should be.

    Raises:
        LayersenseError: there is a problem; the first one is named.
    """
    if problems:
        raise LayersenseError(
            f"{folder}: what ModelOpt's exporter wrote is not the recipe: {problems[0]}"
            f"{f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''}; "
            "nothing was put in place; this is a defect of layersense or ModelOpt"
        )


def _warn(exported: Exported) -> None:
    """Say in the log what the reader should know before the checkpoint is shipped."""
    if not exported.expected.onnx and abs(exported.surplus) > MOST_SURPLUS:
        logger.warning(
            "the quantized layers take %.1f %% more bytes than predicted: the exporter writes "
            "scales in 32 bits, and one for each output of a small layer weighs",
            100 * exported.surplus,
        )
    for problem in exported.checked.vllm:
        logger.warning("vLLM would not read it as it is meant: %s", problem)


def _digest(manifest: Manifest) -> str:
    """Return the digest of all that determines a checkpoint."""
    recipe = {handle: name for handle, name in manifest.recipe.items() if name != NONE}
    return digest_json(
        {
            "version": EXPORT_VERSION,
            "recipe": {
                handle: manifest.run[name].settings["format"] for handle, name in recipe.items()
            },
            "model": manifest.model.digest,
            "dataset": manifest.dataset.digest,
            "settings": read_settings(manifest),
            "kv_cache": KV_CACHES.get(manifest.scheme.kv_cache),
        }
    )


def _verified_as(recipe: Recipe, kv_cache: str) -> str:
    """Return the digest under which verification knows a recipe."""
    return recipe_digest({**recipe, **({} if kv_cache == "none" else {CACHE: kv_cache})})


def _held(out: Path, folder: Path, digest: str) -> Exported | None:
    """Return the record of a checkpoint of this digest whose files are all there."""
    if not out.exists():
        return None
    try:
        held = read_exported(out)
    except LayersenseError as error:
        logger.warning("%s; it is written again", error)
        return None
    if held.digest != digest or not folder.is_dir():
        return None
    there = _sizes(folder)
    # The card is written again in any case.
    if any(there.get(name) != size for name, size in held.files.items() if name != CARD):
        logger.warning("%s: its files have changed; it is written again", folder)
        return None
    return held


def _check_inputs(
    manifest: Manifest,
    checkpoint: Checkpoint,
    data_digest: str,
    model_file: Path,
    database_file: Path,
) -> None:
    for file, there, wanted in (
        (model_file, checkpoint.digest, manifest.model.digest),
        (database_file, data_digest, manifest.dataset.digest),
    ):
        if there != wanted:
            raise LayersenseError(
                f"{file}: is not what {manifest.run_name}, {manifest.scheme.name} was measured on; "
                "run `snakemake` to bring both up to date"
            )


def heldout_rows(database_file: Path, unit: Unit) -> list[Row]:
    """Return the held-out rows that an ONNX file is compared on.

    Raises:
        LayersenseError: there are none.
    """
    with open_database(database_file) as database:
        rows = database.rows(unit, "heldout")[:MOST_HELDOUT]
    if not rows:
        raise LayersenseError(
            f"{database_file}: holds no held-out {unit} to compare an ONNX file on; set `heldout` "
            "of the dataset"
        )
    return rows


def _check_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LayersenseError(
            f"{folder}: the checkpoint takes {needed / 1e9:.2f} GB and the disk has "
            f"{free / 1e9:.2f} GB left; free disk space, or link results/ to a folder that has it"
        )


def _predicted_bytes(manifest: Manifest, recipe: Recipe) -> float:
    """Return the bytes of the quantized groups by their costs."""
    total = 0.0
    for handle, name in recipe.items():
        if name != NONE:
            group = manifest.layer_sensitivity[handle]
            total += BYTES_PER_COST * group.costs[list(map(plain_name, group.formats)).index(name)]
    return total


@contextmanager
def _fresh_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which is gone afterwards unless it was renamed.

    What a process that was killed left is cleared away; the job's lock keeps others out.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(OLD), ignore_errors=True)
    try:
        folder.mkdir()
    except OSError as error:
        raise LayersenseError(
            f"{folder}: cannot be made ({error.strerror}); free disk space or make the folder "
            "writable"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(new: Path, target: Path) -> None:
    """Rename a folder to ``target``; an earlier one makes room first, and is deleted last."""
    old = target.with_name(OLD)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _take_back(target: Path) -> None:
    """Rename an earlier folder back, which made room and whose successor never came."""
    old = target.with_name(OLD)
    if old.exists() and not target.exists():
        old.rename(target)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
