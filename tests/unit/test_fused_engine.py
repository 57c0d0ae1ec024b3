"""Engine `fused` against stock, against scores worked out by hand, and its promises one by one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow  # importing ModelOpt takes 15 s

torch = pytest.importorskip("torch")

from tiny_models import resolve_folder, save_tiny_llama, save_tiny_qwen2_5_vl  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from toy_task import Toy, Twice, by_hand, int8, make, make_rows, measurement, totals  # noqa: E402

from layersense.calibration.build import build_database  # noqa: E402
from layersense.calibration.database import open_database  # noqa: E402
from layersense.config import OwnFormat, SampleDataset  # noqa: E402
from layersense.errors import LayersenseError  # noqa: E402
from layersense.models.tasks import get_task  # noqa: E402
from layersense.models.tasks.protocol import Batch, Sampling  # noqa: E402
from layersense.quantization.formats import known_formats, resolve_format  # noqa: E402
from layersense.scoring import fused, modelopt_engine  # noqa: E402
from layersense.scoring.fused import (  # noqa: E402
    attention,
    check,
    coupling,
    engine,
    fit,
    graphs,
    kernels,
    taps,
)
from layersense.scoring.fused.quantizers import Quantizers  # noqa: E402
from layersense.scoring.measurement import Measurement  # noqa: E402
from layersense.scoring.scores import Fit, FormatScores  # noqa: E402


@pytest.fixture(autouse=True)
def _no_dry_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward calls are counted here; the dry pass and the guess have tests of their own."""
    monkeypatch.setattr(engine, "log_reach", lambda *_: None)
    monkeypatch.setattr(engine, "held_by_running", lambda *_: {})


INT8 = "INT8_ALL_LAYERS_CFG"
FP8 = "FP8_ALL_LAYERS_CFG"
INT4 = "INT4_BLOCKWISE_WEIGHT_ONLY_ALL_LAYERS_CFG"
ON_CPU = [name for name, format in known_formats().items() if not format.needs_cuda]
OWN = {
    "INT8_DYNAMIC": OwnFormat(base="INT8_DEFAULT_CFG", input={"type": "dynamic"}),
    "FP8_TWIN": OwnFormat(base="FP8_DEFAULT_CFG"),
    "INT8_BLOCKS": OwnFormat(
        base="INT8_DEFAULT_CFG", input={"axis": None, "block_sizes": {"-1": 16}}
    ),
}

Entries = dict[str, FormatScores]


def run(measure: Any, what: Measurement, *names: str) -> Entries:
    entries: Entries = {}
    for _, part in measure(what, [resolve_format(name, OWN) for name in names]):
        entries |= part
    return entries


def run_fused(what: Measurement, *names: str) -> Entries:
    return run(fused.measure, what, *names)


def assert_equal_scores(ours: Entries, theirs: Entries, rel: float = 1e-4) -> None:
    for name, entry in theirs.items():
        assert list(ours[name].groups) == list(entry.groups)
        for handle, group in entry.groups.items():
            own = ours[name].groups[handle]
            assert own.reached == group.reached, (name, handle)
            assert own.cost == group.cost
            assert own.batch_scores == pytest.approx(group.batch_scores, rel=rel, abs=1e-12)


class Conv(nn.Module):
    """Convolutions of every kind, a norm, and activations that overwrite their input."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Conv3d(1, 2, (2, 1, 1))
        self.conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 4, 3)
        self.last = nn.Linear(4 * 62, 16)

    def forward(self, x: Any) -> Any:
        cube = self.cube(x.view(-1, 1, 2, 4, 4)).squeeze(2)
        hidden = self.relu(self.norm(self.conv(cube)))
        hidden = self.line(self.relu(self.up(hidden)).flatten(2))
        return self.last(hidden.flatten(1))


class Overwriting(nn.Module):
    """Functions that overwrite a layer's output, and its input after use."""

    overwrite = True

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.last = nn.Linear(32, 16)

    def forward(self, x: Any) -> Any:
        hidden = self.first(x)
        hidden = hidden.mul_(2) if self.overwrite else hidden * 2
        second = self.second(hidden)
        hidden = hidden.add_(1) if self.overwrite else hidden + 1
        return self.last(hidden + second)


class Kept(Overwriting):
    overwrite = False


class Table(nn.Module):
    """A tower that begins with a parameter: nothing before its first layer needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(8, 32))
        self.first = nn.Linear(32, 32)
        self.last = nn.Linear(32, 16)

    def forward(self, x: Any) -> Any:
        weights = torch.softmax(x[:, :8], dim=-1)
        return self.last(functional.gelu(weights @ self.first(self.queries)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.last = nn.Linear(32, 16)

    def forward(self, x: Any) -> Any:
        return self.last(functional.gelu(self.second(functional.gelu(self.first(x)))))


class Normalised(Toy):
    """A loss that is divided by the size of the batch: it couples the samples."""

    def loss(self, output: Any, batch: Any) -> Any:
        return super().loss(output, batch) / batch.n_samples


# --- agreement ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock() -> Entries:
    return run(modelopt_engine.measure, measurement(), *ON_CPU)


@pytest.fixture(scope="module")
def reference() -> Entries:
    return run_fused(measurement(), *ON_CPU)


def test_every_cpu_format_scores_as_stock_does(stock: Entries, reference: Entries) -> None:
    assert_equal_scores(reference, stock)


def test_one_format_alone_scores_as_among_many(reference: Entries) -> None:
    for name in (INT8, "INT8_SMOOTHQUANT_ALL_LAYERS_CFG", "INT4_AWQ_ALL_LAYERS_CFG"):
        assert run_fused(measurement(), name)[name].groups == reference[name].groups


def test_scores_are_those_worked_out_by_hand(reference: Entries) -> None:
    for name, expected in by_hand().items():
        group = reference[INT8].groups[f"{name}.quant_recipe"]
        assert group.batch_scores == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [Conv, Tied])
def test_convolutions_and_tied_weights_score_as_stock_does(kind: type[nn.Module]) -> None:
    what = measurement(Toy(kind=kind))
    theirs = run(modelopt_engine.measure, what, INT8, FP8)
    assert_equal_scores(run_fused(what, INT8, FP8), theirs)


def test_a_module_called_twice_sums_over_its_calls() -> None:
    entry = run_fused(measurement(Toy(kind=Twice)), INT8)[INT8]
    model, rows = make(Twice), make_rows()
    calls: list[tuple[Any, Any]] = []
    model.layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    model(torch.stack([row[0] for row in rows]))
    amax = torch.stack([x.abs().max() for x, _ in calls]).max()
    weight = int8(model.layer.weight, model.layer.weight.abs().amax(dim=1, keepdim=True))
    expected = []
    for start in (0, 4):
        calls.clear()
        output = model(torch.stack([row[0] for row in rows[start : start + 4]]))
        labels = torch.tensor([row[1] for row in rows[start : start + 4]])
        loss = functional.cross_entropy(output, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [y for _, y in calls])
        expected.append(
            sum(
                (gradient * (functional.linear(int8(x, amax), weight, model.layer.bias) - y))
                .square()
                .sum()
                .item()
                for (x, y), gradient in zip(calls, gradients, strict=True)
            )
        )
    scores = entry.groups["layer.quant_recipe"].batch_scores
    assert scores == pytest.approx(expected, rel=1e-4)


def test_a_tower_without_an_embedding_is_reached() -> None:
    entry = run_fused(measurement(Toy(kind=Table)), INT8)[INT8]
    assert entry.groups["first.quant_recipe"].reached == "scored"
    assert min(entry.groups["first.quant_recipe"].batch_scores) > 0


def test_a_model_that_overwrites_tensors_scores_as_one_that_does_not() -> None:
    ours = run_fused(measurement(Toy(kind=Overwriting)), INT8)
    assert_equal_scores(ours, run_fused(measurement(Toy(kind=Kept)), INT8), rel=1e-6)


def test_reached_tells_silent_zeros_apart(reference: Entries) -> None:
    groups = reference[FP8].groups
    assert groups["unused.quant_recipe"].reached == "not_called"
    assert groups["aside.quant_recipe"].reached == "no_gradient"
    assert groups["first.quant_recipe"].reached == "scored"


def test_two_names_of_one_format_have_one_score() -> None:
    entries = run_fused(measurement(), "FP8_TWIN", FP8)
    assert entries["FP8_TWIN"].groups == entries[FP8].groups


def test_the_same_seed_gives_the_same_scores(reference: Entries) -> None:
    again = run_fused(measurement(), *ON_CPU)
    for name, entry in again.items():
        assert entry.groups == reference[name].groups


# --- real architectures ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["image-text-to-text", "causal-lm"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    folder = tmp_path_factory.mktemp("tiny")
    dataset = SampleDataset(source="sample", calibration=12, heldout=4)
    build_database("sample", dataset, folder / "sample.sqlite")
    with open_database(folder / "sample.sqlite") as database:
        rows = database.rows("caption", "calibration", limit=12)
    save: Callable[..., Path] = (
        save_tiny_llama if request.param == "causal-lm" else save_tiny_qwen2_5_vl
    )
    images = request.param == "image-text-to-text"
    return Measurement(
        checkpoint=resolve_folder(save(folder / "model"), request.param),
        task=get_task(request.param),
        sampling=Sampling(max_length=64, modality="image_text" if images else "text"),
        method="gradient",
        calibration_rows=rows,
        score_rows=rows[:8],
        calibration_batch_size=4,
        score_batch_size=4,
        dtype="float32",
        device=torch.device("cpu"),
        seed=0,
    )


@pytest.fixture
def checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine._Engine._first_pass

    def changed(self: Any) -> Any:
        what = first(self)
        return replace(what, fit=msgspec.structs.replace(what.fit, checkpointing=True))

    monkeypatch.setattr(engine._Engine, "_first_pass", changed)


def test_real_architectures_score_as_stock_does(
    tiny: Measurement, request: pytest.FixtureRequest
) -> None:
    theirs = run(modelopt_engine.measure, tiny, INT8, FP8, INT4)
    ours = run_fused(tiny, INT8, FP8, INT4)
    assert_equal_scores(ours, theirs)
    agreement = ours[INT8].agreement
    assert agreement is not None
    assert len(agreement.groups) == 3
    assert agreement.largest_difference <= 1e-4
    request.getfixturevalue("checkpointing")
    recomputed = run_fused(tiny, INT8, FP8, INT4)
    assert recomputed[INT8].fit.checkpointing
    assert_equal_scores(recomputed, theirs)


def test_scores_do_not_depend_on_the_scoring_batch(tiny: Measurement) -> None:
    whole = run_fused(tiny, INT8, FP8)
    for size in (1, 2):
        parts = run_fused(replace(tiny, score_batch_size=size), INT8, FP8)
        for name in (INT8, FP8):
            assert totals(parts[name]) == pytest.approx(totals(whole[name]), rel=1e-5)


def test_a_tower_that_no_text_reaches_stays_at_zero_and_says_so(tiny: Measurement) -> None:
    if tiny.task.name == "causal-lm":
        pytest.skip("has no tower")
    entries = run_fused(replace(tiny, sampling=Sampling(max_length=64, modality="text")), INT8, FP8)
    for entry in entries.values():
        by_reach: dict[str, list[float]] = {"scored": [], "not_called": []}
        for handle, group in entry.groups.items():
            assert (group.reached == "not_called") == ("visual" in handle)
            by_reach[group.reached] += [score or 0.0 for score in group.batch_scores]
        assert set(by_reach["not_called"]) == {0.0}
        assert min(by_reach["scored"]) > 0


def test_windows_in_batches_attend_as_one_by_one() -> None:
    torch.manual_seed(0)
    lengths = [4, 7, 4, 4, 2, 7]
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    query, key, value = (torch.randn(1, 3, sum(lengths), 8) for _ in range(3))
    function = attention._Windows()
    for _ in range(2):  # the second call has its plan already
        result, _ = function(nn.Identity(), query, key, value, None, cu_seq_lens_q=boundaries)
    parts = [
        functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        for q, k, v in zip(
            *(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True
        )
    ]
    assert torch.allclose(result, torch.cat(parts, dim=1), atol=1e-6)


# --- work that is not done twice ---------------------------------------------------------------


def test_formats_share_one_calibration_pass_and_one_backward_pass() -> None:
    task = Toy()
    run_fused(measurement(task), INT8, FP8, INT4, "INT8_SMOOTHQUANT_ALL_LAYERS_CFG")
    calibration, scoring = 3, 2
    assert task.calls == calibration + scoring


def test_weight_only_formats_need_no_calibration_pass() -> None:
    task = Toy()
    run_fused(measurement(task), INT4, "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG")
    assert task.calls == 2


def test_awq_runs_its_own_passes_on_a_quarter_of_the_batches() -> None:
    task = Toy()
    rows = make_rows(16)
    what = measurement(task, calibration_rows=rows, calibration_batch_size=2)
    run_fused(what, "INT4_AWQ_ALL_LAYERS_CFG")
    passes, quarter, scoring = 2, 8 // 4, 2
    assert task.calls == passes * quarter + scoring


def test_equal_weights_and_inputs_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"weight": 0, "input": 0}
    init = taps._LinearSite.__init__

    def counted(part: str, quantizer: Any) -> Any:
        def call(tensor: Any) -> Any:
            counts[part] += 1
            return quantizer(tensor)

        return call

    def changed(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.quantizers = {
            recipe: (counted("input", x), counted("weight", w))
            for recipe, (x, w) in self.quantizers.items()
        }

    monkeypatch.setattr(taps._LinearSite, "__init__", changed)
    what = measurement(Toy(kind=Tied))
    run_fused(what, INT8, "INT8_WEIGHT_ONLY_ALL_LAYERS_CFG", INT4)
    layers, batches = 3, 2
    assert counts["weight"] == 2 * layers * batches  # INT8 and INT8 weight-only are one weight
    assert counts["input"] == layers * batches  # of INT8 alone


def linear_site(model: nn.Module, data: torch.Tensor, *names: str, **own: OwnFormat) -> Any:
    """Return the site of a model's one linear layer, calibrated with some data."""
    quantizers = Quantizers(model, [resolve_format(name, own) for name in names])
    quantizers.calibrate(lambda _: model(data), 1)
    (site,) = taps.Taps(quantizers).sites
    assert isinstance(site, taps._LinearSite)
    return site


@pytest.mark.parametrize("features", [(8, 16), (7, 13)])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40))
def test_added_rows_and_columns_change_no_score(features: tuple[int, int], rows: int) -> None:
    """What the CUDA graphs compute, on the CPU: shapes rounded up, with no gradient at the rest."""
    model = nn.Sequential(nn.Linear(*features)).requires_grad_(False)
    data = torch.randn(rows, features[0])
    site = linear_site(model, data, INT8, INT4, FP8)
    gradient = torch.randn(rows, features[1])
    steps = site._plan(several=False)
    plain = site.scores(steps, data, model(data), gradient, {})
    more, wide = graphs.round_up_rows(rows), graphs.aligned(features[1])
    x = torch.cat([data, data[:1].expand(more - rows, -1)])
    g = graphs.pad_to(gradient, more, wide)
    torch.testing.assert_close(
        site.scores(steps, x, site._aligned_output(x), g, {}), plain, rtol=1e-4, atol=0
    )


class Recorded:
    """A CUDA graph without CUDA: a replay does once more what was recorded."""

    replays = 0
    again: Callable[[], Any]

    def replay(self) -> None:
        Recorded.replays += 1
        self.again()


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """Let graphs work on the CPU: recordings repeat what was launched."""

    def record(self: Any, run: Callable[[], Any]) -> Any:
        graph, result = Recorded(), torch.empty_like(run())
        graph.again = lambda: result.copy_(run())
        return graph, result

    monkeypatch.setattr(Recorded, "replays", 0)
    monkeypatch.setattr(graphs.torch.cuda, "device", lambda _: nullcontext())
    device = graphs._Device
    monkeypatch.setattr(device, "record", record)
    monkeypatch.setattr(graphs, "_Device", lambda: device(stream=None, pool=None))
    return Recorded


def test_a_layer_is_launched_then_recorded_then_replayed(no_cuda: type[Recorded]) -> None:
    """Each batch is scored from its own tensors, whatever was in the scratch before."""
    runs = [0]

    def body(x: Any, y: Any, g: Any) -> Any:
        runs[0] += 1
        return ((y - x.sum()) * g).square().sum().view(1)

    def score(x: Any, g: Any, key: str = "layer") -> tuple[float, int, int]:
        before = runs[0], no_cuda.replays
        found = recorded.scores(key, lambda x: x.sum(dim=1, keepdim=True).expand(-1, 8), body, x, g)
        return found.item(), runs[0] - before[0], no_cuda.replays - before[1]

    recorded = graphs.Graphs()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 4, generator=generator), torch.randn(8, 8, generator=generator))
        for _ in range(4)
    ]
    steps = []
    for x, g in batches:
        found, *how = score(x, g)
        y = x.sum(dim=1, keepdim=True).expand(-1, 8)
        assert found == pytest.approx(((y - x.sum()) * g).square().sum().item(), rel=1e-5)
        steps.append(how)
    # Launched once; warmed, recorded and replayed; replayed.
    assert steps == [[1, 0], [2, 1], [1, 1], [1, 1]]
    assert recorded.held
    x, g = batches[0]
    assert score(x, g, "another layer")[1:] == (1, 0)
    # Of many numbers of rows the first few are recorded.
    numbers = sorted({graphs.round_up_rows(rows) for rows in range(1, 100)})
    for rows in numbers:
        for _ in range(2):
            score(x[:1].expand(rows, -1), g[:1].expand(rows, -1), "many")
    first, rest = numbers[: graphs.SHAPES], numbers[graphs.SHAPES :]
    for rows in (first[-1], rest[0]):
        recorded_too = score(x[:1].expand(rows, -1), g[:1].expand(rows, -1), "many")[2]
        assert recorded_too == (rows in first)
    recorded.close()
    assert not recorded.held
    assert not recorded.on


@pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8), (3, 5, 8), (3, 1, 8), (2, 3, 5, 8), (1, 8)])
def test_quantizers_see_the_dimensions_that_they_see_in_stock(
    shape: tuple[int, ...], no_cuda: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt applies a range per token by one function or another, by those longer than 1."""
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    data = torch.randn(shape)
    site = linear_site(model, data, "FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG")
    seen = []

    def quantize(input: Any) -> Any:
        seen.append([input.dim(), sum(size > 1 for size in input.shape[:-1]) > 1])
        return input

    ((recipe, (_, weight)),) = site.quantizers.items()
    site.quantizers = {recipe: (quantize, weight)}
    for suits in (True, False):
        monkeypatch.setattr(graphs.Graphs, "suits", lambda *_, suits=suits: suits)
        site.score(torch.randn(shape), model(data), ((data,), {}))
    replayed, launched = seen
    assert replayed == launched


@pytest.mark.parametrize(
    ("name", "shape", "asks"),
    [
        ("W8A8_INT8_INT8_ATOKEN", (3, 4, 8), True),
        ("W8A8_INT8_INT8_ATOKEN", (1, 4, 8), False),
        ("W8A8_INT8_INT8_ATOKEN", (6, 8), False),
        ("FP8_PER_CHANNEL_PER_TOKEN_ALL_LAYERS_CFG", (3, 4, 8), False),
        ("SQUARES", (6, 8), True),
        (INT8, (3, 4, 8), False),
        (INT4, (3, 4, 8), False),
        ("MXINT8_ALL_LAYERS_CFG", (3, 4, 8), False),
    ],
)
def test_no_graph_holds_what_asks_the_device(
    name: str,
    shape: tuple[int, ...],
    asks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a graph is recorded the device answers nothing: such formats are launched beside it."""
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    data = torch.randn(shape)
    squares = OwnFormat(base=INT4, weight={"block_sizes": {"-1": 4, "-2": 4}})
    site = linear_site(model, data, FP8, name, SQUARES=squares)
    monkeypatch.setattr(graphs.Graphs, "suits", lambda *_: True)
    inside, outside = [], []

    def scores(self: Any, steps: Any, input: Any, *_: Any) -> Any:
        names = [site.taps.quantizers.formats[step.recipe].name for step in steps]
        (inside if recording else outside).extend(names)
        return torch.ones(len(steps))

    def record(self: Any, key: Any, forward: Any, body: Any, input: Any, gradient: Any) -> Any:
        nonlocal recording
        recording = True
        result = body(input, forward(input), gradient)
        recording = False
        return result

    recording = False
    monkeypatch.setattr(taps._LinearSite, "scores", scores)
    monkeypatch.setattr(graphs.Graphs, "scores", record)
    site.score(torch.randn_like(data), model(data), ((data,), {}))
    assert sorted(inside) == sorted([FP8] if asks else [FP8, name])
    assert outside == ([name] if asks else [])
    assert site.taps.take().tolist() == [[1.0, 1.0]]


@given(rows=st.integers(1, 10**6))
def test_rows_are_rounded_up_to_an_even_number_an_eighth_more_at_most(rows: int) -> None:
    more = graphs.round_up_rows(rows)
    assert rows <= more <= max(rows + 1, rows * 9 / 8)
    assert more % 2 == 0
    assert graphs.round_up_rows(more) == more
    assert len({graphs.round_up_rows(n) for n in range(512, 1024)}) <= 9


def test_the_log_says_first_what_is_measured_and_last_where_the_time_went(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "layersense")
    run_fused(measurement(), INT8, FP8)
    first, batches, memory, *_, last = caplog.messages
    # Two quantizers, of input and weight, for each of 5 modules under 2 formats.
    assert first == f"5 layer groups of 5 modules, 2 formats (20 quantizers): {INT8}, {FP8}"
    assert batches == "3 calibration and 2 scoring batches"
    assert memory.startswith("expected peak memory about ")
    found = re.findall(r"([^ ,][^,]*(?:, one batch)?) (\d+\.\d\d) s", last)
    phases = [name.removeprefix("where the time went: ") for name, _ in found]
    assert {"load", "insert quantizers", "calibrate", "forward", "backward", "score"} < set(phases)
    assert {f"ΔY {INT8}, one batch", f"ΔY {FP8}, one batch"} < set(phases)
    assert any("left" in text for text in caplog.messages)  # after two steps


# --- memory ------------------------------------------------------------------------------------


def out_of_memory_at(monkeypatch: pytest.MonkeyPatch, points: set[int]) -> list[int]:
    """Let the allocations of the listed scorings, counted from 1, fail; return the counter.

    Odd ones fail as on a GPU, even ones as on a CPU, which torch words otherwise.
    """
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
    on_cpu = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    )
    counter = [0]
    original = kernels.scores

    def scores(*arguments: Any) -> Any:
        counter[0] += 1
        if counter[0] in points:
            raise on_gpu if counter[0] % 2 else on_cpu
        return original(*arguments)

    monkeypatch.setattr(kernels, "scores", scores)
    return counter


SITES, BATCHES = 3, 2


@pytest.mark.parametrize("point", range(1, SITES * BATCHES + 1))
def test_out_of_memory_anywhere_changes_no_score(
    reference: Entries, point: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = out_of_memory_at(monkeypatch, {point})
    entries = run_fused(measurement(), INT8, FP8)
    for name, entry in entries.items():
        assert entry.back_offs == ["scoring batch of 4 samples split into 2 at a time"]
        assert entry.fit.micro_batch == 2
        # The toy's sharp softmax loses digits; real architectures are held to 1e-5 above.
        assert totals(entry) == pytest.approx(totals(reference[name]), rel=1e-4)
    # Nothing complete is scored again: what failed, and two halves from there on.
    batch, failed = divmod(point - 1, SITES)
    assert counter[0] == batch * SITES + (failed + 1) + 2 * SITES * (BATCHES - batch)


class FailingAllocation(TorchDispatchMode):
    """Lets the n-th allocation fail: the n-th operation whose result has memory of its own."""

    def __init__(self, point: int) -> None:
        super().__init__()
        self.point, self.count = point, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        made = {id_of(leaf) for leaf in tree_leaves(result) if torch.is_tensor(leaf)}
        if made - given:
            self.count += 1
            if self.count == self.point:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
        return result


def id_of(tensor: Any) -> int:
    pointer: int = tensor.untyped_storage()._cdata
    return pointer


def test_any_allocation_may_fail_and_no_score_changes(
    reference: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that passes over the data allocate: batches, forward, backward, ΔY, the check, sums."""
    step = engine._Engine._step
    failing = FailingAllocation(0)

    def watched(self: Any, *arguments: Any) -> Any:
        with failing:
            return step(self, *arguments)

    monkeypatch.setattr(engine._Engine, "_step", watched)
    monkeypatch.setattr(engine.gc, "collect", lambda: 0)  # of all that the tests have imported
    scored = engine._Engine(measurement(), [resolve_format(name, {}) for name in (INT8, FP8)])
    scored.prepare()
    found = scored._score()
    whole = sum(found.batches)
    for recipe, column in scored.taps.column.items():
        expected = totals(reference[scored.quantizers.formats[recipe].name])
        assert whole[:, column].tolist() == pytest.approx(list(expected.values()))
    # Once more, as it is known now which groups to check.
    failing.count, scored.check = 0, check.StockCheck(scored.taps)
    scored._score()
    points = failing.count
    assert points > 300
    for point in range(1, points + 1, 3):  # every third, for the time it takes
        failing.count, failing.point = 0, point
        scored.check = check.StockCheck(scored.taps)
        again = sum(scored._score().batches)
        assert failing.count > points, point  # it failed, and something was done again
        # The toy's sharp softmax loses digits; real architectures are held to 1e-5 above.
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=0)
        assert {what.fit.micro_batch for what in scored.passes} == {2}
        assert scored.check.agreement is not None
        assert set(scored.check.agreement.groups) == {f"{n}.quant_recipe" for n in by_hand()}


def test_no_memory_to_find_out_means_that_no_batch_is_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    out_of_memory_at(monkeypatch, {1})
    monkeypatch.setattr(coupling.Coupling, "sizes_and_loss", failing)
    entries = run_fused(measurement(), INT8, FP8)
    assert {entry.fit.micro_batch for entry in entries.values()} == {4}
    assert {entry.fit.formats for entry in entries.values()} == {1}


def test_no_memory_for_calibration_says_what_to_set() -> None:
    with pytest.raises(LayersenseError, match=r"batch of 4 samples .*reduce `calibration_batch_s"):
        run_fused(measurement(Toy(fail={1})), INT8)


def test_an_output_without_samples_is_known_by_its_size() -> None:
    # Samples of 3 and 5 positions, 2 features: padded to 5 together. A table of 4 × 4 biases has
    # no samples in it, nor has one of biases between all positions.
    one = {"layer": 6, "table": 16, "biases": 9}
    other = {"layer": 10, "table": 16, "biases": 25}
    both = {"layer": 20, "table": 16, "biases": 25}
    assert coupling.without_samples(one, other, both) == ["table", "biases"]
    assert coupling.without_samples(other, one, both) == ["table", "biases"]


@pytest.mark.parametrize(
    ("usable", "splittable", "micro_batch", "checkpointing"),
    [
        (100, True, 4, False),  # 80 of 92
        (80, True, 4, True),  # 40 of 73.6, where 80 are too many
        (40, True, 2, True),  # 10 + 30 / 2 of 36.8
        (20, True, 1, True),  # 10 + 30 / 4 of 18.4
        (5, True, 1, True),  # nothing helps: it is tried
        (40, False, 4, True),
    ],
)
def test_the_first_attempt_is_one_that_should_fit(
    usable: float, splittable: bool, micro_batch: int, checkpointing: bool
) -> None:
    wanted = Fit(micro_batch=4, checkpointing=False, formats=3)
    found = fit.first_fit(
        wanted,
        weights=10,
        kept=80,
        recomputed=40,
        usable=usable,
        splittable=lambda: splittable,
    )
    assert found == Fit(micro_batch=micro_batch, checkpointing=checkpointing, formats=3)


def test_a_guess_of_too_little_memory_changes_no_score(
    tiny: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_fused(tiny, INT8)
    first = engine._Engine._first_pass

    def short(self: Any) -> Any:
        what = first(self)
        kept, recomputed = self._peaks
        assert recomputed < kept
        return replace(what, fit=self._guess(what.fit, 0.0, 0.9 * recomputed))

    monkeypatch.setattr(engine._Engine, "_first_pass", short)
    entry = run_fused(tiny, INT8)[INT8]
    assert entry.fit.checkpointing
    assert entry.fit.micro_batch < 4
    assert not entry.back_offs
    assert totals(entry) == pytest.approx(totals(whole[INT8]), rel=1e-5)


def test_out_of_memory_at_one_sample_splits_the_formats(
    reference: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_at(monkeypatch, {1})
    entries = run_fused(measurement(score_batch_size=1), INT8, FP8)
    for name, entry in entries.items():
        assert entry.back_offs == ["2 formats scored in two passes instead of one"]
        assert entry.fit.formats == 1
        assert totals(entry) == pytest.approx(totals(reference[name]), rel=1e-5)


def test_formats_of_a_later_pass_are_checked_against_stock_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out_of_memory_at(monkeypatch, {1})
    original = check.StockCheck.end

    def wrong_later(self: Any, scores: Any) -> None:
        if self._done:
            scores *= 1.01
        original(self, scores)

    monkeypatch.setattr(check.StockCheck, "end", wrong_later)
    with pytest.raises(LayersenseError, match=r"format \w+: the fused engine scores"):
        run_fused(measurement(score_batch_size=1), INT8, FP8)


def test_out_of_memory_turns_checkpointing_on(
    tiny: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_fused(tiny, INT8)
    out_of_memory_at(monkeypatch, {5})
    entry = run_fused(replace(tiny, score_batch_size=1), INT8)[INT8]
    assert entry.fit.checkpointing
    assert entry.back_offs == [
        "activations recomputed in the backward pass (gradient checkpointing)"
    ]
    assert totals(entry) == pytest.approx(totals(whole[INT8]), rel=1e-5)


def test_out_of_memory_with_nothing_to_reduce_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out_of_memory_at(monkeypatch, {1})
    with pytest.raises(LayersenseError, match=r"sample 1, of 1 positions, .*2.50 GiB more"):
        run_fused(measurement(score_batch_size=1), INT8)


@pytest.mark.parametrize("bound", ["INT8_DYNAMIC", "INT8_BLOCKS"])
def test_a_range_that_belongs_to_the_batch_is_never_split(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (bound, FP8)
    whole = run_fused(measurement(), *names)
    out_of_memory_at(monkeypatch, {1})
    entries = run_fused(measurement(), *names)
    assert entries[FP8].fit.micro_batch == 2
    assert entries[bound].fit.micro_batch == 4
    for name in names:
        assert totals(entries[name]) == pytest.approx(totals(whole[name]), rel=1e-5)
    out_of_memory_at(monkeypatch, {1})
    with pytest.raises(LayersenseError, match="samples 1 to 4, of 1 positions each"):
        run_fused(measurement(), bound)


@pytest.mark.parametrize("task", [Normalised(), Toy(kind=Table)])
def test_a_batch_whose_samples_are_coupled_is_never_split(
    task: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_at(monkeypatch, {1})
    entries = run_fused(measurement(task), INT8, FP8)
    for entry in entries.values():
        assert entry.fit.micro_batch == 4
        assert entry.fit.formats == 1


class Counted(Sequence[Batch]):
    """Batches that count how often each is put together."""

    def __init__(self, batches: Sequence[Batch], made: Counter[tuple[int, int]]) -> None:
        self.batches, self.made = batches, made

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, int), "all of these would be in memory at once"
        self.made[self.batches[0].n_samples, index] += 1
        return self.batches[index]


@dataclass
class Counting(Toy):
    made: Counter[tuple[int, int]] = field(default_factory=Counter)

    def batches(self, *arguments: Any) -> Any:
        return Counted(super().batches(*arguments), self.made)


def test_each_batch_is_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Photographs that do not fit into memory are opened anew whenever their batch is asked for.
    task = Counting()
    run_fused(measurement(task, score_batch_size=3, calibration_batch_size=12), FP8)
    # The first one also tells how much memory a pass will take.
    assert {place: count for place, count in task.made.items() if place[0] == 3} == {
        (3, 0): 2, (3, 1): 1, (3, 2): 1
    }  # fmt: skip
    out_of_memory_at(monkeypatch, {1})
    task = Counting()
    run_fused(measurement(task, score_batch_size=6, calibration_batch_size=12), FP8)
    halves = {place: count for place, count in task.made.items() if place[0] == 3}
    assert halves == {(3, 0): 1, (3, 1): 1}  # the last three samples are a batch as they are


# --- the check of itself -----------------------------------------------------------------------


def test_a_disagreement_with_stock_stops_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    original = kernels.scores
    monkeypatch.setattr(kernels, "scores", lambda *arguments: original(*arguments) * 1.01)
    with pytest.raises(LayersenseError, match="ModelOpt's own forward gives"):
        run_fused(measurement(), INT8)


def test_the_kernel_clamps_and_keeps_what_is_not_finite() -> None:
    gradient = torch.tensor([2.0, -3e10, 1.0, 0.5])
    output = torch.tensor([1.0, 1.0, 2.0, 4.0])
    perturbed = torch.stack([output + 1, output, output + torch.tensor([0, 0, torch.nan, 0])])
    found = kernels.scores(gradient, perturbed, output)
    assert found[0].item() == pytest.approx(4 + 1e20 + 1 + 0.25)
    assert found[1].item() == 0
    assert torch.isnan(found[2])


def test_an_activation_that_is_not_finite_names_the_layer() -> None:
    rows = make_rows()
    rows[1] = (rows[1][0] * float("nan"), rows[1][1])
    with pytest.raises(LayersenseError, match="first: its input is not finite"):
        run_fused(measurement(calibration_rows=rows), INT8)
