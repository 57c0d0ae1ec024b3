"""Manifests: schema, findings, reading those of others, Parquet tables."""
