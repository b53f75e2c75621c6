"""Models that run now -> pictures of what they make of images."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hookx.capture.probe import example_images
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner, module_classes
from hookx.errors import HookxError, ImageError, LayerError, UsageError, closest
from hookx.images.decoding import decode, failure_reason, model_input
from hookx.images.files import File
from hookx.images.listing import list_images
from hookx.layers.select import Selector, matched_paths, parse_selectors
from hookx.models import borrowed_models
from hookx.options import VisualizeOptions, list_paths, takes
from hookx.pictures.attention import find_attention
from hookx.pictures.contents import Look, ShownImage, ShownLayer, show_attention, show_input, show_layer
from hookx.pictures.gallery import Gallery, draw
from hookx.pictures.places import probe_places
from hookx.run.ready import ReadyModel, ready_model

log = logging.getLogger("hookx")


@takes(VisualizeOptions)
def visualize(options: VisualizeOptions) -> Gallery:
    """Draw the feature maps of images: one picture per layer, and an overview with one column per depth.

    For several models, the overview has one row per model, and weights and layers are given once for all of them or
    once for each. Several images get a folder and a row each. Pictures that hookx drew before are replaced; other files
    are not.

    Raises:
        HookxError: an argument is invalid, a file cannot be written, or no image can be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     gallery = visualize("resnet18", "conv1,layer4", "images/animals", weights="none", out=out)
        >>> [(picture.layer, picture.shows) for picture in gallery.pictures]
        [('conv1', '64 channels of 112 × 112'), ('layer4', '512 channels of 7 × 7'), ('', '1 row, 2 layers')]
    """
    with borrowed_models():
        return _visualize(options)


def _visualize(options: VisualizeOptions) -> Gallery:
    look = Look(options, options.attention)
    asked = pair(options.model, options.weights, options.layers, attention=look.attention)
    listed = list_images(list_paths(options.images), columns=(), suffixes=options.suffix)
    viewers = []
    for ref, weights, selectors in asked:
        ready = ready_model(ref, weights, options, [] if look.attention else selectors, batch_size=1)
        viewers.append(_Viewer(ready.settle(), selectors, look))
    failures: dict[str, str] = {}
    shown = _show(dict(zip(listed.keys, listed.files, strict=True)), viewers, failures)
    models = [viewer.ready.loaded.name for viewer in viewers]
    return draw(shown, look, images=listed.keys, models=models, progress=options.progress, failures=failures)


def pair(
    model: str | Sequence[str], weights: str | Sequence[str], layers: str | Sequence[str], *, attention: bool = False
) -> list[tuple[str, str, list[Selector]]]:
    """Give each model its weights and layers: one of them for all models, or as many as there are models."""
    models, weights, layers = ([value] if isinstance(value, str) else list(value) for value in (model, weights, layers))
    if not models:
        raise UsageError("no model is named", "name one: --model resnet18    list them: hookx list-models")
    weights = weights or ["default"]
    layers = [",".join(layers)] if len(models) == 1 or not layers else layers
    for flag, values in (("--weights", weights), ("--layers", layers)):
        if len(values) not in (1, len(models)):
            raise UsageError(
                f"{flag} is given {len(values)} times for {len(models)} models",
                f"give {flag} once for all models, or once for each, in the same order",
            )
    pairs = []
    for name, named_weights, texts in zip(models, itertools.cycle(weights), itertools.cycle(layers), strict=False):
        selectors = parse_selectors(texts)
        if not selectors and not attention:
            raise UsageError(
                f"no layer of {name} is named", f"name one: --layers layer4    list them: hookx list-layers {name}"
            )
        pairs.append((name, named_weights, selectors))
    return pairs


class _Viewer:
    """Shows what one model makes of images: the activations of its selected layers, or its attention."""

    def __init__(self, ready: ReadyModel, selectors: Sequence[Selector], look: Look) -> None:
        self.ready, self.size_px = ready, ready.preprocessing.size_px
        whole, bare = (Runner.of(model.module, model.forward) for model in (ready.loaded, ready.bare))
        self.places = probe_places(
            bare, lambda: whole, self.size_px, look.options.layout, len(ready.preprocessing.mean)
        )
        self.attention_paths = self._find_attention_paths(selectors) if look.attention else None

    def decode(self, file: File) -> Tensor:
        loaded = self.ready.loaded
        return decode(file, self.ready.preprocessing, transform=loaded.transform, loader=loaded.loader)[0]

    def show(self, key: str, pixels_CHW: Tensor) -> ShownImage:
        loaded, device = self.ready.loaded, self.ready.runner.device
        pixels_NCHW = model_input(pixels_CHW.unsqueeze(0).to(device), self.ready.preprocessing)
        if self.attention_paths is None:
            layers = self._show_layers(pixels_NCHW)
        else:
            layers = [
                show_attention(one, self.places.grid(one.weights_HQK.shape[-1]) if one.windows == 1 else None)
                for one in find_attention(self.ready.runner, pixels_NCHW)
                if one.path in self.attention_paths
            ]
        return ShownImage(key, loaded.name, loaded.weights, *show_input(pixels_CHW, self.size_px), layers)

    def _show_layers(self, pixels_NCHW: Tensor) -> list[ShownLayer]:
        targets = self.ready.selection.targets
        rows = {
            str(target.address): torch.empty((1, *target.shape), dtype=getattr(torch, stored_dtype(target)))
            for target in targets
        }
        with RowCapture(self.ready.runner, targets, self.ready.settled) as capture:
            capture.run(pixels_NCHW, rows)
            capture.wait()
        return [show_layer(address, rows[address][0], self.places) for address in self.places.sort(rows)]

    def _find_attention_paths(self, selectors: Sequence[Selector]) -> set[str]:
        """Return the modules that compute attention, if they are selected or lie within a selected module."""
        model, runner, preprocessing = self.ready.loaded, self.ready.runner, self.ready.preprocessing
        paths = [
            one.path
            for one in find_attention(
                runner, example_images(runner, self.size_px, preprocessing.mean, preprocessing.std)[:1]
            )
        ]
        if not paths:
            raise HookxError(
                f"--attention: {model.name} has no attention; its forward pass computes no softmax over tokens",
                "omit --attention to draw its layers",
            )
        if not selectors:
            return set(paths)
        selected = matched_paths(selectors, module_classes(model.module), model.name)
        within = {path for path in paths for above in selected if path == above or path.startswith(f"{above}.")}
        if not within:
            near = closest(selected[0], dict.fromkeys(paths))
            raise LayerError(f"there is no attention in {', '.join(selected[:3])}; closest: {near}")
        return within


def _show(files: Mapping[str, File], viewers: Sequence[_Viewer], failures: dict[str, str]) -> Iterator[ShownImage]:
    """Show each image by every model; enter the images that cannot be read into `failures`."""
    for key, file in files.items():
        try:
            inputs = [viewer.decode(file) for viewer in viewers]
        except Exception as error:  # A decoder, or the user's own transform, can raise anything.
            failures[key] = failure_reason(error)
            log.warning("cannot read '%s': %s", key, failures[key])
            continue
        for viewer, pixels_CHW in zip(viewers, inputs, strict=True):
            yield viewer.show(key, pixels_CHW)
    if len(failures) == len(files):
        raise ImageError("none of the images could be read")
