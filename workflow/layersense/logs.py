"""The log of a job: lines for people on stderr, and the same as JSON lines beside the text log.

The workflow names a job's text log in ``LAYERSENSE_LOG`` and sends stderr there; the JSON lines go
to the same path with the suffix ``.jsonl``. A job writes one ``start``, a ``message`` or ``phase``
for each thing that it says, and one ``end``; a file without an ``end`` belongs to a job that runs
or was killed. No line holds the command, the environment or the config, which may hold secrets.
"""

import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

VARIABLE = "LAYERSENSE_LOG"
_SLURM = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME")
_EXTRA = ("phase", "formats", "phase_seconds", "phase_memory_mb")
"""Attributes of a log record that go into its JSON line: ``logger.info(…, extra={…})``."""


class Terminated(BaseException):
    """SIGTERM: a cluster preempts the job or ends it at its time limit, and kills it soon."""


class JobLog(logging.Handler):
    """Writes JSON lines; without a file it writes nothing.

    Args:
        file: where the lines go, or None.
        job: what the lines belong to, such as ``score/vlm.photos``.
    """

    def __init__(self, file: Path | None, job: str) -> None:
        super().__init__()
        self.job = job
        self._started = time.monotonic()
        self._file = None
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                # A file's name may be no text.
                self._file = file.open("w", encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                # A job that could work is not given up for its log.
                sys.stderr.write(f"{file}: no structured log ({error.strerror or error})\n")

    def start(self) -> None:
        """Say where the job runs and which devices it was given."""
        given = {name.lower(): os.environ[name] for name in _SLURM if name in os.environ}
        self._write(
            "start",
            host=socket.gethostname(),
            pid=os.getpid(),
            cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            **given,
        )

    def end(self, error: str | None = None) -> None:
        """Say how it ended: well, or by which sentence."""
        if error is None:
            self._write("end", ok=True)
        else:
            self._write("end", ok=False, error=error)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line for a record of the ``logging`` module."""
        try:
            extra = {name: getattr(record, name) for name in _EXTRA if hasattr(record, name)}
            self._write(
                "phase" if "phase" in extra else "message",
                level=record.levelname.lower(),
                message=record.getMessage(),
                **extra,
            )
        except Exception:  # such as a library's message that does not fit its arguments
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _write(self, event: str, **values: Any) -> None:
        if self._file is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "job": self.job,
            "seconds": round(time.monotonic() - self._started, 3),
            "memory_mb": _peak_memory_mb(),
            **values,
        }
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:  # such as a full disk: what the job itself writes tells of it
            sys.stderr.write(f"no structured log any more ({error.strerror or error})\n")
            self._file = None


def open_job_log() -> JobLog:
    """Set up logging for this process: text on stderr and, in a job, JSON lines beside its log."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    # It prints its lines by a handler of its own, and hands them on.
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.name.startswith("huggingface_hub"))
    # Addresses of downloads are signed: who reads the log could download too.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    text_log = os.environ.pop(VARIABLE, None)  # not inherited: it is this process's own
    path = Path(text_log) if text_log else None
    log = JobLog(path.with_suffix(".jsonl") if path else None, _job_name(path) if path else "")
    logging.getLogger().addHandler(log)
    return log


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the process, so that temporary files go and locks and leases are freed."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def _job_name(log: Path) -> str:
    """Return a job's name from its log: ``results/logs/score/a.log`` is ``score/a``."""
    parts = log.with_suffix("").parts
    return "/".join(parts[parts.index("logs") + 1 :] if "logs" in parts else parts[-1:])


def _peak_memory_mb() -> int:
    try:
        # Of this program alone; getrusage counts what its parent held when it was started.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 2**20 if sys.platform == "darwin" else peak // 1024
