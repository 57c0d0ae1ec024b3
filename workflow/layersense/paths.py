"""Every path under ``results/``, in one place.

Each function takes names, or Snakemake wildcards such as ``"{run}"``, and returns a path relative
to the working directory.
"""

RESULTS = "results"

RESERVED_RUNS = frozenset(
    {
        "calibration",
        "imported",
        "models",
        "logs",
        "benchmarks",
        "extensions",
        "assets",
        "sensitivity.parquet",
        "runs.parquet",
        "index.html",
        "summary.md",
        "readme.md",
    }
)
"""Names (in lower case) that a run may not take: they are files or folders of the workflow."""

RESERVED_SCHEMES = frozenset(
    {"scores.json", "measured.json", "verification.json", "verification.parquet"}
)
"""Names (in lower case) that a scheme may not take, for the same reason."""


def calibration(dataset: str) -> str:
    """Return the calibration database of ``dataset``."""
    return f"{RESULTS}/calibration/{dataset}.sqlite"


def fetched(dataset: str) -> str:
    """Return the record of what ``dataset`` has on disk, where it fetches."""
    return f"{RESULTS}/calibration/{dataset}.fetched.json"


def model(model: str) -> str:
    """Return the record of a resolved checkpoint: where it lies, its digest, its size."""
    return f"{RESULTS}/models/{model}/model.json"


def extension(extension: str) -> str:
    """Return the record of whether one of ModelOpt's CUDA extensions could be built."""
    return f"{RESULTS}/extensions/{extension}.json"


def scores(run: str) -> str:
    """Return the measured scores of a run, one entry a format."""
    return f"{RESULTS}/{run}/scores.json"


def measured(run: str) -> str:
    """Return the small index of a run's scores that is read while Snakemake parses."""
    return f"{RESULTS}/{run}/measured.json"


def verification(run: str) -> str:
    """Return what was measured on a run's held-out rows."""
    return f"{RESULTS}/{run}/verification.json"


def verification_table(run: str) -> str:
    """Return the table of a run's measured damage beside the predicted."""
    return f"{RESULTS}/{run}/verification.parquet"


def manifest(run: str, scheme: str) -> str:
    """Return the manifest of one scheme."""
    return f"{RESULTS}/{run}/{scheme}/manifest.json"


def layers(run: str, scheme: str) -> str:
    """Return the tidy table of one scheme: a row for each layer group and format."""
    return f"{RESULTS}/{run}/{scheme}/layers.parquet"


def frontier(run: str, scheme: str) -> str:
    """Return the table of one scheme's recipes over all budgets: bits against damage."""
    return f"{RESULTS}/{run}/{scheme}/frontier.parquet"


def quant_config(run: str, scheme: str) -> str:
    """Return the recipe of one scheme as ModelOpt configs."""
    return f"{RESULTS}/{run}/{scheme}/quant_config.json"


def exported(run: str, scheme: str) -> str:
    """Return the record of one scheme's checkpoint to ship, which lies in a folder beside it."""
    return f"{RESULTS}/{run}/{scheme}/checkpoint.json"


def recipe_yaml(run: str, scheme: str) -> str:
    """Return the recipe of one scheme for NVIDIA's own tools."""
    return f"{RESULTS}/{run}/{scheme}/recipe.yaml"


def refined(run: str, scheme: str, file: str) -> str:
    """Return a file of the scheme's refined recipe: manifest, ModelOpt configs, recipe.yaml."""
    return f"{RESULTS}/{run}/{scheme}/refined/{file}"


def report_markdown(run: str, scheme: str) -> str:
    """Return the Markdown report of one scheme."""
    return f"{RESULTS}/{run}/{scheme}/layer-sensitivity-report.md"


def imported(name: str) -> str:
    """Return a manifest of another implementation, in our own form."""
    return f"{RESULTS}/imported/{name}.json"


def imported_layers(name: str) -> str:
    """Return the tidy table of an imported manifest."""
    return f"{RESULTS}/imported/{name}.parquet"


def report_page(run: str, scheme: str) -> str:
    """Return the HTML report of one scheme."""
    return f"{RESULTS}/{run}/{scheme}/report.html"


def figure(run: str, scheme: str, name: str) -> str:
    """Return a figure of one scheme's report: ``depth.svg``."""
    return f"{RESULTS}/{run}/{scheme}/figures/{name}"


def scripts() -> str:
    """Return the chart library that every page inlines."""
    return f"{RESULTS}/assets/vega.js"


def index() -> str:
    """Return the HTML page that shows all runs and schemes side by side."""
    return f"{RESULTS}/index.html"


def sensitivity() -> str:
    """Return all ``layers.parquet`` in one table."""
    return f"{RESULTS}/sensitivity.parquet"


def runs() -> str:
    """Return the table with one row for each run and scheme."""
    return f"{RESULTS}/runs.parquet"


def summary() -> str:
    """Return the Markdown page that shows all runs and schemes side by side."""
    return f"{RESULTS}/summary.md"


def log(*names: str) -> str:
    """Return the log of a job: ``log("score", "{run}")`` is ``results/logs/score/{run}.log``."""
    return f"{RESULTS}/logs/{'/'.join(names)}.log"


def benchmark(*names: str) -> str:
    """Return the Snakemake benchmark of a job, named like its log."""
    return f"{RESULTS}/benchmarks/{'/'.join(names)}.tsv"
