"""What the tasks that predict the next token share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.loading import load_model, load_tokenizer
from layersense.models.tasks.protocol import IGNORED, Batch, Loaded, Sampling

NEEDED = {
    "eos_token": "end token, which joins the texts",
    "pad_token": "padding token, which a batch needs",
}
"""Special token of a tokenizer → what it is for."""


def load_text_model(
    auto_class: Any, checkpoint: Checkpoint, needed: str, *, dtype: str, device: torch.device | str
) -> Loaded:
    """Load a model of texts and its tokenizer.

    Args:
        auto_class: an auto class of transformers.
        checkpoint: what to load.
        needed: key of :data:`NEEDED`, the special token that its tokenizer must have.
        dtype: as of a run.
        device: where the weights go.

    Raises:
        LayersenseError: it is no model of this class, weights are missing or not finite, or the
            tokenizer has no such token.
    """
    model, warnings = load_model(auto_class, checkpoint, dtype=dtype, device=device)
    tokenizer = load_tokenizer(checkpoint)
    if getattr(tokenizer, f"{needed}_id") is None:
        raise LayersenseError(
            f"{checkpoint.path}: its tokenizer names no {NEEDED[needed]}; set `{needed}` in "
            "tokenizer_config.json"
        )
    return Loaded(model, tokenizer, checkpoint.id, warnings)


def check_length(loaded: Loaded, sampling: Sampling) -> None:
    """Raise if ``max_length`` is more than the model's positions; relative ones (T5) have no end.

    Raises:
        LayersenseError: it is.
    """
    longest = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    if longest is not None and sampling.max_length > longest:
        raise LayersenseError(
            f"`max_length` {sampling.max_length} of the run is more than the {longest} "
            f"positions of {loaded.name}; set it to {longest} or less"
        )


def supervised_logits(output: Any, batch: Batch) -> Tensor:
    """Return the logits that predict a supervised token, shape (n_tokens, vocabulary), float32.

    The logits at position t predict the token at t + 1.
    """
    supervised = batch.labels[:, 1:] != IGNORED
    logits: Tensor = output.logits[:, :-1][supervised]
    return logits.float()


def summed_cross_entropy(output: Any, batch: Batch) -> Tensor:
    """Return the cross entropy in nats, summed over the supervised tokens, a float32 scalar."""
    targets = batch.labels[:, 1:]
    return functional.cross_entropy(
        supervised_logits(output, batch), targets[targets != IGNORED], reduction="sum"
    )


def count_supervised(labels: Tensor) -> int:
    """Return how many labels, shape (B, T), enter the loss: the first position never does."""
    return int((labels[:, 1:] != IGNORED).sum())


def pad_right(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Stack vectors of lengths ≤ T into (B, T), filling up with ``value`` on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)
