"""Checkpoints of the formats that need CUDA, packed by the exporter's kernels and checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("all_extensions")]

torch = pytest.importorskip("torch")

from layersense.export.allow import WRITES  # noqa: E402

FP8, NVFP4, WEIGHTS = "FP8_ALL_LAYERS_CFG", "NVFP4_ALL_LAYERS_CFG", "W4A16_NVFP4_ALL_LAYERS_CFG"
RUN = {
    "device": "cuda",
    "dtype": "bfloat16",
    "max_length": 64,
    "calibration_samples": 8,
    "score_samples": 4,
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny VLM scored under every format that can be exported."""
    from test_export import make_shop
    from tiny_models import save_tiny_qwen2_5_vl

    return make_shop(
        tmp_path_factory, save_tiny_qwen2_5_vl, "image-text-to-text", list(WRITES), **RUN
    )


def choose(shop: Any, *formats: str, tower: bool = True) -> None:
    """Give the groups the formats in turn; ``tower``: the vision tower, too."""

    def pick(number: int, handle: str) -> int:
        group = shop.manifest.layer_sensitivity[handle]
        names = [label.partition("(")[0] for label in group.formats]
        skipped = not tower and group.subsystem != "language"
        return names.index("NONE" if skipped else formats[number % len(formats)])

    shop.choose(pick)


@pytest.mark.parametrize("format", WRITES)
def test_every_format_is_written_as_it_was_simulated(shop: Any, format: str, tmp_path: Any) -> None:
    choose(shop, format)
    exported = shop.export(tmp_path)
    assert exported.checked.problems == []
    assert exported.checked.compared == len(exported.expected.quantized) > 0
    assert exported.quant_algo == WRITES[format].algo


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("formats", [(FP8, NVFP4), (NVFP4, WEIGHTS, "NONE"), (FP8, "NONE")])
def test_mixes_and_towers(shop: Any, formats: tuple[str, ...], tower: bool, tmp_path: Any) -> None:
    choose(shop, *formats, tower=tower)
    exported = shop.export(tmp_path)
    assert exported.checked.problems == []
    mixed = len({*formats} - {"NONE"}) > 1
    assert (exported.quant_algo == "MIXED_PRECISION") == mixed
    # A tower of one algorithm alone is what vLLM does not read.
    assert exported.checked.vllm == [] or (tower and not mixed)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "modelopt"


def test_the_bytes_of_4_bit_floats_are_those_predicted(shop: Any, tmp_path: Any) -> None:
    choose(shop, NVFP4)
    exported = shop.export(tmp_path)
    assert exported.checked.quantized_bytes == pytest.approx(exported.predicted_bytes, rel=0.01)


@pytest.mark.parametrize("format", [FP8, NVFP4, WEIGHTS, "MXFP8_ALL_LAYERS_CFG"])
def test_fused_experts_are_packed_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, format: str, tmp_path: Any
) -> None:
    from test_export import make_shop
    from tiny_families import qwen3_moe

    shop = make_shop(
        tmp_path_factory, qwen3_moe, "causal-lm", [format], **{**RUN, "modality": "text"}
    )
    choose(shop, format)
    exported = shop.export(tmp_path)
    assert exported.checked.problems == []
    assert exported.checked.vllm == []
    assert sum(".experts." in module for module in exported.expected.quantized) == 2 * 6 * 3
