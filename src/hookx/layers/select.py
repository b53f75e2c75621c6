"""The layers of a probed model, and the activations that selectors select in it.

selector = address | glob over paths | "type:" ClassName
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from hookx.errors import AddressError, LayerError, closest
from hookx.layers.address import ATTENTION, Address, dotted
from hookx.layers.reductions import Patches

_MAX_LAYERS_NAMED = 3  # in an error about all the layers that a glob matches


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a module returned or was given."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]  # for one image, without the batch dimension; for a constant, the whole shape
    dtype: str
    batch_dim: int | None = 0  # the position of the batch dimension; None for a constant
    rows_per_image: int = 1  # above 1, the batch dimension holds this many rows for each image
    problem: str = ""  # why its rows cannot be assigned to images
    groups_per_image: int = 1  # of an image's rows; each is followed by a group of the next image
    rounding: float = field(default=0.0, compare=False)  # of an image in batches of two sizes, relative to its largest
    patches: Patches | None = None  # which of its tokens stand for places of the image, if that is proved
    is_dense: bool = True  # False for what holds values and no rows: a sparse tensor, a set; `problem` says what it is

    @classmethod
    def of_unusable(cls, parts: tuple[str, ...], reason: str) -> TensorInfo:
        """Describe something that holds values and that cannot be captured."""
        return cls(parts, (), "", None, problem=reason, is_dense=False)

    @property
    def is_constant(self) -> bool:
        return self.batch_dim is None and not self.problem

    def why_not(self, address: Address) -> str:
        """Return why it cannot be captured, '' if it can."""
        if self.is_constant:
            return f"'{address}' is constant ({self.shape_text}): it does not depend on the image"
        if self.problem and not self.is_dense:
            return f"'{address}' cannot be captured: {self.problem}"
        if self.problem:
            return f"'{address}' ({self.shape_text}) cannot be split by image: {self.problem}"
        return ""

    @property
    def shape_text(self) -> str:
        """The shape as the layer returns it, with N for the batch: 'N,64,56,56', '49,N,768', '64N,49,96'."""
        if not self.is_dense:
            return "?"
        lengths = [str(length) for length in self.shape]
        if self.rows_per_image > 1 and self.batch_dim is not None:
            lengths[self.batch_dim] += "N"
        elif self.batch_dim is not None:
            lengths.insert(self.batch_dim, "N")
        return ",".join(lengths) or "scalar"


@dataclass(frozen=True)
class Call:
    """One call of a module during a forward pass."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Layer:
    """A module and its calls in a forward pass."""

    path: str
    class_name: str
    parameters: int
    calls: tuple[Call, ...] = ()
    never_called_because: str = ""
    same_as: str = ""  # the module's first path, if it is registered under another one too

    def addresses(self, *, of_inputs: bool = False, of_attention: bool = False) -> dict[Address, TensorInfo]:
        """Return the canonical address of every tensor that the module returns, or is given, or of its attention."""
        return {
            Address(self.path, number if len(self.calls) > 1 else None, of_inputs, tensor.parts): tensor
            for number, call in enumerate(self.calls)
            for tensor in (call.inputs if of_inputs else call.outputs)
            if (tensor.parts == (ATTENTION,)) == of_attention
        }


@dataclass(frozen=True)
class Target:
    """An activation to capture: its address, and the tensor before its reduction."""

    address: Address
    tensor: TensorInfo
    calls: int = 1  # how often a forward pass calls the module
    is_named: bool = True  # by a selector of one module; a target of globs only may be left out

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that is stored for one image."""
        reduction = self.address.reduction
        return reduction.shape(self.tensor.shape, self.tensor.patches) if reduction else self.tensor.shape


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
            return cls("type", Address.parse(text[class_name.end() :], _parse_class), text)
        if re.search(r"[*?]", re.split(r"[:/@]", text, maxsplit=1)[0]):
            return cls("glob", Address.parse(text, _parse_glob), text)
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


def attention_paths(selectors: Iterable[Selector], class_names: Mapping[str, str]) -> list[str]:
    """Return the paths of the layers whose attention is selected."""
    return [path for selector in selectors if selector.address.is_attention for path in selector.paths(class_names)]


def parse_selectors(texts: str | Iterable[str]) -> list[Selector]:
    """Split on commas and parse each selector."""
    return [Selector.parse(piece) for piece in _split([texts] if isinstance(texts, str) else texts)]


def _split(texts: Iterable[str]) -> list[str]:
    return [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]


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
            known = sorted(set(class_names.values())) if selector.kind == "type" else class_names
            raise LayerError(
                f"no layer matches '{selector.text}' in {model}; closest: {closest(selector.address.path, known)}",
                f"list them all: hookx list-layers {model}",
            )
        paths.update(dict.fromkeys(found))
    return list(paths)


def narrow(
    layers: Sequence[Layer],
    model: str,
    *,
    paths: Iterable[str] = (),
    types: Iterable[str] = (),
    depth: int | None = None,
) -> list[Layer]:
    """Keep the layers with a given path, class and depth, for `list-layers`.

    `paths` are globs, or texts that a path has to contain; `types` are names of classes; both are comma-separated.
    `depth` is the maximum number of names in a path; the model itself has none.

    Raises:
        LayerError: a glob, a text or a class matches no layer of the model.
    """
    class_names = {layer.path: layer.class_name for layer in layers}
    kept = set(class_names)
    if texts := _split(paths):
        globs = [text for text in texts if re.search(r"[*?]", text)]
        wanted = set(matched_paths(parse_selectors(globs), class_names, model))
        for text in texts:
            containing = {path for path in class_names if text in path}
            if not containing and text not in globs:
                raise LayerError(f"no layer matches '{text}' in {model}; closest: {closest(text, class_names)}")
            wanted |= containing
        kept &= wanted
    if classes := _split(types):
        kept &= set(matched_paths([Selector.parse(f"type:{name}") for name in classes], class_names, model))
    if depth is not None:
        kept = {path for path in kept if path == "." or path.count(".") < depth}
    return [layer for layer in layers if layer.path in kept]


def select(
    selectors: Sequence[Selector],
    layers: Sequence[Layer],
    model: str,
    exclude: Sequence[Selector] = (),
    *,
    knows_places: bool = True,
) -> Selection:
    """Return the activations that selectors name, in their order and without repeats.

    A glob or a `type:` leaves out what cannot be captured (never called, constant), with the reason in `left_out`.
    What `exclude` names need not be among the layers.

    Args:
        knows_places: whether it was tried to prove which tokens stand for places; without, reductions that need to know
            are believed.

    Raises:
        LayerError: a selector that names one module cannot be satisfied, or another one selects nothing.
    """
    by_path = {layer.path: layer for layer in layers}
    class_names = {layer.path: layer.class_name for layer in layers}
    excluded = [(selector.address, set(selector.paths(class_names))) for selector in exclude]

    def is_excluded(address: Address) -> bool:
        # Each part that the excluding selector gives has to agree.
        return any(
            address.path in paths
            and pattern.call in (None, address.call)
            and pattern.is_input <= address.is_input
            and address.parts[: len(pattern.parts)] == pattern.parts
            and pattern.reduction in (None, address.reduction)
            for pattern, paths in excluded
        )

    chosen: dict[Address, Target] = {}
    all_left_out: dict[str, str] = {}
    for selector in selectors:
        by_name, matched = selector.kind == "path", matched_paths([selector], class_names, model)
        left_out: dict[str, str] = {}
        found, reasons = 0, {}
        for path in matched:
            layer = by_path[path]
            if layer.same_as in matched and not by_name:
                continue  # Taken under its first path.
            if is_excluded(replace(selector.address, path=path)):
                found += 1  # Excluded, so it does not matter whether it could be captured.
                continue
            try:
                targets, unusable = _targets_of(
                    layer, selector.address, model, is_named=by_name, knows_places=knows_places
                )
            except LayerError as error:
                if by_name or isinstance(error, _DoesNotFitError):
                    raise
                left_out[path] = str(error).splitlines()[0]
                reasons[path] = [left_out[path]]
                continue
            found += len(targets)
            left_out.update(unusable)
            reasons[path] = list(unusable.values())
            for target in targets:
                # If a module is called once, conv1:0 is another spelling of conv1.
                if is_excluded(replace(target.address, call=target.address.call or 0)):
                    continue
                if chosen.setdefault(target.address, target) != target and by_name:
                    chosen[target.address] = target  # A glob selected it before.
        if not found:
            raise _nothing_captured(selector, list(reasons.values()), model)
        all_left_out.update(left_out)
    if not chosen:
        raise LayerError("--exclude leaves no layer to capture")
    return Selection(list(chosen.values()), all_left_out)


def _nothing_captured(selector: Selector, reasons: Sequence[Sequence[str]], model: str) -> LayerError:
    """Return an error that says, for every part of the first layers that a selector matches, why it is unusable."""
    shown = "; ".join(reason for of_layer in reasons[:_MAX_LAYERS_NAMED] for reason in of_layer)
    if selector.kind == "path":
        return LayerError(shown)
    more = f"; and {len(reasons) - _MAX_LAYERS_NAMED:,} more layers" if len(reasons) > _MAX_LAYERS_NAMED else ""
    return LayerError(
        f"nothing can be captured of what '{selector.text}' matches in {model}: {shown}{more}",
        f"list the layers: hookx list-layers {model}",
    )


def _targets_of(
    layer: Layer, wanted: Address, model: str, *, is_named: bool, knows_places: bool
) -> tuple[list[Target], dict[str, str]]:
    """Return the targets that an address names in a layer whose path it matched, and the parts left out."""
    name = str(Address(layer.path))
    calls = len(layer.calls)
    if not calls:
        reason = f"\n  ({layer.never_called_because})" if layer.never_called_because else ""
        hint = "; the enclosing module can be captured" if "." in layer.path else ""
        raise LayerError(f"'{name}' is never called in a forward pass{reason}{hint}")
    if wanted.call is not None and wanted.call >= calls:
        times = {1: "once", 2: "twice"}.get(calls, f"{calls} times")
        raise LayerError(
            f"'{name}:{wanted.call}' does not exist: {name} is called {times} in a forward pass",
            f"its calls: {', '.join(f'{name}:{n}' for n in range(calls))}" if calls > 1 else f"write {name}",
        )
    in_call = {
        address: tensor
        for address, tensor in layer.addresses(of_inputs=wanted.is_input, of_attention=wanted.is_attention).items()
        if wanted.call is None or calls == 1 or address.call == wanted.call
    }
    found = {a: t for a, t in in_call.items() if a.parts[: len(wanted.parts)] == wanted.parts}
    if not found:
        verb = "is given" if wanted.is_input else "returns"
        if not wanted.parts:
            raise LayerError(f"'{name}' {verb} no tensor")
        tensors = ", ".join(f"{a} ({t.shape_text})" for a, t in in_call.items()) or "no tensor"
        raise LayerError(f"'{replace(wanted, path=layer.path)}' does not exist: {name} {verb} {tensors}")
    targets, unusable = [], {}
    for address, tensor in found.items():
        if reason := tensor.why_not(address):
            unusable[str(address)] = reason
            continue
        target = Target(replace(address, reduction=wanted.reduction), tensor, calls, is_named)
        try:
            if knows_places or wanted.reduction is None or not wanted.reduction.needs_places:
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
