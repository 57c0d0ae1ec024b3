"""The engines against each other in bfloat16, and a real lack of memory."""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("all_extensions")]

torch = pytest.importorskip("torch")
from scipy.stats import spearmanr  # noqa: E402

from layersense.calibration.build import build_database  # noqa: E402
from layersense.calibration.database import open_database  # noqa: E402
from layersense.config import SampleDataset  # noqa: E402
from layersense.quantization.formats import known_formats, resolve_format  # noqa: E402

FORMATS = list(known_formats())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny_models import resolve_folder, save_tiny_qwen2_5_vl

    from layersense.models.tasks import get_task
    from layersense.models.tasks.protocol import Sampling
    from layersense.scoring.measurement import Measurement

    folder = tmp_path_factory.mktemp("tiny")
    dataset = SampleDataset(source="sample", calibration=16, heldout=4)
    build_database("sample", dataset, folder / "sample.sqlite")
    with open_database(folder / "sample.sqlite") as database:
        rows = database.rows("caption", "calibration", limit=16)
    return Measurement(
        checkpoint=resolve_folder(save_tiny_qwen2_5_vl(folder / "model"), "image-text-to-text"),
        task=get_task("image-text-to-text"),
        sampling=Sampling(max_length=64, modality="image_text"),
        method="gradient",
        calibration_rows=rows,
        score_rows=rows * 3,  # shapes come again: graphs are recorded, then replayed
        calibration_batch_size=4,
        score_batch_size=4,
        dtype="bfloat16",
        device=torch.device("cuda"),
        seed=0,
    )


def totals(measure: Any, what: Any, names: list[str]) -> dict[str, dict[str, float]]:
    """Return format → group → score."""
    found = {}
    for _, entries in measure(what, [resolve_format(name, {}) for name in names]):
        for name, entry in entries.items():
            found[name] = {handle: sum(g.batch_scores) for handle, g in entry.groups.items()}
    return found


def differences(ours: dict[str, float], theirs: dict[str, float]) -> list[float]:
    """Return the relative difference of each group."""
    return [abs(ours[h] - theirs[h]) / abs(theirs[h]) for h in theirs]


def difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Return the median relative difference."""
    return statistics.median(differences(ours, theirs))


def test_every_format_scores_as_stock_does(tiny: Any) -> None:
    from layersense.scoring import fused, modelopt_engine

    ours = totals(fused.measure, tiny, FORMATS)
    theirs = totals(modelopt_engine.measure, tiny, FORMATS)
    bad = []
    for name in FORMATS:
        handles = list(theirs[name])
        rank = spearmanr(
            [ours[name][h] for h in handles], [theirs[name][h] for h in handles]
        ).statistic
        median = difference(ours[name], theirs[name])
        print(f"{name}: Spearman {rank:.6f}, median relative difference {median:.1e}")
        if rank < 0.9999 or median > 1e-3 or min(ours[name].values()) <= 0:
            bad.append(name)
    assert not bad


def test_recorded_graphs_change_no_score(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from layersense.scoring import fused
    from layersense.scoring.fused.graphs import Graphs

    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))
    )
    # Two pairs whose activations ask the device, so that they are launched beside the graphs.
    pairs = ["W8A8_INT8_INT8_ATOKEN", "W4A4_INT4_INT4"]
    names = [name for name in FORMATS if "AWQ" not in name] + pairs
    recorded = totals(fused.measure, tiny, names)
    count = len(replays)
    monkeypatch.setattr(Graphs, "suits", lambda *_: False)
    plain = totals(fused.measure, tiny, names)
    assert count > 0
    assert len(replays) == count
    for name in names:
        largest = max(differences(recorded[name], plain[name]))
        print(f"{name}: largest relative difference {largest:.1e}")
        assert largest <= 1e-4, name


def test_a_real_lack_of_memory_changes_no_score(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from layersense.scoring import fused
    from layersense.scoring.fused.engine import _Engine
    from layersense.scoring.fused.graphs import Graphs

    names = ["FP8_ALL_LAYERS_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"]
    what = replace(tiny, score_batch_size=len(tiny.score_rows))
    total = torch.cuda.get_device_properties(0).total_memory
    score, there = _Engine._score, []

    def start(self: Any, share: float | None) -> Any:
        """Score with all memory, or with a share of what scoring took beyond the model."""
        _release()
        torch.cuda.reset_peak_memory_stats()
        there.append(torch.cuda.memory_reserved())
        if share is not None:
            limit = there[-1] + share * (needed - there[0])
            torch.cuda.set_per_process_memory_fraction(limit / total)
        return score(self)

    monkeypatch.setattr(_Engine, "_score", lambda self: start(self, None))
    with monkeypatch.context() as patched:
        patched.setattr(Graphs, "suits", lambda *_: False)
        whole = totals(fused.measure, what, names)
    needed = torch.cuda.max_memory_reserved()
    monkeypatch.setattr(_Engine, "_score", lambda self: start(self, 0.5))
    try:
        ((_, entries),) = fused.measure(what, [resolve_format(name, {}) for name in names])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"MiB before scoring and needed: {[n >> 20 for n in (*there, needed)]}")
    for name, entry in entries.items():
        print(f"{name}: {entry.fit}, {entry.back_offs}")
        assert entry.back_offs or entry.fit.checkpointing
        found = {handle: sum(g.batch_scores) for handle, g in entry.groups.items()}
        assert difference(found, whole[name]) <= 1e-2  # bfloat16, other shapes of its kernels


def _release() -> None:
    """Give back what engines before have left in cycles and caches."""
    gc.collect()
    torch.cuda.empty_cache()
