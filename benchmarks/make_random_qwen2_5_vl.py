"""Make a Qwen2.5-VL checkpoint of the real 3 B shape with random weights.

    python benchmarks/make_random_qwen2_5_vl.py OUT

Sensitivities of random weights mean nothing; seconds and memory are those of the real model.
"""

import sys
from pathlib import Path

from random_models import make_model


def main() -> None:
    """Write the checkpoint."""
    out = Path(sys.argv[1])
    model, processor = make_model("qwen2.5-vl-3b")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{out}: {count / 1e9:.2f} B parameters\n")


if __name__ == "__main__":
    main()
