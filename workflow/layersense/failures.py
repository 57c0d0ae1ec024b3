"""What went wrong in a workflow, grouped by cause: for the end of a failed run and for a webhook.

Snakemake tells of every failed job in its own log; a job's own log holds the sentence. A job that
died without a word was ended from outside, and SLURM's log or its status says by what.
"""

import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^(?P<indent> *)Error in (?:rule|group) (?P<rule>\S+?):$")
_FIELD = re.compile(r"^ +(message|log|jobid): (.*)$")
_FINISHED = re.compile(r"^Finished jobid: (\d+) ")
_ERROR = re.compile(r"^error: (.*)$", re.MULTILINE)

_OUTSIDE = (
    (
        r"DUE TO TIME LIMIT|'TIMEOUT'",
        "the cluster ended it at its time limit",
        "raise `runtime` of the rule under `set-resources` of the profile",
    ),
    (
        r"exceeded memory limit|Exceeded job memory|'OUT_OF_MEMORY'|oom.?kill|Out Of Memory",
        "it took more memory than it had asked for",
        "raise `mem_mb` of the rule under `set-resources` of the profile",
    ),
    (
        r"DUE TO NODE FAILURE|'NODE_FAIL'",
        "its node failed",
        "run the same command again; if it is always the same node, tell the cluster's operators",
    ),
    (r"DUE TO PREEMPTION", "it was preempted", "run the same command again"),
    (
        r"CANCELLED",
        "it was cancelled",
        "run the same command again, when whoever cancelled it agrees",
    ),
    (
        r"sbatch failed|submission failed",
        "SLURM refused to take it",
        "correct partition, account and resources in the profile (`layersense doctor`)",
    ),
)
"""Pattern in what SLURM and its plugin say, cause, fix; the first that fits."""


@dataclass(frozen=True)
class Failure:
    """A job that failed for good."""

    job: str
    """Name of the rule, or of the job after its log: ``score/vlm.photos``."""
    cause: str
    """One sentence without its fix."""
    fix: str
    log: str | None
    """Text log of the job."""


def failures(snakemake_log: str | Path) -> list[Failure]:
    """Return the jobs that failed, by Snakemake's log: each once, by its last try.

    A job that failed and was retried with success is none of them.
    """
    try:
        lines = Path(snakemake_log).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[str, Failure] = {}
    names: dict[str, str] = {}
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if (finished := _FINISHED.match(line)) and finished[1] in names:
            found.pop(names[finished[1]], None)
        block = _BLOCK.match(line)
        if block is None:
            continue
        fields: dict[str, str] = {}
        while index < len(lines) and lines[index].startswith(block["indent"] + " "):
            if field := _FIELD.match(lines[index]):
                fields.setdefault(field[1], field[2])
            index += 1
        failure = _failure(block["rule"], fields)
        names[fields.get("jobid", "")] = failure.job
        found[failure.job] = failure
    return list(found.values())


def grouped(found: Sequence[Failure]) -> list[list[Failure]]:
    """Return the failures by cause, the most frequent first.

    Sentences that differ only in the file they begin with, in quoted words and in numbers have one
    cause.
    """
    groups: dict[str, list[Failure]] = {}
    for failure in found:
        groups.setdefault(_kind(failure.cause), []).append(failure)
    return sorted(groups.values(), key=len, reverse=True)


def report(found: Sequence[Failure]) -> str:
    """Return what the person on call reads: each cause with its fix, jobs and logs."""
    if not found:
        return ""
    jobs = f"{len(found)} job{'s' if len(found) > 1 else ''} failed"
    groups = grouped(found)
    lines = [f"{jobs}, {len(groups)} cause{'s' if len(groups) > 1 else ''}:"]
    for number, group in enumerate(groups, start=1):
        first = group[0]
        lines += ["", f"{number}. {first.cause}", f"   fix: {first.fix}"]
        lines += [f"   {failure.job}: {failure.log or 'no log'}" for failure in group[:5]]
        if len(group) > 5:
            lines.append(f"   and {len(group) - 5} more")
    return "\n".join(lines)


def post(url: str, text: str, timeout: float = 10.0) -> str | None:
    """Send ``{"text": …}`` to a webhook, as Slack, Mattermost and Teams take it.

    Returns:
        Why it did not arrive, or None. The address, which is a secret, is not part of it.
    """
    if not url.startswith(("https://", "http://")):
        return "the address does not begin with https://"
    body = json.dumps({"text": text}).encode()
    request = urllib.request.Request(  # noqa: S310 (checked above)
        url, data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        return f"it answered with status {error.code}"
    except (OSError, ValueError) as error:
        return type(error).__name__


def _failure(rule: str, fields: dict[str, str]) -> Failure:
    logs = re.sub(r" \(check log file.*", "", fields.get("log", "")).split(", ")
    own = next((log for log in logs if log and "slurm_logs" not in log), None)
    cluster = next((log for log in logs if "slurm_logs" in log), None)
    job = rule
    if own is not None and "logs/" in own:
        job = own.split("logs/", 1)[1].removesuffix(".log")
    text = _read(own)
    outside = f"{fields.get('message', '')}\n{_read(cluster)}"
    if sentences := _ERROR.findall(text):
        cause, separator, fix = sentences[-1].rpartition("; ")
        if not sentences[-1].startswith("terminated (SIGTERM)"):
            if not separator:
                cause, fix = sentences[-1], "see the log"
            return Failure(job, cause, fix, own)
    for pattern, cause, fix in _OUTSIDE:
        if re.search(pattern, outside, re.IGNORECASE):
            return Failure(job, cause, fix, own)
    if own is not None and _is_full(Path(own).parent):
        return Failure(
            job,
            "the disk is full, so that not even a log could be written",
            "free space, or move results/ to a larger disk and link it; run the same command again",
            own,
        )
    if sentences:
        return Failure(job, "it was terminated (SIGTERM)", "run the same command again", own)
    return Failure(
        job,
        "it ended without a word, as a job does that is killed (by the system when memory runs "
        "out, or by hand)",
        "look for its end in the log, see that memory suffices, and run the same command again",
        own,
    )


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 2**16
    except OSError:
        return False


def _kind(cause: str) -> str:
    kind = re.sub(r"^\S+: ", "", cause)
    kind = re.sub(r"'[^']*'|`[^`]*`|\S*/\S*", "…", kind)
    return re.sub(r"\d+", "0", kind)


def _read(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
