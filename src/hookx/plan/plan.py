"""The plan: everything that decides the numbers of a run, and its fingerprint. No torch, no disk."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hookx.errors import StoreError
from hookx.options import MAX_SHARD_BYTES, MAX_SHARD_IMAGES
from hookx.plan.preprocessing import Preprocessing
from hookx.plan.shards import DTYPES, LayerSpec, Shard, _Shards, images_per_shard

FORMAT = "hookx 1"
_FIELDS = {
    "memory_format": "memory formats",
    "model": "models",
    "image_count": "numbers of images",
    "images_sha256": "images (names or sizes)",
    "images_per_shard": "images per shard",
    "precision": "precisions",
}

# No honest plan comes near these; a crafted one is stopped by them.
_IMAGES_AT_MOST = 2**40
_VALUES_AT_MOST = 2**40  # of an activation of one image
_DIMENSIONS_AT_MOST = 32
_SIDE_PX_AT_MOST = 2**16


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
    notes: tuple[str, ...] = ()  # what a person should know of the weights, such as what was unwrapped

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The fields that the fingerprint covers, as plain JSON values."""
        fields = asdict(self)
        del fields["batch_size"], fields["notes"]
        for name, usual in (("custom", ""), ("decode", "exact")):
            if fields["preprocessing"][name] == usual:
                del fields["preprocessing"][name]  # Plans without one keep the fingerprint that they always had.
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
        """The cut of the image list; made as it is looked at, so a plan of any length costs nothing."""
        return _Shards(self.image_count, self.images_per_shard)

    def shard_file(self, shard: Shard) -> str:
        """Return the name of a shard's file."""
        return f"shard-{shard.number:05}-of-{len(self.shards):05}.safetensors"

    def command(self, out: str) -> str:
        """Return the command line that resumes this plan, with IMAGES for the images.

        What was chosen automatically, batch size and memory format, is kept where the plan is, and need not be said.
        A plan does not hold where a file of weights lies (WEIGHTS stands for it), nor what a model of somebody's own
        needs (`--model-arg`, `--transform`). A command that lacks something is refused with what differs.

        Example:
            >>> preprocessing = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
            >>> layers = (LayerSpec("conv1", (64, 112, 112), "float32"), LayerSpec("avgpool", (512, 1, 1), "float32"))
            >>> plan = Plan("resnet18", "ResNet18_Weights.IMAGENET1K_V1", layers, preprocessing, "fp32", "contiguous",
            ...             image_count=8, images_sha256="", images_per_shard=160, batch_size=32)
            >>> plan.command("features/")
            'hookx extract --model resnet18 --weights IMAGENET1K_V1 --layers conv1,avgpool --out features/ IMAGES'
        """
        words = ["--model", self.model, *self._weights_options()]
        words += ["--layers", ",".join(layer.address for layer in self.layers), *self.preprocessing.options()]
        if self.precision != "fp32":
            words += ["--precision", self.precision]
        # Of several types none was asked for.
        floats = {layer.dtype for layer in self.layers if "float" in layer.dtype}
        if len(floats) == 1 and (self.precision, floats) != ("fp32", {"float32"}):
            words += ["--dtype", *floats]
        if self.images_per_shard != images_per_shard(self.bytes_per_image, MAX_SHARD_BYTES, MAX_SHARD_IMAGES):
            words += ["--shard-images", str(self.images_per_shard)]
            if (shard_bytes := self.images_per_shard * self.bytes_per_image) > MAX_SHARD_BYTES:
                words += ["--max-shard-size", str(shard_bytes)]
        return shlex.join(["hookx", "extract", *words, "--out", out, "IMAGES"])

    def _weights_options(self) -> list[str]:
        if random := re.match(r"random \(seed (\d+)\)", self.weights):
            return ["--weights", "none", *(["--seed", random[1]] if random[1] != "0" else [])]
        if published := re.fullmatch(r"\w+Weights\.(\w+)", self.weights):
            return ["--weights", published[1]]
        if self.weights.startswith("sha256:") and (self.model.isidentifier() or self.model.startswith("timm:")):
            return ["--weights", "WEIGHTS"]
        return []  # The model's own.

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
        """Read a plan back; `StoreError` if the text is not one, or was altered."""
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise StoreError(f"plan.json has the format {document['format']!r}; this hookx reads {FORMAT!r}")
            plan = cls(
                model=str(document["model"]),
                weights=str(document["weights"]),
                layers=tuple(
                    LayerSpec(str(layer["address"]), tuple(map(int, layer["shape"])), str(layer["dtype"]))
                    for layer in document["layers"]
                ),
                preprocessing=_preprocessing(document["preprocessing"]),
                precision=str(document["precision"]),
                memory_format=str(document["memory_format"]),
                image_count=int(document["image_count"]),
                images_sha256=str(document["images_sha256"]),
                images_per_shard=int(document["images_per_shard"]),
                batch_size=int(document["chosen"]["batch_size"]),
                notes=_notes(document.get("notes", [])),
            )
            whole = plan.fingerprint == document["fingerprint"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StoreError(f"plan.json cannot be read: {type(error).__name__}: {error}") from None
        if not whole:
            raise StoreError("plan.json was altered: its fingerprint does not belong to its contents")
        if unknown := document.keys() - {"fingerprint", "chosen", "notes", *plan.identity}:
            raise StoreError(f"plan.json was altered, or is of a later hookx: it holds {min(unknown)!r}")
        plan._check_possible()
        return plan

    def _check_possible(self) -> None:
        # Anybody can compute a fingerprint; what is allocated, counted or iterated over later is bounded here.
        addresses = {layer.address for layer in self.layers}
        possible = {
            "layers": len(addresses) == len(self.layers) and "__metadata__" not in addresses,
            "shapes": all(map(_is_possible, self.layers)),
            "image_count": 0 < self.image_count <= _IMAGES_AT_MOST,
            "images_per_shard": 0 < self.images_per_shard <= _IMAGES_AT_MOST,
            "batch_size": 0 < self.batch_size <= _IMAGES_AT_MOST,
            "preprocessing": 0 < self.preprocessing.crop_px <= _SIDE_PX_AT_MOST
            and 0 < self.preprocessing.resize_px <= _SIDE_PX_AT_MOST
            and all(map(math.isfinite, (*self.preprocessing.mean, *self.preprocessing.std))),
        }
        for name, is_possible in possible.items():
            if not is_possible:
                raise StoreError(f"plan.json describes a run that there cannot be: look at its {name}")

    def differences(self, asked: Plan) -> list[str]:
        """Say what another plan would change, one phrase a field, as in 'layers differ (there: ...; asked: ...)'."""
        phrases = []
        for name, there in self.identity.items():
            if there != asked.identity[name]:
                shown_there, shown_asked = _shown(name, there), _shown(name, asked.identity[name])
                if name == "layers" and shown_there == shown_asked:
                    shown_there, shown_asked = (_layer_details(value) for value in (there, asked.identity[name]))
                phrases.append(f"{_FIELDS.get(name, name)} differ (there: {shown_there}; asked: {shown_asked})")
        # The cut follows from the layers; it is worth a word only when it was asked for.
        return [phrase for phrase in phrases if len(phrases) == 1 or not phrase.startswith("images per shard")]


def _preprocessing(document: Mapping[str, Any]) -> Preprocessing:
    return Preprocessing(
        resize_px=int(document["resize_px"]),
        crop_px=int(document["crop_px"]),
        mean=tuple(map(float, document["mean"])),
        std=tuple(map(float, document["std"])),
        interpolation=str(document["interpolation"]),
        antialias=bool(document["antialias"]),
        exif=str(document["exif"]),
        custom=str(document.get("custom", "")),
        decode=str(document.get("decode", "exact")),
    )


def _is_possible(layer: LayerSpec) -> bool:
    is_shape = len(layer.shape) <= _DIMENSIONS_AT_MOST and min(layer.shape, default=1) >= 0
    # A dimension of 0 must not hide the others.
    return layer.dtype in DTYPES and is_shape and math.prod(max(side, 1) for side in layer.shape) <= _VALUES_AT_MOST


def _notes(notes: Any) -> tuple[str, ...]:
    if not (isinstance(notes, list) and all(isinstance(note, str) for note in notes)):
        raise ValueError("its notes are no texts")
    return tuple(notes)


def _shown(name: str, value: Any) -> str:
    if name == "layers":
        return ", ".join(layer["address"] for layer in value)
    if name == "images_sha256":
        return f"{value[:12]}…"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _layer_details(layers: list[dict[str, Any]]) -> str:
    return ", ".join(f"{layer['address']} {layer['shape']} {layer['dtype']}" for layer in layers)
