"""Failures by cause, from what Snakemake and its jobs wrote."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from layersense.failures import Failure, failures, grouped, post, report

BLOCK = """\
[Tue Nov 24 20:19:05 2026]
Error in rule {rule}:
    message: {message}
    jobid: {jobid}
    output: results/x
    log: {log} (check log file(s) for error details)
    shell:
        LAYERSENSE_LOG={log} python -m layersense score
        (command exited with non-zero exit code)
    external_jobid: 2
Logfile {log}:
"""


def block(folder: Path, job: str, text: str, *, jobid: int = 1, message: str = "None") -> str:
    """Return what Snakemake says of a failed job whose log holds ``text``."""
    log = folder / "logs" / f"{job}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text)
    return BLOCK.format(rule=job.split("/")[0], jobid=jobid, log=log, message=message)


def read(folder: Path, *blocks: str) -> list[Failure]:
    file = folder / "snakemake.log"
    file.write_text("Building DAG of jobs...\n" + "\n".join(blocks))
    return failures(file)


def test_the_sentence_is_divided_into_cause_and_fix(tmp_path: Path) -> None:
    text = "12:00:00 to measure\nerror: results/a.json: is damaged (cut; short); delete it\n"
    (failure,) = read(tmp_path, block(tmp_path, "score/vlm", text))
    assert failure.job == "score/vlm"
    assert failure.cause == "results/a.json: is damaged (cut; short)"
    assert failure.fix == "delete it"
    assert failure.log == str(tmp_path / "logs/score/vlm.log")


def test_one_cause_in_many_jobs_is_one_group(tmp_path: Path) -> None:
    full = "error: results/{}/scores.json: cannot be written (No space left); free disk space\n"
    blocks = [block(tmp_path, f"score/run{n}", full.format(f"run{n}"), jobid=n) for n in range(7)]
    blocks.append(block(tmp_path, "score/other", "error: out of memory; use less\n", jobid=9))
    found = read(tmp_path, *blocks)
    groups = grouped(found)
    assert [len(group) for group in groups] == [7, 1]
    text = report(found)
    assert text.startswith("8 jobs failed, 2 causes:")
    assert text.count("free disk space") == 1
    assert "and 2 more" in text


def test_a_retry_that_succeeded_is_no_failure(tmp_path: Path) -> None:
    blocks = [
        block(tmp_path, "score/a", "error: x; y\n", jobid=3),
        "Finished jobid: 3 (Rule: score)\n",
        block(tmp_path, "score/b", "error: x; y\n", jobid=30),
    ]
    assert [failure.job for failure in read(tmp_path, *blocks)] == ["score/b"]


def test_what_the_cluster_did_is_said(tmp_path: Path) -> None:
    for message, expected in (
        ("SLURM-job '7' failed, SLURM status is: 'TIMEOUT'.", "time limit"),
        ("SLURM-job '7' failed, SLURM status is: 'OUT_OF_MEMORY'.", "memory"),
        ("SLURM-job '7' failed, SLURM status is: 'NODE_FAIL'.", "node"),
        ("SLURM-job '7' failed, SLURM status is: 'CANCELLED'.", "cancelled"),
        ("SLURM sbatch failed. The error message was 'no partition'", "refused"),
    ):
        text = "12:00:00 to measure\nerror: terminated (SIGTERM): something; again\n"
        (failure,) = read(tmp_path, block(tmp_path, "score/vlm", text, message=message))
        assert expected in failure.cause, message
        assert failure.fix


def test_a_job_without_a_word_was_killed(tmp_path: Path) -> None:
    (failure,) = read(tmp_path, block(tmp_path, "score/vlm", "12:00:00 to measure\n"))
    assert "without a word" in failure.cause


def test_a_log_that_is_gone_is_no_failure(tmp_path: Path) -> None:
    assert failures(tmp_path / "nothing") == []
    assert report([]) == ""


def test_a_webhook_gets_the_text_and_its_address_stays_secret() -> None:
    got: list[bytes] = []

    class Receiver(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if self.path == "/good" else 403)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert post(f"{address}/good", "two jobs\nfailed") is None
        assert json.loads(got[0]) == {"text": "two jobs\nfailed"}
        problem = post(f"{address}/secret-token", "x")
        assert problem == "it answered with status 403"
    finally:
        server.shutdown()
        server.server_close()
    problem = post(f"{address}/secret-token", "x", timeout=2)
    assert problem
    assert "secret-token" not in problem
    assert post("file:///etc/passwd", "x") == "the address does not begin with https://"
