"""The plan: everything that decides the numbers of a run, its fingerprint, its cut into shards. No torch, no disk."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args, get_origin, get_type_hints

from hookx.errors import StoreError
from hookx.keys import LazySequence
from hookx.options import DTYPE_NAMES, MAX_SHARD_BYTES, MAX_SHARD_IMAGES, MAX_SIDE_PX
from hookx.plan.preprocessing import Preprocessing
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
OF_THE_IMAGES = ("image_count", "images_sha256", "images_per_shard")  # fields that follow from which images there are
_UNCOVERED = ("batch_size", "notes", "hardware")  # by the fingerprint
# Fields of the preprocessing that are left out at these values, so that plans from before them keep their fingerprints.
_OMITTED: dict[str, Any] = {
    "custom": "",
    "decode": "exact",
    "grey_range": "full",
    "loader": "",
    "fit": "crop",
    "crop_width_px": 0,
    "resize_width_px": 0,
    "size": "",
}

# No honest plan comes near these; they stop a crafted one.
_MAX_IMAGES = 2**40
_MAX_VALUES = 2**40  # in one image's activation
_MAX_DIMENSIONS = 32

# torch's name -> (safetensors' code, bytes per element), for every dtype that a safetensors file can hold: those of
# safetensors 0.7, the lowest that hookx runs with. Later ones have more kinds of float8.
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
    "complex64": ("C64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
}
# Cut shards at multiples of a common batch size, so that few of them end in a small batch.
_CUT_IMAGES = 32


@dataclass(frozen=True)
class LayerSpec:
    """One tensor of every shard: its key, its shape for one image, and its stored dtype."""

    address: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_image(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Shard:
    """Consecutive images that share a file: positions `start` to `stop` in the sorted list."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def batches(self, batch_size: int) -> Iterator[range]:
        """Cut the shard into ranges of positions; a batch never straddles two shards."""
        for start in range(self.start, self.stop, batch_size):
            yield range(start, min(start + batch_size, self.stop))


class Shards(LazySequence[Shard]):
    """The shards of a plan, cut on access."""

    def __init__(self, image_count: int, images_per_shard: int) -> None:
        self._starts = range(0, image_count, images_per_shard)

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, position: int) -> Shard:
        start = self._starts[position]
        return Shard(position, start, min(start + self._starts.step, self._starts.stop))


def images_per_shard(bytes_per_image: int, max_shard_bytes: int, max_images: int) -> int:
    """Return how many images share a shard: as many as both limits allow, at least one."""
    count = min(max_images, max_shard_bytes // max(bytes_per_image, 1))
    if _CUT_IMAGES < count < max_images:
        count -= count % _CUT_IMAGES
    return max(count, 1)


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
    # Names and values of the machine and the software that began the run, if all others must be of that kind.
    hardware: tuple[tuple[str, str], ...] = ()

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
            >>> from hookx.plan import IMAGENET
            >>> layers = (LayerSpec("conv1", (64, 112, 112), "float32"), LayerSpec("avgpool", (512, 1, 1), "float32"))
            >>> plan = Plan("resnet18", "ResNet18_Weights.IMAGENET1K_V1", layers, IMAGENET, "fp32", "contiguous",
            ...             image_count=8, images_sha256="", images_per_shard=160, batch_size=32)
            >>> plan.command("features/")
            'hookx extract --model resnet18 --weights IMAGENET1K_V1 --layers conv1,avgpool --out features/ IMAGES'
        """
        words = ["--model", self.model, *self._weights_options()]
        words += ["--layers", ",".join(layer.address for layer in self.layers), *self.preprocessing.options()]
        if self.preprocessing.size and self.model.startswith("vit_"):  # torchvision's take another size only with it.
            words += ["--resize-positions"]
        if self.precision != "fp32":
            words += ["--precision", self.precision]
        # Mixed dtypes, or one that no --dtype names, mean that no --dtype was given.
        dtypes = {layer.dtype for layer in self.layers}
        floats = {dtype for dtype in dtypes if "float" in dtype}
        if "complex64" in dtypes and not floats:
            floats = {"float32"}  # complex128 is stored as complex64 with --dtype fp32.
        is_usual = (self.precision, floats) == ("fp32", {"float32"}) and "complex64" not in dtypes
        if len(floats) == 1 and floats <= set(DTYPE_NAMES.values()) and not is_usual:
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
        # A model that is itself a file or a folder brings its weights; one from a list of names got them from a file.
        is_listed = self.model.isidentifier() or re.fullmatch(r"\w+:[\w.]+|open_clip:[\w./-]+", self.model)
        name = identity.published_name or ("WEIGHTS" if identity.is_file and is_listed else "")
        return ["--weights", name] if name else []

    def to_json(self) -> str:
        chosen: dict[str, Any] = {"batch_size": self.batch_size}
        if self.hardware:
            chosen["hardware"] = dict(self.hardware)
        document = {"fingerprint": self.fingerprint, **self.identity, "chosen": chosen}
        return json.dumps({**document, "notes": list(self.notes)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse a plan; raise `StoreError` if the text is not one, or was altered."""
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
                hardware=tuple(
                    (str(name), str(value)) for name, value in document["chosen"].get("hardware", {}).items()
                ),
            )
            if plan.fingerprint != document["fingerprint"]:
                raise StoreError("plan.json was altered: its fingerprint does not match its contents")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StoreError(f"plan.json cannot be read: {type(error).__name__}: {error}") from None
        if unknown := document.keys() - {"fingerprint", "chosen", "notes", *plan.identity}:
            raise StoreError(f"plan.json was altered, or written by a later hookx: it holds {min(unknown)!r}")
        plan._check_possible()
        return plan

    def _check_possible(self) -> None:
        # Anyone can compute a fingerprint, so bound what is allocated, counted or iterated over later.
        addresses = {layer.address for layer in self.layers}
        sides_px = (*self.preprocessing.size_px, *self.preprocessing.covered_px)
        possible = {
            "layers": len(addresses) == len(self.layers) and "__metadata__" not in addresses,
            "shapes": all(map(_is_plausible, self.layers)),
            "image_count": 0 < self.image_count <= _MAX_IMAGES,
            "images_per_shard": 0 < self.images_per_shard <= _MAX_IMAGES,
            "batch_size": 0 < self.batch_size <= _MAX_IMAGES,
            "preprocessing": all(0 < side_px <= MAX_SIDE_PX for side_px in sides_px)
            and all(map(math.isfinite, (*self.preprocessing.mean, *self.preprocessing.std))),
        }
        for name, is_possible in possible.items():
            if not is_possible:
                raise StoreError(f"plan.json describes an impossible run: check its {name}")

    def differences(self, asked: Plan, but: Collection[str] = ()) -> list[str]:
        """Describe what another plan would change, one phrase a field: 'layers differ (there: ...; asked: ...)'.

        Args:
            but: fields that may differ.
        """
        phrases = []
        for name, there in self.identity.items():
            if name not in but and there != (other := asked.identity[name]):
                shown = [_format(name, value) for value in _only_differing(there, other)]
                if name == "layers" and shown[0] == shown[1]:
                    shown = [_format(name, value, "{address} {shape} {dtype}") for value in (there, other)]
                phrases.append(f"{_FIELDS.get(name, name)} differ (there: {shown[0]}; asked: {shown[1]})")
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


def _only_differing(there: Any, other: Any) -> tuple[Any, Any]:
    """Return two values of a field; if they are objects, only the entries that differ."""
    if not isinstance(there, Mapping) or not isinstance(other, Mapping):
        return there, other
    values = [_OMITTED | dict(value) for value in (there, other)]
    names = [name for name in values[0] | values[1] if values[0].get(name) != values[1].get(name)]
    one, another = ({name: value.get(name, "") for name in names} for value in values)
    return one, another


def _is_plausible(layer: LayerSpec) -> bool:
    is_shape = len(layer.shape) <= _MAX_DIMENSIONS and min(layer.shape, default=1) >= 0
    # A dimension of 0 would hide the others in the product.
    return layer.dtype in DTYPES and is_shape and math.prod(max(side, 1) for side in layer.shape) <= _MAX_VALUES


def _format(name: str, value: Any, layer: str = "{address}") -> str:
    if name == "layers":
        return ", ".join(map(layer.format_map, value))
    if name == "images_sha256":
        return f"{value[:12]}…"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {'none' if item == '' else item}" for key, item in value.items())
    return str(value)
