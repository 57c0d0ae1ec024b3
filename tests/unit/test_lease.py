"""The GPU lease: with real processes and SIGKILL, on device ids that need no GPU."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from layersense.errors import LayersenseError
from layersense.scoring.lease import choose_devices, lease

UUIDS = ["GPU-aaaa-1", "GPU-bbbb-2", "GPU-bbcc-3"]

HOLD = """
import sys, time
from pathlib import Path
from layersense.scoring import lease as module
module.POLL_SECONDS = 0.02
folder, marks, name, seconds, count, *devices = sys.argv[1:]
with module.lease(devices, Path(folder), count=int(count)) as held:
    marks = [Path(marks) / f"{device}.{name}.held" for device in held]
    for mark in marks:
        mark.touch()
    others = [
        p for mark, device in zip(marks, held)
        for p in mark.parent.glob(f"{device}.*.held") if p != mark
    ]
    print("+".join(held), len(others), flush=True)
    time.sleep(float(seconds))
    for mark in marks:
        mark.unlink()
"""


def hold(
    folder: Path, name: str, seconds: float, devices: list[str], count: int = 1
) -> subprocess.Popen[str]:
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLD,
            str(folder / "locks"),
            str(marks),
            name,
            str(seconds),
            str(count),
            *devices,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_never_hold_one_device(tmp_path: Path) -> None:
    devices = ["GPU-1", "GPU-2"]
    processes = [hold(tmp_path, str(number), 0.2, devices) for number in range(8)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert all(others == "0" for _, others in answers)
    assert set(Counter(device for device, _ in answers)) == set(devices)


def test_a_killed_process_frees_its_device(tmp_path: Path) -> None:
    first = hold(tmp_path, "first", 600, ["GPU-1"])
    assert first.stdout is not None
    assert first.stdout.readline().split() == ["GPU-1", "0"]
    second = hold(tmp_path, "second", 0, ["GPU-1"])
    time.sleep(0.3)
    assert second.poll() is None  # it waits
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert second.communicate(timeout=60)[0].startswith("GPU-1")
    assert second.returncode == 0


def test_a_lease_within_one_process_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with lease(["GPU-1"], tmp_path) as devices:
            assert devices == ["GPU-1"]


def test_several_devices_and_single_ones_never_overlap_and_none_waits_for_ever(
    tmp_path: Path,
) -> None:
    devices = ["GPU-1", "GPU-2", "GPU-3"]
    counts = [2, 1, 3, 2, 1, 3, 1, 2]
    processes = [
        hold(tmp_path, str(number), 0.1, devices, count) for number, count in enumerate(counts)
    ]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(counts)
    assert [len(held.split("+")) for held, _ in answers] == counts
    assert all(others == "0" for _, others in answers)


def test_a_killed_process_frees_all_of_its_devices(tmp_path: Path) -> None:
    first = hold(tmp_path, "first", 600, ["GPU-1", "GPU-2"], 2)
    assert first.stdout is not None
    assert first.stdout.readline().split() == ["GPU-1+GPU-2", "0"]
    second = hold(tmp_path, "second", 600, ["GPU-1", "GPU-2"], 2)
    third = hold(tmp_path, "third", 0, ["GPU-1", "GPU-2"], 2)
    time.sleep(0.3)
    assert second.poll() is None
    second.kill()  # while it gathers, or waits to
    second.wait()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert second.stdout is not None
    second.stdout.close()
    assert third.communicate(timeout=60)[0].startswith("GPU-1+GPU-2")


def test_more_devices_than_there_are(tmp_path: Path) -> None:
    with (
        pytest.raises(LayersenseError, match="asks for 3 GPUs, and this job may use 2"),
        lease(["GPU-1", "GPU-2"], tmp_path, count=3),
    ):
        pass


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(LayersenseError, match="GPU lock cannot be taken"), lease(["G"], file / "x"):
        pass


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, UUIDS),
        ("1", ["GPU-bbbb-2"]),
        ("2, 0", ["GPU-bbcc-3", "GPU-aaaa-1"]),
        ("GPU-aaaa-1", ["GPU-aaaa-1"]),
        ("GPU-bbc", ["GPU-bbcc-3"]),
        ("MIG-7", ["MIG-7"]),
        ("1,0,1", ["GPU-bbbb-2", "GPU-aaaa-1"]),
    ],
)
def test_cuda_visible_devices_is_the_set_to_choose_from(
    variable: str | None, expected: list[str]
) -> None:
    assert choose_devices(UUIDS, variable) == expected


@pytest.mark.parametrize("variable", ["", "7", "GPU-bb", "GPU-zz", "-1"])
def test_a_wrong_cuda_visible_devices_is_one_sentence(variable: str) -> None:
    with pytest.raises(LayersenseError, match="GPU"):
        choose_devices(UUIDS, variable)
