"""Sentences about a result that the Markdown report, the pages and the terminal share."""

from collections.abc import Callable, Mapping, Sequence

from layersense.manifests.schema import (
    AutoQuantizeState,
    Budget,
    Finding,
    Scheme,
    gravest_first,
)
from layersense.recipes.targets import TARGETS
from layersense.reports.measured import Measured
from layersense.reports.result import Score
from layersense.reports.text import Markdown, bits, count, join, number, plain, size

SEVERITIES = {"error": "Error", "warning": "Warning", "info": "Note"}
"""Severity of a finding → what readers are told, the gravest first."""
MANY_TIMES = 10
"""Ratio of two damages from which on it is told as such, and not in per cent."""
PROVEN = 1e-6
"""Gap below which a choice is called the best."""


def score_text(entry: Score) -> str:
    """Return a score with its standard error, or what there is in its place."""
    if entry.state in ("not reached", "not finite"):
        return entry.state
    doubt = f" ± {number(entry.error)}" if entry.error else ""
    return f"{number(entry.score)}{doubt}"


def score_unit(modality: str | None) -> str:
    """Return what a score is divided by, in the singular."""
    return "token" if modality in ("text", "text_pair", "image_text") else "sample"


def all_findings(own: Sequence[Finding], measured: Measured | None) -> list[Finding]:
    """Return what was found of the scores and by verification, the most severe first."""
    return gravest_first([*own, *(measured.findings if measured else ())])


def trust(severities: Sequence[str]) -> str:
    """Return in one sentence, without its full stop, whether findings speak against a result."""
    if "error" in severities:
        return "Do not use this result before its errors are understood"
    if "warning" in severities:
        return "Read the warnings before you rely on it"
    return "Nothing that speaks against these numbers was detected"


def finding_counts(errors: int | None, warnings: int | None, infos: int | None) -> str:
    """Return ``2 warnings, 1 note``; ``–`` where findings were never looked for."""
    if errors is None or warnings is None or infos is None:
        return "–"
    parts = [
        f"{number} {word}{'' if number == 1 else 's'}"
        for number, word in ((errors, "error"), (warnings, "warning"), (infos, "note"))
        if number
    ]
    return ", ".join(parts) or "none"


def budget_text(budget: Budget) -> str:
    """Return the budget as asked."""
    if budget.kind == "bits":
        return f"{bits(budget.limit)} bits"
    return f"{number(budget.limit)} {budget.unit}"


def budget_unit(budget: Budget) -> str | None:
    """Return the heading of what recipes take of the budget; None where their bits say it."""
    return None if budget.kind == "bits" else budget.unit


def proof_text(state: AutoQuantizeState) -> str:
    """Return how much better another choice could be at most."""
    more = f" by more than {number(100 * state.gap)} %" if state.gap >= PROVEN else ""
    return f"No other choice within this budget is predicted to do better{more}."


def checkpoint_text(state: AutoQuantizeState) -> str:
    """Return what the choice makes of the whole checkpoint."""
    before, after = size(state.checkpoint_bytes_before), size(state.checkpoint_bytes)
    return f"The whole checkpoint, with what was never searched, goes from {before} to {after}."


def denominator_text(
    state: AutoQuantizeState, scheme: Scheme, quote: Callable[[str], str] = str
) -> Markdown | None:
    """Return which weights the bits average over; None where they are all that was searched.

    Args:
        state: the choice.
        scheme: what was asked.
        quote: how patterns of names are written.
    """
    weights = state.budget.counted_weights
    if weights is None:
        return None
    parts = []
    if scheme.cost_excluded:
        names = join([Markdown(quote(name)) for name in scheme.cost_excluded])
        parts.append(f"layers that match {names} do not count")
    if scheme.active_expert_ratio is not None:
        parts.append(f"routed experts count by {number(scheme.active_expert_ratio)}")
    return Markdown(
        f"The bits asked for are an average over {count(int(weights))} weights, of which the "
        f"choice takes {bits(state.budget.used)}: {', and '.join(parts)}."
    )


def target_text(state: AutoQuantizeState) -> str | None:
    """Return what the scheme's target asks for and what it costs; None without one."""
    found = state.deployment
    if found is None:
        return None
    title = TARGETS[found.target].title if found.target in TARGETS else found.target
    parts = [f"{found.barred} groups may take fewer formats"] if found.barred else []
    if found.fused:
        parts.append(f"{sum(map(len, found.fused))} groups are loaded as {len(found.fused)}")
    if len(found.together) > 1:
        parts.append(f"the formats fall into {len(found.together)} sets that do not mix")
    extra = state.minimized - found.minimized_without
    price = f"adds {number(extra)} to the damage" if extra > 0 else "adds no damage"
    if extra > 0 and found.minimized_without:
        ratio = state.minimized / found.minimized_without
        rise = f"+{100 * (ratio - 1):.3g} %" if ratio < MANY_TIMES else f"{number(ratio)} times it"
        price += f" ({rise})"
    asks = f" ({'; '.join(parts)})" if parts else ""
    return f"Every recipe here can be loaded by {title}{asks}, which {price} at this budget."


def environment_rows(
    environment: Mapping[str, Mapping[str, str]], called: Callable[[str], str] = str
) -> list[tuple[str, str]]:
    """Return versions and hardware, each once where all formats agree.

    Args:
        environment: of each format.
        called: what a format is called where they do not agree.
    """
    rows: list[tuple[str, str]] = []
    for key in dict.fromkeys(key for entry in environment.values() for key in entry):
        values: dict[str, list[str]] = {}
        for name, entry in environment.items():
            values.setdefault(plain(entry.get(key, "unknown")), []).append(name)
        for value, names in values.items():
            where = "" if len(values) == 1 else f" ({', '.join(map(called, names))})"
            rows.append((f"{key}{where}", value))
    return rows
