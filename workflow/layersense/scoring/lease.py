"""GPU lease: no two jobs of one machine ever compute on the same device.

Snakemake only counts GPUs; it never says which. A lease is a kernel lock (``flock``) on one file
for each absolute device id, held for the life of the process, so that the kernel frees it even
after SIGKILL.
"""

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from layersense.errors import LayersenseError

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0


def default_folder() -> Path:
    """Return the machine-wide folder of lock files, shared by all users of the machine."""
    return Path(tempfile.gettempdir()) / "layersense-gpus"


def visible_devices() -> list[str]:
    """Return the absolute ids (UUIDs) of the GPUs that this process may choose from.

    A given ``CUDA_VISIBLE_DEVICES`` is the set to choose from, be its entries indices, UUIDs or
    abbreviated UUIDs; without it, every GPU that the driver shows.

    Raises:
        LayersenseError: there is no NVIDIA driver or no GPU, or the variable names one that is
            not there.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        uuids = [
            pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(count)
        ]
    except pynvml.NVMLError as error:
        raise LayersenseError(
            f"no NVIDIA GPU can be used on this machine ({error}); "
            "set `device: cpu` in the run, or run it where there is one"
        ) from error
    return choose_devices(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))


def choose_devices(uuids: Sequence[str], variable: str | None) -> list[str]:
    """Return the ``uuids`` that ``CUDA_VISIBLE_DEVICES`` (``variable``) selects, in its order.

    Raises:
        LayersenseError: nothing is left, or an entry matches no GPU.
    """
    if variable is None:
        chosen = list(uuids)
    else:
        chosen = []
        for entry in filter(None, (part.strip() for part in variable.split(","))):
            if entry.isdigit() and int(entry) < len(uuids):
                chosen.append(uuids[int(entry)])
                continue
            matches = [uuid for uuid in uuids if uuid.startswith(entry)]
            # MIG instances have ids of their own, which the driver's list of GPUs does not show.
            if not matches and entry.startswith("MIG-"):
                matches = [entry]
            if len(matches) != 1:
                raise LayersenseError(
                    f"CUDA_VISIBLE_DEVICES={variable}: {entry!r} is none of the {len(uuids)} GPUs "
                    f"of this machine ({', '.join(uuids) or 'none'}); unset it or correct it"
                )
            chosen.append(matches[0])
        # Who waited for one device twice would wait for ever.
        chosen = list(dict.fromkeys(chosen))
    if not chosen:
        raise LayersenseError(
            "no GPU is left to choose from (CUDA_VISIBLE_DEVICES is empty, or the machine has "
            "none); set `device: cpu` in the run, or ask for a GPU"
        )
    return chosen


@contextmanager
def lease(
    devices: Sequence[str], folder: Path | None = None, *, count: int = 1
) -> Iterator[list[str]]:
    """Hold some of ``devices`` until the block ends or the process dies; yield their ids.

    Waits, and says so, while other processes hold them. Who needs several keeps those it has got
    while it waits for more; one process at a time does so, or two could wait for each other.

    Args:
        devices: ids to choose from.
        folder: where the lock files are; default: one for the machine.
        count: how many to hold.

    Raises:
        LayersenseError: there are fewer devices, or the lock folder cannot be written.
    """
    if count > len(devices):
        raise LayersenseError(
            f"the run asks for {count} GPUs, and this job may use {len(devices)}; lower `gpus` of "
            "the run, or give it more (`--resources gpu=N`, CUDA_VISIBLE_DEVICES, the cluster)"
        )
    folder = folder or default_folder()
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            # Like /tmp itself: everybody may lock, nobody may delete another's file.
            folder.chmod(0o1777)
    except OSError as error:
        raise _no_lock(folder, error) from error
    with ExitStack() as held:
        with ExitStack() as gathering:
            if count > 1:
                message = "another job gathers several GPUs; waiting until it has them"
                _take(["several"], 1, folder, gathering, message)
            message = f"{len(devices)} GPU(s), and too few are free; waiting for other jobs"
            taken = _take(devices, count, folder, held, message)
        yield taken


def _take(
    names: Sequence[str], count: int, folder: Path, held: ExitStack, message: str
) -> list[str]:
    """Lock ``count`` of ``names`` for as long as ``held`` is open; return them in order."""
    free = {
        name: FileLock(folder / f"{re.sub('[^A-Za-z0-9-]', '_', name)}.lock", timeout=0, mode=0o666)
        for name in names
    }
    taken: set[str] = set()
    waiting = False
    while True:
        for name in list(free):
            try:
                free[name].acquire()
            except Timeout:
                continue
            except OSError as error:
                raise _no_lock(folder, error) from error
            held.callback(free.pop(name).release)
            taken.add(name)
            if len(taken) == count:
                return [name for name in names if name in taken]
        if not waiting:
            waiting = True
            logger.info("%s", message)
        time.sleep(POLL_SECONDS)


def _no_lock(folder: Path, error: OSError) -> LayersenseError:
    return LayersenseError(
        f"{folder}: GPU lock cannot be taken ({error.strerror or error}); "
        "make the folder writable or set TMPDIR"
    )
