"""Spreading a model over several GPUs: the plan, which needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing transformers takes seconds

torch = pytest.importorskip("torch")

from tiny_models import resolve_folder, save_tiny_llama, save_tiny_qwen2_5_vl  # noqa: E402

from layersense.errors import LayersenseError  # noqa: E402
from layersense.models.devices import (  # noqa: E402
    check_together,
    connect,
    free_memory,
    plan_devices,
    spread_over,
    wanted_gpus,
)
from layersense.models.loading import skeleton  # noqa: E402

MEGABYTE = 2**20


@pytest.fixture(scope="module", params=["llm", "vlm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model as its config describes it, without weights."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    if request.param == "llm":
        checkpoint = resolve_folder(save_tiny_llama(folder), "causal-lm")
        return skeleton(transformers.AutoModelForCausalLM, checkpoint)
    checkpoint = resolve_folder(save_tiny_qwen2_5_vl(folder), "image-text-to-text")
    return skeleton(transformers.AutoModelForImageTextToText, checkpoint)


def place(plan: dict[str, int], name: str) -> int:
    """Return where a module lies: by its own entry or that of the nearest module around it."""
    while name not in plan:
        name = name.rpartition(".")[0] if "." in name else ""
    return plan[name]


@pytest.mark.parametrize("gpus", [2, 3])
def test_every_layer_is_whole_and_every_gpu_works(model: Any, gpus: int) -> None:
    plan = plan_devices(model, torch.float32, dict.fromkeys(range(gpus), 100 * MEGABYTE))
    whole = set(model._no_split_modules)
    held: dict[int, int] = dict.fromkeys(range(gpus), 0)
    for name, module in model.named_modules():
        if type(module).__name__ in whole:
            inside = {place(plan, f"{name}.{part}") for part, _ in module.named_parameters()}
            assert len(inside) == 1, name
    for name, parameter in model.named_parameters():
        held[place(plan, name)] += parameter.numel()
    assert len([gpu for gpu in held if held[gpu]]) >= 2
    assert sum(held.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_what_does_not_fit_is_one_sentence(model: Any) -> None:
    with pytest.raises(LayersenseError, match=r"do not fit onto 2 GPU\(s\).*raise `gpus`"):
        plan_devices(model, torch.float32, {0: 1000, 1: 1000})


def test_a_model_that_does_not_say_what_is_whole_is_refused() -> None:
    with pytest.raises(LayersenseError, match="Linear: transformers does not say"):
        plan_devices(torch.nn.Linear(4, 4), torch.float32, {0: MEGABYTE, 1: MEGABYTE})


def test_an_embedding_that_is_called_from_outside_brings_its_input_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.utils
    import transformers

    sent: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        accelerate.utils, "send_to_device", lambda value, device: (sent.append(device), value)[1]
    )
    folder = save_tiny_qwen2_5_vl(tmp_path / "vlm")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    connect(model, {"model.visual": 0, "model.language_model": 1, "lm_head": 1})
    model.get_input_embeddings()(torch.tensor([[1, 2]]))
    assert set(sent) == {1}


def test_a_group_on_two_devices_is_refused() -> None:
    one, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, device="meta")
    check_together({"a.quant_recipe": [one, one]})
    with pytest.raises(LayersenseError, match=r"^a: its modules lie on several GPUs"):
        check_together({"a.quant_recipe": [one, other]})


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(LayersenseError, match="asks for 99 GPUs"):
        free_memory(99)


def test_how_many_gpus_is_said_for_a_block() -> None:
    assert wanted_gpus() == 1
    with spread_over(2):
        assert wanted_gpus() == 2
    assert wanted_gpus() == 1


def test_a_skeleton_reads_no_weight(tmp_path: Path) -> None:
    import transformers

    folder = save_tiny_llama(tmp_path / "llm")
    checkpoint = resolve_folder(folder, "causal-lm")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = skeleton(transformers.AutoModelForCausalLM, checkpoint)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
