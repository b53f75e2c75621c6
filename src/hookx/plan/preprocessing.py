"""How an image becomes a model's input, in numbers and words."""

from __future__ import annotations

from dataclasses import dataclass, replace

_MAX_CUSTOM_SHOWN = 160  # characters
_SHA256_SHOWN = len("sha256:") + 12


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input; `mean` and `std` are per channel of an image in [0, 1].

    Args:
        resize_px: length of the shorter side after resizing.
        crop_px: side of the square cut from the centre.
        interpolation: 'nearest', 'bilinear', 'bicubic', ... (the values of `InterpolationMode`).
        exif: 'ignore' (as the published preprocessing does) or 'apply' the rotation that a camera recorded.
        custom: describes a model's own transform, where the fields above cannot; then only `crop_px` (the side of its
            output) and `exif` apply.
        decode: 'exact'; 'fast' decodes a JPEG at 1/2, 1/4 or 1/8 of its size if that is still large enough; 'nvjpeg'
            decodes and resizes a JPEG on an NVIDIA GPU.
        loader: the function of the user's own that reads the images in place of Pillow, with the SHA-256 of its source.
        grey_range: which values of more than 8 bits are black and white: 'full', 'minmax', or two numbers, '0,4095'.
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

    def __str__(self) -> str:
        exif = ", EXIF applied" if self.exif == "apply" else ""
        exif += f", grey range {self.grey_range}" if self.grey_range != "full" else ""
        exif += f", read by {self.loader[: self.loader.find('sha256:') + _SHA256_SHOWN]}…" if self.loader else ""
        if self.custom:
            what = self.custom if len(self.custom) <= _MAX_CUSTOM_SHOWN else f"{self.custom[:_MAX_CUSTOM_SHOWN]}…"
            return f"{what}, {self.crop_px} x {self.crop_px}{exif}"
        mean, std = (",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        decode = {"exact": "", "fast": ", decoded fast"}.get(self.decode, f", decoded by {self.decode}")
        size = f"resize {self.resize_px} ({self.interpolation}), crop {self.crop_px}"
        return f"{size}, mean {mean}, std {std}{exif}{decode}"

    def options(self) -> list[str]:
        """Return the options of `hookx extract` that ask for this; none for the preprocessing of most weights."""
        asked = ["--exif", self.exif] if self.exif != "ignore" else []
        asked += ["--decode", self.decode] if self.decode != "exact" else []
        asked += ["--grey-range", self.grey_range] if self.grey_range != "full" else []
        asked += ["--loader", self.loader.partition(" sha256:")[0]] if self.loader else []
        if self.custom or replace(self, exif="ignore", decode="exact", grey_range="full", loader="") == IMAGENET:
            return asked
        mean, std = (",".join(map(repr, values)) for values in (self.mean, self.std))
        sizes = ["--resize", str(self.resize_px), "--crop", str(self.crop_px), "--interpolation", self.interpolation]
        return [*sizes, "--mean", mean, "--std", std, *asked]


IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
