"""Progress: a bar on a terminal, lines in a log, both with rate, rest and memory."""

from __future__ import annotations

import re
import sys

import pytest

torch = pytest.importorskip("torch")

from layersense.scoring.progress import Progress  # noqa: E402


def test_a_log_gets_a_line_after_two_steps_and_after_the_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress = Progress("score 3 format(s)", total=4, unit="batch", device=torch.device("cpu"))
    with caplog.at_level("INFO"):
        for _ in range(4):
            progress.step()
    progress.close()
    second, last = (record.getMessage() for record in caplog.records)
    form = r"score 3 format\(s\): {} of 4, \d+\.\d\d s/batch, {} left, \d+\.\d GiB"
    assert re.fullmatch(form.format(2, r"\d+ s"), second)
    assert re.fullmatch(form.format(4, "0 s"), last)


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("score 3 format(s)", total=2, unit="batch", device=torch.device("cpu"))
    progress.step()
    progress.step()
    progress.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"score 3 format\(s\): 2/2 .*s/batch, 00:00 left, \d+\.\d GiB", shown)
