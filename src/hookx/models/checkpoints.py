"""Weights files of every kind -> the tensors in them. No code in a file runs unless the file is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hookx.errors import ModelError, one_line
from hookx.models.archives import check_archive
from hookx.models.entries import AVERAGED, SAVE_WEIGHTS, NoWeightsError, choose, is_entry_of_state, names_beside
from hookx.models.inert import HostileError, load_saved
from hookx.models.unexpected import split_patterns
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity

_SUFFIXES = (".safetensors", ".pt", ".pth", ".pt2", ".ckpt", ".tar", ".bin", ".index.json")

_ARCHITECTURE_KEYS = ("arch", "architecture", "model_name")

_COULD_RUN = "it holds more than tensors, and reading it could run code"
_REFUSED = "Weights only load failed"  # how torch refuses a file that could run code
TRUST = "or, if you trust its author to run any code as you: --trust-checkpoint"


def is_weights_file(weights: str) -> bool:
    """Return whether `--weights` names a file, which need not exist, rather than published weights."""
    return weights.lower().endswith(_SUFFIXES) or os.sep in weights or Path(weights).is_file()


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, and what was unwrapped to get at them."""

    file: Path
    state: Mapping[str, Any]
    architecture: str = ""
    """The architecture that the file names."""
    entry: str = ""
    """The key that held them; '' if the file is a plain state dict."""
    prefix: str = ""
    """What was removed from their names."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What was outside the prefix: group -> number of tensors."""
    others: tuple[str, ...] = ()
    """The entries that could have been chosen instead."""
    ignored: tuple[str, ...] = ()
    """The entries among the tensors that are not tensors."""
    patterns: tuple[str, ...] = ()
    """The globs over tensors without a place in the model that the user leaves out."""
    beside: tuple[str, ...] = ()
    """The names of what is not used: other entries, and tensors outside the prefix."""
    fitting_notes: tuple[str, ...] = ()
    """What was done to the tensors to fit them to a model."""
    ran_code: bool = False

    @property
    def identity(self) -> WeightsIdentity:
        """The digest of the file, or of an index and its shards, and what was unwrapped."""
        without = f"without {self.prefix}" if self.prefix else ""
        left_out = f"left out {', '.join(self.left_out)}" if self.left_out else ""
        ignoring = f"ignoring {', '.join(sorted(self.patterns))}" if self.patterns else ""
        return WeightsIdentity.of_file(sha256_of(self.file), self.entry, without, left_out, ignoring)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user; the first one sums up what was unwrapped."""
        unwrapped = [
            f"taken from '{self.entry}'" if self.entry else "",
            f"prefix '{self.prefix}' removed" if self.prefix else "",
            *(f"left out {n} tensor{'s' * (n > 1)} under '{group}'" for group, n in self.left_out.items()),
            f"left out {', '.join(self.ignored[:3])} (not tensors)" if self.ignored else "",
        ]
        notes = []
        if any(unwrapped):
            notes.append(f"weights in {self.file.name}: {'; '.join(filter(None, unwrapped))}")
        if self.others:
            others = ", ".join(f"'{name}'" for name in self.others)
            what = " (a moving average)" if set(self.others) <= set(AVERAGED) else ""
            notes.append(f"{self.file.name} also holds {others}{what}; to load it: --weights-key {self.others[0]}")
        if self.ran_code:
            notes.append(trusted_note(self.file))
        return (*notes, *self.fitting_notes)


def read_weights(file: str, options: ModelOptions = ModelOptions(), *, shapes_only: bool = False) -> Weights:
    """Read a weights file, and find the state dict in whatever it is nested in.

    Args:
        file: .safetensors, an index of shards (.index.json), or anything that `torch.save` wrote, whatever its suffix.
        options: which entry to take, and whether the file is trusted to run code.
        shapes_only: map the file rather than read its values.

    Raises:
        ModelError: the file cannot be read safely, holds no weights, or holds several sets and none was chosen.
    """
    path = Path(file)
    patterns = split_patterns(options.ignore_unexpected)
    content = read_content(path, options, shapes_only=shapes_only)
    found = choose(content.value, options.weights_key, path, patterns)
    state = found.value.state_dict() if isinstance(found.value, nn.Module) else found.value
    return Weights(
        file=path,
        state={name: value for name, value in state.items() if is_entry_of_state(value)},
        architecture=architecture_of(content.value),
        entry=found.entry,
        others=found.others,
        ignored=tuple(name for name, value in state.items() if not is_entry_of_state(value)),
        patterns=patterns,
        beside=names_beside(content.value, found.entry),
        ran_code=content.ran_code,
    )


def architecture_of(content: Any) -> str:
    """Return the architecture that a checkpoint names, as those of PyTorch's ImageNet example do; otherwise ''."""
    names = [content.get(key) for key in _ARCHITECTURE_KEYS] if isinstance(content, Mapping) else []
    return next((name for name in names if isinstance(name, str) and name), "")


def trusted_note(file: Path) -> str:
    return f"{file.name} was allowed to run code while it was read (--trust-checkpoint)"


@lru_cache(maxsize=64)
def _sha256_of_version(path: Path, size_bytes: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256; for an index of shards, the SHA-256 of the digests of all its files."""

    def digest_of(file: Path) -> str:
        status = file.stat()
        return _sha256_of_version(file, status.st_size, status.st_mtime_ns)

    if not path.name.endswith(".index.json"):
        return digest_of(path)
    files = [path, *sorted({path.parent / name for name in _weight_map(path).values()})]
    lines = "".join(f"{digest_of(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a file holds, and whether reading it ran code of its own."""

    value: Any
    ran_code: bool = False


def read_content(path: Path, options: ModelOptions = ModelOptions(), *, shapes_only: bool = False) -> Content:
    """Read whatever a file holds.

    Raises:
        ModelError: the file cannot be read, or reading it could run code and it is not trusted.
    """
    if not path.is_file():
        raise ModelError(f"there is no weights file '{path}'")
    check_archive(path)
    match kind_of(path):
        case "exported program":
            raise ModelError(
                f"'{path}' is an exported program: a model together with its weights",
                f"pass it as --model {path}",
            )
        case "TorchScript":
            raise ModelError(
                f"'{path}' is a TorchScript archive, which hookx does not read: TorchScript's interpreter calls no "
                "hooks, and loading the archive can run code",
                "export the model: torch.export.save(torch.export.export(model, ...), 'model.pt2')",
                "or " + SAVE_WEIGHTS,
            )
    try:
        if path.name.lower().endswith(".index.json"):
            return Content(_read_shards(path))
        if path.suffix.lower() == ".safetensors":
            return Content(load_file(path))
        return _read_pickle(path, options, shapes_only=shapes_only)
    except ModelError:
        raise
    except Exception as error:  # A file can hold any bytes, and each reader has its own exceptions.
        raise ModelError(f"cannot read weights from '{path}': {one_line(error)}", SAVE_WEIGHTS) from None


def kind_of(path: Path) -> str:
    """Return what a file's contents are: an 'exported program', 'TorchScript', or '' for neither."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()} | set(archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return ""
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "exported program"
    return "TorchScript" if "constants.pkl" in names else ""


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index of shards: name of a tensor -> file. A file outside the index's folder is refused."""
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        well_formed = isinstance(mapping, dict) and all(isinstance(file, str) for file in mapping.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    if not well_formed or not mapping:
        raise ModelError(f"'{index}' is not an index of shards: it has no 'weight_map' from tensor names to files")
    for file in mapping.values():
        if file in ("", ".", "..") or "\0" in file or re.search(r"[/\\]", file):
            raise ModelError(f"'{index}' names '{file}' as a shard; shards must be files beside their index")
    return dict(mapping)


def _read_shards(index: Path) -> dict[str, Tensor]:
    mapping = _weight_map(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(mapping.values())):
        content = read_content(index.parent / name).value
        expected = {key for key, file in mapping.items() if file == name}
        if not isinstance(content, Mapping) or set(content) != expected:
            raise ModelError(f"'{index.parent / name}' does not hold the tensors that '{index.name}' lists for it")
        state.update(content)
    return {key: state[key] for key in mapping}


def _read_pickle(path: Path, options: ModelOptions, *, shapes_only: bool) -> Content:
    """Read a file of torch's: all of it, or stand-ins for the objects beside its weights, or by running its code."""
    # Mapping reads only what is accessed; values are read whole, which also checks them.
    mapped = shapes_only and zipfile.is_zipfile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About old pickle protocols and moved sources.
        try:
            return Content(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
        except pickle.UnpicklingError as error:
            if _REFUSED not in str(error):
                raise
            reason = _summarize(error)
        found, blocked = _read_inert(path, options, mapped=mapped)
        if found is not None:
            return found
        if options.trust_checkpoint:
            return Content(torch.load(path, map_location="cpu", weights_only=False), ran_code=True)
    reason = f"{_COULD_RUN} (blocked: {blocked})" if blocked else reason
    raise ModelError(f"cannot read weights from '{path}': {reason}", SAVE_WEIGHTS, TRUST)


def _read_inert(path: Path, options: ModelOptions, *, mapped: bool) -> tuple[Content | None, str]:
    """Read a file with stand-ins; if they are in place of the weights, return None and the class that is needed."""
    try:
        value = load_saved(path, mapped=mapped)
        choose(value, options.weights_key, path, split_patterns(options.ignore_unexpected))
    except HostileError as error:
        return None, str(error)
    except NoWeightsError as error:
        return None, error.blocked
    except ModelError:  # Whoever chooses raises it again.
        pass
    except Exception:  # A file can hold any bytes; what torch's reader said stands.
        return None, ""
    return Content(value), ""


def _summarize(error: Exception) -> str:
    """Summarize in one line why torch's safe reader refused a file; its own message fills a page."""
    text = str(error)
    if _REFUSED not in text:
        return one_line(error)
    if blocked := re.search(r"GLOBAL (\S+) (?:was not|whose)", text) or re.search(r"but got (<.+>)", text):
        return f"{_COULD_RUN} (blocked: {blocked[1]})"
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return f"torch's safe reader refuses it: {reason[1] if reason else one_line(error)}"
