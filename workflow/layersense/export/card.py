"""The model card of a checkpoint: what it was made from and what speaks against it (no torch)."""

from collections import Counter
from pathlib import Path

from layersense.export.store import Exported
from layersense.manifests.schema import Manifest
from layersense.verification.analysis import mean_with_interval
from layersense.verification.store import Verification

CARD = "README.md"


def model_card(manifest: Manifest, exported: Exported, verification: Verification | None) -> str:
    """Return the card as Markdown, with the header that the hub reads."""
    model = manifest.model
    counts = Counter(exported.expected.quantized.values())
    bits = f"{exported.effective_bits:.3g}"
    lines = [
        "---",
        "library_name: transformers",
        *([] if _is_local(model.id) else [f"base_model: {model.id}"]),
        "tags: [modelopt, quantized]",
        "---",
        "",
        f"# {_name(model.id)}, {exported.quant_algo}",
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
        f"{exported.checked.tensors} tensors, {exported.checked.bytes / 1e9:.3f} GB; "
        f"{exported.checked.compared} packed weights were unpacked and compared with what was "
        f"simulated ({exported.checked.differing:.2%} of their elements are the neighbouring value "
        "of the format, which is rounding).",
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
    lines += ["", "## vLLM", ""]
    if exported.checked.vllm:
        lines += ["vLLM does not read this checkpoint as it is meant:", ""]
        lines += [f"- {problem}." for problem in exported.checked.vllm]
    else:
        lines += ["Nothing in its configs speaks against vLLM; it was not loaded there."]
    lines += ["", "## Findings", ""]
    lines += [
        f"- **{finding.severity}**: {finding.what} {finding.fix}" for finding in manifest.findings
    ] or ["None."]
    return "\n".join(lines) + "\n"


def _verified(exported: Exported, verification: Verification | None) -> list[str]:
    if verification is None:
        return ["Its damage was not measured; the run has no `verify`."]
    measured = verification.recipes.get(exported.recipe_digest)
    if measured is None:
        return [
            "Not measured: what was written is not the scheme's recipe, and was not among those "
            "verified."
        ]
    positions = verification.before.positions
    kl, low, high = mean_with_interval(measured.damage.kl, positions)
    agreement = sum(measured.damage.agree) / max(1, sum(positions))
    span = "" if low is None else f" (95 %: {low:.3g} to {high:.3g})"
    value = "not finite" if kl is None else f"{kl:.3g} nats{span}"
    return [
        f"On {verification.heldout_samples} held-out rows, simulated: KL to the unquantized model "
        f"{value} for each position, the same first choice at {agreement:.1%} of them."
    ]


def _is_local(id: str) -> bool:
    return id == "demo" or id.startswith((".", "/", "~"))


def _name(id: str) -> str:
    return Path(id).name
