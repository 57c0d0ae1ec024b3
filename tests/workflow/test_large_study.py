"""20 models × 8 schemes: one edit, exactly its jobs.

The scores are made up and written by the library, and so is every manifest and table that follows
from them. Pages, which nothing reads, are empty, and so is the database. Snakemake then runs the
whole study with jobs that only put these files into place, and plans as after a real night.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_dag import planned

from conftest import Project, make_project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

MODELS = [f"model-{number:02d}" for number in range(20)]
SCHEMES = [f"bits-{number}" for number in range(8)]
FORMATS = ["INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG", "FP8_ALL_LAYERS_CFG"]
SCHEME_RULES = ("solve", "layers", "frontier", "recipe", "report", "page")
PUT_INTO_PLACE = """
import shutil, sys
from pathlib import Path

for place in map(Path, sys.argv[1:]):
    made = Path("made", place)
    if place.parts[:1] != ("results",) or not made.exists():
        continue
    place.parent.mkdir(parents=True, exist_ok=True)
    if made.is_dir():
        shutil.copytree(made, place, dirs_exist_ok=True)
    elif not place.exists():  # Snakemake removes what a job is to make
        shutil.copyfile(made, place)
"""
SUMMARIES = {"summaries", "summary", "index"}


def chain(*pairs: tuple[str, str]) -> set[str]:
    """Return the jobs of these runs' schemes, and those that put all together."""
    return SUMMARIES | {f"{rule}/{run}/{scheme}" for run, scheme in pairs for rule in SCHEME_RULES}


def of_run(run: str) -> set[str]:
    return {f"score/{run}"} | chain(*((run, scheme) for scheme in SCHEMES))


def large_config() -> dict[str, Any]:
    """A run of each model, named like it, with all schemes."""
    return {
        "datasets": {"sample": {"source": "sample", "calibration": 96, "heldout": 16}},
        "models": {
            name: {"checkpoint": f"owner/{name}", "task": "image-text-to-text"} for name in MODELS
        },
        "schemes": {
            name: {"quant_formats": FORMATS, "effective_bits": 5.0 + number / 2}
            for number, name in enumerate(SCHEMES)
        },
        "runs": {
            name: {"model": name, "dataset": "sample", "schemes": SCHEMES, "device": "cpu"}
            for name in MODELS
        },
    }


@pytest.fixture(scope="module")
def large(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished study of 160 results; not to be changed."""
    project = make_project(tmp_path_factory.mktemp("large") / "study", repository)
    project.config_file.write_text(yaml.safe_dump(large_config()))
    made, instead = project.root / "made", project.root / "layersense"
    made.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        fabricate(repository)
    # Jobs find it in the folder where they start, before the package itself.
    instead.mkdir()
    (instead / "__init__.py").touch()
    (instead / "__main__.py").write_text(PUT_INTO_PLACE)
    project.run("--jobs", "16")
    for folder in (made, instead):
        shutil.rmtree(folder)
    return project


def fabricate(repository: Path) -> None:
    """Write the results of the config into the working folder."""
    sys.path.insert(0, str(repository / "tests" / "unit"))
    import score_files as sf

    from layersense import paths, settings
    from layersense.manifests.tables import write_layers, write_runs, write_sensitivity
    from layersense.models.checkpoints import Checkpoint, write_checkpoint
    from layersense.recipes.decide import solve_scheme
    from layersense.recipes.frontier import write_frontier
    from layersense.recipes.quant_config import write_quant_config
    from layersense.recipes.recipe_yaml import write_recipe
    from layersense.scoring.scores import write_scores
    from layersense.validation import load_config

    config = load_config(large_config(), "test")
    pages = [paths.calibration("sample"), paths.scripts(), paths.index(), paths.summary()]
    manifests, tables = [], []
    for number, run in enumerate(MODELS):
        checkpoint = Checkpoint(
            **dict.fromkeys(("path", "id", "digest", "task", "architecture", "dtype"), "x"),
            revision=None,
            n_parameters=1,
            trust_remote_code=False,
            size_bytes=1,
        )
        write_checkpoint(paths.model(run), checkpoint)
        damage = {name: value * (1 + number) for name, value in sf.DAMAGE.items()}
        formats = settings.run_formats(config, run)
        scores = sf.make_scores(damage=damage, formats=FORMATS, run=run)
        for name, entry in scores.formats.items():
            entry.settings = {**settings.score_settings(config, run), "format": formats[name]}
        write_scores(paths.scores(run), scores)
        settings.write_measured(paths.measured(run), settings.score_settings(config, run), formats)
        for scheme in SCHEMES:
            manifest, table = paths.manifest(run, scheme), paths.layers(run, scheme)
            wanted = settings.scheme_settings(config, run, scheme)
            solve_scheme(run, scheme, wanted, Path(paths.scores(run)), Path(manifest))
            write_layers(manifest, table)
            write_frontier(manifest, paths.frontier(run, scheme))
            write_quant_config(manifest, paths.quant_config(run, scheme))
            write_recipe(manifest, paths.recipe_yaml(run, scheme))
            manifests.append(manifest)
            tables.append(table)
            pages += [paths.report_markdown(run, scheme), paths.report_page(run, scheme)]
            for name in ("depth", "heatmap", "frontier"):
                pages += [paths.figure(run, scheme, f"{name}.{kind}") for kind in ("svg", "png")]
    write_sensitivity(tables, paths.sensitivity())
    write_runs(manifests, paths.runs())
    for page in map(Path, pages):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.touch()


def nothing(config: dict[str, Any]) -> None:
    pass


def budget(config: dict[str, Any]) -> None:
    config["schemes"]["bits-3"]["effective_bits"] = 6.25


def seed(config: dict[str, Any]) -> None:
    config["runs"]["model-07"]["seed"] = 1


def revision(config: dict[str, Any]) -> None:
    config["models"]["model-11"]["revision"] = "0" * 40


def scheme(config: dict[str, Any]) -> None:
    config["schemes"]["new"] = {"quant_formats": FORMATS[1:], "effective_bits": 9.0}
    config["runs"]["model-02"]["schemes"] = [*SCHEMES, "new"]


def new_format(config: dict[str, Any]) -> None:
    config["schemes"]["bits-0"]["quant_formats"] = [*FORMATS, "INT8_ALL_LAYERS_CFG"]
    for name in MODELS[1:]:
        config["runs"][name]["schemes"] = SCHEMES[1:]


@pytest.mark.parametrize(
    ("edit", "jobs"),
    [
        (nothing, set()),
        (budget, chain(*((run, "bits-3") for run in MODELS))),
        (seed, of_run("model-07")),
        (revision, {"model/model-11"} | of_run("model-11")),
        (scheme, chain(("model-02", "new"))),
        (new_format, of_run("model-00")),
    ],
)
def test_one_edit_plans_exactly_its_jobs(
    large: Project, tmp_path: Path, edit: Callable[[dict[str, Any]], None], jobs: set[str]
) -> None:
    config = large_config()
    edit(config)
    file = tmp_path / "edited.yaml"
    file.write_text(yaml.safe_dump(config))
    output = large.run("--dry-run", "--configfile", str(file)).output
    assert set(planned(output)) - {"all"} == jobs


def test_one_edit_runs_exactly_its_jobs(large: Project, tmp_path: Path) -> None:
    study = large.copy(tmp_path / "study")
    study.edit(scheme)
    before = (study.results / "model-02/bits-0/layers.parquet").stat().st_mtime_ns
    # Not the pages: an index of 161 results compares each with all others.
    jobs = {f"{rule}/model-02/new" for rule in ("solve", "layers", "frontier")}
    assert study.run("tables").jobs == jobs | {"summaries"}
    assert (study.results / "model-02/bits-0/layers.parquet").stat().st_mtime_ns == before
    assert study.run("tables").jobs == set()
