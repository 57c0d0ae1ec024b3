"""Checkpoints are found, inspected and refused in one sentence, without torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file

from hub_server import hub
from layersense.config import CheckpointModel, DemoModel
from layersense.errors import LayersenseError
from layersense.models.checkpoints import (
    as_pickle,
    guess_task,
    peek,
    read_checkpoint,
    resolve,
    source_files,
    write_checkpoint,
)

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def llama(**keys: object) -> CheckpointModel:
    return CheckpointModel(**{"checkpoint": "owner/name", "task": "causal-lm", **keys})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as its files go: 6 + 4 elements in two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros((2, 3), np.float16)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(4, np.float32)}, folder / "model-00002-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def refusal(folder: Path, **keys: object) -> str:
    with pytest.raises(LayersenseError) as error:
        resolve("m", llama(checkpoint=str(folder), **keys))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_directory_is_described_by_its_headers(folder: Path) -> None:
    checkpoint = resolve("m", llama(checkpoint=str(folder)))
    assert checkpoint.path == checkpoint.id == str(folder)
    assert (checkpoint.revision, checkpoint.task) == (None, "causal-lm")
    assert (checkpoint.architecture, checkpoint.dtype) == ("LlamaForCausalLM", "float16")
    assert checkpoint.n_parameters == 10
    assert checkpoint.size_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert not checkpoint.trained_on_calibration


def test_the_digest_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    before = resolve("m", llama(checkpoint=str(folder))).digest
    (folder / "README.md").write_text("not part of it")
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert resolve("m", llama(checkpoint=str(copy))).digest == before
    (copy / "tokenizer.json").write_text("{ }")
    assert resolve("m", llama(checkpoint=str(copy))).digest != before
    shard = folder / "model-00001-of-00002.safetensors"
    weights = {key: value + 1 for key, value in load_file(shard).items()}
    save_file(weights, shard)
    assert resolve("m", llama(checkpoint=str(folder))).digest != before


def test_the_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("m", llama(checkpoint="~/model")).path == str(folder)


def test_the_files_whose_edit_makes_a_record_stale(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the digest, relative where the config is."""
    monkeypatch.chdir(folder.parent)

    def listed(checkpoint: str, **keys: Any) -> list[str]:
        model = CheckpointModel(checkpoint=checkpoint, task="causal-lm", **keys)
        return [str(path) for path in source_files(model)]

    (folder / "code.py").write_text("")
    (folder / "notes.md").write_text("")
    found = listed(f"./{folder.name}")
    assert f"{folder.name}/config.json" in found
    assert any(name.endswith(".safetensors") for name in found)
    assert not any(name.endswith((".py", ".md")) for name in found)
    assert f"{folder.name}/code.py" in listed(f"./{folder.name}", trust_remote_code=True)
    assert listed("./yolo.pt") == ["yolo.pt"]
    assert listed("owner/name") == []
    assert source_files(DemoModel(source="demo")) == []


def test_the_record_survives_the_disk(folder: Path, tmp_path: Path) -> None:
    checkpoint = resolve("m", llama(checkpoint=str(folder)))
    path = tmp_path / "models" / "m" / "model.json"
    write_checkpoint(path, checkpoint)
    assert read_checkpoint(path) == checkpoint
    path.write_text('{"path": 1}')
    with pytest.raises(LayersenseError, match=r"model\.json: is not a model record"):
        read_checkpoint(path)
    path.unlink()
    with pytest.raises(LayersenseError, match="there is no such file; run `snakemake"):
        read_checkpoint(path)


def test_the_demo_says_that_it_knows_the_data(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {}})
    )
    checkpoint = resolve("demo", DemoModel(source="demo"), folder)
    assert checkpoint.trained_on_calibration
    assert (checkpoint.id, checkpoint.task) == ("demo", "image-text-to-text")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert "there is no such directory" in refusal(tmp_path / "nowhere")


def test_a_directory_has_no_revision(folder: Path) -> None:
    assert "models.m.revision" in refusal(folder, revision="main")


def test_a_folder_without_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}'])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'}: " in refusal(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: is named in" in refusal(folder)


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_a_truncated_shard_is_named(folder: Path, keep: int) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert f"{shard}: is not a whole safetensors file" in refusal(folder)


def test_a_missing_or_broken_index_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert "is not an index of safetensors files" in refusal(folder)
    index.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)


def test_pickles_adapters_and_nothing_are_refused(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    assert "holds no safetensors weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert "only pickled weights (pytorch_model.bin), which can run code" in refusal(folder)
    save_file({"a": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    assert "holds an adapter alone" in refusal(folder)


def test_quantized_checkpoints_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {}}))
    assert "is quantized already" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.zeros(9, np.int8)}, folder / "model.safetensors")
    assert "most weights are I8" in refusal(folder)


def test_remote_code_needs_consent(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "x.Y"}}))
    (folder / "x.py").write_text("first = 1")
    assert "set `trust_remote_code: true`" in refusal(folder)
    trusted = llama(checkpoint=str(folder), trust_remote_code=True)
    checkpoint = resolve("m", trusted)
    assert checkpoint.trust_remote_code
    (folder / "x.py").write_text("first = 2")
    assert resolve("m", trusted).digest != checkpoint.digest


def test_a_task_that_the_architecture_cannot_do_is_refused(folder: Path) -> None:
    assert "reads no images; set `task: causal-lm`" in refusal(folder, task="image-text-to-text")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vision_config": {}}))
    assert "set `task: image-text-to-text`" in refusal(folder)


def test_a_model_of_another_task_on_images_is_refused(folder: Path) -> None:
    assert "no model for `task: object-detection`" in refusal(folder, task="object-detection")
    config = {**CONFIG, "architectures": ["resnet18"], "library_name": "torchvision"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "correct `task` to image-classification" in refusal(folder, task="object-detection")
    resolve("m", llama(checkpoint=str(folder), task="image-classification"))


def test_the_task_is_guessed() -> None:
    assert guess_task(CONFIG) == "causal-lm"
    assert guess_task({"architectures": ["GPT2LMHeadModel"]}) == "causal-lm"
    qwen = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {}}
    assert guess_task(qwen) == "image-text-to-text"
    for architecture, task in (
        ("YolosForObjectDetection", "object-detection"),
        ("ResNetForImageClassification", "image-classification"),
        ("SegformerForSemanticSegmentation", "semantic-segmentation"),
    ):
        assert guess_task({"architectures": [architecture]}) == task
    t5 = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    assert guess_task(t5) == "seq2seq-lm"
    for builder, task in (
        ("retinanet_resnet50_fpn", "object-detection"),
        ("deeplabv3_resnet50", "semantic-segmentation"),
        ("resnet18", "image-classification"),
    ):
        assert guess_task({"architectures": [builder], "library_name": "torchvision"}) == task
    for unknown in ({"architectures": ["GLPNForDepthEstimation"]}, {}):
        with pytest.raises(LayersenseError, match="write a task of your own"):
            guess_task(unknown)


def hub_error(kind: type[Exception], status: int) -> Exception:
    request = httpx.Request("GET", "https://huggingface.co/api/models/owner/name")
    return kind("several\nlines", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (hub_error(errors.GatedRepoError, 403), "is gated; accept its conditions"),
        (hub_error(errors.RepositoryNotFoundError, 404), "there is no owner/name on the hub"),
        (hub_error(errors.RepositoryNotFoundError, 401), "log in with `hf auth login`"),
        (hub_error(errors.RevisionNotFoundError, 404), "has no branch, tag or commit v1"),
        (hub_error(errors.HfHubHTTPError, 403), "status 403; log in"),
        (hub_error(errors.HfHubHTTPError, 500), "status 500; try again later"),
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (httpx.ConnectError("no route"), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_errors_become_sentences(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail(*args: object, **keys: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(LayersenseError) as raised:
        resolve("m", llama(revision="v1"))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_impossible_hub_id_is_refused_without_network() -> None:
    with pytest.raises(LayersenseError, match="neither a directory nor a hub id"):
        resolve("m", llama(checkpoint="a/b/c"))


@pytest.mark.parametrize("trusted", [False, True])
def test_only_what_matters_is_fetched_and_named_by_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    snapshot = shutil.copytree(folder, tmp_path / "snapshots" / COMMIT)
    files = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt",
        "chat_template.jinja", "pytorch_model.bin", "consolidated.00.pth", "modeling.py",
        "consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "x.pt",
    ]  # fmt: skip
    fetched: list[str] = []

    def download(repo_id: str, *, revision: str | None, **patterns: list[str]) -> str:
        fetched.extend(huggingface_hub.utils.filter_repo_objects(files, **patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = resolve("m", llama(revision="main", trust_remote_code=trusted))
    assert (checkpoint.id, checkpoint.revision) == ("owner/name", COMMIT)
    assert fetched == files[:5] + (["modeling.py"] if trusted else [])


def test_resolving_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from layersense.config import CheckpointModel as M;"
        "from layersense.models.checkpoints import resolve;"
        f"resolve('m', M(checkpoint={str(folder)!r}, task='causal-lm'));"
        "bad = {'torch', 'transformers', 'modelopt'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pickle_of_ultralytics_needs_consent(tmp_path: Path) -> None:
    pickled = tmp_path / "yolo11n.pt"
    keys = {"checkpoint": str(pickled), "task": "object-detection"}
    with pytest.raises(LayersenseError, match="there is no file"):
        as_pickle("m", CheckpointModel(**keys, trust_remote_code=True))
    pickled.write_bytes(b"anything")
    with pytest.raises(LayersenseError, match=r"pickle, which can run code .* `trust_remote_code"):
        as_pickle("m", CheckpointModel(**keys))
    assert as_pickle("m", CheckpointModel(**keys, trust_remote_code=True)) == pickled
    assert as_pickle("m", llama(checkpoint=str(tmp_path))) is None
    with pytest.raises(LayersenseError, match=r"is not on this machine yet.*--configfile c\.yaml`"):
        peek("m", CheckpointModel(**keys, trust_remote_code=True), Path("c.yaml"))


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/b", 3])
def test_an_index_names_files_beside_it_alone(folder: Path, name: object) -> None:
    other = folder.parent / "other"
    other.mkdir()
    shutil.copy(folder / "model-00001-of-00002.safetensors", other / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"{index}: names {name!r}, but a file beside it was expected" in refusal(folder)


@pytest.mark.slow
def test_jobs_that_start_together_fetch_each_file_once(folder: Path, tmp_path: Path) -> None:
    """Workflows of several people, or several nodes, with one hub cache."""
    settings = llama(checkpoint="owner/llm").model_dump_json()
    command = [sys.executable, "-m", "layersense", "model", "llm", "--settings", settings]
    asked: list[str] = []
    with hub("slow", folder, asked) as address:
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",  # which a command run by an earlier test may have set
        }
        jobs = [
            subprocess.Popen(
                [*command, "--out", str(tmp_path / f"{number}.json")],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(4)
        ]
        told = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, told
    records = {(tmp_path / f"{number}.json").read_text() for number in range(4)}
    assert len(records) == 1
    assert sorted(asked) == sorted(file.name for file in folder.iterdir())
