"""Layer-by-layer quantization sensitivity with NVIDIA ModelOpt AutoQuant."""

__version__ = "0.1.0"
