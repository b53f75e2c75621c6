"""What a run uses where the user names nothing: device, workers, batch size, memory format. Rules, not measurements.

A measurement comes out differently on a busy machine, and then the same command would store other bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hookx.errors import UsageError
from hookx.run.cores import usable_cores

# On the CPU, a batch of 16 images of up to 256 x 256 pixels, and of as many pixels if they are larger: every worker has
# one in memory. Below 16, convolutions spend a noticeable time on the layout of their weights. A short list makes
# smaller ones, so that there is work for every worker, and so do large activations, whose memory takes its time when
# it is touched first: 4 or 8 then, which divide a shard.
_BATCH_ON_CPU, _BATCH_ON_CPU_PX, _BATCHES_ON_CPU, _SMALL_BATCH_ON_CPU = 16, 16 * 256 * 256, 16, 4
_BATCH_ON_CPU_BYTES = 32 * 2**20
_BATCH_ON_GPU = 64
_COLOURS = 3


def chosen_device(name: str) -> torch.device:
    """Turn 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' into a device; `UsageError` for one that is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    present = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if name not in present:
        raise UsageError(
            f"there is no device '{name}' here; there is: {', '.join(present)}", "or let hookx choose: --device auto"
        )
    return torch.device(name)


def chosen_workers(workers: int | None, device: torch.device) -> int:
    """Return how many worker processes there are: on the CPU they compute, too; beside a GPU they only decode."""
    if workers is not None:
        return workers
    return usable_cores() if device.type == "cpu" else max(1, usable_cores() - 1)


def chosen_batch_size(
    batch_size: int | str, device: torch.device, crop_px: int, image_count: int, bytes_per_image: int
) -> int:
    """Return how many images a forward pass takes.

    Example:
        >>> cpu, avgpool_bytes, conv1_bytes = torch.device("cpu"), 4 * 512, 4 * 64 * 112 * 112
        >>> runs = (224, 10_000, avgpool_bytes), (518, 10_000, avgpool_bytes), (224, 100, avgpool_bytes)
        >>> [chosen_batch_size("auto", cpu, *run) for run in runs]
        [16, 3, 6]
        >>> chosen_batch_size("auto", cpu, 224, 10_000, conv1_bytes)
        8
    """
    if batch_size == "auto":
        if device.type != "cpu":
            return _BATCH_ON_GPU
        by_count = max(_SMALL_BATCH_ON_CPU, image_count // _BATCHES_ON_CPU)
        by_bytes = max(_SMALL_BATCH_ON_CPU, _power_of_two(_BATCH_ON_CPU_BYTES // max(bytes_per_image, 1)))
        return max(1, min(_BATCH_ON_CPU, _BATCH_ON_CPU_PX // crop_px**2, by_count, by_bytes))
    return int(batch_size)


def _power_of_two(at_most: int) -> int:
    return 1 << (at_most.bit_length() - 1) if at_most else 0


def chosen_memory_format(
    memory_format: str, convolutions: Iterable[nn.Conv2d], device: torch.device, precision: str
) -> str:
    """Return 'contiguous' (NCHW) or 'channels_last' (NHWC): the latter for convolutions over overlapping windows.

    Those are what it makes faster: in fp32 on a CPU, in half precision on a GPU. A transformer that cuts an image into
    patches has none. A first convolution, of red, green and blue, gains less than it costs to store what it returns.

    Args:
        convolutions: those that run, up to the last layer asked for.

    Example:
        >>> cpu = torch.device("cpu")
        >>> first, second = nn.Conv2d(3, 64, kernel_size=7, stride=2), nn.Conv2d(64, 64, kernel_size=3)
        >>> chosen_memory_format("auto", [first, second], cpu, "fp32")
        'channels_last'
        >>> chosen_memory_format("auto", [first], cpu, "fp32")
        'contiguous'
    """
    if memory_format != "auto":
        return memory_format
    overlap = any(
        math.prod(convolution.kernel_size) > math.prod(convolution.stride)
        for convolution in convolutions
        if convolution.in_channels > _COLOURS
    )
    gains = device.type == "cpu" or (device.type == "cuda" and precision != "fp32")
    return "channels_last" if overlap and gains else "contiguous"
