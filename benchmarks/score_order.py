"""Where a score's order parts from that of the damage: each step of the approximation by itself.

Run it on a verified run: ``python benchmarks/score_order.py results demo.image-text``. INT4 by
blocks of 128, weights alone, every group quantized by arithmetic of our own in float64: no
ModelOpt, and no code of scoring or verification. Prints Spearman with the KL on the held-out rows.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from layersense.calibration.database import open_database
from layersense.manifests.read import read_own_manifest
from layersense.models.checkpoints import read_checkpoint
from layersense.models.tasks import get_task
from layersense.models.tasks.protocol import Batch, Task
from layersense.scoring.measurement import sampling_of
from layersense.verification.measure import kl_divergence

BLOCK = 128
CPU = torch.device("cpu")


def rounding_error(weight: Tensor) -> Tensor:
    """Return what INT4 by blocks of the last dimension changes in a weight."""
    length = weight.shape[-1]
    rows = functional.pad(weight, (0, -length % min(BLOCK, length)))
    blocks = rows.reshape(*rows.shape[:-1], -1, min(BLOCK, length))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
    rounded = ((blocks / scale).round().clamp(-8, 7) * scale).reshape(rows.shape)
    return (rounded[..., :length] - weight).detach()


class Probe:
    """A model, its groups, and what quantization would change in their outputs."""

    def __init__(self, model: nn.Module, task: Task, groups: Mapping[str, Sequence[str]]) -> None:
        self.model, self.task, self.groups = model, task, groups
        self.errors = {
            name: rounding_error(model.get_submodule(name).weight)
            for names in groups.values()
            for name in names
        }
        self.products: dict[str, Tensor] = {}
        for name in self.errors:
            model.get_submodule(name).register_forward_hook(self._hook(name))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(_ask_gradient)

    def scores(self, batches: Sequence[Batch], draws: int = 0) -> pd.DataFrame:
        """Return the sums of squares of ∂L/∂Y·ΔY a token, by what is summed before squaring.

        Args:
            batches: of one sample each.
            draws: labels drawn from the model's own predictions, so often; 0 takes the data's.
        """
        generator = torch.Generator().manual_seed(0)
        sums = {handle: np.zeros(3) for handle in self.groups}
        for batch in batches:
            for _ in range(max(1, draws)):
                self._backward(batch, generator if draws else None)
                for handle, names in self.groups.items():
                    parts = [self.products[name] for name in names]
                    sums[handle] += [
                        sum(float((part**2).sum()) for part in parts),
                        sum(float((part.flatten(0, -2).sum(-1) ** 2).sum()) for part in parts),
                        sum(float(part.sum()) for part in parts) ** 2,
                    ]
        tokens = sum(batch.n_tokens for batch in batches) * max(1, draws)
        return pd.DataFrame(sums, index=["element", "token", "sample"]).T / tokens

    @torch.no_grad()
    def damage(self, batches: Sequence[Batch], share: float = 1.0) -> pd.Series:
        """Return each group's KL under ``share`` of its rounding error, over share²."""
        before = [self._logits(batch) for batch in batches]
        found = {}
        for handle, names in self.groups.items():
            kept = {name: self.model.get_submodule(name).weight.clone() for name in names}
            for name in names:
                self.model.get_submodule(name).weight.add_(share * self.errors[name])
            found[handle] = sum(
                float(kl_divergence(logits, self._logits(batch)).sum())
                for logits, batch in zip(before, batches, strict=True)
            )
            for name, weight in kept.items():
                self.model.get_submodule(name).weight.copy_(weight)
        return pd.Series(found) / sum(map(len, before)) / share**2

    def _backward(self, batch: Batch, generator: torch.Generator | None) -> None:
        output = self.task.forward(self.model, batch)
        if generator is None:
            self.task.loss(output, batch).backward()
        else:
            logits = self.task.supervised_logits(output, batch).double()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, drawn, reduction="sum").backward()

    def _logits(self, batch: Batch) -> Tensor:
        return self.task.supervised_logits(self.task.forward(self.model, batch), batch).double()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            weight, x = self.errors[name], inputs[0].detach()
            if isinstance(module, nn.Linear):
                change = functional.linear(x, weight)
            else:
                change = module._conv_forward(x, weight, None)  # type: ignore[operator]
            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(lambda g: self.products.__setitem__(name, g * change))

        return hook


def _ask_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("run")
    given = parser.parse_args()
    manifest = read_own_manifest(next((given.results / given.run).glob("*/manifest.json")))
    settings = next(iter(manifest.run.values())).settings
    checkpoint = read_checkpoint(given.results / "models" / manifest.model.name / "model.json")
    task = get_task(checkpoint.task)
    torch.manual_seed(0)
    loaded = task.load(checkpoint, dtype="float32", device="cpu")
    model = loaded.model.double().eval().requires_grad_(False)
    database_file = given.results / "calibration" / f"{manifest.dataset.name}.sqlite"
    with open_database(database_file) as database:
        unit = task.unit(settings["modality"])
        rows = {split: database.rows(unit, split) for split in ("calibration", "heldout")}
    sampling = settings["sampling"]

    def batches(split: str, count: int | None = None) -> list[Batch]:
        found = task.batches(loaded, rows[split][:count], sampling_of(settings), 1)
        moved = [batch.to(CPU, torch.float64) for batch in found]
        for batch in moved:
            for value in batch.inputs.values():
                if value.is_floating_point():
                    value.requires_grad_(True)
        return moved

    groups = {
        handle: group.module_names
        for handle, group in manifest.layer_sensitivity.items()
        if group.reached == "scored"
    }
    probe = Probe(model, task, groups)
    heldout = batches("heldout")
    scored = batches("calibration", sampling["score_samples"])
    drawn = probe.scores(heldout, draws=8)
    predictors = {
        "score": probe.scores(scored).element,
        "score, of all calibration rows": probe.scores(batches("calibration")).element,
        "score, of the held-out rows": probe.scores(heldout).element,
        "… and labels drawn from the predictions": drawn.element,
        "… and elements summed by token": drawn.token,
        "… and by sample": drawn["sample"],
        "KL on the scored rows": probe.damage(scored),
        "KL of 1/50 of the error": probe.damage(heldout, 0.02),
        "KL": probe.damage(heldout),
    }
    table = pd.DataFrame(predictors)
    subsystems = pd.Series({h: manifest.layer_sensitivity[h].subsystem for h in groups})
    columns = {"all": table.index}
    for name, members in subsystems.groupby(subsystems):
        if len(members) > 4:
            columns[str(name)] = members.index
    print(f"| Spearman with the KL on held-out rows | {' | '.join(columns)} |")
    print(f"| --- {'| ---: ' * len(columns)}|")
    for name in table:
        found = [
            table.loc[index, name].corr(table.loc[index, "KL"], method="spearman")
            for index in columns.values()
        ]
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in found)} |")
    print("groups:", {name: len(index) for name, index in columns.items()})
    shares = table["KL"].groupby(subsystems).sum() / table["KL"].sum()
    print("share of the KL:", {name: round(share, 5) for name, share in shares.items()})


if __name__ == "__main__":
    main()
