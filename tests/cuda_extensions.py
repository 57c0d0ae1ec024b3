"""ModelOpt's CUDA extensions, all of them at once: what GPU tests and benchmarks do first."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from layersense.quantization.extensions import EXTENSIONS, Built, cache_folder, read_built


def build_all() -> dict[str, Built]:
    """Build all that is not there yet, side by side; return extension → what came of it.

    One after another they take four minutes on a fresh machine, together as long as the longest. A
    failure is in what is returned, and stops nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = {name: Path(folder) / f"{name}.json" for name in EXTENSIONS}
        command = [sys.executable, "-m", "layersense", "extension"]
        # `nvfp4` is `mx` under another name, or nothing: its process waits for the other's lock.
        started = {
            name: subprocess.Popen(
                [*command, name, "--out", str(record), "--cache", str(cache_folder())],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for name, record in records.items()
        }
        for process in started.values():
            process.wait()
        return {name: read_built(record) for name, record in records.items() if record.exists()}


def use_all() -> dict[str, Built]:
    """Build all that is not there yet, and let ModelOpt find them in this process."""
    from layersense.quantization.build import use

    build_all()
    return use(EXTENSIONS, cache_folder())
