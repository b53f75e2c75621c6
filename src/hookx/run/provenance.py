"""The software and hardware that made a shard."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def provenance(distribution: str, device: torch.device, batch_size: int) -> dict[str, Any]:
    return {
        "hookx": version("hookx-vision"),
        "torch": torch.__version__,
        distribution: version(distribution),
        "pillow": version("pillow"),
        "device": device_name(device),
        "batch_size": batch_size,
    }
