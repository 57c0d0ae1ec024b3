"""What the README and the pages in docs/ promise: snippets, commands, links, generated tables."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.main import get_command

from layersense import config_docs
from layersense.cli import app
from layersense.quantization.formats import known_formats, resolve_format
from layersense.validation import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "config/README.md",
    "docs/concepts.md",
    "docs/export.md",
    "docs/formats.md",
    "docs/operations.md",
    "docs/tasks.md",
    "results/README.md",
]


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README that say ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> set[str]:
    """The words right after ``program`` in the README's code, if they are no options."""
    code = [*blocks(""), *re.findall(r"`([^`\n]+)`", README)]
    found = (re.findall(rf"^{program} ([a-z][a-z-]*)", text, re.MULTILINE) for text in code)
    return {word for words in found for word in words}


def anchors(markdown: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("snippet", blocks("yaml"))
def test_configs_are_valid(snippet: str) -> None:
    load_config(yaml.safe_load(snippet), "README.md", check_files=False)


def test_there_are_configs_for_own_data_and_own_formats() -> None:
    configs = [yaml.safe_load(snippet) for snippet in blocks("yaml")]
    assert any("images" in entry for config in configs for entry in config["datasets"].values())
    assert any(config.get("formats") for config in configs)


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python_snippets_compile(snippet: str) -> None:
    compile(snippet, "README.md", "exec")


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert {"demo", "test", "test-fast"} <= commands("make") <= targets


def test_commands_of_layersense_exist() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert {"init", "validate"} <= commands("layersense") <= known


def test_targets_of_snakemake_exist() -> None:
    snakefile = (REPOSITORY / "Snakefile").read_text()
    rules = set(re.findall(r"^ *rule (\w+):", snakefile, re.MULTILINE))
    assert {"reports", "tables"} <= commands("snakemake") <= rules


def test_environment_files_exist() -> None:
    named = set(re.findall(r"`(envs/[\w.]+)`", README))
    assert named
    assert all((REPOSITORY / name).is_file() for name in named)


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    source = REPOSITORY / page
    for link in re.findall(r"\]\(([^)\s]+)\)", source.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (source.parent / name).resolve() if name else source
        assert target.is_relative_to(REPOSITORY), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_picture_is_small_and_a_picture() -> None:
    (path,) = re.findall(r"!\[.*?\]\((.*?)\)", README)
    picture = REPOSITORY / path
    assert picture.stat().st_size < 300_000
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


def test_formats_page_is_what_the_registry_says() -> None:
    fix = "run `python -m layersense.config_docs`"
    assert config_docs.FORMATS.read_text(encoding="utf-8") == config_docs.formats(), fix


def test_every_format_on_the_page_can_be_used() -> None:
    page, aliases = config_docs.formats().partition("## Other names")[::2]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(known_formats())
    bits = {name: float(text) for name, _, text in rows}
    # By hand: 4 bits and 16 for each block of 128; 4 and 8 for each of 16; 6 and 8 for each of 32.
    assert bits["INT4_AWQ_ALL_LAYERS_CFG"] == 4.125
    assert bits["NVFP4_ALL_LAYERS_CFG"] == 4.5
    assert bits["MXFP6_ALL_LAYERS_CFG"] == 6.25
    for alias, name in re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", aliases, re.MULTILINE):
        assert resolve_format(alias, {}).name == name


def test_formats_page_names_every_config_of_modelopt() -> None:
    """Each `*_CFG` of ModelOpt's config module stands on the page, in whichever table."""
    from importlib.metadata import distribution

    source = distribution("nvidia-modelopt").locate_file("modelopt/torch/quantization/config.py")
    names = set(re.findall(r"^([A-Z0-9_]+_CFG)\b", Path(str(source)).read_text(), re.MULTILINE))
    assert len(names) > 20
    page = config_docs.formats()
    missing = {
        name
        for name in names
        if name not in page and name.replace("_CFG", "_ALL_LAYERS_CFG") not in page
    }
    assert missing == set()
