"""`layersense apply` in a fresh process, against the manifest and ModelOpt's own search."""

import json
import subprocess
import sys

import pytest

from conftest import Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_a_recipe_is_applied_as_the_search_would_have(
    study: Project, repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "tests" / "unit"))
    import modelopt.torch.opt as mto
    import torch
    from searched import search

    from layersense.models.checkpoints import read_checkpoint
    from layersense.models.tasks import get_task
    from layersense.recipes.quant_config import read_quant_config
    from layersense.verification.replay import (
        check_applied,
        enabled_quantizers,
        load_calibration,
        sampling_of,
    )

    def change(config):
        config["schemes"]["mixed"]["quant_formats"] = [
            "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG",
            "FP8_ALL_LAYERS_CFG",
        ]
        config["schemes"]["mixed"]["effective_bits"] = 8.5

    study.edit(change)
    study.run("results/vlm.photos/mixed/quant_config.json")
    file = study.results / "vlm.photos/mixed/quant_config.json"
    process = subprocess.run(
        [sys.executable, "-m", "layersense", "apply", file, "--out", "applied.pth"],
        cwd=study.root,
        env=study.environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "all as the recipe says, saved as applied.pth" in process.stdout

    manifest = study.json("vlm.photos/mixed/manifest.json")
    chosen = {
        name: layer["format"] for name, layer in manifest["layers"].items() if layer["quantized"]
    }
    assert len(set(chosen.values())) == 2
    config = read_quant_config(file)
    monkeypatch.chdir(study.root)
    checkpoint = read_checkpoint("results/models/vlm/model.json")
    loaded, data = load_calibration(config, checkpoint, study.results / "calibration/photos.sqlite")
    restored = mto.restore(loaded.model, study.root / "applied.pth")
    check_applied(restored, config)
    found = enabled_quantizers(restored)
    assert {name: len(quantizers) for name, quantizers in found.items()} == {
        name: 2 if format.startswith("FP8") else 1 for name, format in chosen.items()
    }

    task = get_task(checkpoint.task)
    searched, again = load_calibration(
        config, checkpoint, study.results / "calibration/photos.sqlite"
    )
    recipe = {
        handle: group["selected"].split("(")[0]
        for handle, group in manifest["layer_sensitivity"].items()
    }
    search(searched.model, again, recipe)
    assert sampling_of(config.settings).max_length == 64
    with torch.no_grad():
        for batch in data.batches:
            ours = task.forward(restored, batch).logits
            theirs = task.forward(searched.model, batch).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_config_names_what_it_needs(study: Project) -> None:
    file = study.results / "llm.words/fp8/quant_config.json"
    content = json.loads(file.read_text())
    assert content["parts"][0]["config"]["quant_cfg"][0] == {"quantizer_name": "*", "enable": False}
    content["model_digest"] = "0" * 64
    other = study.results / "llm.words/fp8/other.json"
    other.write_text(json.dumps(content))
    process = subprocess.run(
        [sys.executable, "-m", "layersense", "apply", other],
        cwd=study.root,
        env=study.environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert "is not the checkpoint that the recipe was made for" in process.stderr.splitlines()[0]
