"""Recipes on the real model: replayed, and measured against what was predicted (torch)."""
