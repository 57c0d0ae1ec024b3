"""Formats without torch: names, bits by hand, own formats, what is refused."""

import subprocess
import sys

import pytest

from layersense.config import OwnFormat
from layersense.errors import LayersenseError
from layersense.quantization.formats import (
    Format,
    all_layers_name,
    bits_of_shape,
    check_device,
    effective_bits,
    format_from_settings,
    format_settings,
    known_formats,
    registry,
    resolve_format,
)

ON_THE_CPU = {
    "FP8_ALL_LAYERS_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG",
    "INT8_ALL_LAYERS_CFG",
    "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG",
    "INT8_SMOOTHQUANT_ALL_LAYERS_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG",
    "INT4_AWQ_ALL_LAYERS_CFG",
    "W4A8_AWQ_BETA_ALL_LAYERS_CFG",
}


def own(base: str = "FP8_DEFAULT_CFG", **changes: object) -> Format:
    return resolve_format("MINE", {"MINE": OwnFormat.model_validate({"base": base, **changes})})


def refusal(name: str = "MINE", base: str = "FP8_DEFAULT_CFG", **changes: object) -> str:
    formats = {"MINE": OwnFormat.model_validate({"base": base, **changes})}
    with pytest.raises(LayersenseError) as error:
        resolve_format(name, formats)
    return str(error.value)


@pytest.mark.parametrize(
    ("stages", "bits"),
    [
        ([{"num_bits": 8, "axis": 0}], 8.0),  # a scale for each channel counts as nothing
        ([{"num_bits": [4, 3]}], 8.0),  # 1 + 4 + 3
        ([{"num_bits": 4, "block_sizes": {"-1": 128, "type": "static"}}], 4.125),  # 4 + 16/128
        ([{"num_bits": 4, "block_sizes": {"-1": 64}}], 4.25),  # 4 + 16/64
        ([{"num_bits": 4, "block_sizes": {"-1": 32, "scale_bits": [4, 3]}}], 4.25),  # 4 + 8/32
        ([{"num_bits": [2, 1], "block_sizes": {"-1": 32, "scale_bits": [8, 0]}}], 4.25),
        ([{"num_bits": [2, 1], "block_sizes": {"-1": 16, "scale_bits": [4, 3]}}], 4.5),
        ([{"num_bits": [3, 2], "block_sizes": {"-1": 32, "scale_bits": [8, 0]}}], 6.25),
        ([{"num_bits": 8, "block_sizes": {"-1": 32, "scale_bits": [8, 0]}}], 8.25),
        ([{"num_bits": [4, 3], "block_sizes": {"-1": 128, "-2": 128}}], 8 + 16 / 16384),
        ([{"num_bits": 8, "block_sizes": {"-1": None}}], 8.0),  # as long as the row
        ([{"num_bits": 4, "block_sizes": {"-1": 128}}, {"num_bits": [4, 3]}], 4.125),
    ],
)
def test_bits_by_hand(stages: list[dict[str, object]], bits: float) -> None:
    assert effective_bits(stages) == bits
    assert bits_of_shape(stages, [256, 256]) == bits  # whole blocks


@pytest.mark.parametrize(
    ("blocks", "shape", "bits"),
    [
        ({"-1": 128}, [8, 16, 3, 3], 8 + 16 / 3),  # a scale for each row of a kernel
        ({"-1": 128}, [8, 16, 1, 1], 24.0),  # a scale for each weight
        ({"-1": 128}, [8, 300], 8 + 16 * 3 / 300),
        ({"-1": 128, "-2": 128}, [8, 16, 3, 3], 8 + 16 / 9),
        ({"-1": 16, "scale_bits": [4, 3]}, [8, 16, 3, 3], 8 + 8 / 3),
        ({"-1": None}, [8, 100], 8.0),
        ({}, [8, 100], 8.0),
    ],
)
def test_bits_of_a_shape_by_hand(blocks: dict[str, object], shape: list[int], bits: float) -> None:
    assert bits_of_shape([{"num_bits": 8, "block_sizes": blocks}], shape) == pytest.approx(bits)


def test_bits_and_labels_of_what_comes_with_modelopt() -> None:
    found = {
        name: (format.effective_bits, format.weight_format, format.act_format)
        for name, format in known_formats().items()
    }
    assert found == {
        "FP8_ALL_LAYERS_CFG": (8.0, "FP8", "FP8"),
        "FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG": (8.0, "FP8", "FP8"),
        "FP8_2D_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG": (8.0009765625, "FP8", "NONE"),
        "INT8_ALL_LAYERS_CFG": (8.0, "INT8", "INT8"),
        "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG": (8.0, "INT8", "NONE"),
        "INT8_SMOOTHQUANT_ALL_LAYERS_CFG": (8.0, "INT8", "INT8"),
        "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG": (4.125, "INT4", "NONE"),
        "INT4_AWQ_ALL_LAYERS_CFG": (4.125, "INT4", "NONE"),
        "W4A8_AWQ_BETA_ALL_LAYERS_CFG": (4.125, "INT4", "FP8"),
        "NVFP4_ALL_LAYERS_CFG": (4.5, "NVFP4", "NVFP4"),
        "NVFP4_AWQ_LITE_ALL_LAYERS_CFG": (4.5, "NVFP4", "NVFP4"),
        "NVFP4_AWQ_CLIP_ALL_LAYERS_CFG": (4.5, "NVFP4", "NVFP4"),
        "NVFP4_AWQ_FULL_ALL_LAYERS_CFG": (4.5, "NVFP4", "NVFP4"),
        "NVFP4_FOUR_OVER_SIX_ALL_LAYERS_CFG": (4.5, "NVFP4", "NVFP4"),
        "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_ALL_LAYERS_CFG": (4.5, "NVFP4", "NVFP4"),
        "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_ALL_LAYERS_CFG": (4.5, "NVFP4", "NVFP4"),
        "W4A16_NVFP4_ALL_LAYERS_CFG": (4.5, "NVFP4", "NONE"),
        "W4A8_NVFP4_FP8_ALL_LAYERS_CFG": (4.25, "NVFP4", "FP8"),  # blocks of 32
        "MXFP4_ALL_LAYERS_CFG": (4.25, "MXFP4", "MXFP4"),
        "MXFP6_ALL_LAYERS_CFG": (6.25, "MXFP6", "MXFP6"),
        "MXFP8_ALL_LAYERS_CFG": (8.25, "MXFP8", "MXFP8"),
        "MXINT8_ALL_LAYERS_CFG": (8.25, "MXINT8", "MXINT8"),
        "W4A8_MXFP4_FP8_ALL_LAYERS_CFG": (4.25, "MXFP4", "FP8"),
    }


def test_nvfp4_and_mx_need_cuda_and_nothing_else_does() -> None:
    for name, format in known_formats().items():
        check_device(format, "cuda")
        if name in ON_THE_CPU:
            check_device(format, "cpu")
        else:
            with pytest.raises(LayersenseError, match=f"`{name}` needs CUDA.*device: cuda"):
                check_device(format, "cpu")


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("FP8_DEFAULT_CFG", "FP8_ALL_LAYERS_CFG"),
        ("INT4_AWQ_CFG", "INT4_AWQ_ALL_LAYERS_CFG"),
        ("W4A16_NVFP4_CFG", "W4A16_NVFP4_ALL_LAYERS_CFG"),
    ],
)
def test_all_layers_name(base: str, name: str) -> None:
    assert all_layers_name(base) == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("NVFP4_MLP_ONLY_ALL_LAYERS_CFG", "NVFP4_ALL_LAYERS_CFG"),
        ("NVFP4_EXPERTS_ONLY_ALL_LAYERS_CFG", "NVFP4_ALL_LAYERS_CFG"),
        ("NVFP4_OMLP_ONLY_ALL_LAYERS_CFG", "NVFP4_ALL_LAYERS_CFG"),
        ("MAMBA_MOE_FP8_AGGRESSIVE_ALL_LAYERS_CFG", "FP8_ALL_LAYERS_CFG"),
    ],
)
def test_an_alias_is_the_format_it_stands_for(alias: str, name: str) -> None:
    assert resolve_format(alias, {}) == known_formats()[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FP8_ALL_LAYER_CFG", ["did you mean `FP8_ALL_LAYERS_CFG`"]),
        ("FP8_DEFAULT_CFG", ["`FP8_ALL_LAYERS_CFG`", "by name"]),
        ("NVFP4_MLP_ONLY_CFG", ["`NVFP4_ALL_LAYERS_CFG`", "by name"]),
        ("FP8_KV_CFG", ["key-value cache"]),
        ("FP8_KV_ALL_LAYERS_CFG", ["key-value cache"]),
        ("NVFP4_SVDQUANT_DEFAULT_CFG", ["svdquant"]),
        ("NVFP4_SVDQUANT_ALL_LAYERS_CFG", ["svdquant"]),
        ("MXFP4_MLP_WEIGHT_ONLY_CFG", ["format of your own"]),
        ("MINES", ["did you mean `MINE`"]),
        ("zzz", ["there is no format `zzz`"]),
    ],
)
def test_a_name_that_is_no_format(name: str, words: list[str]) -> None:
    message = refusal(name)
    assert f"`{name}`" in message
    assert all(word in message for word in words)


def test_every_config_of_modelopt_is_a_format_an_alias_or_refused() -> None:
    bases = [b for known in registry().formats.values() for b in (known.base, *known.aliases)]
    everything = bases + list(registry().refused)
    assert len(everything) == len(set(everything)) == 38  # `dir(modelopt…config)`, 0.47.0


def test_own_format_changes_what_it_says_and_keeps_the_rest() -> None:
    format = own(
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        weight={"block_sizes": {-1: 64, "type": "static"}},
        input={"num_bits": [4, 3]},
    )
    assert format == Format(
        name="MINE",
        weight=({"num_bits": 4, "block_sizes": {"-1": 64, "type": "static"}},),
        input=({"num_bits": [4, 3]},),
        algorithm={"method": "max"},
        effective_bits=4.25,
        weight_format="INT4",
        act_format="FP8",
        extensions=("fp8", "int"),
        needs_cuda=False,
    )


@pytest.mark.parametrize(
    "base", ["NVFP4_DEFAULT_CFG", "NVFP4_ALL_LAYERS_CFG", "NVFP4_MLP_ONLY_CFG"]
)
def test_own_format_accepts_every_name_of_its_base(base: str) -> None:
    assert own(base, input={"enable": False}).act_format == "NONE"


@pytest.mark.parametrize("spelt", [[2, 1], (2, 1), "e2m1", "E2M1"])
def test_own_format_spells_a_pair_as_one_likes(spelt: object) -> None:
    blocks = {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}
    format = own("MXFP8_DEFAULT_CFG", weight={"num_bits": spelt, "block_sizes": blocks})
    assert format.weight[0]["num_bits"] == [2, 1]
    assert (format.effective_bits, format.weight_format) == (4.25, "MXFP4")


def test_own_format_without_changes_means_its_base() -> None:
    assert format_settings(own()) == format_settings(known_formats()["FP8_ALL_LAYERS_CFG"])


def test_null_is_the_same_as_nothing() -> None:
    assert own(weight={"axis": None, "block_sizes": None}) == own()


def test_own_algorithm_with_parameters() -> None:
    format = own("INT8_DEFAULT_CFG", algorithm={"method": "smoothquant", "alpha": 0.5})
    assert format.algorithm == {"method": "smoothquant", "alpha": 0.5}
    assert own("INT8_DEFAULT_CFG", algorithm="smoothquant").algorithm == {"method": "smoothquant"}


def test_own_bits_may_need_cuda() -> None:
    blocks = {-1: 32, "type": "dynamic", "scale_bits": [8, 0]}
    with pytest.raises(LayersenseError, match="`MINE` needs CUDA"):
        check_device(own("INT8_DEFAULT_CFG", weight={"axis": None, "block_sizes": blocks}), "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "FP8_DEFAULT"}, ["formats.MINE.base", "`FP8_DEFAULT_CFG`"]),
        ({"base": "FP8_KV_CFG"}, ["formats.MINE.base", "key-value cache"]),
        ({"weight": {"num_bit": 4}}, ["formats.MINE.weight.num_bit", "`num_bits`"]),
        ({"weight": {"num_bits": 16}}, ["formats.MINE.weight.num_bits", "from 2 to 8"]),
        ({"weight": {"num_bits": True}}, ["formats.MINE.weight.num_bits"]),
        ({"input": {"num_bits": [4, 4]}}, ["formats.MINE.input.num_bits", "[4, 3]"]),
        ({"input": {"num_bits": [[4], {}]}}, ["formats.MINE.input.num_bits", "[4, 3]"]),
        ({"input": {"num_bits": "e9m9"}}, ["formats.MINE.input.num_bits", "e9m9"]),
        ({"weight": {"num_bits": [3, 2]}}, ["formats.MINE.weight", "dynamic"]),
        ({"weight": {"effective_bits": 3}}, ["formats.MINE.weight.effective_bits", "leave it out"]),
        ({"weight": {"enable": False}}, ["formats.MINE.weight", "saves nothing"]),
        ({"weight": {"enable": "no"}}, ["formats.MINE.weight.enable", "true or false"]),
        ({"weight": {"block_sizes": 128}}, ["formats.MINE.weight.block_sizes", "mapping"]),
        ({"weight": {"block_sizes": {-1: 0}}}, ["formats.MINE.weight.block_sizes.-1", "positive"]),
        ({"weight": {"block_sizes": {"typ": "static"}}}, ["block_sizes.typ", "`type`"]),
        ({"weight": {"block_sizes": {"type": "static"}}}, ["block_sizes", "axis"]),
        ({"weight": {"block_sizes": {-1: 8, "type": "x"}}}, ["block_sizes.type", "`dynamic`"]),
        ({"weight": {"block_sizes": {-1: 8, "scale_bits": 8}}}, ["block_sizes.scale_bits"]),
        ({"weight": {"block_sizes": {-1: 8, "type": "dynamic"}}}, ["scale_bits"]),
        ({"weight": {"axis": 0, "block_sizes": {-1: 8}}}, ["`axis`", "`block_sizes`"]),
        ({"weight": {"calibrator": {1, 2}}}, ["formats.MINE.weight.calibrator", "JSON"]),
        ({"algorithm": "awq"}, ["formats.MINE.algorithm", "did you mean `awq_"]),
        ({"algorithm": {"method": ["max"]}}, ["formats.MINE.algorithm"]),
        ({"algorithm": "svdquant"}, ["formats.MINE.algorithm", "svdquant"]),
        (
            {"algorithm": {"method": "smoothquant", "alfa": 1}},
            ["formats.MINE.algorithm.alfa", "`alpha`"],
        ),
        (
            {"base": "W4A8_AWQ_BETA_CFG", "weight": {"num_bits": 8}},
            ["formats.MINE.weight", "2 quantizers"],
        ),
        (
            {"base": "INT8_WEIGHT_ONLY_CFG", "input": {"axis": 0}},
            ["formats.MINE.input.num_bits", "missing"],
        ),
    ],
)
def test_an_own_format_that_is_wrong(changes: dict[str, object], words: list[str]) -> None:
    message = refusal(**{"base": "FP8_DEFAULT_CFG", **changes})  # type: ignore[arg-type]
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        "FP8_ALL_LAYERS_CFG",
        "FP8_DEFAULT_CFG",
        "NVFP4_MLP_ONLY_ALL_LAYERS_CFG",
        "FP8_KV_CFG",
        "NONE",
    ],
)
def test_an_own_format_may_not_take_a_known_name(name: str) -> None:
    with pytest.raises(LayersenseError, match=rf"formats\.{name}: this name belongs"):
        resolve_format(name, {name: OwnFormat(base="FP8_DEFAULT_CFG")})


def test_settings_hold_all_of_a_format() -> None:
    for name, format in known_formats().items():
        assert format_from_settings(name, format_settings(format)) == format


def test_formats_import_no_torch() -> None:
    program = (
        "import sys, layersense.quantization.formats as f, layersense.quantization.layers\n"
        "f.known_formats()\n"
        "print(sorted({'torch', 'modelopt', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
