"""What a run will take, before it runs: layers, quantizers, memory, time (seconds, no weights).

The model is built from its config on the meta device and gets ModelOpt's quantizers, so what is
counted is what will be measured. Memory is a guess from the shapes of weights and of one batch,
the same that the engine begins with; time is told from what the run has measured before, or not
at all.
"""

import io
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from layersense import paths
from layersense.calibration.build import build_database
from layersense.calibration.database import Row, open_database
from layersense.config import SampleDataset
from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import without_weights
from layersense.models.tasks import get_task
from layersense.models.tasks.protocol import Batch, Loaded, Task
from layersense.progress import duration
from layersense.quantization.formats import format_from_settings
from layersense.scoring.fused.held import expected_peaks, held_by_running, held_by_shapes
from layersense.scoring.fused.quantizers import Quantizers
from layersense.scoring.measurement import (
    collected_warnings,
    describe_work,
    floating_dtype,
    sampling_of,
)
from layersense.scoring.scores import Scores, read_scores

logger = logging.getLogger(__name__)

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Estimate:
    """What is known of a run before it runs."""

    run: str
    model: str
    missing: list[str]
    """Formats that are still to be measured."""
    held: list[str]
    """Formats that are measured already."""
    work: str = ""
    """Groups, modules, formats and quantizers, as the score log says them."""
    batches: str = ""
    peak: float | None = None
    """Expected peak in bytes with all activations kept; None where it cannot be told."""
    peak_recomputed: float | None = None
    """The same with activations recomputed in the backward pass."""
    note: str = ""
    """On what the peak is based, or why there is none."""
    seconds: float | None = None
    rate: str = ""
    """On what the seconds are based, or why there are none."""

    def lines(self) -> Iterator[str]:
        """Yield the estimate as text."""
        yield self.run
        yield f"  model    {self.model}"
        yield f"  measure  {self.work if self.missing else 'nothing: all formats are measured'}"
        if self.held:
            yield f"  there    {', '.join(self.held)}"
        if not self.missing:
            return
        yield f"  batches  {self.batches}"
        if self.peak is None:
            yield f"  memory   not known: {self.note}"
        else:
            recomputed = (
                f", {_gib(self.peak_recomputed)} if activations are recomputed"
                if self.peak_recomputed is not None
                else ""
            )
            yield f"  memory   about {_gib(self.peak)}{recomputed} ({self.note})"
        time = "not known" if self.seconds is None else f"about {duration(self.seconds)}"
        yield f"  time     {time}: {self.rate}"


def estimate_run(
    run: str,
    settings: Mapping[str, Any],
    formats: Mapping[str, Mapping[str, Any]],
    checkpoint: Checkpoint,
    database: Path,
) -> Estimate:
    """Return what measuring a run will take.

    Args:
        run: name of the run.
        settings: what :func:`layersense.settings.score_settings` returns.
        formats: name → settings of the formats that its schemes want.
        checkpoint: the model; no weight of it is read.
        database: its calibration database, which need not be there.

    Raises:
        LayersenseError: the model cannot be built from its config.
    """
    scores = _scores(run)
    held = [
        name
        for name, format in formats.items()
        if scores is not None
        and name in scores.formats
        and scores.formats[name].settings == {**settings, "format": format}
    ]
    missing = [format_from_settings(n, f) for n, f in formats.items() if n not in held]
    task = get_task(checkpoint.task)
    with without_weights():
        loaded = task.load(checkpoint, dtype=settings["dtype"], device="meta")
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    dtype = str(floating_dtype(loaded.model)).removeprefix("torch.")
    known = Estimate(
        run=run,
        model=f"{checkpoint.architecture}, {_parameters(checkpoint.n_parameters)} parameters, "
        f"{_gib(weights)} as {dtype}",
        missing=[format.name for format in missing],
        held=held,
    )
    if not missing:
        return known
    # ModelOpt prints what it registers.
    with collected_warnings(), redirect_stdout(io.StringIO()):
        quantizers = Quantizers(loaded.model, missing)
    batches = _Batches(task, loaded, settings, database)
    kept, recomputed = None, None
    note = "engine `modelopt` keeps the outputs of every format"
    if settings["engine"] == "fused":
        (kept, recomputed), note = _peaks(quantizers, batches, task, loaded)
    seconds, rate = _seconds(scores, batches)
    return replace(
        known,
        work=describe_work(quantizers.groups.values(), known.missing),
        batches=batches.text,
        peak=kept,
        peak_recomputed=recomputed,
        note=note,
        seconds=seconds,
        rate=rate,
    )


class _Batches:
    """A run's batches: how many, and one of them.

    Where the dataset is not built yet, the embedded sample stands in for it.
    """

    def __init__(
        self, task: Task, loaded: Loaded, settings: Mapping[str, Any], database: Path
    ) -> None:
        self.task, self.loaded, self.settings = task, loaded, settings
        sampling = settings["sampling"]
        self.size: int = sampling["batch_size"]
        self.is_there = database.exists()
        asked: int | None = sampling["calibration_samples"]
        self.rows = self._read(database, asked) if self.is_there else self._stand_in()
        self.n_rows = len(self.rows) if self.is_there else asked
        scored: int = sampling["score_samples"]
        self.n_scored = min(scored, self.n_rows or scored)

    @property
    def n_scoring(self) -> int | None:
        """How many scoring batches there are; None where texts are packed and not there yet."""
        if not self._packs:
            return math.ceil(self.n_scored / self.size)
        return len(self._of(self.rows[: self.n_scored], self.size)) if self.is_there else None

    @property
    def n_calibration(self) -> int | None:
        """How many calibration batches there are."""
        size: int = self.settings["sampling"]["calibration_batch_size"]
        if not self._packs:
            return None if self.n_rows is None else math.ceil(self.n_rows / size)
        return len(self._of(self.rows, size)) if self.is_there else None

    @property
    def text(self) -> str:
        """Say how many batches there are."""
        calibration, scoring = self.n_calibration, self.n_scoring
        if calibration is None or scoring is None:
            return "not known before the dataset is built"
        return f"{calibration} calibration and {scoring} scoring"

    def first(self) -> Batch:
        """Return a scoring batch."""
        # Packed texts take as many rows as fill it; a row has two tokens or more.
        length: int = self.settings["sampling"]["max_length"]
        count = self.size * length if self._packs else self.size
        there = self.rows[: self.n_scored] if self.is_there else cycle(self.rows)
        return self._of(list(islice(there, count)), self.size)[0]

    @property
    def _packs(self) -> bool:
        return self.task.name == "causal-lm"

    def _of(self, rows: Sequence[Row], size: int) -> Sequence[Batch]:
        return self.task.batches(self.loaded, rows, sampling_of(self.settings), size)

    def _read(self, database: Path, limit: int | None) -> list[Row]:
        with open_database(database) as opened:
            unit = self.task.unit(self.settings["modality"])
            return opened.rows(unit, "calibration", limit=limit)

    def _stand_in(self) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder) / "sample.sqlite"
            dataset = SampleDataset(source="sample", calibration=40, heldout=4)
            build_database("sample", dataset, database)
            return self._read(database, None)


def _peaks(
    quantizers: Quantizers, batches: _Batches, task: Task, loaded: Loaded
) -> tuple[tuple[float | None, float | None], str]:
    """Return the expected peaks, kept and recomputed, and on what they are based."""
    try:
        batch = batches.first()
    except LayersenseError as error:
        return (None, None), str(error)
    model, groups = loaded.model, quantizers.groups
    held = held_by_shapes(groups, task.describe, batch, getattr(model, "config", None))
    if held is None:
        meta = batch.to("meta", floating_dtype(model))
        try:
            held = held_by_running(groups, lambda: task.forward(model, meta))
        except Exception as error:  # whatever a model does that has no weights
            logger.debug("no forward pass on the meta device: %s", error)
            return (None, None), "this model cannot run without weights"
    note = "a guess from the first batch"
    if not batches.is_there:
        note = "a guess from the embedded sample, which stands in for the dataset"
    return expected_peaks(model, groups, held, batch.n_tokens), note


def _seconds(scores: Scores | None, batches: _Batches) -> tuple[float | None, str]:
    """Return what measuring will take by what was measured of the run before, if anything was."""
    entries = list(scores.formats.values()) if scores else []
    n_scoring = batches.n_scoring
    if not entries or n_scoring is None:
        return None, "nothing of this run is measured yet; the log says it after two batches"
    entry = entries[-1]
    seconds = entry.seconds
    per_batch = seconds.get("score", 0.0) / max(1, len(entry.batches.tokens))
    before = sum(
        wall for phase, wall in seconds.items() if phase.startswith(("load", "insert", "calibrate"))
    )
    return before + per_batch * n_scoring, (
        f"as when the run was measured before, {entry.fit.formats} format(s) at "
        f"{per_batch:.2f} s/batch on {entry.environment.get('device', 'another device')}"
    )


def _scores(run: str) -> Scores | None:
    file = Path(paths.scores(run))
    if not file.exists():
        return None
    try:
        return read_scores(file)
    except LayersenseError as error:
        logger.warning("%s", error)
        return None


def _gib(size: float) -> str:
    if size < GIBIBYTE:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / GIBIBYTE:.3g} GiB"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
