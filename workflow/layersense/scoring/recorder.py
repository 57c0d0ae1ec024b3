"""Read ModelOpt's accumulated scores after every batch, and see which groups the loss reached.

Stock ``auto_quantize`` adds the scores of all batches into one number for each group and format,
and a group that the loss never reached ends as 0.0 like one that does not mind quantization. The
recorder takes the accumulated numbers away after each batch and watches calls and gradients with
hooks of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from modelopt.torch.quantization.algorithms import QuantRecipe, QuantRecipeHparam
from torch import nn

from layersense.errors import LayersenseError
from layersense.scoring.in_progress import Completed
from layersense.scoring.measurement import layer_groups
from layersense.scoring.scores import Reached


class Recorder:
    """Scores by group, format and batch of one ``auto_quantize`` call.

    Args:
        recipes: name → ModelOpt recipe of each format of the call.
        gradient: whether the method needs gradients (``gradient``) or not (``kl_div``).
    """

    def __init__(self, recipes: Mapping[str, QuantRecipe], *, gradient: bool) -> None:
        self.recipes = recipes
        self.gradient = gradient
        self.hparams: dict[str, QuantRecipeHparam] = {}
        self.batch_scores: dict[str, dict[str, list[float]]] = {name: {} for name in recipes}
        self._called: dict[str, bool] = {}
        self._gradient_seen: dict[str, torch.Tensor] = {}
        self._reached_by_gradient: set[str] = set()
        self._calls_in_batch: dict[nn.Module, int] = {}
        self._hooks: list[Any] = []
        self._begun: dict[str, dict[str, float]] = {}
        """Scores of the batch in progress that an earlier job took."""

    def attach(self, model: nn.Module) -> None:
        """Find the layer groups that ``auto_quantize`` has made and hook their modules."""
        self.hparams = layer_groups(model)
        for handle, hparam in self.hparams.items():
            self._called[handle] = False
            for scores in self.batch_scores.values():
                scores[handle] = []
            for module in hparam.quant_modules:
                self._hooks.append(module.register_forward_pre_hook(self._on_call(handle)))
            if self.gradient:
                for module in hparam.score_modules:
                    self._hooks.append(module.register_forward_hook(self._on_output(handle)))

    def take_up(self, completed: Completed, batches: int) -> None:
        """Continue from the first batches of an earlier job; :meth:`attach` has been called."""
        for name, scores in completed.batch_scores.items():
            self.batch_scores[name] = {
                handle: values[:batches] for handle, values in scores.items()
            }
        self._called.update(dict.fromkeys(completed.called, True))
        if batches == len(completed.seen):
            self._begun = completed.begun

    def begun(self) -> dict[str, dict[str, float]]:
        """Return format → handle → score, of what is complete of the batch in progress."""
        slots, values = self._accumulated()
        found: dict[str, dict[str, float]] = {}
        for (name, handle), value in zip(slots, values, strict=True):
            found.setdefault(name, {})[handle] = value
        return found

    def detach(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def harvest(self) -> None:
        """Take the scores that ModelOpt accumulated since the last harvest: one batch.

        Raises:
            LayersenseError: a module was called several times in one forward, which stock
                ``auto_quantize`` scores wrongly: it keeps only the last call's perturbation.
        """
        repeated = [module for module, calls in self._calls_in_batch.items() if calls > 1]
        if repeated:
            names = [
                handle
                for handle, hparam in self.hparams.items()
                if any(module in repeated for module in hparam.score_modules)
            ]
            raise LayersenseError(
                f"{names[0].removesuffix('.quant_recipe')}: is called several times in one forward "
                f"({len(names)} such group(s)), which engine `modelopt` scores wrongly; "
                "set `engine: fused` of the run, which sums over the calls"
            )
        self._calls_in_batch.clear()
        totals = dict(zip(*self._accumulated(), strict=True))
        self._begun = {}
        for handle, hparam in self.hparams.items():
            for name, recipe in self.recipes.items():
                self.batch_scores[name][handle].append(totals.get((name, handle), 0.0))
                importance = hparam._importance_dict[recipe]
                for module in importance:
                    importance[module] = None
        for handle, seen in zip(
            self._gradient_seen, _to_floats(list(self._gradient_seen.values())), strict=True
        ):
            if seen:
                self._reached_by_gradient.add(handle)
        self._gradient_seen.clear()

    def _accumulated(self) -> tuple[list[tuple[str, str]], list[float]]:
        """Return (format, handle) and score, wherever the batch in progress has one."""
        slots: list[tuple[str, str]] = []
        values: list[torch.Tensor] = []
        for handle, hparam in self.hparams.items():
            for name, recipe in self.recipes.items():
                found = [s for s in hparam._importance_dict[recipe].values() if s is not None]
                if found:
                    slots.append((name, handle))
                    on = found[0].device
                    values.append(torch.stack([score.double().to(on) for score in found]).sum())
        return slots, [
            value + self._begun.get(name, {}).get(handle, 0.0)
            for (name, handle), value in zip(slots, _to_floats(values), strict=True)
        ]

    def reached(self, handle: str) -> Reached:
        """Return whether the loss reached a group in any batch so far."""
        if not self._called[handle]:
            return "not_called"
        if self.gradient and handle not in self._reached_by_gradient:
            return "no_gradient"
        return "scored"

    def _on_call(self, handle: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._called[handle] = True

        return hook

    def _on_output(self, handle: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            # Under gradient checkpointing the first forward records nothing; its repetition does.
            if not (torch.is_grad_enabled() and tensor.requires_grad):
                return
            self._calls_in_batch[module] = self._calls_in_batch.get(module, 0) + 1
            if handle not in self._reached_by_gradient:
                tensor.register_hook(lambda gradient: self._see(handle, gradient))

        return hook

    def _see(self, handle: str, gradient: torch.Tensor) -> None:
        # Stays on the device: a transfer for each module would stall every backward step.
        seen = (gradient != 0).any()
        before = self._gradient_seen.get(handle)
        self._gradient_seen[handle] = seen if before is None else before | seen


def _to_floats(values: list[torch.Tensor]) -> list[float]:
    """Return scalars as Python floats with one transfer for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        by_device.setdefault(value.device, []).append(index)
    floats = [0.0] * len(values)
    for indices in by_device.values():
        stacked = torch.stack([values[index].double() for index in indices]).tolist()
        for index, number in zip(indices, stacked, strict=True):
            floats[index] = number
    return floats
