"""A classifier as a task, small enough to score by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from layersense.models.checkpoints import Checkpoint
from layersense.models.tasks.protocol import Batch, Loaded, Sampling
from layersense.quantization.layers import describe_layer
from layersense.scoring.measurement import Measurement
from layersense.scoring.scores import FormatScores

CHECKPOINT = Checkpoint(
    path="",
    id="toy",
    revision=None,
    digest="0",
    task="toy",
    architecture="Net",
    n_parameters=0,
    dtype="float32",
    trust_remote_code=False,
    size_bytes=0,
)


class Net(nn.Module):
    """Three layers in a row; a fourth that is never called, a fifth whose result is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(48, 64, bias=False)
        self.last = nn.Linear(64, 16)
        self.unused = nn.Linear(32, 16)
        self.aside = nn.Linear(32, 16)

    def forward(self, x: Any) -> Any:
        hidden = functional.gelu(self.first(x))
        hidden = functional.gelu(self.second(self.dropout(hidden)))
        return self.last(hidden) + 0.1 * self.aside(x).detach()


class Twice(nn.Module):
    """One layer called two times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.last = nn.Linear(32, 16)

    def forward(self, x: Any) -> Any:
        return self.last(self.layer(functional.gelu(self.layer(x))))


def make(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(3)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5  # divergences well above the rounding of float32
    return model


def make_rows(count: int = 12) -> list[tuple[Any, int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(32, generator=generator), int(label))
        for label in torch.randint(0, 16, (count,), generator=generator)
    ]


@dataclass
class Toy:
    """A classifier as a task: a row is a sample, and a token."""

    kind: type[nn.Module] = Net
    train: bool = False
    fail: set[int] = field(default_factory=set)
    """Forward calls, counted from 1, that run out of memory."""
    error: Exception = field(default_factory=lambda: torch.OutOfMemoryError("injected"))
    """How they say so."""
    calls: int = 0
    name = "toy"
    modalities = frozenset({"text"})

    def unit(self, modality: str) -> str:
        return "caption"

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: Any) -> Loaded:
        model = make(self.kind).to(device)
        return Loaded(model.train() if self.train else model, None, "toy")

    def batches(
        self, loaded: Loaded, rows: Sequence[Any], sampling: Sampling, batch_size: int
    ) -> list[Batch]:
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        return [
            Batch(
                inputs={"x": torch.stack([row[0] for row in part])},
                labels=torch.tensor([row[1] for row in part]),
                n_tokens=len(part),
                n_samples=len(part),
                n_padding=0,
                n_truncated=0,
            )
            for part in parts
        ]

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        self.calls += 1
        if self.calls in self.fail:
            raise self.error
        return model(**batch.inputs)

    def loss(self, output: Any, batch: Batch) -> Any:
        return functional.cross_entropy(output.float(), batch.labels, reduction="sum")

    def supervised_logits(self, output: Any, batch: Batch) -> Any:
        return output.float()

    def describe(self, module_names: Sequence[str]) -> Any:
        return describe_layer(module_names)


def measurement(task: Toy | None = None, **changes: Any) -> Measurement:
    rows = make_rows()
    return replace(
        Measurement(
            checkpoint=CHECKPOINT,
            task=task or Toy(),
            sampling=Sampling(max_length=8, modality="text"),
            method="gradient",
            calibration_rows=rows,
            score_rows=rows[:8],
            calibration_batch_size=4,
            score_batch_size=4,
            dtype="auto",
            device=torch.device("cpu"),
            seed=0,
        ),
        **changes,
    )


def totals(entry: FormatScores) -> dict[str, float]:
    """Return each group's score, summed over the batches."""
    sums = {}
    for handle, group in entry.groups.items():
        assert all(score is not None for score in group.batch_scores)
        sums[handle] = sum(score or 0.0 for score in group.batch_scores)
    return sums


def int8(tensor: Any, amax: Any) -> Any:
    return torch.clamp(torch.round(tensor * 127 / amax), -128, 127) * amax / 127


def by_hand(batch_size: int = 4) -> dict[str, list[float]]:
    """INT8 scores Σ (∂L/∂Y · ΔY)² of each batch, from autograd and rounding alone."""
    model, rows = make(), make_rows()
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = (inputs[0].detach(), output)

        return hook

    layers = {name: getattr(model, name) for name in ("first", "second", "last")}
    for name, layer in layers.items():
        layer.register_forward_hook(keep(name))
    model(torch.stack([row[0] for row in rows]))
    amax = {name: seen[name][0].abs().max() for name in layers}  # over all calibration rows
    scores: dict[str, list[float]] = {name: [] for name in layers}
    for start in range(0, 8, batch_size):
        part = rows[start : start + batch_size]
        output = model(torch.stack([row[0] for row in part]))
        labels = torch.tensor([row[1] for row in part])
        loss = functional.cross_entropy(output, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in layers])
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            x, y = seen[name]
            weight = int8(layer.weight, layer.weight.abs().amax(dim=1, keepdim=True))
            difference = functional.linear(int8(x, amax[name]), weight, layer.bias) - y
            scores[name].append((gradient * difference).square().sum().item())
    return scores
