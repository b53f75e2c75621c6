"""Describe this machine for scripts/gpu-check as one line of JSON, and fail if hookx cannot be imported.

python -m gpu_check.machine DIR        DIR is a folder on the disk to measure
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_check.limits import disk

HOOKX = ("hookx.run.run", "hookx.cli.app", "hookx.check.verify")


def describe(folder: Path) -> dict[str, Any]:
    """Import all that the steps need, and ask it about this machine."""
    import PIL
    import torch
    import torchvision

    for module in HOOKX:
        import_module(module)
    machine: dict[str, Any] = {
        **{"gpu": "", "torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__},
        **{"python": platform.python_version(), "system": platform.platform(), "cpu": cpu_name()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk bytes per second": disk(folder, 0.1)["bytes_per_second"],
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "gpu bytes": properties.total_memory,
            "driver": driver_version(),
            "cuda": torch.version.cuda or f"none, HIP {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return machine


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, text=True, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def main() -> int:
    """Print the description."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the disk to measure")
    print(json.dumps(describe(parser.parse_args().folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
