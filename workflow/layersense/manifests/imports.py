"""Bring manifests of other implementations into the tables, marked as imported."""

from collections.abc import Iterable
from pathlib import Path

from layersense.errors import LayersenseError
from layersense.files import atomic_write
from layersense.manifests.read import NormalManifest, encode_imported, read_manifest
from layersense.manifests.tables import write_layers, write_runs, write_sensitivity


def import_manifest(
    path: str | Path,
    *,
    run: str | None = None,
    scheme: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    model_from_file_name: bool = False,
) -> NormalManifest:
    """Return a manifest of any generation in the normal form, marked as imported.

    What it does not say stays None, unless the caller says it.

    Args:
        path: the manifest, or ModelOpt's saved AutoQuantize state.
        run: what to call it in the tables; default its own run, or the file's name.
        scheme: the scheme's name, if not the manifest's own.
        model: the model's name, if the manifest names none or another is better.
        dataset: the same of the dataset.
        model_from_file_name: take the model's name from the file's, up to its first dot.

    Raises:
        LayersenseError: it is no manifest of any generation.
    """
    manifest = read_manifest(path)
    if model_from_file_name and model is None:
        model = Path(path).name.partition(".")[0]
    manifest.imported = True
    manifest.run = run or manifest.run
    manifest.scheme = scheme or manifest.scheme
    manifest.model = model or manifest.model
    manifest.dataset = dataset or manifest.dataset
    return manifest


def write_import(manifest: NormalManifest, out: Path) -> None:
    """Write the normal form to ``out``, and its table of layers beside it as Parquet.

    Raises:
        LayersenseError: one of them cannot be written.
    """
    atomic_write(out, encode_imported(manifest))
    write_layers(out, out.with_suffix(".parquet"))


def import_files(
    files: Iterable[Path],
    out: Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    model_from_file_name: bool = False,
) -> list[NormalManifest]:
    """Import files for a person: ``out`` gets each one's normal form and table, and all in one.

    Args:
        files: manifests.
        out: folder to write: ``{run}.{scheme}.json`` and ``.parquet`` for each file, then
            ``sensitivity.parquet`` and ``runs.parquet``.
        model: see :func:`import_manifest`.
        dataset: see :func:`import_manifest`.
        model_from_file_name: see :func:`import_manifest`.

    Raises:
        LayersenseError: one line for each file that cannot be imported; nothing is written then.
    """
    found: dict[str, NormalManifest] = {}
    origin: dict[str, Path] = {}
    problems = []
    for file in files:
        try:
            manifest = import_manifest(
                file, model=model, dataset=dataset, model_from_file_name=model_from_file_name
            )
        except LayersenseError as error:
            problems.append(str(error))
            continue
        name = f"{manifest.run}.{manifest.scheme}"
        if "/" in name or name.startswith("."):
            problems.append(
                f"{file}: its run and scheme {name!r} are no file name; rename the file or the "
                "scheme"
            )
        elif name in found:
            problems.append(
                f"{file}: is called {name} like {origin[name]}; rename one of the files"
            )
        else:
            found[name], origin[name] = manifest, file
    if problems:
        raise LayersenseError("\n".join(problems))
    paths = [out / f"{name}.json" for name in found]
    for path, manifest in zip(paths, found.values(), strict=True):
        write_import(manifest, path)
    write_sensitivity([path.with_suffix(".parquet") for path in paths], out / "sensitivity.parquet")
    write_runs(paths, out / "runs.parquet")
    return list(found.values())
