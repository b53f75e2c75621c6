"""What a shard is made with: the software and the hardware, which its record names, and which a run can insist on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hookx.errors import HookxError
from hookx.plan import Plan
from hookx.run.defaults import describe_device, device_name
from hookx.run.ready import ReadyModel
from hookx.store.directory import present_shards
from hookx.store.location import Location
from hookx.store.record import read_record, version_of

_NOT_OF_A_KIND = ("batch_size", "nondeterministic", "reused")  # They differ within one kind of machine.


def describe_process(ready: ReadyModel, batch_size: int) -> dict[str, Any]:
    """Describe the software, the device and the batch size that make a shard, for its record."""
    distribution, nondeterministic, device = ready.loaded.distribution, ready.nondeterministic, ready.runner.device
    return {
        "hookx": version_of("hookx-vision"),
        "torch": torch.__version__,
        distribution: version_of(distribution),
        "pillow": version_of("pillow"),
        "device": device_name(device),
        **describe_device(device),
        **({"nondeterministic": ", ".join(nondeterministic)} if nondeterministic else {}),
        "batch_size": batch_size,  # Less if that was too much for a GPU.
    }


def kind_of(made: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return what decides the bits of a shard beside its plan: machines of one kind store the same."""
    return tuple((name, str(value)) for name, value in made.items() if name not in _NOT_OF_A_KIND)


def check_same_hardware(out: Location, begun: Plan, here: tuple[tuple[str, str], ...]) -> None:
    """Raise `HookxError` if this process is of another kind than the run was begun with."""
    there = begun.hardware
    if not there and (present := present_shards(out, begun)):  # It was begun without insisting on anything.
        there = kind_of(read_record(out, begun, present[0]).made)
    if there and there != here:
        differing = dict(set(there) ^ set(here))
        phrases = [
            f"{name} (there: {dict(there).get(name, 'none')}; here: {dict(here).get(name, 'none')})"
            for name in sorted(differing)
        ]
        raise HookxError(
            f"this machine is of another kind than the one that began {out}/: {', '.join(phrases)}",
            "its shards are left to the others; to compute them here all the same, leave out --same-hardware",
        )
