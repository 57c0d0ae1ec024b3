"""The DAG as data: a switch of the config, a dry run, and the jobs that it plans."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Outcome, Project, make_project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

Jobs = dict[str, dict[str, str]]
"""Job, named ``solve/demo.captions/fp8_language``, → what Snakemake prints of it."""

EXAMPLES = sorted(
    path.name for path in (Path(__file__).parents[2] / "config" / "examples").glob("*.yaml")
)
SCHEME_RULES = ("solve", "layers", "frontier", "recipe", "report", "page")
MEASURING = {
    "fetch", "dataset", "model", "extension", "score", "scores", "verify", "checkpoint", "export"
}  # fmt: skip


@pytest.fixture(scope="module")
def project(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clean clone, for dry runs only."""
    return make_project(tmp_path_factory.mktemp("dag") / "project", repository)


def default_config(project: Project) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(project.config_file.read_text())
    return config


def planned(output: str) -> Jobs:
    """Return the jobs that a dry run prints, without their numbers, which differ by the call."""
    jobs: Jobs = {}
    for block in re.split(r"^(?=\[.*\]\n(?:local)?rule )", output, flags=re.MULTILINE):
        found = re.match(r"\[.*\]\n(?:local)?rule (\w+):\n", block)
        if found is None:
            continue
        fields = dict(re.findall(r"^    (\w+): (.*)$", block, flags=re.MULTILINE))
        pairs = [pair.split("=", 1) for pair in fields.get("wildcards", "").split(", ") if pair]
        name = "/".join([found[1], *(value for _, value in pairs)])
        assert name not in jobs
        del fields["jobid"]
        jobs[name] = fields
    return jobs


def dry_run(project: Project, *arguments: str) -> Outcome:
    return project.run(*arguments, "--dry-run", "--forceall")


def dag(project: Project, *arguments: str) -> Jobs:
    return planned(dry_run(project, *arguments).output)


def dag_of(project: Project, config: dict[str, Any], folder: Path) -> Jobs:
    """Return the jobs of another config, given on the command line."""
    file = folder / "other.yaml"
    file.write_text(yaml.safe_dump(config))
    return dag(project, "--configfile", str(file))


def expected(config: dict[str, Any]) -> set[str]:
    """Return the jobs of a config by its own text."""
    jobs = {"all", "summaries", "summary", "index", "scripts"}
    for name, run in config["runs"].items():
        jobs |= {f"dataset/{run['dataset']}", f"model/{run['model']}", f"score/{name}"}
        if config["datasets"][run["dataset"]].get("fetch") is not None:
            jobs.add(f"fetch/{run['dataset']}")
        if run.get("verify") is not None:
            jobs |= {f"verify/{name}", f"verification/{name}"}
            jobs |= {f"scatter/{name}/{scheme}" for scheme in run["schemes"]}
        for scheme in run["schemes"]:
            jobs |= {f"{rule}/{name}/{scheme}" for rule in SCHEME_RULES}
    return jobs


def gpus(jobs: Jobs) -> dict[str, int]:
    """Return how many GPUs each job asks for that asks for any."""
    found = {
        name: re.search(r"\bgpu=(\d+)", fields.get("resources", ""))
        for name, fields in jobs.items()
    }
    return {name: int(match[1]) for name, match in found.items() if match and int(match[1])}


def test_the_default_config(project: Project) -> None:
    jobs = dag(project)
    assert set(jobs) == expected(default_config(project))
    assert {name for name in jobs if name.startswith("score/")} == {
        "score/demo.image-text",
        "score/demo.captions",
    }
    assert gpus(jobs) == {}


def test_the_snakefile_in_workflow_gives_the_same(project: Project) -> None:
    assert dag(project, "--snakefile", "workflow/Snakefile") == dag(project)


def test_from_another_folder_and_as_a_module_of_another_workflow(
    project: Project, tmp_path: Path
) -> None:
    """Both as docs/operations.md has them."""
    documented = Path(__file__).parents[2] / "docs" / "operations.md"
    (module,) = re.findall(r"```python\n(configfile: .*?)```", documented.read_text(), re.DOTALL)
    other = Project(tmp_path / "my-study")
    other.root.mkdir()
    (tmp_path / "layersense").symlink_to(project.root)
    config = default_config(project)
    (other.root / "mine.yaml").write_text(yaml.safe_dump(config))
    alone = ("--snakefile", "../layersense/Snakefile", "--configfile", "mine.yaml")
    here = dag(other, *alone)
    assert set(here) == expected(config)
    run, scheme = "demo.image-text", "int8_all_layers"
    wanted = f"results/{run}/{scheme}/quant_config.json"
    module = module.replace("results/my-model.photos/fp8/quant_config.json", wanted)
    (other.root / "Snakefile").write_text(module)
    (other.root / "config.yaml").write_text(yaml.safe_dump({"layersense": config, "mine": 1}))
    jobs = dag(other)
    named = {f"dataset/{config['runs'][run]['dataset']}", "model/demo", f"score/{run}"}
    named |= {f"solve/{run}/{scheme}", f"recipe/{run}/{scheme}"}
    assert set(jobs) == {"ship", *(f"layersense_{name}" for name in named)}
    config["runs"][run]["devise"] = "cpu"
    (other.root / "config.yaml").write_text(yaml.safe_dump({"layersense": config}))
    refused = other.run("--dry-run", check=False)
    assert refused.returncode != 0
    assert 'config.yaml: runs."demo.image-text".devise: expected one of' in refused.output
    del config["runs"][run]["devise"]
    config["datasets"]["sample"]["calibration"] = 1000
    (other.root / "config.yaml").write_text(yaml.safe_dump({"layersense": config}))
    failed = other.run("--until", "layersense_dataset", check=False)
    assert failed.returncode != 0
    assert "1 job failed, 1 cause:" in failed.output
    assert "fix: set `calibration` to at most" in failed.output


def test_own_files_are_inputs_unless_snakemake_took_their_names_for_wildcards(
    project: Project, tmp_path: Path
) -> None:
    config = default_config(project)
    for name in ("plain $(no) * [x]?", "braces {run} {x}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.jsonl").touch()
        config["datasets"][name.split()[0]] = {
            "source": "text",
            "file": f"{tmp_path}/{name}/t.jsonl",
        }
    for name in ("plain", "braces"):
        run = {"model": "demo", "dataset": name, "modality": "text", "device": "cpu"}
        config["runs"][name] = {**run, "schemes": ["fp8_language"]}
    jobs = dag_of(project, config, tmp_path)
    assert jobs["dataset/plain"]["input"] == f"{tmp_path}/plain $(no) * [x]?/t.jsonl"
    assert "input" not in jobs["dataset/braces"]


def test_each_run_on_gpus_asks_for_them(project: Project, tmp_path: Path) -> None:
    config = default_config(project)
    config["runs"]["demo.captions"]["device"] = "cuda"
    jobs = dag_of(project, config, tmp_path)
    assert gpus(jobs) == {"score/demo.captions": 1}
    assert set(jobs) == expected(config) | {"extension/fp8"}
    assert "results/extensions/fp8.json" in jobs["score/demo.captions"]["input"]
    assert "extensions" not in jobs["score/demo.image-text"]["input"]
    del config["runs"]["demo.image-text"]["device"]
    config["runs"]["demo.image-text"]["gpus"] = 2
    jobs = dag_of(project, config, tmp_path)
    assert gpus(jobs) == {
        "score/demo.captions": 1,
        "score/demo.image-text": 2,
        "verify/demo.image-text": 2,
    }


def test_on_a_cluster_an_extension_is_built_on_a_gpu_into_the_cache_of_the_jobs(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "study", repository)
    config = default_config(project)
    config["runs"]["demo.captions"]["device"] = "cuda"
    config["extensions"] = str(tmp_path / "shared folder")
    project.config_file.write_text(yaml.safe_dump(config))
    target = "results/demo.captions/scores.json"
    outcome = dry_run(project, target, "--printshellcmds")
    # On one machine a build takes no GPU from the jobs that need one.
    assert gpus(planned(outcome.output)) == {"score/demo.captions": 1}
    for stage in ("extension fp8", "score demo.captions"):
        (command,) = re.findall(rf"-m layersense {stage} .*", outcome.output)
        words = shlex.split(command)
        assert words[words.index("--cache") + 1] == config["extensions"]
    # A cluster that takes no job: what it would have been asked for is printed before.
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "sinfo", "sacct", "squeue", "scancel"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    cluster = ("--executor", "slurm", "--jobs", "1", "--slurm-status-command", "squeue")
    soon = "--slurm-init-seconds-before-status-checks=1"
    refused = project.run("results/extensions/fp8.json", *cluster, soon, check=False)
    assert gpus(planned(refused.output)) == {"extension/fp8": 1}, refused.output


def test_gpu_jobs_of_larger_models_go_first(project: Project, tmp_path: Path) -> None:
    config = default_config(project)
    for name, megabytes in (("small", 3), ("large", 40)):
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(megabytes * 10**6)
        config["models"][name] = {"checkpoint": str(folder), "task": "image-text-to-text"}
    config["runs"]["demo.image-text"]["model"] = "large"
    config["runs"]["demo.captions"]["model"] = "small"
    jobs = dag_of(project, config, tmp_path)
    priorities = {name: int(job["priority"]) for name, job in jobs.items() if "priority" in job}
    assert priorities == {
        "score/demo.image-text": 41,
        "verify/demo.image-text": 41,
        "score/demo.captions": 4,
    }


def remove_scheme(config: dict[str, Any]) -> None:
    config["runs"]["demo.image-text"]["schemes"].remove("int8_all_layers")


def remove_run(config: dict[str, Any]) -> None:
    del config["runs"]["demo.captions"]


def add_entries_that_no_run_names(config: dict[str, Any]) -> None:
    config["datasets"]["idle"] = {"source": "sample"}
    config["models"]["idle"] = {"checkpoint": "owner/name", "task": "causal-lm"}
    config["schemes"]["idle"] = {"quant_formats": ["FP8_ALL_LAYERS_CFG"], "effective_bits": 9.0}


def add_dataset(config: dict[str, Any]) -> None:
    config["datasets"]["second"] = {"source": "sample", "calibration": 96, "seed": 1}
    config["runs"]["demo.captions"]["dataset"] = "second"


@pytest.mark.parametrize(
    ("change", "gone", "new"),
    [
        (
            remove_scheme,
            {f"{rule}/demo.image-text/int8_all_layers" for rule in (*SCHEME_RULES, "scatter")},
            set(),
        ),
        (
            remove_run,
            {
                "score/demo.captions",
                *(f"{rule}/demo.captions/fp8_language" for rule in SCHEME_RULES),
            },
            set(),
        ),
        (add_entries_that_no_run_names, set(), set()),
        (add_dataset, set(), {"dataset/second"}),
    ],
)
def test_entries_of_the_config_are_jobs(
    project: Project,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    gone: set[str],
    new: set[str],
) -> None:
    config = default_config(project)
    before = expected(config)
    change(config)
    jobs = set(dag_of(project, config, tmp_path))
    assert before - jobs == gone
    assert jobs - before == new


def test_frozen_has_no_rule_that_measures(repository: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path / "frozen", repository)
    frozen = ("--config", "frozen=true")
    listed = re.findall(r"^(\w+) \(", project.run(*frozen, "--list-rules").output, re.MULTILINE)
    everything = re.findall(r"^(\w+) \(", project.run("--list-rules").output, re.MULTILINE)
    assert set(everything) - set(listed) == MEASURING
    config = default_config(project)
    for run in config["runs"]:
        (project.results / run).mkdir(parents=True)
        for name in ("scores.json", "verification.json"):
            (project.results / run / name).write_text("{}")
    jobs = set(dag(project, *frozen))
    assert jobs == {job for job in expected(config) if job.split("/")[0] not in MEASURING}


def test_targets_plan_what_they_need(project: Project) -> None:
    needed = {
        "dataset/sample",
        "model/demo",
        "score/demo.captions",
        "solve/demo.captions/fp8_language",
    }
    target = "results/demo.captions/fp8_language/layers.parquet"
    assert set(dag(project, target)) == needed | {"layers/demo.captions/fp8_language"}
    jobs = expected(default_config(project)) - {"all"}

    def of(*rules: str) -> set[str]:
        return {job for job in jobs if job.split("/")[0] in rules}

    assert set(dag(project, "scores")) == of("dataset", "model", "score") | {"scores"}
    beside = of(
        *("report", "page", "scatter", "summary", "index", "scripts"),
        "recipe",
        "verify",
        "verification",
    )
    assert set(dag(project, "tables")) == jobs - beside | {"tables"}
    assert set(dag(project, "reports")) == jobs - of("recipe") | {"reports"}


def test_a_target_that_no_rule_makes_is_refused(project: Project) -> None:
    outcome = project.run("results/nobody/fp8/manifest.json", "--dry-run", check=False)
    assert outcome.returncode != 0
    assert "results/nobody/fp8/manifest.json" in outcome.output


def provide_files(root: Path) -> None:
    """Put files where the examples look for them; a dry run does not open them."""
    sample = root / "workflow/layersense/resources/coco-sample"
    shutil.copytree(sample, root / "data" / "coco")
    (root / "data" / "texts.jsonl").write_text(json.dumps({"text": "a line"}) + "\n")
    for folder in ("my-checkpoint", "checkpoints/ssdlite", "checkpoints/segformer-b2-coco"):
        (root / folder).mkdir(parents=True)
    (root / "yolo11n.pt").touch()
    (root / "photos").mkdir()
    (root / "photos" / "table.csv").write_text("image,text\n")


FETCHES = "qwen2.5-vl-3b-coco.yaml"
"""The example that has nothing to lack: checkpoint and data are fetched."""


def test_fetching_asks_for_connections_and_no_gpu(project: Project) -> None:
    file = f"config/examples/{FETCHES}"
    outcome = dry_run(project, "--configfile", file, "--resources", "gpu=1")
    jobs = planned(outcome.output)
    assert "fetch/coco" in jobs
    assert "fetch/coco" not in gpus(jobs)
    assert "connections=4" in jobs["fetch/coco"]["resources"]


@pytest.mark.parametrize("example", sorted(set(EXAMPLES) - {FETCHES}))
def test_an_example_lacks_its_files_and_nothing_else(project: Project, example: str) -> None:
    file = f"config/examples/{example}"
    outcome = project.run("--configfile", file, "--dry-run", check=False)
    assert outcome.returncode != 0
    assert "Building DAG" not in outcome.output
    problems = [line for line in outcome.output.splitlines() if line.startswith("  /")]
    assert problems
    assert all(f"{file}: " in line and line.endswith(" is not there") for line in problems)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_beside_its_files(repository: Path, tmp_path: Path, example: str) -> None:
    project = make_project(tmp_path / "example", repository)
    provide_files(project.root)
    file = project.root / "config" / "examples" / example
    jobs = dag(project, "--configfile", str(file), "--resources", "gpu=1")
    config = yaml.safe_load(file.read_text())
    extensions = {job for job in jobs if job.startswith("extension/")}
    assert extensions
    assert set(jobs) == expected(config) | extensions
    assert gpus(jobs) == {f"score/{run}": 1 for run in config["runs"]}


def test_all_problems_of_a_config_are_told_before_the_dag(project: Project, tmp_path: Path) -> None:
    config = default_config(project)
    config["runs"]["demo.captions"]["model"] = "dmeo"
    config["runs"]["demo.image-text"]["batchsize"] = 2
    config["schemes"]["int8_all_layers"]["quant_formats"] = ["INT8_ALL_LAYER_CFG"]
    config["datasets"]["sample"]["calibration"] = "many"
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(config))
    outcome = project.run("--configfile", str(file), "--dry-run", check=False)
    assert outcome.returncode != 0
    assert "Building DAG" not in outcome.output
    assert "the config has 4 problems:" in outcome.output
    for key, near in [
        ('runs."demo.captions".model', "demo"),
        ('runs."demo.image-text".batchsize', "batch_size"),
        ("schemes.int8_all_layers.quant_formats[0]", "INT8_ALL_LAYERS_CFG"),
        ("datasets.sample.calibration", None),
    ]:
        (line,) = (line for line in outcome.output.splitlines() if f"{file}: {key}: " in line)
        assert near is None or line.endswith(f"did you mean `{near}`?")


def test_a_key_on_the_command_line_is_checked_too(project: Project) -> None:
    outcome = project.run("--dry-run", "--config", "forzen=true", check=False)
    assert outcome.returncode != 0
    assert "found `forzen`" in outcome.output or 'found "forzen"' in outcome.output
    assert "did you mean `frozen`?" in outcome.output


@pytest.mark.parametrize(
    ("device", "arguments", "said"),
    [
        ("cuda", [], "no `--resources gpu=N` is given, so 2 scoring job(s)"),
        ("cuda", ["--resources", "gpu=0"], "`--resources gpu=0` does not keep scoring jobs"),
        ("cuda", ["--resources", "gpu=1"], "asks for 2 GPUs, and under `--resources gpu=1` its"),
        ("cuda", ["--resources", "gpu=2"], None),
        ("cpu", [], None),
        ("cpu", ["--resources", "gpu=0"], None),
    ],
)
def test_gpu_resources_missing_or_too_small_are_said_at_start(
    project: Project, tmp_path: Path, device: str, arguments: list[str], said: str | None
) -> None:
    config = default_config(project)
    for run in config["runs"].values():
        run["device"] = device
    if device == "cuda":
        config["runs"]["demo.captions"]["gpus"] = 2
    file = tmp_path / "devices.yaml"
    file.write_text(yaml.safe_dump(config))
    output = dry_run(project, "--configfile", str(file), *arguments).output
    before_the_dag = output.split("Building DAG")[0]
    if said is None:
        assert "scoring job" not in output
        assert "asks for" not in output
    else:
        assert said in before_the_dag


def test_lint_has_nothing_to_say(project: Project) -> None:
    outcome = project.run("--lint", check=False)
    assert outcome.returncode == 0, outcome.output
    assert "Congratulations" in outcome.output


def rules_of(file: Path) -> dict[str, str]:
    """Return the body of each rule of a file."""
    parts = re.split(r"^ *rule (\w+):\n", file.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_rule_is_complete(repository: Path, project: Project) -> None:
    rules = {
        name: body
        for file in sorted((repository / "workflow" / "rules").glob("*.smk"))
        for name, body in rules_of(file).items()
    }
    targets = rules_of(repository / "Snakefile")
    listed = re.findall(r"^(\w+) \(", project.run("--list-rules").output, re.MULTILINE)
    assert set(listed) == set(rules) | set(targets)
    for name, body in {**rules, **targets}.items():
        assert re.match(r' +""".+"""\n', body), f"{name} has no docstring"
    for name, body in rules.items():
        keys = re.findall(r"^    (\w+):", body, flags=re.MULTILINE)
        assert {"output", "log", "benchmark", "conda", "shell"} <= set(keys), name
