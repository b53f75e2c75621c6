"""The versions that a bug report needs, without importing torch."""

from __future__ import annotations

import ctypes
import platform
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def versions() -> dict[str, str]:
    """Return the versions of hookx and its dependencies, the CUDA that torch was built for, and the devices here.

    Example:
        >>> list(versions())
        ['hookx', 'python', 'torch', 'torchvision', 'safetensors', 'pillow', 'CUDA']
    """
    packages = {name: version(name) for name in ("torch", "torchvision", "safetensors", "pillow")}
    return {"hookx": version("hookx-vision"), "python": platform.python_version(), **packages, "CUDA": _cuda()}


def _cuda() -> str:
    # Read torch/version.py as text: importing it would import all of torch.
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    built_for = re.search(r"^cuda\b.*= '(.+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    if not built_for:
        return "not in this torch"
    driver, devices = cuda_devices()
    if not devices:
        return f"{built_for[1]}, no device here"
    return f"{built_for[1]}, driver {driver}: {', '.join(devices)}"


def cuda_devices() -> tuple[str, list[str]]:
    """Return the newest CUDA that the driver can run, and the names of its devices.

    Source: https://docs.nvidia.com/cuda/cuda-driver-api
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "", []
    newest, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(newest)):
        return "", []
    names = []
    driver.cuDeviceGetCount(ctypes.byref(count))
    for number in range(count.value):
        driver.cuDeviceGetName(name, len(name), number)
        names.append(name.value.decode())
    return f"{newest.value // 1000}.{newest.value % 1000 // 10}", names
