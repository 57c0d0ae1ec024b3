"""The model card of a checkpoint: what it was made from and what speaks against it (no torch)."""

from collections import Counter
from pathlib import Path
from typing import Any

from layersense.export.store import Exported
from layersense.manifests.schema import Manifest
from layersense.verification.table import MeasuredRecipes

CARD = "README.md"


def model_card(manifest: Manifest, exported: Exported, verification: MeasuredRecipes | None) -> str:
    """Return the card as Markdown, with the header that the hub reads.

    Args:
        manifest: of the scheme.
        exported: what was written.
        verification: what was measured of the run's recipes; None where it is not verified.
    """
    model = manifest.model
    counts = Counter(exported.expected.quantized.values())
    bits = f"{exported.effective_bits:.3g}"
    lines = [
        "---",
        *([] if exported.expected.onnx else ["library_name: transformers"]),
        # What has no commit is a folder, a file or the demo's model.
        *([] if model.revision is None else [f"base_model: {model.id}"]),
        "tags: [modelopt, quantized]",
        "---",
        "",
        f"# {Path(model.id).name}, {exported.quant_algo}",
        "",
        f"{model.id}{f' at {model.revision}' if model.revision else ''} (SHA-256 "
        f"{model.digest[:12]}…), quantized by ModelOpt "
        f"{exported.environment.get('modelopt', '')} as scheme `{exported.scheme}` of run "
        f"`{exported.run}` chose: {bits} bits for each searched weight.",
        "",
        "| format | modules |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in sorted(counts.items())),
        f"| unquantized | {len(exported.expected.unquantized)} |",
        *(
            [f"| key-value cache | {exported.expected.kv_cache} |"]
            if exported.expected.kv_cache
            else []
        ),
        "",
        _checked(exported),
    ]
    if exported.kept:
        lines += [
            "",
            f"The recipe asks {exported.effective_bits_asked:.3g} bits; these groups stay "
            "unquantized because the exporter cannot write them:",
            "",
            *(f"- {reason}" for reason in exported.kept.values()),
        ]
    lines += ["", "## Verification", ""]
    lines += _verified(exported, verification)
    if not exported.expected.onnx:
        lines += ["", "## vLLM", "", *_vllm(exported)]
    found = list(manifest.findings)
    if verification is not None:
        # The verdict is about the scheme's own recipe.
        about = None if exported.kept else exported.scheme
        found += verification.summary.findings_of(manifest.scheme.quant_formats, about)
    lines += ["", "## Findings", ""]
    lines += [f"- **{one.severity}**: {one.what} {one.fix}" for one in found] or ["None."]
    return "\n".join(lines) + "\n"


def _vllm(exported: Exported) -> list[str]:
    if not exported.checked.vllm:
        return ["Nothing in its configs speaks against vLLM; it was not loaded there."]
    problems = [f"- {problem}." for problem in exported.checked.vllm]
    return ["vLLM does not read this checkpoint as it is meant:", "", *problems]


def _checked(exported: Exported) -> str:
    """Return what the check compared, in words."""
    checked = exported.checked
    if checked.onnx is None:
        return (
            f"{checked.tensors} tensors, {checked.bytes / 1e9:.3f} GB; {checked.compared} packed "
            f"weights were unpacked and compared with what was simulated ({checked.differing:.2%} "
            "of their elements are the neighbouring value of the format, which is rounding). The "
            f"quantized layers take {checked.quantized_bytes / 1e9:.3f} GB with their scales, "
            f"{exported.surplus:+.1%} of what the recipe's bits predict."
        )
    found = checked.onnx
    text = (
        f"`model.onnx`, {checked.bytes / 1e9:.3f} GB, standard Q/DQ nodes; weights are stored as "
        f"they were, and quantized by the runtime. In onnxruntime, on {found.samples} held-out "
        f"images, the first choice is that of the simulated model at {found.agreement:.1%} of the "
        f"positions, and the outputs are {found.distance:.2%} as far from the simulated ones as "
        "the unquantized model's."
    )
    for metric in exported.metrics:
        file, simulated, before = (
            _metric(value, metric.unit)
            for value in (metric.onnx, metric.simulated, metric.unquantized)
        )
        text += (
            f" The task's own metric, {metric.name}, is {file} there (simulated {simulated}, "
            f"unquantized {before})."
        )
    return text


def _metric(value: float | None, unit: str) -> str:
    """Return the value of a metric in words."""
    if value is None:
        return "unknown"
    return f"{value:.1%}" if unit == "share" else f"{value:.3g} {unit}".rstrip()


def _verified(exported: Exported, verification: MeasuredRecipes | None) -> list[str]:
    if verification is None:
        return ["Its damage was not measured; the run has no `verify`."]
    measured = verification.of(exported.recipe_digest)
    if measured is None and not exported.kept:
        return ["Not measured: this recipe is not among those that the run verified."]
    if measured is None:
        return [
            "Not measured: what was written is not the scheme's recipe, and was not among those "
            "verified. Leave the groups named above out of the scheme (`exclude`): then what is "
            "verified is what is written."
        ]
    summary, low, high = verification.summary, measured["kl_low"], measured["kl_high"]
    span = "" if low is None else f" (95 %: {low:.3g} to {high:.3g})"
    value = "not finite" if measured["kl"] is None else f"{measured['kl']:.3g} nats{span}"
    lines = [
        f"On {summary.heldout_samples} held-out rows, simulated: KL to the unquantized model "
        f"{value} for each position, the same first choice at {measured['top1_agreement']:.1%} of "
        "them."
    ]
    told = [_told(metric) for metric in measured["metrics"] or () if metric["value"] is not None]
    if told:
        lines[0] += f" By what the task is judged by: {'; '.join(told)}."
    if not exported.kept:  # what was written is the recipe that the verdict is about
        lines += ["", summary.verdict_of(exported.scheme).sentence]
    return lines


def _told(metric: dict[str, Any]) -> str:
    """Return a metric, and what quantization changed of it, both with their intervals."""
    unit = metric["unit"]

    def change(value: float) -> str:
        return f"{value * 100:+.1f}" if unit == "share" else f"{value:+.3g}"

    text = f"{metric['name']} {_metric(metric['value'], unit)}"
    if metric["low"] is not None:
        ends = (_metric(metric[end], unit if unit == "share" else "") for end in ("low", "high"))
        text += f" (95 %: {' to '.join(ends)})"
    if metric["difference"] is not None:
        text += f", {change(metric['difference'])}{' points' if unit == 'share' else ''}"
        if metric["difference_low"] is not None:
            text += (
                f" (95 %: {change(metric['difference_low'])} to "
                f"{change(metric['difference_high'])})"
            )
        text += " against the unquantized model"
    return text
