"""Formats, layer names and the ModelOpt configs made from them."""
