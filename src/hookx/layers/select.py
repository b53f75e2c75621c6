"""Selectors, and the activations that they select in a probed model.

selector = address | glob over paths | "type:" ClassName
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from hookx.errors import AddressError, LayerError, closest
from hookx.layers.address import Address, dotted
from hookx.layers.tree import Layer, Target, TensorInfo


@dataclass(frozen=True)
class Selector:
    """An address, a glob over paths, or a class of modules; what follows the path applies to every match.

    Example:
        >>> names = {"conv1": "Conv2d", "layer1": "Sequential", "layer1.0": "BasicBlock", "layer1.0.conv1": "Conv2d"}
        >>> [Selector.parse(text).paths(names) for text in ("layer*", "**.conv?", "type:Conv2d", "layer1[0]")]
        [['layer1'], ['conv1', 'layer1.0.conv1'], ['conv1', 'layer1.0.conv1'], ['layer1.0']]
    """

    kind: Literal["path", "glob", "type"]
    address: Address
    text: str

    @classmethod
    def parse(cls, text: str) -> Selector:
        class_name = re.match(r"type:(?!\d+(?:[/@]|$))", text)
        if class_name:
            address = Address._parse(text[class_name.end() :], _parse_class)
            return cls("type", address, text)
        if re.search(r"[*?]", re.split(r"[:/@]", text, maxsplit=1)[0]):
            return cls("glob", Address._parse(text, _parse_glob), text)
        return cls("path", Address.parse(text), text)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        # `**.` before a name also matches nothing: '**.conv?' selects 'conv1'.
        tokens = re.findall(r"(?<![^.])\*\*\.|\*\*|\*|\?|[^*?]+", self.address.path)
        meaning = {"**.": r"(?:.+\.)?", "**": r".+", "*": r"[^.]*", "?": r"[^.]"}
        return re.compile("".join(meaning.get(token, re.escape(token)) for token in tokens))

    def paths(self, class_names: Mapping[str, str]) -> list[str]:
        """Return the selected paths, in the order of `class_names` (path -> class)."""
        if self.kind == "path":
            return [self.address.path] if self.address.path in class_names else []
        if self.kind == "type":
            return [path for path, class_name in class_names.items() if class_name == self.address.path]
        return [path for path in class_names if path != "." and self._regex.fullmatch(str(Address(path)))]


def _parse_class(class_text: str, whole_text: str) -> str:
    if not class_text.isidentifier():
        raise AddressError(f"'{whole_text}' is not a selector: 'type:' takes the name of a class, as in type:Conv2d")
    return class_text


def _parse_glob(path_text: str, whole_text: str) -> str:
    path = dotted(path_text)
    if not all(path.split(".")) or "***" in path or re.search(r"[\[\],\s]", path):
        raise AddressError(
            f"'{whole_text}' is not a glob over layer paths",
            "* stays within one name and ** crosses the dots, as in layer*.0.conv? or features.**",
        )
    return path


def parse_selectors(texts: str | Iterable[str]) -> list[Selector]:
    """Split on commas and parse each selector.

    Example:
        >>> [selector.text for selector in parse_selectors(["conv1, layer1", "type:Linear"])]
        ['conv1', 'layer1', 'type:Linear']
    """
    texts = [texts] if isinstance(texts, str) else texts
    return [Selector.parse(piece.strip()) for text in texts for piece in text.split(",") if piece.strip()]


@dataclass
class Selection:
    """The selected targets in the order of the selectors; path or address -> why it was left out."""

    targets: list[Target] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class _DoesNotFitError(LayerError):
    """A reduction does not fit the shape of a layer: an error even under a glob, because the user has to decide."""


def matched_paths(selectors: Sequence[Selector], class_names: Mapping[str, str], model: str) -> list[str]:
    """Return every path that a selector matches, once; raise `LayerError` if a selector matches nothing."""
    paths: dict[str, None] = {}
    for selector in selectors:
        found = selector.paths(class_names)
        if not found:
            known = set(class_names.values()) if selector.kind == "type" else list(class_names)
            similar = closest(selector.address.path, sorted(known) if selector.kind == "type" else known)
            raise LayerError(
                f"no layer matches '{selector.text}' in {model}; closest: {similar}",
                f"list them all: hookx list-layers {model}",
            )
        paths.update(dict.fromkeys(found))
    return list(paths)


def narrowed(
    layers: Sequence[Layer],
    model: str,
    *,
    paths: Iterable[str] = (),
    types: Iterable[str] = (),
    depth: int | None = None,
) -> list[Layer]:
    """Keep the layers with a given path, class and depth, for `list-layers`.

    Args:
        layers: all layers of a model.
        model: its name, for error messages.
        paths: globs, or texts that a path has to contain; comma-separated.
        types: names of classes; comma-separated.
        depth: the maximum number of names in a path; the model itself has none.

    Raises:
        LayerError: a glob, a text or a class matches no layer of the model.
    """
    kept = list(layers)
    class_names = {layer.path: layer.class_name for layer in layers}
    if texts := [text.strip() for texts in paths for text in texts.split(",") if text.strip()]:
        wanted = set(matched_paths([Selector.parse(t) for t in texts if re.search(r"[*?]", t)], class_names, model))
        for text in texts:
            containing = {path for path in class_names if text in path}
            if not containing and not re.search(r"[*?]", text):
                raise LayerError(f"no layer matches '{text}' in {model}; closest: {closest(text, class_names)}")
            wanted |= containing
        kept = [layer for layer in kept if layer.path in wanted]
    if classes := [f"type:{name.strip()}" for names in types for name in names.split(",") if name.strip()]:
        wanted = set(matched_paths(parse_selectors(classes), class_names, model))
        kept = [layer for layer in kept if layer.path in wanted]
    if depth is not None:
        kept = [layer for layer in kept if _depth(layer.path) <= depth]
    return kept


def _depth(path: str) -> int:
    return 0 if path == "." else path.count(".") + 1


def select(
    selectors: Sequence[Selector], layers: Sequence[Layer], model: str, exclude: Sequence[Selector] = ()
) -> Selection:
    """Return the activations that selectors name, in their order and without repeats.

    A glob or a `type:` leaves out what cannot be captured (never called, constant), with the reason in `left_out`.
    What `exclude` names need not be among the layers.

    Raises:
        LayerError: a selector that names one module cannot be satisfied, or another one selects nothing.
    """
    by_path = {layer.path: layer for layer in layers}
    class_names = {layer.path: layer.class_name for layer in layers}
    excluded = [(selector.address, set(selector.paths(class_names))) for selector in exclude]

    def is_excluded(address: Address) -> bool:
        return any(_covers(pattern, paths, address) for pattern, paths in excluded)

    selection = Selection()
    chosen: dict[Address, Target] = {}
    for selector in selectors:
        matched_paths([selector], class_names, model)
        by_name = selector.kind == "path"
        matched = selector.paths(class_names)
        left_out: dict[str, str] = {}
        found = 0
        for path in matched:
            layer = by_path[path]
            if layer.same_as in matched and not by_name:
                continue  # Taken under its first path.
            if is_excluded(replace(selector.address, path=path)):
                found += 1  # Excluded, so it does not matter whether it could be captured.
                continue
            try:
                targets, unusable = _targets_of(layer, selector.address, model)
            except LayerError as error:
                if by_name or isinstance(error, _DoesNotFitError):
                    raise
                left_out[path] = str(error).splitlines()[0]
                continue
            found += len(targets)
            left_out.update(unusable)
            for target in targets:
                # If a module is called once, conv1:0 is another spelling of conv1.
                if not is_excluded(replace(target.address, call=target.address.call or 0)):
                    chosen.setdefault(target.address, target)
        if not found:
            raise LayerError(
                f"nothing can be captured of what '{selector.text}' matches in {model}: "
                + "; ".join(list(left_out.values())[:3]),
                f"list the layers: hookx list-layers {model}",
            )
        selection.left_out.update(left_out)
    if not chosen:
        raise LayerError("--exclude leaves no layer to capture")
    selection.targets = list(chosen.values())
    return selection


def _covers(pattern: Address, paths: set[str], address: Address) -> bool:
    """Return whether an excluding selector covers an address: each part that the pattern gives has to agree."""
    return (
        address.path in paths
        and pattern.call in (None, address.call)
        and pattern.is_input <= address.is_input
        and address.parts[: len(pattern.parts)] == pattern.parts
        and pattern.reduction in (None, address.reduction)
    )


def _targets_of(layer: Layer, wanted: Address, model: str) -> tuple[list[Target], dict[str, str]]:
    """Return the targets that an address names in a layer whose path it matched, and the parts left out."""
    name = str(Address(layer.path))
    if not layer.calls:
        reason = f"\n  ({layer.never_called_because})" if layer.never_called_because else ""
        hint = "; the enclosing module can be captured" if "." in layer.path else ""
        raise LayerError(f"'{name}' is never called in a forward pass{reason}{hint}")
    if wanted.call is not None and wanted.call >= len(layer.calls):
        raise LayerError(
            f"'{name}:{wanted.call}' does not exist: {name} is called {_times(len(layer.calls))} in a forward pass",
            f"its calls: {', '.join(f'{name}:{n}' for n in range(len(layer.calls)))}"
            if len(layer.calls) > 1
            else f"write {name}",
        )
    side = layer.addresses(of_inputs=wanted.is_input)
    in_call = {
        address: tensor
        for address, tensor in side.items()
        if wanted.call is None or len(layer.calls) == 1 or address.call == wanted.call
    }
    found = {a: t for a, t in in_call.items() if a.parts[: len(wanted.parts)] == wanted.parts}
    if not found:
        verb = "is given" if wanted.is_input else "returns"
        tensors = ", ".join(f"{a} ({t.shape_text})" for a, t in in_call.items()) or "no tensor"
        if not wanted.parts:
            raise LayerError(f"'{name}' {verb} no tensor")
        raise LayerError(f"'{replace(wanted, path=layer.path)}' does not exist: {name} {verb} {tensors}")
    unusable = {str(a): reason for a, t in found.items() if (reason := _why_not_by_image(a, t))}
    if len(unusable) == len(found):
        raise LayerError(next(iter(unusable.values())))
    targets = []
    for address, tensor in found.items():
        if str(address) in unusable:
            continue
        target = Target(replace(address, reduction=wanted.reduction), tensor, len(layer.calls))
        try:
            target.shape  # noqa: B018
        except ValueError as error:
            assert wanted.reduction is not None
            stored = ",".join(["N", *map(str, tensor.shape)])
            raise _DoesNotFitError(
                f"'{target.address}' does not fit: {error} {address} is {stored} in {model}",
                f"for this shape: {wanted.reduction.spellings_for(tensor.shape)}",
            ) from None
        targets.append(target)
    return targets, unusable


def _why_not_by_image(address: Address, tensor: TensorInfo) -> str:
    if tensor.is_constant:
        return f"'{address}' is constant ({tensor.shape_text}): it does not depend on the image"
    if tensor.problem:
        return f"'{address}' ({tensor.shape_text}) cannot be split by image: {tensor.problem}"
    return ""


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
