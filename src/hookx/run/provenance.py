"""The software and hardware that made a shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch


@dataclass(frozen=True)
class Provenance:
    """How a shard was made, for its record."""

    versions: Mapping[str, str]  # of hookx, torch, the model's distribution and the decoder
    device: str
    batch_size: int  # images at once in the model

    @classmethod
    def of(cls, distribution: str, device: torch.device, batch_size: int) -> Provenance:
        """Describe this process and its device; `distribution` is the package that built the model."""
        versions = {
            "hookx": version("hookx-vision"),
            "torch": torch.__version__,
            distribution: version(distribution),
            "pillow": version("pillow"),
        }
        return cls(versions, device_name(device), batch_size)

    def to_json(self) -> dict[str, Any]:
        return {**self.versions, "device": self.device, "batch_size": self.batch_size}


def device_name(device: torch.device) -> str:
    """Name a device as a person knows it.

    Example:
        >>> device_name(torch.device("cpu"))
        'cpu'
    """
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
