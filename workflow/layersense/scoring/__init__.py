"""Measure the sensitivity of every layer group under every format of a run."""
