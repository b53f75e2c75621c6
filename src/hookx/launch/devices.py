"""The devices of this host: what `--devices` names, and a worker for each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hookx.errors import UsageError
from hookx.launch.local import LocalWorker
from hookx.options import ExtractOptions
from hookx.run.defaults import count_usable_cores
from hookx.run.parts import count_shared_cores

_ON_CPU = "for the CPU, say how many processes: --devices cpu*4"


@dataclass(frozen=True)
class Device:
    """A device of this host, and how a process of its own sees it."""

    name: str  # as `--devices` names it: '0', or 'cpu' and its number
    option: str  # as `--device` names it in that process
    variables: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> LocalWorker:
        return LocalWorker(self.variables)


def devices_of(options: ExtractOptions, variables: Mapping[str, str] = os.environ) -> list[Device]:
    """Return the devices that `--devices` names; `UsageError` if one is absent, or named twice."""
    text = str(options.devices)
    if options.device != "auto":
        raise UsageError("--device and --devices exclude each other", "name all of them: --devices 0,1")
    if int(variables.get("LOCAL_WORLD_SIZE", "1") or 1) > 1:
        raise UsageError(
            "--devices starts a process for each device, and so does torchrun",
            "leave --devices out, or use no torchrun",
        )
    if match := re.fullmatch(r"cpu\*(\d{1,4})", text):
        if not int(match[1]):
            raise UsageError(f"invalid --devices '{text}': there must be at least 1", "as in --devices cpu*2")
        return [Device(f"cpu {number}", "cpu") for number in range(int(match[1]))]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        raise UsageError(f"invalid --devices '{text}': this machine has no GPU that torch can use", _ON_CPU)
    count = torch.accelerator.device_count()
    present = ", ".join(map(str, range(count)))
    numbers = list(range(count)) if text == "all" else []
    for word in [] if text == "all" else text.split(","):
        match = re.fullmatch(rf"\s*(?:{accelerator.type}:)?(\d{{1,4}})\s*", word)
        if match is None:
            raise UsageError(f"invalid --devices '{text}': write all, or numbers, as in 0,2,3", _ON_CPU)
        if int(match[1]) >= count:
            raise UsageError(f"invalid --devices '{text}': this machine has {present}")
        if int(match[1]) in numbers:
            raise UsageError(f"invalid --devices '{text}': {int(match[1])} is named twice")
        numbers.append(int(match[1]))
    if accelerator.type != "cuda":
        return [Device(str(number), f"{accelerator.type}:{number}") for number in numbers]
    # A process that sees one GPU alone makes no context on another. What this process sees may be a part of them.
    visible = [name.strip() for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = visible if len(visible) >= count else [str(number) for number in range(count)]
    return [Device(str(number), "cuda", {"CUDA_VISIBLE_DEVICES": names[number]}) for number in numbers]


def workers_each(options: ExtractOptions, devices: list[Device]) -> int:
    """Return how many processes decode for each device: an equal share of the cores, one of which runs the GPU."""
    if options.workers is not None:
        return options.workers
    share = count_shared_cores(count_usable_cores()) // len(devices)
    return max(1, share if devices[0].option == "cpu" else share - 1)
