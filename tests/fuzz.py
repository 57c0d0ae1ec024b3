"""Fuzz the readers of foreign files for a while, outside of the test suite.

``python tests/fuzz.py --minutes 10``, or ``make fuzz``: runs the tests whose names say "in a
sentence" again and again, each time from another seed and with many examples. Ends with 1 at the
first failure, with what provokes it; keep that as a test.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

UNIT = Path(__file__).resolve().parent / "unit"
FILES = ("test_foreign_files.py", "test_archives.py", "test_imports.py")
EXAMPLES = 1000


def main() -> int:
    """Run rounds until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    seed = options.seed
    while time.monotonic() < end:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--no-header",
            "-p",
            "no:cacheprovider",
        ]
        command += [str(UNIT / name) for name in FILES]
        command += ["-k", "sentence and (any or nearly)", f"--hypothesis-seed={seed}"]
        environment = {**os.environ, "LAYERSENSE_FUZZ": str(EXAMPLES)}
        if code := subprocess.run(command, env=environment).returncode:
            print(f"failed in the round of --seed {seed} (exit code {code})")
            return 1
        seed += 1
    print(f"{seed - options.seed} rounds of {EXAMPLES} examples for each reader: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
