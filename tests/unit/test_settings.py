"""The slices of the config: what an edit changes, and what it must not."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersense import settings
from layersense.config import Config
from layersense.files import canonical_json
from layersense.validation import load_config

FP8, INT8, INT4 = (
    "FP8_ALL_LAYERS_CFG",
    "INT8_ALL_LAYERS_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG",
)
BASE: dict[str, Any] = {
    "datasets": {
        "d": {"source": "sample", "calibration": 90, "heldout": 10},
        "e": {"source": "sample", "seed": 1, "calibration": 90, "heldout": 10},
    },
    "models": {
        "vlm": {"source": "demo"},
        "llm": {"checkpoint": "owner/llm", "task": "causal-lm"},
    },
    "formats": {"MINE": {"base": FP8, "weight": {"block_sizes": {-1: 64, "type": "static"}}}},
    "schemes": {
        "a": {"quant_formats": [FP8, INT8], "effective_bits": 11},
        "b": {"quant_formats": ["MINE", FP8], "effective_bits": 11},
    },
    "runs": {
        "r": {"model": "vlm", "dataset": "d", "schemes": ["a", "b"]},
        "s": {"model": "llm", "dataset": "e", "schemes": ["a"]},
    },
}


def config(**changes: Any) -> Config:
    """The base config with keys such as ``runs__r__seed`` changed; None deletes."""
    data = copy.deepcopy(BASE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = data
        for key in parents:
            part = part[key]
        if value is None:
            del part[last]
        else:
            part[last] = value
    return load_config(data, "c.yaml", check_files=False)


Slices = dict[str, str]


def slices(config: Config, measured: Any = None) -> Slices:
    """What each job would be given, by name."""
    found: dict[str, Any] = {"reports": settings.report_settings(config)}
    for name in config.datasets:
        found[f"dataset {name}"] = settings.dataset_settings(config, name)
    for name in config.models:
        found[f"model {name}"] = settings.model_settings(config, name)
    for name, run in config.runs.items():
        found[f"score {name}"] = [
            settings.score_settings(config, name),
            settings.tracked_formats(config, name, (measured or {}).get(name, {})),
        ]
        for scheme in run.schemes:
            found[f"solve {name} {scheme}"] = settings.scheme_settings(config, name, scheme)
    return {name: canonical_json(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"report": {"title": "Mine"}}, {"reports"}),
        ({"frozen": True}, set()),
        ({"schemes__a__effective_bits": 10}, {"solve r a", "solve s a"}),
        ({"schemes__b__coverage_mode": "fraction"}, {"solve r b"}),
        ({"schemes__b__exclude": ["*lm_head"]}, {"solve r b"}),
        ({"schemes__b__quant_formats": [FP8, INT8, "MINE"]}, {"solve r b"}),
        ({"schemes__b__quant_formats": [INT4, FP8, "MINE"]}, {"score r", "solve r b"}),
        ({"runs__r__seed": 1}, {"score r", "solve r a", "solve r b"}),
        ({"runs__s__method": "kl_div"}, {"score s", "solve s a"}),
        ({"runs__s__batch_size": 2}, {"score s", "solve s a"}),
        ({"runs__r__heldout_samples": 5}, set()),
        ({"datasets__e__heldout": 11}, {"dataset e"}),
        ({"datasets__e__seed": 2}, {"dataset e", "score s", "solve s a"}),
        ({"models__llm__revision": "v1"}, {"model llm", "score s", "solve s a"}),
        # What a default means may be written out.
        ({"runs__r__calibration_samples": 90}, set()),
        ({"runs__r__score_samples": 90}, set()),
        ({"runs__r__modality": "image_text"}, set()),
        # What a batch cannot use changes nothing.
        ({"runs__s__prompt": "What is this?"}, set()),
        ({"extensions": "/scratch/extensions"}, set()),
        ({"runs__r__gpus": 4}, set()),
        ({"runs__s__max_pixels": 1000}, set()),
        ({"runs__r__prompt": "What is this?"}, {"score r", "solve r a", "solve r b"}),
        ({"runs__r__max_pixels": 1000}, {"score r", "solve r a", "solve r b"}),
        # An own format that changed under its name.
        ({"formats__MINE__input": {"enable": False}}, {"score r", "solve r b"}),
    ],
)
def test_an_edit_changes_these_slices_alone(changes: dict[str, Any], expected: set[str]) -> None:
    before, after = slices(config()), slices(config(**changes))
    assert {name for name in before if before[name] != after[name]} == expected


def test_a_prompt_counts_on_captions_alone_too() -> None:
    # The vision-language task keeps the user's turn when there is no image.
    sampling = settings.score_settings(config(runs__r__modality="text"), "r")["sampling"]
    assert sampling["prompt"] == "Describe the image."
    assert "max_pixels" not in sampling


def test_scores_default_to_128_rows_or_all() -> None:
    def scored(rows: int) -> int:
        found = settings.score_settings(config(datasets__d__calibration=rows), "r")["sampling"]
        return int(found["score_samples"])

    assert [scored(rows) for rows in (90, 128, 129)] == [90, 128, 128]


def test_an_alias_goes_by_the_name_of_its_format() -> None:
    changed = config(schemes__a__quant_formats=["NVFP4_MLP_ONLY_ALL_LAYERS_CFG"])
    (name,) = settings.scheme_settings(changed, "s", "a")["quant_formats"]
    assert name in settings.run_formats(changed, "s")
    assert "MLP_ONLY" not in name


def test_slices_survive_json() -> None:
    found = config()
    for value in (
        settings.score_settings(found, "r"),
        settings.scheme_settings(found, "r", "b"),
        settings.run_formats(found, "r"),
    ):
        assert json.loads(canonical_json(value)) == value


# --- what is held already ---


def held(found: Config, run: str = "r") -> dict[str, dict[str, Any]]:
    """What `measured.json` holds after the run was measured as `found` says."""
    score = settings.score_settings(found, run)
    formats = settings.tracked_formats(found, run, {})
    return {name: settings.measured_entry(score, entry) for name, entry in formats.items()}


Edit = Callable[[], Config]


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (lambda: config(runs__r__schemes=["a"]), True),
        (lambda: config(runs__r__schemes=["b"]), True),
        # The own format leaves the config altogether.
        (lambda: config(runs__r__schemes=["a"], schemes__b=None, formats__MINE=None), True),
        # It stays, unwanted, and means something else.
        (lambda: config(runs__r__schemes=["a"], formats__MINE__weight={}), False),
    ],
)
def test_removing_a_format_changes_no_parameter_of_the_scoring_rule(edit: Edit, same: bool) -> None:
    measured = held(config())
    before = settings.tracked_formats(config(), "r", measured)
    after = settings.tracked_formats(edit(), "r", measured)
    assert (canonical_json(before) == canonical_json(after)) is same
    assert set(before) == {FP8, INT8, "MINE"}


def test_a_changed_seed_drops_what_is_held_and_not_wanted() -> None:
    measured = held(config())
    changed = config(runs__r__seed=1, runs__r__schemes=["a"])
    assert set(settings.tracked_formats(changed, "r", measured)) == {FP8, INT8}


def test_what_is_wanted_is_wanted_as_the_config_says_it() -> None:
    changed = config(formats__MINE__input={"enable": False})
    tracked = settings.tracked_formats(changed, "r", held(config()))
    assert tracked["MINE"]["input"] == []


def test_a_new_format_joins_those_that_are_held() -> None:
    changed = config(schemes__b__quant_formats=[INT4])
    tracked = settings.tracked_formats(changed, "r", held(config()))
    assert set(tracked) == {FP8, INT8, INT4, "MINE"}


def test_measured_files_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "r/measured.json"
    score, formats = settings.score_settings(config(), "r"), settings.run_formats(config(), "r")
    settings.write_measured(file, score, formats)
    assert settings.read_measured(file) == held(config())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"FP8": 3}', b'{"FP8": {"settings": 1, "format": {}}}', b"\xff", b"null"],
)
def test_a_broken_measured_file_holds_nothing(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "measured.json"
    file.write_bytes(content)
    assert settings.read_measured(file) == {}


def test_a_missing_measured_file_holds_nothing(tmp_path: Path) -> None:
    assert settings.read_measured(tmp_path / "measured.json") == {}


def test_an_edit_of_a_task_of_ones_own_measures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = config(
        models__llm__task="mine:Task",
        runs__r__model="llm",
        runs__r__modality="text",
        runs__s__modality="text",
    )
    digests = []
    for text in ("x = 1\n", "x = 2\n"):
        Path("mine.py").write_text(text)
        digests.append(settings.score_settings(own, "r")["task_digest"])
    assert len(set(digests)) == 2
    Path("mine.py").unlink()
    assert settings.score_settings(own, "r")["task_digest"] == ""
    assert "task_digest" not in settings.score_settings(config(), "r")


def test_images_are_as_many_as_there_are() -> None:
    detector = config(models__llm__task="object-detection", runs__r__model="llm")
    sampling = settings.score_settings(detector, "r")["sampling"]
    assert (sampling["calibration_samples"], sampling["score_samples"]) == (None, 128)
    assert "prompt" not in sampling
    some = config(
        models__llm__task="object-detection",
        runs__r__model="llm",
        runs__r__calibration_samples=9,
        runs__r__score_samples=5,
    )
    sampling = settings.score_settings(some, "r")["sampling"]
    assert (sampling["calibration_samples"], sampling["score_samples"]) == (9, 5)


def test_a_run_needs_the_extensions_of_all_formats_that_it_tracks() -> None:
    assert settings.run_extensions(config(), "r", {}) == ["int", "fp8"]
    before = config(schemes__a__quant_formats=[FP8, "MXFP8_ALL_LAYERS_CFG"])
    held = {
        name: settings.measured_entry(settings.score_settings(before, "s"), format)
        for name, format in settings.run_formats(before, "s").items()
    }
    # A format that was measured and is not wanted any more stays, and so does what it needs.
    assert settings.run_extensions(config(), "s", held) == ["int", "fp8", "mx"]
