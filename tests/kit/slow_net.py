"""A small net that takes as long for an image as the variable SLOW_SECONDS says; its activations are the same."""

from __future__ import annotations

import os
import time

from torch import Tensor, nn


class Net(nn.Module):
    """Sleep, convolve and pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(len(x) * float(os.environ.get("SLOW_SECONDS", "0")))
        return self.avgpool(self.conv(x)).flatten(1)
