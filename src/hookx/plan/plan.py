"""The plan: everything that decides the numbers of a run, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, get_args, get_origin, get_type_hints

from hookx.errors import StoreError
from hookx.options import MAX_SHARD_BYTES, MAX_SHARD_IMAGES
from hookx.plan.shards import DTYPES, LayerSpec, Shard, Shards, images_per_shard
from hookx.plan.weights import WeightsIdentity

FORMAT = "hookx 1"
_FIELDS = {
    "memory_format": "memory formats",
    "model": "models",
    "image_count": "numbers of images",
    "images_sha256": "images (names or sizes)",
    "images_per_shard": "images per shard",
    "precision": "precisions",
}
_UNCOVERED = ("batch_size", "notes")  # by the fingerprint
# Fields of the preprocessing that are left out at these values, so that plans from before them keep their fingerprints.
_OMITTED = {"custom": "", "decode": "exact"}

# No honest plan comes near these; they stop a crafted one.
_MAX_IMAGES = 2**40
_MAX_VALUES = 2**40  # in one image's activation
_MAX_DIMENSIONS = 32
_MAX_SIDE_PX = 2**16
_MAX_CUSTOM_SHOWN = 160  # characters


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

    def __str__(self) -> str:
        exif = ", EXIF applied" if self.exif == "apply" else ""
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
        if self.custom or replace(self, exif="ignore", decode="exact") == IMAGENET:
            return asked
        mean, std = (",".join(map(repr, values)) for values in (self.mean, self.std))
        sizes = ["--resize", str(self.resize_px), "--crop", str(self.crop_px), "--interpolation", self.interpolation]
        return [*sizes, "--mean", mean, "--std", std, *asked]


IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


@dataclass(frozen=True)
class Plan:
    """What will be computed. Two runs with one fingerprint store the same numbers."""

    model: str
    weights: str
    layers: tuple[LayerSpec, ...]
    preprocessing: Preprocessing
    precision: str
    memory_format: str
    image_count: int
    images_sha256: str
    images_per_shard: int
    # Recorded, but outside the fingerprint: the batch size changes values by rounding only.
    batch_size: int
    notes: tuple[str, ...] = ()  # what a reader should know about the weights, such as what was unwrapped

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The fields that the fingerprint covers, as plain JSON values."""
        fields = {name: value for name, value in asdict(self).items() if name not in _UNCOVERED}
        for name, usual in _OMITTED.items():
            if fields["preprocessing"][name] == usual:
                del fields["preprocessing"][name]
        return dict(json.loads(json.dumps({"format": FORMAT, **fields})))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def bytes_per_image(self) -> int:
        return sum(layer.bytes_per_image for layer in self.layers)

    @property
    def shards(self) -> Sequence[Shard]:
        """How the image list is cut; computed on access, so a plan of any length costs nothing."""
        return Shards(self.image_count, self.images_per_shard)

    def shard_file(self, shard: Shard) -> str:
        return f"shard-{shard.number:05}-of-{len(self.shards):05}.safetensors"

    def command(self, out: str) -> str:
        """Return the command line that resumes this plan, with IMAGES for the images.

        A resumed run keeps the batch size and memory format that were chosen automatically, so they are left out. A
        plan does not record the path of a weights file (WEIGHTS stands for it), `--model-arg` or `--transform`; a
        command without them is refused with an error that shows what differs.

        Example:
            >>> layers = (LayerSpec("conv1", (64, 112, 112), "float32"), LayerSpec("avgpool", (512, 1, 1), "float32"))
            >>> plan = Plan("resnet18", "ResNet18_Weights.IMAGENET1K_V1", layers, IMAGENET, "fp32", "contiguous",
            ...             image_count=8, images_sha256="", images_per_shard=160, batch_size=32)
            >>> plan.command("features/")
            'hookx extract --model resnet18 --weights IMAGENET1K_V1 --layers conv1,avgpool --out features/ IMAGES'
        """
        words = ["--model", self.model, *self._weights_options()]
        words += ["--layers", ",".join(layer.address for layer in self.layers), *self.preprocessing.options()]
        if self.precision != "fp32":
            words += ["--precision", self.precision]
        # Mixed dtypes mean that no --dtype was given.
        floats = {layer.dtype for layer in self.layers if "float" in layer.dtype}
        if len(floats) == 1 and (self.precision, floats) != ("fp32", {"float32"}):
            words += ["--dtype", *floats]
        if self.images_per_shard != images_per_shard(self.bytes_per_image, MAX_SHARD_BYTES, MAX_SHARD_IMAGES):
            words += ["--shard-images", str(self.images_per_shard)]
            if (shard_bytes := self.images_per_shard * self.bytes_per_image) > MAX_SHARD_BYTES:
                words += ["--max-shard-size", str(shard_bytes)]
        return shlex.join(["hookx", "extract", *words, "--out", out, "IMAGES"])

    def _weights_options(self) -> list[str]:
        identity = WeightsIdentity(self.weights)
        if identity.seed is not None:
            return ["--weights", "none", *(["--seed", str(identity.seed)] if identity.seed else [])]
        if identity.published_name:
            return ["--weights", identity.published_name]
        # A model that is itself a file or a folder brings its weights; one from a list of names got them from a file.
        is_listed = self.model.isidentifier() or re.fullmatch(r"\w+:[\w.]+", self.model)
        return ["--weights", "WEIGHTS"] if identity.is_file and is_listed else []

    def to_json(self) -> str:
        document = {
            "fingerprint": self.fingerprint,
            **self.identity,
            "chosen": {"batch_size": self.batch_size},
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse a plan.

        Raises:
            StoreError: the text is not a plan, or was altered.
        """
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise StoreError(f"plan.json has the format {document['format']!r}; this hookx reads {FORMAT!r}")
            notes = document.get("notes", [])
            if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
                raise ValueError("notes must be a list of strings")
            covered = {name: hint for name, hint in get_type_hints(cls).items() if name not in _UNCOVERED}
            plan = cls(
                **{name: _parse(hint, document[name]) for name, hint in covered.items()},
                batch_size=int(document["chosen"]["batch_size"]),
                notes=tuple(notes),
            )
            whole = plan.fingerprint == document["fingerprint"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StoreError(f"plan.json cannot be read: {type(error).__name__}: {error}") from None
        if not whole:
            raise StoreError("plan.json was altered: its fingerprint does not match its contents")
        if unknown := document.keys() - {"fingerprint", "chosen", "notes", *plan.identity}:
            raise StoreError(f"plan.json was altered, or written by a later hookx: it holds {min(unknown)!r}")
        plan._check_possible()
        return plan

    def _check_possible(self) -> None:
        # Anyone can compute a fingerprint, so bound what is allocated, counted or iterated over later.
        addresses = {layer.address for layer in self.layers}
        sides_px = (self.preprocessing.crop_px, self.preprocessing.resize_px)
        possible = {
            "layers": len(addresses) == len(self.layers) and "__metadata__" not in addresses,
            "shapes": all(map(_is_plausible, self.layers)),
            "image_count": 0 < self.image_count <= _MAX_IMAGES,
            "images_per_shard": 0 < self.images_per_shard <= _MAX_IMAGES,
            "batch_size": 0 < self.batch_size <= _MAX_IMAGES,
            "preprocessing": all(0 < side_px <= _MAX_SIDE_PX for side_px in sides_px)
            and all(map(math.isfinite, (*self.preprocessing.mean, *self.preprocessing.std))),
        }
        for name, is_possible in possible.items():
            if not is_possible:
                raise StoreError(f"plan.json describes an impossible run: check its {name}")

    def differences(self, asked: Plan) -> list[str]:
        """Describe what another plan would change, one phrase a field: 'layers differ (there: ...; asked: ...)'."""
        phrases = []
        for name, there in self.identity.items():
            if there != (other := asked.identity[name]):
                shown_there, shown_asked = _format(name, there), _format(name, other)
                if name == "layers" and shown_there == shown_asked:
                    shown_there, shown_asked = _format_layers(there), _format_layers(other)
                phrases.append(f"{_FIELDS.get(name, name)} differ (there: {shown_there}; asked: {shown_asked})")
        # The number of images per shard follows from the layers, so mention it only if nothing else differs.
        return [phrase for phrase in phrases if len(phrases) == 1 or not phrase.startswith("images per shard")]


def _parse(kind: Any, value: Any) -> Any:
    """Convert plain JSON values to the type of a plan's field."""
    if kind in (LayerSpec, Preprocessing):
        parsed = {}
        for name, hint in get_type_hints(kind).items():
            parsed[name] = _parse(hint, value.get(name, _OMITTED[name]) if name in _OMITTED else value[name])
        return kind(**parsed)
    if get_origin(kind) is tuple:
        return tuple(_parse(get_args(kind)[0], item) for item in value)
    return kind(value)


def _is_plausible(layer: LayerSpec) -> bool:
    is_shape = len(layer.shape) <= _MAX_DIMENSIONS and min(layer.shape, default=1) >= 0
    # A dimension of 0 would hide the others in the product.
    return layer.dtype in DTYPES and is_shape and math.prod(max(side, 1) for side in layer.shape) <= _MAX_VALUES


def _format(name: str, value: Any) -> str:
    if name == "layers":
        return ", ".join(layer["address"] for layer in value)
    if name == "images_sha256":
        return f"{value[:12]}…"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _format_layers(layers: list[dict[str, Any]]) -> str:
    return ", ".join(f"{layer['address']} {layer['shape']} {layer['dtype']}" for layer in layers)
