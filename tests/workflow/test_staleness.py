"""The staleness table: each edit, then Snakemake for real, then exactly the jobs that ran."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

SUMMARIES = {"summaries", "summary", "index"}
SCHEME_RULES = ("solve", "layers", "frontier", "recipe", "report", "page")
VLM_SCHEMES = ("fp8", "mixed")


def chain(run: str, *schemes: str) -> set[str]:
    """The CPU jobs of a run's schemes, and those that put all together."""
    steps = {f"{step}/{run}/{scheme}" for scheme in schemes for step in SCHEME_RULES}
    return steps | SUMMARIES


def each_scheme(rule: str) -> set[str]:
    return {f"{rule}/{name}" for name in ("vlm.photos/fp8", "vlm.photos/mixed", "llm.words/fp8")}


PAGES = each_scheme("report") | each_scheme("page") | {"summary", "index"}


def scores(project: Project, run: str) -> dict[str, Any]:
    return project.json(f"{run}/scores.json")["formats"]


def test_first_run_does_everything(done_study: Project) -> None:
    logs = done_study.results / "logs"
    jobs = {str(file.relative_to(logs).with_suffix("")) for file in logs.rglob("*.log")}
    assert jobs == {
        "dataset/photos",
        "dataset/words",
        "model/vlm",
        "model/llm",
        "scripts",
        "score/vlm.photos",
        "score/llm.words",
        *chain("vlm.photos", *VLM_SCHEMES),
        *chain("llm.words", "fp8"),
    }


def test_nothing_edited_runs_nothing(study: Project) -> None:
    outcome = study.run()
    assert outcome.jobs == set()
    assert "Nothing to be done" in outcome.output


@pytest.mark.parametrize(
    ("template", "jobs"),
    [
        ("layer-sensitivity-report.md.j2", each_scheme("report")),
        ("report.html.j2", each_scheme("page")),
        ("report.js", each_scheme("page")),
        ("index.html.j2", {"index"}),
        ("page.css", each_scheme("page") | {"index"}),
    ],
)
def test_a_template_renders_its_pages_alone(study: Project, template: str, jobs: set[str]) -> None:
    file = study.root / "workflow/templates" / template
    file.write_text(file.read_text() + "\n")
    assert study.run().jobs == jobs


def test_a_report_module_renders_pages_alone(study: Project) -> None:
    module = study.root / "workflow/layersense/reports/markdown.py"
    module.write_text(module.read_text() + "\n# An edit.\n")
    assert study.run().jobs == PAGES


def test_a_report_option_renders_pages_alone(study: Project) -> None:
    study.edit(lambda config: config.update(report={"top": 3}))
    assert study.run().jobs == PAGES


def test_a_budget_solves_its_scheme_in_its_runs_again(study: Project) -> None:
    study.edit(lambda config: config["schemes"]["mixed"].update(effective_bits=9.0))
    before = scores(study, "vlm.photos")
    assert study.run().jobs == chain("vlm.photos", "mixed")
    assert scores(study, "vlm.photos") == before


VERIFYING = {
    *("verify/llm.words", "verification/llm.words", "summary", "index"),
    *("report/llm.words/fp8", "page/llm.words/fp8", "scatter/llm.words/fp8"),
}


@pytest.fixture(scope="module")
def done_verified(done_study: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The study with one run verified; not to be changed."""
    project = done_study.copy(tmp_path_factory.mktemp("verified") / "study")
    options = {"groups": 4, "points": 2, "random": 2}
    project.edit(lambda config: config["runs"]["llm.words"].update(verify=options))
    assert project.run().jobs == VERIFYING
    return project


@pytest.fixture
def verified(done_verified: Project, tmp_path: Path) -> Project:
    """A study with one verified run of one's own."""
    return done_verified.copy(tmp_path / "study")


def test_a_budget_of_a_verified_run_measures_no_known_recipe(verified: Project) -> None:
    def add(config: dict[str, Any]) -> None:
        config["schemes"]["other"] = {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 12}
        config["runs"]["llm.words"]["schemes"] = ["fp8", "other"]

    before = verified.json("llm.words/verification.json")
    judged = [before["before"], *(found["damage"] for found in before["recipes"].values())]
    for one in judged:
        (metric,) = one["metrics"]
        assert metric["name"] == "token accuracy"
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
        assert metric["difference_low"] <= metric["difference"] <= metric["difference_high"]
    other = chain("llm.words", "other") | {"scatter/llm.words/other"}
    verified.edit(add)
    assert verified.run().jobs == other | VERIFYING
    both = verified.json("llm.words/verification.json")
    assert both["singles"] == before["singles"]
    verified.edit(lambda config: config["schemes"]["other"].update(effective_bits=10))
    scored = scores(verified, "llm.words")
    assert verified.run().jobs == other | VERIFYING
    after = verified.json("llm.words/verification.json")
    assert scores(verified, "llm.words") == scored
    assert {name: after["recipes"][name] for name in both["recipes"]} == both["recipes"]
    log = (verified.results / "logs/verify/llm.words.log").read_text()
    assert "to measure: 0 single groups" in log


def test_more_groups_to_verify_measure_those_alone(verified: Project) -> None:
    before = verified.json("llm.words/verification.json")
    verified.edit(lambda config: config["runs"]["llm.words"]["verify"].update(groups=9))
    jobs = verified.run().jobs
    assert jobs == VERIFYING
    after = verified.json("llm.words/verification.json")
    assert {name: after["recipes"][name] for name in before["recipes"]} == before["recipes"]
    # More groups can give another recipe from measured damage.
    assert len(after["recipes"]) <= len(before["recipes"]) + 1
    for format, groups in before["singles"].items():
        assert {handle: after["singles"][format][handle] for handle in groups} == groups
        assert len(after["singles"][format]) > len(groups)


def test_refining_measures_recipes_alone_and_writes_one_to_ship(verified: Project) -> None:
    before = verified.json("llm.words/verification.json")
    verified.edit(lambda config: config["runs"]["llm.words"]["verify"].update(refine=6))
    assert verified.run().jobs == VERIFYING | {"refined/llm.words/fp8"}
    after = verified.json("llm.words/verification.json")
    assert after["singles"] == before["singles"]
    assert {name: after["recipes"][name] for name in before["recipes"]} == before["recipes"]
    assert 1 <= len(after["recipes"]) - len(before["recipes"]) <= 6
    log = (verified.results / "logs/verify/llm.words.log").read_text()
    assert "to measure: 0 single groups, " in log
    own = verified.json("llm.words/fp8/quant_config.json")
    refined = verified.json("llm.words/fp8/refined/quant_config.json")
    assert refined.keys() == own.keys()
    assert refined["effective_bits"] <= own["effective_bits"] * (1 + 1e-9)
    report = (verified.results / "llm.words/fp8/layer-sensitivity-report.md").read_text()
    assert "| refined by swaps |" in report
    assert "easured damage of single groups gives" in report
    assert not (verified.results / "llm.words/.verification.json.rounds").exists()
    assert verified.run().jobs == set()


def test_frozen_shows_what_was_verified_and_measures_nothing(verified: Project) -> None:
    verified.edit(lambda config: config["schemes"]["fp8"].update(effective_bits=9.0))
    jobs = verified.run("reports", "--config", "frozen=true").jobs
    assert "verification/llm.words" in jobs
    assert not {job for job in jobs if job.split("/")[0] in ("score", "verify")}
    report = (verified.results / "llm.words/fp8/layer-sensitivity-report.md").read_text()
    assert "## Predicted against measured" in report
    assert "is not measured, such as" in report
    assert (verified.results / "llm.words/fp8/figures/measured.svg").is_file()


def test_coverage_solves_its_scheme_again(study: Project) -> None:
    coverage = {"coverage_mode": "fraction", "coverage_fraction": 0.9}
    study.edit(lambda config: config["schemes"]["mixed"].update(coverage))
    assert study.run().jobs == chain("vlm.photos", "mixed")


def test_costs_of_ones_own_solve_their_scheme_again(study: Project) -> None:
    layers = study.json("vlm.photos/mixed/manifest.json")["layer_sensitivity"]
    table = study.root / "ms.csv"

    def write(factor: float) -> None:
        rows = [
            f"{handle.removesuffix('.quant_recipe')},{label.split('(')[0]},{cost * factor}"
            for handle, group in layers.items()
            for label, cost in zip(group["formats"], group["costs"], strict=True)
        ]
        table.write_text("\n".join(["layer,format,cost", *rows]) + "\n")

    write(1.0)
    total = sum(group["costs"][-1] for group in layers.values())

    def change(config: dict[str, Any]) -> None:
        del config["schemes"]["mixed"]["effective_bits"]
        config["schemes"]["mixed"]["cost_table"] = {"file": "ms.csv", "at_most": total * 10 / 16}

    study.edit(change)
    assert study.run().jobs == chain("vlm.photos", "mixed")
    state = study.json("vlm.photos/mixed/manifest.json")["autoquant_state"]
    assert state["constraints"]["effective_bits"] <= 10
    # The table itself is an input: other costs, another choice.
    write(0.9)
    assert study.run().jobs == chain("vlm.photos", "mixed")
    again = study.json("vlm.photos/mixed/manifest.json")["autoquant_state"]
    assert again["constraints"]["effective_bits"] > state["constraints"]["effective_bits"]


def test_a_new_scheme_over_measured_formats_scores_nothing(study: Project) -> None:
    def add(config: dict[str, Any]) -> None:
        config["schemes"]["mine"] = {"quant_formats": ["MY_INT8"], "effective_bits": 12.0}
        config["runs"]["vlm.photos"]["schemes"].append("mine")

    study.edit(add)
    assert study.run().jobs == chain("vlm.photos", "mine")


def test_a_new_format_is_one_scoring_job_that_measures_it_alone(study: Project) -> None:
    def add(config: dict[str, Any]) -> None:
        config["schemes"]["fp8"]["quant_formats"].append("INT8_WEIGHT_ONLY_ALL_LAYERS_CFG")
        config["runs"]["llm.words"]["schemes"] = ["mixed"]
        config["schemes"]["mixed"]["quant_formats"] = ["FP8_ALL_LAYERS_CFG"]

    # First away from a scheme shared with the other run, so that one run alone changes.
    study.edit(add)
    before = scores(study, "vlm.photos")
    outcome = study.run()
    assert outcome.jobs == {
        "score/vlm.photos",
        *chain("vlm.photos", *VLM_SCHEMES),
        *chain("llm.words", "mixed"),
    }
    after = scores(study, "vlm.photos")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"INT8_WEIGHT_ONLY_ALL_LAYERS_CFG"}
    log = (study.results / "logs/score/vlm.photos.log").read_text()
    assert "to measure: INT8_WEIGHT_ONLY_ALL_LAYERS_CFG\n" in log


def test_a_format_removed_from_schemes_scores_nothing(study: Project) -> None:
    remove = {"quant_formats": ["FP8_ALL_LAYERS_CFG"]}
    study.edit(lambda config: config["schemes"]["mixed"].update(remove))
    assert study.run().jobs == chain("vlm.photos", "mixed")
    assert "MY_INT8" in scores(study, "vlm.photos")


def test_an_own_format_removed_from_the_config_scores_nothing(study: Project) -> None:
    def remove(config: dict[str, Any]) -> None:
        del config["formats"]
        config["schemes"]["mixed"]["quant_formats"] = ["FP8_ALL_LAYERS_CFG"]

    study.edit(remove)
    assert study.run().jobs == chain("vlm.photos", "mixed")


def test_an_own_format_changed_under_its_name_is_measured_again(study: Project) -> None:
    before = scores(study, "vlm.photos")
    study.edit(lambda config: config["formats"]["MY_INT8"].update(weight={"axis": 0}))
    assert study.run().jobs == {"score/vlm.photos", *chain("vlm.photos", *VLM_SCHEMES)}
    after = scores(study, "vlm.photos")
    assert after["FP8_ALL_LAYERS_CFG"] == before["FP8_ALL_LAYERS_CFG"]
    assert after["MY_INT8"]["digest"] != before["MY_INT8"]["digest"]
    assert after["MY_INT8"]["groups"] != before["MY_INT8"]["groups"]


@pytest.mark.parametrize("change", [{"method": "kl_div"}, {"score_samples": 2}, {"seed": 1}])
def test_method_or_sampling_of_a_run_scores_that_run(
    study: Project, change: dict[str, Any]
) -> None:
    study.edit(lambda config: config["runs"]["llm.words"].update(change))
    assert study.run().jobs == {"score/llm.words", *chain("llm.words", "fp8")}


def test_a_seed_changed_measures_no_format_that_nobody_wants(study: Project) -> None:
    def change(config: dict[str, Any]) -> None:
        config["schemes"]["mixed"]["quant_formats"] = ["FP8_ALL_LAYERS_CFG"]
        config["runs"]["vlm.photos"]["seed"] = 1

    study.edit(change)
    study.run()
    assert set(scores(study, "vlm.photos")) == {"FP8_ALL_LAYERS_CFG"}


@pytest.mark.parametrize("change", [{"seed": 7}, {"calibration": 12}])
def test_a_dataset_changed_measures_what_stands_on_it(
    study: Project, change: dict[str, Any]
) -> None:
    study.edit(lambda config: config["datasets"]["words"].update(change))
    expected = {"dataset/words", "score/llm.words", *chain("llm.words", "fp8")}
    assert study.run().jobs == expected


def test_own_files_edited_in_place_are_noticed(study: Project) -> None:
    """More texts in the same file, a checkpoint trained on and saved over itself."""
    words, weights = study.root / "words.jsonl", study.root / "checkpoints/llm/model.safetensors"
    for file in (words, weights):
        file.touch()  # nothing but its time
    assert study.run("--dry-run").jobs == set()
    assert "Nothing to be done" in study.run("--dry-run").output
    before = scores(study, "llm.words")["FP8_ALL_LAYERS_CFG"]
    words.write_text(words.read_text().replace(" ball", " kite"))
    planned = study.run("--dry-run", "--quiet", "reason").output
    assert "dataset " in planned
    assert "model " not in planned
    data = bytearray(weights.read_bytes())
    data[-64:] = bytes(64)
    weights.write_bytes(data)
    expected = {"dataset/words", "model/llm", "score/llm.words", *chain("llm.words", "fp8")}
    assert study.run().jobs == expected
    after = scores(study, "llm.words")["FP8_ALL_LAYERS_CFG"]
    assert after["digest"] != before["digest"]
    assert after["groups"] != before["groups"]
    assert study.run().jobs == set()


def test_a_model_moved_measures_its_runs(study: Project) -> None:
    (study.root / "checkpoints/llm").rename(study.root / "checkpoints/other")
    study.edit(lambda config: config["models"]["llm"].update(checkpoint="./checkpoints/other"))
    assert study.run().jobs == {"model/llm", "score/llm.words", *chain("llm.words", "fp8")}


@pytest.mark.parametrize(
    ("page", "job"),
    [
        ("vlm.photos/fp8/layer-sensitivity-report.md", "report/vlm.photos/fp8"),
        ("vlm.photos/fp8/report.html", "page/vlm.photos/fp8"),
        ("vlm.photos/fp8/figures/depth.png", "page/vlm.photos/fp8"),
        ("index.html", "index"),
    ],
)
def test_one_deleted_page_is_rendered_alone(study: Project, page: str, job: str) -> None:
    file = study.results / page
    before = file.read_bytes()
    file.unlink()
    assert study.run().jobs == {job}
    assert file.read_bytes() == before


def test_an_edited_rule_costs_no_score(study: Project) -> None:
    rules = study.root / "workflow/rules/scoring.smk"
    rules.write_text(rules.read_text().replace(" > {log:q} 2>&1", "  > {log:q} 2>&1"))
    assert study.run().jobs == set()


def test_frozen_renders_what_is_there(study: Project) -> None:
    study.edit(lambda config: config["runs"]["llm.words"].update(seed=5))
    study.edit(lambda config: config["schemes"]["mixed"].update(effective_bits=9.0))
    for folder in ("calibration", "models"):
        for file in (study.results / folder).rglob("*"):
            if file.is_file():
                file.unlink()
    # As on a laptop that got the results alone.
    shutil.rmtree(study.root / "checkpoints")
    (study.root / "words.jsonl").unlink()
    outcome = study.run("reports", "--config", "frozen=true")
    assert not {job for job in outcome.jobs if job.split("/")[0] in ("score", "model", "dataset")}
    # The recipe of ModelOpt's is no report.
    assert chain("vlm.photos", "mixed") - {"recipe/vlm.photos/mixed"} <= outcome.jobs
    findings = study.json("llm.words/fp8/manifest.json")["findings"]
    stale = [finding for finding in findings if finding["code"] == "measured-with-other-settings"]
    assert len(stale) == 1
    assert "seed" in stale[0]["what"]


def test_frozen_names_what_is_missing(study: Project) -> None:
    (study.results / "llm.words/scores.json").unlink()
    shutil.rmtree(study.results / "llm.words/fp8")
    outcome = study.run("reports", "--config", "frozen=true", check=False)
    assert outcome.returncode != 0
    assert outcome.jobs == set()
    assert "results/llm.words/scores.json: is missing" in outcome.output


def test_a_single_target_runs_what_it_needs(new_study: Project, tmp_path: Path) -> None:
    study = new_study.copy(tmp_path / "study")
    assert study.run("results/calibration/words.sqlite").jobs == {"dataset/words"}


def test_a_manifest_of_others_stands_beside_ours(study: Project) -> None:
    group = {"formats": ["CUSTOM_0(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"],
             "scores": [0.5, 0.0], "costs": [8.0, 16.0]}  # fmt: skip
    manifest = {
        "scheme": {"name": "theirs_fp8", "quant_formats": ["FP8_ALL_LAYERS_CFG"]},
        "layer_sensitivity": {"visual.blocks.0.attn.qkv.quant_recipe": group},
    }
    (study.root / "elder.json").write_text(json.dumps(manifest))
    study.edit(lambda config: config.update(manifests={"elder": {"file": "elder.json"}}))
    assert study.run().jobs == {"imported/elder", *SUMMARIES}
    summary = (study.results / "summary.md").read_text()
    assert "theirs_fp8 (imported, g0)" in summary
    assert "visual.blocks.0.attn.qkv" in summary
    assert study.run().jobs == set()
    study.edit(lambda config: config["manifests"]["elder"].update(model="their-model"))
    assert study.run().jobs == {"imported/elder", *SUMMARIES}
    assert "## their-model" in (study.results / "summary.md").read_text().replace("\\", "")
    study.edit(lambda config: config.pop("manifests"))
    assert study.run().jobs == SUMMARIES
