"""Language models: texts in, their next tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.tasks.metrics import TopChoice
from layersense.models.tasks.protocol import Batch, Loaded, Metric, Sampling, check_modality
from layersense.models.tasks.tokens import (
    check_length,
    count_supervised,
    load_text_model,
    summed_cross_entropy,
    supervised_logits,
)

if TYPE_CHECKING:
    from layersense.calibration.database import Row
    from layersense.calibration.sampling import Unit
    from layersense.quantization.layers import LayerName


class CausalLM:
    """Texts joined by the end token and packed to ``max_length``; every position is supervised.

    A sample is a packed block, not a row.
    """

    name = "causal-lm"
    modalities = frozenset({"text"})

    def unit(self, modality: str) -> Unit:
        """Return the calibration database's unit: a caption (or text) is a row."""
        check_modality(self, modality)
        return "caption"

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str) -> Loaded:
        """Load model and tokenizer; see :class:`~layersense.models.tasks.protocol.Task`."""
        from transformers import AutoModelForCausalLM

        return load_text_model(
            AutoModelForCausalLM, checkpoint, "eos_token", dtype=dtype, device=device
        )

    def batches(
        self, loaded: Loaded, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Sequence[Batch]:
        """Return the packed blocks in batches, without padding.

        What is left after the last full block is a shorter block in a batch of its own; a
        remainder of a single token predicts nothing and is left out.

        Raises:
            LayersenseError: a text is empty, all are too short, or ``max_length`` is more than
                the model's positions.
        """
        check_modality(self, sampling.modality)
        check_length(loaded, sampling)
        blocks = pack(loaded.processor, [_text(row) for row in rows], sampling.max_length)
        if not blocks:
            raise LayersenseError(
                "the texts of the run hold fewer than two tokens; set more `calibration_samples`"
            )
        full = [block for block in blocks if len(block) == sampling.max_length]
        batches = [
            _batch(full[start : start + batch_size]) for start in range(0, len(full), batch_size)
        ]
        return batches + [_batch([block]) for block in blocks[len(full) :]]

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on the batch."""
        return model(**batch.inputs, use_cache=False)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the cross entropy summed over all tokens but each block's first, in nats."""
        return summed_cross_entropy(output, batch)

    def supervised_logits(self, output: Any, batch: Batch) -> Tensor:
        """Return the logits of all positions but each block's last, (n_tokens, vocabulary)."""
        return supervised_logits(output, batch)

    def metrics(self, loaded: Loaded) -> Sequence[Metric]:
        """Return the share of tokens predicted right, given the true ones before."""
        return [TopChoice("token accuracy")]

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""
        from layersense.quantization.layers import describe_layer

        return describe_layer(module_names)


def pack(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Tensor]:
    """Join ``texts`` by the end token and cut them into blocks of ``max_length`` tokens.

    Where the tokenizer begins a text with a token of its own, every block begins with it, because
    no deployed sequence lacks it. The last block may be shorter; each has at least two tokens.
    """
    first = tokenizer("a").input_ids[:1]
    start = first if first == [tokenizer.bos_token_id] else []
    ids = [
        token
        for text in texts
        for token in (
            *tokenizer(text, add_special_tokens=False, verbose=False).input_ids,
            tokenizer.eos_token_id,
        )
    ]
    step = max_length - len(start)
    blocks = (
        torch.tensor(start + ids[position : position + step])
        for position in range(0, len(ids), step)
    )
    return [block for block in blocks if len(block) > 1]


def _text(row: Row) -> str:
    if not (row.caption or "").strip():
        raise LayersenseError(f"row {row.position}: its text is empty; remove it from the data")
    return str(row.caption)


def _batch(blocks: Sequence[Tensor]) -> Batch:
    ids = torch.stack(list(blocks))
    return Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        labels=ids.clone(),
        n_tokens=count_supervised(ids),
        n_samples=len(blocks),
        n_padding=0,
        n_truncated=0,
    )
