"""Taps on score modules: record X and Y in the forward pass, score in the backward pass.

A tap is an autograd function at a module's output. Autograd keeps X and Y for it as for any other
operation: gradient checkpointing drops and recomputes them, and a tensor that something overwrites
before it is used raises an error instead of a wrong score. In the backward pass the gradient at
the output arrives once and complete, and every format is scored from it. A module that is called
several times has a tap for each call.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from modelopt.torch.quantization.algorithms import (
    QuantRecipe,
    QuantRecipeHparam,
    _get_auto_quantize_score,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from layersense.files import canonical_json
from layersense.quantization.formats import Format
from layersense.scoring.fused import graphs, kernels
from layersense.scoring.fused.quantizers import (
    UNQUANTIZED,
    Quantizers,
    asks_device,
    has_static_blocks,
)
from layersense.scoring.scores import Reached

STACK_ELEMENTS = 2**27
"""Elements of the outputs of several formats that are held at once to score them together."""


class Taps:
    """Taps on every score module of a model.

    Args:
        quantizers: the model's calibrated quantizers.
    """

    def __init__(self, quantizers: Quantizers) -> None:
        self.quantizers = quantizers
        self.recipes = list(quantizers.formats)
        self.handles = list(quantizers.groups)
        self.rows = {handle: index for index, handle in enumerate(self.handles)}
        self.copies = False
        """Whether X and Y are copied, for models that overwrite them in place."""
        self.called: set[str] = set()
        self.checked: dict[str, dict[QuantRecipe, list[Tensor]]] = {}
        """Groups to score as stock does, too → format → their scores."""
        self.stopwatch: dict[str, float] | None = None
        """Seconds by format, while they are taken; needs a synchronized device."""
        self.shared_inputs = _SharedInputs()
        self.graphs = graphs.Graphs()
        self.column = {recipe: index for index, recipe in enumerate(self.recipes)}
        self.activate(self.recipes)
        self._scored: list[tuple[int, Sequence[int], Tensor]] = []
        self._seen: list[tuple[int, Tensor]] = []
        self._reached: set[int] = set()
        self.sleeping = False
        self.sites = self._sites()

    def activate(self, recipes: Sequence[QuantRecipe]) -> None:
        """Say which formats the next backward pass scores."""
        self.active = tuple(recipes)
        self.columns = tuple(self.column[recipe] for recipe in recipes)
        """Their columns: a key that is cheap to hash, where ModelOpt writes JSON for each hash."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Tap every score module while the block runs."""
        for site in self.sites:
            site.attach()
        try:
            yield
        finally:
            for site in self.sites:
                site.detach()

    def take(self) -> Tensor:
        """Return what was scored since the last call, (groups, formats) in float64, and forget it.

        One transfer for each device.
        """
        total = torch.zeros(len(self.handles), len(self.recipes), dtype=torch.float64)
        scored, seen = self._scored, self._seen
        self.forget()
        for (group, columns, _), values in zip(
            scored, _to_cpu([tensor for _, _, tensor in scored]), strict=True
        ):
            total[group, list(columns)] += values.double()
        for (group, _), value in zip(seen, _to_cpu([flag for _, flag in seen]), strict=True):
            if value.item():
                self._reached.add(group)
        return total

    def forget(self) -> None:
        """Forget what was scored since the last :meth:`take`."""
        self._scored, self._seen = [], []
        self.shared_inputs.clear()

    def reached(self, handle: str) -> Reached:
        """Return whether the loss reached a group so far."""
        if handle not in self.called:
            return "not_called"
        return "scored" if self.rows[handle] in self._reached else "no_gradient"

    def add(self, group: int, columns: Sequence[int], scores: Tensor) -> None:
        """Add the scores of some formats, shape (formats,), to a group."""
        self._scored.append((group, columns, scores))

    def see(self, group: int, gradient: Tensor) -> None:
        """Note that a gradient reached a group, if it is not zero."""
        if group not in self._reached:
            self._seen.append((group, (gradient != 0).any().view(1)))

    def hparam(self, group: int) -> QuantRecipeHparam:
        """Return ModelOpt's handle of a group."""
        return self.quantizers.groups[self.handles[group]]

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Let modules run without taps: calls within a score module's own repetition."""
        before, self.sleeping = self.sleeping, True
        try:
            yield
        finally:
            self.sleeping = before

    def tick(self) -> float:
        """Return the time once the device is idle, if the stopwatch runs; else 0."""
        if self.stopwatch is None:
            return 0.0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def tock(self, recipe: QuantRecipe, started: float) -> None:
        """Add the time since ``started`` to a format, if the stopwatch runs."""
        if self.stopwatch is not None:
            name = self.quantizers.formats[recipe].name
            self.stopwatch[name] = self.stopwatch.get(name, 0.0) + self.tick() - started

    def _sites(self) -> list["_Site"]:
        by_module: dict[nn.Module, list[int]] = {}
        for index, hparam in enumerate(self.quantizers.groups.values()):
            for module in hparam.score_modules:
                by_module.setdefault(module, []).append(index)
        return [
            _LinearSite(self, module, groups[0])
            if _is_plain_linear(module, self.hparam(groups[0]))
            else _Site(self, module, groups)
            for module, groups in by_module.items()
        ]


@dataclass
class _Site:
    """A score module of any kind: a format's output is its own forward with quantizers on."""

    taps: Taps
    module: nn.Module
    groups: list[int]
    original: Callable[..., Any] = field(init=False)

    def attach(self) -> None:
        self.original = self.module.forward
        self.module.forward = self.forward

    def detach(self) -> None:
        self.module.forward = self.original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and tap its output where a gradient is asked for."""
        if self.taps.sleeping:
            return self.original(*args, **kwargs)
        self.taps.called.update(self.taps.handles[group] for group in self.groups)
        output = self.run(*args, **kwargs)
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if not torch.is_grad_enabled():
            return output
        if not first.requires_grad:
            # Nothing before needs a gradient; the gradient at this output is wanted all the same.
            first = first.requires_grad_(True)
        first = self.tap(first, args, kwargs)
        return first if rest is None else (first, *rest)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module without quantizers; what is scored inside, such as a router, is tapped."""
        return self.original(*args, **kwargs)

    def tap(self, output: Tensor, args: Any, kwargs: Any) -> Tensor:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        template = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def rebuild(saved: Sequence[Tensor]) -> tuple[Any, Any]:
            filled = list(template)
            for place, tensor in zip(places, saved, strict=True):
                filled[place] = tensor
            rebuilt: tuple[Any, Any] = pytree.tree_unflatten(filled, spec)
            return rebuilt

        return self.record(output, rebuild, [leaves[place] for place in places])

    def record(self, output: Tensor, rebuild: Any, tensors: Sequence[Tensor]) -> Tensor:
        """Return the output with a tap that remembers it and the input tensors."""
        kept = [tensor.detach() for tensor in tensors]
        if self.taps.copies:
            kept = [tensor.clone() for tensor in kept]
        tapped: Tensor = _Tap.apply(output, self, rebuild, *kept)
        return tapped

    def score(self, gradient: Tensor, output: Tensor, inputs: tuple[Any, Any]) -> None:
        """Score every active format from the gradient at the output."""
        taps, (args, kwargs) = self.taps, inputs
        for group in self.groups:
            taps.see(group, gradient)
            for recipe in taps.active:
                started = taps.tick()
                perturbed = self.stock_output(group, recipe, args, kwargs)
                found = kernels.scores(gradient, perturbed.reshape(1, -1), output)
                taps.tock(recipe, started)
                taps.add(group, (taps.column[recipe],), found)
            self.check(group, gradient, args, kwargs)

    def stock_output(self, group: int, recipe: QuantRecipe, args: Any, kwargs: Any) -> Tensor:
        """Return the output as stock computes it: the module's own forward under ``recipe``."""
        hparam = self.taps.hparam(group)
        hparam.active = recipe
        try:
            with self.taps.asleep(), torch.no_grad():
                output = self.original(*args, **kwargs)
        finally:
            hparam.active = UNQUANTIZED
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def check(self, group: int, gradient: Tensor, args: Any, kwargs: Any) -> None:
        """Score the group by stock's functions too, if it is one that is checked."""
        found = self.taps.checked.get(self.taps.handles[group])
        if found is None:
            return
        output = self.stock_output(group, UNQUANTIZED, args, kwargs)
        for recipe in self.taps.active:
            difference = self.stock_output(group, recipe, args, kwargs) - output
            found.setdefault(recipe, []).append(_get_auto_quantize_score(gradient, difference))


@dataclass(frozen=True)
class _Step:
    """One format of a linear layer's plan."""

    recipe: QuantRecipe
    column: int
    quantize_input: Any
    quantize_weight: Any
    weight_key: str
    input_key: str | None
    """None if the input stays as it is; shared by formats where it begins with ``=``."""
    replayable: bool
    """Whether a CUDA graph may hold it: it fits other shapes than the batch's, and asks nothing."""


class _LinearSite(_Site):
    """A linear layer that scores itself: each distinct weight and input is quantized once.

    Formats of equal weight (input) settings calibrated by ``max`` have equal quantized weights
    (inputs), and so have the inputs of a group's layers, which see the same data. One quantized
    weight lives at a time.
    """

    def __init__(self, taps: Taps, module: nn.Module, group: int) -> None:
        super().__init__(taps, module, [group])
        hparam = taps.hparam(group)
        self.quantizers: dict[QuantRecipe, tuple[Any, Any]] = {}
        for recipe in taps.recipes:
            hparam.active = recipe
            self.quantizers[recipe] = (module.input_quantizer, module.weight_quantizer)
        hparam.active = UNQUANTIZED
        weight = module._parameters["weight"]
        assert weight is not None
        self.weight, self.bias = weight, module._parameters.get("bias")
        self._plans: dict[tuple[tuple[int, ...], bool], list[_Step]] = {}

    def run(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)

    def tap(self, output: Tensor, args: Any, kwargs: Any) -> Tensor:
        input = args[0] if args else kwargs["input"]
        return self.record(output, lambda saved: ((saved[0],), {}), [input])

    def score(self, gradient: Tensor, output: Tensor, inputs: tuple[Any, Any]) -> None:
        taps, group = self.taps, self.groups[0]
        taps.see(group, gradient)
        (input,), _ = inputs
        g = gradient.reshape(-1, gradient.shape[-1])
        kind = graphs.Rows.of(input)
        # The stopwatch asks for the time between formats.
        replays = taps.stopwatch is None and taps.graphs.suits(input, g)
        replayed: list[_Step] = []
        launched: list[_Step] = []
        for step in self._plan(kind.several):
            (replayed if replays and step.replayable else launched).append(step)
        if replayed:
            found = taps.graphs.scores(
                (self.module, taps.columns, kind),
                self._aligned_output,
                lambda x, y, g: self.scores(replayed, kind.view(x), y, g, {}),
                input.reshape(-1, input.shape[-1]),
                g,
            )
            taps.add(group, [step.column for step in replayed], found)
        if launched:
            taps.shared_inputs.enter(group, input)
            y = output.reshape(g.shape)
            found = self.scores(launched, input, y, g, taps.shared_inputs.tensors)
            taps.add(group, [step.column for step in launched], found)
        self.check(group, gradient, (input,), {})

    def scores(
        self,
        steps: Sequence[_Step],
        input: Tensor,
        output: Tensor,
        gradient: Tensor,
        shared: dict[str, Tensor],
    ) -> Tensor:
        """Return the scores of some formats, float32, shape (formats,).

        Args:
            steps: the formats.
            input: X, shape (…, input features).
            output: Y, shape (rows, output features), or wider with zeros.
            gradient: ∂L/∂Y, shape of the output.
            shared: quantized inputs by key; those that are not there are added.
        """
        taps = self.taps
        at_once = max(1, STACK_ELEMENTS // max(output.numel(), 1))
        flat = input.reshape(-1, input.shape[-1])
        weight: Tensor = self.weight
        weight_key = ""
        found = []
        for start in range(0, len(steps), at_once):
            some = steps[start : start + at_once]
            stack = output.new_empty(len(some), *output.shape)
            for place, step in zip(stack, some, strict=True):
                started = taps.tick()
                if step.weight_key != weight_key:
                    del weight  # one at a time
                    weight, weight_key = step.quantize_weight(self.weight), step.weight_key
                if step.input_key is None:
                    quantized = flat
                elif step.input_key[0] == "=":
                    if step.input_key not in shared:
                        shared[step.input_key] = step.quantize_input(input).reshape(flat.shape)
                    quantized = shared[step.input_key]
                else:
                    quantized = step.quantize_input(input).reshape(flat.shape)
                self._multiply(quantized, weight, place)
                taps.tock(step.recipe, started)
            found.append(kernels.scores(gradient, stack.flatten(1), output))
        return torch.cat(found)

    def _multiply(self, input: Tensor, weight: Tensor, output: Tensor) -> None:
        """Write the layer's output; zeros where it is wider than the layer."""
        n, k = weight.shape
        bias: Tensor | None = self.bias
        wide = output.shape[1]
        if wide != n or (output.is_cuda and k % graphs.ALIGNMENT):
            k = graphs.aligned(k)
            input = graphs.pad_to(input, len(input), k)
            weight = graphs.pad_to(weight, wide, k)
            bias = None if bias is None else functional.pad(bias, (0, wide - n))
        if bias is None:
            torch.mm(input, weight.t(), out=output)
        else:
            torch.addmm(bias, input, weight.t(), out=output)

    def _aligned_output(self, input: Tensor) -> Tensor:
        # By the same kernel as the quantized outputs, so that its rounding cancels.
        output = input.new_empty(len(input), graphs.aligned(self.weight.shape[0]))
        self._multiply(input, self.weight, output)
        return output

    def _plan(self, several: bool) -> list[_Step]:
        key = self.taps.columns, several
        if key not in self._plans:
            formats = self.taps.quantizers.formats
            steps = [
                _Step(
                    recipe,
                    column,
                    *self.quantizers[recipe],
                    _key(self.taps, recipe, "weight"),
                    _input_key(self.taps, recipe),
                    not has_static_blocks(formats[recipe])
                    and not asks_device(formats[recipe], several),
                )
                for recipe, column in zip(self.taps.active, self.taps.columns, strict=True)
            ]
            self._plans[key] = sorted(steps, key=lambda step: step.weight_key)
        return self._plans[key]


class _SharedInputs:
    """Quantized inputs of the group that is being scored, whose layers see the same tensor."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._group = -1
        self._input: Tensor | None = None

    def enter(self, group: int, input: Tensor) -> None:
        """Forget the tensors, unless they belong to this group and input."""
        held = self._input
        if (
            held is None
            or group != self._group
            or input.data_ptr() != held.data_ptr()
            or input.shape != held.shape
            or input.stride() != held.stride()
        ):
            self.tensors.clear()
            # Held, so that no other tensor takes its address.
            self._group, self._input = group, input

    def clear(self) -> None:
        """Forget everything."""
        self.tensors.clear()
        self._group, self._input = -1, None


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass scores."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, site: _Site, rebuild: Any, *tensors: Tensor) -> Tensor:
        ctx.site, ctx.rebuild = site, rebuild
        ctx.save_for_backward(output, *tensors)
        return output.clone() if site.taps.copies else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        output, *tensors = ctx.saved_tensors
        ctx.site.score(gradient, output, ctx.rebuild(tensors))
        return (gradient, *(None for _ in range(2 + len(tensors))))


def _is_plain_linear(module: nn.Module, hparam: QuantRecipeHparam) -> bool:
    """Return whether a module is torch's linear layer and nothing more."""
    return (
        getattr(module, "original_cls", None) is nn.Linear
        and module in hparam.quant_modules
        and not hasattr(module, "_forward_pre_dm")
        and not hasattr(module, "_hf_hook")
    )


def _key(taps: Taps, recipe: QuantRecipe, part: str) -> str:
    """Return what determines a format's quantized weight or input beside the tensor itself.

    A key that begins with ``=`` is that of all formats of equal settings.
    """
    format: Format = taps.quantizers.formats[recipe]
    # Without calibration a range is taken from the tensor at hand, so None is not `max`.
    method = format.algorithm["method"] if format.algorithm else None
    if method not in (None, "max"):
        return format.name
    stages = list(format.weight if part == "weight" else format.input)
    return f"={canonical_json([stages, method])}"


def _input_key(taps: Taps, recipe: QuantRecipe) -> str | None:
    key = _key(taps, recipe, "input")
    unchanged = key[0] == "=" and not taps.quantizers.formats[recipe].input
    return None if unchanged else key


def _to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return vectors on the CPU, with one transfer for each device and dtype."""
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in places.values():
        parts = [tensors[index] for index in indices]
        sizes = [len(part) for part in parts]
        for index, part in zip(indices, torch.split(torch.cat(parts).cpu(), sizes), strict=True):
            found[index] = part
    return found
