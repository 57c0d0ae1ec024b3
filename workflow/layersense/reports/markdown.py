"""Markdown reports: one for each scheme, and the page that shows them side by side."""

import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

from layersense import config, paths
from layersense.errors import LayersenseError
from layersense.files import atomic_write
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import FormatRun, Manifest
from layersense.manifests.tables import BYTES_PER_COST
from layersense.quantization.formats import NONE
from layersense.reports.text import Markdown, code, escape, join, number, render

MAX_FORMAT_COLUMNS = 4
"""Formats that get a column of their own in the table of all groups."""
MAX_LAYERS = 6
"""Layers that one sentence names."""


def write_report(
    manifest_path: Path, layers_path: Path, report: config.Report, template: Path, out: Path
) -> None:
    """Render the report of one scheme.

    Args:
        manifest_path: its manifest, which layersense wrote.
        layers_path: its ``layers.parquet``.
        report: how it should look.
        template: Jinja2 template.
        out: Markdown file to write.

    Raises:
        LayersenseError: an input cannot be read.
    """
    manifest = read_own_manifest(manifest_path)
    context = report_context(manifest, _rows(layers_path), report)
    atomic_write(out, render(template, context))


def write_summary(
    runs_path: Path, sensitivity_path: Path, report: config.Report, template: Path, out: Path
) -> None:
    """Render the page that shows all runs and schemes side by side.

    Args:
        runs_path: ``runs.parquet``.
        sensitivity_path: ``sensitivity.parquet``.
        report: how it should look.
        template: Jinja2 template.
        out: Markdown file to write; links are relative to it.

    Raises:
        LayersenseError: an input cannot be read.
    """
    ranked = _rows(
        sensitivity_path,
        columns=["run", "scheme", "layer", "format", "rank", "score_share"],
        filters=[("rank", "<=", 3)],
    )
    atomic_write(out, render(template, summary_context(_rows(runs_path), ranked, report)))


def report_context(
    manifest: Manifest, rows: list[dict[str, Any]], report: config.Report
) -> dict[str, Any]:
    """Return what the template of a report may print.

    Args:
        manifest: the manifest.
        rows: rows of its ``layers.parquet``.
        report: how the report should look.
    """
    groups = _groups(manifest, rows)
    ranked = sorted(
        groups, key=lambda group: (group["importance"] is None, -(group["importance"] or 0.0))
    )
    damages = [
        row for row in rows if row["score_per_mb_saved"] is not None and row["rank"] is not None
    ]
    damages.sort(key=lambda row: -row["score_per_mb_saved"])
    severities = [finding.severity for finding in manifest.findings]
    formats = [name for name in manifest.run if name != NONE]
    return {
        "title": report.title,
        "top": report.top,
        "manifest": manifest,
        "findings": [_finding(finding) for finding in manifest.findings],
        "trust": _trust(severities),
        "total": _total(groups),
        "recipe": _recipe(manifest, groups),
        "left": _left(groups),
        "by_subsystem": _by_subsystem(groups),
        "by_format": _by_format(groups, [*formats, NONE]),
        "groups": ranked,
        "formats": formats,
        "columns": formats if len(formats) <= MAX_FORMAT_COLUMNS else [],
        "damage_per_mb": _first_of_each_layer(damages)[: report.top],
        "per": "token" if manifest.dataset.modality in ("text", "image_text") else "sample",
        "provenance": _provenance(manifest),
    }


def summary_context(
    runs: list[dict[str, Any]], ranked: list[dict[str, Any]], report: config.Report
) -> dict[str, Any]:
    """Return what the template of the summary may print.

    Args:
        runs: rows of ``runs.parquet``.
        ranked: rows of ``sensitivity.parquet`` with the highest ranks.
        report: how the summary should look.
    """
    models: dict[str, list[dict[str, Any]]] = {}
    folder = posixpath.dirname(paths.summary())
    for row in sorted(runs, key=lambda row: (row["model"] or "", row["run"], row["scheme"])):
        target = posixpath.relpath(paths.report_markdown(row["run"], row["scheme"]), folder)
        shares = zip(row["subsystems"], row["subsystem_shares"], strict=True)
        models.setdefault(row["model"] or "unknown model", []).append(
            {
                **row,
                "link": Markdown(f"[{escape(row['scheme'])}]({target})"),
                "findings": _counts(row["errors"], row["warnings"], row["infos"]),
                "shares": list(shares),
                "layers": _most_sensitive(ranked, row["run"], row["scheme"]),
            }
        )
    return {"title": report.title, "models": models, "n_runs": len({row["run"] for row in runs})}


def _rows(path: Path, **options: Any) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, **options).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise LayersenseError(
            f"{path}: cannot be read as a table of layersense ({error}); delete it and run "
            "`snakemake` again"
        ) from error
    return rows


def _groups(manifest: Manifest, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    importance = {entry.name: entry.importance for entry in manifest.sensitivity_ranking}
    total = sum(importance.values())
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        handle = row["handle"]
        group = groups.setdefault(
            handle,
            {
                "layer": row["layer"],
                "n_modules": len(row["module_names"]),
                "subsystem": row["subsystem"],
                "kind": row["kind"],
                "n_weights": row["n_weights"],
                "reached": row["reached"],
                "importance": importance.get(handle),
                "share": importance[handle] / total if total and handle in importance else None,
                "scores": {},
                "selected": NONE,
                "damage": 0.0,
                "before": row["cost_none"] * BYTES_PER_COST,
                "after": row["cost_none"] * BYTES_PER_COST,
                "worst": None,
                "why": manifest.layers[row["module_names"][0]].reason,
            },
        )
        if row["format"] != NONE:
            group["scores"][row["format"]] = _score(row)
            if row["score"] is not None and row["score"] == group["importance"]:
                group["worst"] = _score(row)
        if row["selected"]:
            group["selected"] = row["format"]
            group["damage"] = row["score_solver"] or 0.0
            group["after"] = row["cost"] * BYTES_PER_COST
    return list(groups.values())


def _score(row: dict[str, Any]) -> str:
    if row["reached"] != "scored":
        return "not reached"
    if row["score"] is None:
        return "not finite"
    doubt = f" ± {number(row['score_se'])}" if row["score_se"] else ""
    return f"{number(row['score'])}{doubt}"


def _total(groups: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(group["n_weights"] for group in groups)
    quantized = [group for group in groups if group["selected"] != NONE]
    before = sum(group["before"] for group in groups)
    after = sum(group["after"] for group in groups)
    return {
        "groups": len(groups),
        "quantized": len(quantized),
        "weights": weights,
        "quantized_share": sum(group["n_weights"] for group in quantized) / weights,
        "before": before,
        "after": after,
        "saved_share": 1 - after / before,
    }


def _recipe(manifest: Manifest, groups: list[dict[str, Any]]) -> Markdown:
    parts = [
        Markdown(f"{entry['groups']} to {code(entry['name'])}")
        for entry in _by_format(groups, list(manifest.run))
        if entry["groups"]
    ]
    total = _total(groups)
    if not parts:
        return Markdown(f"Leave all {total['groups']} layer groups unquantized")
    if total["quantized"] == total["groups"]:
        return Markdown(f"Quantize all {total['groups']} layer groups: {join(parts)}")
    return Markdown(
        f"Quantize {total['quantized']} of {total['groups']} layer groups ({join(parts)}) "
        f"and leave {total['groups'] - total['quantized']} unquantized"
    )


def _left(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return why groups stay unquantized, with the layers of each reason, largest score first."""
    reasons: dict[str, list[dict[str, Any]]] = {}
    for group in sorted(groups, key=lambda group: -(group["importance"] or 0.0)):
        if group["selected"] == NONE:
            why = group["why"] or "quantizing them costs more than the budget asks for"
            reasons.setdefault(why, []).append(group)
    return [
        {
            "why": why,
            "count": len(members),
            "layers": _name_layers([member["layer"] for member in members]),
        }
        for why, members in reasons.items()
    ]


def _name_layers(names: list[str]) -> Markdown:
    shown = ", ".join(code(name) for name in names[:MAX_LAYERS])
    more = len(names) - MAX_LAYERS
    return Markdown(f"{shown} and {more:,} more" if more > 0 else shown)


def _by_subsystem(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for group in groups:
        entry = result.setdefault(
            group["subsystem"],
            {
                "name": group["subsystem"],
                **dict.fromkeys(("groups", "quantized", "weights", "before", "after", "damage"), 0),
                "share": 0.0,
                "reached": 0,
            },
        )
        entry["groups"] += 1
        entry["quantized"] += group["selected"] != NONE
        entry["weights"] += group["n_weights"]
        entry["reached"] += group["reached"] == "scored"
        for key in ("before", "after", "damage"):
            entry[key] += group[key]
        entry["share"] += group["share"] or 0.0
    return list(result.values())


def _by_format(groups: list[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    result = []
    for name in names:
        chosen = [group for group in groups if group["selected"] == name]
        result.append(
            {
                "name": name,
                "groups": len(chosen),
                "weights": sum(group["n_weights"] for group in chosen),
                "after": sum(group["after"] for group in chosen),
                "damage": sum(group["damage"] for group in chosen),
            }
        )
    return result


def _first_of_each_layer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seen: dict[str, dict[str, Any]] = {}
    for row in rows:
        seen.setdefault(row["layer"], {**row, "text": _score(row)})
    return list(seen.values())


def _finding(finding: Any) -> dict[str, Any]:
    names = _name_layers(finding.layers) if finding.layers else None
    return {**msgspec.structs.asdict(finding), "names": names}


def _trust(severities: Sequence[str]) -> str:
    if "error" in severities:
        return "Do not use this result before its errors are understood"
    if "warning" in severities:
        return "Read the warnings before you rely on it"
    return "Nothing that speaks against these numbers was detected"


def _counts(errors: int | None, warnings: int | None, infos: int | None) -> str:
    if errors is None or warnings is None or infos is None:
        return "–"
    parts = [
        f"{number} {word}{'' if number == 1 else 's'}"
        for number, word in ((errors, "error"), (warnings, "warning"), (infos, "note"))
        if number
    ]
    return ", ".join(parts) or "none"


def _provenance(manifest: Manifest) -> dict[str, Any]:
    """Return versions and machine, said once where all formats agree, and each format's run."""
    keys = list(dict.fromkeys(key for entry in manifest.environment.values() for key in entry))
    environment = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for name, entry in manifest.environment.items():
            values.setdefault(entry.get(key, "unknown"), []).append(name)
        if len(values) == 1:
            environment.append((key, next(iter(values))))
        else:
            environment.extend(
                (f"{key} ({', '.join(names)})", value) for value, names in values.items()
            )
    return {
        "environment": environment,
        "formats": [_run(name, entry) for name, entry in manifest.run.items()],
    }


def _run(name: str, entry: FormatRun) -> dict[str, Any]:
    sampling = entry.settings.get("sampling")
    seed = sampling.get("seed") if isinstance(sampling, dict) else None
    return {
        "name": name,
        "entry": entry,
        "seed": "–" if seed is None else str(seed),
        "tokens": sum(entry.batches.tokens),
        "batches": len(entry.batches.tokens),
        "seconds": ", ".join(f"{phase} {number(value)}" for phase, value in entry.seconds.items()),
    }


def _most_sensitive(ranked: list[dict[str, Any]], run: str, scheme: str) -> Markdown:
    """Return the layers that lead under any format of one scheme, by their largest share."""
    shares: dict[str, float] = {}
    for row in ranked:
        if row["run"] == run and row["scheme"] == scheme:
            share = row["score_share"] or 0.0
            shares[row["layer"]] = max(share, shares.get(row["layer"], 0.0))
    best = sorted(shares, key=lambda layer: -shares[layer])[:3]
    return Markdown(", ".join(code(layer) for layer in best) or "–")
