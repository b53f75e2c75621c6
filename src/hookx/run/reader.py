"""One image of the list -> its pixels or the reason why there are none, as patiently as a run wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hookx.capture.failures import is_out_of_memory
from hookx.errors import THEN_RESUME, ImageError
from hookx.images.decoding import decode, failure_reason
from hookx.images.fetching import fetch
from hookx.images.files import File
from hookx.images.listing import ImageList
from hookx.images.loaders import Loader
from hookx.images.retries import Retries, UnavailableError
from hookx.options import RETRY_SECONDS
from hookx.plan import Preprocessing, RangeUse
from hookx.run.in_hand import InHand, interruptible

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Decoded:
    """What became of one image: its pixels, as `decode` returns them, or the reason why there are none."""

    pixels_CHW: Tensor | None = None
    rotation_ignored: bool = False
    reason: str = ""
    failed_first: str = ""  # what the system said at the first try, if a later one succeeded
    range_use: RangeUse | None = None


@dataclass(frozen=True, eq=False)
class Reader:
    """Decodes the images of a list; tries again for `retry_seconds` what the system cannot read now."""

    images: ImageList
    preprocessing: Preprocessing
    transform: Callable[[Image], Tensor] | None = None
    retry_seconds: float = RETRY_SECONDS
    unavailable_is_failure: bool = False
    loader: Loader | None = None

    def read(self, position: int, in_hand: InHand) -> Decoded:
        """Decode the image at a position of the list.

        Raises:
            ImageError: the system could not read it in all that time; the image is not to blame.
            MemoryError: this process could not get the memory.
        """
        file, listed_bytes = self.images.files[position], self.images.sizes_bytes[position]
        retries, failed_first = Retries(self.retry_seconds, in_hand.pause), ""
        while True:
            try:
                # What comes from afar comes first: a slow network is not an image that takes long to decode.
                with interruptible():
                    here = fetch(file, listed_bytes)
                with in_hand.holding(position):
                    pixels_CHW, noticed = decode(here, self.preprocessing, listed_bytes, self.transform, self.loader)
                return Decoded(pixels_CHW, noticed.rotation_ignored, "", failed_first, noticed.range_use)
            except MemoryError:
                raise
            except UnavailableError as error:
                failed_first = failed_first or str(error)
                if retries.wait():
                    continue
                if not self.unavailable_is_failure:
                    raise self._unavailable(file, error) from None
                return Decoded(reason=failure_reason(error))
            except Exception as error:  # Whatever a decoder raises on foreign bytes is that image's failure.
                if is_out_of_memory(error):
                    raise MemoryError(str(error)) from None
                return Decoded(reason=failure_reason(error))

    def _unavailable(self, file: File, error: UnavailableError) -> ImageError:
        return ImageError(
            f"cannot read '{file}' after {self.retry_seconds:g} s of trying: {error}",
            f"{THEN_RESUME} once it can be read",
            "to count such an image as a failure instead: --on-io-error fail",
        )
