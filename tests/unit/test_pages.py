"""HTML pages and figures as files: what they say, that they are one file, and inert."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from typing import get_args

import altair as alt
import msgspec
import pyarrow.parquet as pq
import pytest
import result_files as rf
import score_files as sf
import vl_convert
from PIL import Image
from result_files import FP8, INT4, INT8

from layersense import config
from layersense.errors import LayersenseError
from layersense.quantization.formats import grid_formats, resolve_format
from layersense.reports.charts import (
    MEASURED,
    PAPER,
    SMALL,
    UNDRAWN,
    VEGA_LITE,
    charts,
    datasets,
    on_paper,
    write_scripts,
)
from layersense.reports.html import write_page, write_scatter
from layersense.reports.index import index_context, write_index
from layersense.reports.measured import read_measured
from layersense.reports.overview import read_results, read_runs
from layersense.reports.page import inline_script, pack
from layersense.reports.result import Result, read_frontier, read_result, tail
from layersense.reports.text import size
from layersense.verification.plan import Role

FIGURES = {f"{name}.{kind}" for name in ("depth", "heatmap", "frontier") for kind in ("svg", "png")}


class Page(HTMLParser):
    """The text a reader sees, the tags, and the embedded JSON."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.json, self.attributes = [], [], {}, []
        self._inside, self._id = [], None
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("script", "style"):
            self._inside.append(tag)
            self._id = dict(attrs).get("id")

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()
            self._id = None

    def handle_data(self, data):
        if self._id:
            self.json[self._id] = json.loads(data)
        elif not self._inside:
            self.words.append(data)


@pytest.fixture(scope="session")
def scripts(tmp_path_factory):
    path = tmp_path_factory.mktemp("assets") / "vega.js"
    write_scripts(path)
    return path


@pytest.fixture
def templates(repository):
    return repository / "workflow" / "templates"


@pytest.fixture
def render(templates, scripts):
    def _render(place, frontier=True, verification=None, **options):
        write_page(
            place / "layers.parquet",
            config.Report(**options),
            templates / "report.html.j2",
            scripts,
            place / "report.html",
            place / "figures",
            place / "frontier.parquet" if frontier else None,
            verification,
        )
        return (place / "report.html").read_text()

    return _render


@pytest.fixture
def render_index(templates):
    def _render(folder, places):
        rf.write_tables(folder, places)
        write_index(
            folder / "runs.parquet",
            folder / "sensitivity.parquet",
            config.Report(),
            templates / "index.html.j2",
            folder / "index.html",
        )
        return (folder / "index.html").read_text()

    return _render


def test_the_page_answers_in_its_first_paragraph(tmp_path, render):
    text = Page(render(rf.write_result(tmp_path))).text
    top = text[: text.index("Findings")]
    assert "Quantize all 7 layer groups: 2 to INT4_BLOCKWISE_WEIGHT_ONLY, 5 to FP8" in top or (
        "Quantize all 7 layer groups:" in top
    )
    assert "Quantization hurts most in lm_head (51.8 % of all sensitivity)" in top
    for layer in ("layers.0.mlp.down_proj", "visual.patch_embed.proj"):
        assert layer in top
    assert "641 kB →" in top
    assert "at most 6 bits asked" in top
    assert "not measured" in top
    assert "0 of 7" in top
    assert re.search(r"95 %: [\d.e-]+ to [\d.e-]+", top)
    assert "Nothing that speaks against these numbers was detected." in top


def test_zeros_are_explained_where_the_reader_begins(tmp_path, render):
    scores = sf.make_scores()
    scores.dataset.modality = "text"
    sf.set_reached(scores, "model.visual", "not_called")
    source = render(rf.write_result(tmp_path, scores, quant_formats=[FP8], effective_bits=11))
    text = Page(source).text
    top = text[: text.index("Sensitivity along the depth")]
    assert "3 groups have no score, because the loss never reached them (all of vision)" in top
    assert "text alone, so the vision tower never ran" in top
    assert "Read the warnings before you rely on it" in top


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path, render):
    page = Page(render(rf.write_result(tmp_path)))
    loading = {name: value for name, value in page.attributes if name in ("src", "srcset", "data")}
    assert loading == {}
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    hrefs = [value for name, value in page.attributes if name == "href"]
    assert hrefs == ["../../index.html"]
    policy = next(value for _, value in page.attributes if value and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_without_a_frontier_there_is_none(tmp_path, render):
    place = rf.write_result(tmp_path)
    page = Page(render(place, frontier=False))
    assert set(page.json["data"]["charts"]) == {"depth", "heatmap"}
    assert "What other budgets would cost" not in page.text
    assert f"{INT4.removesuffix('_ALL_LAYERS_CFG')} wherever allowed (7 groups)" in page.text


def test_table_holds_every_group_and_its_details(tmp_path, render):
    page = Page(render(rf.write_result(tmp_path)))
    table = page.json["data"]["table"]
    rows = json.loads(table["arguments"]["data_json"])
    layer = table["columns"].index("Layer")
    order = sorted(sf.DAMAGE, key=lambda name: -sf.DAMAGE[name])
    assert [row[layer] for row in rows] == order
    assert [row[table["columns"].index("#")] for row in rows] == list(range(1, 8))
    share = table["columns"].index("Share, %")
    assert sum(row[share] for row in rows) == pytest.approx(100)
    handles = [entry["handle"] for entry in page.json["data"]["details"]]
    assert handles == [f"{name}.quant_recipe" for name in order]


def test_charts_hold_every_score_and_mark_what_is_none(tmp_path):
    scores = sf.make_scores()
    sf.set_reached(scores, "model.visual.blocks.0.attn", "no_gradient")
    for entry in scores.formats.values():
        group = entry.groups["model.visual.blocks.0.mlp.down_proj.quant_recipe"]
        group.batch_scores = [0.0] * 4
    scores.formats[FP8].groups["lm_head.quant_recipe"].batch_scores[0] = None
    place = rf.write_result(tmp_path, scores, effective_bits=12)
    rows = datasets(read_result(place / "layers.parquet"))["scores"]
    assert len(rows) == 7 * 3
    states = {(row["layer"], row["format"]): row["state"] for row in rows}
    assert states["model.visual.blocks.0.attn.qkv", FP8] == "not reached"
    assert states["model.visual.blocks.0.mlp.down_proj", INT4] == "zero"
    assert states["lm_head", FP8] == "not finite"
    assert states["lm_head", INT4] == "score"
    assert states["lm_head", "NONE"] == "none"
    for row in rows:
        assert (row["score"] is None) == (row["state"] != "score")
        if row["state"] == "score":
            assert 0 < row["low"] <= row["score"] <= row["high"]
    assert sum(row["worst"] for row in rows) == 7
    assert sum(row["selected"] for row in rows) == 7


def unpack(columns):
    lists = {
        name: [column["values"][code] for code in column["codes"]]
        if isinstance(column, dict)
        else column
        for name, column in columns.items()
    }
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def test_packed_rows_come_back():
    rows = [{"a": "x", "b": 1, "c": None}, {"a": "y", "b": 2, "c": 0.5}, {"a": "x", "b": 3, "c": 1}]
    assert unpack(pack(rows)) == rows
    assert pack([]) == {}


def test_equal_tables_give_equal_bytes(tmp_path, render, render_index):
    one, two = (rf.write_result(tmp_path / name) for name in ("one", "two"))
    assert render(one) == render(two)
    for name in FIGURES:
        assert (one / "figures" / name).read_bytes() == (two / "figures" / name).read_bytes()
    assert render_index(tmp_path / "one", [one]) == render_index(tmp_path / "two", [two])


def test_other_machines_give_the_same_page(tmp_path, render):
    """Seconds, memory and host are no part of the tables."""
    scores = sf.make_scores()
    for entry in scores.formats.values():
        entry.environment["host"] = "elsewhere"
        entry.seconds = {"load": 99.0}
        entry.peak_memory_bytes = 7
    one = rf.write_result(tmp_path / "one")
    two = rf.write_result(tmp_path / "two", scores)
    assert render(one) == render(two)


def test_figures_are_pictures(tmp_path, render):
    place = rf.write_result(tmp_path)
    render(place)
    assert {file.name for file in (place / "figures").iterdir()} == FIGURES
    for name in FIGURES:
        file = place / "figures" / name
        if name.endswith(".svg"):
            root = ET.parse(file).getroot()
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert not [node for node in root.iter() if node.tag.endswith(("script", "image"))]
        else:
            with Image.open(file) as image:
                assert image.width > 900


def test_hostile_names_are_inert_in_html_and_svg(tmp_path, render, render_index):
    plain = Page(render(rf.write_result(tmp_path / "plain", quant_formats=[FP8, INT4])))
    place = rf.write_result(tmp_path / "hostile", rf.hostile_scores())
    source = render(place, title=rf.HOSTILE)
    page = Page(source)
    for tag in ("script", "style", "h1", "h2", "a"):
        assert page.tags.count(tag) == plain.tags.count(tag), tag
    assert "\x1b" not in source
    assert "\u202e" not in source
    assert "alert(1)" in page.text
    index = render_index(tmp_path / "hostile", [place])
    assert Page(index).tags.count("script") == 4
    assert "\x1b" not in index
    for file in (place / "figures").glob("*.svg"):
        text = file.read_text()
        ET.fromstring(text)
        assert "<script" not in text
        assert "\x1b" not in text


def test_scripts_cannot_end_early():
    source = 'a = "</script><!-- x";'
    assert inline_script(source) == 'a = "<\\/script><\\!-- x";'


def test_charts_are_valid_and_on_paper_without_variables(tmp_path):
    """Altair makes them unchecked, which is faster; here it checks them."""
    place = rf.write_result(tmp_path)
    result, frontier = (
        read_result(place / "layers.parquet"),
        read_frontier(place / "frontier.parquet"),
    )
    measured = read_measured(rf.write_verification(place), "mix", result.formats)
    specs = charts(result, frontier, measured)
    assert list(specs) == ["depth", "heatmap", "frontier", "measured"]
    large = rf.write_result(tmp_path, rf.large_scores(SMALL + 1, 2), run="large",
                            quant_formats=["FORMAT_00_ALL_LAYERS_CFG"])  # fmt: skip
    specs["blocks"] = charts(read_result(large / "layers.parquet"))["heatmap"]
    for spec in specs.values():
        alt.LayerChart.from_dict(spec, validate=True)
        text = json.dumps(on_paper(spec))
        assert "var(--" not in text
        assert PAPER.font in text
        json.loads(text)


PAIRS = [
    "W4A16_INT4", "W4A8_INT4_FP8", "W4A8_INT4_INT8", "W4A4_INT4_INT4", "W4A4_INT4_FP4",
    "W4A16_FP4", "W4A8_FP4_FP8", "W4A8_FP4_INT8", "W4A4_FP4_INT4", "W4A4_FP4_FP4",
    "W8A16_FP8", "W8A8_FP8_FP8", "W8A8_FP8_INT8", "W8A4_FP8_INT4", "W8A4_FP8_FP4",
    "W8A16_INT8", "W8A8_INT8_FP8", "W8A8_INT8_INT8", "W8A4_INT8_INT4", "W8A4_INT8_FP4",
]  # fmt: skip
"""The grid of pairs as a reader wants it: by bits, then by weight type, wide activations first."""


def place_of_pairs(folder, groups, extra=()):
    formats = [resolve_format(name, {}) for name in (*grid_formats(), *extra)]
    described = {f.name: (f.effective_bits, f.weight_format, f.act_format) for f in formats}
    scores = rf.large_scores(groups, described, blocks=groups)
    return rf.write_result(folder, scores, run=f"of{groups}", quant_formats=list(described),
                           effective_bits=6)  # fmt: skip


def drawn(result, name, width):
    """Return a chart's texts with their places, and how many cells it has, as it is drawn."""
    spec = {**on_paper(charts(result)[name]), "datasets": datasets(result), "width": width}
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    texts = re.findall(r"<text[^>]*?translate\(([-\d.]+),([-\d.]+)\)[^>]*>([^<]+)<", svg)
    marks = re.findall(r'<g class="mark-rect role-mark[^>]*[^/]>(.*?)</g>', svg, re.DOTALL)
    cells = sum(part.count("<path") for part in marks)
    return {text: (float(x), float(y)) for x, y, text in texts}, cells


def test_the_page_says_what_is_proven_of_the_choice_and_what_noise_could_flip(tmp_path, render):
    scores = sf.make_scores(formats=(FP8, INT8))
    for handle, group in scores.formats[INT8].groups.items():
        # The same damage as FP8 but for noise, so that nothing tells the two apart.
        noise = [1.02, 0.97, 1.03, 0.98]
        own = scores.formats[FP8].groups[handle].batch_scores
        group.batch_scores = [value * factor for value, factor in zip(own, noise, strict=True)]
    place = rf.write_result(tmp_path, scores, quant_formats=[FP8, INT8],
                            effective_bits=11, cost_excluded=["*visual*"])  # fmt: skip
    manifest = json.loads((place / "manifest.json").read_text())
    state, text = manifest["autoquant_state"], Page(render(place)).text
    assert "No other choice within this budget is predicted to do better" in text
    before, after = (size(state[f"checkpoint_bytes{end}"]) for end in ("_before", ""))
    assert f"better. The whole checkpoint, with what was never searched, goes from {before}" in text
    assert f"to {after}. The bits asked for" in text
    assert "weights, of which the choice takes" in text
    assert "layers that match *visual* do not count" in text
    flips = {h: g["flips_to"] for h, g in manifest["layer_sensitivity"].items() if g["flips_to"]}
    assert flips
    assert read_result(place / "layers.parquet").about.flips == flips
    assert "lies within the noise of the scores, for" in text
    assert "Behind by at most" in text
    plain = Page(render(rf.write_result(tmp_path / "plain"))).text
    assert "noise of the scores, for" not in plain
    assert "of which the choice takes" not in plain


def test_every_role_of_a_measured_recipe_is_drawn_or_left_to_the_table(tmp_path):
    assert {*MEASURED, *UNDRAWN} == {*get_args(Role)}
    place = rf.write_result(tmp_path, kv_cache="fp8")
    result, frontier = (
        read_result(place / "layers.parquet"),
        read_frontier(place / "frontier.parquet"),
    )
    measured = read_measured(rf.write_verification(place), "mix", result.formats)
    (alone,) = (row for row in measured.recipes if row["role"] == "cache")
    assert alone["kl"] > 0
    drawn = {row["label"] for row in datasets(result, frontier, measured)["recipes"]}
    assert "mix" in drawn
    assert alone["label"] not in drawn


def test_the_grid_of_pairs_is_legible_for_a_small_model(tmp_path, render):
    longest = "W8A8_FP8_FP8_WCHANNEL_ATOKEN"
    place = place_of_pairs(tmp_path, 12, extra=[longest])
    result = read_result(place / "layers.parquet")
    assert [name for name in result.formats if name != longest] == PAIRS
    # On a telephone the chart is as wide as it must be, and its own frame scrolls.
    width = int(re.search(r'id="chart-heatmap" style="min-width: (\d+)px', render(place))[1])
    texts, cells = drawn(result, "heatmap", width)
    assert cells == 12 * 21
    columns = [texts[name][0] for name in result.formats]  # KeyError: a label is cut short
    assert columns == sorted(columns)
    across = [math.sin(math.radians(60)) * (b - a) for a, b in pairwise(columns)]
    assert min(across) > 11  # the size of a label's letters
    rows = sorted(texts[label][1] for label in result.labels.values())
    assert len(rows) == 12
    assert min(b - a for a, b in pairwise(rows)) > 11


def test_the_grid_of_pairs_is_legible_for_a_large_model(tmp_path, render, monkeypatch):
    place = place_of_pairs(tmp_path, SMALL + 4)
    result = read_result(place / "layers.parquet")
    page = Page(render(place))
    assert {"heatmap", "blocks"} < set(page.json["data"]["charts"])
    texts, cells = drawn(result, "heatmap", 390)
    assert cells == len(PAIRS) * (SMALL + 4)
    rows = [texts[name][1] for name in PAIRS]
    assert min(b - a for a, b in pairwise(rows)) > 11
    assert "language" in texts
    # Where there are more layers than columns they share columns, and all are in one.
    monkeypatch.setattr("layersense.reports.charts.COLUMNS", 16)
    assert drawn(result, "heatmap", 390)[1] == len(PAIRS) * 16
    spec = json.dumps(charts(result)["heatmap"])
    assert "worst of groups" in spec
    assert "floor(datum.order / 4)" in spec


def test_many_formats_do_not_make_a_long_table_of_baselines(tmp_path, render):
    place = place_of_pairs(tmp_path, 12)
    page = Page(render(place))
    assert "everywhere" in page.text
    assert "with the head kept" not in page.text.split("W4A16_INT4 everywhere")[1]
    assert "Of 20 formats, the chart and frontier.parquet alone hold" in page.text


def test_measured_recipes_stand_where_the_median_ratio_puts_them(tmp_path):
    """Every group does twice its score and damages add up, so that all ratios are 2."""
    place = rf.write_result(tmp_path)
    result, frontier = (
        read_result(place / "layers.parquet"),
        read_frontier(place / "frontier.parquet"),
    )
    measured = read_measured(rf.write_verification(place), "mix", result.formats)
    rows = datasets(result, frontier, measured)
    assert {row["kind"] for row in rows["recipes"]} >= {"this recipe", "random, at its bits"}
    (own,) = (row for row in rows["recipes"] if row["kind"] == "this recipe")
    assert own["shares"] == next(r["shares"] for r in rows["frontier"] if r["kind"] == own["kind"])
    for row in rows["recipes"]:
        if row["kind"] != "random, at its bits":
            assert row["kl"] == pytest.approx(2 * row["predicted"], rel=0.01)
    domains = []

    def walk(node):
        if isinstance(node, dict):
            if node.get("type") == "log":
                domains.append(tuple(node["domain"]))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(charts(result, frontier, measured)["frontier"])
    left, right = sorted(set(domains))
    assert [b / a for a, b in zip(left, right, strict=True)] == pytest.approx([2, 2], rel=0.01)
    assert left[0] < min(row["low"] for row in rows["frontier"])
    assert right[1] > max(row["high"] for row in rows["recipes"])


def test_scatter_holds_what_was_measured_alone_and_keeps_zeros(tmp_path, render):
    place = rf.write_result(tmp_path)
    zero = "lm_head.quant_recipe"
    verification = rf.write_verification(
        place, scale=lambda handle, format: 0.0 if handle == zero else 3.0
    )
    page = Page(render(place, verification=verification))
    rows = unpack(page.json["data"]["datasets"]["singles"])
    assert len(rows) == 7 * 2
    for row in rows:
        assert row["positive"] == (row["layer"] != "lm_head")
        assert row["kl"] == pytest.approx(6 * row["score"] if row["positive"] else 0, rel=0.01)
        assert not row["positive"] or row["kl_low"] <= row["kl"] <= row["kl_high"]
    said = unpack(page.json["data"]["datasets"]["correlations"])
    # Of 7 groups the most damaging does none: ranks 1 to 6 and 7 against 2 to 7 and 1.
    rho = 1 - 6 * (6 * 1 + 36) / (7 * 48)
    (text,) = (row["text"] for row in said if row["format"] == FP8 and row["subsystem"] == "")
    assert text.startswith(f"ρ {rho:.2f} (")
    assert text.endswith(", 7 × FP8")
    write_scatter(place / "layers.parquet", verification, place / "figures")
    figures = {file.name for file in (place / "figures").iterdir()}
    assert figures == FIGURES | {"measured.svg", "measured.png"}
    svg = (place / "figures" / "measured.svg").read_text()
    assert f"ρ {rho:.2f}" in "".join(ET.fromstring(svg).itertext())


def test_a_page_of_a_run_that_is_not_verified_has_no_scatter(tmp_path, render):
    page = Page(render(rf.write_result(tmp_path)))
    assert "measured" not in page.json["data"]["charts"]
    assert ("id", "chart-measured") not in page.attributes
    assert "Hollow marks" not in page.text


def test_a_large_model_gets_blocks_and_stays_small(tmp_path, render):
    scores = rf.large_scores(1000, 16)
    names = list(scores.formats)
    place = rf.write_result(tmp_path, scores, quant_formats=names, effective_bits=6)
    page = Page(render(place))
    assert (place / "report.html").stat().st_size <= 5_000_000
    assert "Blocks × kinds of layers" in page.text
    assert len(page.json["data"]["details"]) == 1000 > SMALL
    assert len(unpack(page.json["data"]["datasets"]["scores"])) == 1000 * 17
    assert not any(name.startswith("FORMAT_") for name in page.json["data"]["table"]["columns"])


def test_a_model_without_any_score_has_a_page(tmp_path, render):
    scores = sf.make_scores()
    for prefix in ("model", "lm_head"):
        sf.set_reached(scores, prefix, "not_called")
    text = Page(render(rf.write_result(tmp_path, scores, effective_bits=16))).text
    assert "Leave all 7 layer groups unquantized." in text
    assert "7 groups have no score" in text


def test_foreign_manifests_have_a_page(tmp_path, render, shared_data):
    from layersense.manifests.tables import write_layers

    for manifest in sorted((shared_data / "manifests").glob("*.json")):
        place = tmp_path / manifest.stem
        write_layers(manifest, place / "layers.parquet")
        page = Page(render(place, frontier=False))
        assert "Unknown: another program wrote this manifest." in page.text


def test_a_broken_table_template_or_part_is_named(tmp_path, render, scripts, templates):
    place = rf.write_result(tmp_path)
    (place / "frontier.parquet").write_bytes((place / "layers.parquet").read_bytes())
    with pytest.raises(LayersenseError, match=r"frontier\.parquet: has other columns"):
        read_frontier(place / "frontier.parquet")
    template = tmp_path / "x.html.j2"
    arguments = (place / "layers.parquet", config.Report(), template, scripts)
    for text, problem in (
        ("{{ nothing }}", r"x\.html\.j2.*'nothing' is undefined"),
        ("a\n{% if %}", r"x\.html\.j2, line 2"),
        ("{{ script('gone.js') }}", r"gone\.js: cannot be read"),
    ):
        template.write_text(text)
        with pytest.raises(LayersenseError, match=problem):
            write_page(*arguments, tmp_path / "out.html", tmp_path / "figures")
    (place / "layers.parquet").write_bytes(b"x")
    with pytest.raises(LayersenseError, match="cannot be read as a table"):
        render(place)


def test_frontier_joins_the_table(tmp_path):
    place = rf.write_result(tmp_path)
    result = read_result(place / "layers.parquet")
    frontier = read_frontier(place / "frontier.parquet")
    (chosen,) = [point for point in frontier.points if point.kind == "scheme"]
    assert frontier.recipe(chosen) == {group.handle: group.selected for group in result.groups}
    assert chosen.damage == pytest.approx(result.about.state.score)
    assert chosen.bytes == pytest.approx(result.total.after)


def test_alternatives_by_hand(tmp_path):
    result = read_result(
        rf.write_result(tmp_path, exclude=["lm_head"], effective_bits=10) / "layers.parquet"
    )
    by_name = {other.name: other for other in result.alternatives}
    others = {name: value for name, value in sf.DAMAGE.items() if name != "lm_head"}
    weights = {name: sf.MODULES[name][1] for name in sf.MODULES}
    fp8 = by_name[FP8]
    assert fp8.groups == 6
    assert fp8.damage == pytest.approx(sum(others.values()) * 1.005)
    expected = sum(weights[name] for name in others) + 2 * weights["lm_head"]
    assert fp8.after == pytest.approx(expected)
    assert fp8.bits == pytest.approx(8 * expected / sum(weights.values()))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lm_head", "lm_head"),
        ("model.language_model.layers.0.self_attn.q_proj", "…layers.0.self_attn.q_proj"),
        ("class_labels_classifier.layers.0", "…ss_labels_classifier.layers.0"),
        ("x" * 40, "…" + "x" * 29),
    ],
)
def test_labels_keep_the_end_of_a_name(name, label):
    assert tail(name) == label


def test_labels_are_unique(tmp_path):
    long = "z" * 40
    modules = {f"{prefix}.{long}": ([f"{prefix}.{long}"], 64) for prefix in ("a", "b")}
    scores = sf.make_scores(modules, dict.fromkeys(modules, 1.0), (FP8,))
    place = rf.write_result(tmp_path, scores, quant_formats=[FP8], effective_bits=9)
    result: Result = read_result(place / "layers.parquet")
    assert set(result.labels.values()) == set(modules)


def test_index_shows_and_compares(tmp_path, render_index):
    places = [
        rf.write_result(tmp_path, scheme="a"),
        rf.write_result(tmp_path, scheme="b", quant_formats=[FP8], effective_bits=9),
        rf.write_result(tmp_path, run="other", scheme="a"),
    ]
    page = Page(render_index(tmp_path, places))
    data = page.json["data"]
    assert [entry["name"] for entry in data["results"]] == ["demo / a", "demo / b", "other / a"]
    for entry in data["results"]:
        assert (tmp_path / entry["link"]).parent.is_dir()
        assert entry["strip"].startswith("data:image/png;base64,")
        assert entry["top"][0] == "lm_head"
    assert set(data["pairs"]) == {"0-1", "0-2", "1-2"}
    assert data["pairs"]["0-2"]["correlation"] == 1
    assert data["pairs"]["0-2"]["changed"] == []
    assert data["pairs"]["0-1"]["changed_count"] > 0
    assert "3 reports of 2 runs on 1 model" in page.text
    (columns,) = data["table"]["arguments"]["columnDefs"]
    hidden = [data["table"]["columns"][index] for index in columns["targets"]]
    assert hidden == ["Asked", "Model", "Data", "Method", "Measured KL"]  # the same in every row


def test_findings_travel_in_the_table_alone(tmp_path, render):
    """A page needs its tables and nothing else: no manifest, no scores."""
    place = rf.write_result(tmp_path)
    (place / "manifest.json").unlink()
    page = Page(render(place))
    about = read_result(place / "layers.parquet").about
    assert about is not None
    assert msgspec.to_builtins(about)["model"]["name"] in page.text


@pytest.mark.parametrize("rows", [1, 20, 30, 1 << 16])
def test_results_are_read_one_by_one_however_they_are_grouped(tmp_path, monkeypatch, rows):
    places = [rf.write_result(tmp_path, run=run, scheme=scheme)
              for run, scheme in (("a", "x"), ("a", "y"), ("b", "x"))]  # fmt: skip
    monkeypatch.setattr("layersense.manifests.tables.ROW_GROUP", rows)
    rf.write_tables(tmp_path, places)
    found = list(read_results(tmp_path / "sensitivity.parquet"))
    assert [(result.run, result.scheme) for result in found] == [("a", "x"), ("a", "y"), ("b", "x")]
    for result, place in zip(found, places, strict=True):
        assert result.groups == read_result(place / "layers.parquet").groups


def test_a_result_may_go_on_in_the_next_row_group(tmp_path):
    place = rf.write_result(tmp_path)
    whole = pq.read_table(place / "layers.parquet")
    pq.write_table(whole, tmp_path / "sensitivity.parquet", row_group_size=4)
    (found,) = read_results(tmp_path / "sensitivity.parquet")
    assert found.groups == read_result(place / "layers.parquet").groups


def test_imported_results_are_marked_and_lead_nowhere(tmp_path):
    place = rf.write_result(tmp_path)
    rf.write_tables(tmp_path, [place])
    (row,) = read_runs(tmp_path / "runs.parquet", [])
    results = read_results(tmp_path / "sensitivity.parquet")
    context = index_context([{**row, "imported": "g1"}], results, config.Report())
    (entry,) = context["results"]
    assert (entry["link"], entry["name"]) == (None, "demo / mix (imported)")
