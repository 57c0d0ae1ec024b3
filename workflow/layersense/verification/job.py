"""The verification job of a run: measure what is missing, keep what is there."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersense import config
from layersense.calibration.database import Row, open_database
from layersense.errors import LayersenseError
from layersense.files import digest_json
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import Manifest, plain_name
from layersense.models.checkpoints import Checkpoint, read_checkpoint
from layersense.quantization.extensions import cache_folder
from layersense.quantization.formats import NONE, Format, format_from_settings
from layersense.quantization.kv_cache import KV_CACHES
from layersense.recipes.quant_config import make_cache
from layersense.scoring.in_progress import InProgress
from layersense.scoring.job import extensions_here, leased, only_job
from layersense.verification.plan import UNNAMED, Plan, Whole, make_plan, whole_digest
from layersense.verification.refine import search
from layersense.verification.store import (
    METRICS_VERSION,
    Completed,
    Damage,
    MeasuredRecipe,
    Single,
    Verification,
    by_photograph,
    context_digest,
    read_verification,
    write_verification,
)

if TYPE_CHECKING:
    from layersense.verification.measure import Measurer
    from layersense.verification.replay import Calibration, Switchboard

logger = logging.getLogger(__name__)


def verify_run(
    run: str,
    settings: Mapping[str, Any],
    manifest_files: Sequence[Path],
    *,
    model_file: Path,
    database_file: Path,
    out: Path,
    threads: int | None = None,
    gpus: int = 1,
    cache: str | None = None,
) -> int:
    """Bring a run's ``verification.json`` up to date; return how many entries were measured.

    An entry is reused only where its digest, over all that determines it, matches. If all match,
    the job ends before it imports torch or leases a GPU.

    Args:
        run: name of the run.
        settings: what :func:`layersense.settings.verify_settings` returns.
        manifest_files: manifests of the run's schemes.
        model_file: record of the checkpoint.
        database_file: calibration database.
        out: file to bring up to date.
        threads: CPU threads of torch; None leaves its default.
        gpus: how many GPUs the model is spread over.
        cache: folder of the CUDA extensions, as configured.

    Raises:
        LayersenseError: an input is unusable, or the model cannot be verified.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    manifests = [read_own_manifest(path) for path in manifest_files]
    with only_job(out.with_name(f".{out.name}.lock")):
        checkpoint = read_checkpoint(model_file)
        with open_database(database_file) as database:
            data_digest = database.meta["digest"]
        context = context_digest(settings["measured"], checkpoint.digest, data_digest)
        options = config.Verify.model_validate(settings["verify"])
        plan = make_plan(manifests, options)
        wanted = Wanted(plan, manifests, context, captions=options.captions)
        rounds = out.with_name(f".{out.name}.rounds")
        held, interrupted = _held(out, context), _held(rounds, context)
        if interrupted is not None:
            held = _join(held, interrupted) if held else interrupted
        count = 0
        with ExitStack() as stack:
            bench: _Bench | None = None
            while True:
                singles, recipes = wanted.missing_singles(held), wanted.missing_recipes(held)
                if held is not None and not singles and not recipes:
                    held.recipes = wanted.current_recipes(held)
                    recipes = wanted.missing_next(held, manifests, plan, options.refine)
                if held is not None and not singles and not recipes:
                    break
                logger.info("to measure: %d single groups, %d recipes", len(singles), len(recipes))
                if bench is None:
                    bench = stack.enter_context(
                        _bench(
                            settings["measured"], wanted, checkpoint, database_file, threads, gpus,
                            cache_folder(cache),
                        )
                    )  # fmt: skip
                in_progress = InProgress(
                    out.with_name(f".{out.name}.in-progress"),
                    wanted.digest(singles, recipes),
                    Completed,
                )
                found = bench.measure(run, singles, recipes, in_progress)
                found.before.digest = context
                held = _join(held, found) if held else found
                write_verification(rounds, held)
                count += len(singles) + len(recipes)
        if not count:
            logger.info("all of it is measured already")
        held.run = run
        write_verification(out, held)
        rounds.unlink(missing_ok=True)
        out.with_name(f".{out.name}.in-progress").unlink(missing_ok=True)
    return count


class Wanted:
    """What a run should have in its file, by digest."""

    def __init__(
        self,
        plan: Plan,
        manifests: Sequence[Manifest],
        context: str,
        *,
        captions: bool = False,
    ) -> None:
        self.context, self._captions = context, captions
        self.captioned: set[str] = set()
        """Recipes that write captions: those that reports show by name."""
        if captions:
            self.captioned = {one.digest for one in plan.recipes if one.role not in UNNAMED}
        self.formats: dict[str, Format] = {
            name: format_from_settings(name, entry.settings["format"])
            for manifest in manifests
            for name, entry in manifest.run.items()
        }
        self._settings = {
            name: entry.settings["format"]
            for manifest in manifests
            for name, entry in manifest.run.items()
        }
        self.modules = {
            handle: group.module_names
            for manifest in manifests
            for handle, group in manifest.layer_sensitivity.items()
        }
        self.types = {
            name: layer.module_type
            for manifest in manifests
            for name, layer in manifest.layers.items()
        }
        groups_of: dict[str, dict[str, None]] = {name: {} for name in self.formats}
        for manifest in manifests:
            for handle, group in manifest.layer_sensitivity.items():
                for name in map(plain_name, group.formats):
                    if name != NONE:
                        groups_of[name][handle] = None
        self.groups_of = {name: list(handles) for name, handles in groups_of.items()}
        self.singles = [
            (format, handle) for format, handles in plan.singles.items() for handle in handles
        ]
        self.layers = list(self.types)
        self.recipes = {
            planned.digest: Whole(
                {h: name for h, name in planned.recipe.items() if name != NONE}, planned.kv_cache
            )
            for planned in plan.recipes
        }

    def single_digest(self, format: str, handle: str) -> str:
        """Return the digest of one group under one format."""
        return digest_json([self.context, handle, self._settings[format]])

    def recipe_digest(self, whole: Whole) -> str:
        """Return the digest of a whole recipe."""
        meant = {handle: self._settings[name] for handle, name in whole.recipe.items()}
        cache = [] if whole.kv_cache == "none" else [KV_CACHES[whole.kv_cache]]
        return digest_json([self.context, meant, *cache])

    def digest(self, singles: Sequence[tuple[str, str]], recipes: Mapping[str, Whole]) -> str:
        """Return the digest of one job's measurements together."""
        return digest_json(
            [
                [self.single_digest(format, handle) for format, handle in singles],
                {digest: self.recipe_digest(whole) for digest, whole in recipes.items()},
                *([sorted(self.captioned & recipes.keys())] if self._captions else ()),
            ]
        )

    def missing_singles(self, held: Verification | None) -> list[tuple[str, str]]:
        """Return format and handle of what is not held."""
        return [
            (format, handle)
            for format, handle in self.singles
            if held is None
            or handle not in held.singles.get(format, {})
            or held.singles[format][handle].damage.digest != self.single_digest(format, handle)
        ]

    def missing_recipes(self, held: Verification | None) -> dict[str, Whole]:
        """Return the recipes that are not held, or not with all of the task's metrics."""
        return {
            digest: whole
            for digest, whole in self.recipes.items()
            if held is None
            or digest not in held.recipes
            or held.recipes[digest].damage.digest != self.recipe_digest(whole)
            or self._lacks(held.recipes[digest].damage, digest)
        }

    def _lacks(self, damage: Damage, digest: str) -> bool:
        """Return whether a recipe is not judged by all that it should be."""
        return damage.metrics_version != METRICS_VERSION or (
            digest in self.captioned and not damage.captions
        )

    def current_recipes(self, held: Verification) -> dict[str, MeasuredRecipe]:
        """Return what is held of recipes, without what was measured of formats since edited."""
        return {
            digest: entry
            for digest, entry in held.recipes.items()
            if not self.formats.keys() >= set(entry.recipe.values())
            or entry.damage.digest == self.recipe_digest(Whole(entry.recipe, entry.kv_cache))
        }

    def missing_next(
        self, held: Verification, manifests: Sequence[Manifest], plan: Plan, swaps: int
    ) -> dict[str, Whole]:
        """Return the recipes that the search for better ones has to have measured next."""
        found = by_photograph(held)
        wanted = {}
        for manifest in manifests:
            kv_cache = manifest.scheme.kv_cache
            state = search(manifest, found, plan.singles, swaps)
            recipes = state.wanted
            if self._captions:  # what the search finds is shown by name, and its steps are not
                found_so_far = (state.solved, None if recipes else state.refined)
                ends = [one for one in found_so_far if one is not None]
                self.captioned |= {whole_digest(one, kv_cache) for one in ends}
                recipes = recipes or [
                    one for one in ends
                    if not held.recipes[whole_digest(one, kv_cache)].damage.captions
                ]  # fmt: skip
            for recipe in recipes:
                quantized = {handle: name for handle, name in recipe.items() if name != NONE}
                wanted[whole_digest(recipe, kv_cache)] = Whole(quantized, kv_cache)
        return wanted


def _held(out: Path, context: str) -> Verification | None:
    """Return what the file holds of the same model, rows and settings."""
    if not out.exists():
        return None
    try:
        held = read_verification(out)
    except LayersenseError as error:
        logger.warning("%s; it is measured again", error)
        return None
    return held if held.before.digest == context else None


def _join(held: Verification, found: Verification) -> Verification:
    """Return what both hold; of what both hold, the later."""
    for format, entries in found.singles.items():
        held.singles.setdefault(format, {}).update(entries)
    held.recipes.update(found.recipes)
    told = {metric.name: metric for metric in (*held.before.metrics, *found.before.metrics)}
    held.before.metrics = list(told.values())
    held.before.photographs = found.before.photographs
    held.seconds, held.peak_memory_bytes = found.seconds, found.peak_memory_bytes
    held.environment, held.exact_reuse = found.environment, found.exact_reuse
    return held


def one_of_each_photograph(rows: Sequence[Row]) -> list[Row]:
    """Return the first row of each photograph; none of rows without one."""
    first: dict[int, Row] = {}
    for row in rows:
        if row.image_id is not None:
            first.setdefault(row.image_id, row)
    return list(first.values())


def photographs_of(rows: Sequence[Row]) -> list[int] | None:
    """Return the number of each row's photograph; None where rows are of none."""
    found = [row.image_id for row in rows if row.image_id is not None]
    return found if len(found) == len(rows) else None


class _Bench:
    """A loaded model and its held-out rows, to measure on again and again."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        wanted: Wanted,
        calibration: "Calibration",
        board: "Switchboard",
        measurer: "Measurer",
        rows: Sequence[Row],
        cache: Path,
        seconds: dict[str, float],
    ) -> None:
        self._settings, self._wanted, self._cache = settings, wanted, cache
        self._calibration, self._board, self._measurer = calibration, board, measurer
        self._rows, self._seconds = rows, seconds
        self._calibrated: set[str] = set()

    def measure(
        self,
        run: str,
        singles: Sequence[tuple[str, str]],
        recipes: Mapping[str, Whole],
        in_progress: InProgress[Completed],
    ) -> Verification:
        """Measure groups alone and whole recipes; ``before`` has no digest yet."""
        from layersense.scoring.environment import describe_environment, peak_memory_bytes

        start = time.monotonic()
        self._calibrate(
            {format for format, _ in singles}
            | {name for whole in recipes.values() for name in whole.recipe.values()},
            {whole.kv_cache for whole in recipes.values()},
        )
        self._count("calibrate", start)
        start = time.monotonic()
        before, alone, whole = self._measurer.measure(
            singles, recipes, in_progress, self._wanted.captioned & recipes.keys()
        )
        self._count("measure", start)
        photographs = photographs_of(self._rows)
        if photographs and len(photographs) == len(before.positions):
            before.photographs = photographs
        for digest, damage in whole.items():
            damage.digest = self._wanted.recipe_digest(recipes[digest])
        entries: dict[str, dict[str, Single]] = {}
        for (name, handle), damage in alone.items():
            damage.digest = self._wanted.single_digest(name, handle)
            entries.setdefault(name, {})[handle] = Single(damage=damage)
        return Verification(
            run=run,
            heldout_samples=len(self._rows),
            exact_reuse=self._measurer.exact_reuse,
            before=before,
            singles=entries,
            recipes={
                digest: MeasuredRecipe(
                    recipe=recipes[digest].recipe, damage=damage, kv_cache=recipes[digest].kv_cache
                )
                for digest, damage in whole.items()
            },
            seconds={phase: round(value, 3) for phase, value in self._seconds.items()},
            peak_memory_bytes=peak_memory_bytes(self._measurer.device),
            environment=describe_environment(self._measurer.device),
        )

    def _calibrate(self, formats: set[str], caches: set[str]) -> None:
        from layersense.quantization.modelopt_formats import require_kernel

        wanted = self._wanted
        new = [name for name in wanted.formats if name in formats - self._calibrated]
        extensions_here([wanted.formats[name] for name in new], self._settings, self._cache)
        for name in new:
            require_kernel(wanted.formats[name], self._settings["device"])
        for name in new:
            self._board.calibrate(
                wanted.formats[name], wanted.groups_of[name], wanted.types, self._calibration
            )
        for kv_cache in sorted(caches - self._calibrated):
            if found := make_cache(kv_cache, wanted.layers):
                self._board.calibrate_cache(found, self._calibration)
        self._calibrated |= formats | caches

    def _count(self, phase: str, start: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - start


@contextmanager
def _bench(
    settings: Mapping[str, Any],
    wanted: Wanted,
    checkpoint: Checkpoint,
    database_file: Path,
    threads: int | None,
    gpus: int,
    cache: Path,
) -> Iterator[_Bench]:
    """Lease the device and load the model."""
    with leased(settings["device"], gpus):
        start = time.monotonic()
        import torch

        from layersense.models.devices import spread_over
        from layersense.models.tasks import get_task
        from layersense.models.tasks.metrics import metrics_of
        from layersense.scoring.measurement import sampling_of
        from layersense.verification.measure import Album, Measurer
        from layersense.verification.replay import Switchboard, calibration_of

        seconds = {"import": time.monotonic() - start}
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(settings["sampling"]["seed"])
        device = torch.device(settings["device"])
        start = time.monotonic()
        task = get_task(checkpoint.task)
        with spread_over(gpus):
            loaded = task.load(checkpoint, dtype=settings["dtype"], device=device)
        unit = task.unit(settings["modality"])
        with open_database(database_file) as database:
            calibration_rows = database.rows(
                unit, "calibration", limit=settings["sampling"]["calibration_samples"]
            )
            heldout_rows = database.rows(unit, "heldout", limit=settings["heldout_samples"])
            database.check_images([*calibration_rows, *heldout_rows])
            shown = one_of_each_photograph(heldout_rows) if wanted.captioned else []
            references = database.texts([row.image_id or 0 for row in shown])
        if not heldout_rows:
            raise LayersenseError(
                f"{database_file}: holds no held-out {unit} to verify on; set `heldout` of the "
                "dataset"
            )
        calibration = calibration_of(loaded, task, calibration_rows, settings)
        heldout = task.batches(
            loaded, heldout_rows, sampling_of(settings), settings["sampling"]["batch_size"]
        )
        metrics, written = metrics_of(task, loaded)
        album = None
        if wanted.captioned:
            if not written or not shown:
                lack = "held-out photographs" if written else "metric of what a model writes"
                raise LayersenseError(
                    f"{checkpoint.id}: there is no {lack} (task {checkpoint.task}, {database_file})"
                    "; leave `captions` of `verify` out"
                )
            album = Album(
                written,
                task.batches(
                    loaded, shown, sampling_of(settings), settings["sampling"]["batch_size"]
                ),
                references,
            )
        board = Switchboard.of(loaded.model, wanted.modules)
        measurer = Measurer(
            board,
            task,
            heldout,
            device,
            calibration.dtype,
            metrics=metrics,
            photographs=photographs_of(heldout_rows),
            album=album,
        )
        seconds["load"] = time.monotonic() - start
        yield _Bench(settings, wanted, calibration, board, measurer, heldout_rows, cache, seconds)
