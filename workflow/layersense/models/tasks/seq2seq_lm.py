"""Encoder–decoders: a text in, another text of the same image out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layersense.errors import LayersenseError
from layersense.models.checkpoints import Checkpoint
from layersense.models.tasks.metrics import TopChoice
from layersense.models.tasks.protocol import (
    IGNORED,
    Batch,
    Loaded,
    Metric,
    Sampling,
    check_modality,
)
from layersense.models.tasks.tokens import check_length, load_text_model, pad_right

if TYPE_CHECKING:
    from layersense.calibration.database import Row
    from layersense.calibration.sampling import Unit
    from layersense.quantization.layers import LayerName


class Seq2SeqLM:
    """The encoder reads one caption of a photograph, the decoder writes another one.

    So both towers and the cross-attention between them are in the loss. A sample is a pair; all
    tokens of its target are supervised, the end token included.
    """

    name = "seq2seq-lm"
    modalities = frozenset({"text_pair"})

    def unit(self, modality: str) -> Unit:
        """Return the calibration database's unit: a pair of captions of one image."""
        check_modality(self, modality)
        return "pair"

    def load(self, checkpoint: Checkpoint, *, dtype: str, device: torch.device | str) -> Loaded:
        """Load model and tokenizer; see :class:`~layersense.models.tasks.protocol.Task`."""
        from transformers import AutoModelForSeq2SeqLM

        return load_text_model(
            AutoModelForSeq2SeqLM, checkpoint, "pad_token", dtype=dtype, device=device
        )

    def batches(
        self, loaded: Loaded, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Sequence[Batch]:
        """Return the batches, sources and targets each padded on the right to their longest.

        Raises:
            LayersenseError: a text is empty, or ``max_length`` is more than the model's positions.
        """
        check_modality(self, sampling.modality)
        check_length(loaded, sampling)
        pairs = [_pair(loaded.processor, row, sampling.max_length) for row in rows]
        return [
            _batch(loaded, pairs[start : start + batch_size])
            for start in range(0, len(pairs), batch_size)
        ]

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on the batch."""
        return model(**batch.inputs, use_cache=False)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the cross entropy summed over all tokens of the targets, in nats."""
        return functional.cross_entropy(
            self.supervised_logits(output, batch),
            batch.labels[batch.labels != IGNORED],
            reduction="sum",
        )

    def supervised_logits(self, output: Any, batch: Batch) -> Tensor:
        """Return the logits of the targets' tokens, (n_tokens, vocabulary).

        The decoder's input is the target shifted by one, so its logits stand where the labels do.
        """
        logits: Tensor = output.logits[batch.labels != IGNORED]
        return logits.float()

    def metrics(self, loaded: Loaded) -> Sequence[Metric]:
        """Return the share of tokens predicted right, given the true ones before."""
        return [TopChoice("token accuracy")]

    def describe(self, module_names: Sequence[str]) -> LayerName:
        """Return subsystem, block and kind of a layer group."""
        from layersense.quantization.layers import describe_layer

        return describe_layer(module_names)


def _pair(tokenizer: Any, row: Row, max_length: int) -> tuple[Tensor, Tensor, bool]:
    """Return the token ids of source and target, and whether one of them was cut."""
    parts = []
    truncated = False
    for text, argument in ((row.caption, "text"), (row.target, "text_target")):
        if not (text or "").strip():
            raise LayersenseError(f"row {row.position}: a text is empty; remove it from the data")
        ids = tokenizer(**{argument: text}, verbose=False).input_ids
        if len(ids) > max_length:
            truncated = True
            ids = tokenizer(**{argument: text}, truncation=True, max_length=max_length).input_ids
        parts.append(torch.tensor(ids))
    return parts[0], parts[1], truncated


def _batch(loaded: Loaded, pairs: Sequence[tuple[Tensor, Tensor, bool]]) -> Batch:
    sources = [source for source, _, _ in pairs]
    targets = [target for _, target, _ in pairs]
    ids = pad_right(sources, loaded.processor.pad_token_id)
    labels = pad_right(targets, IGNORED)
    shift: Any = loaded.model.prepare_decoder_input_ids_from_labels
    positions = ids.numel() + labels.numel()
    tokens = sum(len(source) for source in sources) + sum(len(target) for target in targets)
    return Batch(
        inputs={
            "input_ids": ids,
            "attention_mask": pad_right([torch.ones_like(source) for source in sources], 0),
            "decoder_input_ids": shift(labels=labels),
        },
        labels=labels,
        n_tokens=int((labels != IGNORED).sum()),
        n_samples=len(pairs),
        n_padding=positions - tokens,
        n_truncated=sum(truncated for _, _, truncated in pairs),
        positions=positions,
    )
