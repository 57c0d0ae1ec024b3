"""Size and speed of the pages: one large report, its time in Chromium, and 64 reports.

``python benchmarks/pages.py`` makes synthetic results in a temporary folder and prints a table.
"""

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests/unit"), str(REPOSITORY / "workflow")]

import result_files as rf  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

TEMPLATES = REPOSITORY / "workflow/templates"
REPEATS = 3


def layersense(*arguments: str) -> float:
    """Run a command of layersense in a process of its own; return its seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "layersense", *arguments], check=True)
    return time.perf_counter() - start


def processor_seconds() -> float:
    """Return what all processes so far that have ended took of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def page(place: Path, scripts: Path) -> float:
    """Render one report with its figures; return the seconds."""
    return layersense(
        "page", "--layers", str(place / "layers.parquet"), "--settings", "{}",
        "--frontier", str(place / "frontier.parquet"),
        "--template", str(TEMPLATES / "report.html.j2"), "--scripts", str(scripts),
        "--out", str(place / "report.html"), "--figures", str(place / "figures"),
    )  # fmt: skip


def in_browser(report: Path) -> tuple[float, float]:
    """Return the seconds to load a report and to filter it by a subsystem."""
    chromium = shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page()
        start = time.perf_counter()
        tab.goto(report.as_uri())
        tab.wait_for_function("document.documentElement.dataset.ready === 'yes'")
        loaded = time.perf_counter() - start
        start = time.perf_counter()
        tab.fill("#all-groups input[type=search]", "down_proj")
        tab.wait_for_function("location.hash.includes('down_proj')")
        tab.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        filtered = time.perf_counter() - start
        browser.close()
    return loaded, filtered


def main() -> None:
    """Make, render, open, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scripts = folder / "vega.js"
        bundle = layersense("scripts", "--out", str(scripts))
        scores = rf.large_scores(1000, 16)
        large = rf.write_result(
            folder, scores, run="large", quant_formats=list(scores.formats), effective_bits=6
        )
        seconds = statistics.median(page(large, scripts) for _ in range(REPEATS))
        size = (large / "report.html").stat().st_size
        times = [in_browser(large / "report.html") for _ in range(REPEATS)]
        small = rf.large_scores(300, 3)
        places = [
            rf.write_result(folder, small, run=f"run{index:02d}", quant_formats=list(small.formats))
            for index in range(64)
        ]
        one = statistics.median(page(places[0], scripts) for _ in range(REPEATS))
        start, before = time.perf_counter(), processor_seconds()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda place: page(place, scripts), places))
        all_pages = time.perf_counter() - start
        busy = processor_seconds() - before
        rf.write_tables(folder, places)
        index = layersense(
            "index", "--runs", str(folder / "runs.parquet"), "--settings", "{}",
            "--sensitivity", str(folder / "sensitivity.parquet"),
            "--template", str(TEMPLATES / "index.html.j2"), "--out", str(folder / "index.html"),
        )  # fmt: skip
        index_size = (folder / "index.html").stat().st_size
    print("| what | figure |\n| --- | ---: |")
    print(f"| chart library bundled, once for all pages, s | {bundle:.1f} |")
    print(f"| one report of 300 groups × 3 formats with figures, s | {one:.1f} |")
    print(f"| one report of 1,000 groups × 16 formats with figures, s | {seconds:.1f} |")
    print(f"| … its size, MB | {size / 1e6:.1f} |")
    print(f"| … loaded in Chromium, s | {statistics.median(t for t, _ in times):.1f} |")
    print(f"| … searched in Chromium, s | {statistics.median(t for _, t in times):.2f} |")
    print(f"| 64 reports of 300 × 3 with figures, two at a time, s | {all_pages:.0f} |")
    print(f"| … half of their processor time, s | {busy / 2:.0f} |")
    print(f"| the index of these 64, with 2,016 comparisons, s | {index:.1f} |")
    print(f"| … its size, MB | {index_size / 1e6:.1f} |")


if __name__ == "__main__":
    main()
