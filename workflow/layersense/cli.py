"""The command line: one sub-command for each rule, and a few for people.

Imports that cost time stand inside the commands, so that a cheap command stays cheap.
"""

import gc
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from layersense import __version__
from layersense.errors import LayersenseError, is_out_of_memory
from layersense.logs import Terminated, end_on_sigterm, open_job_log

RULES = "Steps of the workflow, which Snakemake calls"
PEOPLE = "For people"


class Sections(TyperGroup):
    """A group whose help says first what people call; typer does that under rich alone."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands under two headings, in the order in which they are defined."""
        width = formatter.width - 6 - max(map(len, self.commands))
        for heading in (PEOPLE, RULES):
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (name, command.get_short_help_str(width))
                        for name, command in self.commands.items()
                        if getattr(command, "rich_help_panel", None) == heading
                    ]
                )


app = typer.Typer(
    cls=Sections,
    name="layersense",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _parse_json(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise typer.BadParameter("expected a JSON object")
    return value


Settings = Annotated[
    dict[str, Any],
    typer.Option(parser=_parse_json, metavar="JSON", help="The slice of the config, as JSON."),
]
Out = Annotated[Path, typer.Option(help="File to write.")]
Manifest = Annotated[Path, typer.Option(help="Manifest of one scheme.")]
Template = Annotated[Path, typer.Option(help="Jinja2 template.")]
Cache = Annotated[
    str | None, typer.Option(help="Folder of CUDA extensions, for all GPUs and versions.")
]
Gpus = Annotated[
    int, typer.Option(min=0, help="GPUs that the model is spread over; of no meaning on a CPU.")
]
Extensions = Annotated[
    list[Path] | None, typer.Argument(help="What came of building the CUDA extensions.")
]
Verifications = Annotated[
    list[Path] | None, typer.Argument(help="Table of each verified run's verification.")
]
Scripts = Annotated[Path, typer.Option(help="What `layersense scripts` wrote.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layersense {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Which layers of a model can be quantized, and what does each one cost?"""


@app.command(rich_help_panel=RULES)
def dataset(name: str, settings: Settings, out: Out) -> None:
    """Build a calibration database."""
    from pydantic import TypeAdapter

    from layersense.calibration.build import build_database
    from layersense.config import Dataset

    build_database(name, TypeAdapter[Any](Dataset).validate_python(settings), out)


@app.command(rich_help_panel=RULES)
def fetch(
    name: str,
    settings: Settings,
    out: Out,
    connections: Annotated[int, typer.Option(min=1, max=16, help="At once.")] = 4,
) -> None:
    """Fetch what a COCO dataset lacks: annotations once, then the sampled images alone."""
    from layersense.calibration.fetch import fetch_coco
    from layersense.config import CocoDataset

    fetch_coco(name, CocoDataset.model_validate(settings), out, connections)


@app.command(rich_help_panel=RULES)
def model(name: str, settings: Settings, out: Out) -> None:
    """Fetch, or build, a checkpoint and record what it is."""
    from layersense.models.resolve import resolve_model

    resolve_model(name, settings, out)


@app.command(rich_help_panel=RULES)
def extension(name: str, out: Out, cache: Cache = None) -> None:
    """Build one of ModelOpt's CUDA extensions, and record whether that worked."""
    import msgspec

    from layersense.files import write_json
    from layersense.quantization.build import build
    from layersense.quantization.extensions import cache_folder

    write_json(out, msgspec.to_builtins(build(name, cache_folder(cache))))


@app.command(rich_help_panel=RULES)
def score(
    run: str,
    settings: Settings,
    formats: Annotated[
        dict[str, Any],
        typer.Option(parser=_parse_json, metavar="JSON", help="Format name → its settings."),
    ],
    model: Annotated[Path, typer.Option(help="Record of the checkpoint.")],
    database: Annotated[Path, typer.Option(help="Calibration database.")],
    out: Out,
    measured: Annotated[Path, typer.Option(help="Index of the score file to write.")],
    extensions: Extensions = None,
    cache: Cache = None,
    gpus: Gpus = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Measure every layer group under every missing format."""
    _quiet()
    from layersense.quantization.extensions import read_all
    from layersense.scoring.job import score_run
    from layersense.settings import write_measured

    scores = score_run(
        run,
        settings,
        formats,
        model_file=model,
        database_file=database,
        out=out,
        threads=threads,
        gpus=max(gpus, 1),
        built=read_all(extensions or []),
        cache=cache,
    )
    write_measured(measured, settings, {name: formats[name] for name in scores.formats})


@app.command(rich_help_panel=RULES)
def solve(
    run: str,
    scheme: str,
    settings: Settings,
    scores: Annotated[Path, typer.Option(help="Score file of the run.")],
    out: Out,
) -> None:
    """Choose a format for every layer group within the budget; write the manifest."""
    from layersense.recipes.decide import solve_scheme

    solve_scheme(run, scheme, settings, scores, out)


@app.command(rich_help_panel=RULES)
def frontier(manifest: Manifest, out: Out) -> None:
    """Write the recipes of one scheme over all budgets."""
    from layersense.recipes.frontier import write_frontier

    write_frontier(manifest, out)


@app.command(rich_help_panel=RULES)
def table(manifest: Manifest, out: Out) -> None:
    """Write the tidy table of one manifest."""
    from layersense.manifests.tables import write_layers

    write_layers(manifest, out)


@app.command(rich_help_panel=RULES)
def tables(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests, each beside its table.")],
    sensitivity: Annotated[Path, typer.Option(help="All layer tables in one.")],
    runs: Annotated[Path, typer.Option(help="One row for each run and scheme.")],
) -> None:
    """Concatenate the tables of all runs and schemes."""
    from layersense.manifests.tables import table_beside, write_runs, write_sensitivity

    write_sensitivity([table_beside(manifest) for manifest in manifests], sensitivity)
    write_runs(manifests, runs)


@app.command(rich_help_panel=RULES)
def recipe(
    manifest: Manifest,
    out: Out,
    recipe_yaml: Annotated[Path, typer.Option("--yaml", help="Recipe for NVIDIA's tools.")],
) -> None:
    """Write the recipe of one scheme as ModelOpt configs, and for NVIDIA's own tools."""
    from layersense.recipes.quant_config import write_quant_config
    from layersense.recipes.recipe_yaml import write_recipe

    write_quant_config(manifest, out)
    write_recipe(manifest, recipe_yaml)


@app.command(rich_help_panel=RULES)
def imported(
    name: str,
    settings: Settings,
    file: Annotated[Path, typer.Option(help="Manifest of another implementation.")],
    out: Out,
) -> None:
    """Write a manifest of another implementation in our own form, and its table beside it."""
    from layersense.manifests.imports import import_manifest, write_import

    write_import(import_manifest(file, run=name, **settings), out)


@app.command(rich_help_panel=RULES)
def verify(
    run: str,
    manifests: Annotated[list[Path], typer.Argument(help="Manifests of the run's schemes.")],
    settings: Settings,
    model: Annotated[Path, typer.Option(help="Record of the checkpoint.")],
    database: Annotated[Path, typer.Option(help="Calibration database.")],
    out: Out,
    cache: Cache = None,
    gpus: Gpus = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Measure recipes and single groups on the held-out rows, where that is missing."""
    _quiet()
    from layersense.verification.job import verify_run

    verify_run(
        run,
        settings,
        manifests,
        model_file=model,
        database_file=database,
        out=out,
        threads=threads,
        gpus=max(gpus, 1),
        cache=cache,
    )


@app.command(rich_help_panel=RULES)
def verification(
    manifests: Annotated[list[Path], typer.Argument(help="Manifests of the run's schemes.")],
    measured: Annotated[Path, typer.Option(help="What was measured on the held-out rows.")],
    settings: Settings,
    out: Out,
) -> None:
    """Write the table of what was measured against what was predicted."""
    from layersense.verification.table import write_verification_table

    write_verification_table(manifests, measured, settings, out)


@app.command(rich_help_panel=RULES)
def refined(
    manifest: Manifest,
    measured: Annotated[Path, typer.Option(help="What was measured on the held-out rows.")],
    settings: Settings,
    out: Out,
) -> None:
    """Write the manifest of a scheme with the recipe that `refine` found."""
    from layersense.config import Verify
    from layersense.verification.refine import write_refined

    write_refined(manifest, measured, Verify.model_validate(settings), out)


@app.command(rich_help_panel=RULES)
def export(
    manifest: Manifest,
    model: Annotated[Path, typer.Option(help="Record of the checkpoint.")],
    database: Annotated[Path, typer.Option(help="Calibration database.")],
    out: Annotated[Path, typer.Option(help="checkpoint.json; the checkpoint lies beside it.")],
    verification: Annotated[
        Path | None, typer.Argument(help="Table of the run's verification, if it is verified.")
    ] = None,
    cache: Cache = None,
    gpus: Gpus = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Write the recipe of one scheme as a checkpoint, and check it as it lies on the disk."""
    _quiet()
    from layersense.export.job import export_scheme

    exported = export_scheme(
        manifest,
        model_file=model,
        database_file=database,
        verification_file=verification,
        out=out,
        threads=threads,
        gpus=max(gpus, 1),
        cache=cache,
    )
    typer.echo(
        f"{out.with_name('checkpoint')}: {exported.quant_algo}, "
        f"{exported.checked.tensors} tensors, {exported.checked.bytes / 1e9:.3f} GB, checked"
    )


@app.command(rich_help_panel=RULES)
def report(
    manifest: Manifest,
    layers: Annotated[Path, typer.Option(help="Table of the scheme.")],
    frontier: Annotated[Path, typer.Option(help="Frontier of the scheme.")],
    settings: Settings,
    template: Template,
    out: Out,
    verification: Annotated[
        Path | None, typer.Argument(help="Verification of the run, if it is verified.")
    ] = None,
) -> None:
    """Render the Markdown report of one scheme."""
    from layersense.config import Report
    from layersense.reports.markdown import write_report

    options = Report.model_validate(settings)
    write_report(manifest, layers, frontier, options, template, out, verification)


@app.command(rich_help_panel=RULES)
def scripts(out: Out) -> None:
    """Write the chart library that every page inlines."""
    from layersense.reports.charts import write_scripts

    write_scripts(out)


@app.command(rich_help_panel=RULES)
def page(
    layers: Annotated[Path, typer.Option(help="Table of the scheme.")],
    settings: Settings,
    template: Template,
    scripts: Scripts,
    out: Out,
    figures: Annotated[Path, typer.Option(help="Folder for the figures as SVG and PNG.")],
    frontier: Annotated[Path | None, typer.Option(help="Recipes of the scheme.")] = None,
    verification: Annotated[
        Path | None, typer.Argument(help="Table of the run's verification, if it is verified.")
    ] = None,
) -> None:
    """Render the HTML report of one scheme, and its figures."""
    gc.disable()  # a tenth of the time, and there are no cycles to speak of
    from layersense.config import Report
    from layersense.reports.html import write_page

    options = Report.model_validate(settings)
    write_page(layers, options, template, scripts, out, figures, frontier, verification)


@app.command(rich_help_panel=RULES)
def scatter(
    layers: Annotated[Path, typer.Option(help="Table of the scheme.")],
    verification: Annotated[Path, typer.Option(help="Table of the run's verification.")],
    figures: Annotated[Path, typer.Option(help="Folder for the figure as SVG and PNG.")],
) -> None:
    """Draw the predicted against the measured damage of one scheme."""
    from layersense.reports.html import write_scatter

    write_scatter(layers, verification, figures)


@app.command(rich_help_panel=RULES)
def index(
    runs: Annotated[Path, typer.Option(help="Table of runs.")],
    sensitivity: Annotated[Path, typer.Option(help="Table of all layers.")],
    settings: Settings,
    template: Template,
    out: Out,
    verifications: Verifications = None,
) -> None:
    """Render the HTML page that shows and compares all runs and schemes."""
    from layersense.config import Report
    from layersense.reports.index import write_index

    write_index(
        runs, sensitivity, Report.model_validate(settings), template, out, verifications or ()
    )


@app.command(rich_help_panel=RULES)
def summary(
    runs: Annotated[Path, typer.Option(help="Table of runs.")],
    sensitivity: Annotated[Path, typer.Option(help="Table of all layers.")],
    settings: Settings,
    template: Template,
    out: Out,
    verifications: Verifications = None,
) -> None:
    """Render the page that shows all runs and schemes side by side."""
    from layersense.config import Report
    from layersense.reports.markdown import write_summary

    write_summary(
        runs, sensitivity, Report.model_validate(settings), template, out, verifications or ()
    )


@app.command(rich_help_panel=PEOPLE)
def init(
    checkpoint: Annotated[str, typer.Argument(help="Hub id or directory of the checkpoint.")],
    data: Annotated[
        Path | None,
        typer.Option(help="COCO folder or file, folder of photographs with a table, or JSONL."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Config to write.")] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="Where to score; default: what is here.")
    ] = None,
) -> None:
    """Write a config for a checkpoint of your own.

    Example: layersense init ./my-checkpoint --data photos/
    """
    from layersense.init import write_config

    typer.echo(write_config(checkpoint, data, out, device=device))


@app.command(rich_help_panel=PEOPLE)
def reach(
    configfile: Annotated[Path, typer.Argument(help="Config.")],
    run: Annotated[
        list[str] | None, typer.Option(help="A run of the config; may be repeated. Default: all.")
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="Where to run it; default: the run's.")
    ] = None,
) -> None:
    """Say what each run's loss reaches, by a few samples.

    Needs the run's model and dataset, which Snakemake makes without a GPU; what is missing is named
    with the command. Exits with 1 if a loss misses a whole subsystem.

    Example: layersense reach config/my-model.yaml --device cpu
    """
    _quiet()
    from layersense import paths
    from layersense.scoring.reach import advice, reach_run, summary
    from layersense.settings import score_settings
    from layersense.validation import load_config_file

    config = load_config_file(configfile)
    if unknown := [name for name in run or () if name not in config.runs]:
        raise LayersenseError(
            f"{configfile}: has no run {unknown[0]}; name one of {', '.join(config.runs)}"
        )
    complete = True
    for name in run or config.runs:
        entry = config.runs[name]
        files = paths.model(entry.model), paths.calibration(entry.dataset)
        if missing := [file for file in files if not Path(file).exists()]:
            raise LayersenseError(
                f"run {name}: {missing[0]} is not there yet; run `snakemake {' '.join(missing)} "
                f"--cores 2 --configfile {configfile}`"
            )
        settings = score_settings(config, name)
        settings["device"] = device or settings["device"]
        found, samples = reach_run(
            settings, model_file=Path(files[0]), database_file=Path(files[1]), gpus=entry.gpus
        )
        complete = complete and not any(part.unreached for part in found)
        for line in (summary(found, samples), *advice(found, samples)):
            typer.echo(f"{name}: {line}")
    raise typer.Exit(0 if complete else 1)


@app.command("import", rich_help_panel=PEOPLE)
def import_(
    files: Annotated[list[Path], typer.Argument(help="Manifests, or ModelOpt's states (.pt).")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("imported"),
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Name of the dataset.")] = None,
    model_from_file_name: Annotated[
        bool, typer.Option(help="Name the model like the file, up to its first dot.")
    ] = False,
) -> None:
    """Bring manifests of others into tables like ours.

    In a workflow, name them in the config under `manifests`.
    Example: layersense import old/*.json --out imported
    """
    from layersense.manifests.imports import import_files

    for manifest in import_files(
        files, out, model=model, dataset=dataset, model_from_file_name=model_from_file_name
    ):
        typer.echo(
            f"{manifest.run}, {manifest.scheme}: {len(manifest.groups)} groups, generation "
            f"{manifest.generation}, model {manifest.model or 'not named'}"
        )
    typer.echo(f"{out}/sensitivity.parquet and {out}/runs.parquet hold them all")


@app.command(rich_help_panel=PEOPLE)
def apply(
    quant_config: Annotated[Path, typer.Argument(help="quant_config.json of a scheme.")],
    model: Annotated[Path | None, typer.Option(help="Record of the checkpoint.")] = None,
    database: Annotated[Path | None, typer.Option(help="Calibration database.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to save the model, for ModelOpt's mto.restore.")
    ] = None,
) -> None:
    """Quantize a model by a recipe, and check it module by module.

    Example: layersense apply results/demo.image-text/int8_all_layers/quant_config.json
    """
    _quiet()
    from layersense.verification.apply import apply_recipe

    typer.echo(apply_recipe(quant_config, model, database, out))


@app.command(rich_help_panel=PEOPLE)
def check(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.json of a scheme.")],
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Also load it in vLLM, and let it write a few tokens.")
    ] = False,
    simulated: Annotated[
        bool, typer.Option("--simulated", hidden=True, help="For the export job.")
    ] = False,
) -> None:
    """Check an exported checkpoint as it lies on the disk.

    Exits with 1 if something is wrong.

    Example: layersense check results/demo.image-text/int8_all_layers/checkpoint.json
    """
    _quiet()
    if simulated:
        import msgspec

        from layersense.export.check import check_streamed

        typer.echo(msgspec.json.encode(check_streamed(checkpoint)).decode())
        return
    from layersense.export.job import recheck

    problems = recheck(checkpoint, load_in_vllm=vllm)
    for problem in problems or [f"{checkpoint}: ok"]:
        typer.echo(problem)
    raise typer.Exit(1 if problems else 0)


@app.command(rich_help_panel=PEOPLE)
def doctor(
    configfile: Annotated[Path | None, typer.Option(help="Config to check against.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder of the Snakemake profile.")] = None,
) -> None:
    """Look at the machine before a run, and say what to mend.

    Each line is ok, a warning or an error, with the fix.

    Exits with 1 if there is an error. Without a config or a profile it looks at the machine alone.

    Example: layersense doctor --configfile config/my-model.yaml --profile profiles/slurm
    """
    from layersense.doctor import examine, worst

    lines = []
    for line in examine(configfile, profile):
        typer.echo(str(line))
        lines.append(line)
    raise typer.Exit(1 if worst(lines) == "error" else 0)


@app.command(rich_help_panel=PEOPLE)
def estimate(
    configfile: Annotated[Path, typer.Argument(help="Config whose runs are estimated.")],
) -> None:
    """Say what each run will take: layers, memory, time.

    Reads no weight and takes seconds. Exits with 1 if a run cannot be estimated.

    Example: layersense estimate config/my-model.yaml
    """
    _quiet()
    from layersense import paths, settings
    from layersense.models.checkpoints import peek, read_checkpoint
    from layersense.scoring.estimate import estimate_run
    from layersense.validation import load_config_file

    config = load_config_file(configfile)
    failed = False
    for name, run in config.runs.items():
        record = Path(paths.model(run.model))
        try:
            model = config.models[run.model]
            checkpoint = (
                read_checkpoint(record) if record.exists() else peek(run.model, model, configfile)
            )
            found = estimate_run(
                name,
                settings.score_settings(config, name),
                settings.run_formats(config, name),
                checkpoint,
                Path(paths.calibration(run.dataset)),
            )
        except LayersenseError as error:
            failed = True
            typer.echo(f"{name}\n  not known: {error}")
            continue
        for line in found.lines():
            typer.echo(line)
    raise typer.Exit(1 if failed else 0)


@app.command(rich_help_panel=PEOPLE)
def validate(
    files: Annotated[list[Path], typer.Argument(help="Configs (.yaml, .yml) or manifests.")],
) -> None:
    """Check configs and manifests.

    Exits with 1 if one has a problem.

    Example: layersense validate config/my-model.yaml results/*/*/manifest.json
    """
    from layersense.manifests.read import validate_manifest
    from layersense.validation import validate_config

    bad = 0
    for file in files:
        is_config = file.suffix.lower() in (".yaml", ".yml")
        problems = validate_config(file) if is_config else validate_manifest(file)
        bad += bool(problems)
        for problem in problems or [f"{file}: ok"]:
            typer.echo(problem)
    raise typer.Exit(1 if bad else 0)


def _complete_result(incomplete: str) -> list[str]:
    from layersense.reports.terminal import known_results

    return list(known_results(incomplete))


ResultName = Annotated[
    str,
    typer.Argument(
        help="run/scheme in results/, a folder, a layers.parquet or a manifest of any generation.",
        autocompletion=_complete_result,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command(rich_help_panel=PEOPLE)
def show(
    result: ResultName,
    sort: Annotated[
        Literal["score", "damage-per-mb"],
        typer.Option(help="By the worst score, or by the score for each MB that quantizing saves."),
    ] = "score",
    top: Annotated[int, typer.Option(min=1, help="Layer groups to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show a result: recipe, findings, most sensitive layers.

    Exit codes: 0 shown, 1 it cannot be read, 2 wrong usage.

    \b
    Examples:
      layersense show demo.image-text/int4_fp8_all_layers --sort damage-per-mb
      layersense show old-manifest.json --top 3 --json | jq .layers[0].layer
    """  # noqa: D301
    from rich.console import Console

    from layersense.reports.terminal import find_measured, find_result
    from layersense.reports.terminal import show as print_result

    found = find_result(result)
    print_result(found, sort, top, as_json, Console(), find_measured(result, found))


@app.command(rich_help_panel=PEOPLE)
def diff(
    a: ResultName,
    b: ResultName,
    as_json: AsJson = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 3 if they differ beyond noise.")
    ] = False,
) -> None:
    """Compare two results: what moved, which choices changed.

    Exit codes: 0 compared, 1 one cannot be read, 2 wrong usage; with --exit-code, 3 where the
    rankings differ by more than the noise of the scores.

    \b
    Examples:
      layersense diff demo.captions/fp8_language demo.image-text/int8_all_layers
      layersense diff old/layers.parquet new/layers.parquet --exit-code
    """  # noqa: D301
    from rich.console import Console

    from layersense.reports.terminal import DIFFERENT, find_result
    from layersense.reports.terminal import diff as print_diff

    found = print_diff(find_result(a), find_result(b), as_json, Console())
    raise typer.Exit(DIFFERENT if exit_code and found.exceeds_noise else 0)


def _quiet() -> None:
    """Keep the network, progress bars and a warning of torch out of what loads a model."""
    # Its own libraries call what it warns of, and nobody who reads a log can change that.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script`", category=FutureWarning)
    # GPU jobs read what was fetched before them; compute nodes often have no network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # ModelOpt's bars would fill a log file; our own lines say the same.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _failure_of_the_machine(error: Exception) -> str | None:
    """Return a sentence if the GPU or the memory failed, which is no error of this program."""
    if is_out_of_memory(error):
        return (
            "out of memory on this machine; lower `batch_size`, `max_length` or `max_pixels` of "
            "the run, or run it where there is more (`mem_mb` on a cluster)"
        )
    lines = str(error).splitlines()
    if isinstance(error, RuntimeError) and lines and lines[0].startswith("CUDA "):
        return (
            f"the GPU failed ({lines[0]}); run the same command again, which takes up what is "
            "measured; if it is always the same GPU, leave it out by CUDA_VISIBLE_DEVICES"
        )
    return None


def main() -> NoReturn:
    """Run the command line; the first line of any failure is one readable sentence."""
    log = open_job_log()
    end_on_sigterm()
    sentence, details, code = "", "", 1
    try:
        log.start()
        app(standalone_mode=True)
    except LayersenseError as error:
        sentence = str(error)
    except KeyboardInterrupt:
        sentence = "interrupted"
    except Terminated:
        sentence = (
            "terminated (SIGTERM): the cluster preempted the job or ended it at its time limit, or "
            "somebody cancelled it; what is complete is kept, run the same command again"
        )
        code = 128 + signal.SIGTERM
    except SystemExit as end:
        if end.code not in (None, 0):
            log.end(f"exit code {end.code}")
            raise
    except Exception as error:
        sentence = _failure_of_the_machine(error) or (
            f"layersense {' '.join(sys.argv[1:2])}: {type(error).__name__}: {error}; "
            "this is not an error that layersense knows: please report it with the lines below"
        )
        details = traceback.format_exc()
    log.end(sentence or None)
    if not sentence:
        raise SystemExit(0)
    sys.stderr.write(f"error: {sentence}\n{details}")
    raise SystemExit(code)
