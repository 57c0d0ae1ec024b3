"""Key-value caches in NVFP4, which ModelOpt has for CUDA alone."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("kv_cache", ["fp8", "nvfp4", "nvfp4_cast"])
def test_a_cache_is_quantized_on_a_gpu(kv_cache: str, tmp_path: Path) -> None:
    from tiny_models import CAPTIONS, resolve_folder, save_tiny_llama

    from layersense.calibration.database import Row
    from layersense.models.tasks import get_task
    from layersense.models.tasks.protocol import Sampling
    from layersense.quantization.kv_cache import QUANTIZERS
    from layersense.recipes.quant_config import make_cache
    from layersense.verification.replay import Calibration, Switchboard, enabled_quantizers

    task = get_task("causal-lm")
    checkpoint = resolve_folder(save_tiny_llama(tmp_path), "causal-lm")
    loaded = task.load(checkpoint, dtype="bfloat16", device="cuda")
    rows = [
        Row(image_path=None, caption=text, position=index) for index, text in enumerate(CAPTIONS)
    ]
    batches = task.batches(loaded, rows, Sampling(max_length=16, modality="text"), 2)
    data = Calibration(task, batches, torch.device("cuda"), torch.bfloat16)
    board = Switchboard.of(loaded.model, {"lm_head.quant_recipe": ["lm_head"]})
    names = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    cache = make_cache(kv_cache, names)
    assert cache is not None
    board.calibrate_cache(cache, data)
    batch = batches[0].to(torch.device("cuda"), torch.bfloat16)
    with torch.no_grad():
        plain = task.forward(loaded.model, batch).logits
        board.switch({}, kv_cache)
        quantized = task.forward(loaded.model, batch).logits
    assert torch.isfinite(quantized).all()
    assert not torch.equal(plain, quantized)
    found = enabled_quantizers(loaded.model)
    assert {name: set(own) for name, own in found.items()} == {
        name.rpartition(".")[0]: set(QUANTIZERS) for name in names
    }
    board.clear()
    with torch.no_grad():
        assert torch.equal(task.forward(loaded.model, batch).logits, plain)
