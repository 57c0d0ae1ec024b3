"""Attention over windows: one call for all windows of a length, not one call for each.

Vision towers of the Qwen family attend within windows. Without the flash-attention package
transformers calls the attention once for each window, some 3,400 times for four photographs in
Qwen2.5-VL-3B, and the GPU waits for the launches. Windows of one length form a batch: the same
function on the same numbers.
"""

import inspect
import weakref
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "layersense_window_batches_flash"
"""Registered name; transformers passes window boundaries to names that hold ``flash``."""


def batch_windows(model: nn.Module) -> int:
    """Let attention modules that take ``cu_seqlens`` attend to windows in batches.

    Returns:
        How many modules do so now; those that do not use torch's ``sdpa`` are left alone.
    """
    towers = [
        module
        for module in model.modules()
        if "cu_seqlens" in inspect.signature(type(module).forward).parameters
        and hasattr(module, "config")
        and hasattr(module, "scaling")
        and getattr(module.config, "_attn_implementation", None) == "sdpa"
    ]
    configs: dict[int, Any] = {id(module.config): module.config for module in towers}
    if towers:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _Windows())
        for config in configs.values():
            config._attn_implementation = NAME
    return len(towers)


Plan = tuple[list[tuple[int, int]], Tensor, Tensor]
"""(windows, length) of each group, the order of the tokens by group, and its inverse."""


class _Windows:
    """The attention function, with the plans of the boundaries that it saw last."""

    def __init__(self) -> None:
        self._plans: list[tuple[weakref.ref[Tensor], Plan]] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        cu_seq_lens_q: Tensor,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend within windows.

        Args:
            module: the attention module.
            query: shape (1, heads, tokens, size), like ``key`` and ``value``.
            key: see ``query``.
            value: see ``query``.
            attention_mask: None.
            scaling: factor of the products.
            dropout: probability.
            cu_seq_lens_q: boundaries of the windows, shape (windows + 1,).

        Returns:
            The result, shape (1, tokens, heads, size), and no weights.
        """
        groups, order, back = self._plan(cu_seq_lens_q)
        heads, size = query.shape[1], query.shape[3]
        tensors = [tensor[0].index_select(1, order) for tensor in (query, key, value)]
        parts, start = [], 0
        for count, length in groups:
            # (heads, count × length, size) → (count, heads, length, size)
            q, k, v = (
                tensor[:, start : start + count * length]
                .reshape(heads, count, length, size)
                .transpose(0, 1)
                for tensor in tensors
            )
            attended = functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scaling, is_causal=False
            )
            parts.append(attended.transpose(1, 2).reshape(count * length, heads, size))
            start += count * length
        return torch.cat(parts).index_select(0, back).unsqueeze(0), None

    def _plan(self, boundaries: Tensor) -> Plan:
        for known, plan in self._plans:
            if known() is boundaries:
                return plan
        ends = boundaries.tolist()
        by_length: dict[int, list[int]] = {}
        for start, end in pairwise(ends):
            if end > start:
                by_length.setdefault(end - start, []).append(start)
        order = torch.cat(
            [
                (torch.tensor(starts)[:, None] + torch.arange(length)).view(-1)
                for length, starts in by_length.items()
            ]
        )
        plan = (
            [(len(starts), length) for length, starts in by_length.items()],
            order.to(boundaries.device),
            torch.argsort(order).to(boundaries.device),
        )
        # Two kinds of layers, windowed and full, each with its boundaries.
        self._plans = [*self._plans[-3:], (weakref.ref(boundaries), plan)]
        return plan
