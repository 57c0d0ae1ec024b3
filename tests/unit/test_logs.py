"""Structured logs: what a night shift reads by machine."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from layersense.logs import JobLog

NAME = b"\xff.jpg"
"""A file name that is no UTF-8, as a disk may hold."""
SCRIPT = """
import logging, sys, time
from layersense import cli
from layersense.errors import LayersenseError

@cli.app.command()
def probe(how: str) -> None:
    logger = logging.getLogger("layersense.probe")
    logger.info("loaded", extra={"phase": "load", "phase_seconds": 1.5})
    if how == "known":
        raise LayersenseError("a.json: is empty; delete it")
    if how == "unknown":
        raise KeyError("x")
    if how == "wait":
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned", flush=True)
    if how == "hub":
        from huggingface_hub.utils import logging as theirs
        theirs.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s")
    if how == "hungry":
        block = b'x' * (200 * 2**20)
        logger.info("allocated")

cli.main()
"""


def call(how: str, log: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "LAYERSENSE_LOG"}
    environment |= {"CUDA_VISIBLE_DEVICES": "3", "HF_TOKEN": "hf_planted", "SLURM_JOB_ID": "17"}
    if log is not None:
        environment["LAYERSENSE_LOG"] = str(log)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, "probe", how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_the_hub_library_says_is_said_once(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    assert call("hub", log).stderr.count("Retrying in 1s") == 1
    assert [line["message"] for line in lines(log) if line["event"] == "message"] == [
        "Retrying in 1s"
    ]


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]


def test_a_job_writes_start_phases_and_end(tmp_path: Path) -> None:
    log = tmp_path / "results/logs/score/vlm.photos.log"
    done = call("well", log)
    assert done.returncode == 0
    assert "loaded" in done.stderr  # the text log
    start, phase, end = lines(log)
    assert {line["job"] for line in (start, phase, end)} == {"score/vlm.photos"}
    assert start["event"] == "start"
    assert (start["cuda_visible_devices"], start["slurm_job_id"]) == ("3", "17")
    assert phase["event"] == "phase"
    assert (phase["phase"], phase["phase_seconds"], phase["message"]) == ("load", 1.5, "loaded")
    assert (end["event"], end["ok"]) == ("end", True)
    assert 0 <= start["seconds"] <= phase["seconds"] <= end["seconds"]


def test_memory_is_the_peak_of_the_process(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    call("hungry", log)
    before, after = (line for line in lines(log) if line["event"] in ("phase", "message"))
    assert before["memory_mb"] < 150 <= 200 <= after["memory_mb"] < 400


def test_a_failure_ends_with_its_sentence(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    done = call("known", log)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: a.json: is empty; delete it"
    end = lines(log)[-1]
    assert (end["ok"], end["error"]) == (False, "a.json: is empty; delete it")


def test_an_unknown_failure_ends_with_a_sentence_too(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert call("unknown", log).returncode == 1
    assert lines(log)[-1]["error"].startswith("layersense probe: KeyError: 'x'")


def test_no_environment_reaches_the_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    call("unknown", log)
    assert "hf_planted" not in log.with_suffix(".jsonl").read_text()


def test_without_a_log_nothing_is_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layersense", "--help"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_costs_no_job(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    done = call("well", tmp_path / "a.log")
    assert done.returncode == 0
    assert "no structured log" in done.stderr


def test_what_cannot_be_written_as_a_line_stops_no_job(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "a.jsonl", "probe")
    logger = logging.Logger("of some library")
    logger.addHandler(log)
    logger.info("%d", "no number")
    logger.info("opened %s", os.fsdecode(NAME))
    log.end(f"{os.fsdecode(NAME)}: the image is damaged")
    log.close()
    events = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["message", "end"]


def test_sigterm_unwinds_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "probe", "wait"],
        env={**os.environ, "LAYERSENSE_LOG": str(log)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert out == "cleaned\n"
    assert "error: terminated (SIGTERM)" in err
    assert lines(log)[-1]["error"].startswith("terminated (SIGTERM)")
