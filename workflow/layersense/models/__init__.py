"""Checkpoints, tasks and the demo model."""
