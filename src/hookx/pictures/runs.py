"""A stored run -> pictures of its activations, without its model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor

from hookx.capture.runner import Runner
from hookx.errors import HookxError, ImageError, ModelError, NotStoredError, UsageError, closest
from hookx.images.decoding import decode, failure_reason
from hookx.images.listing import list_images
from hookx.layers.address import Address
from hookx.models import load_model, may_run_code, skeleton
from hookx.options import AnyPath, ModelOptions, Paths, VisualizeRunOptions, list_paths, takes
from hookx.pictures.contents import Look, ShownImage, show_input, show_layer
from hookx.pictures.gallery import Gallery, draw
from hookx.pictures.places import Places, probe_places
from hookx.plan import Plan, WeightsIdentity
from hookx.read.features import Features, open_features

log = logging.getLogger("hookx")


@takes(VisualizeRunOptions)
def visualize_run(options: VisualizeRunOptions) -> Gallery:
    """Draw the activations that a run has stored, without its model.

    The layout of activations is learnt from the architecture, if it is one of torchvision's or timm's; a plan never
    makes hookx run other code. For other models it follows from the shapes, or from `layout`.

    Raises:
        HookxError: the run, an image or a layer does not exist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.launch.extract import extract
        >>> with TemporaryDirectory() as out:
        ...     _ = extract("resnet18", "conv1,fc", "images", weights="none", out=f"{out}/features")
        ...     gallery = visualize_run(f"{out}/features", ["sky/hubble.jpg"], "conv1", out=f"{out}/maps")
        >>> [picture.shows for picture in gallery.pictures]
        ['64 channels of 112 × 112', '1 row, 1 layer']
    """
    look = Look(options)
    features = open_features(options.path, partial=True)
    plan, size_px = features.plan, features.plan.preprocessing.size_px
    keys = _check_keys(features, options.keys)
    inputs = _prepare_inputs(plan, keys, options.images, options.root)
    addresses = _match_addresses(features, options.layers)
    places = _learn_places(plan, options.layout)
    addresses = places.sort(addresses)

    def show() -> Iterator[ShownImage]:
        for key in keys:
            shown = [show_layer(address, features[address].of(key), places) for address in addresses]
            yield ShownImage(key, plan.model, plan.weights, *show_input(inputs.get(key), size_px), shown)

    return draw(show(), look, images=keys, models=[plan.model], progress=options.progress)


def _check_keys(features: Features, keys: Sequence[str]) -> list[str]:
    """Return the keys once each, or the only key of the run; raise an error for one that is not stored."""
    stored = features.keys_of_rows
    if not keys and len(stored) == 1:
        return list(stored)
    if not keys:
        some = ", ".join(stored[:3]) + (", ..." if len(stored) > 3 else "")
        raise UsageError(f"{features.path}/ holds {len(stored):,} images", f"choose with --image KEY, one of: {some}")
    for key in keys:
        features.rows.position(key)
    return list(dict.fromkeys(keys))


def _match_addresses(features: Features, layers: str | Sequence[str]) -> list[str]:
    """Return the stored addresses that texts name: in full, by their path, or by a glob."""
    stored = [layer.address for layer in features.plan.layers]
    texts = [text.strip() for one in ([layers] if isinstance(layers, str) else layers) for text in one.split(",")]
    matched: dict[str, None] = {}
    for text in filter(None, texts):
        named = [a for a in stored if a == text or Address.parse(a).path == text or fnmatchcase(a, text)]
        if not named:
            raise NotStoredError.of(f"{features.path}/", text, stored)
        matched.update(dict.fromkeys(named))
    return list(matched or stored)


def _learn_places(plan: Plan, layout: str) -> Places:
    """Learn the layout of activations from the architecture that a plan names; no weights are loaded."""
    try:
        if may_run_code(plan.model):
            raise ModelError(f"{plan.model} is not built again, because that could run code")
        options = ModelOptions(size=plan.preprocessing.size or None, resize_positions=True)
        bare = skeleton(plan.model, WeightsIdentity(plan.weights).published_name or "none", options)

        @functools.cache
        def load() -> Runner:
            model = load_model(plan.model, "none", options)  # Any weights show where tokens lie.
            return Runner.of(model.module, model.forward)

        return probe_places(Runner.of(bare.module, bare.forward), load, plan.preprocessing.size_px, layout)
    except HookxError as error:
        problem = str(error).splitlines()[0]
        log.info("%s; the layout of its layers is inferred from their shapes, or set it with --layout", problem)
        return Places(layout=layout, size_px=plan.preprocessing.size_px)


def _prepare_inputs(plan: Plan, keys: Sequence[str], images: Paths, root: AnyPath | None) -> dict[str, Tensor]:
    """Prepare the images of a run again, if they are given and the plan tells how."""
    sources = list_paths(images)
    if not sources:
        return {}
    if plan.preprocessing.custom or plan.preprocessing.loader:
        log.info("the inputs are not shown: the plan does not hold the code that prepares the images")
        return {}
    listed = list_images(sources, root=root, columns=())
    files = dict(zip(listed.keys, listed.files, strict=True))
    exactly = replace(plan.preprocessing, decode="exact")  # No visible difference, and it needs no GPU.
    inputs = {}
    for key in keys:
        if key not in files:
            raise ImageError(f"--images does not contain '{key}'; closest: {closest(key, files)}")
        try:
            inputs[key] = decode(files[key], exactly)[0]
        except Exception as error:  # A decoder can raise anything.
            raise ImageError(f"cannot read '{key}': {failure_reason(error)}") from None
    return inputs
