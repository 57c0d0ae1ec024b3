"""The Markdown reports, read as their reader would."""

import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import result_files as rf
import score_files as sf
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from layersense import config
from layersense.errors import LayersenseError
from layersense.manifests.imports import import_manifest, write_import
from layersense.manifests.read import read_own_manifest
from layersense.manifests.schema import encode_manifest, plain_name
from layersense.manifests.tables import write_layers, write_runs, write_sensitivity
from layersense.recipes.decide import build_manifest
from layersense.recipes.frontier import write_frontier
from layersense.reports.markdown import MAX_COMPARED, write_report, write_summary
from layersense.reports.overview import heat, text_strip
from layersense.reports.result import read_result
from layersense.reports.text import bits, code, escape, number, percent, render, size
from layersense.scoring.scores import Layer
from layersense.verification.table import verification_table

FP8, INT8, INT4 = sf.FORMATS
REPORT = "layer-sensitivity-report.md.j2"


@pytest.fixture
def templates(repository):
    return repository / "workflow" / "templates"


def prepare(folder, scores=None, run="demo", scheme="mix", **keys):
    keys = {"quant_formats": [FP8, INT4], "effective_bits": 6, **keys}
    manifest = build_manifest(scores or sf.make_scores(), run, scheme, config.Scheme(**keys), {})
    path = folder / run / scheme / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_manifest(manifest))
    write_layers(path, path.with_name("layers.parquet"))
    write_frontier(path, path.with_name("frontier.parquet"))
    return path


def summary(folder, templates, verifications=()):
    """The page of all results whose tables lie in ``folder``."""
    write_summary(
        folder / "runs.parquet",
        folder / "sensitivity.parquet",
        config.Report(),
        templates / "summary.md.j2",
        folder / "summary.md",
        verifications,
    )
    return (folder / "summary.md").read_text()


def report(folder, templates, scores=None, options=None, **keys):
    manifest = prepare(folder, scores, **keys)
    out = manifest.with_name("report.md")
    options = options or config.Report()
    write_report(
        manifest,
        manifest.with_name("layers.parquet"),
        manifest.with_name("frontier.parquet"),
        options,
        templates / REPORT,
        out,
    )
    return out.read_text()


def tables(text):
    """Every table of a Markdown text: under its heading, header and rows as lists of cells."""
    found, heading, rows = {}, "", None
    cell = None
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type == "inline" and cell == "heading":
            heading = token.content
        elif token.type == "inline" and rows is not None:
            rows[-1].append(token.content)
        cell = "heading" if token.type == "heading_open" else None
        if token.type == "table_open":
            rows = []
            found.setdefault(heading, []).append(rows)
        elif token.type == "tr_open" and rows is not None:
            rows.append([])
        elif token.type == "table_close":
            rows = None
    return found


def test_report_answers_what_its_reader_asks(tmp_path, templates):
    text = report(tmp_path, templates)
    top = text[: text.index("## Findings")]
    assert re.search(r"\*\*Quantize all 7 layer groups: \d to `INT4\S+` and \d to `FP8", top)
    assert "641 kB" in top  # 320,256 weights of two bytes
    assert "at most 6 bits asked" in top
    assert "No other choice within this budget is predicted to do better." in top
    assert "Nothing that speaks against these numbers" in top
    for word in ("`./tiny-vlm`", "image_text", "ModelOpt | 0.47.0", "16 of them scored"):
        assert word in top
    order = [line for line in text.splitlines() if line.startswith("## ")]
    assert order == [
        "## Findings",
        "## Recipe",
        "## Other budgets",
        "## By subsystem",
        "## Most damage for each MB saved",
        "## All layer groups by sensitivity",
        "## Provenance",
    ]
    assert "keep the full handle" in text


def test_other_budgets_show_the_choice_the_baselines_and_the_knee(tmp_path, templates):
    text = report(tmp_path, templates)
    ((header, *rows),) = tables(text)["Other budgets"]
    labels = [row[0] for row in rows]
    assert "**mix, at most 6 effective bits**" in labels
    assert f"{INT4} everywhere" in labels
    assert f"{FP8} with the head kept" in labels
    assert sum("(the knee)" in label for label in labels) == 1
    found = [float(row[header.index("Bits")]) for row in rows]
    assert found == sorted(found)
    assert found[0] == 4.125
    assert found[-1] == 16
    # The best recipe of its bits is behind nothing; the head is too sensitive for INT4.
    behind = {row[0]: row[header.index("Behind by")] for row in rows}
    assert behind["**mix, at most 6 effective bits**"] == "0.0 %"
    assert float(behind[f"{FP8} with the head kept"].removesuffix(" %")) > 0


def test_a_budget_in_gb_is_told_in_gb(tmp_path, templates):
    # 400,000 parameters of 4 bytes, 320,256 of them searched; 8 bits take a quarter of these.
    text = report(tmp_path, templates, quant_formats=[FP8], effective_bits=None, size_gb=0.0008)
    assert "(at most 0.000800 GB asked" in " ".join(text.split())
    assert "goes from 1.60 MB to" in " ".join(text.split())
    ((header, *rows),) = tables(text)["Other budgets"]
    used = {row[0]: row[header.index("GB")] for row in rows}
    assert float(used["**mix, at most 0.0008 GB**"]) <= 0.0008
    everywhere = (400_000 - 320_256) * 4 + 320_256
    assert float(used[f"{FP8} everywhere"]) == pytest.approx(everywhere / 1e9, rel=5e-3)
    ((header, *_),) = tables(report(tmp_path, templates, run="bits"))["Other budgets"]
    assert "GB" not in header


def test_choices_within_the_noise_are_named(tmp_path, templates):
    scores = sf.make_scores(formats=(FP8, INT8))
    for handle, group in scores.formats[INT8].groups.items():
        # The same damage as FP8 but for noise, so that nothing tells the two apart.
        noise = [1.02, 0.97, 1.03, 0.98]
        group.batch_scores = [
            value * factor
            for value, factor in zip(
                scores.formats[FP8].groups[handle].batch_scores, noise, strict=True
            )
        ]
    text = report(tmp_path, templates, scores, quant_formats=[FP8, INT8], effective_bits=11)
    assert "which lies within the noise of the scores, for:\n`" in text
    clear = report(tmp_path / "clear", templates)
    assert "within the noise" not in clear


def test_table_of_all_groups_is_sorted_and_without_none(tmp_path, templates):
    ((header, *rows),) = tables(report(tmp_path, templates))["All layer groups by sensitivity"]
    assert header[5:7] == [f"`{INT4}`", f"`{FP8}`"]
    names = [row[1].split("`")[1] for row in rows]
    assert names == sorted(sf.DAMAGE, key=lambda name: -sf.DAMAGE[name])
    assert rows[0][5:7] == ["16.1 ± 0.716", "2.01 ± 0.0896"]
    assert "quant_recipe" not in "".join(names)
    assert all(len(row) == len(header) for row in rows)


def test_totals_by_subsystem_add_up(tmp_path, templates):
    ((header, *rows),) = tables(report(tmp_path, templates))["By subsystem"]
    weights = [int(row[header.index("Weights")].replace(",", "")) for row in rows]
    assert [row[0] for row in rows] == ["vision", "language", "head"]
    assert weights == [66304, 122880, 131072]
    shares = [float(row[header.index("Share of sensitivity")].removesuffix(" %")) for row in rows]
    assert shares == [14.5, 33.7, 51.8]


def test_short_tables_follow_the_option(tmp_path, templates):
    text = report(tmp_path, templates, options=config.Report(top=3, title="Friday"))
    ((_, *rows),) = tables(text)["Most damage for each MB saved"]
    assert len(rows) == 3
    per_mb = {
        name: value * 8 / (sf.MODULES[name][1] * (16 - 4.125) / 8e6)
        for name, value in sf.DAMAGE.items()
    }
    expected = sorted(per_mb, key=lambda name: -per_mb[name])[:3]
    assert [row[0].strip("`") for row in rows] == expected
    assert text.startswith("# Friday: tiny-vlm, mix\n")


def test_zeros_are_explained(tmp_path, templates):
    scores = sf.make_scores()
    scores.dataset.modality = "text"
    sf.set_reached(scores, "model.visual", "not_called")
    text = report(tmp_path, templates, scores, quant_formats=[FP8], effective_bits=11)
    assert "text alone, so the vision tower never ran" in text[: text.index("## Recipe")]
    assert "Read the warnings before you rely on it" in text
    ((_, *rows),) = tables(text)["All layer groups by sensitivity"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "–", "–", "–"]
    assert [row[5] for row in rows[4:]] == ["not reached"] * 3
    assert "3 groups (the calibration data never ran it): `model.visual" in text


def test_many_formats_do_not_make_a_wide_table(tmp_path, templates, monkeypatch):
    names = [f"FORMAT_{index}" for index in range(6)]
    monkeypatch.setattr(sf, "FORMATS", {name: (4.0 + i, "x", "y") for i, name in enumerate(names)})
    monkeypatch.setattr(sf, "FACTORS", {name: 8.0 - i for i, name in enumerate(names)})
    scores = sf.make_scores(formats=names)
    text = report(tmp_path, templates, scores, quant_formats=names)
    ((header, *rows),) = tables(text)["All layer groups by sensitivity"]
    assert len(header) == 9
    assert rows[0][5].startswith("16.1 ±")


HOSTILE = "a|b`c`<script>alert(1)</script>\n# x\x1b[31m‮ [l](javascript:x) *b* \\"


def test_hostile_names_are_inert(tmp_path, templates):
    name = f"model.layers.0.{HOSTILE}"
    scores = sf.make_scores(
        {**sf.MODULES, name: ([name], 1024)}, {**sf.DAMAGE, name: 9.0}, formats=(FP8,)
    )
    scores.layers["unsearched"] = Layer(module_type="X", n_weights=1, reason=HOSTILE)
    scores.model.architecture = scores.dataset.source = scores.model.id = HOSTILE
    scores.formats[FP8].environment["gpu"] = HOSTILE
    plain = report(tmp_path, templates, run="plain", quant_formats=[FP8], effective_bits=9)
    text = report(
        tmp_path,
        templates,
        scores,
        options=config.Report(title=HOSTILE),
        quant_formats=[FP8],
        effective_bits=9,
    )
    html = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert "<script" not in html
    assert "<a " not in html
    assert "\x1b" not in text
    assert "‮" not in text
    harmless = MarkdownIt("gfm-like", {"linkify": False}).render(plain)
    for tag in ("<h1", "<h2", "<table"):
        assert html.count(tag) == harmless.count(tag)
    for rows in (rows for section in tables(text).values() for rows in section):
        assert len({len(row) for row in rows}) == 1
    ((_, first, *_),) = tables(text)["All layer groups by sensitivity"]
    assert "alert(1)" in first[1]


@given(st.text(max_size=60))
def test_escaped_text_reads_as_it_was(text):
    visible = " ".join(escape(text).split())
    html = MarkdownIt("gfm-like", {"linkify": False, "html": True}).renderInline(visible)
    assert not re.search(r"<(?!/?(br))", html)
    back = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    back = back.replace("&amp;", "&")
    kept = "".join(char if char.isprintable() else " " for char in text)
    assert "".join(back.split()) == "".join(kept.split())


@given(st.text(max_size=60))
def test_code_stays_in_one_cell(text):
    page = f"| a | b |\n| --- | --- |\n| {code(text)} | end |\n"
    (((_, row),),) = tables(page).values()
    assert row[1:] == ["end"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (1, "1.00"), (16.083, "16.1"), (0.012345, "0.0123"),
        (12345.6, "12,300"), (0.99999, "1.00"), (1e-7, "1.00e-07"), (2.5e9, "2.50e+09"),
        (-3.14159, "-3.14"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_sizes_bits_and_shares():
    assert [size(value) for value in (6885404672, 1.5e6, 640512, 12)] == [
        "6.89 GB",
        "1.50 MB",
        "641 kB",
        "12.0 bytes",
    ]
    assert [bits(value) for value in (4.125, 8.0, 10.99881, None)] == ["4.125", "8", "10.999", "–"]
    shares = [percent(value) for value in (0.5, 0.0, 1e-5, None)]
    assert shares == ["50.0 %", "0.0 %", "< 0.1 %", "–"]


def test_equal_inputs_give_equal_reports(tmp_path, templates):
    one = report(tmp_path / "one", templates)
    assert one == report(tmp_path / "two", templates)


def test_machine_and_time_stand_in_provenance_alone(tmp_path, templates):
    scores = sf.make_scores()
    for entry in scores.formats.values():
        entry.environment["host"] = "elsewhere"
        entry.seconds = {"load": 99.0}
        entry.peak_memory_bytes = 7
    one = report(tmp_path / "one", templates)
    two = report(tmp_path / "two", templates, scores)
    cut = one.index("## Provenance")
    assert one[:cut] == two[:cut]
    assert one[cut:] != two[cut:]


def test_summary_shows_models_and_schemes_side_by_side(tmp_path, templates, shared_data):
    manifests = [
        prepare(tmp_path, scheme="a"),
        prepare(tmp_path, scheme="b", quant_formats=[FP8], effective_bits=9),
    ]
    foreign = shared_data / "manifests" / "qwen2_5_vl_3b.fp8_autoquant_all_layers_fp8.json"
    write_layers(foreign, tmp_path / "foreign.parquet")
    tables_ = [*(path.with_name("layers.parquet") for path in manifests)]
    write_sensitivity([*tables_, tmp_path / "foreign.parquet"], tmp_path / "sensitivity.parquet")
    write_runs([*manifests, foreign], tmp_path / "runs.parquet")
    text = summary(tmp_path, templates)
    found = tables(text)
    figures, where, pairs = found["tiny-vlm"]
    assert [row[1] for row in figures[1:]] == [
        "[a](demo/a/layer-sensitivity-report.md)",
        "[b](demo/b/layer-sensitivity-report.md)",
    ]
    assert figures[1][figures[0].index("Quantized")] == "7 of 7"
    column = {name: place for place, name in enumerate(where[0])}
    shares = column["Where the sensitivity is"]
    assert where[1][shares] == "vision 14.5 %, language 33.7 %, head 51.8 %"
    most = where[1][column["Most sensitive layers"]]
    assert most.startswith("`lm_head`, `model.language_model.layers.0.mlp.down_proj`")
    # A step of the strip is 4/7 of a decade; the largest score is that of the last group.
    largest = max(sf.DAMAGE.values())
    steps = [
        round(7 + 7 / 4 * math.log10(value / largest))
        for value in (sf.DAMAGE[n] for n in sf.MODULES)
    ]
    strip = "".join("▁▂▃▄▅▆▇█"[step] for step in steps)
    assert where[1][column["Along depth"]] == f"`{strip}`"
    (pair,) = (dict(zip(pairs[0], row, strict=True)) for row in pairs[1:])
    assert (pair["A"], pair["B"]) == ("demo / a", "demo / b")
    assert (pair["Rank correlation"], pair["Layers in both"]) == ("1.00", "7")
    chosen = [
        {name: group.selected for name, group in read_own_manifest(path).layer_sensitivity.items()}
        for path in manifests
    ]
    assert int(pair["Choices that differ"]) == sum(
        plain_name(chosen[0][name]) != plain_name(chosen[1][name]) for name in chosen[0]
    )
    assert "the difference is within the noise" in pair[""]
    assert "unknown model" in found
    for links in re.findall(r"\]\((.+?)\)", text):
        folder = (tmp_path / links).parent
        assert folder.is_dir() or folder.parent.name == "qwen2_5_vl_3b"


def test_the_real_manifests_of_others_stand_beside_ours(tmp_path, templates, shared_data):
    """Through the importer, as the workflow does it; shares by the manifests' own text."""
    ours = prepare(tmp_path)
    files = sorted((shared_data / "manifests").glob("*.json"))
    assert len(files) == 2
    paths = [tmp_path / "imported" / f"{name}.json" for name in ("elder", "younger")]
    for file, path in zip(files, paths, strict=True):
        write_import(import_manifest(file, run=path.stem), path)
    write_sensitivity(
        [ours.with_name("layers.parquet"), *(path.with_suffix(".parquet") for path in paths)],
        tmp_path / "sensitivity.parquet",
    )
    write_runs([ours, *paths], tmp_path / "runs.parquet")
    text = summary(tmp_path, templates)
    assert "3 runs" in text
    found = tables(text)
    assert found["tiny-vlm"][0][1][1] == "[mix](demo/mix/layer-sensitivity-report.md)"
    (younger_model,) = set(found) - {"tiny-vlm", "unknown model"}
    assert younger_model.endswith("Qwen3-VL-4B-Instruct")
    expected = {
        "unknown model": ("elder", "fp8_autoquant_all_layers_fp8 (imported, g0)", "–"),
        younger_model: (
            "younger",
            "wfp8_aint8_autoquant_lm (imported, g3)",
            "vlm_coco2017_captions",
        ),
    }
    for file, (model, cells) in zip(files, expected.items(), strict=True):
        (header, figures), (_, where) = found[model]
        assert tuple(figures[:3]) == cells
        content = json.loads(file.read_text())
        asked = content["scheme"]["auto_quantize_bits"]
        assert figures[header.index("Bits, at most")] == bits(asked)
        groups = content["layer_sensitivity"]
        assert figures[header.index("Quantized")].endswith(f"of {len(groups)}")
        # The worst score of each group with a format, as a share of all of them.
        worst = {key: max(g["scores"]) for key, g in groups.items() if len(g["formats"]) > 1}
        seen = [s for name, s in worst.items() if "visual" in name and "merger" not in name]
        share = percent(sum(seen) / sum(worst.values())) if seen else "no score"
        assert f"vision {share}" in where[3].split(", ")
        most = max(worst, key=worst.__getitem__).removesuffix(".quant_recipe")
        assert where[4].startswith(f"`{most}`")


def test_many_results_of_a_model_are_left_to_the_page_that_compares(tmp_path, templates):
    count = MAX_COMPARED + 1
    places = [prepare(tmp_path, scheme=f"s{number:02d}").parent for number in range(count)]
    rf.write_tables(tmp_path, places)
    text = summary(tmp_path, templates)
    assert len(tables(text)["tiny-vlm"]) == 2
    assert f"These make {count * (count - 1) // 2} pairs" in text


def test_what_was_measured_stands_beside_what_is_predicted(tmp_path, templates):
    """Of a run that is verified, of one whose recipe breaks the model, and of one that is not."""
    places = [prepare(tmp_path, run=run, scheme="a").parent for run in ("broken", "demo", "plain")]
    verified = [rf.write_verification(place) for place in places[:2]]
    manifest = read_own_manifest(places[0] / "manifest.json")
    found = rf.measured([manifest], rf.VERIFY)
    for recipe in found.recipes.values():
        if recipe.recipe == manifest.recipe:
            recipe.damage.kl[1] = None
    pq.write_table(verification_table([manifest], found, rf.VERIFY), verified[0])
    rf.write_tables(tmp_path, places)

    def shown(*tables_of_runs):
        header, *rows = tables(summary(tmp_path, templates, tables_of_runs))["tiny-vlm"][0]
        return {row[0]: dict(zip(header, row, strict=True)) for row in rows}

    before, after = shown(), shown(*verified)
    assert {row["KL"] for row in before.values()} == {"–"}
    assert after["plain"] == before["plain"]
    (chosen,) = (row for row in pq.read_table(verified[1]).to_pylist() if row["role"] == "scheme")
    assert after["demo"]["KL"] == number(chosen["kl"])
    assert after["broken"]["KL"] == "–"
    assert "error" not in after["demo"]["Findings"]
    assert before["broken"]["Findings"] == before["demo"]["Findings"]
    assert after["broken"]["Findings"] == "1 error"


def test_strips_keep_zeros_floors_and_the_worst_of_a_cell(tmp_path):
    damage = {"a": 1.0, "b": 0.01, "c": 1e-9, "d": 1e-9, "e": 0.1, "f": 0.001}
    scores = sf.make_scores({name: ([name], 64) for name in damage}, damage, (FP8,))
    sf.set_reached(scores, "d", "not_called")
    place = prepare(tmp_path, scores, quant_formats=[FP8], effective_bits=12)
    result = read_result(place.with_name("layers.parquet"))
    assert heat(result, 6) == [0, pytest.approx(-2), -4, None, pytest.approx(-1), pytest.approx(-3)]
    assert heat(result, 3) == [0, -4, pytest.approx(-1)]
    assert text_strip([0, -4, None, -1]) == "█▁·▆"


def test_a_broken_template_or_table_is_named(tmp_path):
    template = tmp_path / "x.j2"
    template.write_text("a\n{{ nothing }}")
    with pytest.raises(LayersenseError, match=r"x\.j2.*'nothing' is undefined"):
        render(template, {})
    template.write_text("a\n{% if %}")
    with pytest.raises(LayersenseError, match=r"x\.j2, line 2"):
        render(template, {})
    with pytest.raises(LayersenseError, match=r"no\.j2: cannot be read"):
        render(Path(tmp_path / "no.j2"), {})
    manifest = prepare(tmp_path)
    manifest.with_name("layers.parquet").write_bytes(b"x")
    with pytest.raises(LayersenseError, match="cannot be read as a table"):
        write_report(
            manifest,
            manifest.with_name("layers.parquet"),
            manifest.with_name("frontier.parquet"),
            config.Report(),
            template,
            tmp_path / "o",
        )
