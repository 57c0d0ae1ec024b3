"""Make a Qwen2.5-VL checkpoint of the real 3 B shape with random weights.

    python benchmarks/make_random_qwen2_5_vl.py OUT

Sensitivities of random weights mean nothing; seconds and memory are those of the real model.
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from layersense.models.demo import make_processor

SEED = 0
CAPTIONS = ["A man rides a horse on the beach.", "Two dogs play with a red ball."]


def make_config(tokenizer: object) -> Qwen2_5_VLConfig:
    """Return the configuration of Qwen2.5-VL-3B-Instruct with another tokenizer's special ids."""

    def ident(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[attr-defined]

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
            "bos_token_id": ident("<|endoftext|>"),
            "eos_token_id": ident("<|im_end|>"),
            "pad_token_id": ident("<|endoftext|>"),
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        image_token_id=ident("<|image_pad|>"),
        video_token_id=ident("<|video_pad|>"),
        vision_start_token_id=ident("<|vision_start|>"),
        vision_end_token_id=ident("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def main() -> None:
    """Write the checkpoint."""
    out = Path(sys.argv[1])
    processor = make_processor(CAPTIONS)
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(make_config(processor.tokenizer))
    model.save_pretrained(out)
    processor.save_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{out}: {count / 1e9:.2f} B parameters\n")


if __name__ == "__main__":
    main()
