"""Checkpoints to deploy: what can be written, writing it, checking what was written."""
