"""Pairs of types without torch: names, bits by hand, what is refused."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from layersense.config import OwnFormat
from layersense.errors import LayersenseError
from layersense.quantization.formats import (
    check_device,
    format_from_settings,
    format_settings,
    grid_formats,
    known_formats,
    resolve_format,
)
from layersense.quantization.pairs import Pair, grid, is_pair, parse_pair
from layersense.recipes.targets import runtimes

FP4 = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}


def test_the_grid_is_every_weight_with_every_activation() -> None:
    names = [pair.name for pair in grid()]
    assert names == [
        "W8A16_FP8", "W8A8_FP8_FP8", "W8A8_FP8_INT8", "W8A4_FP8_FP4", "W8A4_FP8_INT4",
        "W8A16_INT8", "W8A8_INT8_FP8", "W8A8_INT8_INT8", "W8A4_INT8_FP4", "W8A4_INT8_INT4",
        "W4A16_FP4", "W4A8_FP4_FP8", "W4A8_FP4_INT8", "W4A4_FP4_FP4", "W4A4_FP4_INT4",
        "W4A16_INT4", "W4A8_INT4_FP8", "W4A8_INT4_INT8", "W4A4_INT4_FP4", "W4A4_INT4_INT4",
    ]  # fmt: skip
    assert len({format_settings(f).__repr__() for f in grid_formats().values()}) == 20


@pytest.mark.parametrize(
    ("name", "weight", "act", "bits"),
    [
        ("W8A8_FP8_INT8", {"num_bits": [4, 3]}, {"num_bits": 8}, 8.0),
        ("W8A16_INT8", {"num_bits": 8, "axis": 0}, None, 8.0),
        ("W4A16_INT4", {"num_bits": 4, "block_sizes": {"-1": 128, "type": "static"}}, None, 4.125),
        ("W4A4_FP4_FP4", FP4, FP4, 4.5),
        (
            "W8A4_FP8_INT4",
            {"num_bits": [4, 3]},
            {"num_bits": 4, "type": "dynamic", "block_sizes": {"-1": None}},
            8.0,
        ),
        (
            "W4A8_INT4_INT8_WGROUP64_ATOKEN",
            {"num_bits": 4, "block_sizes": {"-1": 64, "type": "static"}},
            {"num_bits": 8, "type": "dynamic", "block_sizes": {"-1": None}},
            4.25,
        ),
        ("W8A8_INT8_INT8_WTENSOR", {"num_bits": 8}, {"num_bits": 8}, 8.0),
        ("W4A4_INT4_INT4_WCHANNEL_ATENSOR", {"num_bits": 4, "axis": 0}, {"num_bits": 4}, 4.0),
        (
            "W8A16_FP8_WGROUP128",
            {"num_bits": [4, 3], "block_sizes": {"-1": 128, "type": "static"}},
            None,
            8.125,
        ),
    ],
)
def test_a_name_says_all(
    name: str, weight: dict[str, object], act: dict[str, object] | None, bits: float
) -> None:
    format = resolve_format(name, {})
    assert format.name == name
    assert format.weight == (weight,)
    assert format.input == ((act,) if act else ())
    assert format.effective_bits == bits
    assert format.algorithm == {"method": "max"}
    assert format_from_settings(name, format_settings(format)) == format


def test_a_default_that_is_said_is_no_other_format() -> None:
    plain = resolve_format("W8A8_FP8_INT8", {})
    assert resolve_format("W8A8_FP8_INT8_WTENSOR_ATENSOR", {}) == plain
    assert resolve_format("W4A4_FP4_FP4_WBLOCK16", {}) == resolve_format("W4A4_FP4_FP4", {})


@given(
    st.sampled_from([pair.weight for pair in grid()]),
    st.sampled_from([pair.act for pair in grid()]),
    st.sampled_from(["TENSOR", "CHANNEL", "GROUP64", "GROUP128"]),
    st.sampled_from(["TENSOR", "TOKEN"]),
)
def test_names_and_pairs_are_one_to_one(
    weight: str, act: str | None, weight_by: str, act_by: str
) -> None:
    pair = Pair(
        weight,
        act,
        "BLOCK16" if weight == "FP4" else weight_by,
        None if act is None else "BLOCK16" if act == "FP4" else act_by,
    )
    assert is_pair(pair.name)
    assert parse_pair(pair.name) == pair


def test_those_that_modelopt_has_too_are_the_same() -> None:
    known = known_formats()
    for name, other in (
        ("W8A8_FP8_FP8", "FP8_ALL_LAYERS_CFG"),
        ("W8A8_INT8_INT8", "INT8_ALL_LAYERS_CFG"),
        ("W8A16_INT8", "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG"),
        ("W4A16_INT4", "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"),
        ("W4A4_FP4_FP4", "NVFP4_ALL_LAYERS_CFG"),
        ("W4A16_FP4", "W4A16_NVFP4_ALL_LAYERS_CFG"),
        ("W8A8_FP8_FP8_WCHANNEL_ATOKEN", "FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG"),
    ):
        format = resolve_format(name, {})
        assert format_settings(format) == format_settings(known[other])
        assert runtimes(format) == runtimes(known[other])


def test_what_no_runtime_loads_is_simulation_only() -> None:
    assert runtimes(resolve_format("W8A8_FP8_FP8", {})) == ("vLLM", "TensorRT-LLM", "TensorRT")
    # The exporter would write this one as INT8 SmoothQuant.
    assert runtimes(resolve_format("W8A8_INT8_FP8", {})) == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("W8A8_INT4_FP8", "its bits are not those of its types; did you mean `W4A8_INT4_FP8`?"),
        ("W4A16_INT4_INT8", "did you mean `W4A8_INT4_INT8`?"),
        ("W8A8_FP8", "did you mean `W8A16_FP8`?"),
        ("W6A8_FP6_FP8", "ModelOpt has no weight type FP6; take FP4, FP8, INT4 or INT8"),
        ("W8A6_FP8_FP6", "ModelOpt has no activation type FP6"),
        ("W4A4_FP4_FP4_WCHANNEL", "emulates FP4 weights only in blocks of 16"),
        ("W4A4_FP4_FP4_ATOKEN", "emulates FP4 activations only in blocks of 16"),
        ("W8A8_FP8_FP8_WTOKEN", "weights have no granularity TOKEN; take TENSOR, CHANNEL"),
        ("W8A8_FP8_FP8_ACHANNEL", "activations have no granularity CHANNEL; take TENSOR or TOKEN"),
        ("W8A16_FP8_ATOKEN", "activations of 16 bits have no scale; leave `_ATOKEN` out"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(LayersenseError) as error:
        resolve_format(name, {})
    assert str(error.value).startswith(f"format `{name}`: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("w8a8_fp8_int8", "did you mean `W8A8_FP8_INT8`?"),
        ("W8A8", "did you mean `W8A8_FP8_FP8`, `W8A8_FP8_INT8`, `W8A8_INT8_FP8` or"),
        ("W4A16", "did you mean `W4A16_FP4`, `W4A16_INT4` or"),
        ("W8A8_FP8_FP4x", "did you mean `W8A8_FP8_FP8`?"),
        ("W8A8_FP8_INT8_GROUP64", "`_WGROUP64` or `_WGROUP128` for weights"),
        ("W8A8_INT8_INT8_ATOKEN_WTENSOR", "for weights, then `_ATENSOR` or `_ATOKEN` for activ"),
    ],
)
def test_what_is_nearly_a_pair_is_told_how_pairs_are_written(name: str, meant: str) -> None:
    with pytest.raises(LayersenseError, match="there is no format") as error:
        resolve_format(name, {})
    assert meant in str(error.value)
    assert "(a pair is its bits, its types in capitals, and" in str(error.value)


def test_fp4_needs_cuda_and_the_rest_does_not() -> None:
    for name, format in grid_formats().items():
        if "FP4" in name:
            with pytest.raises(LayersenseError, match="needs CUDA"):
                check_device(format, "cpu")
        else:
            check_device(format, "cpu")


def test_an_own_format_cannot_take_a_pairs_name() -> None:
    mine = {"W8A8_FP8_INT8": OwnFormat(base="FP8_DEFAULT_CFG")}
    with pytest.raises(LayersenseError, match="belongs to layersense"):
        resolve_format("W8A8_FP8_INT8", mine)


def test_the_example_holds_the_whole_grid(repository) -> None:
    config = yaml.safe_load((repository / "config/examples/grid-of-pairs.yaml").read_text())
    assert config["schemes"]["grid"]["quant_formats"] == list(grid_formats())
    benchmark = yaml.safe_load((repository / "benchmarks/grid_of_pairs_3b.yaml").read_text())
    assert benchmark["schemes"] == config["schemes"]
