"""The comparison of the engines: what a profile says, and that a second call goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")


@pytest.fixture
def engines(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import scoring_engines

    monkeypatch.setattr(scoring_engines, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(scoring_engines, "BATCHES", 2)
    return scoring_engines


def test_a_profile_tells_running_from_waiting(engines: Any) -> None:
    spans = [  # microseconds: 40 of 60 before the mark, 30 of 40 after it
        (0.0, 20.0, "void at::native::add<float>(int)"),
        (10.0, 30.0, "gemm"),  # beside the first
        (50.0, 60.0, "void at::native::add<half>(int)"),
        (60.0, 60.0, "spin_kernel(long)"),
        (70.0, 100.0, "gemm"),
    ]
    found = engines.timeline(spans, seconds=200e-6)
    assert found["busy"] == 0.35
    assert found["forward_busy"] == pytest.approx(40 / 60, abs=1e-3)
    assert found["backward_busy"] == 0.75
    assert found["kernels"] == 5
    assert found["median_us"] == 20
    assert found["waited_for_ms"]["gemm"] == 0.0  # 10 µs
    assert next(iter(found["longest_ms"])) == "gemm"
    assert next(iter(found["waited_for_ms"])) == "add<half>"


def test_a_call_goes_on_where_another_ended(
    engines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    ask = ["--rows", str(file), "--shape", "tiny-text", "--formats", "1", "--parts", "steps"]
    engines.main(ask)
    lines = file.read_text().splitlines()
    assert len(lines) == 4  # what comes before; none, one format; one with checkpointing
    engines.main(ask)
    assert file.read_text().splitlines() == lines
    # A process that was killed leaves a part of a line.
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    engines.main(ask)
    rows = engines.Rows(file, "CPU").rows
    assert [(row["part"], row["formats"], row["checkpointing"]) for row in rows] == [
        ("prepare", 1, False),
        ("steps", 0, False),
        ("steps", 1, False),
        ("steps", 1, True),
    ]
    capsys.readouterr()
    engines.main([*ask, "--table"])
    shown = capsys.readouterr().out
    assert shown.count("| fused |") == 2
    assert shown.count("| fused, checkpointing |") == 1
