"""List the images of any sources, each with its key and the size of its file."""

from __future__ import annotations

import itertools
import operator
import os
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hookx.errors import ImageError
from hookx.images.files import LOOSE, Archive, Files
from hookx.images.measuring import UNAVAILABLE, UNMEASURABLE, measure
from hookx.images.sources import Look, source_of
from hookx.images.sources.kinds import describe_not_taken
from hookx.images.sources.source import NUMBERS_OF_A_MEMBER, THEN_AGAIN
from hookx.keys import Keys, images_sha256
from hookx.options import RETRY_SECONDS

_MARK_BYTES = 5
_PLACE_BYTES = 8 * NUMBERS_OF_A_MEMBER
_NO_PLACE = array("q", [LOOSE] * NUMBERS_OF_A_MEMBER).tobytes()
_PACKED_AT_ONCE = 100_000  # keys


@dataclass(frozen=True)
class Choice:
    """Which images of a list to take: the first, or a random sample; by default all."""

    limit: int | None = None
    sample: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        if self.limit is not None:
            return f"--limit {self.limit}"
        return f"--sample {self.sample} --seed {self.seed}" if self.sample is not None else ""

    def of(self, keys: list[bytes]) -> list[bytes]:
        """Return the chosen of keys that are sorted in reverse."""
        if self.limit is not None:
            return keys[-self.limit :]
        if self.sample is None or self.sample >= len(keys):
            return keys
        numbers = sorted(random.Random(self.seed).sample(range(len(keys)), self.sample))
        return [keys[number] for number in numbers]


@dataclass(frozen=True)
class Remarks:
    """What there is to say about a list beside its images.

    Attributes:
        not_taken: how many files of each suffix were found and are not images.
        chosen: the options that left images out, as in '--limit 100'; '' if none did.
        found: how many images there are without them.
        taken: how many are left.
    """

    not_taken: Mapping[str, int] = field(default_factory=dict)
    chosen: str = ""
    found: int = 0
    taken: int = 0

    def sentences(self) -> list[str]:
        """Write what was left out, one sentence each."""
        chosen = f"{self.taken:,} of {self.found:,} images, by {self.chosen}: a list, and so a run, of its own"
        not_taken = [describe_not_taken(dict(self.not_taken))] if self.not_taken else []
        return [*([chosen] if self.chosen else []), *not_taken]


@dataclass(frozen=True, eq=False, repr=False)
class ImageList:
    """The images of a run, sorted by the bytes of their keys: the paths relative to their roots, with '/'.

    A key costs its own bytes and 20 more: its end, its root's number and the file's size. Where there are archives, 16
    more say where a member is. No Python object belongs to a single key, so a forked process reads them without copying
    memory pages.
    """

    keys: Keys
    files: Files
    sizes_bytes: array[int] | memoryview[int]  # -1 where a file has none, by its own fault
    remarks: Remarks = Remarks()

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sha256(self) -> str:
        """The digest of every key and every size, in order."""
        return images_sha256(self.keys, self.sizes_bytes)


def list_images(
    sources: Iterable[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    choice: Choice | None = None,
    retry_seconds: float = RETRY_SECONDS,
    unavailable_is_failure: bool = False,
    packed_at_once: int = _PACKED_AT_ONCE,
) -> ImageList:
    """List the images of folders (searched recursively, links followed), archives, files, and standard input.

    The key of an image is its path relative to the folder that was searched, the bare name of a file that was named, or
    for standard input ('-' or '-0') the path relative to the working directory. A member of an archive has the
    archive's key, '/', and its name: `00000.tar/animals/chelsea.jpg`. No image is opened; those that are not images
    fail when they are decoded.

    Args:
        root: a folder that all keys are relative to, whichever source names a file.
        choice: which of the images to take.
        retry_seconds: how long to try again what the system cannot do now; then it is an error.
        unavailable_is_failure: count a file that the system cannot look at as a failure later, in place of an error.
        packed_at_once: a number of keys that bounds the memory that packing takes.

    Raises:
        ImageError: a source does not exist or cannot be listed, no image is found, or two images have the same key.

    Example:
        >>> images = list_images(["images"])
        >>> len(images), images.keys[0], images.remarks.sentences()
        (8, 'animals/chelsea.jpg', ['1 file not taken: 1 .md'])
    """
    names, look = [os.fspath(source) for source in sources], Look(os.fspath(root or ""), retry_seconds)
    choice = choice or Choice()
    # With ten million images memory counts, and nothing that Python can sort takes less than a flat list of bytes. So
    # each key is followed by a mark for its root, which leaves the order as it is: it begins with NUL, and no file name
    # holds one. Behind the mark of an archive stands where the member is.
    marks: dict[tuple[bytes, bool, Archive | None], bytes] = {}
    marked_keys: list[bytes] = []
    for found in (found for name in names for found in source_of(name, look).find(look)):
        mark = marks.setdefault((found.root, found.is_named, found.archive), len(marks).to_bytes(_MARK_BYTES, "big"))
        if found.archive is None:
            marked_keys += [key + mark for key in found.keys]
        else:
            places = found.places.tobytes()
            starts = range(0, len(places), _PLACE_BYTES)
            marked_keys += [
                key + mark + places[start : start + _PLACE_BYTES] for key, start in zip(found.keys, starts, strict=True)
            ]
    if not marked_keys:
        raise ImageError(f"no image found in {', '.join(names) or 'an empty list'}", *_what_is_there(look))
    marked_keys.sort(reverse=True)
    count = len(marked_keys)
    marked_keys = choice.of(marked_keys)
    remarks = Remarks(look.not_taken.counts, str(choice) if len(marked_keys) < count else "", count, len(marked_keys))
    files, member_sizes = _pack(marked_keys, list(marks), packed_at_once)
    sizes_bytes = _measure(files, member_sizes, retry_seconds)
    if not unavailable_is_failure:
        _check_available(files, sizes_bytes)
    return ImageList(files.keys, files, array("q", [max(size, UNMEASURABLE) for size in sizes_bytes]), remarks)


def _what_is_there(look: Look) -> list[str]:
    return [describe_not_taken(look.not_taken.counts)] if look.not_taken.counts else []


def _measure(files: Files, member_sizes: array[int], retry_seconds: float) -> array[int]:
    """Return the size of each image: the archives say how large members are, and the system how large files are."""
    if files.archives and len(files.archives) == len(files.roots):
        return member_sizes
    sizes_bytes = measure(files, retry_seconds=retry_seconds)
    for position, size in enumerate(member_sizes):
        if size != LOOSE:
            sizes_bytes[position] = size
    return sizes_bytes


def _check_available(files: Files, sizes_bytes: Sequence[int]) -> None:
    unavailable = [position for position, size in enumerate(sizes_bytes) if size <= UNAVAILABLE]
    if unavailable:
        reason = os.strerror(UNAVAILABLE - sizes_bytes[unavailable[0]])
        others = f", and {len(unavailable) - 1:,} other files" if len(unavailable) > 1 else ""
        raise ImageError(f"cannot look at '{files[unavailable[0]]}'{others}: {reason}", THEN_AGAIN)


def _pack(
    marked_keys: list[bytes], marks: Sequence[tuple[bytes, bool, Archive | None]], at_once: int
) -> tuple[Files, array[int]]:
    """Pack keys, each followed by its mark, from the end of the list, which is emptied on the way.

    Return the files, and the sizes of those that are members of archives; -1 for loose files.
    """
    roots = [root for root, _, _ in marks]
    archives = {number: archive for number, (_, _, archive) in enumerate(marks) if archive is not None}
    block, ends, root_of = bytearray(), array("q"), array("i")
    places = [array("q") for _ in range(NUMBERS_OF_A_MEMBER)]
    last: list[bytes] = []
    while marked_keys:
        marked = [*last, *marked_keys[: -at_once - 1 : -1]]
        del marked_keys[-at_once:]  # Frees their memory once they are packed.
        if archives:
            parted = [key.partition(b"\0") for key in marked]
            keys = [key for key, _, _ in parted]
            numbers = [int.from_bytes(mark[: _MARK_BYTES - 1], "big") for _, _, mark in parted]
        else:
            keys = [key[:-_MARK_BYTES] for key in marked]
            numbers = [int.from_bytes(key[-_MARK_BYTES:], "big") for key in marked]
        for twice in itertools.compress(range(len(keys)), map(operator.eq, keys, keys[1:])):
            one, other = (os.fsdecode(roots[number] + keys[twice]) for number in numbers[twice : twice + 2])
            raise ImageError(
                f"two images have the key '{os.fsdecode(keys[twice])}': {one} and {other}",
                "name the folder that holds both, or run twice",
            )
        new = slice(len(last), None)
        ends.extend(itertools.islice(itertools.accumulate(map(len, keys[new]), initial=len(block)), 1, None))
        root_of.extend(numbers[new])
        block += b"".join(keys[new])
        if archives:
            members = array("q", b"".join([mark[_MARK_BYTES - 1 :] or _NO_PLACE for _, _, mark in parted[new]]))
            for number, place in enumerate(places):
                place.extend(members[number::NUMBERS_OF_A_MEMBER])
        last = marked[-1:]
    keys_of_all = Keys(bytes(block), ends)
    offsets, stored_bytes, sizes_bytes = places
    named = [number for number, (_, is_named, _) in enumerate(marks) if is_named]
    return Files(keys_of_all, roots, root_of, archives, offsets, stored_bytes, named), sizes_bytes
