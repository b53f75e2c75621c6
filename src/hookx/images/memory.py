"""How much memory an image takes while it is decoded, from its header, and how much there is."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

from PIL import Image

# Pillow keeps 4 bytes of a pixel in colour, before and after its conversion to RGB. Some decoders hold it otherwise
# first: OpenJPEG in four integers of 32 bits, libwebp and libavif whole, and once more as bytes;
# Pillow a PGM of 16 bits.
_BYTES_OF_A_PIXEL = {"JPEG2000": 24, "WEBP": 16, "AVIF": 20, "PPM": 16}
_OTHERWISE = 12
_ALWAYS_FITS_BYTES = 64 * 2**20  # Looking up what there is takes longer than decoding a small image.
_CGROUP, _CGROUP_1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


def needed_bytes(image: Image.Image) -> int:
    """Return about how many bytes an image that has been opened takes at most, at any time, to become RGB."""
    width, height = image.size
    return width * height * _BYTES_OF_A_PIXEL.get(image.format or "", _OTHERWISE)


def lacks_memory(image: Image.Image) -> str:
    """Return why an image that has been opened would not fit into the memory of this machine; '' if it would."""
    needed = needed_bytes(image)
    if needed <= _ALWAYS_FITS_BYTES or needed <= allowed_bytes():
        return ""
    width, height = image.size
    return f"{width} x {height} pixels take about {needed / 1e9:.1f} GB to decode, which is more than there is"


def allowed_bytes() -> int:
    """Return the memory that this process could have if nothing else ran, by the machine, its container and limits."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            limits.append(max(0, soft - _used_bytes()))
    return min([*limits, *_cgroup_limits()])


def _used_bytes() -> int:
    """Return how much address space this process has."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def _cgroup_limits() -> list[int]:
    """Return the limits of the control groups that hold this process, which are those of a container or a job."""
    if sys.platform != "linux":
        return []
    groups = [""]
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()  # 0::/path, or in version 1 4:cpu,memory:/path
        groups += [path for _, kinds, path in (line.split(":", 2) for line in lines) if kinds in ("", "memory")]
    limits = []
    for group in groups:
        inner = Path(group.lstrip("/"))
        for folder in (inner, *inner.parents):
            for file in (_CGROUP / folder / "memory.max", _CGROUP_1 / folder / "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # The file may say 'max'.
                    limits.append(int(file.read_text()))
    return limits
