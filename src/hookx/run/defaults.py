"""The device, workers, batch size and memory format of a run for which the user names none.

Rules choose them, not measurements: on a busy machine these differ, and the same command would store other bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hookx.errors import UsageError
from hookx.run.cores import count_usable_cores

# On the CPU, a batch has 16 images of up to 256 x 256 pixels, or fewer larger images with as many pixels: every worker
# holds one in memory. Below 16, convolutions spend noticeable time on the layout of their weights. Batches are smaller
# for a short list, so that every worker has work, and for large activations, because touching fresh memory is slow: 4
# or 8 images then, which divide a shard.
_BATCH_ON_CPU, _BATCH_ON_CPU_PX, _BATCHES_ON_CPU, _SMALL_BATCH_ON_CPU = 16, 16 * 256 * 256, 16, 4
_BATCH_ON_CPU_BYTES = 32 * 2**20
_BATCH_ON_GPU = 64
_COLOURS = 3


def choose_device(name: str) -> torch.device:
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
            f"invalid --device '{name}': this machine has {', '.join(present)}", "or let hookx choose: --device auto"
        )
    return torch.device(name)


def choose_workers(workers: int | None, device: torch.device, cores: int | None = None) -> int:
    """Return how many worker processes to start: on the CPU they compute, too; beside a GPU they only decode."""
    if workers is not None:
        return workers
    cores = count_usable_cores() if cores is None else cores
    return cores if device.type == "cpu" else max(1, cores - 1)


def choose_batch_size(
    batch_size: int | str, device: torch.device, crop_px: int, image_count: int, bytes_per_image: int
) -> int:
    """Return the number of images in a forward pass.

    Example:
        >>> cpu, avgpool_bytes, conv1_bytes = torch.device("cpu"), 4 * 512, 4 * 64 * 112 * 112
        >>> runs = (224, 10_000, avgpool_bytes), (518, 10_000, avgpool_bytes), (224, 100, avgpool_bytes)
        >>> [choose_batch_size("auto", cpu, *run) for run in runs]
        [16, 3, 6]
        >>> choose_batch_size("auto", cpu, 224, 10_000, conv1_bytes)
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


def choose_memory_format(
    memory_format: str, convolutions: Iterable[nn.Conv2d], device: torch.device, precision: str
) -> str:
    """Return 'contiguous' (NCHW) or 'channels_last' (NHWC); the latter speeds up convolutions over overlapping windows.

    It does so in fp32 on a CPU and in half precision on a GPU. A transformer that cuts an image into patches has no
    such convolution. The first one, over red, green and blue, gains less than storing its output in NCHW costs.

    Args:
        convolutions: those that run up to the last requested layer.

    Example:
        >>> cpu = torch.device("cpu")
        >>> first, second = nn.Conv2d(3, 64, kernel_size=7, stride=2), nn.Conv2d(64, 64, kernel_size=3)
        >>> choose_memory_format("auto", [first, second], cpu, "fp32")
        'channels_last'
        >>> choose_memory_format("auto", [first], cpu, "fp32")
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
