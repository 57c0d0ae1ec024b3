"""Measure what quantization does to a model's output: KL, loss, first choices."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from layersense.errors import LayersenseError
from layersense.models.tasks.metrics import per_unit, position_labels, unit_sizes
from layersense.models.tasks.protocol import Batch, Metric, Task, WrittenMetric
from layersense.scoring.in_progress import InProgress
from layersense.scoring.progress import Progress
from layersense.verification.judging import Judge
from layersense.verification.plan import Whole
from layersense.verification.replay import Switchboard
from layersense.verification.store import METRICS_VERSION, Before, Completed, Damage

logger = logging.getLogger(__name__)

CALL = "verify"
"""Verification has one call, where scoring has one for each set of formats."""
BEFORE = "before"
"""Key of the unquantized model's records of metrics, where recipes have their digests."""
CHUNK = 2**25
"""Logits whose log-probabilities are computed at once."""

Single = tuple[str, str]
"""Format and handle."""
Divergence = Callable[[Any, Any], Tensor]
"""Of two outputs of a task: what differs beside their distributions, shape (positions,), in units
of the loss. Optional method ``divergence`` of a task."""
Records = dict[str, dict[str, list[Any]]]
"""Of each metric by its name, by the recipe's digest."""


@dataclass(frozen=True)
class Album:
    """Photographs for which captions are written, each once."""

    metrics: Sequence[WrittenMetric]
    """What judges them."""
    batches: Sequence[Batch]
    references: Sequence[Sequence[str]]
    """What people wrote, for each photograph of the batches in their order."""


class Measurer:
    """Measures switched models against the unquantized one, batch by batch.

    The unquantized outputs of a batch are computed once for all that is measured on it, and held
    for one batch alone.

    Args:
        board: the model and its calibrated formats.
        task: how to run it.
        batches: held-out batches.
        device: where the model is.
        dtype: of its floating-point inputs.
        metrics: what whole recipes are judged by.
        photographs: number of each row's photograph; None where they are of none.
        album: photographs for which captions are written; None writes none.
    """

    def __init__(
        self,
        board: Switchboard,
        task: Task,
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype,
        metrics: Sequence[Metric] = (),
        photographs: Sequence[int] | None = None,
        album: Album | None = None,
    ) -> None:
        self.board, self.task, self.batches = board, task, batches
        self.device, self.dtype = device, dtype
        self.metrics, self.photographs, self.album = metrics, photographs, album
        self._choices: Choices = getattr(task, "same_choices", NoChoices)()
        self._divergence: Divergence | None = getattr(task, "divergence", None)
        self.exact_reuse = True

    @torch.inference_mode()
    def measure(
        self,
        singles: Sequence[Single],
        recipes: Mapping[str, Whole],
        in_progress: InProgress[Completed] | None = None,
        captioned: Collection[str] = (),
    ) -> tuple[Before, dict[Single, Damage], dict[str, Damage]]:
        """Measure groups alone and whole recipes.

        Args:
            singles: format and handle of each group to quantize alone.
            recipes: digest → recipe.
            in_progress: where completed batches are kept; those that it holds are not measured
                again.
            captioned: digests of the recipes that write captions.

        Returns:
            The unquantized model; what each single did; what each recipe did. Their digests are
            empty, for the caller to fill in.

        Raises:
            LayersenseError: a batch does not fit into memory, or the unquantized model's outputs
                are not finite.
        """
        done = in_progress.read(CALL) if in_progress else None
        if done is None:
            nothing: dict[str, dict[str, Damage]] = {}
            for format, handle in singles:
                nothing.setdefault(format, {})[handle] = _nothing()
            done = Completed(
                batches=0,
                exact_reuse=self.exact_reuse,
                before=Before(digest="", positions=[], correct=[], loss=[], tokens=[]),
                singles=nothing,
                recipes={digest: _nothing() for digest in recipes},
                records={},
            )
        else:
            logger.info("going on after %d batches of %d", done.batches, len(self.batches))
        self.exact_reuse = done.exact_reuse
        before, whole = done.before, done.recipes
        alone = {(format, handle): done.singles[format][handle] for format, handle in singles}
        progress = Progress("verify", total=len(self.batches), unit="batch", device=self.device)
        try:
            for index, batch in enumerate(self.batches):
                if index >= done.batches:
                    self._measure_batch(
                        batch.to(self.device, self.dtype),
                        recipes,
                        before,
                        alone,
                        whole,
                        done.records,
                    )
                    done.batches, done.exact_reuse = index + 1, self.exact_reuse
                    if in_progress:
                        in_progress.save(CALL, lambda: done)
                progress.step()
            progress.close()
            if self.album and captioned:
                chosen = {key: recipes[key] for key in recipes if key in captioned}
                self._write(self.album, chosen, done, in_progress)
        except torch.OutOfMemoryError as error:
            raise LayersenseError(
                f"verification does not fit into memory ({error}); lower `batch_size` of the run"
            ) from error
        finally:
            self.board.clear()
            progress.close()
        self._judged(done.records, whole, before)
        for digest, damage in whole.items():
            damage.captions = digest in captioned
            damage.metrics_version = METRICS_VERSION
        return before, alone, whole

    def _record(
        self, records: Records, key: str, output: Any, logits: Tensor, batch: Batch
    ) -> None:
        """Keep what the metrics need of one batch."""
        for metric in self.metrics:
            found = records.setdefault(key, {}).setdefault(metric.name, [])
            found.extend(metric.records(output, logits, batch))

    def _write(
        self,
        album: Album,
        recipes: Mapping[str, Whole],
        done: Completed,
        in_progress: InProgress[Completed] | None,
    ) -> None:
        """Let the unquantized model and recipes write captions, batch by batch."""
        logger.info(
            "captions of %d photographs by %d models: %d batches, each at most %d passes of each",
            len(album.references),
            len(recipes) + 1,
            len(album.batches),
            sum(metric.most_passes for metric in album.metrics),
        )
        progress = Progress("captions", total=len(album.batches), unit="batch", device=self.device)
        start = 0
        try:
            for index, batch in enumerate(album.batches):
                references = album.references[start : start + batch.n_samples]
                start += batch.n_samples
                if index >= done.albums:
                    batch = batch.to(self.device, self.dtype)
                    self.board.clear()
                    self._caption(done.records, BEFORE, album, batch, references)
                    for digest, whole in recipes.items():
                        self.board.switch(whole.recipe, whole.kv_cache)
                        self._caption(done.records, digest, album, batch, references)
                    done.albums = index + 1
                    if in_progress:
                        in_progress.save(CALL, lambda: done)
                progress.step()
        finally:
            progress.close()

    def _caption(
        self,
        records: Records,
        key: str,
        album: Album,
        batch: Batch,
        references: Sequence[Sequence[str]],
    ) -> None:
        """Keep what the model, as it is switched, writes for a batch."""
        for metric in album.metrics:
            written = metric.write(self.board.model, batch)
            records.setdefault(key, {}).setdefault(metric.name, []).extend(
                [text, list(texts)] for text, texts in zip(written, references, strict=True)
            )

    def _judged(self, records: Records, whole: Mapping[str, Damage], before: Before) -> None:
        """Tell what the metrics say of each model, where there is anything to judge."""
        metrics: list[Metric | WrittenMetric] = [*self.metrics]
        metrics += self.album.metrics if self.album else ()
        for metric in metrics:
            own = records.get(BEFORE, {}).get(metric.name)
            if not own:
                continue
            # Of captions there is one record a photograph.
            judge = Judge(metric, own, self.photographs if metric in self.metrics else None)
            before.metrics.append(judge.of(own))
            for digest, damage in whole.items():
                if metric.name in records.get(digest, {}):
                    damage.metrics.append(judge.of(records[digest][metric.name]))

    def _measure_batch(
        self,
        batch: Batch,
        recipes: Mapping[str, Whole],
        before: Before,
        alone: dict[Single, Damage],
        whole: dict[str, Damage],
        records: Records,
    ) -> None:
        self.board.clear()
        with Trace(self.board) as trace, self._choices.noted():
            unquantized = self.task.forward(self.board.model, batch)
        logits = self.task.supervised_logits(unquantized, batch)
        loss = float(self.task.loss(unquantized, batch))
        if not (torch.isfinite(logits).all() and math.isfinite(loss)):
            raise LayersenseError(
                "the unquantized model's outputs on the held-out rows are not finite; check the "
                "checkpoint and `dtype` of the run"
            )
        sizes = unit_sizes(batch, len(logits))
        targets = position_labels(batch, len(logits)) if logits.ndim == 2 else None
        self._record(records, BEFORE, unquantized, logits, batch)
        before.positions += sizes
        before.loss.append(loss)
        before.tokens.append(batch.n_tokens)
        if targets is None:
            before.correct = None
        elif before.correct is not None:
            before.correct += per_unit(logits.argmax(dim=-1) == targets, sizes)
        if self.exact_reuse and alone:
            self._check_reuse(trace, batch, logits)
        for (format, handle), damage in alone.items():
            self.board.switch({handle: format})
            with trace.reuse(handle if self.exact_reuse else None):
                self._compare(batch, unquantized, logits, targets, sizes, damage)
        for digest, damage in whole.items():
            self.board.switch(recipes[digest].recipe, recipes[digest].kv_cache)
            output, after = self._compare(batch, unquantized, logits, targets, sizes, damage)
            if self.metrics and self._choices.any:  # it is judged by its own choices
                output = self.task.forward(self.board.model, batch)
            self._record(records, digest, output, after, batch)

    def _check_reuse(self, trace: "Trace", batch: Batch, logits: Tensor) -> None:
        """Give reuse up unless it reproduces the unquantized outputs exactly, twice."""
        for _ in range(2):
            with trace.reuse(trace.last), self._choices.again():
                output = self.task.forward(self.board.model, batch)
            if not torch.equal(self.task.supervised_logits(output, batch), logits):
                logger.info("reusing the forward up to a layer is not exact here: left off")
                self.exact_reuse = False
                return

    def _compare(
        self,
        batch: Batch,
        unquantized: Any,
        logits: Tensor,
        targets: Tensor | None,
        sizes: Sequence[int],
        damage: Damage,
    ) -> tuple[Any, Tensor]:
        """Add what a batch says of the model as it is switched; return its output and logits."""
        with self._choices.again():
            output = self.task.forward(self.board.model, batch)
        after = self.task.supervised_logits(output, batch)
        loss = float(self.task.loss(output, batch))
        agree = _all_at(after.argmax(dim=-1) == logits.argmax(dim=-1))
        divergence = kl_divergence(logits, after)
        if self._divergence is not None:
            divergence += self._divergence(unquantized, output)
        damage.kl += [
            value if math.isfinite(value) else None for value in per_unit(divergence, sizes)
        ]
        damage.agree += per_unit(agree, sizes)
        damage.loss.append(loss if math.isfinite(loss) else None)
        if targets is None:
            damage.correct = None
        elif damage.correct is not None:
            damage.correct += per_unit(after.argmax(dim=-1) == targets, sizes)
        return output, after


class Choices(Protocol):
    """What a model chooses on the way, and can be given again; see ``Task.same_choices``."""

    @property
    def any(self) -> bool:
        """Whether it chose at all."""

    def noted(self) -> AbstractContextManager[None]:
        """Note what it chooses."""

    def again(self) -> AbstractContextManager[None]:
        """Give it the same again."""


class NoChoices:
    """Of tasks whose outputs correspond anyway."""

    any = False

    def noted(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    again = noted


class Trace:
    """What the blocks of a model returned in one forward, to be returned again.

    A block is a member of a list of modules, such as a decoder layer. One that was left for good
    before the first layer of a group was entered cannot depend on that group, so that its output
    may stand for it.
    """

    def __init__(self, board: Switchboard) -> None:
        self.board = board
        self.blocks = outermost_blocks(board.model)
        self.entered: dict[str, int] = {}
        self.last: str | None = None
        self._left: dict[nn.Module, tuple[int, int]] = {}
        self._outputs: dict[nn.Module, Any] = {}
        self._clock = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> "Trace":
        for block in self.blocks:
            self._hooks.append(block.register_forward_hook(self._on_left))
        for handle, names in self.board.modules.items():
            for name in names:
                module = self.board.model.get_submodule(name)
                self._hooks.append(module.register_forward_pre_hook(self._on_entered(handle)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.last = max(self.entered, key=lambda handle: self.entered[handle], default=None)

    @contextmanager
    def reuse(self, handle: str | None) -> Iterator[None]:
        """Let the blocks before a group return what they returned; None reuses nothing."""
        start = self.entered.get(handle, 0) if handle is not None else 0
        replaced: list[nn.Module] = []
        try:
            for block, (calls, left) in self._left.items():
                if calls == 1 and left < start:
                    block.forward = _returning(self._outputs[block])
                    replaced.append(block)
            yield
        finally:
            for block in replaced:
                del block.forward

    def _on_left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._clock += 1
        calls, _ = self._left.get(module, (0, 0))
        self._left[module] = (calls + 1, self._clock)
        self._outputs[module] = output

    def _on_entered(self, handle: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._clock += 1
            self.entered.setdefault(handle, self._clock)

        return hook


def outermost_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of lists of modules that lie in no other such member."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList) and "forward" not in vars(child):
                blocks.append(child)
            else:
                visit(child)

    visit(model)
    return blocks


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before ‖ after) in nats at each position, float64.

    In float32 the rounding of the log-probabilities alone is 1e-8, more than the damage of a robust
    layer: a third of a small model's groups ranked at random.

    Args:
        before: logits, shape (positions, classes), float32; where a position has several
            independent distributions, their divergences add up: (positions, …, classes).
        after: the same of the other model.
    """
    rows = max(1, CHUNK // max(1, before[:1].numel()))
    found = [
        functional.kl_div(
            functional.log_softmax(theirs.double(), dim=-1),
            functional.log_softmax(ours.double(), dim=-1),
            reduction="none",
            log_target=True,
        )
        .flatten(1)
        .sum(dim=-1)
        for ours, theirs in zip(torch.split(before, rows), torch.split(after, rows), strict=True)
    ]
    return torch.cat(found) if found else before.new_zeros(0, dtype=torch.float64)


def _all_at(equal: Tensor) -> Tensor:
    """Return where all decisions of a position are equal, shape (positions,)."""
    return equal.reshape(len(equal), -1).all(dim=-1)


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward


def _nothing() -> Damage:
    return Damage(digest="", kl=[], agree=[], correct=[], loss=[])
