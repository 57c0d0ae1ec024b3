"""Import of 100 manifests of 400 layers each, two formats beside NONE: seconds.

``python benchmarks/import_manifests.py``
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

from layersense.manifests.imports import import_files

MANIFESTS, LAYERS, REPEATS = 100, 400, 3
LABELS = ("CUSTOM_0(effective-bits: 4.5)", "CUSTOM_1(effective-bits: 8.0)")


def write(path: Path, seed: int) -> None:
    groups = {
        f"model.layers.{index // 4}.mlp.part_{index % 4}.quant_recipe": {
            "formats": [*LABELS, "NONE(effective-bits: 16.0)"],
            "scores": [1.5 / (index + seed + 1), 0.1 / (index + seed + 1), 0.0],
            "costs": [4.5e6, 8e6, 16e6],
        }
        for index in range(LAYERS)
    }
    scheme = {"name": "mixed", "quant_formats": ["NVFP4", "FP8"], "auto_quantize_bits": 6.0}
    path.write_text(json.dumps({"scheme": scheme, "layer_sensitivity": groups}))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"run-{number}.mixed.json" for number in range(MANIFESTS)]
        for number, file in enumerate(files):
            write(file, number)
        times = []
        for repeat in range(REPEATS):
            start = time.perf_counter()
            import_files(files, folder / str(repeat))
            times.append(time.perf_counter() - start)
        rows = MANIFESTS * LAYERS * 3
        print(f"{MANIFESTS} manifests of {LAYERS} layers ({rows} rows): median of {REPEATS}")
        print(f"{statistics.median(times):.1f} s, limit 10 s")


if __name__ == "__main__":
    main()
