"""Images and models, or a run that is there -> what the models made of the images -> pictures."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookx.capture.modules import module_classes
from hookx.capture.probe import example_images
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.errors import HookxError, ImageError, LayerError, ModelError, NotStoredError, UsageError, closest
from hookx.images.decoding import decode, failure_reason, model_input
from hookx.images.listing import list_images
from hookx.layers.address import Address
from hookx.layers.select import Selector, matched_paths, parse_selectors
from hookx.models import load_model, may_run_code, skeleton
from hookx.options import LookOptions, Paths, VisualizeOptions, VisualizeRunOptions, list_paths, takes
from hookx.pictures import Pixels
from hookx.pictures.attention import attention_of
from hookx.pictures.gallery import Look, Picture, Seen, Shown, drawn, shown_activation, shown_attention
from hookx.pictures.places import Places, TokenGrid, find_token_grid, places_of
from hookx.plan import Plan, WeightsIdentity
from hookx.read.features import Features, open_features
from hookx.run.ready import ReadyModel, ready_model

log = logging.getLogger("hookx")


@dataclass(frozen=True)
class Gallery:
    """The pictures that were drawn, in order, and the images that could not be read, each with the reason."""

    out: str
    pictures: tuple[Picture, ...]
    failures: dict[str, str]


@takes(VisualizeOptions)
def visualize(options: VisualizeOptions) -> Gallery:
    """Draw the feature maps of images: one picture per layer, and an overview with one column per depth.

    For several models, the overview has one row per model, and weights and layers are given once for all of them or
    once for each. Several images get a folder and a row each. Pictures that hookx drew before are replaced; other files
    are not.

    Raises:
        HookxError: whatever is wrong with the arguments.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     gallery = visualize("resnet18", "conv1,layer4", "images/animals", weights="none", out=out)
        >>> [(picture.layer, picture.shows) for picture in gallery.pictures]
        [('conv1', '64 channels of 112 × 112'), ('layer4', '512 channels of 7 × 7'), ('', '1 row, 2 layers')]
    """
    look, attention = _look(options), options.attention
    asked = paired(options.model, options.weights, options.layers, attention=attention)
    listed = list_images(list_paths(options.images))
    files = dict(zip(listed.keys, listed.files, strict=True))
    subjects = []
    for ref, weights_of_ref, selectors in asked:
        ready = ready_model(
            ref,
            weights_of_ref,
            options,
            [] if attention else selectors,
            device=options.device,
            precision=options.precision,
            preprocessing=options,
        )
        for left_out in ready.selection.left_out.values():
            log.info("left out: %s", left_out)
        subjects.append(_Subject(ready, selectors, look.layout, attention))
    failures: dict[str, str] = {}

    def seen() -> Iterator[Seen]:
        for key, file in files.items():
            for subject in subjects:
                try:
                    pixels_CHW, _ = decode(file, subject.preprocessing, transform=subject.ready.loaded.transform)
                except Exception as error:  # Whatever a decoder raises.
                    failures[key] = failure_reason(error)
                    log.warning("cannot read '%s': %s", key, failures[key])
                    break
                yield subject.look_at(key, pixels_CHW)
        if len(failures) == len(files):
            raise ImageError("none of the images could be read")

    pictures = []
    models = [subject.ready.loaded.name for subject in subjects]
    out = Path(options.out)
    for picture in drawn(seen(), out, look, images=list(files), models=models, attention=attention):
        pictures.append(picture)
        options.progress(1)
    return Gallery(str(options.out), tuple(pictures), failures)


@takes(VisualizeRunOptions)
def visualize_run(options: VisualizeRunOptions) -> Gallery:
    """Draw the activations that a run has stored, without its model.

    How they are to be read is learnt from the architecture, if it is one of torchvision's or timm's: what a plan says
    is never taken for code to run. For other models it follows from the shapes, or `layout` says it.

    Raises:
        HookxError: the run, an image or a layer is not there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.run.run import extract
        >>> with TemporaryDirectory() as out:
        ...     _ = extract("resnet18", "conv1,fc", "images", weights="none", out=f"{out}/features")
        ...     gallery = visualize_run(f"{out}/features", ["sky/hubble.jpg"], "conv1", out=f"{out}/maps")
        >>> [picture.shows for picture in gallery.pictures]
        ['64 channels of 112 × 112', '1 row, 1 layer']
    """
    look, path, keys, layers = _look(options), options.path, options.keys, options.layers
    features = open_features(path, partial=True)
    plan = features.plan
    keys = _keys_of_run(features, keys)
    inputs = _inputs_of_run(plan, keys, options.images)
    addresses = _addresses_of_run(features, layers)
    reader = _Reader(_places_of_run(plan, look.layout))
    addresses = reader.in_order(addresses)

    def seen() -> Iterator[Seen]:
        for key in keys:
            shown = [reader.shown(address, features[address].of(key)) for address in addresses]
            yield Seen(key, plan.model, plan.weights, *_photo(inputs.get(key), plan.preprocessing.crop_px), shown)

    pictures = []
    for picture in drawn(seen(), Path(options.out), look, images=keys, models=[plan.model]):
        pictures.append(picture)
        options.progress(1)
    return Gallery(str(options.out), tuple(pictures), {})


def _look(options: LookOptions) -> Look:
    return Look(options.channels, options.top, options.reduce, options.colormap, options.layout)


def paired(
    model: str | Sequence[str], weights: str | Sequence[str], layers: str | Sequence[str], *, attention: bool = False
) -> list[tuple[str, str, list[Selector]]]:
    """Give each model its weights and its layers; one of them for all, or as many as there are models.

    Example:
        >>> for name, weights, selectors in paired(["vgg11", "resnet18"], "none", ["features.0", "conv1,layer4"]):
        ...     print(name, weights, [selector.text for selector in selectors])
        vgg11 none ['features.0']
        resnet18 none ['conv1', 'layer4']
    """
    models, weights, layers = ([value] if isinstance(value, str) else list(value) for value in (model, weights, layers))
    if not models:
        raise UsageError("no model is named", "as in --model resnet18    see them: hookx list-models")
    if len(models) == 1:
        layers = [",".join(layers)]
    for what, values in (("weights", weights), ("layers", layers)):
        if len(values) not in (0, 1, len(models)):
            raise UsageError(
                f"{len(models)} models and {len(values)} times --{what}: which belong to which?",
                f"give --{what} once, for all, or once for each model, in the same order",
            )
    found = []
    for number, name in enumerate(models):
        selectors = parse_selectors(layers[number % len(layers)] if layers else "")
        if not selectors and not attention:
            raise UsageError(
                f"no layer of {name} is named", f"name one: --layers layer4    list them: hookx list-layers {name}"
            )
        found.append((name, weights[number % len(weights)] if weights else "default", selectors))
    return found


class _Reader:
    """Reads activations by their places, and says once of each address what a user should know of that."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._said: set[str] = set()

    def shown(self, address: str, activation: Tensor) -> Shown:
        reading = self.places.reading(Address.parse(address), tuple(activation.shape))
        if reading.note and address not in self._said:
            log.info("%s: %s", address, reading.note)
            self._said.add(address)
        return shown_activation(address, activation, reading)

    def in_order(self, addresses: Iterable[str]) -> list[str]:
        """Return addresses by depth: in the order in which a forward pass has them."""
        depths = self.places.depths()
        return sorted(addresses, key=lambda address: depths.get(replace(Address.parse(address), reduction=None), 0))


class _Subject:
    """A model that looks at images."""

    def __init__(self, ready: ReadyModel, selectors: Sequence[Selector], layout: str, attention: bool) -> None:
        self.ready, self.preprocessing = ready, ready.preprocessing
        loaded, bare, side_px = ready.loaded, ready.bare, ready.preprocessing.crop_px
        find_grid = functools.partial(find_token_grid, Runner.of(loaded.module, loaded.forward), side_px)
        self.reader = _Reader(places_of(Runner.of(bare.module, bare.forward), side_px, find_grid, layout))
        self.attention_paths = self._attention_paths(selectors) if attention else None

    def look_at(self, key: str, pixels_CHW: Tensor) -> Seen:
        loaded = self.ready.loaded
        pixels_NCHW = model_input(pixels_CHW.unsqueeze(0).to(self.ready.runner.device), self.preprocessing)
        shown = self._activations(pixels_NCHW) if self.attention_paths is None else self._attention(pixels_NCHW)
        return Seen(key, loaded.name, loaded.weights, *_photo(pixels_CHW, self.preprocessing.crop_px), shown)

    def _activations(self, pixels_NCHW: Tensor) -> list[Shown]:
        targets = self.ready.selection.targets
        rows = {
            str(target.address): torch.empty((1, *target.shape), dtype=getattr(torch, stored_dtype(target)))
            for target in targets
        }
        with RowCapture(self.ready.runner, targets) as capture:
            capture.run(pixels_NCHW, rows)
            capture.wait()
        return [self.reader.shown(address, rows[address][0]) for address in self.reader.in_order(rows)]

    def _attention(self, pixels_NCHW: Tensor) -> list[Shown]:
        found = attention_of(self.ready.runner, pixels_NCHW)
        assert self.attention_paths is not None
        return [
            shown_attention(one, self.reader.places.grid(one.weights_HQK.shape[-1]) if one.windows == 1 else None)
            for one in found
            if one.path in self.attention_paths
        ]

    def _attention_paths(self, selectors: Sequence[Selector]) -> set[str]:
        """Return the modules in which attention is computed, as far as they are selected, or within one that is."""
        loaded, side_px = self.ready.loaded, self.preprocessing.crop_px
        found = attention_of(self.ready.runner, example_images(self.ready.runner, side_px)[:1])
        paths = dict.fromkeys(one.path for one in found)
        if not paths:
            raise HookxError(
                f"{loaded.name} has no attention: its forward pass computes no softmax over tokens",
                "without --attention its layers are drawn",
            )
        if not selectors:
            return set(paths)
        selected = matched_paths(selectors, module_classes(loaded.module), loaded.name)
        chosen = {path for path in paths for above in selected if path == above or path.startswith(f"{above}.")}
        if not chosen:
            raise LayerError(
                f"there is no attention in {', '.join(selected[:3])}; closest: {closest(selected[0], paths)}"
            )
        return chosen


def _photo(pixels_CHW: Tensor | None, side_px: int) -> tuple[Pixels | None, str]:
    """Return a model's input as one sees it, and what is to be said of it."""
    said = f"{side_px} × {side_px} pixels as the model saw them"
    if pixels_CHW is None:
        return None, said
    if pixels_CHW.dtype != torch.uint8:  # A model's own transform; what its normalisation was is not known.
        low, high = pixels_CHW.aminmax()
        pixels_CHW = ((pixels_CHW - low) / max(float(high - low), 1e-12) * 255).round().to(torch.uint8)
        said += ", from their least to their greatest value"
    photo: Pixels = pixels_CHW.permute(1, 2, 0).numpy()
    return photo, said


def _keys_of_run(features: Features, keys: Sequence[str]) -> list[str]:
    stored = features.keys_of_rows
    if not keys and len(stored) == 1:
        return list(stored)
    if not keys:
        some = ", ".join(stored[:3]) + (", ..." if len(stored) > 3 else "")
        raise UsageError(f"which of the {len(stored):,} images of {features.path}/?", f"--image KEY; there is: {some}")
    for key in keys:
        features.rows.position(key)  # raises for one that is not there
    return list(dict.fromkeys(keys))


def _addresses_of_run(features: Features, layers: str | Sequence[str]) -> list[str]:
    """Return the addresses of a run that texts name: whole, by their path, or by a glob."""
    stored = [layer.address for layer in features.plan.layers]
    texts = [text.strip() for one in ([layers] if isinstance(layers, str) else layers) for text in one.split(",")]
    found: dict[str, None] = {}
    for text in filter(None, texts):
        named = [a for a in stored if a == text or Address.parse(a).path == text or fnmatchcase(a, text)]
        if not named:
            raise NotStoredError.of(f"{features.path}/", text, stored)
        found.update(dict.fromkeys(named))
    return list(found or stored)


def _places_of_run(plan: Plan, layout: str) -> Places:
    """Learn from the architecture that a plan names where its activations lie; no weights are loaded."""
    try:
        if may_run_code(plan.model):
            raise ModelError(f"building {plan.model} again may run code")
        bare = skeleton(plan.model, WeightsIdentity(plan.weights).published_name or "none")

        @functools.cache
        def whole() -> Any:
            return load_model(plan.model, "none")  # Which weights it has does not matter to where tokens lie.

        def find_grid(count: int, sides: Sequence[int]) -> TokenGrid | None:
            loaded = whole()
            return find_token_grid(Runner.of(loaded.module, loaded.forward), plan.preprocessing.crop_px, count, sides)

        return places_of(Runner.of(bare.module, bare.forward), plan.preprocessing.crop_px, find_grid, layout)
    except HookxError as error:
        log.info("%s; how layers are read follows from their shapes, or from --layout", str(error).splitlines()[0])
        return Places({}, {}, lambda _count, _sides: None, layout)


def _inputs_of_run(plan: Plan, keys: Sequence[str], images: Paths) -> dict[str, Tensor]:
    """Prepare the images of a run again, as far as they are named and the plan says how."""
    sources = list_paths(images)
    if not sources:
        return {}
    if plan.preprocessing.custom:
        log.info("the inputs are not shown: the plan does not say all that the model's own preprocessing does")
        return {}
    listed = list_images(sources)
    files = dict(zip(listed.keys, listed.files, strict=True))
    exactly = replace(plan.preprocessing, decode="exact")  # The eye sees no difference, and needs no GPU.
    inputs = {}
    for key in keys:
        if key not in files:
            raise ImageError(f"'{key}' is not among the images named; closest: {closest(key, files)}")
        try:
            inputs[key] = decode(files[key], exactly)[0]
        except Exception as error:  # Whatever a decoder raises.
            raise ImageError(f"cannot read '{key}': {failure_reason(error)}") from None
    return inputs
