"""Reading and checking manifests: ours, the older generations, and broken ones."""

import json
import subprocess
import sys

import jsonschema
import pytest
import score_files as sf

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.json_schema import PATH, manifest_schema
from layersense.manifests.read import read_manifest, read_own_manifest, validate_manifest
from layersense.manifests.schema import encode_manifest
from layersense.recipes.decide import build_manifest

FP8, INT8, INT4 = sf.FORMATS


@pytest.fixture
def ours(tmp_path):
    scheme = config.Scheme(quant_formats=[FP8, INT4], effective_bits=6)
    path = tmp_path / "manifest.json"
    path.write_bytes(encode_manifest(build_manifest(sf.make_scores(), "demo", "mix", scheme, {})))
    return path


def edited(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_ours_reads_back(ours):
    manifest = read_manifest(ours)
    assert (manifest.generation, manifest.run, manifest.scheme) == ("layersense", "demo", "mix")
    head = manifest.groups[-1]
    assert (head.layer, head.handle) == ("lm_head", "lm_head.quant_recipe")
    assert head.formats == [INT4, FP8, "NONE"]
    assert head.bits == [4.125, 8.0, 16.0]
    assert head.n_batches == [4, 4, 4]
    assert head.selected in (INT4, FP8)
    assert head.importance == pytest.approx(16 * 1.005)
    assert encode_manifest(read_own_manifest(ours)) == ours.read_bytes()


def test_readers_of_the_howto_still_work(ours):
    """The extraction sketch of the how-to, word for word."""
    stats = json.loads(ours.read_text())["layer_sensitivity"]
    rows = []
    for name, entry in stats.items():
        for fmt, score, cost in zip(entry["formats"], entry["scores"], entry["costs"], strict=True):
            if fmt.startswith("NONE("):
                continue
            rows.append((name, fmt, score, cost))
    assert len(rows) == 2 * len(sf.MODULES)
    assert ("lm_head.quant_recipe", f"{FP8}(effective-bits: 8.0)") in {row[:2] for row in rows}
    content = json.loads(ours.read_text())
    assert content["scheme"]["auto_quantize_bits"] == 6
    assert content["autoquant_state"]["is_satisfied"] is True
    ranking = [entry["importance"] for entry in content["sensitivity_ranking"]]
    assert ranking == sorted(ranking)


def test_schema_is_committed_and_describes_our_manifests(ours):
    assert json.loads(PATH.read_text()) == manifest_schema(), (
        "run python -m layersense.manifests.json_schema"
    )
    jsonschema.Draft202012Validator.check_schema(manifest_schema())
    validator = jsonschema.Draft202012Validator(manifest_schema())
    content = json.loads(ours.read_text())
    assert list(validator.iter_errors(content)) == []
    del content["layer_sensitivity"]["lm_head.quant_recipe"]["selected"]
    assert len(list(validator.iter_errors(content))) == 1


def test_oldest_foreign_generation(shared_data):
    path = shared_data / "manifests" / "qwen2_5_vl_3b.fp8_autoquant_all_layers_fp8.json"
    assert validate_manifest(path) == []
    manifest = read_manifest(path)
    assert manifest.generation == "g0"
    assert (manifest.run, manifest.scheme) == ("qwen2_5_vl_3b", "fp8_autoquant_all_layers_fp8")
    assert (manifest.model, manifest.dataset, manifest.modality) == (None, None, None)
    assert len(manifest.groups) == 275
    first = manifest.groups[0]
    assert first.layer == "visual.patch_embed.proj"
    assert first.formats == ["FP8_ALL_LAYERS_CFG", "NONE"]  # CUSTOM_0 of the only format
    assert first.scores == [14.517593266442418, 0.0]
    assert first.costs == [752640.0, 1505280.0]
    assert (first.reached, first.selected, first.n_weights) == (None, None, None)
    assert manifest.effective_bits == pytest.approx(10.998807262551553)


def test_later_foreign_generation_with_groups_of_none_only(shared_data):
    path = shared_data / "manifests" / "qwen3_vl_4b.wfp8_aint8_autoquant_lm.json"
    assert validate_manifest(path) == []
    manifest = read_manifest(path)
    assert manifest.generation == "g3"
    assert manifest.dataset == "vlm_coco2017_captions"
    assert manifest.model.endswith("Qwen3-VL-4B-Instruct")
    only_none = [group for group in manifest.groups if group.formats == ["NONE"]]
    assert (len(manifest.groups), len(only_none)) == (250, 105)
    assert all(group.importance is None for group in only_none)
    assert manifest.groups[-1].formats == ["FP8_WEIGHT_INT8_ACT_CFG", "NONE"]


def foreign(tmp_path, quant_formats, formats, scores, name="m.s.json", **more):
    path = tmp_path / name
    content = {
        "scheme": {"name": "s", "quant_formats": quant_formats},
        "layer_sensitivity": {
            "lm_head.quant_recipe": {
                "formats": formats,
                "scores": scores,
                "costs": [float(index) for index in range(len(formats))],
            }
        },
        **more,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("quant_formats", "label", "name"),
    [
        (["A"], "CUSTOM_0(effective-bits: 8.0)", "A"),
        (["NONE", "A"], "CUSTOM_0(effective-bits: 8.0)", "A"),
        (["A", "B"], "CUSTOM_0(effective-bits: 8.0)", "CUSTOM_0"),
        (["A"], "CUSTOM_1(effective-bits: 8.0)", "CUSTOM_1"),
        ([], "CUSTOM_0(effective-bits: 8.0)", "CUSTOM_0"),
        (["A"], "FP8_DEFAULT_CFG(effective-bits: 8.0)", "FP8_DEFAULT_CFG"),
    ],
)
def test_custom_labels_are_resolved_only_where_certain(tmp_path, quant_formats, label, name):
    path = foreign(tmp_path, quant_formats, [label, "NONE(effective-bits: 16.0)"], [1.0, 0.0])
    assert read_manifest(path).groups[0].formats == [name, "NONE"]


def test_scores_made_monotone_by_modelopt_are_not_taken_as_measured(tmp_path):
    path = foreign(tmp_path, ["A", "B"], ["A", "B", "NONE"], [2.0, 2.0, 0.0])
    group = read_manifest(path).groups[0]
    assert group.scores == [2.0, None, 0.0]
    assert group.scores_solver == [2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "generation"),
    [
        ([], "g0"),
        (["sensitivity_ranking"], "g1"),
        (["sensitivity_ranking", "model"], "g2"),
        (["sensitivity_ranking", "model", "dataset"], "g3"),
        (["model", "dataset", "quantization", "run_config"], "g4"),
    ],
)
def test_generations(tmp_path, keys, generation):
    path = foreign(tmp_path, ["A"], ["A", "NONE"], [1, 0], **{key: {} for key in keys})
    assert read_manifest(path).generation == generation


def test_run_of_a_foreign_manifest_comes_from_its_file_name(tmp_path):
    for name, run in (("a.b.s.json", "a.b"), ("other.json", "other")):
        assert read_manifest(foreign(tmp_path, ["A"], ["NONE"], [0], name=name)).run == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "scheme is missing"),
        ('{"schema_version": 2}', "schema_version is 2"),
        ('{"schema_version": 1}', "is not a manifest of layersense"),
        ('{"scheme": {"name": "s"}, "layer_sensitivity": {"x": 1}}', r"\[x\]: expected lists"),
        (
            '{"scheme": {"name": "s"}, "layer_sensitivity":'
            ' {"x": {"formats": ["A"], "scores": [], "costs": [1]}}}',
            "differ in length",
        ),
        (
            '{"scheme": {"name": "s"}, "layer_sensitivity":'
            ' {"x": {"formats": ["A"], "scores": ["high"], "costs": [1]}}}',
            "expected numbers",
        ),
    ],
)
def test_broken_files_are_told_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(LayersenseError, match=message) as error:
        read_manifest(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    (problem,) = validate_manifest(path)
    assert problem == str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(LayersenseError, match="no such manifest"):
        read_manifest(tmp_path / "none.json")


def test_inconsistencies_are_each_one_problem(ours):
    assert validate_manifest(ours) == []

    def edit(content):
        content["num_quantized_layers"] += 1
        content["sensitivity_ranking"].reverse()
        content["layer_sensitivity"]["lm_head.quant_recipe"]["scores"].pop()
        content["autoquant_state"]["cost"] *= 2
        content["layers"]["model.visual.blocks.0.attn.qkv"]["format"] = "OTHER"

    problems = validate_manifest(edited(ours, edit))
    assert len(problems) == 5
    assert all(problem.startswith(f"{ours}: ") for problem in problems)
    for word in ("num_quantized_layers", "ascending", "length", "cost", "attn.qkv"):
        assert sum(word in problem.removeprefix(str(ours)) for problem in problems) == 1


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda head: head["scores"].pop(), "differ in length"),
        (lambda head: head["costs"].pop(), "differ in length"),
        (lambda head: head["allowed"].pop(), "differ in length"),
        (lambda head: head.update(selected="FP9"), "'FP9' is none of its formats"),
        (lambda head: head.update(module_names=[]), "names no module"),
        (lambda head: head.update(module_names=["gone"]), "gone is not in layers"),
        (lambda head: head["formats"].__setitem__(0, "FP9"), "format FP9 is not in run"),
    ],
)
def test_a_group_that_does_not_fit_together_is_refused_in_one_sentence(ours, edit, word):
    head = "lm_head.quant_recipe"
    edited(ours, lambda content: edit(content["layer_sensitivity"][head]))
    assert any(word in problem for problem in validate_manifest(ours))
    for read in (read_manifest, read_own_manifest):
        with pytest.raises(LayersenseError) as error:
            read(ours)
        assert str(error.value).startswith(f"{ours}: layer_sensitivity[{head}]")
        assert word in str(error.value)


def test_no_torch_is_imported():
    code = (
        "import sys, layersense.recipes.decide, layersense.manifests.tables,"
        " layersense.reports.markdown\n"
        "print(sorted({'torch', 'transformers', 'modelopt', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
