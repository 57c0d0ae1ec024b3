"""Manifests of others: every generation, ModelOpt's state, round trips, and what is broken."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from score_files import make_scores
from typer.testing import CliRunner

from layersense.cli import app
from layersense.errors import LayersenseError
from layersense.manifests.imports import import_files, import_manifest, write_import
from layersense.manifests.read import (
    NormalGroup,
    NormalManifest,
    encode_imported,
    read_manifest,
    validate_manifest,
)
from layersense.manifests.tables import layers_table, runs_table
from layersense.reports.terminal import find_result

QKV = "model.layers.0.self_attn.q_proj.quant_recipe"
NONE = "NONE(effective-bits: 16.0)"


def foreign(**changes: Any) -> dict[str, Any]:
    """A manifest of the oldest generation with keys changed; None removes one."""
    content = {
        "scheme": {
            "name": "fp8",
            "auto_quantize_bits": 11.0,
            "auto_quantize_method": "gradient",
            "coverage_mode": "lm_only",
            "coverage_fraction": 0.5,
            "quant_formats": ["FP8_ALL_LAYERS_CFG"],
        },
        "num_quantized_layers": 1,
        "layers": {},
        "autoquant_state": {"constraints": {"effective_bits": 10.9}, "score": 0.5},
        "layer_sensitivity": {
            QKV: {
                "formats": ["CUSTOM_0(effective-bits: 8.0)", NONE],
                "scores": [0.25, 0.0],
                "costs": [8.0, 16.0],
            },
            "model.visual.blocks.0.attn.qkv.quant_recipe": {
                "formats": [NONE], "scores": [0.0], "costs": [32.0]
            },
        },
        **changes,
    }  # fmt: skip
    return {key: value for key, value in content.items() if value is not None}


def write(folder: Path, content: Any, name: str = "old.fp8.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("generation", "keys"),
    [
        ("g0", {}),
        ("g1", {"sensitivity_ranking": []}),
        ("g2", {"sensitivity_ranking": [], "model": {"id": "/models/some"}}),
        ("g3", {"model": "some", "dataset": {"name": "coco"}}),
        ("g4", {"dataset": "coco", "quantization": {}, "run_config": {}}),
    ],
)
def test_every_generation(tmp_path: Path, generation: str, keys: dict[str, Any]) -> None:
    manifest = import_manifest(write(tmp_path, foreign(**keys)))
    assert manifest.generation == generation
    assert manifest.imported
    assert (manifest.run, manifest.scheme) == ("old", "fp8")
    assert manifest.model == {"g2": "/models/some", "g3": "some"}.get(generation)
    assert manifest.dataset == ("coco" if generation in ("g3", "g4") else None)
    assert (manifest.coverage_mode, manifest.coverage_fraction) == ("lm_only", 0.5)
    assert {group.subsystem for group in manifest.groups} == {"language", "vision"}
    alone = manifest.groups[1]
    assert (alone.formats, alone.scores, alone.costs) == (["NONE"], [0.0], [32.0])
    for lacking in (manifest.task, manifest.modality, manifest.own, manifest.groups[0].reached):
        assert lacking is None


def test_what_custom_means_is_told_only_where_it_is_certain(tmp_path: Path) -> None:
    def formats(**changes: Any) -> list[str]:
        return read_manifest(write(tmp_path, foreign(**changes))).groups[0].formats

    assert formats() == ["FP8_ALL_LAYERS_CFG", "NONE"]
    two = {**foreign()["scheme"], "quant_formats": ["FP8_ALL_LAYERS_CFG", "INT8_ALL_LAYERS_CFG"]}
    assert formats(scheme=two) == ["CUSTOM_0", "NONE"]
    assert formats(scheme={"name": "fp8"}) == ["CUSTOM_0", "NONE"]
    other = {**foreign()["layer_sensitivity"]}
    other["lm_head.quant_recipe"] = {"formats": ["CUSTOM_1"], "scores": [1.0], "costs": [1.0]}
    assert formats(layer_sensitivity=other) == ["CUSTOM_0", "NONE"]


def test_the_model_is_named_only_by_who_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, foreign(), "qwen2_5_vl_3b.fp8.json")
    assert import_manifest(path).model is None
    assert import_manifest(path, model_from_file_name=True).model == "qwen2_5_vl_3b"
    assert import_manifest(path, model="mine", model_from_file_name=True).model == "mine"
    renamed = import_manifest(path, run="elder", scheme="eight", dataset="coco")
    assert (renamed.run, renamed.scheme, renamed.dataset) == ("elder", "eight", "coco")


def test_the_tables_mark_what_was_imported(tmp_path: Path) -> None:
    manifest = import_manifest(write(tmp_path, foreign()))
    layers = layers_table(manifest).to_pylist()
    assert {row["imported"] for row in layers} == {"g0"}
    assert [row["score"] for row in layers] == [0.25, 0.0, 0.0]
    (run,) = runs_table([manifest]).to_pylist()
    assert (run["imported"], run["coverage_mode"], run["groups"]) == ("g0", "lm_only", 2)
    assert run["quant_formats"] == ["FP8_ALL_LAYERS_CFG"]
    for key in ("model_id", "engine", "task", "n_parameters", "groups_quantized", "warnings"):
        assert run[key] is None


def test_ours_comes_in_as_it_is(tmp_path: Path) -> None:
    from layersense import config
    from layersense.manifests.schema import encode_manifest
    from layersense.recipes.decide import build_manifest

    scores = make_scores()
    scheme = config.Scheme(quant_formats=list(scores.formats), effective_bits=11.0)
    path = tmp_path / "manifest.json"
    path.write_bytes(encode_manifest(build_manifest(scores, "run", "s", scheme, {})))
    manifest = import_manifest(path, run="theirs")
    assert (manifest.generation, manifest.run) == ("layersense", "theirs")
    out = tmp_path / "theirs.json"
    write_import(manifest, out)
    assert read_manifest(out) == manifest
    ours, imported = layers_table(read_manifest(path)), layers_table(read_manifest(out))
    for name in ours.column_names:
        if name not in ("run", "imported"):
            assert ours[name].to_pylist() == imported[name].to_pylist(), name


# Round trips

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
MAYBE = st.none() | NUMBERS
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def groups(draw: Any) -> NormalGroup:
    formats = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))

    def row(kind: Any) -> list[Any]:
        return draw(st.lists(kind, min_size=len(formats), max_size=len(formats)))

    handle = draw(TEXT)
    return NormalGroup(
        handle=handle, layer=handle, formats=formats, bits=row(MAYBE), scores=row(MAYBE),
        costs=row(MAYBE), scores_solver=row(MAYBE), scores_se=row(MAYBE),
        n_batches=row(st.none() | st.integers(0, 99)),
        module_names=draw(st.none() | st.lists(TEXT, max_size=3)),
        n_weights=draw(st.none() | st.integers(0, 2**40)), reached=draw(st.none() | TEXT),
        subsystem=draw(TEXT), block=draw(st.none() | st.integers(0, 99)), kind=draw(TEXT),
        selected=draw(st.none() | TEXT), reason=draw(st.none() | TEXT),
    )  # fmt: skip


@st.composite
def manifests(draw: Any) -> NormalManifest:
    maybe = st.none() | TEXT
    return NormalManifest(
        generation=draw(st.sampled_from(["g0", "g3", "autoquant"])), run=draw(TEXT),
        scheme=draw(TEXT), model=draw(maybe), dataset=draw(maybe), modality=draw(maybe),
        method=draw(maybe), task=draw(maybe), effective_bits_asked=draw(MAYBE),
        effective_bits=draw(MAYBE), score=draw(MAYBE), formats={},
        groups=draw(st.lists(groups(), max_size=4)), own=None,
        quant_formats=draw(st.none() | st.lists(TEXT, max_size=3)), coverage_mode=draw(maybe),
        coverage_fraction=draw(MAYBE), imported=draw(st.booleans()),
    )  # fmt: skip


FOLDER = settings(
    max_examples=int(os.environ.get("LAYERSENSE_FUZZ", "100")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)


@FOLDER
@given(manifests())
def test_import_of_export_is_the_same(tmp_path: Path, manifest: NormalManifest) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(encode_imported(manifest))
    assert read_manifest(path) == manifest
    assert validate_manifest(path) == []
    assert encode_imported(read_manifest(path)) == path.read_bytes()
    layers_table(manifest)
    runs_table([manifest])


@FOLDER
@given(
    st.lists(
        st.tuples(TEXT, st.lists(NUMBERS.filter(lambda cost: cost >= 0), min_size=1, max_size=3)),
        unique_by=lambda pair: pair[0],
        min_size=1,
    )
)
def test_no_group_of_a_foreign_manifest_is_lost(tmp_path: Path, drawn: list[Any]) -> None:
    sensitivity = {
        f"{name}.quant_recipe": {
            "formats": [f"F{index}(effective-bits: {index + 2}.5)" for index in range(len(costs))],
            "scores": [float(index) for index in range(len(costs))],
            "costs": costs,
        }
        for name, costs in drawn
    }
    manifest = import_manifest(write(tmp_path, foreign(layer_sensitivity=sensitivity)))
    assert [group.handle for group in manifest.groups] == list(sensitivity)
    for group, entry in zip(manifest.groups, sensitivity.values(), strict=True):
        assert group.formats == [f"F{index}" for index in range(len(entry["costs"]))]
        assert group.bits == [index + 2.5 for index in range(len(entry["costs"]))]
        assert (group.costs, group.scores_solver) == (entry["costs"], entry["scores"])
    out = tmp_path / "out.json"
    write_import(manifest, out)
    assert read_manifest(out) == manifest


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
PATHS = st.sampled_from(
    [
        ("scheme",), ("scheme", "name"), ("scheme", "quant_formats"), ("layer_sensitivity",),
        ("scheme", "auto_quantize_bits"), ("scheme", "coverage_fraction"), ("autoquant_state",),
        ("autoquant_state", "constraints"), ("autoquant_state", "score"), ("model",), ("dataset",),
        ("layer_sensitivity", QKV), ("layer_sensitivity", QKV, "formats"),
        ("layer_sensitivity", QKV, "scores"), ("layer_sensitivity", QKV, "costs"),
        ("layer_sensitivity", QKV, "module_names"), ("import_version",), ("schema_version",),
        ("candidate_stats",),
    ]
)  # fmt: skip


@FOLDER
@given(PATHS, JSON)
def test_whatever_stands_anywhere_is_read_or_answered_in_one_sentence(
    tmp_path: Path, path: tuple[str, ...], value: Any
) -> None:
    content = foreign()
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file = write(tmp_path, content)
    problems = validate_manifest(file)
    if problems:
        with pytest.raises(LayersenseError) as error:
            import_manifest(file)
        assert str(error.value) in problems
        assert all(problem.startswith(f"{file}: ") for problem in problems)
        assert not any("\n" in problem for problem in problems)
    else:
        manifest = import_manifest(file)
        layers_table(manifest)
        runs_table([manifest])


@FOLDER
@given(st.binary(max_size=200))
def test_any_bytes_are_answered(tmp_path: Path, data: bytes) -> None:
    for name in ("any.json", "any.pt"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LayersenseError) as error:
            import_manifest(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")


# Broken ones

GROUP = foreign()["layer_sensitivity"][QKV]


def with_group(**changes: Any) -> dict[str, Any]:
    return foreign(layer_sensitivity={QKV: {**GROUP, **changes}})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(foreign())[:-40], "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (json.dumps(foreign()).replace("0.25", "NaN"), "NaN is no number in JSON"),
        (json.dumps(foreign()).replace("0.25", "-Infinity"), "-Infinity is no number"),
        (json.dumps(foreign()).replace("0.25", "1e999"), "expected numbers in scores and costs"),
        (json.dumps(foreign()).replace("0.25", "1" * 400), "expected numbers in scores and costs"),
        ('{"scheme": {}, "scheme": {}}', "the key 'scheme' stands twice"),
        (
            json.dumps(foreign()).replace("model.visual.blocks.0.attn.qkv.quant_recipe", QKV),
            f"the key '{QKV}' stands twice in one object",
        ),
        ('{"scheme": "\\ud800"}', "cannot be read as JSON"),
        (foreign(scheme=None), "key scheme is missing or no object"),
        (foreign(layer_sensitivity=[]), "key layer_sensitivity is missing or no object"),
        (foreign(layer_sensitivity={}), "layer_sensitivity holds no layer group"),
        (
            foreign(layer_sensitivity={QKV: GROUP, QKV.removesuffix(".quant_recipe"): GROUP}),
            "q_proj are one group; keep one",
        ),
        (foreign(scheme={"name": 3}), "scheme.name is missing"),
        (foreign(scheme={"name": "x", "quant_formats": [1]}), "scheme.quant_formats: expected"),
        (foreign(scheme={"name": "x", "auto_quantize_bits": "8"}), "auto_quantize_bits: expected"),
        (foreign(scheme={"name": "x", "coverage_mode": 7}), "scheme.coverage_mode: expected text"),
        (foreign(autoquant_state=[]), "autoquant_state: expected an object"),
        (foreign(autoquant_state={"constraints": [1]}), "autoquant_state.constraints: expected"),
        (foreign(model={"id": 3}), "model: expected text"),
        (foreign(dataset=[]), "dataset: expected text"),
        (with_group(formats=["A"]), "formats, scores and costs differ in length"),
        (with_group(scores=[1.0, 2.0, 3.0]), "formats, scores and costs differ in length"),
        (with_group(scores=["a", 0]), "expected numbers"),
        (with_group(scores=[True, 0]), "expected numbers"),
        (with_group(costs=[None, 1.0]), "expected numbers"),
        (with_group(costs=[-1.0, 1.0]), "a cost is below zero"),
        (with_group(formats=[1, 2]), "expected strings in formats"),
        (with_group(formats=["A", "A"]), "a format stands twice"),
        (with_group(formats=["A(effective-bits: 8.0)", "A"]), "two of its formats have one name"),
        (
            with_group(formats=["CUSTOM_0", "FP8_ALL_LAYERS_CFG"]),
            "two of its formats have one name",
        ),
        (with_group(formats=[], scores=[], costs=[]), "formats is empty; expected NONE"),
        (with_group(formats=None), "expected lists"),
        (with_group(module_names=[]), "expected names in module_names"),
        (foreign(layer_sensitivity={QKV: 3}), "expected lists"),
        (foreign(layer_sensitivity={".quant_recipe": GROUP}), "expected a module's name"),
        ({"import_version": 2}, "this layersense reads 1"),
        ({"import_version": 1, "run": 3}, "is not what layersense imports"),
        ({"schema_version": 1}, "is not a manifest of layersense"),
        ({"candidate_stats": []}, "key layer_sensitivity is missing or no object"),
    ],
)
def test_a_broken_manifest_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, content: Any, reason: str
) -> None:
    good = write(tmp_path, foreign(), "good.fp8.json")
    bad = write(tmp_path, content, "bad.json")
    out = tmp_path / "out"
    with pytest.raises(LayersenseError) as error:
        import_files([good, bad], out)
    message = str(error.value)
    assert message.startswith(f"{bad}: ")
    assert reason in message
    assert "\n" not in message
    assert not out.exists()
    assert validate_manifest(bad)


def test_what_editors_and_shells_do_to_files(tmp_path: Path) -> None:
    marked = tmp_path / "old.fp8.json"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(foreign()).encode())
    plain = write(tmp_path, foreign(), "plain.json")
    assert read_manifest(marked).groups == read_manifest(plain).groups
    with pytest.raises(LayersenseError, match="Is a directory"):
        read_manifest(tmp_path)


def test_a_name_makes_no_line_of_its_own(tmp_path: Path) -> None:
    """Found by fuzzing: a handle with a line break looked like a line of another message."""
    name = "a\nerror: forged\x1b[2J\u2028"
    sensitivity = {name: None, f"{name}.quant_recipe": {"formats": [], "scores": [], "costs": []}}
    file = write(tmp_path, foreign(layer_sensitivity=sensitivity))
    for problem in validate_manifest(file):
        assert problem.isprintable()
    with pytest.raises(LayersenseError, match=r"a\\nerror: forged\\x1b\[2J\\u2028"):
        import_manifest(file)


def test_several_broken_ones_are_told_together(tmp_path: Path) -> None:
    bad = [write(tmp_path, "[]", f"{index}.json") for index in range(3)]
    with pytest.raises(LayersenseError) as error:
        import_files([*bad, tmp_path / "missing.json"], tmp_path / "out")
    assert len(str(error.value).split("\n")) == 4
    twice = tmp_path / "folder"
    twice.mkdir()
    with pytest.raises(LayersenseError, match=r"is called old\.fp8 like "):
        import_files([write(tmp_path, foreign()), write(twice, foreign())], tmp_path / "out")
    with pytest.raises(LayersenseError, match="are no file name"):
        import_files(
            [write(tmp_path, foreign(scheme={"name": "../up"}), "up.json")], tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


# The command, and the real ones


def test_the_command_writes_tables(tmp_path: Path) -> None:
    path = write(tmp_path, foreign())
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["import", str(path), "--out", str(out), "--model", "mine"])
    assert done.exit_code == 0, done.output
    assert "old, fp8: 2 groups, generation g0, model mine" in done.output
    assert {file.name for file in out.iterdir()} == {
        "old.fp8.json", "old.fp8.parquet", "runs.parquet", "sensitivity.parquet"
    }  # fmt: skip
    rows = pq.read_table(out / "sensitivity.parquet").to_pylist()
    assert {row["model"] for row in rows} == {"mine"}


def test_the_real_ones(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "manifests").glob("*.json"))
    elder, younger = import_files(files, tmp_path / "out")
    assert (elder.generation, elder.model, elder.dataset) == ("g0", None, None)
    assert len(elder.groups) == 275
    assert {name for group in elder.groups for name in group.formats} == {
        "FP8_ALL_LAYERS_CFG", "NONE"
    }  # fmt: skip
    assert younger.generation == "g3"
    assert younger.dataset == "vlm_coco2017_captions"
    assert (younger.model or "").endswith("Qwen3-VL-4B-Instruct")
    assert younger.coverage_mode == "lm_only"
    assert sum(group.formats == ["NONE"] for group in younger.groups) == 105
    assert {"vision", "projector", "language"} <= {group.subsystem for group in younger.groups}
    for file, manifest in zip(files, (elder, younger), strict=True):
        original = json.loads(file.read_text())["layer_sensitivity"]
        assert [group.handle for group in manifest.groups] == list(original)
        for group in manifest.groups:
            assert group.scores_solver == original[group.handle]["scores"]
            assert group.costs == original[group.handle]["costs"]
    rows = pq.read_table(tmp_path / "out" / "sensitivity.parquet").num_rows
    assert rows == 275 * 2 + 145 * 2 + 105


def test_a_state_that_runs_code_runs_none(tmp_path: Path) -> None:
    import pickle
    import zipfile

    class Trap:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    state = {"candidate_stats": {QKV: {**GROUP, "trap": Trap()}}, "method": "gradient"}
    path = tmp_path / "state.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state/data.pkl", pickle.dumps(state))
    manifest = import_manifest(path)
    assert not (tmp_path / "ran").exists()
    assert manifest.groups[0].scores_solver == [0.25, 0.0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(LayersenseError, match="not as torch saves a state"):
        import_manifest(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state/data.pkl", pickle.dumps({"weight": [1.0]}))
    with pytest.raises(LayersenseError, match="holds no `candidate_stats`"):
        import_manifest(path)
    with pytest.raises(LayersenseError, match="there is no such file"):
        import_manifest(tmp_path / "missing.pt")


@pytest.mark.slow
def test_a_state_that_holds_itself_many_times_over_is_read_once(tmp_path: Path) -> None:
    import pickle
    import zipfile

    many: list[Any] = [1.0]
    for _ in range(19):
        many = [many] * 100
    many.append(many)
    stats = {"a.quant_recipe": {"formats": ["NONE"], "scores": [0.0], "costs": [2.0]}}
    path = tmp_path / "state.pt"
    with zipfile.ZipFile(path, "w") as archive:
        state = {"candidate_stats": stats, "best": {"constraints": {"x": many}}}
        archive.writestr("state/data.pkl", pickle.dumps(state))
    assert [group.layer for group in import_manifest(path).groups] == ["a"]
    assert [group.layer for group in find_result(str(path)).groups] == ["a"]


def test_a_state_that_modelopt_saved(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 16))
    batches = [torch.randn(4, 32) for _ in range(2)]
    _, returned = mtq.auto_quantize(
        model.eval(),
        constraints={"effective_bits": 6.5},
        quantization_formats=[mtq.INT8_DEFAULT_CFG, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG],
        data_loader=batches,
        forward_step=lambda model, batch: model(batch),
        loss_func=lambda output, batch: output.square().sum(),
        num_calib_steps=2,
        num_score_steps=2,
        checkpoint=str(tmp_path / "saved.pt"),
        verbose=False,
    )
    torch.save(returned, tmp_path / "returned.pt")
    plain = {
        key: json.loads(json.dumps(returned[key], default=str))
        for key in ("method", "candidate_stats", "best")
    }
    write(tmp_path, plain, "dumped.json")
    for name in ("saved.pt", "returned.pt", "dumped.json"):
        manifest = import_manifest(tmp_path / name)
        assert (manifest.generation, manifest.scheme) == ("autoquant", Path(name).stem)
        assert (manifest.method, manifest.model) == ("gradient", None)
        for group in manifest.groups:
            stats = returned["candidate_stats"][group.handle]
            assert group.module_names == stats["module_names"]
            assert group.scores_solver == [float(score) for score in stats["scores"]]
            assert group.costs == stats["costs"]
            labels = [str(recipe) for recipe in stats["formats"]]
            assert group.formats == [label.partition("(")[0] for label in labels]
        if name != "saved.pt":  # written before the search ends, it holds no choice
            assert manifest.score == returned["best"]["score"]
            chosen = {group.handle: group.selected for group in manifest.groups}
            for handle, recipe in returned["best"]["recipe"].items():
                assert chosen[handle] == str(recipe).partition("(")[0]
        write_import(manifest, tmp_path / "out.json")
        assert read_manifest(tmp_path / "out.json") == manifest
