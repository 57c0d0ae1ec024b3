"""Make the picture of a report that the README shows, from a finished demo.

``python benchmarks/screenshot.py`` opens the demo's ``report.html`` in Chromium (Debian:
``apt-get install chromium``) and photographs its top, down to the chart along depth, into
``docs/images/report.png``.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = "results/demo.image-text/int4_fp8_all_layers/report.html"
PICTURE = REPOSITORY / "docs/images/report.png"
WIDTH = 1280
LAST = "#chart-depth"
"""What the picture ends with."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]


def main() -> None:
    """Open, photograph, write."""
    report = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / REPORT
    chromium = shutil.which("chromium")
    if not report.is_file() or not chromium:
        raise SystemExit(f"needs Chromium and {report}: run `make demo` first")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto(report.resolve().as_uri())
        page.wait_for_function("document.documentElement.dataset.ready === 'yes'")
        bottom = page.evaluate(
            f"document.querySelector('{LAST}').getBoundingClientRect().bottom + scrollY"
        )
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": round(bottom) + 12}
        shot = page.screenshot(full_page=True, clip=clip)
        browser.close()
    # 256 colours a third of the size; the method that keeps the rare ones, or the points fade.
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    image.save(PICTURE, optimize=True)
    print(f"{PICTURE}: {image.size}, {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
