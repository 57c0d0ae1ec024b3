"""The engine's check of itself: the first step of each format, held against stock."""

import math

from torch import Tensor

from layersense.errors import LayersenseError
from layersense.scoring.fused.taps import Taps
from layersense.scoring.scores import Agreement

GROUPS = 3
"""Groups that a first step also scores as stock does."""
TOLERANCE = 1e-3
"""Largest relative difference between the two that is put down to rounding."""


class StockCheck:
    """Some groups, evenly spread over the model, are also scored by ModelOpt's own forward.

    Args:
        taps: the taps of the model.
    """

    def __init__(self, taps: Taps) -> None:
        self.taps = taps
        self.agreement: Agreement | None = None
        """How far all that was compared so far agrees."""
        self._done: set[int] = set()
        """Columns of the formats that were compared."""
        self._running = False

    def begin(self) -> None:
        """Have the next backward pass score some groups as stock does, if it has new formats.

        Called after the forward pass, when it is known which groups were called. Those that no
        gradient reached are left to the next step, which takes others instead.
        """
        self._running = not self._done.issuperset(self.taps.columns)
        if not self._running:
            return
        called = [handle for handle in self.taps.handles if handle in self.taps.called]
        pool = self._reached() or called
        count = min(GROUPS, len(pool))
        chosen = [pool[(2 * index + 1) * len(pool) // (2 * count)] for index in range(count)]
        self.taps.checked = {handle: {} for handle in chosen}

    def cancel(self) -> None:
        """Forget a step that failed."""
        self._running = False
        self.taps.checked = {}

    def end(self, scores: Tensor) -> None:
        """Compare what the backward pass scored, shape (groups, formats), with stock.

        Raises:
            LayersenseError: they disagree.
        """
        if not self._running:
            return
        before = self.agreement or Agreement(groups=[], largest_difference=0.0)
        largest, groups = before.largest_difference, list(before.groups)
        compared = {handle: found for handle, found in self.taps.checked.items() if found}
        for handle, found in compared.items():
            row = scores[self.taps.rows[handle]]
            for recipe in self.taps.active:
                ours = float(row[self.taps.column[recipe]])
                stock = sum(score.double().item() for score in found[recipe])
                difference = relative_difference(ours, stock)
                largest = max(largest, difference)
                if not difference <= TOLERANCE:
                    raise LayersenseError(
                        f"{handle.removesuffix('.quant_recipe')}, format "
                        f"{self.taps.quantizers.formats[recipe].name}: the fused engine scores "
                        f"{ours:g} where ModelOpt's own forward gives {stock:g}; set `engine: "
                        "modelopt` of the run, and report this model"
                    )
        if len(compared) >= min(GROUPS, len(self._reached())):
            self._done.update(self.taps.columns)
        self.cancel()
        self.agreement = Agreement(
            groups=list(dict.fromkeys([*groups, *compared])),
            largest_difference=float(f"{largest:.2g}"),
        )

    def _reached(self) -> list[str]:
        return [handle for handle in self.taps.handles if self.taps.reached(handle) == "scored"]


def relative_difference(ours: float, theirs: float) -> float:
    """Return |ours − theirs| as a share of the larger one; 0 where both are not a number."""
    if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
        return 0.0
    return abs(ours - theirs) / max(abs(ours), abs(theirs))
