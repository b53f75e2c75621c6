"""Folders, files and lists of paths -> keys -> batches of pixels.

The only file that decodes images.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from hookx.errors import ImageError
from hookx.plan import Preprocessing

# What a folder is searched for. A file that is named outright may be called anything.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga .ico .icns "
    ".jp2 .j2k .jpx .avif .avifs .qoi .dds .sgi .rgb .pcx .psd .xbm .xpm".split()
)
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageList:
    """Every image of a run, sorted by key. A key is the image's path relative to its root, with '/'."""

    keys: list[str]
    files: list[str]
    sizes_bytes: list[int]

    def __len__(self) -> int:
        return len(self.keys)


def list_images(sources: Iterable[str | os.PathLike[str]]) -> ImageList:
    """List the images of folders (searched recursively, links followed), files, and '-' or '-0' (standard input).

    A key is relative to the folder it was found in, the bare name of a file named outright, and for standard input the
    path relative to the working directory. Nothing is opened: what is no image shows when it is decoded.

    Raises:
        ImageError: a source does not exist, there is no image at all, or two images have one key.

    Example:
        >>> images = list_images(["images"])
        >>> len(images), images.keys[0]
        (8, 'animals/chelsea.jpg')
    """
    found: dict[str, str] = {}
    names = [os.fspath(source) for source in sources]
    for key, file in (pair for name in names for pair in _in_source(name)):
        if key in found:
            raise ImageError(
                f"two images have the key '{key}': {found[key]} and {file}",
                "give the folder that holds both, or run twice",
            )
        found[key] = file
    if not found:
        raise ImageError(f"there is no image in {', '.join(names) or 'the empty list'}")
    keys = sorted(found)
    files = [found[key] for key in keys]
    return ImageList(keys, files, [_size_bytes(file) for file in files])


def _in_source(source: str) -> Iterator[tuple[str, str]]:
    if source in ("-", "-0"):
        separator = b"\0" if source == "-0" else b"\n"
        for line in sys.stdin.buffer.read().split(separator):
            if path := os.fsdecode(line if source == "-0" else line.removesuffix(b"\r")):
                yield _key_in_working_directory(path), path
    elif os.path.isdir(source):
        yield from _in_folder(source, "", ())
    elif os.path.lexists(source):
        yield os.path.basename(source), source
    else:
        raise ImageError(f"there is no file or folder '{source}'")


def _in_folder(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str]]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # A link to a folder that we are inside of: everything in it has been listed.
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ImageError(f"cannot list the folder '{folder}': {error.strerror}") from None
    for entry in entries:
        if _is_folder(entry):
            yield from _in_folder(entry.path, f"{prefix}{entry.name}/", (*above, identity))
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield prefix + entry.name, entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link to itself.


def _key_in_working_directory(path: str) -> str:
    whole, here = os.path.abspath(path), os.getcwd().rstrip("/") + "/"
    return whole.removeprefix(here) if whole.startswith(here) else whole.lstrip("/")


def _size_bytes(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1  # It will fail when it is read, with the reason.


@dataclass
class Batch:
    """Decoded images, in the order of their positions; those that could not be read are in `failures`.

    `pixels_NCHW` is float32, or None when no image of the batch could be read.
    """

    positions: range
    pixels_NCHW: Tensor | None = None
    keys: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    rotations_ignored: int = 0

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; a DataLoader asks for it, and leaves what cannot do so as it is."""
        return self if self.pixels_NCHW is None else replace(self, pixels_NCHW=self.pixels_NCHW.pin_memory())


def batches(
    images: ImageList,
    positions: Sequence[range],
    preprocessing: Preprocessing,
    *,
    workers: int,
    pin_memory: bool = False,
    in_worker: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """Decode the given ranges of positions, one batch a range, in order, `workers` processes ahead of the consumer.

    `in_worker` runs once in each decoding process.

    Raises:
        ImageError: (while iterating) a decoding process was killed.
    """
    loader = DataLoader(
        _Batches(images, positions, preprocessing),
        batch_size=None,  # The dataset's items are batches already: they follow the shards.
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_WorkerStart(in_worker),
        prefetch_factor=2 if workers else None,
        # Forked workers share the list of images and start in milliseconds; they never touch a GPU.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    with _child_signals_kept():
        return _guarded(iter(loader))  # The processes start here, not at the first batch.


@contextlib.contextmanager
def _child_signals_kept() -> Iterator[None]:
    """Take back the DataLoader's handler for dead workers: it raises in the middle of whatever the consumer does.

    Without it the loader finds a dead worker when it waits for its batch, within five seconds.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _guarded(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ImageError(
            f"a decoding process died: {error}",
            "most often the machine ran out of memory: try fewer --workers or a smaller --batch-size",
            "finished shards are kept; the same command goes on from there",
        ) from None


def decode(file: str, preprocessing: Preprocessing) -> tuple[Tensor, bool]:
    """Read one image file as a model's input.

    Returns:
        The pixels, float32, (3, crop_px, crop_px), and whether a rotation recorded by the camera was ignored.

    Example:
        >>> from hookx.models import load_model
        >>> pixels_CHW, _ = decode("images/animals/chelsea.jpg", load_model("resnet18", "none").preprocessing)
        >>> pixels_CHW.shape
        torch.Size([3, 224, 224])
    """
    transform = _transform(preprocessing)
    with Image.open(file) as image:
        image.load()  # Pillow turns a TIFF upright while it loads it, and then forgets the rotation.
        rotated = image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9)
        if rotated and preprocessing.exif == "apply":
            upright: Image.Image = ImageOps.exif_transpose(image)
            return transform(upright.convert("RGB")), False
        return transform(image.convert("RGB")), rotated


def _transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    # The class of every `weights.transforms()` of torchvision's classification models, so the same arithmetic.
    return ImageClassification(
        crop_size=preprocessing.crop_px,
        resize_size=preprocessing.resize_px,
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=InterpolationMode(preprocessing.interpolation),
        antialias=preprocessing.antialias,
    )


class _Batches(Dataset[Batch]):
    def __init__(self, images: ImageList, positions: Sequence[range], preprocessing: Preprocessing) -> None:
        self.images, self.positions, self.preprocessing = images, positions, preprocessing

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> Batch:
        batch = Batch(self.positions[number])
        decoded = []
        for position in batch.positions:
            key, file = self.images.keys[position], self.images.files[position]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow warns about odd metadata; what fails is in failures.
                    pixels_CHW, rotation_ignored = decode(file, self.preprocessing)
            except Exception as error:  # Whatever a decoder raises on foreign bytes is that image's failure.
                batch.failures.append((key, _reason(error)))
                continue
            decoded.append(pixels_CHW)
            batch.keys.append(key)
            batch.rotations_ignored += rotation_ignored
        if decoded:
            batch.pixels_NCHW = torch.stack(decoded)
        return batch


def _reason(error: Exception) -> str:
    """Say in one line why an image could not be read; the same words on every machine, so no path in them."""
    if isinstance(error, UnidentifiedImageError):
        return "UnidentifiedImageError: not an image that Pillow knows"
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _WorkerStart:
    """What a decoding process does first."""

    def __init__(self, in_worker: Callable[[], None]) -> None:
        self.in_worker = in_worker

    def __call__(self, worker_number: int) -> None:
        # The terminal sends Ctrl-C to every process; the parent alone decides, and then ends its workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.in_worker()
