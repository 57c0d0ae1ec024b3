"""Formats as ModelOpt sees them: drift of the registry, validity, the same meaning both ways."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization import extensions
from modelopt.torch.quantization.algorithms import QuantRecipe
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from layersense.config import OwnFormat
from layersense.errors import LayersenseError
from layersense.quantization.formats import (
    REGISTRY,
    Format,
    known_formats,
    resolve_format,
)
from layersense.quantization.modelopt_formats import (
    joint_calls,
    kernel_mode,
    modelopt_config,
    require_kernel,
    validate_format,
)

Model = torch.nn.Module
Batch = dict[str, Any]

CPU_FORMATS = [name for name, format in known_formats().items() if not format.needs_cuda]


def test_registry_is_what_modelopt_says() -> None:
    # In a process of its own: a model that ModelOpt has quantized here adds its classes.
    code = (
        "import json; from layersense.quantization.generate_registry import generate;"
        "print(json.dumps(generate()))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(REGISTRY.read_text()) == json.loads(printed.stdout.splitlines()[-1]), (
        "run `python -m layersense.quantization.generate_registry` and look at the difference"
    )


@pytest.mark.parametrize("name", known_formats())
def test_known_format_is_valid_and_costs_its_true_bits(name: str) -> None:
    format = known_formats()[name]
    validate_format(format)
    recipe = QuantRecipe(modelopt_config(format), name=name)
    assert str(recipe) == f"{name}(effective-bits: {format.effective_bits})"


def test_config_of_fp8_by_hand() -> None:
    config = modelopt_config(known_formats()["FP8_ALL_LAYERS_CFG"])
    first, weight, inputs, *rest = config["quant_cfg"]
    assert (config["algorithm"], config["effective_bits"]) == ({"method": "max"}, 8.0)
    assert first == {"quantizer_name": "*", "enable": False}
    fp8 = {"num_bits": (4, 3), "axis": None}
    assert weight == {"quantizer_name": "*weight_quantizer", "cfg": fp8}
    assert inputs == {"quantizer_name": "*input_quantizer", "cfg": fp8}
    assert all(entry["quantizer_name"] == "*" and not entry["enable"] for entry in rest)
    classes = {entry["parent_class"] for entry in rest}
    assert {"nn.Embedding", "nn.LayerNorm", "nn.BatchNorm2d", "nn.MaxPool2d"} <= classes
    assert classes.isdisjoint({"nn.Linear", "nn.Conv2d", "nn.ConvTranspose2d", "Conv1D"})


def test_attributes_are_those_of_modelopts_own_config() -> None:
    for name, base in {
        "FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "W4A8_AWQ_BETA_ALL_LAYERS_CFG": mtq.W4A8_AWQ_BETA_CFG,
        "NVFP4_ALL_LAYERS_CFG": mtq.NVFP4_DEFAULT_CFG,
        "NVFP4_FOUR_OVER_SIX_ALL_LAYERS_CFG": mtq.NVFP4_FOUR_OVER_SIX_CFG,
    }.items():
        ours = QuantizeConfig(**modelopt_config(known_formats()[name])).quant_cfg[1:3]
        theirs = [
            entry
            for entry in QuantizeConfig(**base).quant_cfg
            if entry.quantizer_name in ("*weight_quantizer", "*input_quantizer")
        ]
        assert [_without_cost(entry) for entry in ours] == [_without_cost(e) for e in theirs]


def _without_cost(entry: Any) -> Any:
    cfg = entry.cfg if isinstance(entry.cfg, list) else [entry.cfg]
    return entry.quantizer_name, [stage.model_dump(exclude={"effective_bits"}) for stage in cfg]


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"weight": {"bias": {"type": "x"}}}, "bias"),
        ({"weight": {"calibrator": "median"}}, "calibrator"),
        ({"weight": {"axis": "first"}}, "axis"),
        ({"algorithm": {"method": "smoothquant", "alpha": 7}}, "alpha"),
    ],
)
def test_modelopt_refuses_the_rest_in_one_sentence(changes: dict[str, Any], place: str) -> None:
    own = {"MINE": OwnFormat.model_validate({"base": "INT8_DEFAULT_CFG", **changes})}
    with pytest.raises(LayersenseError) as error:
        validate_format(resolve_format("MINE", own))
    message = str(error.value)
    assert message.startswith("format `MINE` is refused by ModelOpt at ")
    assert place in message
    assert "\n" not in message


# --- calls ---------------------------------------------------------------------------------------


def test_joint_calls() -> None:
    names = ["INT4_AWQ", "FP8", "INT8_SMOOTHQUANT", "INT8", "MXFP8", "NVFP4_FOUR_OVER_SIX"]
    formats = [known_formats()[f"{name}_ALL_LAYERS_CFG"] for name in names]
    twin = resolve_format("TWIN", {"TWIN": OwnFormat(base="FP8_DEFAULT_CFG")})
    calls = [
        [f.name.removesuffix("_ALL_LAYERS_CFG") for f in call]
        for call in joint_calls([*formats, twin])
    ]
    assert calls == [
        ["FP8", "INT8", "MXFP8"],
        ["INT4_AWQ"],
        ["INT8_SMOOTHQUANT"],
        ["NVFP4_FOUR_OVER_SIX"],
        ["TWIN"],
    ]
    assert joint_calls(formats[:1]) == [formats[:1]]
    assert joint_calls([]) == []


# --- kernels -------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that of ModelOpt's extensions only those named could be built."""

    def pretend(*names: str) -> None:
        for loader, name in {
            "get_cuda_ext": "int",
            "get_cuda_ext_fp8": "fp8",
            "get_cuda_ext_mx": "mx",
        }.items():
            monkeypatch.setattr(extensions, loader, lambda name=name: name in names or None)

    return pretend


def test_the_cpu_needs_no_kernel(built: Callable[..., None]) -> None:
    built()
    assert {kernel_mode(known_formats()[name], "cpu") for name in CPU_FORMATS} == {"native"}


def test_compiled_kernels(built: Callable[..., None]) -> None:
    built("int", "fp8", "mx")
    assert {kernel_mode(format, "cuda") for format in known_formats().values()} == {"compiled"}


def test_only_fp8_has_a_stand_in(built: Callable[..., None]) -> None:
    built()
    for name, format in known_formats().items():
        if name.startswith("FP8"):
            assert kernel_mode(format, "cuda") == "simulated"
        else:
            with pytest.raises(LayersenseError, match=f"`{name}` needs ModelOpt's CUDA extension"):
                require_kernel(format, "cuda")


def test_w4a8_simulates_its_fp8_half(built: Callable[..., None]) -> None:
    built("int")
    assert kernel_mode(known_formats()["W4A8_AWQ_BETA_ALL_LAYERS_CFG"], "cuda:0") == "simulated"


# --- the same meaning in auto_quantize and in mtq.quantize ---------------------------------------


def _tiny_vlm() -> tuple[Model, Batch]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    ids = torch.tensor([[1, 62, 60, 60, 60, 60, 63, 5, 6, 7, 8, 2]])
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 60).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "labels": torch.where(ids < 60, ids, -100),
    }


def _small_resnet() -> tuple[Model, Batch]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],  # 2-D blocks of 128 pad every 3 × 3 kernel to 128 × 128
        depths=[1, 1],
        layer_type="basic",
        num_labels=5,
    )
    model = ResNetForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 3])}


def _small_vit() -> tuple[Model, Batch]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 3])}


MODELS = {"vlm": _tiny_vlm, "resnet": _small_resnet, "vit": _small_vit}


def _quantizers(model: Model) -> dict[str, dict[str, Any]]:
    """Return every attribute of every quantizer that is on, but for what calibration found."""
    return {
        name: {
            key: value
            for key, value in module.get_modelopt_state(properties_only=True).items()
            if not isinstance(value, torch.Tensor)
        }
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest) -> tuple[Model, Batch]:
    torch.manual_seed(0)
    model, batch = MODELS[request.param]()
    return model.eval(), batch


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU_FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_a_format_means_the_same_both_ways(name: str, original: tuple[Model, Batch]) -> None:
    model, batch = original
    format: Format = known_formats()[name]
    whole = mtq.quantize(
        copy.deepcopy(model), modelopt_config(format), lambda inner: inner(**batch)
    )
    searched, state = mtq.auto_quantize(
        copy.deepcopy(model),
        constraints={"effective_bits": format.effective_bits + 1e-4},
        quantization_formats=[modelopt_config(format)],
        data_loader=[batch],
        forward_step=lambda inner, batch: inner(**batch),
        loss_func=lambda output, batch: output.loss,
        num_calib_steps=1,
        num_score_steps=1,
    )
    assert state["best"]["is_satisfied"]
    on = _quantizers(whole)
    assert on == _quantizers(searched)
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d)
    }
    last = ".1" if len(format.weight) > 1 else ""
    weights = {f"{layer}.weight_quantizer{last}" for layer in layers}
    inputs = {f"{layer}.input_quantizer" for layer in layers if format.input}
    assert {name for name in on if not name.endswith(".0")} == weights | inputs
