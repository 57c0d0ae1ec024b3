"""What ModelOpt makes of a pair, against rounding by hand; and the whole grid on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")

import modelopt.torch.quantization as mtq  # noqa: E402
import tiny_families as families  # noqa: E402
from modelopt.torch.quantization.config import QuantizerAttributeConfig  # noqa: E402
from modelopt.torch.quantization.nn import TensorQuantizer  # noqa: E402
from studies import study  # noqa: E402

from layersense.quantization.formats import (  # noqa: E402
    bits_of_shape,
    grid_formats,
    resolve_format,
)
from layersense.quantization.modelopt_formats import modelopt_config, validate_format  # noqa: E402
from layersense.quantization.pairs import parse_pair  # noqa: E402

ON_THE_CPU = [name for name, format in grid_formats().items() if not format.needs_cuda]
WITH_OPTIONS = [
    "W8A8_INT8_INT8_WTENSOR",
    "W8A8_INT8_INT8_ATOKEN",
    "W8A8_FP8_FP8_WCHANNEL_ATOKEN",
    "W4A16_INT4_WCHANNEL",
    "W4A16_INT4_WGROUP64",
    "W4A4_INT4_INT4_ATENSOR",
    "W8A16_FP8_WGROUP128",
    "W8A16_INT8_WGROUP64",
]


def rounded(tensor: Any, kind: str, by: str | None) -> Any:
    """Quantize and dequantize by hand; ``by`` says what shares a scale."""
    if by is not None and by.startswith("GROUP"):
        length = int(by.removeprefix("GROUP"))
        groups = tensor.reshape(-1, length)
        return rounded(groups, kind, "TOKEN").reshape(tensor.shape)
    rows = by in ("CHANNEL", "TOKEN")
    amax = tensor.abs().amax(dim=-1, keepdim=True) if rows else tensor.abs().max()
    if kind == "FP8":
        scale = amax / 448
        return (tensor / scale).to(torch.float8_e4m3fn).float() * scale
    most = 127 if kind == "INT8" else 7
    return torch.clamp(torch.round(tensor * most / amax), -most - 1, most) * amax / most


@pytest.mark.parametrize("name", [*ON_THE_CPU, *WITH_OPTIONS])
def test_a_layer_computes_what_the_name_says(name: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 24)
    x = torch.randn(2, 7, 256) * torch.tensor([0.5, 3.0]).view(2, 1, 1)
    pair = parse_pair(name)
    weight = rounded(layer.weight.detach(), pair.weight, pair.weight_by)
    inputs = x if pair.act is None else rounded(x, pair.act, pair.act_by)
    expected = torch.nn.functional.linear(inputs, weight, layer.bias)
    format = resolve_format(name, {})
    validate_format(format)
    model = torch.nn.Sequential(layer)
    config = {key: value for key, value in modelopt_config(format).items()
              if key in ("quant_cfg", "algorithm")}  # fmt: skip
    mtq.quantize(model, config, lambda model: model(x))
    with torch.no_grad():
        found = model(x)
    # A value in the middle of two steps may fall to either side.
    assert (found - expected).abs().mean() < 2e-4 * expected.abs().mean()


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (8, 100), (8, 300), (8, 256), (4, 2, 2, 14, 14)])
@pytest.mark.parametrize("name", ["W4A16_INT4", "W4A16_INT4_WGROUP64"])
def test_bits_of_a_shape_count_the_scales_that_modelopt_makes(
    name: str, shape: tuple[int, ...]
) -> None:
    format = resolve_format(name, {})
    (attributes,) = format.weight
    blocks = {-1: attributes["block_sizes"]["-1"], "type": "static"}
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, block_sizes=blocks))
    weight = torch.randn(shape)
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    bits = 4 + 16 * quantizer.amax.numel() / weight.numel()
    assert bits_of_shape(format.weight, shape) == pytest.approx(bits)


def test_the_whole_grid_is_one_run(tmp_path: Path) -> None:
    checkpoint = families.seeded(families.resnet, tmp_path / "resnet")
    result = study(tmp_path, checkpoint, "image-classification", formats=ON_THE_CPU)
    assert list(result.scores.formats) == ON_THE_CPU
    sums = {
        name: sum(sum(group.batch_scores) for group in entry.groups.values())
        for name, entry in result.scores.formats.items()
    }
    assert all(score > 0 for score in sums.values())
    # Fewer bits, more damage, of weights and of activations.
    assert sums["W8A16_INT8"] < sums["W8A8_INT8_INT8"] < sums["W8A4_INT8_INT4"]
    assert sums["W8A16_INT8"] < sums["W4A16_INT4"] < sums["W4A4_INT4_INT4"]
    assert sums["W8A8_INT8_INT8"] < sums["W4A8_INT4_INT8"]
    cost = result.scores.formats["W8A4_FP8_INT4"].groups["classifier.1.quant_recipe"].cost
    assert cost == 32 * 80 * 8 / 16


@pytest.mark.gpu
def test_the_whole_grid_runs_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    checkpoint = families.seeded(families.llava_onevision, tmp_path / "vlm")
    result = study(
        tmp_path, checkpoint, "image-text-to-text", formats=list(grid_formats()), device="cuda"
    )
    for name, entry in result.scores.formats.items():
        assert all(sum(group.batch_scores) > 0 for group in entry.groups.values()), name
