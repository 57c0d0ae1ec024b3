"""Config lookups, targets, wildcard constraints: what every stage needs."""

import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

WORKFLOW = Path(os.path.relpath(Path(workflow.current_basedir).parent))

# The package beside these rules, whether or not it is installed in Snakemake's own environment.
sys.path.insert(0, str(WORKFLOW.resolve()))

from layersense import failures, job_resources, paths, settings
from layersense.calibration import build
from layersense.calibration.database import USER_VERSION as DATABASE_VERSION
from layersense.config_file import read_config_file
from layersense.errors import LayersenseError
from layersense.export.store import EXPORT_VERSION
from layersense.files import canonical_json, check_writable
from layersense.manifests.schema import SCHEMA_VERSION as MANIFEST_VERSION
from layersense.manifests.tables import TABLE_VERSION
from layersense.models import checkpoints
from layersense.quantization.extensions import EXTENSIONS
from layersense.quantization.formats import registry
from layersense.recipes.frontier import FRONTIER_VERSION
from layersense.recipes.quant_config import QUANT_CONFIG_VERSION
from layersense.verification.store import VERIFICATION_TABLE_VERSION
from layersense.validation import check_gpus, load_config

CONFIG_FILES = [
    str(file) for file in (workflow.overwrite_configfiles or workflow.configfiles)
]

try:
    for file in CONFIG_FILES:
        read_config_file(file)
    CONFIG = load_config(config, " + ".join(CONFIG_FILES) or "--config")
    if workflow.is_main_process:
        for warning in check_gpus(CONFIG, workflow.global_resources.get("gpu").value):
            logger.warning(warning)
        if not workflow.dryrun:
            check_writable(paths.RESULTS)
        if {"{", "}"} & set(os.getcwd()):
            raise LayersenseError(
                f"{os.getcwd()}: Snakemake takes braces in a folder's name for wildcards; rename it"
            )
except LayersenseError as error:
    raise WorkflowError(str(error)) from None

# The interpreter that runs Snakemake: a virtual environment that is not activated leaves plain
# `python` to the system. With environments deployed by Snakemake it is theirs.
if workflow.deployment_settings.deployment_method:
    PYTHON = f"PYTHONPATH={shlex.quote(str(WORKFLOW.resolve()))} python"
else:
    PYTHON = shlex.quote(sys.executable)
# A path's own braces are no wildcards. The log is named too, so that JSON lines go beside it.
PYTHON = "LAYERSENSE_LOG={log:q} " + PYTHON.replace("{", "{{").replace("}", "}}")


def names(mapping):
    """Return a regular expression that matches exactly the names of a section."""
    return "|".join(re.escape(name) for name in mapping)


# Where extensions are kept changes no result, so it is no parameter of a rule.
CACHE = f" --cache {shlex.quote(CONFIG.extensions)}" if CONFIG.extensions else ""
CACHE = CACHE.replace("{", "{{").replace("}", "}}")
EXTENSIONS_VERSION = f"modelopt-{registry().modelopt}"


wildcard_constraints:
    extension=names(EXTENSIONS),
    dataset=names(CONFIG.datasets),
    model=names(CONFIG.models),
    run=names(CONFIG.runs),
    scheme=names(CONFIG.schemes),
    imported=names(CONFIG.manifests),


def per_scheme(path):
    """Return a path for every run and each of its schemes."""
    return [
        path(run, scheme)
        for run, entry in CONFIG.runs.items()
        for scheme in entry.schemes
    ]


def per_verified_scheme(path):
    """Return a path for every verified run and each of its schemes."""
    return [
        path(run, scheme)
        for run, entry in CONFIG.runs.items()
        if entry.verify
        for scheme in entry.schemes
    ]


def verifications():
    """Return the table of every verified run."""
    return [
        paths.verification_table(run)
        for run, entry in CONFIG.runs.items()
        if entry.verify
    ]


FIGURES = [
    f"{name}.{kind}"
    for name in ("depth", "heatmap", "frontier")
    for kind in ("svg", "png")
]
SCATTER = ["measured.svg", "measured.png"]


def figure(name):
    """Return a function from run and scheme to the path of a figure."""
    return lambda run, scheme: paths.figure(run, scheme, name)


def targets(stage):
    """Return the final files of a stage, the one place that names them."""
    return {
        "scores": [paths.scores(run) for run in CONFIG.runs],
        "tables": [
            *per_scheme(paths.manifest),
            *per_scheme(paths.layers),
            *per_scheme(paths.frontier),
            paths.sensitivity(),
            paths.runs(),
        ],
        "recipes": [
            *per_scheme(paths.quant_config),
            *per_scheme(paths.recipe_yaml),
            *[
                paths.refined(run, scheme, "quant_config.json")
                for run, entry in CONFIG.runs.items()
                if entry.verify and entry.verify.refine
                for scheme in entry.schemes
            ],
        ],
        "verification": [
            paths.verification_table(run)
            for run, entry in CONFIG.runs.items()
            if entry.verify
        ],
        "export": [
            paths.exported(run, scheme)
            for run, entry in CONFIG.runs.items()
            for scheme in entry.export
        ],
        "reports": [
            *per_scheme(paths.report_markdown),
            *per_scheme(paths.report_page),
            *[file for name in FIGURES for file in per_scheme(figure(name))],
            *[file for name in SCATTER for file in per_verified_scheme(figure(name))],
            paths.summary(),
            paths.index(),
        ],
    }[stage]


def slice_of(function, *wildcard_names):
    """Return a params function: one JSON string of exactly what changes a rule's output.

    Snakemake compares params as a nameless set of values, so there is one value.
    """
    return lambda wildcards: canonical_json(
        function(CONFIG, *(getattr(wildcards, name) for name in wildcard_names))
    )


def environment(name):
    """Return the conda file of an environment."""
    return f"../../envs/{name}.yaml"


def listed_in(wildcards):
    """Return the files that list a dataset's rows; of one that fetches, what it fetched."""
    dataset = CONFIG.datasets[wildcards.dataset]
    if getattr(dataset, "fetch", None) is not None:
        return [paths.fetched(wildcards.dataset)]
    return tracked(build.source_files(dataset))


def checkpoint_files(wildcards):
    """Return the files of a model's checkpoint, if it lies on this machine."""
    return tracked(checkpoints.source_files(CONFIG.models[wildcards.model]))


def tracked(files):
    """Return the user's files that can be inputs: Snakemake takes braces for wildcards.

    Of one that cannot be, an edit goes unnoticed.
    """
    return [str(file) for file in files if "{" not in str(file)]


def connections(wildcards):
    """Return how many connections a dataset fetches over at once."""
    return CONFIG.datasets[wildcards.dataset].fetch.connections


def formats_to_have(wildcards):
    """Return the formats of a run's score file: those wanted, and those held that still match."""
    held = settings.read_measured(paths.measured(wildcards.run))
    return canonical_json(settings.tracked_formats(CONFIG, wildcards.run, held))


def on_gpu(wildcards):
    """Return whether a run scores on a GPU."""
    return CONFIG.runs[wildcards.run].device == "cuda"


def gpus_of_run(wildcards):
    """Return how many GPUs a job of a run needs."""
    return CONFIG.runs[wildcards.run].gpus if on_gpu(wildcards) else 0


def extensions_of_run(wildcards):
    """Return the CUDA extensions that a run's formats need, if it scores on a GPU."""
    if not on_gpu(wildcards):
        return []
    held = settings.read_measured(paths.measured(wildcards.run))
    needed = settings.run_extensions(CONFIG, wildcards.run, held)
    return [paths.extension(name) for name in needed]


def longest_first(wildcards, input):
    """Return the priority of a run's GPU jobs, by the size of its model."""
    model = CONFIG.models[CONFIG.runs[wildcards.run].model]
    return job_resources.priority(input.model, getattr(model, "checkpoint", None))


def measured_scores(wildcards):
    """Return a run's score file; under `frozen` it has to be there."""
    path = paths.scores(wildcards.run)
    if CONFIG.frozen and not Path(path).exists():
        raise WorkflowError(
            f"{path}: is missing and `frozen: true` measures nothing; copy it here, or leave "
            f"`frozen` out to measure run {wildcards.run}"
        )
    return path


def measured_verification(wildcards):
    """Return what was measured on held-out rows; under `frozen` it has to be there."""
    path = paths.verification(wildcards.run)
    if CONFIG.frozen and not Path(path).exists():
        raise WorkflowError(
            f"{path}: is missing and `frozen: true` measures nothing; copy it here, leave `verify` "
            f"of run {wildcards.run} out, or leave `frozen` out to measure it"
        )
    return path


def manifests_of_run(wildcards):
    """Return the manifests of all schemes of a run."""
    schemes = CONFIG.runs[wildcards.run].schemes
    return [paths.manifest(wildcards.run, scheme) for scheme in schemes]


def verification_of_run(wildcards):
    """Return the table of a run's verification, if it is verified."""
    verified = CONFIG.runs[wildcards.run].verify is not None
    return [paths.verification_table(wildcards.run)] if verified else []


def checkpoints_to_ship(wildcards):
    """Return the records of the checkpoints that runs ask for; there has to be one."""
    if not (files := targets("export")):
        raise WorkflowError(
            "no run exports anything; list schemes under `export` of a run, such as "
            "`export: [fp8]`"
        )
    return files


def cost_table(wildcards):
    """Return the file of a scheme's own costs, if they are its budget."""
    table = CONFIG.schemes[wildcards.scheme].cost_table
    return [table.file] if table else []


def render_inputs(template, *parts):
    """Return a template, what it includes, and the modules that render it.

    An edit of any of them re-renders.
    """
    return {
        "template": str(WORKFLOW / "templates" / template),
        "parts": [str(WORKFLOW / "templates" / part) for part in parts],
        "modules": render_modules(),
    }


def render_modules():
    """Return the modules that render pages and figures."""
    return sorted(str(path) for path in (WORKFLOW / "layersense/reports").glob("*.py"))


def category(wildcards):
    """Return under which heading a page stands in `snakemake --report`: its model."""
    return CONFIG.runs[wildcards.run].model


def labels(page):
    """Return a function of the wildcards for the labels of a page in `snakemake --report`."""
    return lambda wildcards: {
        "model": category(wildcards),
        "scheme": getattr(wildcards, "scheme", "all of the run"),
        "page": page,
    }


def tell_failures(logs):
    """Print the failed jobs by cause, and send the same to LAYERSENSE_WEBHOOK if that is set."""
    found = [failure for file in logs for failure in failures.failures(file)]
    text = failures.report(found)
    if not text:
        return
    print(f"\n{text}\n", file=sys.stderr)
    if webhook := os.environ.get("LAYERSENSE_WEBHOOK"):
        if problem := failures.post(webhook, text):
            logger.warning(f"LAYERSENSE_WEBHOOK: nothing was sent, {problem}")
