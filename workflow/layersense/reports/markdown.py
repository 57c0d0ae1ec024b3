"""Markdown reports: one for each scheme, and the page that shows them side by side."""

import posixpath
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec

from layersense import config, paths
from layersense.files import atomic_write
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import (
    SUFFIX,
    FormatRun,
    Manifest,
    plain_name,
)
from layersense.quantization.formats import NONE
from layersense.reports.compare import Profile, compare, profile
from layersense.reports.measured import Measured, read_measured
from layersense.reports.overview import heat, most_sensitive, read_results, read_runs, text_strip
from layersense.reports.result import (
    Group,
    Result,
    named_baselines,
    read_result,
    read_table,
)
from layersense.reports.sentences import (
    all_findings,
    budget_text,
    budget_unit,
    checkpoint_text,
    denominator_text,
    environment_rows,
    finding_counts,
    proof_text,
    score_text,
    score_unit,
    target_text,
    trust,
)
from layersense.reports.text import (
    Markdown,
    code,
    escape,
    join,
    number,
    plain,
    render,
)

MAX_FORMAT_COLUMNS = 4
"""Formats that get a column of their own in the table of all groups."""
MAX_LAYERS = 6
"""Layers that one sentence names."""
STRIP_CELLS = 32
"""Cells of the strip along depth at most."""
MAX_COMPARED = 10
"""Results of one model up to which the summary compares any two."""
MAX_POINTS = 7
"""Points of the frontier that the report shows, beside the knee, the choice and the baselines."""
FRONTIER_COLUMNS = [
    "kind", "label", "point", "effective_bits", "searched_bytes", "budget_used", "predicted_damage",
    "damage_low", "damage_high", "minimized", "lower_bound", "gap", "knee", "recipe_digest",
]  # fmt: skip
"""What it reads of them: not the recipes themselves."""


def write_report(
    manifest_path: Path,
    layers_path: Path,
    frontier_path: Path,
    report: config.Report,
    template: Path,
    out: Path,
    verification_path: Path | None = None,
) -> None:
    """Render the report of one scheme.

    Args:
        manifest_path: its manifest, which layersense wrote.
        layers_path: its ``layers.parquet``.
        frontier_path: its ``frontier.parquet``.
        report: how it should look.
        template: Jinja2 template.
        out: Markdown file to write.
        verification_path: the run's ``verification.parquet``, if it is verified.

    Raises:
        LayersenseError: an input cannot be read.
    """
    manifest = read_own_manifest(manifest_path)
    frontier = read_table(frontier_path, columns=FRONTIER_COLUMNS).to_pylist()
    measured = (
        read_measured(verification_path, manifest.scheme.name, manifest.run)
        if verification_path
        else None
    )
    result = read_result(layers_path)
    atomic_write(
        out, render(template, report_context(manifest, result, frontier, report, measured))
    )


def write_summary(
    runs_path: Path,
    sensitivity_path: Path,
    report: config.Report,
    template: Path,
    out: Path,
    verification_paths: Sequence[Path] = (),
) -> None:
    """Render the page that shows all runs and schemes side by side.

    Args:
        runs_path: ``runs.parquet``.
        sensitivity_path: ``sensitivity.parquet``.
        report: how it should look.
        template: Jinja2 template.
        out: Markdown file to write; links are relative to it.
        verification_paths: ``verification.parquet`` of each verified run.

    Raises:
        LayersenseError: an input cannot be read.
    """
    runs = read_runs(runs_path, verification_paths)
    context = summary_context(runs, read_results(sensitivity_path), report)
    atomic_write(out, render(template, context))


def report_context(
    manifest: Manifest,
    result: Result,
    frontier: list[dict[str, Any]],
    report: config.Report,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """Return what the template of a report may print.

    Args:
        manifest: the manifest.
        result: its ``layers.parquet``.
        frontier: rows of its ``frontier.parquet``.
        report: how the report should look.
        measured: what was measured of it.
    """
    findings = all_findings(manifest.findings, measured)
    return {
        "title": report.title,
        "top": report.top,
        "manifest": manifest,
        "result": result,
        "findings": [_finding(finding) for finding in findings],
        "trust": trust([finding.severity for finding in findings]),
        "recipe": _recipe(result),
        "left": [
            {
                "why": why,
                "count": len(members),
                "layers": _name_layers([member.layer for member in members]),
            }
            for why, members in result.left
        ],
        "groups": [_group_row(result, group) for group in result.ranked],
        "columns": result.formats if len(result.formats) <= MAX_FORMAT_COLUMNS else [],
        "damage_per_mb": [
            {"group": group, "score": entry, "text": score_text(entry)}
            for group, entry in result.most_damage_per_mb()[: report.top]
        ],
        "per": score_unit(result.modality),
        "budget": budget_text(manifest.autoquant_state.budget),
        "unit": budget_unit(manifest.autoquant_state.budget),
        "proof": proof_text(manifest.autoquant_state),
        "checkpoint": checkpoint_text(manifest.autoquant_state),
        "denominator": denominator_text(manifest.autoquant_state, manifest.scheme, code),
        "target": target_text(manifest.autoquant_state),
        "recipes": _recipes(frontier, result.formats),
        "few_baselines": len(named_baselines(result.formats)) == 1,
        "flips": _flips(manifest),
        "verification": measured,
        "provenance": _provenance(manifest),
    }


def summary_context(
    runs: list[dict[str, Any]], results: Iterable[Result], report: config.Report
) -> dict[str, Any]:
    """Return what the template of the summary may print.

    Args:
        runs: rows of :func:`~layersense.reports.overview.read_runs`.
        results: the results of ``sensitivity.parquet``, in any order.
        report: how the summary should look.
    """
    profiles, strips, layers = {}, {}, {}
    for result in results:
        key = result.run, result.scheme
        profiles[key] = profile(result)
        strips[key] = Markdown(f"`{text_strip(heat(result, STRIP_CELLS))}`")
        layers[key] = Markdown(", ".join(code(name) for name in most_sensitive(result)) or "–")
    models: dict[str, list[dict[str, Any]]] = {}
    folder = posixpath.dirname(paths.summary())
    for row in sorted(runs, key=lambda row: (row["model"] or "", row["run"], row["scheme"])):
        target = posixpath.relpath(paths.report_markdown(row["run"], row["scheme"]), folder)
        shares = zip(row["subsystems"], row["subsystem_shares"], strict=True)
        key = plain(row["run"]), plain(row["scheme"])
        models.setdefault(row["model"] or "unknown model", []).append(
            {
                **row,
                "key": key,
                "link": Markdown(
                    f"{escape(row['scheme'])} (imported, {row['imported']})"
                    if row["imported"]
                    else f"[{escape(row['scheme'])}]({target})"
                ),
                "findings": finding_counts(row["errors"], row["warnings"], row["infos"]),
                "shares": list(shares),
                "strip": strips[key],
                "layers": layers[key],
            }
        )
    return {
        "title": report.title,
        "models": [
            {
                "name": name,
                "rows": rows,
                "pairs": _pairs([row["key"] for row in rows], profiles),
                "pair_count": len(rows) * (len(rows) - 1) // 2,
            }
            for name, rows in models.items()
        ],
        "n_runs": len({row["run"] for row in runs}),
    }


def _pairs(
    keys: list[tuple[str, str]], profiles: Mapping[tuple[str, str], Profile]
) -> list[dict[str, Any]]:
    """Return any two of the results compared; none where these are too many for a table."""
    if len(keys) > MAX_COMPARED:
        return []
    return [
        {"a": " / ".join(a), "b": " / ".join(b), "found": compare(profiles[a], profiles[b])}
        for a, b in combinations(keys, 2)
    ]


def _group_row(result: Result, group: Group) -> dict[str, Any]:
    return {
        "group": group,
        "place": result.places.get(group.handle),
        "share": result.share(group),
        "worst": score_text(group.worst) if group.worst else None,
        "scores": {name: score_text(entry) for name, entry in group.scores.items()},
    }


def _recipe(result: Result) -> Markdown:
    parts = [
        Markdown(f"{part.groups} to {code(part.name)}")
        for part in result.by_format
        if part.groups and part.name != NONE
    ]
    total = result.total
    if not parts:
        return Markdown(f"Leave all {total.groups} layer groups unquantized")
    if total.quantized == total.groups:
        return Markdown(f"Quantize all {total.groups} layer groups: {join(parts)}")
    return Markdown(
        f"Quantize {total.quantized} of {total.groups} layer groups ({join(parts)}) "
        f"and leave {total.groups - total.quantized} unquantized"
    )


def _recipes(frontier: list[dict[str, Any]], formats: Collection[str]) -> list[dict[str, Any]]:
    """Return some of the frontier, the scheme's choice and the baselines, by bits.

    Of the frontier, the knee and up to :data:`MAX_POINTS` more, spread evenly over the bits.
    """
    kinds = {"frontier", "scheme", *named_baselines(formats)}
    frontier = [row for row in frontier if row["kind"] in kinds or row["knee"]]
    points = [row for row in frontier if row["kind"] == "frontier"]
    low, high = points[0]["effective_bits"], points[-1]["effective_bits"]
    steps = [low + (high - low) * step / (MAX_POINTS - 1) for step in range(MAX_POINTS)]
    shown = {
        min(points, key=lambda row: abs(row["effective_bits"] - step))["point"] for step in steps
    }
    rows = [row for row in frontier if row["point"] in {*shown, None} or row["knee"]]
    # A recipe that has a name is not shown again as a nameless point.
    named = {row["recipe_digest"] for row in rows if row["point"] is None}
    rows = [row for row in rows if row["point"] is None or row["recipe_digest"] not in named]
    return sorted(rows, key=lambda row: (row["effective_bits"], row["predicted_damage"]))


def _flips(manifest: Manifest) -> Markdown | None:
    """Return the groups whose choice hangs on the noise of the scores, with what each may be."""
    flips = [
        Markdown(
            f"{code(handle.removesuffix(SUFFIX))} "
            f"({code(plain_name(group.selected))} or {code(group.flips_to)})"
        )
        for handle, group in manifest.layer_sensitivity.items()
        if group.flips_to is not None
    ]
    if not flips:
        return None
    more = f" and {len(flips) - MAX_LAYERS} more" if len(flips) > MAX_LAYERS else ""
    return Markdown(", ".join(flips[:MAX_LAYERS]) + more)


def _name_layers(names: list[str]) -> Markdown:
    shown = ", ".join(code(name) for name in names[:MAX_LAYERS])
    more = len(names) - MAX_LAYERS
    return Markdown(f"{shown} and {more:,} more" if more > 0 else shown)


def _finding(finding: Any) -> dict[str, Any]:
    names = _name_layers(finding.layers) if finding.layers else None
    return {**msgspec.structs.asdict(finding), "names": names}


def _provenance(manifest: Manifest) -> dict[str, Any]:
    """Return versions and machine, said once where all formats agree, and each format's run."""
    return {
        "environment": environment_rows(manifest.environment),
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
        # Formats that were scored together share their phases; ΔY is one format's own.
        "seconds": ", ".join(
            f"{phase} {number(value)}"
            for phase, value in entry.seconds.items()
            if not phase.startswith("ΔY ") or phase.startswith(f"ΔY {name},")
        ),
    }
