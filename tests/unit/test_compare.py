"""Two results side by side, against numbers by hand and another library."""

import json

import numpy as np
import pytest
import result_files as rf
import score_files as sf
from hypothesis import given
from hypothesis import strategies as st
from result_files import FP8, INT4, INT8
from scipy.stats import spearmanr
from test_cli import call

from layersense.errors import LayersenseError
from layersense.manifests.imports import import_manifest, write_import
from layersense.recipes.quant_config import read_quant_config
from layersense.reports.compare import compare, profile, repeatability, spearman
from layersense.reports.result import read_result
from layersense.reports.terminal import find_result, known_results


def read(place):
    return profile(read_result(place / "layers.parquet"))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_rank_correlation_is_that_of_scipy(pairs):
    a, b = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    found = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic)


def test_a_result_agrees_with_itself(tmp_path):
    one = read(rf.write_result(tmp_path))
    found = compare(one, one)
    assert (found.correlation, found.moved, found.changed_count) == (1, [], 0)
    assert found.exceeds_noise is False
    assert found.common == len(sf.MODULES)


def test_two_schemes_of_a_run_differ_in_choice_alone(tmp_path):
    one = read(rf.write_result(tmp_path, scheme="a"))
    two = read(rf.write_result(tmp_path, scheme="b", quant_formats=[FP8], effective_bits=9))
    found = compare(one, two)
    assert found.formats == [FP8]
    assert found.correlation == 1
    assert not found.moved
    changed = {layer: (before, after) for layer, before, after in found.changed}
    both = zip(one.layers, one.choice, two.choice, strict=True)
    assert changed == {layer: (a, b) for layer, a, b in both if a != b} != {}


def test_a_reversed_ranking_exceeds_the_noise(tmp_path):
    values = sorted(sf.DAMAGE.values())
    order = sorted(sf.DAMAGE, key=lambda name: sf.DAMAGE[name])
    reverse = dict(zip(order, reversed(values), strict=True))
    one = read(rf.write_result(tmp_path, scheme="a"))
    two = read(rf.write_result(tmp_path, sf.make_scores(damage=reverse), scheme="b"))
    found = compare(one, two)
    assert found.correlation == -1
    assert found.exceeds_noise
    assert "by more than the noise" in found.verdict
    # Shares by hand: the largest damage is 2 of 3.86, the smallest 0.02.
    assert sum(values) == pytest.approx(3.86)
    top = next(entry for entry in found.moved if entry.layer == "lm_head")
    assert (top.rank_a, top.rank_b) == (1, 7)
    assert (top.share_a, top.share_b) == (pytest.approx(2 / 3.86), pytest.approx(0.02 / 3.86))
    assert top.beyond_noise


def test_only_common_and_reached_layers_count(tmp_path):
    fewer = {name: value for name, value in sf.MODULES.items() if name != "lm_head"}
    damage = {name: sf.DAMAGE[name] for name in fewer}
    scores = sf.make_scores(fewer, damage)
    sf.set_reached(scores, "model.visual", "not_called")
    one = read(rf.write_result(tmp_path, scheme="a"))
    two = read(rf.write_result(tmp_path, scores, scheme="b", effective_bits=12))
    found = compare(one, two)
    assert (found.only_a, found.only_b, found.common) == (1, 0, 3)
    assert found.correlation == 1


def test_without_a_common_format_each_ones_worst_score_counts(tmp_path):
    one = read(rf.write_result(tmp_path, scheme="a", quant_formats=[INT4], effective_bits=6))
    two = read(rf.write_result(tmp_path, scheme="b", quant_formats=[INT8], effective_bits=9))
    found = compare(one, two)
    assert found.formats == []
    # INT4 does four times the damage of INT8 to every layer, which is the same as a share.
    assert found.correlation == 1
    assert found.moved_beyond_noise == 0


def test_unknown_errors_leave_the_verdict_open(tmp_path):
    scores = sf.make_scores()
    for entry in scores.formats.values():
        for group in entry.groups.values():
            group.batch_scores = group.batch_scores[:1]
        entry.batches.tokens = entry.batches.tokens[:1]
        entry.batches.samples = entry.batches.samples[:1]
    found = compare(*[read(rf.write_result(tmp_path, scores, scheme=name)) for name in "ab"])
    assert found.exceeds_noise is None
    assert "unknown" in found.verdict


def test_too_few_layers_are_said(tmp_path):
    modules = {name: sf.MODULES[name] for name in list(sf.MODULES)[:2]}
    scores = sf.make_scores(modules, {name: sf.DAMAGE[name] for name in modules})
    found = compare(*[read(rf.write_result(tmp_path, scores, scheme=name)) for name in "ab"])
    assert found.correlation is None
    assert found.verdict.startswith("Nothing to compare: 2 layers")


def test_a_result_of_no_format_has_nothing_to_compare(tmp_path):
    groups = {f"layer.{index}": {"formats": ["NONE"], "scores": [0.0], "costs": [1.0]}
              for index in range(4)}  # fmt: skip
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"scheme": {"name": "s"}, "layer_sensitivity": groups}))
    empty = profile(find_result(str(path)))
    for other in (empty, read(rf.write_result(tmp_path))):
        found = compare(empty, other)
        assert (found.common, found.correlation, found.moved) == (0, None, [])
        assert found.verdict.startswith("Nothing to compare: 0 layers")


def test_repeatability_falls_with_the_noise():
    scores = tuple(float(value) for value in range(1, 21))
    quiet, loud = (repeatability(scores, (error,) * 20) for error in (0.01, 5.0))
    assert quiet == 1
    assert loud < 0.9
    assert repeatability(scores, (float("nan"),) * 20) is None
    assert repeatability(scores, (5.0,) * 20) == loud


def test_show_prints_what_matters(tmp_path):
    place = rf.write_result(tmp_path, rf.hostile_scores())
    done = call("show", str(place), "--top", "3")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    assert "recipe" in done.stdout
    assert "alert(1)" in done.stdout.replace("\n", "")
    assert "6 more; --top 9 lists them all" in done.stdout


def test_show_as_json_sorted_both_ways(tmp_path):
    place = rf.write_result(tmp_path)
    by_score = json.loads(call("show", str(place), "--json").stdout)
    order = sorted(sf.DAMAGE, key=lambda name: -sf.DAMAGE[name])
    assert [row["layer"] for row in by_score["layers"]] == order
    assert by_score["predicted_damage"] == pytest.approx(
        sum(row["score"] if row["selected"] == row["format"] else row["score"] / 8
            for row in by_score["layers"])
    )  # fmt: skip
    per_mb = json.loads(
        call("show", str(place / "layers.parquet"), "--json", "--sort", "damage-per-mb").stdout
    )
    expected = {
        name: value * 8 / (sf.MODULES[name][1] * (16 - 4.125) / 8e6)
        for name, value in sf.DAMAGE.items()
    }
    assert [row["layer"] for row in per_mb["layers"]] == sorted(
        expected, key=lambda name: -expected[name]
    )


def test_show_says_what_was_measured(tmp_path):
    place = rf.write_result(tmp_path / "results")
    before = json.loads(call("show", "demo/mix", "--json", cwd=tmp_path).stdout)
    assert before["measured"] is None
    # Whatever scores low does the damage.
    rf.write_verification(
        place, scale=lambda h, f: sf.DAMAGE[h.removesuffix(".quant_recipe")] ** -2
    )
    for name in ("demo/mix", str(place / "manifest.json")):
        found = json.loads(call("show", name, "--json", cwd=tmp_path).stdout)
        assert found["measured"]["kl"] > found["measured"]["kl_low"] > 0
        assert "does worse than" in found["measured"]["verdict"]
        codes = {entry["code"] for entry in found["findings"]}
        assert codes == {entry["code"] for entry in before["findings"]} | {"score-predicts-badly"}
    text = " ".join(call("show", "demo/mix", cwd=tmp_path).stdout.split())
    assert "on held-out rows" in text
    assert "does worse than" in text
    assert "trust Read the warnings before you rely on it" in text


def test_show_reads_foreign_manifests(shared_data):
    for manifest in sorted((shared_data / "manifests").glob("*.json")):
        done = call("show", str(manifest), "--json", "--top", "2")
        assert len(json.loads(done.stdout)["layers"]) == 2


def test_results_are_found_and_completed_by_run_and_scheme(tmp_path):
    rf.write_result(tmp_path / "results")
    assert call("show", "demo/mix", cwd=tmp_path).returncode == 0
    code = "from layersense.reports.terminal import known_results as k; print(*k('de'))"
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["demo/mix"]


def test_what_was_imported_is_found_by_its_name(tmp_path, monkeypatch):
    entry = {"formats": ["FP8", "NONE"], "scores": [0.25, 0.0], "costs": [8.0, 16.0]}
    content = {"scheme": {"name": "all"}, "layer_sensitivity": {"lm_head": entry}}
    (tmp_path / "old.json").write_text(json.dumps(content))
    manifest = import_manifest(tmp_path / "old.json", run="elder")
    write_import(manifest, tmp_path / "results" / "imported" / "elder.json")
    monkeypatch.chdir(tmp_path)
    for name in ("elder", "elder/all", "results/imported/elder.json"):
        result = find_result(name)
        assert (result.run, result.scheme) == ("elder", "all")
    with pytest.raises(LayersenseError, match="elder/other: is no result"):
        find_result("elder/other")
    assert list(known_results("el")) == ["elder"]


def test_a_run_alone_means_its_scheme_or_names_them(tmp_path, monkeypatch):
    rf.write_result(tmp_path / "results", scheme="a")
    monkeypatch.chdir(tmp_path)
    assert find_result("demo").scheme == "a"
    rf.write_result(tmp_path / "results", scheme="b")
    with pytest.raises(LayersenseError, match=r"demo/: has the schemes a, b; name one, as demo/a$"):
        find_result("demo/")


def test_a_file_of_ones_own_is_not_to_be_deleted(tmp_path):
    mine = tmp_path / "my-model.yaml"
    mine.write_text("datasets: {}\n")
    with pytest.raises(LayersenseError, match=r"my-model\.yaml: is no result; give run/scheme"):
        find_result(str(mine))
    for name in ("mine.json", "mine.parquet"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(LayersenseError, match="if the workflow wrote it"):
            find_result(str(tmp_path / name))
    with pytest.raises(LayersenseError, match="if the workflow wrote it, else name the right file"):
        read_quant_config(tmp_path / "mine.json")


def test_exit_codes(tmp_path):
    a = rf.write_result(tmp_path, scheme="a")
    values = sorted(sf.DAMAGE.values())
    order = sorted(sf.DAMAGE, key=lambda name: sf.DAMAGE[name])
    reverse = dict(zip(order, reversed(values), strict=True))
    b = rf.write_result(tmp_path, sf.make_scores(damage=reverse), scheme="b")
    assert call("diff", str(a), str(b)).returncode == 0
    assert call("diff", str(a), str(b), "--exit-code").returncode == 3
    assert call("diff", str(a), str(a), "--exit-code").returncode == 0
    missing = call("show", "nobody/nothing", cwd=tmp_path)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: nobody/nothing: is no result; give run/scheme")
    assert call("show").returncode == 2
    found = json.loads(call("diff", str(a), str(b), "--json").stdout)
    assert found["exceeds_noise"] is True
    assert found["correlation"] == -1
