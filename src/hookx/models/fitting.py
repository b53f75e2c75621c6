"""A file's tensors -> a module. Every tensor must fit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from hookx.errors import ModelError, closest
from hookx.layers.select import Selector
from hookx.models.checkpoints import Weights
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity

_COMPILED = "_orig_mod"  # torch.compile's name for the module inside
_MAX_CLASSES_TRIED = 8


def without_prefix(weights: Weights, own: Collection[str], ref: str) -> Weights:
    """Remove the prefix that a wrapper put in front of a file's names: 'module.', 'model.backbone.', ...

    A prefix is what turns names of the file into names of the model. It is removed if every tensor carries it or at
    least half of the model's names follow it, and only if it matches more names than no prefix does. Tensors beside it
    are left out as whole groups, unless they could be part of the model.

    Args:
        weights: the tensors of a file.
        own: the names of the model's tensors.
        ref: the model's name, for messages.

    Raises:
        ModelError: two prefixes fit equally well, or part of the model is outside the prefix.
    """
    compiled = any(_COMPILED in name.split(".") for name in weights.state)
    state = weights.state
    if compiled and not any(_COMPILED in name.split(".") for name in own):
        state = {".".join(part for part in name.split(".") if part != _COMPILED): v for name, v in state.items()}
        if len(state) < len(weights.state):
            raise ModelError(f"'{weights.file}' holds some tensors twice, with and without '{_COMPILED}.'")
        weights = dataclasses.replace(weights, state=state, prefix=f"{_COMPILED}.")
    wanted = {name for name in own if not _is_counter(name)}
    found = Counter(
        name[:cut] for name in state for cut in _suffix_starts(name) if name[cut:] in wanted
    )  # prefix -> names of the model
    most = max(found.values(), default=0)
    if found[""] == most:
        return weights
    prefixes = sorted(prefix for prefix, count in found.items() if count == most)
    prefix = prefixes[0]
    if 2 * most < len(wanted) and not all(name.startswith(prefix) for name in state):
        return weights
    if len(prefixes) > 1:
        entry = f"{weights.entry}." if weights.entry else ""
        raise ModelError(
            f"'{weights.file}' holds the tensors of {ref} {len(prefixes)} times: under {', '.join(prefixes)}",
            f"choose one: --weights-key {entry}{prefixes[0].removesuffix('.')}",
        )
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith(prefix)]
    without = {name.split(".")[0] for name in wanted - inside.keys()}
    for name in outside:
        if (part := _group(name, prefix).rpartition(".")[2]) in without:
            entry = f"{weights.entry}." if weights.entry else ""
            raise ModelError(
                f"'{weights.file}' has {name} outside '{prefix}', which holds the other tensors of {ref}; "
                f"it may or may not belong to {part} of {ref}",
                f"to leave it out: --weights-key {entry}{prefix.removesuffix('.')} --allow-missing {part}",
            )
    return dataclasses.replace(
        weights,
        state=inside,
        prefix=weights.prefix + prefix,
        left_out=Counter(_group(name, prefix) for name in outside) or None,
    )


def classes_in(
    weights: Weights,
    own: Mapping[str, Any],
    with_classes: Callable[[int], Mapping[str, Any]],
    classes: int,
) -> int | None:
    """Return the number of classes in a file's classifier, if that is the only difference in shape.

    Args:
        weights: the tensors of the file, under the model's names.
        own: the state dict of the model for `classes` classes; `with_classes` returns it for any number.
    """
    shapes = {name: (value.shape, own[name].shape) for name, value in weights.state.items() if _both(value, name, own)}
    other = {name: (there, here) for name, (there, here) in shapes.items() if there != here}
    if any(there[1:] != here[1:] or not here or not there for there, here in other.values()):
        return None
    # A detector's head has several outputs per class.
    candidates = {
        there[0] * classes // here[0] for there, here in other.values() if here[0] and not there[0] * classes % here[0]
    }
    for count in sorted(candidates - {0})[:_MAX_CLASSES_TRIED]:
        built = with_classes(count)
        changed = {n for n, tensor in built.items() if isinstance(tensor, Tensor) and tensor.shape != own[n].shape}
        if changed == other.keys() and all(built[name].shape == other[name][0] for name in changed):
            return count
    return None


def load_weights(module: nn.Module, weights: Weights, ref: str, allow_missing: Iterable[str] = ()) -> tuple[str, ...]:
    """Copy a file's tensors into a module; return the modules that keep their values because the file lacks them.

    Args:
        module: receives the tensors.
        weights: under the module's names.
        ref: the module's name, for messages.
        allow_missing: globs over names of tensors, or of the modules that hold them, that the file may lack.

    Raises:
        ModelError: tensors are missing, unexpected, or of another shape.
    """
    own, state = module.state_dict(), weights.state
    missing = [name for name in own if name not in state and not _is_counter(name)]
    allowed = find_allowed(allow_missing, own, ref)
    absent = [name for name in missing if name in allowed]
    missing = [name for name in missing if name not in allowed]
    unexpected = [name for name in state if name not in own]
    other_shape = [
        f"{name} {_shape(state[name])} instead of {_shape(own[name])}"
        for name in own
        if name in state and _shape(state[name]) != _shape(own[name])
    ]
    if missing or unexpected or other_shape:
        similar = [f"{name}{_suggest(name, own)}" for name in unexpected[:3]]
        hints = []
        if weights.architecture and weights.architecture != ref:
            hints.append(f"the file names the architecture {weights.architecture}")
        modules = modules_of(missing)
        if missing and not unexpected and not other_shape and len(modules) <= 3:
            hints.append(f"to leave them random: --allow-missing {','.join(modules)}")
        raise ModelError(
            f"'{weights.file}' does not fit {ref}",
            *(
                f"{kind} ({len(names)}): {', '.join(shown[:3])}{', ...' if len(names) > 3 else ''}"
                for kind, names, shown in (
                    ("missing", missing, missing),
                    ("unexpected", unexpected, similar),
                    ("other shape", other_shape, other_shape),
                )
                if names
            ),
            *hints,
        )
    own.update(state)  # Unlike a plain dict, it carries the versions of its modules, which MNASNet asks for.
    module.load_state_dict(own)
    return modules_of(absent)


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


def fill(module: nn.Module, weights: Weights, ref: str, options: ModelOptions, instead: str) -> Filled:
    """Load a file's tensors into a module, and describe the result.

    Args:
        module: receives the tensors.
        weights: under the module's names.
        ref: the module's name, for messages.
        options: which modules the file may lack.
        instead: what those hold: 'random (seed 0)'.

    Raises:
        ModelError: tensors are missing, unexpected, or of another shape.
    """
    paths = load_weights(module, weights, ref, options.allow_missing)
    filled = Filled(module, weights.identity, (*weights.notes, *_notes_on_dtypes(module, weights)))
    return filled.lacking(paths, instead, weights.file.name)


def _notes_on_dtypes(module: nn.Module, weights: Weights) -> tuple[str, ...]:
    """Describe values stored in another dtype than they are computed in."""
    own = module.state_dict()
    types = {
        (value.dtype, own[name].dtype)
        for name, value in weights.state.items()
        if _both(value, name, own) and value.dtype != own[name].dtype
    }
    return tuple(
        f"weights in {weights.file.name}: {str(there).removeprefix('torch.')} in the file, "
        f"{str(here).removeprefix('torch.')} in the model"
        for there, here in sorted(types, key=str)
    )


def find_allowed(patterns: Iterable[str], own: Mapping[str, Any], ref: str) -> set[str]:
    """Return the tensors that globs match, by their own names or by those of modules that hold them."""
    above = {name: [name[:cut] for cut, letter in enumerate(name) if letter == "."] + [name] for name in own}
    nodes = dict.fromkeys((node for nodes in above.values() for node in nodes), "")
    allowed: set[str] = set()
    for pattern in (piece.strip() for text in patterns for piece in text.split(",")):
        matched = set(Selector.parse(pattern).paths(nodes)) if pattern else set()
        if not matched:
            raise ModelError(
                f"--allow-missing '{pattern}' matches nothing in {ref}; closest: {closest(pattern, nodes)}",
            )
        allowed |= {name for name, path in above.items() if matched.intersection(path)}
    return allowed


def _both(value: Any, name: str, own: Mapping[str, Any]) -> bool:
    return isinstance(value, Tensor) and isinstance(own.get(name), Tensor)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


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


def modules_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of the modules that hold tensors.

    Example:
        >>> modules_of(["fc.weight", "fc.bias", "cls_token"])
        ('fc', '.')
    """
    return tuple(dict.fromkeys(name.rpartition(".")[0] or "." for name in names))


def _suggest(name: str, own: Mapping[str, Any]) -> str:
    matches = get_close_matches(name, own, n=1, cutoff=0.8)
    return f" (closest: {matches[0]})" if matches else ""
