"""Results in the terminal: ``layersense show`` and ``layersense diff``, as tables or as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from layersense import paths
from layersense.errors import LayersenseError
from layersense.manifests.modelopt_state import SUFFIXES
from layersense.manifests.read import read_manifest
from layersense.manifests.schema import Finding
from layersense.manifests.tables import layers_table
from layersense.reports.compare import Comparison, changed_label, compare, profile
from layersense.reports.measured import Measured, read_measured
from layersense.reports.result import Group as LayerGroup
from layersense.reports.result import Result, Score, make_result, read_result
from layersense.reports.sentences import SEVERITIES, all_findings, score_text, trust
from layersense.reports.text import bits, number, percent, plain, short_format, size

Sort = Literal["score", "damage-per-mb"]
DIFFERENT = 3
"""Exit code of ``layersense diff --exit-code`` where two results differ beyond noise."""
WIDE = 120
"""Columns from which on a terminal has room for everything."""
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def find_result(name: str) -> Result:
    """Read a result by its folder, its table, its manifest, or as ``run/scheme``.

    What was imported is found by its name in the config, with or without its scheme, and a run of
    one scheme by its own name.

    Raises:
        LayersenseError: there is none, or it cannot be read.
    """
    place = Path(name)
    if not place.exists():
        place = Path(paths.RESULTS) / name
    run, _, scheme = name.partition("/")
    if not place.exists() and (table := Path(paths.imported_layers(run))).is_file():
        result = read_result(table)
        if scheme in ("", result.scheme):
            return result
    if place.is_dir():
        found = [place / "layers.parquet", place / "manifest.json"]
        place = next((file for file in found if file.exists()), place)
        schemes = sorted(file.parent.name for file in place.glob("*/layers.parquet"))
        if len(schemes) > 1:
            raise LayersenseError(
                f"{name}: has the schemes {', '.join(schemes)}; name one, as "
                f"{name.rstrip('/')}/{schemes[0]}"
            )
        if schemes:
            place = place / schemes[0] / "layers.parquet"
    manifests = (".json", *SUFFIXES)
    if not place.is_file() or place.suffix not in (*manifests, ".parquet"):
        raise LayersenseError(
            f"{name}: is no result; give run/scheme, a folder with layers.parquet, that file "
            "itself or a manifest (`layersense show` completes what is in results/)"
        )
    if place.suffix in manifests:
        return make_result(layers_table(read_manifest(place)), place)
    return read_result(place)


def find_measured(name: str, result: Result) -> Measured | None:
    """Return what was measured of a result in a folder of results; None where nothing was.

    Raises:
        LayersenseError: the table of its run cannot be read.
    """
    place = Path(name) if Path(name).exists() else Path(paths.RESULTS) / name
    folder = place.resolve() if place.is_dir() else place.resolve().parent
    table = folder.parent / Path(paths.verification_table(result.run)).name
    if result.about is None or not table.is_file():
        return None
    measured = read_measured(table, result.scheme, result.formats)
    told = {verdict.scheme for verdict in measured.summary.verdicts}
    return measured if result.scheme in told else None


def known_results(start: str) -> Iterator[str]:
    """Yield ``run/scheme`` of what is in ``results/`` and begins with ``start``."""
    folder = Path(paths.RESULTS)
    for table in sorted(folder.glob("*/*/layers.parquet")):
        name = table.parent.relative_to(folder).as_posix()
        if name.startswith(start):
            yield name
    for table in sorted(folder.glob("imported/*.parquet")):
        if table.stem.startswith(start):
            yield table.stem


def show(
    result: Result,
    sort: Sort,
    top: int,
    as_json: bool,
    console: Console,
    measured: Measured | None = None,
) -> None:
    """Print a result: recipe, totals, findings, and the layers that matter most.

    Args:
        result: what to print.
        sort: by the worst score of each layer, or by the score for each MB that quantizing saves.
        top: layers to list.
        as_json: whether to print JSON instead of tables.
        console: where to print.
        measured: what was measured of it.
    """
    rows = _rows(result, sort)
    found = all_findings(result.about.findings if result.about else (), measured)
    if as_json:
        _print_json(console, _as_json(result, sort, rows[:top], found, measured))
        return
    console.print(_headline(result))
    console.print(_totals(result, found, measured))
    for entry in _findings(found):
        console.print(entry)
    console.print(_layers(result, sort, rows[:top], console.width))
    if len(rows) > top:
        console.print(Text(f"{len(rows) - top} more; --top {len(rows)} lists them all", "dim"))


def diff(a: Result, b: Result, as_json: bool, console: Console) -> Comparison:
    """Print what two results have in common and what not; return it."""
    found = compare(profile(a), profile(b))
    if as_json:
        content = {
            "a": f"{a.run}/{a.scheme}",
            "b": f"{b.run}/{b.scheme}",
            **asdict(found),
            "exceeds_noise": found.exceeds_noise,
            "verdict": found.verdict,
        }
        _print_json(console, content)
    else:
        console.print(*_comparison(a, b, found), sep="\n")
    return found


def _rows(result: Result, sort: Sort) -> list[tuple[LayerGroup, Score | None]]:
    if sort == "damage-per-mb":
        return list(result.most_damage_per_mb())
    return [(group, group.worst) for group in result.ranked]


def _headline(result: Result) -> Text:
    text = Text()
    text.append(f"{result.run} / {result.scheme}", "bold")
    facts = (result.model, result.dataset, result.modality, result.method)
    text.append(f"  {', '.join(fact for fact in facts if fact)}")
    return text


def _totals(
    result: Result, findings: Sequence[Finding], measured: Measured | None
) -> RenderableType:
    total, about = result.total, result.about
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    taken = ", ".join(
        f"{part.groups} {changed_label(short_format(part.name))}"
        for part in result.by_format
        if part.groups
    )
    if about:
        asked = about.scheme.effective_bits
        of = f" of at most {bits(asked)}" if asked is not None else ""
        table.add_row("recipe", taken)
        table.add_row("bits", f"{bits(about.state.constraints.get('effective_bits'))}{of}")
        table.add_row(
            "size", f"{size(total.before)} → {size(total.after)} (−{percent(total.saved_share)})"
        )
        error = f" ± {number(about.damage_se)}" if about.damage_se is not None else ""
        table.add_row("damage", f"{number(about.state.score)}{error}, predicted")
        if measured and measured.chosen:
            kl, low, high = (measured.chosen[key] for key in ("kl", "kl_low", "kl_high"))
            span = f" ({number(low)} to {number(high)})" if low is not None else ""
            table.add_row("measured", f"KL {measured.kl(kl)}{span} on held-out rows")
            table.add_row("", measured.verdict.sentence)
        table.add_row("trust", trust([finding.severity for finding in findings]))
    else:
        table.add_row("groups", str(total.groups))
        table.add_row("", "no recipe and no findings: another program wrote this manifest")
    return table


def _findings(findings: Sequence[Finding]) -> Iterator[Text]:
    for finding in findings:
        text = Text()
        text.append(f"{SEVERITIES[finding.severity]}: ", STYLES[finding.severity])
        text.append(plain(finding.what))
        text.append(f" {plain(finding.fix)}", "dim")
        yield text


def _layers(
    result: Result, sort: Sort, rows: list[tuple[LayerGroup, Score | None]], width: int
) -> Table:
    title = "by score" if sort == "score" else "by score for each MB saved"
    table = Table(box=box.SIMPLE_HEAD, title=f"Layer groups {title}", title_justify="left")
    # A narrow terminal shows less of each layer, and its whole name.
    wide = width >= WIDE
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("layer", overflow="fold", min_width=28)
    if wide:
        table.add_column("subsystem")
        table.add_column("worst format", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    if wide or sort == "score":
        table.add_column("share", justify="right", no_wrap=True)
    if wide or sort == "damage-per-mb":
        table.add_column("per MB", justify="right", no_wrap=True)
    table.add_column("recipe", overflow="fold", min_width=4)
    for group, entry in rows:
        per_mb = number(entry.per_mb) if entry else "–"
        cells = [
            str(result.places.get(group.handle, "–")),
            group.layer,
            *([group.subsystem, short_format(entry.format) if entry else "–"] if wide else []),
            score_text(entry) if entry else _state(group),
            *([percent(result.share(group))] if wide or sort == "score" else []),
            *([per_mb] if wide or sort == "damage-per-mb" else []),
            changed_label(short_format(group.selected)) if group.selected else "–",
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _state(group: LayerGroup) -> str:
    """Return why a group has no worst score."""
    states = [entry.state for entry in group.scores.values() if entry.state != "score"]
    return states[0] if states else "no score"


def _comparison(a: Result, b: Result, found: Comparison) -> list[RenderableType]:
    parts: list[RenderableType] = [
        Group(Text("A  ").append(_headline(a)), Text("B  ").append(_headline(b))),
        Text(found.verdict, "bold"),
    ]
    noise = "unknown" if found.expected is None else f"{found.expected:.3f} or better"
    rho = "–" if found.correlation is None else f"{found.correlation:.3f}"
    parts.append(
        Text(
            f"rank correlation {rho} (noise alone: {noise}) over {found.common} layers; "
            f"{found.only_a} in A alone, {found.only_b} in B alone; "
            f"{found.moved_beyond_noise} shares differ beyond noise; "
            f"{found.changed_count} choices differ"
        )
    )
    if found.moved:
        table = Table(box=box.SIMPLE_HEAD, title="Moved most", title_justify="left")
        for name in ("layer", "rank A", "rank B", "share A", "share B", "beyond noise"):
            table.add_column(name, overflow="fold")
        for entry in found.moved:
            beyond = {True: "yes", False: "no", None: "unknown"}[entry.beyond_noise]
            texts = (entry.layer, str(entry.rank_a), str(entry.rank_b),
                     percent(entry.share_a), percent(entry.share_b), beyond)  # fmt: skip
            table.add_row(*(Text(text) for text in texts))
        parts.append(table)
    if found.changed:
        table = Table(box=box.SIMPLE_HEAD, title="Choices that differ", title_justify="left")
        for name in ("layer", "A", "B"):
            table.add_column(name, overflow="fold")
        for layer, before, after in found.changed:
            cells = (layer, *(changed_label(short_format(name)) for name in (before, after)))
            table.add_row(*(Text(cell) for cell in cells))
        parts.append(table)
        if found.changed_count > len(found.changed):
            parts.append(Text(f"{found.changed_count - len(found.changed)} more", "dim"))
    return parts


def _as_json(
    result: Result,
    sort: Sort,
    rows: list[tuple[LayerGroup, Score | None]],
    findings: Sequence[Finding],
    measured: Measured | None,
) -> dict[str, Any]:
    about, total = result.about, result.total
    return {
        "run": result.run,
        "scheme": result.scheme,
        "model": result.model,
        "dataset": result.dataset,
        "modality": result.modality,
        "method": result.method,
        "effective_bits": about.state.constraints.get("effective_bits") if about else None,
        "effective_bits_asked": about.scheme.effective_bits if about else None,
        "bytes_before": total.before,
        "bytes_after": total.after if about else None,
        "predicted_damage": about.state.score if about else None,
        "predicted_damage_se": about.damage_se if about else None,
        "groups": total.groups,
        "groups_quantized": total.quantized if about else None,
        "formats": {part.name: part.groups for part in result.by_format} if about else None,
        "measured": {
            **{key: measured.chosen[key] for key in ("kl", "kl_low", "kl_high", "top1_agreement")},
            "verdict": measured.verdict.sentence,
        } if measured and measured.chosen else None,
        "findings": [msgspec.to_builtins(finding) for finding in findings] if about else None,
        "sorted_by": sort,
        "layers": [
            {
                "rank": result.places.get(group.handle),
                "layer": group.layer,
                "handle": group.handle,
                "subsystem": group.subsystem,
                "kind": group.kind,
                "block": group.block,
                "reached": group.reached,
                "format": entry.format if entry else None,
                "score": entry.score if entry else None,
                "score_se": entry.error if entry else None,
                "share": result.share(group),
                "score_per_mb_saved": entry.per_mb if entry else None,
                "selected": group.selected,
            }
            for group, entry in rows
        ],
    }  # fmt: skip


def _print_json(console: Console, content: dict[str, Any]) -> None:
    # Escapes also what a terminal would obey; JSON readers turn it back.
    console.file.write(json.dumps(content, indent=1, ensure_ascii=True) + "\n")
