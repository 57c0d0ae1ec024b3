"""Versions and hardware that stand in every measurement."""

import importlib.metadata
import platform
import resource
import socket
import sys

import torch

PACKAGES = {
    "layersense": "layersense",
    "torch": "torch",
    "modelopt": "nvidia-modelopt",
    "transformers": "transformers",
}


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return versions, device name and host; ``host`` is the only volatile key."""
    environment = {name: _version(package) for name, package in PACKAGES.items()}
    environment["python"] = platform.python_version()
    environment["host"] = socket.gethostname()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment["device"] = properties.name
        environment["compute_capability"] = f"{properties.major}.{properties.minor}"
        environment["cuda"] = str(torch.version.cuda)
    else:
        environment["device"] = f"CPU ({platform.machine()})"
    return environment


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the last reset: of the fullest GPU, or the process on a CPU."""
    if device.type == "cuda":
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A job that finds the package by PYTHONPATH has no metadata of it.
        from layersense import __version__

        return __version__ if package == "layersense" else "unknown"
