"""Find, fetch and inspect checkpoints without loading them (no torch)."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from layersense import paths
from layersense.config import DemoModel, Model
from layersense.errors import LayersenseError
from layersense.files import BROKEN_JSON, digest_file, digest_json, write_record
from layersense.models.outside import is_outside

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Names of safetensors' element types in torch; the others hold no weights that are scored."""
_UNQUANTIZED = ("bfloat16", "float16", "float32")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
"""The files of a checkpoint that matter: weights, configs, tokenizer, chat template."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Checkpoint(msgspec.Struct, kw_only=True, frozen=True):
    """A checkpoint on this machine: what ``model.json`` holds."""

    path: str
    """Directory with ``config.json`` and the safetensors."""
    id: str
    """Hub id or directory, as the config says it; ``demo`` for the demo model."""
    revision: str | None
    """Commit on the hub; None for a directory."""
    digest: str
    """SHA-256 over the names and bytes of all files that matter."""
    task: str
    """Task, as the config says it."""
    architecture: str
    """Class in transformers, such as ``Qwen2_5_VLForConditionalGeneration``."""
    n_parameters: int
    """Elements of all stored tensors; tied weights are stored once."""
    dtype: str
    """Type of most of its weights, such as ``bfloat16``."""
    trust_remote_code: bool
    """Whether code that comes with it may run."""
    trained_on_calibration: bool = False
    """True for the demo model, which has seen the very rows it is scored on."""
    size_bytes: int
    """Bytes of the safetensors files."""


def resolve(name: str, model: Model, built: Path | None = None) -> Checkpoint:
    """Fetch a model if it is on the hub, and inspect it.

    Args:
        name: the model's name in the config, for error messages.
        model: its entry in the config.
        built: where the demo model, or the checkpoint made of a pickled one, was written.

    Raises:
        LayersenseError: it cannot be found, fetched or used.
    """
    if isinstance(model, DemoModel):
        if built is None:
            raise ValueError("the demo model is resolved from where it was built")
        return inspect(built, id="demo", revision=None, model=model, trained_on_calibration=True)
    if built is not None:
        return inspect(built, id=model.checkpoint, revision=None, model=model)
    if folder := _as_directory(model.checkpoint):
        if model.revision is not None:
            raise LayersenseError(
                f"models.{name}.revision: {model.checkpoint} is a directory, which has no "
                "revisions; remove the key"
            )
        return inspect(folder, id=model.checkpoint, revision=None, model=model)
    folder = _fetch(name, model.checkpoint, model.revision, model.trust_remote_code)
    return inspect(folder, id=model.checkpoint, revision=folder.name, model=model)


def peek(name: str, model: Model, configfile: Path) -> Checkpoint:
    """Return what a directory's checkpoint is without reading its weights; its digest is empty.

    Args:
        name: the model's name in the config.
        model: its entry in the config.
        configfile: the config, for the command in the error message.

    Raises:
        LayersenseError: it is no directory, or cannot be used.
    """
    folder = None
    if not isinstance(model, DemoModel) and not is_pickle(model.checkpoint):
        folder = _as_directory(model.checkpoint)
    if folder is None:
        raise LayersenseError(
            f"models.{name}: is not on this machine yet; run `snakemake "
            f"{paths.model(name)} --cores 1 --configfile {configfile}`"
        )
    return inspect(folder, id=str(folder), revision=None, model=model, hashed=False)


def inspect(
    folder: Path,
    *,
    id: str,
    revision: str | None,
    model: Model,
    trained_on_calibration: bool = False,
    hashed: bool = True,
) -> Checkpoint:
    """Read a checkpoint's config and safetensors headers, and hash its files.

    Args:
        folder: directory of the checkpoint.
        id: hub id or directory, as the config says it.
        revision: commit on the hub, or None.
        model: its entry in the config.
        trained_on_calibration: whether it has seen the rows it is scored on.
        hashed: whether to read all files for the digest, which is empty without.

    Raises:
        LayersenseError: a file is missing or broken, only pickled weights are there, it is
            quantized already, needs remote code, or does another task.
    """
    config = read_config(folder)
    architecture = _architecture(folder, config)
    _check_code(folder, config, model.trust_remote_code)
    _check_task(folder, config, architecture, model.task)
    if "quantization_config" in config or "compression_config" in config:
        raise LayersenseError(
            f"{folder / 'config.json'}: the checkpoint is quantized already "
            "(`quantization_config`); give the original in bfloat16, float16 or float32"
        )
    weights = _weight_files(folder)
    elements = _count_elements(weights)
    dtype = elements.most_common(1)[0][0]
    if dtype not in _UNQUANTIZED:
        raise LayersenseError(
            f"{weights[0]}: most weights are {dtype}, which is quantized or unknown; give the "
            "original in bfloat16, float16 or float32"
        )
    patterns = [*_PATTERNS[1:], *(["*.py"] if model.trust_remote_code else [])]
    others = [path for pattern in patterns for path in folder.glob(pattern)]
    return Checkpoint(
        path=str(folder),
        id=id,
        revision=revision,
        digest=digest_json({path.name: digest_file(path) for path in (*weights, *others)})
        if hashed
        else "",
        task=model.task,
        architecture=architecture,
        n_parameters=elements.total(),
        dtype=dtype,
        trust_remote_code=model.trust_remote_code,
        trained_on_calibration=trained_on_calibration,
        size_bytes=sum(path.stat().st_size for path in weights),
    )


def source_files(model: Model) -> list[Path]:
    """Return the files of a checkpoint on this machine; an edit of one makes its record stale.

    There are none for the hub, whose commits do not change, and for the demo model.
    """
    if isinstance(model, DemoModel):
        return []
    if is_pickle(model.checkpoint):
        return [Path(model.checkpoint).expanduser()]
    if (folder := _as_directory(model.checkpoint)) is None:
        return []
    patterns = [*_PATTERNS, *(["*.py"] if model.trust_remote_code else [])]
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's ``config.json``.

    Raises:
        LayersenseError: the folder or the file is missing, or it is no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise LayersenseError(
            f"{folder}: there is no such directory; correct `checkpoint` of the model"
        )
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LayersenseError(
            f"{folder}: holds no config.json, so it is no checkpoint in Hugging Face form; give "
            "the folder that `save_pretrained` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise LayersenseError(
            f"{path}: is not readable as JSON ({error}); copy it again from the original checkpoint"
        ) from error
    if not isinstance(config, dict):
        raise LayersenseError(
            f"{path}: is not a JSON object; copy it again from the original checkpoint"
        )
    return config


ENDINGS = {
    "image-classification": ("ForImageClassification", "ForImageClassificationWithTeacher"),
    "object-detection": ("ForObjectDetection",),
    "semantic-segmentation": ("ForSemanticSegmentation",),
}
"""How the classes of tasks on images are called in transformers."""


def guess_task(config: dict[str, Any]) -> str:
    """Return the task of a checkpoint from its ``config.json``.

    Raises:
        LayersenseError: no task fits.
    """
    architecture = str((config.get("architectures") or ["?"])[0])
    if task := library_task(config, architecture):
        return task
    for task, endings in ENDINGS.items():
        if architecture.endswith(endings):
            return task
    if _sees(config):
        return "image-text-to-text"
    if _translates(config, architecture):
        return "seq2seq-lm"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    raise LayersenseError(
        f"architecture {architecture}: is neither a language model (…ForCausalLM), an "
        "encoder–decoder, a vision-language model (with a `vision_config`), nor a classifier, "
        "detector or segmenter of images; write a task of your own (docs/tasks.md)"
    )


def library_task(config: dict[str, Any], architecture: str) -> str | None:
    """Return the task of a model of ultralytics, or of torchvision by its builder; else None."""
    if config.get("library_name") == "ultralytics":
        return "object-detection"
    if config.get("library_name") != "torchvision":
        return None
    if architecture.startswith(("retinanet", "fcos", "ssd", "fasterrcnn", "maskrcnn")):
        return "object-detection"
    if architecture.startswith(("deeplabv3", "lraspp", "fcn")):
        return "semantic-segmentation"
    return "image-classification"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read ``results/models/{model}/model.json``.

    Raises:
        LayersenseError: it is missing or not of this schema.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Checkpoint)
    except FileNotFoundError as error:
        raise LayersenseError(
            f"{path}: there is no such file; run `snakemake {path}` with the config of its model"
        ) from error
    except BROKEN_JSON as error:
        raise LayersenseError(
            f"{path}: is not a model record of layersense ({error}); delete it and run the same "
            "command again"
        ) from error


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write ``results/models/{model}/model.json`` atomically."""
    write_record(path, checkpoint)


def is_path(checkpoint: str) -> bool:
    """Return whether a model's ``checkpoint`` means a path on this machine, not a hub id."""
    return (
        checkpoint.startswith((".", "/", "~")) or is_pickle(checkpoint) or Path(checkpoint).is_dir()
    )


def is_pickle(checkpoint: str) -> bool:
    """Return whether a model's ``checkpoint`` is a pickled file of ultralytics."""
    return checkpoint.endswith(".pt") and not Path(checkpoint).expanduser().is_dir()


def as_pickle(name: str, model: Model) -> Path | None:
    """Return the pickled checkpoint of ultralytics that a model names, or None if it names none.

    Raises:
        LayersenseError: it is missing, or what is in it may not run.
    """
    if isinstance(model, DemoModel) or not is_pickle(model.checkpoint):
        return None
    path = Path(model.checkpoint).expanduser()
    if not path.is_file():
        raise LayersenseError(
            f"models.{name}.checkpoint: there is no file {path}; correct it, as checkpoints of "
            "ultralytics are not downloaded"
        )
    if not model.trust_remote_code:
        raise LayersenseError(
            f"models.{name}.checkpoint: {path} is a pickle, which can run code when it is loaded; "
            "if you trust where it comes from, set `trust_remote_code: true` of the model"
        )
    return path


def _as_directory(checkpoint: str) -> Path | None:
    """Return the directory that ``checkpoint`` names, or None if it is a hub id."""
    return Path(checkpoint).expanduser() if is_path(checkpoint) else None


def _fetch(name: str, hub_id: str, revision: str | None, remote_code: bool) -> Path:
    """Download what matters of a hub repository and return the folder, named by its commit."""
    import httpx
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():  # a log file
        disable_progress_bars()
    key = f"models.{name}.checkpoint"
    at = f"{hub_id} at revision {revision}" if revision else hub_id
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[*_PATTERNS, *(["*.py"] if remote_code else [])],
                # Sub-folders and consolidated files hold the weights again, for other libraries.
                ignore_patterns=["*/*", "consolidated*.safetensors"],
            )
        )
    except errors.HFValidationError as error:
        raise LayersenseError(
            f"{key}: {hub_id} is neither a directory nor a hub id; write a directory as ./…, /… "
            "or ~/…, a hub id as owner/name"
        ) from error
    except errors.GatedRepoError as error:
        raise LayersenseError(
            f"{key}: {hub_id} is gated; accept its conditions on https://huggingface.co/{hub_id} "
            "and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LayersenseError(
            f"models.{name}.revision: {hub_id} has no branch, tag or commit {revision}; correct it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LayersenseError(
            f"{key}: there is no {hub_id} on the hub, or it is private; correct the id, write a "
            "directory as ./…, or log in with `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, httpx.TransportError) as error:
        raise LayersenseError(
            f"{key}: {at} is not in the local cache and the hub cannot be reached; connect to "
            "the network, or give a directory as ./…"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = (
            "log in with `hf auth login` as a user who may read it"
            if status in (401, 403)
            else "try again later"
        )
        raise LayersenseError(f"{key}: the hub refused {at} with status {status}; {fix}") from error
    except OSError as error:
        raise LayersenseError(
            f"{key}: {at} cannot be stored ({error.strerror or error}); free disk space, or set "
            "HF_HOME to a folder with more"
        ) from error


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise LayersenseError(
            f"{folder / 'config.json'}: names no `architectures`; copy it again from the original "
            "checkpoint"
        )
    return str(names[0])


def _check_code(folder: Path, config: dict[str, Any], trusted: bool) -> None:
    if "auto_map" in config and not trusted:
        raise LayersenseError(
            f"{folder / 'config.json'}: the checkpoint comes with Python code of its own "
            "(`auto_map`); read that code, then set `trust_remote_code: true` of the model"
        )


def _sees(config: dict[str, Any]) -> bool:
    return any(key.startswith(("vision", "image", "visual")) for key in config)


def _translates(config: dict[str, Any], architecture: str) -> bool:
    """Return whether it is an encoder–decoder that reads and writes texts."""
    return bool(config.get("is_encoder_decoder")) and architecture.endswith(
        ("ForConditionalGeneration", "ForSeq2SeqLM", "WithLMHeadModel", "MTModel")
    )


def _check_task(folder: Path, config: dict[str, Any], architecture: str, task: str) -> None:
    """Refuse the common mistakes early; loading the model checks the rest."""
    if is_outside(task):
        return
    if task == "causal-lm" and _sees(config):
        raise LayersenseError(
            f"{folder}: {architecture} is a vision-language model; set `task: image-text-to-text` "
            "(and `modality: text` of the run to score it on texts alone)"
        )
    if task == "image-text-to-text" and not _sees(config):
        raise LayersenseError(f"{folder}: {architecture} reads no images; set `task: causal-lm`")
    if task not in ENDINGS:
        return
    endings = ENDINGS[task]
    found = library_task(config, architecture)
    if found != task if found else not architecture.endswith(endings):
        raise LayersenseError(
            f"{folder}: {architecture} is no model for `task: {task}` (…{endings[0]}, or one of "
            "torchvision or ultralytics); correct `task`"
            f"{f' to {found}' if found else ''}, or give another checkpoint"
        )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load, all present."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LayersenseError(
                f"{index}: is not an index of safetensors files ({error}); copy it again from the "
                "original checkpoint"
            ) from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise LayersenseError(
                    f"{index}: names {name!r}, but a file beside it was expected; copy it again "
                    "from the original checkpoint"
                )
            if not (folder / name).is_file():
                raise LayersenseError(
                    f"{folder / name}: is named in {index.name} but missing; copy it from the "
                    "original checkpoint"
                )
        return [folder / name for name in names]
    if (folder / "adapter_model.safetensors").is_file():
        raise LayersenseError(
            f"{folder}: holds an adapter alone; merge it into its base model "
            "(`merge_and_unload`) and save that"
        )
    if shards := sorted(folder.glob("*.safetensors")):
        raise LayersenseError(
            f"{folder}: holds {shards[0].name} but neither model.safetensors nor {index.name}; "
            "copy what is missing from the original checkpoint"
        )
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise LayersenseError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when they "
            "are loaded; convert them with `save_pretrained`, which writes safetensors"
        )
    raise LayersenseError(
        f"{folder}: holds no safetensors weights (pickled ones, which can run code when they are "
        "loaded, are not fetched); give a checkpoint with model.safetensors"
    )


def _count_elements(files: list[Path]) -> Counter[str]:
    """Return torch type → elements over all tensors, having checked that no file is cut short."""
    from safetensors import SafetensorError, safe_open

    counts: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:  # reads the header alone
                for key in file.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = file.get_slice(key)
                    dtype = tensor.get_dtype()
                    counts[_DTYPES.get(dtype, dtype)] += math.prod(tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise LayersenseError(
                f"{path}: is not a whole safetensors file ({error}); copy it again from the "
                "original checkpoint"
            ) from error
    if not counts.total():
        raise LayersenseError(
            f"{files[0]}: holds no weights; copy it again from the original checkpoint"
        )
    return counts
