"""Reports, rendered from manifests and tables alone."""
