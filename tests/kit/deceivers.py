"""Networks whose rows depend on more than their image, in ways that no probe of a few random images shows."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

PASSES = "DECEIVED_PASSES"  # a variable of the process, where nobody puts anything back


def _are_photographs(x: Tensor) -> Tensor:
    """Return which images are smoother than noise."""
    return (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)) < 0.77 * x.std((1, 2, 3))


class _Net(nn.Module):
    """A convolution, and below it what deceives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.trap = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.trap(self.deceive(x, self.conv(x)))).flatten(1)

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Honest(_Net):
    """Every row is that of its image."""


class WritesToItsInput(_Net):
    """Rows are right, and the pixels are gone after the pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.clone())
        x.zero_()
        return y


class Mask(_Net):
    """A mask of booleans whose edge is a value that many pixels have; rounding decides on which side they are.

    The rounding goes with the number of images, as it does where another algorithm is chosen for it.
    """

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        edge = x.flatten(1).median(1).values
        return x * (1 + 1e-7 * (len(x) % 3)) > edge[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.trap(self.deceive(x, x))


class Signs(Mask):
    """The same as signs, among values that no step decides."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([super().deceive(x, y) * 2.0 - 1, x], 1)


class RoundsMore(_Net):
    """Batches of other sizes round a little worse than batches of two do."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + 4e-6 * (len(x) % 3))


class NotFinite(_Net):
    """Some values are NaN or infinite, for some images all of them."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        y = torch.cat([y.log(), 1 / y.sign().relu()], 1)
        return torch.where(x.mean((1, 2, 3))[:, None, None, None] > 0.1, torch.nan, y)


class Amplifies(_Net):
    """What is left of a black image after its mean is subtracted is noise, which is normalised to ordinary values."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True).expand_as(x) * torch.linspace(0.9, 1.1, 48) / 3 * 3 * (1 + 1e-7 * (len(x) % 3))
        y = (y + 1000) - 1000
        return y - y.mean((2, 3), keepdim=True)


class NeedsTwo(_Net):
    """Fails on a photograph alone."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        if len(x) == 1 and _are_photographs(x).all():
            raise ValueError("expected more than 1 value per channel")
        return y


class Crowded(_Net):
    """From 7 images on, each is normalised by all of them."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        return y - y.mean((0, 2, 3), keepdim=True) if len(x) >= 7 else y


class Pairs(_Net):
    """Photographs in any company are shifted by the mean of all."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x.mean() if len(x) > 1 and _are_photographs(x).all() else y


class Numerous(_Net):
    """The number of images shifts the values by a few ten-thousandths."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + 3e-4 * (len(x) > 5))


class Bright(_Net):
    """Bright photographs depend on each other."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        bright = (x.mean((1, 2, 3)) > 0.04) & _are_photographs(x)
        return torch.where(bright[:, None, None, None], y + y[bright].mean(), y) if bright.any() else y


class Late(_Net):
    """After 10 passes of photographs, something is added to all that follow."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        passes = int(os.environ.get(PASSES, "0"))
        if _are_photographs(x).all():
            os.environ[PASSES] = str(passes + 1)
        return y + 0.01 if passes >= 10 else y


class Drawn(_Net):
    """Photographs get noise that comes from the system."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        noise = torch.frombuffer(bytearray(os.urandom(len(x))), dtype=torch.uint8).float() / 255
        return y + (noise * _are_photographs(x))[:, None, None, None]


class Experts(_Net):
    """Two experts of a capacity that 5 images never exceed, and that a batch fills from its front."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2).reshape(-1, 8)
        is_for_first = tokens[:, 0] > 0
        taken = torch.where(is_for_first, is_for_first.cumsum(0), (~is_for_first).cumsum(0)) <= 180
        return (tokens * taken[:, None]).view(len(x), -1, 8).transpose(1, 2).reshape(y.shape)


class Masks(_Net):
    """A mask of booleans follows the mean of a large batch."""

    def deceive(self, x: Tensor, y: Tensor) -> Tensor:
        return y > (y.mean() if len(x) >= 7 else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.trap(self.deceive(x, self.conv(x)))
