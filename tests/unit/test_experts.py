"""Which experts were reached, fused and one by one, against a routing made by hand."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from layersense.models.experts import unreached_experts, watch_experts  # noqa: E402


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
