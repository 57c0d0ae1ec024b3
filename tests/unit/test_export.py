"""Checkpoints to ship: what can be written, how it is packed, what the check finds."""

import json
import shutil
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny_families
import torch
from result_files import measured
from safetensors.torch import load_file, save_file
from studies import sample_database, study
from tiny_families import qwen3_moe, qwen3_vl_moe, resnet
from tiny_models import edit_json, resolve_folder, save_tiny_llama, save_tiny_qwen2_5_vl
from transformers import Qwen3VLMoeForConditionalGeneration

from layersense.calibration.database import open_database
from layersense.config import OwnFormat, Verify
from layersense.errors import LayersenseError
from layersense.export import check as check_module
from layersense.export import job as job_module
from layersense.export import onnx_write, vllm_rules
from layersense.export.allow import WRITES, Written, make_plan, nearest_format, tensors, writes
from layersense.export.check import check_checkpoint
from layersense.export.job import export_scheme, metric_problems, recheck
from layersense.export.onnx_check import _Compared, weight_of
from layersense.export.store import read_exported
from layersense.export.unpack import unpack
from layersense.manifests.schema import encode_manifest
from layersense.models.tasks import get_task
from layersense.models.tasks.metrics import TopChoice, value_of
from layersense.models.tasks.protocol import Sampling
from layersense.quantization.formats import format_settings, known_formats, resolve_format
from layersense.verification.table import read_measured_recipes, verification_table

FP8, INT8 = "FP8_ALL_LAYERS_CFG", "INT8_ALL_LAYERS_CFG"
INT4 = "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"


# --- what can be written ---


def test_a_format_counts_by_what_it_does():
    assert writes(resolve_format("W8A8_FP8_FP8", {})) == WRITES[FP8]
    # Written as INT8 SmoothQuant, whatever the activations are.
    assert writes(resolve_format("W8A8_INT8_FP8", {})) is None
    # Written as AWQ, without its scales.
    assert writes(known_formats()[INT4]) is None
    own = {"MINE": OwnFormat(base="INT8_DEFAULT_CFG", weight={"axis": None})}
    assert writes(resolve_format("MINE", own)) is None


def test_the_nearest_format_has_the_same_weights():
    assert nearest_format(known_formats()[INT4]) == "INT4_AWQ_ALL_LAYERS_CFG"
    assert nearest_format(resolve_format("W8A8_INT8_FP8", {})).startswith("INT8")
    assert nearest_format(known_formats()["NVFP4_FOUR_OVER_SIX_ALL_LAYERS_CFG"]).startswith("NVFP4")


@pytest.mark.parametrize("name", WRITES)
def test_written_tensors_take_the_bits_of_the_format(name):
    written, known = WRITES[name], known_formats()[name]
    shapes = tensors(written, (4096, 8192), "BF16")
    width = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}
    total = sum(width[dtype] * torch.Size(shape).numel() for dtype, shape in shapes.values())
    bits = 8 * total / (4096 * 8192)
    # AWQ's scales are billed with 16 bits and written with 32: by 128, another eighth of a bit.
    extra = 16 / 128 if written.layout == "int4" else 0
    assert bits == pytest.approx(known.effective_bits + extra, rel=0.01)


# --- how it is packed ---


def test_4_bit_integers_are_unpacked_by_hand():
    # Outputs 0 and 1 of two inputs: 7 and -8, -1 and 3; a scale for each output.
    packed = torch.tensor([[0x87, 0x3F]], dtype=torch.uint8)
    scale = torch.tensor([[0.5], [2.0]])
    values, steps = unpack(
        Written(algo="W4A16_AWQ", layout="int4", block=2),
        {"weight": packed, "weight_scale": scale},
    )
    assert values.tolist() == [[3.5, -0.5], [-16.0, 6.0]]
    assert steps.tolist() == [[0.5, 0.5], [2.0, 2.0]]


def test_4_bit_floats_are_unpacked_by_hand():
    # Inputs 0 and 1: codes 7 (6.0) and 9 (-0.5); then 15 (-6.0) and 2 (1.0).
    packed = torch.tensor([[0x97, 0x2F]], dtype=torch.uint8)
    values, steps = unpack(
        Written(algo="NVFP4", layout="nvfp4", block=2, second_scale=True),
        {
            "weight": packed,
            "weight_scale": torch.tensor([[2.0, 8.0]]).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(0.5),
        },
    )
    assert values.tolist() == [[6.0, -0.5, -24.0, 4.0]]
    assert steps.tolist() == [[2.0, 0.5, 8.0, 2.0]]


def test_8_bit_floats_have_the_steps_of_torch():
    # All finite positive codes, in order: the step is the distance to the next one.
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, -1)
    values, steps = unpack(
        Written(algo="FP8", layout="fp8"), {"weight": codes, "weight_scale": torch.tensor(3.0)}
    )
    assert torch.equal(values, codes.float() * 3)
    assert torch.allclose(steps[0, :-1], values[0].diff())


def test_exponents_alone_are_scales_of_mx():
    codes = torch.ones(1, 64).to(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 120]], dtype=torch.uint8)
    values, _ = unpack(
        Written(algo="MXFP8", layout="mxfp8", block=32), {"weight": codes, "weight_scale": scale}
    )
    assert values[0].tolist() == [1.0] * 32 + [2.0**-7] * 32


# --- what vLLM reads ---


def _configs(algorithm, ignore=(), **more):
    section = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": list(ignore), **more}
    separate = {"quantization": {"quant_algo": algorithm, "exclude_modules": list(ignore)}}
    return {"quantization_config": section}, separate


def test_vllm_reads_a_checkpoint_of_one_algorithm():
    config, separate = _configs("FP8", ["lm_head", "model.layers.0*"])
    quantized = dict.fromkeys([f"model.layers.1.self_attn.{name}_proj" for name in "qkv"], "FP8")
    assert vllm_rules.problems(config, separate, quantized) == []


@pytest.mark.parametrize(
    ("algorithm", "ignore", "quantized", "words"),
    [
        ("W4A16_AWQ", [], {"model.layers.0.mlp.down_proj": "W4A16_AWQ"}, "none that vLLM reads"),
        # `layers.1` stands in `layers.10`, and vLLM looks for parts of names.
        ("FP8", ["layers.1"], {"model.layers.10.mlp.down_proj": "FP8"}, "also matches"),
        ("FP8", [], {"visual.blocks.0.attn.qkv": "FP8"}, "vision tower"),
        (
            "FP8",
            ["model.layers.0.self_attn.k_proj"],
            {"model.layers.0.self_attn.q_proj": "FP8"},
            "loads q_proj, k_proj as one",
        ),
        ("MIXED_PRECISION", [], {"model.layers.0.mlp.down_proj": "FP8"}, "quantized_layers"),
    ],
)  # fmt: skip
def test_vllm_would_misread(algorithm, ignore, quantized, words):
    config, separate = _configs(algorithm, ignore)
    found = vllm_rules.problems(config, separate, quantized, others=ignore)
    assert any(words in line for line in found)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj",  # Nemotron's MLP has no gate
        "model.layers.0.self_attn.q_proj",  # DeepSeek's attention makes keys and values otherwise
        "model.layers.0.self_attn.query",
    ],
)
def test_parts_that_a_model_does_not_have_differ_from_none(name):
    others = ["lm_head", "model.layers.0.self_attn.kv_a_proj_with_mqa"]
    config, separate = _configs("FP8", others)
    assert vllm_rules.problems(config, separate, {name: "FP8"}, others=others) == []


def test_vllm_mixes_what_it_knows():
    layers = {"model.layers.0.mlp.down_proj": "FP8", "visual.merger.mlp.0": "NVFP4"}
    listed = {name: {"quant_algo": algo} for name, algo in layers.items()}
    config, separate = _configs("MIXED_PRECISION", quantized_layers=listed)
    assert vllm_rules.problems(config, separate, layers) == []
    listed["visual.merger.mlp.0"] = {"quant_algo": "W8A16"}
    layers["visual.merger.mlp.0"] = "W8A16"
    assert vllm_rules.problems(config, separate, layers) == ["W8A16 cannot stand in a mix"]


# --- a real export ---


class Shop:
    """A scored model whose recipe is chosen by hand, and where its checkpoint goes."""

    def __init__(self, checkpoint, database, manifest):
        self.checkpoint, self.database, self.manifest = checkpoint, database, manifest
        self.folder = checkpoint / "study"

    def choose(self, pick):
        """Give every group the format whose index `pick` returns; the last one is NONE."""
        for number, (handle, group) in enumerate(self.manifest.layer_sensitivity.items()):
            group.selected = group.formats[pick(number, handle)]
        (self.folder / "manifest.json").write_bytes(encode_manifest(self.manifest))

    def export(self, out, verification_file=None):
        return export_scheme(
            self.folder / "manifest.json",
            model_file=self.folder / "model.json",
            database_file=self.database,
            verification_file=verification_file,
            out=out / "checkpoint.json",
        )


def make_shop(tmp_path_factory, save, task, formats, **run):
    folder = tmp_path_factory.mktemp("shop")
    checkpoint = save(folder / "model")
    found = study(folder, checkpoint, task, formats=formats, **run)
    return Shop(checkpoint, sample_database(folder), found.manifest)


TEXT = {"modality": "text", "max_length": 16, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    def save(folder):
        return save_tiny_llama(folder, tied=True)

    return make_shop(tmp_path_factory, save, "causal-lm", [FP8, INT8], **TEXT)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return make_shop(tmp_path_factory, save_tiny_qwen2_5_vl, "image-text-to-text", [FP8])


@pytest.fixture(scope="module")
def mixed(llama, tmp_path_factory):
    """A mix of FP8, INT8 and nothing, with a packed head."""
    llama.choose(lambda number, handle: 0 if "lm_head" in handle else number % 3)
    out = tmp_path_factory.mktemp("mixed")
    chosen = {
        name: group.selected.partition("(")[0]
        for group in llama.manifest.layer_sensitivity.values()
        for name in group.module_names
    }
    return llama.export(out), out, chosen


@pytest.fixture
def shipped(mixed, tmp_path):
    """The same, to be damaged."""
    exported, out, _ = mixed
    return exported, shutil.copytree(out, tmp_path / "shipped")


def test_a_mixed_recipe_is_written_as_it_is(llama, mixed):
    exported, out, chosen = mixed
    folder = out / "checkpoint"
    before = load_file(llama.checkpoint / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert set(chosen.values()) == {FP8, INT8, "NONE"}
    for name, format in chosen.items():
        weight = after[f"{name}.weight"]
        source = "model.embed_tokens" if name == "lm_head" else name
        original = before[f"{source}.weight"].float()
        if format == "NONE":
            assert torch.equal(weight, before[f"{name}.weight"].to(torch.bfloat16))
            assert f"{name}.weight_scale" not in after
            continue
        scale = after[f"{name}.weight_scale"]
        values = weight.float() * (scale[:, None] if format == INT8 else scale)
        # Half a step of the format, and the rounding to bfloat16: by the formats' definitions.
        bound = (scale[:, None] / 2 if format == INT8 else original.abs() / 16 + scale * 2**-10) + (
            original.abs() / 128
        )
        assert ((values - original).abs() <= bound).all(), name
        assert after[f"{name}.input_scale"] > 0
    layers = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    algos = {FP8: "FP8", INT8: "W8A8_SQ_PER_CHANNEL"}
    assert {name: entry["quant_algo"] for name, entry in layers["quantized_layers"].items()} == {
        name: algos[format] for name, format in chosen.items() if format != "NONE"
    }
    assert exported.checked.problems == []
    assert exported.checked.compared == sum(format != "NONE" for format in chosen.values())
    assert exported.checked.vllm == ["W8A8_SQ_PER_CHANNEL cannot stand in a mix"]


def test_a_packed_head_is_no_longer_tied(mixed):
    _, out, _ = mixed
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    after = load_file(out / "checkpoint" / "model.safetensors")
    assert after["lm_head.weight"].dtype == torch.float8_e4m3fn
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_what_belongs_to_a_checkpoint_comes_along(llama, mixed):
    exported, out, _ = mixed
    folder = out / "checkpoint"
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (llama.checkpoint / name).read_bytes()
    card = (folder / "README.md").read_text()
    assert f"| {FP8} |" in card
    assert "vLLM does not read this checkpoint as it is meant" in card
    assert "Its damage was not measured" in card
    over = exported.checked.quantized_bytes / exported.predicted_bytes - 1
    assert f"{over:+.1%} of what the recipe's bits predict" in card
    assert exported.files == {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {file.name for file in out.iterdir()} == {
        "checkpoint", "checkpoint.json", ".checkpoint.json.lock"
    }  # fmt: skip


@pytest.mark.slow
def test_the_card_tells_what_was_measured(llama, tmp_path):
    llama.choose(lambda number, handle: number % 2)
    options = Verify(points=1, random=4)
    manifest = llama.manifest
    table = tmp_path / "verification.parquet"

    def verify(scale):
        found = measured([manifest], options, scale)
        pq.write_table(verification_table([manifest], found, options), table)
        return llama.export(tmp_path, table), (tmp_path / "checkpoint" / "README.md").read_text()

    _, card = verify(lambda handle, format: 1.0)
    found = read_measured_recipes(table)
    (own,) = (row for row in found.rows if row["role"] == "scheme")
    assert f"KL to the unquantized model {own['kl']:.3g} nats (95 %: {own['kl_low']:.3g}" in card
    assert found.summary.verdicts[0].sentence in card
    assert (
        " By what the task is judged by: token accuracy 40.0% (95 %: 35.0% to 44.0%), -10.0 points "
        "(95 %: -13.0 to -8.0) against the unquantized model; word errors 14.2 words." in card
    )
    assert "order by measured KL" not in card
    rows = pq.read_table(table)
    pq.write_table(rows.filter(pc.field("kind") != "recipe"), table)
    llama.export(tmp_path, table)
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "Not measured: this recipe is not among those that the run verified." in card
    # A second export writes the card alone: here with a score that predicts nothing.
    ranks = {handle: 10.0 ** (3 * n) for n, handle in enumerate(manifest.layer_sensitivity)}
    scores = {handle: group.scores[0] for handle, group in manifest.layer_sensitivity.items()}
    _, card = verify(lambda handle, format: 1 / (ranks[handle] * scores[handle]))
    assert "the order by score is the order by measured KL only with" in card


def _edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip


def _drop(tensors, name):
    del tensors[name]


FIRST = "model.layers.0.self_attn.q_proj"
DAMAGES = {
    "a lost scale": (lambda t: _drop(t, f"{FIRST}.input_scale"), "input_scale is missing"),
    "a lost weight": (lambda t: _drop(t, "model.norm.weight"), "model.norm.weight: is missing"),
    "a scale of nothing": (
        lambda t: t.update({f"{FIRST}.pre_quant_scale": torch.ones(64)}),
        "which FP8 has not",
    ),
    "a norm": (lambda t: t["model.norm.weight"].mul_(1.1), "is not the original's"),
    "a type": (
        lambda t: t.update({f"{FIRST}.weight": t[f"{FIRST}.weight"].to(torch.bfloat16)}),
        "expected F8_E4M3",
    ),
    "an odd tensor": (lambda t: t.update({"odd": torch.ones(2)}), "belongs to nothing"),
    "not a number": (
        lambda t: t.update({f"{FIRST}.weight_scale": torch.tensor(float("nan"))}),
        "not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_check_finds(damage, shipped):
    exported, out = shipped
    change, words = DAMAGES[damage]
    assert not any(words in problem for problem in recheck(out / "checkpoint.json"))
    _edit_tensors(out / "checkpoint", change)
    assert any(words in problem for problem in recheck(out / "checkpoint.json"))
    assert exported.expected.quantized[FIRST] == FP8


# --- mixtures of experts ---

MIX = {"layers.0.mlp.experts": FP8, "layers.1.mlp.experts": "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make_shop(tmp_path_factory, qwen3_moe, "causal-lm", [*MIX.values()], **TEXT)


def _pick(shop, format_of):
    """Choose formats by name."""

    def pick(number, handle):
        labels = shop.manifest.layer_sensitivity[handle].formats
        return [label.partition("(")[0] for label in labels].index(format_of(handle))

    shop.choose(pick)


@pytest.mark.slow
def test_fused_experts_are_written_one_by_one(mixture, tmp_path):
    _pick(mixture, lambda handle: next((MIX[part] for part in MIX if part in handle), FP8))
    exported = mixture.export(tmp_path)
    assert exported.kept == {}
    before = load_file(mixture.checkpoint / "model.safetensors")
    after = load_file(tmp_path / "checkpoint" / "model.safetensors")
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 6 * 3
    for name in experts:
        module, original = name.removesuffix(".weight"), before[name].float()
        values, scale = after[name].float(), after[f"{module}.weight_scale"]
        if "layers.0" in name:  # FP8: half a step, by the format's definition, and bfloat16's own
            assert after[name].dtype == torch.float8_e4m3fn
            bound = original.abs() / 16 + scale * 2**-10
            # A runtime loads gate and up as one weight, with one scale.
            halves = [module] if "down" in module else [
                f"{module.rpartition('.')[0]}.{half}_proj" for half in ("gate", "up")
            ]  # fmt: skip
            largest = max(before[f"{half}.weight"].float().abs().max() for half in halves)
            assert scale == pytest.approx(float(largest) / 448, rel=0.01)
            assert after[f"{module}.input_scale"] > 0
        else:
            assert after[name].dtype == torch.int8
            scale = scale[:, None]
            bound = scale / 2
        assert ((values * scale - original).abs() <= bound + original.abs() / 128).all(), name
    listed = json.loads((tmp_path / "checkpoint" / "hf_quant_config.json").read_text())
    layers = listed["quantization"]["quantized_layers"]
    assert layers["model.layers.1.mlp.experts"]["quant_algo"] == "W8A16"
    assert any("vLLM does not read experts of W8A16" in line for line in exported.checked.vllm)
    # A lost expert is found.
    _edit_tensors(tmp_path / "checkpoint", lambda t: _drop(t, f"{experts[0]}_scale"))
    assert f"{experts[0].removesuffix('.weight')}: its weight_scale is missing" in recheck(
        tmp_path / "checkpoint.json"
    )


@pytest.mark.slow
def test_experts_that_stay_unquantized_are_written_one_by_one_too(tmp_path_factory, tmp_path):
    shop = make_shop(tmp_path_factory, qwen3_vl_moe, "image-text-to-text", [FP8])
    _pick(shop, lambda handle: "NONE" if "experts" in handle else FP8)
    shop.export(tmp_path)
    after = load_file(tmp_path / "checkpoint" / "model.safetensors")
    name = "model.language_model.layers.1.mlp.experts"
    # This model's own checkpoints hold them as one tensor.
    assert f"{name}.gate_up_proj" in load_file(shop.checkpoint / "model.safetensors")
    assert f"{name}.gate_up_proj" not in after
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(shop.checkpoint)
    experts = model.get_submodule(name)
    gate, up = experts.gate_up_proj[3].split(experts.down_proj.shape[2])
    for part, weight in (("gate", gate), ("up", up), ("down", experts.down_proj[3])):
        written = after[f"{name}.3.{part}_proj.weight"]
        assert torch.equal(written, weight.to(written.dtype)), part


def test_awq_is_refused_beside_fused_experts(mixture):
    manifest = msgspec.convert(msgspec.to_builtins(mixture.manifest), type(mixture.manifest))
    known = format_settings(known_formats()["INT4_AWQ_ALL_LAYERS_CFG"])
    for run in manifest.run.values():
        run.settings["format"] = known
    _pick(mixture, lambda handle: FP8)
    for handle, group in manifest.layer_sensitivity.items():
        group.selected = mixture.manifest.layer_sensitivity[handle].selected
    with pytest.raises(LayersenseError, match="beside fused experts"):
        make_plan(manifest)


def test_the_check_compares_packed_weights_with_what_was_simulated(shipped):
    exported, out = shipped
    expected = exported.expected
    folder = out / "checkpoint"
    stored = load_file(folder / "model.safetensors")

    def simulated(shift):
        for module in expected.quantized:
            scale = stored[f"{module}.weight_scale"]
            values = stored[f"{module}.weight"].float() * (scale[:, None] if scale.ndim else scale)
            yield f"{module}.weight", values.roll(shift, dims=1)

    sound = check_checkpoint(folder, expected, simulated(0))
    assert (sound.problems, sound.differing, sound.worst_steps) == ([], 0.0, 0.0)
    shifted = check_checkpoint(folder, expected, simulated(1))
    assert len(shifted.problems) == len(expected.quantized)
    assert "is not the simulated one" in shifted.problems[0]
    nothing = check_checkpoint(folder, expected, iter(()))
    assert "were not compared" in nothing.problems[0]


@pytest.mark.parametrize("name", ["INT4_AWQ_ALL_LAYERS_CFG", "NVFP4_ALL_LAYERS_CFG", FP8,
                                  "FP8_2D_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG", INT8])  # fmt: skip
def test_a_large_weight_is_compared_some_rows_at_a_time(name, monkeypatch):
    written = WRITES[name]
    generator = torch.Generator().manual_seed(0)
    types = {"F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8,
             "I8": torch.int8}  # fmt: skip
    found = {}
    for suffix, (dtype, shape) in tensors(written, (512, 256), "BF16").items():
        if suffix in ("weight", "weight_scale", "weight_scale_2"):
            high = 100 if suffix == "weight" else 8
            drawn = torch.randint(1, high, shape, generator=generator)
            found[suffix] = drawn.float().to(types[dtype])
    whole, _ = unpack(written, found)
    whole[300, 7] += 1e6
    for size in (2**24, 128 * 256):
        monkeypatch.setattr(check_module, "CHUNK", size)
        largest, differing = check_module._distance(written, found, whole)
        assert differing == 1
        assert largest > 100


def test_the_check_reads_the_lists(shipped):
    exported, out = shipped
    file = out / "checkpoint" / "hf_quant_config.json"
    content = json.loads(file.read_text())
    left = dict(content["quantization"]["quantized_layers"])
    del left[FIRST]
    content["quantization"]["quantized_layers"] = left
    file.write_text(json.dumps(content))
    found = check_checkpoint(out / "checkpoint", exported.expected, None)
    assert [problem for problem in found.problems if FIRST in problem]


def test_a_checkpoint_of_one_format_lists_what_it_leaves_out(llama, tmp_path):
    llama.choose(lambda number, handle: 2 if "layers.0" in handle else 0)
    exported = llama.export(tmp_path)
    file = tmp_path / "checkpoint" / "hf_quant_config.json"
    listed = json.loads(file.read_text())["quantization"]["exclude_modules"]
    assert {name.rstrip("*.") for name in listed} == {"model.embed_tokens", "model.layers.0"}
    assert exported.checked.vllm == []
    edit_json(file, quantization={"quant_algo": "FP8", "exclude_modules": ["lm_head"]})
    found = check_checkpoint(tmp_path / "checkpoint", exported.expected, None)
    assert "hf_quant_config.json: excludes lm_head, which is quantized" in found.problems
    left = [line for line in found.problems if "does not exclude model.layers.0." in line]
    assert len(left) == 7


@pytest.mark.slow
def test_a_convolution_stays_unquantized(vlm, tmp_path):
    vlm.choose(lambda number, handle: 0)
    exported = vlm.export(tmp_path)
    (reason,) = exported.kept.values()
    assert reason.endswith("packs linear layers, and this is Conv3d")
    assert exported.effective_bits > exported.effective_bits_asked == 8.0
    after = load_file(tmp_path / "checkpoint" / "model.safetensors")
    before = load_file(vlm.checkpoint / "model.safetensors")
    # The names of the original checkpoint, not those of the loaded model.
    assert set(before) <= set(after)
    patch = "visual.patch_embed.proj.weight"
    assert torch.equal(after[patch], before[patch])
    assert after["visual.blocks.0.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    assert any("vision tower" in problem for problem in exported.checked.vllm)
    assert reason in (tmp_path / "checkpoint" / "README.md").read_text()


def test_a_key_value_cache_comes_with_its_scales(llama, tmp_path):
    llama.manifest.scheme.kv_cache = "fp8"
    try:
        llama.choose(lambda number, handle: 0)
        exported = llama.export(tmp_path)
    finally:
        llama.manifest.scheme.kv_cache = "none"
    folder = tmp_path / "checkpoint"
    after = load_file(folder / "model.safetensors")
    for block in (0, 1):
        for letter in "kv":
            name = f"model.layers.{block}.self_attn.{letter}_proj.{letter}_scale"
            assert after[name] > 0
    content = json.loads((folder / "hf_quant_config.json").read_text())
    assert content["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert "| key-value cache | FP8 |" in (folder / "README.md").read_text()
    assert exported.checked.vllm == []
    _edit_tensors(folder, lambda t: _drop(t, "model.layers.1.self_attn.v_proj.v_scale"))
    (problem,) = check_checkpoint(folder, exported.expected, None).problems
    assert problem == "model.layers.1.self_attn.v_proj.v_scale: is missing"


def test_a_format_that_cannot_be_written_is_refused_before_anything_is_loaded(
    llama, tmp_path, monkeypatch
):
    def nothing_is_loaded(*args):
        raise AssertionError

    monkeypatch.setattr(job_module, "_export", nothing_is_loaded)
    llama.choose(lambda number, handle: number % 2)
    manifest = llama.manifest
    settings = manifest.run[INT8].settings
    sound = settings["format"]
    settings["format"] = {**sound, "input": [{"num_bits": [4, 3]}]}
    try:
        llama.choose(lambda number, handle: number % 2)
        with pytest.raises(LayersenseError, match="nearest recipe that can be exported") as error:
            llama.export(tmp_path)
    finally:
        settings["format"] = sound
    assert f"{FP8} instead of {INT8}" in str(error.value)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_a_recipe_is_written_once(llama, tmp_path, monkeypatch):
    llama.choose(lambda number, handle: 0)
    first = llama.export(tmp_path)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (tmp_path / "checkpoint" / "README.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "_export", lambda *args: pytest.fail("exported again"))
        again = llama.export(tmp_path)
    assert weights.stat().st_mtime_ns == written
    assert (again.digest, again.files) == (first.digest, first.files)
    llama.choose(lambda number, handle: number % 3)
    other = llama.export(tmp_path)
    assert other.digest != first.digest
    assert read_exported(tmp_path / "checkpoint.json").quant_algo == "MIXED_PRECISION"
    # A file that somebody touched is written again too.
    weights.write_bytes(weights.read_bytes()[:-1])
    assert llama.export(tmp_path).checked.problems == []


@pytest.mark.slow
def test_nothing_half_is_left_by_a_full_disk(llama, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", small], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here (needs root)")
    try:
        llama.choose(lambda number, handle: number % 3)
        with monkeypatch.context() as patch:
            # The space is looked at first, and another process may take it afterwards.
            patch.setattr(job_module, "_check_space", lambda *args: None)
            with pytest.raises(LayersenseError, match="free disk space"):
                llama.export(small)
        assert {file.name for file in small.iterdir()} == {".checkpoint.json.lock"}
        with pytest.raises(LayersenseError, match="GB left"):
            job_module._check_space(small, 1e9)
    finally:
        subprocess.run(["umount", small], check=True)


def _no_space(folder, needed):
    raise LayersenseError("the disk has 0.00 GB left")


@pytest.mark.slow
def test_a_kill_leaves_the_earlier_checkpoint(llama, tmp_path, monkeypatch):
    llama.choose(lambda number, handle: 0)
    earlier = llama.export(tmp_path)
    llama.choose(lambda number, handle: number % 3)
    code = f"""
import os, pathlib
from layersense.export import job
job._put_in_place = lambda new, target: os.kill(os.getpid(), 9)
folder = pathlib.Path({str(llama.folder)!r})
job.export_scheme(folder / "manifest.json", model_file=folder / "model.json",
    database_file=pathlib.Path({str(llama.database)!r}), verification_file=None,
    out=pathlib.Path({str(tmp_path / "checkpoint.json")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / ".checkpoint.part").is_dir()
    assert recheck(tmp_path / "checkpoint.json") == []
    assert read_exported(tmp_path / "checkpoint.json").digest == earlier.digest
    # Killed between both renames, the earlier one stands aside: the next export takes it back
    # before it does anything that may fail.
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.old")
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "_check_space", _no_space)
        with pytest.raises(LayersenseError, match="GB left"):
            llama.export(tmp_path)
    assert recheck(tmp_path / "checkpoint.json") == []
    shutil.copytree(tmp_path / "checkpoint", tmp_path / ".checkpoint.old")
    llama.export(tmp_path)
    assert {file.name for file in tmp_path.glob(".checkpoint.*")} == {".checkpoint.json.lock"}


def test_the_real_vllm_loads_it(llama, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    llama.choose(lambda number, handle: 0)
    llama.export(tmp_path)
    assert recheck(tmp_path / "checkpoint.json", load_in_vllm=True) == []


def test_plans_look_at_shapes(vlm):
    vlm.choose(lambda number, handle: 0)
    handle = next(h for h in vlm.manifest.layer_sensitivity if "mlp.down_proj" in h)
    manifest = vlm.manifest
    plan = make_plan(manifest)
    assert plan.recipe[handle] == FP8
    settings = manifest.run[FP8].settings
    sound = settings["format"]
    blocks = known_formats()["NVFP4_ALL_LAYERS_CFG"]
    settings["format"] = {
        "weight": list(blocks.weight), "input": list(blocks.input), "algorithm": {"method": "max"},
    }  # fmt: skip
    try:
        shapes = {
            name: [(64, 40 if name in manifest.layer_sensitivity[handle].module_names else 64)]
            for name in manifest.layers
        }
        plan = make_plan(manifest, shapes)
    finally:
        settings["format"] = sound
    assert plan.recipe[handle] == "NONE"
    assert "40 inputs are no multiple of 16" in plan.kept[handle]
    assert sum(name != "NONE" for name in plan.recipe.values()) > 1


# --- ONNX ---


def test_a_node_says_whose_weight_it_quantizes():
    assert weight_of("/whole/head/weight_quantizer/QuantizeLinear") == "head"
    # A list of modules is not called, a sequence is.
    called = "/whole/layer2/layer2.0/downsample/downsample.0/weight_quantizer/QuantizeLinear"
    assert weight_of(called) == "layer2.0.downsample.0"
    assert weight_of("/whole/vit/encoder/layer.1/fc/weight_quantizer/Q") == "vit.encoder.layer.1.fc"
    assert weight_of("/whole/head/input_quantizer/QuantizeLinear") is None
    # YOLO's own list of layers is called `model`; what calls parts alone is not called itself.
    assert weight_of("/whole/model.0/conv/weight_quantizer/QuantizeLinear") == "model.0.conv"
    assert weight_of("/whole.backbone/body/conv1/weight_quantizer/Q") == "backbone.body.conv1"


def test_queries_are_compared_whatever_their_order():
    compared = _Compared()
    logits = np.random.default_rng(0).normal(size=(2, 6, 4))
    other = logits + 1.0
    batch = {"simulated.logits": logits, "before.logits": other, "again.logits": logits}
    compared.add({"logits": logits[:, ::-1]}, batch)
    found = compared.result()
    assert (found.agreement, found.distance, found.samples) == (1.0, 0.0, 2)
    assert list(compared.problems()) == []
    compared.add({"logits": other}, batch)
    compared.add({"logits": other}, batch)
    (problem,) = compared.problems()
    assert "are not the simulated ones" in problem
    # What the simulated model itself does not repeat is no fault of the file.
    for _ in range(3):
        compared.add({"logits": logits}, {**batch, "again.logits": logits - 1})
    assert list(compared.problems()) == []


def judged(right_in_onnx, right_simulated):
    """What top-1 accuracy says of a file and of the simulated model, image by image."""
    records = {
        name: [[one, 1] for one in right]
        for name, right in (
            ("onnx", right_in_onnx), ("simulated", right_simulated), ("unquantized", [1, 1])
        )
    }  # fmt: skip
    return onnx_write._judged(TopChoice("top-1 accuracy"), records)


def test_a_metric_of_a_file_may_be_a_point_off_beyond_the_noise_of_the_images():
    # A fifth of 60 images lost: 95 % of the resamples lose 10 % to 30 %.
    simulated = [1] * 48 + [0] * 12
    lost = judged([1] * 36 + [0] * 24, simulated)
    assert (lost.onnx, lost.simulated, lost.unquantized) == (0.6, 0.8, 1.0)
    assert lost.apart_low == pytest.approx(-0.3, abs=0.04)
    assert lost.apart_high == pytest.approx(-0.1, abs=0.04)
    (problem,) = metric_problems([lost])
    assert "top-1 accuracy is 60.0%, and that of the simulated model 80.0%" in problem
    # What is gained is no less off, and what is the same is not.
    assert len(metric_problems([judged([1] * 60, simulated), lost])) == 2
    assert metric_problems([judged(simulated, simulated)]) == []
    # One image of two, or of sixty, may fall either way.
    assert metric_problems([judged([1, 0], [1, 1])]) == []
    assert metric_problems([judged([1] * 47 + [0] * 13, simulated)]) == []
    # A single one has no interval.
    alone = judged([0], [1])
    assert (alone.apart_low, metric_problems([alone])) == (None, [])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    def save(folder):
        folder.mkdir()
        return resnet(folder)

    return make_shop(tmp_path_factory, save, "image-classification", [FP8, INT8])


def test_a_classifier_is_written_as_onnx_and_computes_the_same(pictures, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pictures.choose(lambda number, handle: number % 3)
    exported = pictures.export(tmp_path)
    file = tmp_path / "checkpoint" / "model.onnx"
    chosen = {
        name: group.selected.partition("(")[0]
        for group in pictures.manifest.layer_sensitivity.values()
        for name in group.module_names
    }
    model = onnx.load(file)
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {weight_of(node.name) for node in nodes} - {None} == {
        name for name, format in chosen.items() if format != "NONE"
    }
    zeros = {
        node.output[0]: node.attribute[0].t.data_type
        for node in model.graph.node
        if node.op_type == "Constant"
    }
    zeros |= {entry.name: entry.data_type for entry in model.graph.initializer}
    types = [zeros.get(node.input[2]) for node in nodes]
    # One for the weight and one for the input of each FP8 layer.
    assert types.count(onnx.TensorProto.FLOAT8E4M3FN) == 2 * list(chosen.values()).count(FP8)
    assert {node.domain for node in model.graph.node} == {""}
    found = exported.checked.onnx
    assert found.samples == 5
    assert found.distance < 1e-3
    assert exported.quant_algo == "FP8 and INT8"
    assert (tmp_path / "checkpoint" / "preprocessor_config.json").exists()
    assert "onnxruntime" in (tmp_path / "checkpoint" / "README.md").read_text()
    assert recheck(tmp_path / "checkpoint.json") == []
    for number, node in enumerate(nodes):
        if weight_of(node.name):
            node.name = f"renamed_{number}"
    onnx.save(model, file)
    problems = recheck(tmp_path / "checkpoint.json")
    assert sum("has no Q/DQ nodes" in problem for problem in problems) == len(
        exported.expected.quantized
    )


def test_a_file_that_is_worse_than_the_model_is_not_put_in_place(pictures, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pictures.choose(lambda number, handle: number % 3)
    lost = judged([0] * 40 + [1] * 20, [1] * 60)
    monkeypatch.setattr(onnx_write.Heldout, "judge", lambda heldout, file: [lost])
    with pytest.raises(LayersenseError, match=r"accuracy is 33.3%.*nothing was put in place"):
        pictures.export(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".checkpoint.json.lock"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "metric"),
    [
        ("segformer", "semantic-segmentation", "mean IoU"),
        ("yolos", "object-detection", "mAP@[.5:.95]"),
    ],
)
def test_the_metric_of_an_onnx_file_stands_beside_the_models_own(
    family, task, metric, tmp_path_factory, tmp_path
):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    modality = {"semantic-segmentation": "image_masks", "object-detection": "image_boxes"}[task]
    save = getattr(tiny_families, family)
    shop = make_shop(tmp_path_factory, save, task, [INT8], modality=modality, batch_size=2)
    shop.choose(lambda number, handle: 0)
    (found,) = shop.export(tmp_path).metrics
    assert found.name == metric
    # By hand: the unquantized model on the held-out rows, as its task runs it.
    own = get_task(task)
    loaded = own.load(resolve_folder(shop.checkpoint, task), dtype="float32", device="cpu")
    with open_database(shop.database) as database:
        rows = database.rows("image", "heldout")
    (judge,), records = own.metrics(loaded), []
    for batch in own.batches(loaded, rows, Sampling(0, modality), 1):
        with torch.no_grad():
            output = own.forward(loaded.model, batch)
            records += judge.records(output, own.supervised_logits(output, batch), batch)
    assert found.unquantized == pytest.approx(value_of(judge, records), abs=1e-6)
    assert found.onnx == pytest.approx(found.simulated, abs=0.02)
    assert found.apart_low <= found.onnx - found.simulated <= found.apart_high
    card = (tmp_path / "checkpoint/README.md").read_text()
    assert f"The task's own metric, {metric}, is {found.onnx:.1%} there" in card


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ssdlite", "retinanet", "fcos", "yolo"])
def test_detectors_of_other_libraries_are_written_as_onnx(family, tmp_path_factory, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    modality = {"modality": "image_boxes", "batch_size": 2}
    save = getattr(tiny_families, family)
    shop = make_shop(tmp_path_factory, save, "object-detection", [INT8], **modality)
    shop.choose(lambda number, handle: 0 if "head" in handle or ".22." in handle else 1)
    exported = shop.export(tmp_path)
    found = exported.checked.onnx
    assert found.distance < max(0.1, 3 * found.noise)
    assert [metric.name for metric in exported.metrics] == ["mAP@[.5:.95]"]
    # The file alone, against the model before it was quantized: boxes of the same places.
    session = onnxruntime.InferenceSession(str(tmp_path / "checkpoint/model.onnx"))
    task = get_task("object-detection")
    loaded = task.load(
        resolve_folder(shop.checkpoint, "object-detection"), dtype="float32", device="cpu"
    )
    with open_database(shop.database) as database:
        rows = database.rows("image", "heldout")
    (batch, *_) = task.batches(loaded, rows, Sampling(0, "image_boxes"), 3)
    logits, boxes = session.run(None, {"pixel_values": batch.inputs["pixel_values"].numpy()})
    with torch.no_grad():
        own = task.forward(loaded.model, batch)
    assert logits.shape == own.logits.shape
    assert boxes.shape == (*own.logits.shape[:2], 4)
    assert np.corrcoef(logits.flat, own.logits.flatten())[0, 1] > 0.99
    corners = own.boxes().numpy()
    middles = (corners[..., :2] + corners[..., 2:]) / 2
    assert np.corrcoef(boxes[..., :2].flat, middles.flat)[0, 1] > 0.99


@pytest.mark.slow
def test_a_yolo_of_two_heads_is_refused_before_it_is_quantized(tmp_path_factory, tmp_path):
    save, task = tiny_families.yolo26, "object-detection"
    shop = make_shop(tmp_path_factory, save, task, [INT8], modality="image_boxes", batch_size=2)
    shop.choose(lambda number, handle: 0)
    with pytest.raises(LayersenseError, match="two heads"):
        shop.export(tmp_path)
