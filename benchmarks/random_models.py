"""Models of real shapes with random weights: what they cost is real, what they say is not."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from layersense.models.demo import make_processor

SEED = 0
CAPTIONS = ["A man rides a horse on the beach.", "Two dogs play with a red ball."]


@dataclass(frozen=True)
class Tower:
    """The sizes of Qwen2.5-VL's vision tower."""

    depth: int
    hidden: int
    intermediate: int
    heads: int
    whole: tuple[int, ...]
    """Blocks that attend to the whole image, not within windows."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a published model, or of one that is small enough for a CPU."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    vision: Tower | None = None
    llama: bool = False


TOWER = Tower(32, 1280, 3420, 16, (7, 15, 23, 31))
SHAPES = {
    "tiny": Shape(1024, 256, 512, 2, 2, 1, tied=True, vision=Tower(2, 64, 128, 4, (1,))),
    "tiny-text": Shape(1024, 256, 512, 2, 2, 1, tied=False, llama=True),
    "qwen2.5-0.5b": Shape(151936, 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-vl-3b": Shape(151936, 2048, 11008, 36, 16, 2, tied=True, vision=TOWER),
    "qwen2.5-vl-7b": Shape(152064, 3584, 18944, 28, 28, 4, tied=False, vision=TOWER),
    "llama-3-8b": Shape(128256, 4096, 14336, 32, 32, 8, tied=False, llama=True),
}


def make_model(name: str, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Return a model in eval mode, in bfloat16, and its processor or tokenizer.

    It is made on ``device``, or on the GPU where there is one. The tokenizer is a small one.
    """
    processor = make_processor(CAPTIONS)
    tokenizer = processor.tokenizer
    shape = SHAPES[name]
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "bos_token_id": _ident(tokenizer, "<|endoftext|>"),
        "eos_token_id": _ident(tokenizer, "<|im_end|>"),
        "pad_token_id": _ident(tokenizer, "<|endoftext|>"),
    }
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")):
            model: PreTrainedModel
            if shape.vision:
                config = _vision_language(sizes, tokenizer, shape, shape.vision)
                model = Qwen2_5_VLForConditionalGeneration(config)
            elif shape.llama:
                model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=shape.tied))
            else:
                model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=shape.tied))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval(), processor if shape.vision else tokenizer


def _vision_language(
    sizes: dict[str, Any], tokenizer: Any, shape: Shape, tower: Tower
) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={**sizes, "rope_parameters": rope},
        vision_config={
            "depth": tower.depth,
            "hidden_size": tower.hidden,
            "intermediate_size": tower.intermediate,
            "num_heads": tower.heads,
            "out_hidden_size": shape.hidden,
            "window_size": 112,
            "fullatt_block_indexes": list(tower.whole),
        },
        image_token_id=_ident(tokenizer, "<|image_pad|>"),
        video_token_id=_ident(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_ident(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_ident(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=shape.tied,
    )


def _ident(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))
