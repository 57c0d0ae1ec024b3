"""What a job asks of a cluster, by the size of its model and the attempt; which job goes first.

A job that asked too little is ended by the cluster and asks for a multiple when it is retried, so
these are what nearly always suffices, not what never fails. ``set-resources`` of a profile
overrides them.
"""

from errno import ENOENT
from pathlib import Path

from layersense.errors import LayersenseError
from layersense.models.checkpoints import read_checkpoint

_MEGABYTE = 1_000_000


def model_size_mb(model_file: str | Path) -> int:
    """Return the size of a checkpoint's weights in 10^6 bytes, from ``model.json``.

    A damaged record counts as nothing: the job that reads it says what is wrong with it.

    Raises:
        FileNotFoundError: it is not there yet; Snakemake asks again when it is.
    """
    if not Path(model_file).exists():
        # Snakemake knows a file that is still to be made by the error's file name.
        raise FileNotFoundError(ENOENT, "not there yet", str(model_file))
    try:
        return read_checkpoint(model_file).size_bytes // _MEGABYTE
    except LayersenseError:
        return 0


def memory_mb(size_mb: int, device: str, attempt: int = 1) -> int:
    """Return the host memory to ask for, in MB, for a job that holds one model.

    On a GPU: 12 GB for the libraries and the CUDA context, and the weights twice, which is what
    loading them takes at worst. On a CPU: 8 GB, and the weights eight times, which is weights,
    activations and the quantized outputs of a step. Both grow with the attempt.
    """
    base, copies = (12_000, 2) if device == "cuda" else (8_000, 8)
    return (base + copies * size_mb) * attempt


def minutes(size_mb: int, attempt: int = 1) -> int:
    """Return the time to ask for: an hour, and ten minutes for each GB of weights."""
    return (60 + size_mb // 100) * attempt


def priority(model_file: str | Path, checkpoint: str | None = None) -> int:
    """Return the priority of a job that holds a model: more than a CPU job's, and longest first.

    Scoring takes as long as its model is large, and a long job that starts last leaves all other
    GPUs idle at the end. Snakemake asks once, when it builds its plan: a model that is not resolved
    by then goes by the files of its directory, and one that is still to be fetched goes last.

    Args:
        model_file: ``model.json``, which may not be there yet.
        checkpoint: hub id or directory of the model, as the config says it; None for the demo's.
    """
    try:
        return 1 + model_size_mb(model_file)
    except FileNotFoundError:
        files = Path(checkpoint).expanduser().glob("*.safetensors") if checkpoint else ()
        return 1 + sum(file.stat().st_size for file in files) // _MEGABYTE
