"""How an image becomes a model's input, in numbers and words."""

from __future__ import annotations

from dataclasses import dataclass, replace

_MAX_CUSTOM_SHOWN = 160  # characters
_SHA256_SHOWN = len("sha256:") + 12


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input; `mean` and `std` are per channel of an image in [0, 1].

    Args:
        resize_px: length of the shorter side after resizing; see `resize_width_px`.
        crop_px: height of the input, which is cut from the centre; its width as well, unless `crop_width_px` is one.
        interpolation: 'nearest', 'bilinear', 'bicubic', ... (the values of `InterpolationMode`).
        exif: 'ignore' (as the published preprocessing does) or 'apply' the rotation that a camera recorded.
        custom: describes a model's own transform, where the fields above cannot; then only `crop_px` and
            `crop_width_px` (the sides of its output) and `exif` apply.
        decode: 'exact'; 'fast' decodes a JPEG at 1/2, 1/4 or 1/8 of its size if that is still large enough; 'nvjpeg'
            decodes and resizes a JPEG on an NVIDIA GPU.
        loader: the function of the user's own that reads the images in place of Pillow, with the SHA-256 of its source.
        grey_range: which values of more than 8 bits are black and white: 'full', 'minmax', or two numbers, '0,4095'.
        fit: how an image of other proportions becomes the input. 'crop' cuts off what sticks out; 'squash' resizes to
            the input's height and width; 'pad' resizes the whole image to fit inside, and puts it in the centre of
            borders of the mean colour, rounded to 8 bits.
        crop_width_px: width of the input; 0: it is square.
        resize_width_px: before cropping, the image is resized to cover `resize_px` x `resize_width_px`, height x width;
            0: that is a square, so its shorter side becomes `resize_px`.
        size: the value of `--size`, as in '256x128'; '' if the input has the model's own size.
    """

    resize_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    antialias: bool = True
    exif: str = "ignore"
    custom: str = ""
    decode: str = "exact"
    grey_range: str = "full"
    loader: str = ""
    fit: str = "crop"
    crop_width_px: int = 0
    resize_width_px: int = 0
    size: str = ""

    @property
    def size_px(self) -> tuple[int, int]:
        """The height and the width of the input."""
        return self.crop_px, self.crop_width_px or self.crop_px

    @property
    def covered_px(self) -> tuple[int, int]:
        """The height and the width that a resized image covers before it is cropped."""
        return self.resize_px, self.resize_width_px or self.resize_px

    def sized(self, size_px: tuple[int, int], covered_px: tuple[int, int]) -> Preprocessing:
        """Return this preprocessing for an input of another size.

        Example:
            >>> str(IMAGENET.sized((256, 128), (292, 146)))[:50]
            'resize to cover 292 x 146 (bilinear), crop 256 x 1'
        """
        (height, width), (covered_height, covered_width) = size_px, covered_px
        return replace(
            self,
            crop_px=height,
            crop_width_px=0 if width == height else width,
            resize_px=covered_height,
            resize_width_px=0 if covered_width == covered_height else covered_width,
        )

    def __str__(self) -> str:
        exif = ", EXIF applied" if self.exif == "apply" else ""
        exif += f", grey range {self.grey_range}" if self.grey_range != "full" else ""
        exif += f", read by {self.loader[: self.loader.find('sha256:') + _SHA256_SHOWN]}…" if self.loader else ""
        if self.custom:
            what = self.custom if len(self.custom) <= _MAX_CUSTOM_SHOWN else f"{self.custom[:_MAX_CUSTOM_SHOWN]}…"
            return f"{what}, {_shape(self.size_px)}{exif}"
        mean, std = (",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        decode = {"exact": "", "fast": ", decoded fast"}.get(self.decode, f", decoded by {self.decode}")
        return f"{self._describe_fit()}, mean {mean}, std {std}{exif}{decode}"

    def _describe_fit(self) -> str:
        height, width = self.size_px
        if self.fit == "squash":
            return f"squash to {_shape(self.size_px)} ({self.interpolation})"
        if self.fit == "pad":
            return f"resize within {_shape(self.size_px)} ({self.interpolation}), pad with the mean"
        crop = str(height) if height == width else _shape(self.size_px)
        cover = f"to cover {_shape(self.covered_px)}" if self.resize_width_px else str(self.resize_px)
        return f"resize {cover} ({self.interpolation}), crop {crop}"

    def options(self) -> list[str]:
        """Return the options of `hookx extract` that ask for this; none for the preprocessing of most weights."""
        asked = ["--exif", self.exif] if self.exif != "ignore" else []
        asked += ["--decode", self.decode] if self.decode != "exact" else []
        asked += ["--grey-range", self.grey_range] if self.grey_range != "full" else []
        asked += ["--loader", self.loader.partition(" sha256:")[0]] if self.loader else []
        sizes = ["--size", self.size] if self.size else []
        if self.custom or replace(self, exif="ignore", decode="exact", grey_range="full", loader="") == IMAGENET:
            return [*sizes, *asked]
        mean, std = (",".join(map(repr, values)) for values in (self.mean, self.std))
        if self.fit != "crop":
            sizes += ["--fit", self.fit]
        elif not (self.crop_width_px or self.resize_width_px):
            sizes = ["--resize", str(self.resize_px), *(sizes or ["--crop", str(self.crop_px)])]
        return [*sizes, "--interpolation", self.interpolation, "--mean", mean, "--std", std, *asked]


def _shape(size_px: tuple[int, int]) -> str:
    return f"{size_px[0]} x {size_px[1]}"


IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
