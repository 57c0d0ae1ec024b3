"""Score a tiny model on the embedded sample as the workflow does, down to the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from layersense import settings
from layersense.calibration.build import build_database
from layersense.manifests.schema import Manifest
from layersense.models.checkpoints import resolve, write_checkpoint
from layersense.quantization.extensions import Built
from layersense.recipes.decide import build_manifest
from layersense.scoring.job import score_run
from layersense.scoring.scores import Scores, read_scores
from layersense.validation import load_config

FP8 = "FP8_ALL_LAYERS_CFG"
SAMPLE = {"source": "sample", "calibration": 40, "heldout": 5}


@dataclass(frozen=True)
class Study:
    """What a run measured, and the manifest of its scheme."""

    scores: Scores
    manifest: Manifest

    @property
    def subsystems(self) -> dict[str, float]:
        """Subsystem → summed score of its groups under the first format."""
        found: dict[str, float] = {}
        for group in self.manifest.layer_sensitivity.values():
            found[group.subsystem] = found.get(group.subsystem, 0.0) + (group.scores[0] or 0.0)
        return found

    @property
    def silent(self) -> dict[str, str]:
        """Layer → how it was missed, of the groups that the loss did not reach."""
        return {
            handle.removesuffix(".quant_recipe"): group.reached
            for handle, group in self.manifest.layer_sensitivity.items()
            if group.reached != "scored"
        }

    def findings(self, code: str) -> list[Any]:
        return [finding for finding in self.manifest.findings if finding.code == code]


@cache
def sample_database(folder: Path) -> Path:
    path = folder / "sample.sqlite"
    config = load_config(_config("sample", "x", {}), "test", check_files=False)
    build_database("sample", config.datasets["sample"], path)
    return path


def study(
    folder: Path,
    checkpoint: Path,
    task: str,
    *,
    formats: Sequence[str] = (FP8,),
    built: Mapping[str, Built] = MappingProxyType({}),
    trust_remote_code: bool = False,
    **run: Any,
) -> Study:
    """Score all layers of ``checkpoint`` on the sample, or go on from an earlier call.

    Args:
        folder: where the sample's database is kept between studies.
        checkpoint: a directory.
        task: its task.
        formats: what to measure.
        built: CUDA extensions, as their jobs found them.
        trust_remote_code: run Python code that comes with the checkpoint.
        run: keys of the run.
    """
    data = _config(str(checkpoint), task, run)
    data["schemes"]["scheme"]["quant_formats"] = list(formats)
    data["models"]["model"]["trust_remote_code"] = trust_remote_code
    config = load_config(yaml.safe_load(yaml.safe_dump(data)), "test")
    out = checkpoint / "study"
    out.mkdir(exist_ok=True)
    model_file = out / "model.json"
    write_checkpoint(model_file, resolve("model", config.models["model"]))
    score_run(
        "run",
        settings.score_settings(config, "run"),
        settings.run_formats(config, "run"),
        model_file=model_file,
        database_file=sample_database(folder),
        out=out / "scores.json",
        built=built,
    )
    scores = read_scores(out / "scores.json")
    return Study(scores, build_manifest(scores, "run", "scheme", config.schemes["scheme"], {}))


def _config(checkpoint: str, task: str, run: dict[str, Any]) -> dict[str, Any]:
    return {
        "datasets": {"sample": SAMPLE},
        "models": {"model": {"checkpoint": checkpoint, "task": task}}
        if task != "x"
        else {"model": {"source": "demo"}},
        "schemes": {"scheme": {"quant_formats": [FP8], "effective_bits": 16.0}},
        "runs": {
            "run": {
                "model": "model",
                "dataset": "sample",
                "schemes": ["scheme"],
                "device": "cpu",
                "calibration_samples": 6,
                "score_samples": 4,
                "batch_size": 2,
                **run,
            }
        },
    }
