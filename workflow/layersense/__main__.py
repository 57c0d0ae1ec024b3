"""``python -m layersense``: what the rules call."""

from layersense.cli import main

main()
