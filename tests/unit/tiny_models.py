"""Tiny random checkpoints, saved like real ones, and rows for them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layersense.config import CheckpointModel
from layersense.models.checkpoints import Checkpoint, resolve
from layersense.models.demo import make_model, make_processor

CAPTIONS = (
    "A red bus stands before a house.",
    "Two dogs run.",
    "A woman in a green coat cuts a cake on a table while three children watch her.",
    "An empty beach at night",
    "A cat.",
)


def save_images(folder: Path, sizes: tuple[tuple[int, int], ...]) -> list[Path]:
    """Save one photograph of noise for each (width, height)."""
    noise = np.random.default_rng(0)
    paths = []
    for index, (width, height) in enumerate(sizes):
        path = folder / f"{index}.jpg"
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def save_tiny_qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Save a Qwen2.5-VL of random weights."""
    torch.manual_seed(seed)
    processor = make_processor(CAPTIONS)
    make_model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_tiny_llama(
    folder: Path, *, tied: bool = False, bos: bool = False, seed: int = 0, shard: str = "5GB"
) -> Path:
    """Save a Llama of random weights with 2 blocks and 64 positions."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    fast.save_pretrained(folder)
    return folder


def resolve_folder(folder: Path, task: str) -> Checkpoint:
    """Resolve a directory as a config would."""
    return resolve("tiny", CheckpointModel(checkpoint=str(folder), task=task))


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
