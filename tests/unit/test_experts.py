"""Which experts were reached, fused and one by one, against a routing made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from layersense.models.experts import (  # noqa: E402
    experts_per_token,
    unreached_experts,
    watch_experts,
)


class Fused(nn.Module):
    """As transformers stores experts: 3-D weights, and who works on which token."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 8, 4))

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return hidden_states


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"experts": Fused(5)})
        self.old = nn.ModuleDict(
            {"experts": nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(4, 4)})] * 1)}
        )
        self.old["experts"].extend(nn.ModuleDict({"up_proj": nn.Linear(4, 4)}) for _ in range(3))

    def forward(self, x: Any, chosen: Any) -> Any:
        x = self.mlp["experts"](x, chosen, None)
        for number, expert in enumerate(self.old["experts"]):
            x = x + expert["up_proj"](x[: int((chosen == number).any())]).sum()
        return x


OLD = [f"old.experts.{number}.up_proj" for number in range(4)]


def test_scoring_is_counted_and_calibration_is_not() -> None:
    model = Layer()
    watch_experts(model)
    with torch.no_grad():
        model(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    assert unreached_experts(model, ["mlp.experts"]) == (5, [0, 1, 2, 3, 4])
    assert unreached_experts(model, OLD) == (4, [0, 1, 2, 3])
    model(torch.randn(2, 4), torch.tensor([[3], [1]]))
    assert unreached_experts(model, ["mlp.experts"]) == (5, [0, 2, 4])
    assert unreached_experts(model, OLD) == (4, [0, 2])
    with torch.inference_mode():
        model(torch.randn(2, 4), torch.tensor([[0], [3]]))
    assert unreached_experts(model, ["mlp.experts"]) == (5, [2, 4])
    assert unreached_experts(model, OLD) == (4, [2])


def test_what_is_no_mixture_has_no_experts() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    watch_experts(model)
    assert unreached_experts(model, ["0"]) is None


def test_how_many_work_on_a_token_is_what_the_router_said_or_the_config_says() -> None:
    model = Layer()
    watch_experts(model)
    assert experts_per_token(model, ["mlp.experts"]) is None
    model(torch.randn(2, 4), torch.tensor([[3, 1], [1, 0]]))
    assert experts_per_token(model, ["mlp.experts"]) == 2
    assert experts_per_token(model, OLD) is None
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_experts_per_tok=3))
    assert experts_per_token(model, OLD) == 3


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 16, bias=False)
        self.up_proj = nn.Linear(32, 16, bias=False)
        self.down_proj = nn.Linear(16, 32, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """Each token has the expert that its largest feature stands for; the fourth has none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: Any) -> Any:
        chosen = x[:, :3].argmax(dim=1)
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            at = (chosen == number).nonzero().flatten()
            if len(at):
                mixed = mixed.index_add(0, at, expert(x[at]))
        return mixed


class Sparse(nn.Module):
    """Experts that are linear layers of their own, as older checkpoints store them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Mixture()})])
        self.last = nn.Linear(32, 16)

    def forward(self, x: Any) -> Any:
        return self.last(x + self.layers[0]["mlp"](x))


@pytest.mark.slow  # importing ModelOpt takes 15 s
def test_linear_experts_are_scored_together_at_their_mixtures_output() -> None:
    from toy_task import Toy, make, measurement

    from layersense.models.tasks.protocol import Loaded
    from layersense.quantization.formats import resolve_format
    from layersense.scoring.engines import get_engine

    class Watched(Toy):
        def load(self, checkpoint: Any, *, dtype: str, device: Any) -> Loaded:
            model = make(Sparse)
            watch_experts(model)
            return Loaded(model, None, "toy")

    found = {}
    for engine in ("modelopt", "fused"):
        ((inventory, entries),) = get_engine(engine)(
            measurement(Watched()), [resolve_format("INT8_ALL_LAYERS_CFG", {})]
        )
        (mixture,) = (g for g in inventory.groups.values() if g.kind == "experts")
        assert len(mixture.module_names) == 4 * 3
        assert mixture.n_weights == 4 * 3 * 16 * 32
        assert (mixture.n_experts, mixture.unreached_experts) == (4, [3])
        (entry,) = entries.values()
        found[engine] = {
            handle: sum(score or 0.0 for score in group.batch_scores)
            for handle, group in entry.groups.items()
        }
        assert all(score > 0 for score in found[engine].values())
        assert {group.reached for group in entry.groups.values()} == {"scored"}
    assert len(found["fused"]) == 2
    assert found["fused"] == pytest.approx(found["modelopt"], rel=1e-4)
