"""`snakemake export`: a target of its own, of those schemes that a run lists."""

import pytest

from conftest import Project

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

FILE = "results/llm.words/fp8/checkpoint"


def test_a_checkpoint_is_written_and_follows_its_recipe(study: Project) -> None:
    refused = study.run("export", check=False)
    assert refused.returncode
    assert "list schemes under `export` of a run" in refused.output

    study.edit(lambda config: config["runs"]["llm.words"].update(export=["fp8"]))
    assert study.run().jobs == set()
    outcome = study.run("export")
    assert outcome.jobs == {"checkpoint/llm.words/fp8"}
    exported = study.json("llm.words/fp8/checkpoint.json")
    assert exported["quant_algo"] == "FP8"
    assert exported["checked"]["problems"] == exported["checked"]["vllm"] == []
    assert (study.root / FILE / "model.safetensors").exists()
    assert study.run("export").jobs == set()

    study.edit(lambda config: config["schemes"]["fp8"].update(effective_bits=13.0))
    outcome = study.run("export")
    assert outcome.jobs == {"solve/llm.words/fp8", "checkpoint/llm.words/fp8"}
    again = study.json("llm.words/fp8/checkpoint.json")
    assert again["effective_bits"] > exported["effective_bits"]
    assert len(again["expected"]["quantized"]) < len(exported["expected"]["quantized"])
