"""Make the picture of a report that the README shows, from a finished demo.

``python benchmarks/screenshot.py`` renders the demo's Markdown as GitHub does and photographs it
with Chromium (Debian: ``apt-get install chromium``) into ``docs/images/report.png``. Sections that
do not fit are left out, and long tables cut, each with a line that says so.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image, ImageChops

REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = "results/demo.image-text/int4_fp8_all_layers/layer-sensitivity-report.md"
PICTURE = REPOSITORY / "docs/images/report.png"
LEFT_OUT = ("Recipe", "Most damage for each MB saved", "Provenance")
ROWS = 12
WIDTH = 1640
STYLE = """
body { font: 17px/1.5 "Liberation Sans", sans-serif; color: #1f2328; margin: 28px 36px; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em; margin: 20px 0 14px; }
h1 { font-size: 2em; margin-top: 0; } h2 { font-size: 1.5em; } p, ul, table { margin: 0 0 14px; }
table { border-collapse: collapse; font-size: 14px; white-space: nowrap; }
td, th { border: 1px solid #d1d9e0; padding: 5px 9px; }
tr:nth-child(2n) td { background: #f6f8fa; } thead:not(:has(th:not(:empty))) { display: none; }
code { font: 85% "Liberation Mono", monospace; background: #818b981f; padding: .2em .4em;
       border-radius: 6px; } td code, th code { white-space: nowrap; }
.cut { color: #59636e; font-style: italic; }
"""


def shorten(markdown: str) -> str:
    """Leave out sections and the ends of long tables; say what is missing."""
    kept = []
    for section in re.split(r"(?m)^(?=## )", markdown):
        title = section.partition("\n")[0].removeprefix("## ")
        if title not in LEFT_OUT:
            kept.append(cut_table(section))
    return "\n".join(kept) + f"\n<p class='cut'>… and the sections {', '.join(LEFT_OUT)}.</p>\n"


def cut_table(section: str) -> str:
    """Keep the header and the first rows of a section's table."""
    lines = section.rstrip().split("\n")
    rows = [index for index, line in enumerate(lines) if line.startswith("|")][2:]
    for index in reversed(rows[ROWS:]):
        del lines[index]
    more = len(rows) - ROWS
    note = f"\n\n<p class='cut'>… {more} more rows</p>\n" if more > 0 else ""
    return "\n".join(lines) + note + "\n"


def main() -> None:
    """Render, photograph, trim."""
    report = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / REPORT
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not report.is_file() or not chromium:
        raise SystemExit(f"needs Chromium and {report}: run `make demo` first")
    body = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(shorten(report.read_text(encoding="utf-8")))
    )
    page = f"<!doctype html><meta charset='utf-8'><style>{STYLE}</style><body>{body}"
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        html, shot = Path(folder) / "report.html", Path(folder) / "report.png"
        html.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        size = f"--window-size={WIDTH},2600"
        command = [chromium, *flags, size, f"--screenshot={shot}", html.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(shot).convert("RGB")
    blank = Image.new("RGB", image.size, "white")
    bottom = ImageChops.difference(image, blank).getbbox()[3]
    cropped = image.crop((0, 0, image.width, min(bottom + 24, image.height)))
    cropped.quantize(64, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {cropped.size}, {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
