"""Profiles: every rule has its place on a cluster, and what a job asks grows as it should."""

import re
from pathlib import Path

import pytest
import yaml

from layersense import job_resources
from layersense.models.checkpoints import Checkpoint, write_checkpoint

TARGETS = {"all", "reports", "tables", "scores"}


def rules(repository: Path) -> dict[str, str]:
    """Return rule → its text."""
    text = "".join(file.read_text() for file in (repository / "workflow/rules").glob("*.smk"))
    blocks = re.split(r"^rule (\w+):\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(blocks[::2], blocks[1::2], strict=True))


@pytest.fixture(scope="module")
def profile(repository: Path) -> dict[str, object]:
    content: dict[str, object] = yaml.safe_load(
        (repository / "profiles/slurm/config.yaml").read_text()
    )
    return content


def test_each_rule_is_local_or_grouped_or_a_job_that_asks(
    repository: Path, profile: dict[str, list[str]]
) -> None:
    grouped = {entry.split("=")[0] for entry in profile["groups"]}
    found = rules(repository)
    assert grouped <= set(found), "the profile groups rules that are not there"
    for name, text in found.items():
        local, asks = "localrule: True" in text, "runtime=" in text
        # The database is drawn from COCO's whole listing: a job, which the defaults suffice.
        assert local + asks + (name in grouped) + (name == "dataset") == 1, (
            f"rule {name}: make it local, give it resources, or group it in profiles/slurm"
        )


def test_small_jobs_never_ask_for_a_gpu(repository: Path) -> None:
    for name, text in rules(repository).items():
        if "gpu=" in text:
            assert "runtime=" in text, name
            assert 'environment("cuda"' in text, name


def test_the_profiles_set_different_keys(repository: Path, profile: dict[str, object]) -> None:
    """Merging profiles replaces whole keys, so one of the two would be lost."""
    default = yaml.safe_load((repository / "profiles/default/config.yaml").read_text())
    assert not set(default) & set(profile)


def test_memory_and_time_grow_with_the_model_and_the_attempt() -> None:
    assert job_resources.memory_mb(7_500, "cuda") == 12_000 + 15_000
    assert job_resources.memory_mb(7_500, "cuda", attempt=3) == 81_000
    assert job_resources.memory_mb(10, "cpu") == 8_080
    assert job_resources.minutes(7_500) == 135
    assert job_resources.minutes(7_500, attempt=2) == 270


def test_the_size_of_a_model_is_unknown_until_it_is_resolved(tmp_path: Path) -> None:
    record = tmp_path / "model.json"
    with pytest.raises(FileNotFoundError):
        job_resources.model_size_mb(record)
    record.write_text("{")
    assert job_resources.model_size_mb(record) == 0
    fields = dict.fromkeys(("path", "id", "digest", "task", "architecture", "dtype"), "x")
    checkpoint = Checkpoint(
        **fields,
        revision=None,
        n_parameters=1,
        trust_remote_code=False,
        size_bytes=7_512_345_678,
    )
    write_checkpoint(record, checkpoint)
    assert job_resources.model_size_mb(record) == 7_512
    assert job_resources.priority(record, "owner/name") == 1 + 7_512


def test_a_model_that_is_not_resolved_goes_by_its_files(tmp_path: Path) -> None:
    for name, megabytes in (("model-1.safetensors", 3), ("model-2.safetensors", 4)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(megabytes * 10**6)
    record = tmp_path / "model.json"
    assert job_resources.priority(record, str(tmp_path)) == 1 + 7
    assert job_resources.priority(record, "owner/name") == 1
    assert job_resources.priority(record) == 1
