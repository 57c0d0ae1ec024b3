"""The pages where they are read: headless Chromium, offline, at two widths and in two themes."""

import csv
import io
import shutil
from urllib.parse import quote

import pytest
import result_files as rf
import score_files as sf
from result_files import FP8

from layersense import config
from layersense.reports.charts import write_scripts
from layersense.reports.html import write_page
from layersense.reports.index import write_index

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDTHS = (390, 1440)
THEMES = ("light", "dark")
POINTS = "#chart-depth .mark-symbol.role-mark path"
READY = "document.documentElement.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A context on a fresh user data directory."""
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("chromium")),
            executable_path=CHROMIUM,
            args=FLAGS,
            permissions=["clipboard-read", "clipboard-write"],
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory, repository):
    """A small study, a hostile one, text alone, a large model, and the index of all."""
    folder = tmp_path_factory.mktemp("site") / "results"
    captions = sf.make_scores()
    captions.dataset.modality = "text"
    sf.set_reached(captions, "model.visual", "not_called")
    large = rf.large_scores(300, 5)
    places = [
        rf.write_result(folder),
        rf.write_result(folder, rf.hostile_scores(), run="hostile"),
        rf.write_result(folder, captions, run="captions", quant_formats=[FP8], effective_bits=11),
        rf.write_result(folder, large, run="large", quant_formats=list(large.formats)),
    ]
    verified = rf.write_verification(places[0])
    rf.write_tables(folder, places)
    templates = repository / "workflow" / "templates"
    write_scripts(folder / "vega.js")
    for place in places:
        write_page(
            place / "layers.parquet",
            config.Report(title=rf.HOSTILE if place.parent.name == "hostile" else "Study"),
            templates / "report.html.j2",
            folder / "vega.js",
            place / "report.html",
            place / "figures",
            place / "frontier.parquet",
            verified if place == places[0] else None,
        )
        (place / "layer-sensitivity-report.md").write_text("# x\n")
    write_index(
        folder / "runs.parquet",
        folder / "sensitivity.parquet",
        config.Report(),
        templates / "index.html.j2",
        folder / "index.html",
        [verified],
    )
    (folder / "summary.md").write_text("# x\n")
    return folder


@pytest.fixture
def visit(browser, site):
    """Open a page of the site; afterwards fail on any console error or network request."""
    pages, problems = [], []

    def _visit(path, width=1440, theme="light", state=""):
        page = browser.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=theme)
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: note(request.url))
        page.goto((site / path).as_uri() + state)
        page.wait_for_function(READY)
        return page

    def note(url):
        if not url.startswith(("data:", "blob:", (site).as_uri())):
            problems.append(f"request: {url}")

    yield _visit
    for page in pages:
        page.close()
    assert problems == []


PAGES = [
    "demo/mix/report.html",
    "hostile/mix/report.html",
    "captions/mix/report.html",
    "large/mix/report.html",
    "index.html",
]


@pytest.mark.parametrize("path", PAGES)
def test_both_widths_and_themes_without_sideways_scroll_or_violations(visit, path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    grounds = set()
    for width in WIDTHS:
        for theme in THEMES:
            page = visit(path, width, theme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            violations = axe.Axe().run(page).response["violations"]
            serious = {
                found["id"]: [node["target"] for node in found["nodes"]][:3]
                for found in violations
                if found["impact"] in ("serious", "critical")
            }
            assert serious == {}, (width, theme)
    assert len(grounds) == 2


def rows(page, table="groups"):
    return page.locator(f"#{table} tbody tr").all_inner_texts()


def layers(page):
    return page.locator("#groups tbody td.name").all_inner_texts()


def heading(page, name):
    return page.locator("#groups").get_by_role("columnheader", name=f"{name}: ")


def points(page, chart="depth"):
    return page.locator(f"#chart-{chart} .mark-symbol.role-mark path").count()


def state(page):
    return page.evaluate("location.hash")


def until(page, part):
    """Wait until the URL says ``part``: DataTables sorts a moment after the click."""
    page.wait_for_function("(part) => location.hash.includes(part)", arg=part)


def test_selecting_a_subsystem_filters_charts_and_table(visit):
    page = visit(PAGES[0])
    assert len(layers(page)) == 7
    everywhere = points(page)
    page.select_option("#subsystem", "vision")
    assert set(layers(page)) == {name for name in sf.MODULES if "visual" in name}
    fewer = f"document.querySelectorAll({POINTS!r}).length < {everywhere}"
    page.wait_for_function(fewer)
    assert page.locator("#chart-heatmap .mark-rect.role-mark path").count() == 3 * 2
    assert state(page) == "#subsystem=vision"
    page.click("#reset")
    assert len(layers(page)) == 7
    assert state(page) == ""
    page.click("button[data-subsystem='head']")
    assert layers(page) == ["lm_head"]


def test_a_format_moves_the_points(visit):
    page = visit(PAGES[0])
    read = (
        "() => [...document.querySelectorAll('#chart-depth .mark-symbol.role-mark path')]"
        ".map((path) => path.getAttribute('transform')).join()"
    )
    before = page.evaluate(read)
    page.select_option("#format", FP8)
    page.wait_for_function(f"(before) => ({read})() !== before", arg=before)
    assert state(page) == f"#format={FP8}"


def test_a_large_models_grid_scrolls_in_its_own_frame_and_leads_to_groups(visit):
    page = visit("large/mix/report.html", width=390)
    cells = page.locator("#chart-heatmap .mark-rect.role-mark path")
    assert cells.count() == 300 * 5
    inside, frame = page.evaluate(
        "(() => { const frame = document.querySelector('#chart-heatmap').parentElement;"
        "return [frame.scrollWidth, frame.clientWidth]; })()"
    )
    assert inside > frame
    assert points(page, "blocks") == 0
    assert page.locator("#chart-blocks .mark-rect.role-mark path").count() > 100
    cells.nth(40).click(force=True)
    until(page, "search=")
    assert len(layers(page)) == 1


def test_a_point_leads_to_its_group(visit):
    page = visit(PAGES[0])
    page.locator("#chart-depth .mark-symbol.role-mark path").nth(2).click()
    until(page, "search=")
    assert len(layers(page)) == 1
    assert page.input_value("#all-groups input[type=search]") == layers(page)[0]


def test_search_sort_and_details(visit):
    page = visit(PAGES[0])
    assert layers(page) == sorted(sf.DAMAGE, key=lambda name: -sf.DAMAGE[name])
    page.fill("#all-groups input[type=search]", "mlp")
    assert len(layers(page)) == 3
    assert "search=mlp" in state(page)
    page.fill("#all-groups input[type=search]", "")
    heading(page, "Layer").click()
    until(page, "sort=2.asc")
    assert layers(page) == sorted(sf.MODULES, key=str.lower)
    heading(page, "Worst score").click()
    until(page, "sort=4.asc")
    heading(page, "Worst score").click()
    until(page, "sort=4.desc")
    assert layers(page)[0] == "lm_head"
    # A third click ends the sorting, and the URL says so: it is the view that a colleague gets.
    heading(page, "Worst score").click()
    page.wait_for_function("!location.hash.includes('sort')")
    ranked = sorted(sf.DAMAGE, key=lambda name: -sf.DAMAGE[name])
    assert layers(page) == layers(visit(PAGES[0], state=state(page))) == ranked
    button = page.locator("button.open").first
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    opened = page.locator("td.handle").inner_text()
    assert "lm_head.quant_recipe" in opened
    assert "2.01 ± 0.0896" in opened
    assert "the recipe takes this" in opened
    page.keyboard.press("Enter")
    assert page.locator("td.handle").count() == 0


def test_copy_as_csv(visit):
    page = visit(PAGES[0])
    page.fill("#all-groups input[type=search]", "language")
    page.get_by_role("button", name="Copy as CSV").click()
    page.locator(".dt-button-info").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    found = list(csv.DictReader(io.StringIO(copied)))
    assert [row["Layer"] for row in found] == sorted(
        (name for name in sf.MODULES if "language" in name), key=lambda name: -sf.DAMAGE[name]
    )
    assert found[0]["Handle"] == f"{found[0]['Layer']}.quant_recipe"
    assert float(found[0]["Worst score"]) == pytest.approx(8 * 1.005)


def test_the_url_shows_a_colleague_the_same(visit):
    page = visit(PAGES[0])
    page.select_option("#subsystem", "language")
    page.select_option("#format", FP8)
    page.fill("#all-groups input[type=search]", "mlp")
    heading(page, "Layer").click()
    until(page, "sort=2.asc")
    other = visit(PAGES[0], state=state(page))
    assert layers(other) == layers(page) != []
    assert state(other) == state(page)
    assert other.input_value("#subsystem") == "language"
    assert other.input_value("#format") == FP8
    assert points(other) == points(page)


@pytest.mark.parametrize("path", [PAGES[0], PAGES[-1]])
def test_a_url_that_makes_no_sense_does_no_harm(visit, path):
    wrong = "#subsystem=nowhere&format=%3Cscript%3E&sort=99.up&a=77&b=x&model=none"
    page = visit(path, state=wrong)
    assert len(rows(page, "groups" if "mix" in path else "reports")) > 1


def test_the_theme_can_be_changed(visit):
    page = visit(PAGES[0])
    ground = "getComputedStyle(document.body).backgroundColor"
    mark = (
        "getComputedStyle(document.querySelector('#chart-depth .mark-symbol.role-mark path')).fill"
    )
    light = page.evaluate(ground), page.evaluate(mark)
    page.click("#theme")
    dark = page.evaluate(ground), page.evaluate(mark)
    assert light[0] != dark[0]
    assert light[1] != dark[1]


def test_zeros_are_drawn_apart(visit):
    page = visit(PAGES[2])
    marks = page.locator("#chart-depth .mark-text.role-mark text").all_text_contents()
    assert marks == ["×"] * 3


def test_hostile_names_are_shown_and_do_nothing(visit):
    page = visit(PAGES[1])
    assert page.locator("script").count() == 5
    assert any("alert(1)" in text for text in layers(page))
    page.locator("button.open").first.click()
    assert "alert(1)" in page.locator("td.handle").inner_text()
    page.get_by_role("button", name="Copy as CSV").click()
    page.locator(".dt-button-info").wait_for()
    found = list(csv.DictReader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
    assert any("<script>alert(1)</script>" in row["Layer"] for row in found)


def test_keyboard_reaches_the_controls(visit):
    page = visit(PAGES[0])
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"theme", "subsystem", "format", "reset"} <= reached


@pytest.mark.parametrize("path", PAGES)
def test_pages_print(visit, path):
    page = visit(path, theme="dark")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    page.emulate_media(media="print", color_scheme="dark")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"


def test_index_links_lead_somewhere(visit, site):
    page = visit("index.html")
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert len(links) == 1 + 4
    for link in links:
        assert (site / link).is_file(), link
    report = visit(quote(links[1]))
    back = report.locator("nav a").get_attribute("href")
    assert (site / links[1]).parent.joinpath(back).resolve() == (site / "index.html").resolve()


def test_index_compares_two(visit):
    page = visit("index.html")
    assert "#a=" not in state(page)
    names = page.locator("#a option").all_inner_texts()
    one, two = names.index("demo / mix"), names.index("captions / mix")
    page.select_option("#a", str(one))
    page.select_option("#b", str(two))
    text = page.locator("#comparison").inner_text()
    assert "Rank correlation" in text
    assert "Layers with a score in both" in text
    assert "Choices that differ" in text
    assert "in A alone" in text
    other = visit("index.html", state=state(page))
    assert other.locator("#comparison").inner_text() == text
    page.select_option("#b", str(one))
    assert "Choose two different reports" in page.locator("#comparison").inner_text()


def test_a_third_click_ends_the_sorting_of_the_index(visit):
    page = visit("index.html")
    before = rows(page, "reports")
    for part in ("sort=0.asc", "sort=0.desc"):
        page.locator("#reports").get_by_role("columnheader", name="Scheme: ").click()
        until(page, part)
    page.locator("#reports").get_by_role("columnheader", name="Scheme: ").click()
    page.wait_for_function("!location.hash.includes('sort')")
    assert rows(page, "reports") == before


def test_measured_points_follow_the_controls(visit):
    page = visit(PAGES[0])
    marks = "#chart-measured .mark-symbol.role-mark path"
    assert page.locator(marks).count() == 7 * 2
    said = page.locator("#chart-measured .role-mark.mark-text").last.text_content()
    assert said.count("ρ") == 2
    page.select_option("#format", FP8)
    page.wait_for_function(f"document.querySelectorAll({marks!r}).length === 7")
    page.select_option("#subsystem", "vision")
    page.wait_for_function(f"document.querySelectorAll({marks!r}).length === 3")
    page.click("#reset")
    page.wait_for_function(f"document.querySelectorAll({marks!r}).length === 14")
    # Hollow marks on the frontier, beside the filled ones.
    assert page.locator("#chart-frontier path[fill='transparent']").count() > 0
    page.locator(marks).nth(3).click()
    until(page, "search=")
    assert len(layers(page)) == 1


def test_index_finds_a_model(visit):
    page = visit("index.html")
    everything = len(rows(page, "reports"))
    page.select_option("#model", "tiny-vlm")
    assert 0 < len(rows(page, "reports")) < everything
    assert state(page) == "#model=tiny-vlm"
