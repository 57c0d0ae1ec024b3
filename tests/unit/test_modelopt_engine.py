"""Engine `modelopt` against scores worked out by hand, and its promises one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from layersense.errors import LayersenseError  # noqa: E402
from layersense.models.checkpoints import Checkpoint  # noqa: E402
from layersense.models.tasks.protocol import Batch, Loaded, Sampling  # noqa: E402
from layersense.quantization.formats import resolve_format  # noqa: E402
from layersense.quantization.layers import describe_layer  # noqa: E402
from layersense.scoring.modelopt_engine import Measurement, measure  # noqa: E402
from layersense.scoring.scores import FormatScores  # noqa: E402

INT8 = "INT8_ALL_LAYERS_CFG"
FP8 = "FP8_ALL_LAYERS_CFG"
SMOOTH = "INT8_SMOOTHQUANT_ALL_LAYERS_CFG"
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
            raise torch.OutOfMemoryError("injected")
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


def run(what: Measurement, *names: str) -> dict[str, FormatScores]:
    entries: dict[str, FormatScores] = {}
    for _, part in measure(what, [resolve_format(name, {}) for name in names]):
        entries |= part
    return entries


def totals(entry: FormatScores) -> dict[str, float]:
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


@pytest.fixture(scope="module")
def reference() -> dict[str, FormatScores]:
    return run(measurement(), INT8, FP8)


def test_scores_are_those_worked_out_by_hand(reference: dict[str, FormatScores]) -> None:
    groups = reference[INT8].groups
    for name, expected in by_hand().items():
        assert groups[f"{name}.quant_recipe"].batch_scores == pytest.approx(expected, rel=1e-4)
        assert groups[f"{name}.quant_recipe"].reached == "scored"


def test_reached_tells_silent_zeros_apart(reference: dict[str, FormatScores]) -> None:
    for entry in reference.values():
        assert entry.groups["unused.quant_recipe"].reached == "not_called"
        assert entry.groups["aside.quant_recipe"].reached == "no_gradient"
        assert entry.groups["unused.quant_recipe"].batch_scores == [0.0, 0.0]


def test_cost_counts_true_bits(reference: dict[str, FormatScores]) -> None:
    assert reference[FP8].groups["first.quant_recipe"].cost == 32 * 48 * 8.0 / 16
    entry = run(measurement(), "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG")
    cost = entry["INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"].groups["first.quant_recipe"].cost
    assert cost == 32 * 48 * 4.125 / 16


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_do_not_depend_on_the_scoring_batch(
    reference: dict[str, FormatScores], batch_size: int
) -> None:
    other = run(measurement(score_batch_size=batch_size), INT8, FP8)
    for name in (INT8, FP8):
        assert totals(other[name]) == pytest.approx(totals(reference[name]), rel=1e-4)
        assert sum(other[name].batches.tokens) == 8
        assert len(other[name].batches.tokens) == 8 // batch_size


def test_a_joint_call_equals_single_calls(reference: dict[str, FormatScores]) -> None:
    for name in (INT8, FP8):
        assert run(measurement(), name)[name].groups == reference[name].groups


def test_smoothquant_is_measured_beside_others_on_a_fresh_model(
    reference: dict[str, FormatScores],
) -> None:
    together = run(measurement(), SMOOTH, INT8)
    assert together[INT8].groups == reference[INT8].groups
    assert together[SMOOTH].groups == run(measurement(), SMOOTH)[SMOOTH].groups
    assert together[SMOOTH].groups != reference[INT8].groups


def test_dropout_is_dead_even_in_train_mode(reference: dict[str, FormatScores]) -> None:
    assert run(measurement(Toy(train=True)), INT8)[INT8].groups == reference[INT8].groups


def test_the_same_seed_gives_the_same_scores(reference: dict[str, FormatScores]) -> None:
    again = run(measurement(), INT8, FP8)
    for name, entry in again.items():
        assert entry.groups == reference[name].groups
        assert entry.batches == reference[name].batches


def test_a_module_called_twice_is_refused() -> None:
    with pytest.raises(LayersenseError, match="layer: is called several times in one forward"):
        run(measurement(Toy(kind=Twice)), INT8)


def test_kl_div_is_the_divergence_of_one_group_quantized_alone() -> None:
    entry = run(measurement(method="kl_div"), INT8)[INT8]
    model, rows = make(), make_rows()
    inputs = torch.stack([row[0] for row in rows])
    amax = torch.nn.functional.gelu(
        model.second(functional.gelu(model.first(inputs)))
    ).abs().max()  # fmt: skip
    expected = []
    for start in (0, 4):
        x = inputs[start : start + 4]
        hidden = functional.gelu(model.second(functional.gelu(model.first(x))))
        rest = 0.1 * model.aside(x)
        plain = torch.log_softmax(model.last(hidden) + rest, dim=-1)
        weight = int8(model.last.weight, model.last.weight.abs().amax(dim=1, keepdim=True))
        quantized = functional.linear(int8(hidden, amax), weight, model.last.bias) + rest
        q = torch.log_softmax(quantized, dim=-1)
        expected.append((plain.exp() * (plain - q)).sum().item())
    assert entry.groups["last.quant_recipe"].batch_scores == pytest.approx(
        expected, rel=5e-3, abs=2e-6
    )
    assert entry.groups["unused.quant_recipe"].reached == "not_called"
    assert entry.groups["aside.quant_recipe"].reached == "scored"


def test_kl_div_does_not_depend_on_the_scoring_batch() -> None:
    whole = run(measurement(method="kl_div", score_batch_size=8), INT8)[INT8]
    parts = run(measurement(method="kl_div", score_batch_size=3), INT8)[INT8]
    assert totals(parts) == pytest.approx(totals(whole), rel=5e-3, abs=2e-6)


def test_out_of_memory_halves_the_batch_and_changes_no_score(
    reference: dict[str, FormatScores],
) -> None:
    calibration = 3 * 2  # batches × formats
    entries = run(measurement(Toy(fail={calibration + 2})), INT8, FP8)
    for name, entry in entries.items():
        assert entry.back_offs == ["scoring batch reduced from 4 to 2 samples"]
        assert totals(entry) == pytest.approx(totals(reference[name]), rel=1e-4)


def test_out_of_memory_at_one_sample_splits_the_formats(
    reference: dict[str, FormatScores],
) -> None:
    entries = run(measurement(Toy(fail={1}), score_batch_size=1), INT8, FP8)
    for name, entry in entries.items():
        assert entry.back_offs == ["2 formats measured in two calls instead of one"]
        assert totals(entry) == pytest.approx(totals(reference[name]), rel=1e-4)


def test_out_of_memory_with_nothing_to_reduce_is_one_sentence() -> None:
    with pytest.raises(LayersenseError, match="one sample does not fit into memory"):
        run(measurement(Toy(fail={1}), score_batch_size=1), INT8)


def test_a_non_finite_score_is_kept_as_such() -> None:
    rows = make_rows()
    rows[0] = (rows[0][0] * float("inf"), rows[0][1])
    what = measurement()
    entry = run(replace(what, score_rows=copy.copy(rows[:8])), INT8)[INT8]
    scores = entry.groups["first.quant_recipe"].batch_scores
    assert scores[0] is None
    assert scores[1] is not None


def test_the_inventory_lists_every_layer() -> None:
    inventory, _ = next(iter(measure(measurement(), [resolve_format(INT8, {})])))
    assert list(inventory.layers) == ["first", "second", "last", "unused", "aside"]
    assert inventory.layers["second"].n_weights == 48 * 64
    assert inventory.layers["second"].module_type == "Linear"
    assert inventory.groups["second.quant_recipe"].module_names == ["second"]
    assert all(layer.reason is None for layer in inventory.layers.values())
