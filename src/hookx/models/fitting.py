"""A file's tensors -> a module. Every tensor must fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import ModelError, closest
from hookx.layers.select import Selector
from hookx.models.checkpoints import Weights
from hookx.models.unexpected import OPTION, find_matching, ignore, modules_above, order_by_use, propose, settle
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity

_COMPILED = "_orig_mod"  # torch.compile's name for the module inside


@dataclass(frozen=True)
class Filled:
    """A module with its weights, their identity, and what a user should read about them."""

    module: nn.Module
    identity: WeightsIdentity
    notes: tuple[str, ...] = ()
    random_paths: tuple[str, ...] = ()

    def lacking(self, paths: tuple[str, ...], instead: str, file_name: str) -> Filled:
        """Record the modules that a file of weights lacked, and what they hold instead."""
        if not paths:
            return self
        note = f"{instead}, because {file_name} lacks them: {', '.join(paths)}"
        return Filled(self.module, self.identity.lacking(paths, instead), (*self.notes, note), paths)


def without_prefix(weights: Weights, own: Collection[str], ref: str) -> Weights:
    """Remove the prefix that a wrapper put in front of a file's names: 'module.', 'model.backbone.', ...

    A prefix is what turns names of the file into names of the model, `own`. It is removed if every tensor carries it
    or at least half of the model's names follow it, and only if it matches more names than no prefix does. Tensors
    beside it are left out as whole groups, unless they could be part of the model.

    Raises:
        ModelError: two prefixes fit equally well and the user leaves out neither, or part of the model is outside.
    """
    weights = _join_chunks(weights, own)
    state = weights.state
    if _is_compiled(state) and not _is_compiled(own):
        state = {".".join(part for part in name.split(".") if part != _COMPILED): v for name, v in state.items()}
        if len(state) < len(weights.state):
            raise ModelError(f"'{weights.file}' holds some tensors twice, with and without '{_COMPILED}.'")
        weights = replace(weights, state=state, prefix=f"{_COMPILED}.")
    wanted = {name for name in own if not _is_counter(name)}
    # prefix -> names of the model
    found = Counter(name[:cut] for name in state for cut in _suffix_starts(name) if name[cut:] in wanted)
    most = max(found.values(), default=0)
    if found[""] == most:
        return weights
    prefixes = order_by_use(sorted(prefix for prefix, count in found.items() if count == most))
    settled = settle(prefixes, weights.patterns, weights.entry) if len(prefixes) > 1 else prefixes[0]
    prefix = settled or prefixes[0]
    outside = [name for name in state if not name.startswith(prefix)]
    if 2 * most < len(wanted) and outside:
        return weights
    key = f"--weights-key {f'{weights.entry}.' if weights.entry else ''}{prefix.removesuffix('.')}"
    if settled is None:
        raise ModelError(
            f"'{weights.file}' holds the tensors of {ref} {len(prefixes)} times: under {', '.join(prefixes)}",
            f"choose one: {key}",
        )
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    without = {name.split(".")[0] for name in wanted - inside.keys()}
    dropped = {name for pattern in weights.patterns for name in find_matching(pattern, outside)}
    for name in outside:
        if name not in dropped and (part := _group(name, prefix).rpartition(".")[2]) in without:
            raise ModelError(
                f"'{weights.file}' has {name} outside '{prefix}', which holds the other tensors of {ref}; "
                f"it may or may not belong to {part} of {ref}",
                f"to leave it out: {key} --allow-missing {part}",
            )
    left_out = Counter(_group(name, prefix) for name in outside)
    beside = (*weights.beside, *outside)
    return replace(weights, state=inside, prefix=weights.prefix + prefix, left_out=left_out, beside=beside)


def _join_chunks(weights: Weights, own: Collection[str]) -> Weights:
    """Rename 'blocks.1.7.' to 'blocks.7.', which DINOv2 divides into chunks for training on many devices."""
    chunked = re.compile(r"((?:^|\.)blocks\.)\d+\.(\d+\.)")
    if not any(chunked.search(name) for name in weights.state) or any(chunked.search(name) for name in own):
        return weights
    state = {chunked.sub(r"\1\2", name): value for name, value in weights.state.items()}
    if len(state) < len(weights.state):  # The number within a chunk is not that of the whole model.
        return weights
    note = f"weights in {weights.file.name}: joined the chunks of blocks: 'blocks.0.1.' is 'blocks.1.'"
    return replace(weights, state=state, fitting_notes=(*weights.fitting_notes, note))


def fill(module: nn.Module, weights: Weights, ref: str, options: ModelOptions, instead: str) -> Filled:
    """Load a file's tensors into a module whose names they have, and describe the result.

    `instead` says what the modules hold that the file may lack: 'random (seed 0)'.

    Raises:
        ModelError: tensors are missing, of another shape, or unexpected and not left out by the user.
    """
    own = module.state_dict()
    weights = _leave_out(weights, own, ref)
    state = weights.state
    allowed = find_allowed(options.allow_missing, own, ref)
    missing = [name for name in own if name not in state and not _is_counter(name)]
    _refuse_misfit(weights, own, [name for name in missing if name not in allowed], ref)
    dtypes = {(there.dtype, here.dtype) for _, there, here in tensors_in_both(weights, own)}
    notes = [
        f"weights in {weights.file.name}: {str(there).removeprefix('torch.')} in the file, "
        f"{str(here).removeprefix('torch.')} in the model"
        for there, here in sorted(dtypes, key=str)
        if there != here
    ]
    own.update(state)  # Unlike a plain dict, it carries the versions of its modules, which MNASNet asks for.
    module.load_state_dict(own)
    paths = modules_of(name for name in missing if name in allowed)
    return Filled(module, weights.identity, (*weights.notes, *notes)).lacking(paths, instead, weights.file.name)


def _leave_out(weights: Weights, own: Mapping[str, Any], ref: str) -> Weights:
    """Leave out the tensors without a place in the model that the user's patterns match, and note them."""
    inside = weights.prefix.removeprefix(f"{_COMPILED}.")
    entry = f"{weights.entry}." if weights.entry else ""
    unexpected = {name: (inside + name, entry + inside + name) for name in weights.state if name not in own}
    beside = [*weights.beside, *(entry + name for name in weights.beside)]
    ignored = ignore(weights.patterns, unexpected, beside, weights.file)
    if not ignored:
        return weights
    state = {name: value for name, value in weights.state.items() if name not in ignored}
    if not any(name in own for name in state):
        raise ModelError(f"{OPTION} leaves nothing of '{weights.file}': no tensor in it has a name of {ref}")
    names = [name for name in weights.state if name in ignored]
    listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    note = f"left out {len(names)} tensor{'s' * (len(names) > 1)} that {ref} does not have ({OPTION}): {listed}"
    return replace(weights, state=state, fitting_notes=(*weights.fitting_notes, note))


def convert_to_float32(module: nn.Module, name: str) -> tuple[str, ...]:
    """Convert a module's floating-point tensors to float32, which images are in, and return a note if any were not.

    Integers, and so quantized weights, stay as they are; `--precision` chooses the arithmetic.
    """
    tensors = [*module.parameters(), *module.buffers()]
    others = Counter(str(one.dtype).removeprefix("torch.") for one in tensors if _is_other_float(one))
    if not others:
        return ()
    module.float()
    counts = ", ".join(f"{dtype} ({count} of {len(tensors)} tensors)" for dtype, count in sorted(others.items()))
    return (f"{name}: {counts} in the model, converted to float32",)


def _is_other_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float32


def _refuse_misfit(weights: Weights, own: Mapping[str, Any], missing: Sequence[str], ref: str) -> None:
    state = weights.state
    unexpected = [name for name in state if name not in own]
    other_shape = [
        f"{name} {_shape(state[name])} instead of {_shape(own[name])}"
        for name in own
        if name in state and _shape(state[name]) != _shape(own[name])
    ]
    if not (missing or unexpected or other_shape):
        return
    is_mostly_there = 2 * sum(name in own for name in state) > len(own)
    proposal = propose(unexpected) if unexpected and is_mostly_there and not other_shape else ""
    for at, name in enumerate(unexpected[:3]):
        if similar := get_close_matches(name, own, n=1, cutoff=0.8):
            unexpected[at], proposal = f"{name} (closest: {similar[0]})", ""
    kinds = {"missing": missing, "unexpected": unexpected, "other shape": other_shape}
    hints = [list_first(kind, names) for kind, names in kinds.items() if names]
    if weights.architecture and weights.architecture != ref:
        hints.append(f"the file names the architecture {weights.architecture}")
    modules = modules_of(missing)
    if missing and (proposal or not unexpected) and not other_shape and len(modules) <= 3:
        hints.append(
            f"to leave {'them' if not unexpected else 'what is missing'} random: --allow-missing {','.join(modules)}"
        )
    if proposal:
        hints.append(f"to leave out what is unexpected: {proposal}")
    raise ModelError(f"'{weights.file}' does not fit {ref}", *hints)


def list_first(kind: str, names: Sequence[str]) -> str:
    """Count some names and list the first three, for an error: 'missing (4): a, b, c, ...'."""
    return f"{kind} ({len(names)}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def find_allowed(patterns: Iterable[str], own: Mapping[str, Any], ref: str) -> set[str]:
    """Return the tensors that globs match, by their own names or by those of modules that hold them."""
    above = {name: modules_above(name) for name in own}
    nodes = dict.fromkeys((node for nodes in above.values() for node in nodes), "")
    allowed: set[str] = set()
    for pattern in (piece.strip() for text in patterns for piece in text.split(",")):
        matched = set(Selector.parse(pattern).paths(nodes)) if pattern else set()
        if not matched:
            similar = closest(pattern, nodes)
            raise ModelError(f"--allow-missing '{pattern}' matches nothing in {ref}; closest: {similar}")
        allowed |= {name for name, path in above.items() if matched.intersection(path)}
    return allowed


def tensors_in_both(weights: Weights, own: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the tensors that a file and a model have in common: their name, the file's, the model's."""
    for name, there in weights.state.items():
        here = own.get(name)
        if isinstance(there, Tensor) and isinstance(here, Tensor):
            yield name, there, here


def modules_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of the modules that hold tensors: 'fc' for fc.weight, '.' for cls_token."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] or "." for name in names))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_compiled(names: Iterable[str]) -> bool:
    return any(_COMPILED in name.split(".") for name in names)


def _is_counter(name: str) -> bool:
    # Batch norm's step counter was added in torch 0.4.1 and does not affect an eval-mode forward pass.
    return name.endswith("num_batches_tracked")


def _suffix_starts(name: str) -> list[int]:
    return [0, *(cut + 1 for cut, letter in enumerate(name) if letter == ".")]


def _group(name: str, prefix: str) -> str:
    """Return the highest part of a name that is not part of the prefix."""
    parts, above = name.split("."), prefix.split(".")
    shared = next((n for n, (part, other) in enumerate(zip(parts, above, strict=False)) if part != other), 0)
    return ".".join(parts[: shared + 1])
