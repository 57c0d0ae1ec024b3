"""How tests provoke what a machine seldom does by itself.

Python runs a ``sitecustomize`` module that it finds on ``PYTHONPATH`` at its start, so a fault can
be put into the processes of a real workflow without a line of its code.
"""

import os
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

AFTER_IMPORT = """
import importlib.abc, importlib.util, sys

class Patcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            patch(module)
        spec.loader.exec_module = exec_module
        return spec

if "score" in sys.orig_argv:
    sys.meta_path.insert(0, Patcher())
"""


def injected(folder: Path, code: str, *, module: str | None = None) -> dict[str, str]:
    """Return the environment in which every Python process runs ``code`` at its start.

    With ``module``, the code defines ``patch(module)``, which scoring jobs call once they have
    imported it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = textwrap.dedent(code)
    if module is not None:
        text += f"\nMODULE = {module!r}\n{AFTER_IMPORT}"
    (folder / "sitecustomize.py").write_text(text)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount something on ``folder`` for as long as the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
