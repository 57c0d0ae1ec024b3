"""Write ``config/README.md``, the JSON schema and the table of formats from the code.

``python -m layersense.config_docs`` writes all three; a test fails while they differ from it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from layersense import config as models
from layersense.config import Config
from layersense.files import atomic_write
from layersense.quantization.formats import (
    Format,
    all_layers_name,
    known_formats,
    registry,
    resolve_format,
)
from layersense.quantization.pairs import Pair, grid
from layersense.recipes.targets import TARGETS, runtimes

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = REPOSITORY / "workflow/schemas/config.schema.json"
README = REPOSITORY / "config/README.md"
FORMATS = REPOSITORY / "docs/formats.md"

_SECTIONS: dict[str, tuple[tuple[str, type[BaseModel]], ...]] = {
    "datasets": (
        ("The embedded sample", models.SampleDataset),
        ("COCO", models.CocoDataset),
        ("`fetch` of COCO", models.Fetch),
        ("Own photographs", models.ImagesDataset),
        ("Own texts", models.TextDataset),
    ),
    "models": (
        ("A checkpoint", models.CheckpointModel),
        ("The demo model", models.DemoModel),
    ),
    "formats": (("", models.OwnFormat),),
    "schemes": (
        ("", models.Scheme),
        ("`search_spaces` of a scheme", models.SearchSpace),
        ("`cost_table` of a scheme", models.CostTable),
    ),
    "runs": (("", models.Run), ("`verify` of a run", models.Verify)),
    "manifests": (("", models.ImportedManifest),),
    "report": (("", models.Report),),
}

_HEAD = """\
<!-- Written by `python -m layersense.config_docs` from its docstrings; edit them. -->

# The config

`config.yaml` is the demo: a small vision-language model on the embedded sample. Each file in
[`examples/`](examples) stands for one real use; run one with `snakemake --configfile FILE`. A
config given in this way stands for itself and is not merged into `config.yaml`.

| example | what it shows |
| --- | --- |
| [`own-photographs.yaml`](examples/own-photographs.yaml) | your own photographs |
| [`qwen2.5-vl-3b-coco.yaml`](examples/qwen2.5-vl-3b-coco.yaml) | Qwen2.5-VL-3B with full COCO |
| [`text-llm.yaml`](examples/text-llm.yaml) | a language model on texts |
| [`t5-coco.yaml`](examples/t5-coco.yaml) | an encoder–decoder |
| [`detectors-coco.yaml`](examples/detectors-coco.yaml) | detectors |
| [`classifier-own-classes.yaml`](examples/classifier-own-classes.yaml) | a classifier |
| [`segmenter-coco.yaml`](examples/segmenter-coco.yaml) | a segmenter |
| [`grid-of-pairs.yaml`](examples/grid-of-pairs.yaml) | every pair of types in one run |
| [`many-schemes.yaml`](examples/many-schemes.yaml) | many schemes, an own format |

The whole config is checked before anything starts, and all problems are told at once. Of a file
that is no YAML, such as one indented by a tab, Snakemake only says so; `layersense validate FILE`
names the line. The first line of each file names the
[JSON schema](../workflow/schemas/config.schema.json), by which editors with a YAML language server
complete keys and show what they mean. Relative paths are relative to the folder that Snakemake was
started in.

## Your own model and data

`layersense init ./my-checkpoint --data photos/` looks at both and writes `config/my-model.yaml`;
`--data` may also be a folder or a file of COCO's form, whatever wrote it, wherever its images are.
By hand, it takes:

1. a **model**: a hub id, or a directory with `config.json` and safetensors;
2. a **dataset**: a COCO folder; or a folder of images and a CSV or JSONL table with the columns
   `image` and `text`; or a JSONL file with `text` in each line. Its `calibration` and `heldout`
   rows must be there: lower them for a small folder;
3. a **scheme**: formats and a budget. Budgets are cheap: a changed or added one measures nothing;
4. a **run** that joins them. Without a GPU, set `device: cpu`.

What is measured belongs to the run (model, data, method, sampling), what is decided belongs to the
scheme. A format is measured once in each run, however many schemes name it.

A second model is one more entry under `models` and `runs` of the same file. Of two files in one
folder, each keeps what the other measured, and `index.html`, `summary.md` and the tables of all
runs show the one that was run last.

## Your own cluster

What a site decides stands in a profile, never in the config or a rule:

1. copy [`profiles/slurm`](../profiles/slurm/config.yaml) to `profiles/my-site`;
2. uncomment `slurm_partition` and `slurm_account` (`sacctmgr show assoc user=$USER`);
3. set `gpu=` under `resources` to the GPUs you may hold at once;
4. if there are several models of GPU, uncomment the two lines of `gpu_model` (`sinfo -o %G`);
5. keep `slurm-status-command: squeue`, unless `sacct -X` lists your finished jobs;
6. load modules and set `HF_HOME` in the shell that starts Snakemake; set `extensions` of the config
   to a folder that all nodes see, unless home is one;
7. put repository, `.venv`, checkpoints and `results/` on a file system that all nodes see, or use
   `--software-deployment-method conda` for the environments;
8. `snakemake --profile profiles/my-site -n` shows what would be asked;
9. `snakemake --profile profiles/my-site`, in `tmux` or as a long job of its own;
10. what a night can bring, and what to do: [docs/operations.md](../docs/operations.md).
"""

_FORMATS_HEAD = """\
<!-- Written by `python -m layersense.config_docs` from the format registry. -->

# Formats

Names for `quant_formats` in a scheme. Each is a config of ModelOpt {version} with its exclusions by
layer name taken out, so that every linear layer and convolution can be measured; leave layers out
by a scheme's `exclude` instead. How to make a format of your own:
[`formats` in the config](../config/README.md#formats-a-mapping-of-names).

- **Bits** is what a weight takes: the bits of its element, and its share of the block's scale.
  Scales of a whole tensor or channel count as nothing. Blocks lie along a weight's last axis, which
  is the width of a convolution's kernel: 3 × 3 has a scale for each 3 weights, 1 × 1 one for each,
  which makes the score small and takes 9.33 and 20 bits with INT4, not 4.125. A finding names them.
- **Activations** `NONE`: they stay as they are (a weight-only format).
- **Algorithm** calibrates the scales; `–`: they are found on the fly and nothing is calibrated.
  Formats with `max` are measured together, each other one in a pass of its own.
- **Deploys**: what loads the checkpoint that ModelOpt's exporter writes in this format, by that
  runtime's documentation; all else is **simulation only**: it can be measured, and no runtime is
  known to us that runs it. Layers that a runtime does not quantize (convolutions, vision towers)
  are another question.
- **CUDA**: `needed` where ModelOpt has no code for the CPU; refused with `device: cpu` when the
  config is read.
"""


_PAIRS = """\
## Pairs of types

Any type of weight with any type of activation, as a format of all layers: `W8A8_FP8_INT8` is FP8
weights with INT8 activations, `W4A16_INT4` INT4 weights with activations as they are. FP4 is NVFP4.
[`examples/grid-of-pairs.yaml`](../config/examples/grid-of-pairs.yaml) measures them all in one run.

What shares a scale is an option at the end of the name, where it is not the default:

| option | weights | option | activations |
| --- | --- | --- | --- |
| `_WTENSOR` | the whole tensor | `_ATENSOR` | the whole tensor, calibrated |
| `_WCHANNEL` | an output channel | `_ATOKEN` | a token, found on the fly |
| `_WGROUP64`, `_WGROUP128` | so many in a row | | |

So `W8A8_INT8_INT8_WTENSOR_ATOKEN` has one scale for all weights and one for each token. FP4 is
always in blocks of 16, as ModelOpt emulates it in no other way. Bits count the weight and its
scales; ModelOpt alone would bill `W8A4_FP8_INT4` at 4 bits.
"""


def schema() -> str:
    """Return the JSON schema of the config."""
    body = Config.model_json_schema()
    # Without this, an entry whose name is no file name would be left unchecked.
    for section in body["properties"].values():
        if "patternProperties" in section:
            section["additionalProperties"] = False
    body = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **body,
        "title": "layersense config",
    }
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def readme() -> str:
    """Return the reference of every key, in Markdown."""
    lines = [_HEAD, "## Keys", ""]
    for name, field in Config.model_fields.items():
        many = name in ("datasets", "models", "formats", "schemes", "runs", "manifests")
        lines += [f"### `{name}`" + (": a mapping of names" if many else ""), ""]
        lines += [_sentence(field), ""]
        if many and field.is_required():
            lines += ["At least one entry is needed.", ""]
        for title, model in _SECTIONS.get(name, ()):
            lines += _table(title, model)
        if name not in _SECTIONS:
            lines += [f"{_type(field.annotation)}, default `{_yaml(field.default)}`.", ""]
    return "\n".join(lines).rstrip() + "\n"


def formats() -> str:
    """Return the table of all formats and of the refused ones, in Markdown."""
    known, committed = known_formats(), registry()
    aliases = [
        (f"`{alias}`", f"`{name}`")
        for name, entry in committed.formats.items()
        for alias in map(all_layers_name, entry.aliases)
    ]
    columns = (
        "Format", "ModelOpt's config", "Bits", "Weights", "Activations", "Algorithm", "CUDA",
        "Deploys",
    )  # fmt: skip
    pairs = ("Pair", "Bits", "Weights by", "Activations by", "CUDA", "Deploys")
    lines = [
        _FORMATS_HEAD.format(version=committed.modelopt),
        *_rows(columns, (_format_row(known[name]) for name in known)),
        "",
        _PAIRS,
        *_rows(pairs, map(_pair_row, grid())),
        "",
        "## Targets",
        "",
        "What a scheme's `target` restricts, and where that is from: formats of one line can stand "
        "together in",
        "one checkpoint, layers of one line take one format, and some layers take fewer or none.",
        "`generic` restricts nothing.",
        "",
        *_rows(("Target", "What", "Source"), _target_rows()),
        "",
        "## Other names for the same",
        "",
        "ModelOpt has configs that differ from another in the layers that they name, and in "
        "nothing else.",
        "With every layer they are equal, and outputs show the name on the right.",
        "",
        *_rows(("Alias", "Format"), aliases),
        "",
        "## Refused",
        "",
        *_rows(
            ("ModelOpt's config", "Why"),
            (
                (f"`{name}`", f"{why[0].upper()}{why[1:]}.")
                for name, why in committed.refused.items()
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the three files."""
    atomic_write(SCHEMA, schema())
    atomic_write(README, readme())
    atomic_write(FORMATS, formats())


def _format_row(format: Format) -> tuple[str, ...]:
    return (
        f"`{format.name}`",
        f"`{registry().formats[format.name].base}`",
        f"{format.effective_bits:.4g}",
        format.weight_format,
        format.act_format,
        f"`{format.algorithm['method']}`" if format.algorithm else "–",
        "needed" if format.needs_cuda else "",
        ", ".join(runtimes(format)) or "simulation only",
    )


def _target_rows() -> Iterator[tuple[str, ...]]:
    def code(words: Iterable[str]) -> str:
        return ", ".join(f"`{word}`" for word in words)

    for name, runtime in TARGETS.items():
        target = f"`{name}`"
        for together in runtime.together:
            yield target, f"together: {code(together.formats)}", together.source
        for fused in runtime.fused:
            yield target, f"one format: {code(fused.layers)}", fused.source
        for rule in runtime.restricted:
            allowed = f"only {code(rule.formats)}" if rule.formats else "never quantized"
            yield target, f"{rule.what}: {allowed}", rule.source
        for cache in runtime.caches:
            yield target, f"key-value cache: {code(cache.formats)}", cache.source


def _pair_row(pair: Pair) -> tuple[str, ...]:
    words = {
        "TENSOR": "tensor", "CHANNEL": "channel", "GROUP128": "group of 128",
        "BLOCK16": "block of 16", "TOKEN": "token", None: "–",
    }  # fmt: skip
    format = resolve_format(pair.name, {})
    return (
        f"`{format.name}`",
        f"{format.effective_bits:.4g}",
        words[pair.weight_by],
        words[pair.act_by],
        "needed" if format.needs_cuda else "",
        ", ".join(runtimes(format)) or "simulation only",
    )


def _rows(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table as lines."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]


def _table(title: str, model: type[BaseModel]) -> list[str]:
    lines = [f"#### {title}", ""] if title else []
    lines += [" ".join((model.__doc__ or "").split()), ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in model.model_fields.items():
        default = "**required**" if field.is_required() else f"`{_yaml(field.get_default())}`"
        kind = _type(field.annotation) + _limits(field)
        lines.append(f"| `{key}` | {kind} | {default} | {_sentence(field)} |")
    return [*lines, ""]


def _sentence(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _yaml(value: Any) -> str:
    if value is PydanticUndefined:
        raise ValueError("a required key has no default")
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def _type(annotation: Any) -> str:
    """Return a type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(arg) for arg in args if arg is not NoneType)
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]


def _limits(field: FieldInfo) -> str:
    """Return the limits of a number, such as `, > 0, ≤ 16`."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f", {sign} {getattr(item, key)}"
        for item in field.metadata
        for key, sign in signs.items()
        if hasattr(item, key)
    ]
    return "".join(found)


if __name__ == "__main__":
    main()
