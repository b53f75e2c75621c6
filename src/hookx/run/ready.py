"""A model made ready to run: built, on its device, with its preprocessing and its selected layers."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.copies import has_streams
from hookx.capture.determinism import find_nondeterministic
from hookx.capture.failures import is_out_of_memory, report_broken_device
from hookx.capture.patches import prove_patches
from hookx.capture.probe import example_images, probe
from hookx.capture.runner import MEMORY_FORMATS, Runner, module_classes, modules_of
from hookx.capture.settle import settle
from hookx.capture.state import Settled
from hookx.errors import CaptureError, HookxError, LayerError, ModelError, UsageError, one_line
from hookx.images.decoding import check_decoding, decode
from hookx.images.listing import ImageList
from hookx.images.loaders import WrongResultError
from hookx.layers.select import Layer, Selection, Selector, Target, attention_paths, matched_paths, select
from hookx.models import LoadedModel, forget_skeletons, load_model, release_models, skeleton
from hookx.options import ExtractOptions, VisualizeOptions
from hookx.plan import Preprocessing
from hookx.run.defaults import check_precision, choose_device, choose_memory_format, device_name

log = logging.getLogger("hookx")
_MAX_IMAGES_TRIED = 3  # by a loader, until one can be read


@dataclass(frozen=True)
class ReadyModel:
    """A model on its device, its skeleton without weights, its preprocessing and its selected layers."""

    loaded: LoadedModel
    bare: LoadedModel
    preprocessing: Preprocessing
    runner: Runner
    selection: Selection
    nondeterministic: dict[str, str]  # path -> operation, of the layers whose bits can differ from run to run

    settled: Settled = field(default_factory=Settled)

    def settle(self) -> ReadyModel:
        """Settle how the passes of a run follow one another; see `hookx.capture.settle`."""
        settled = settle_passes(self.runner, self.selection.targets, self.preprocessing)
        return dataclasses.replace(self, settled=settled)


def ready_model(
    model: str,
    weights: str,
    options: ExtractOptions | VisualizeOptions,
    selectors: Sequence[Selector],
    excluded: Sequence[Selector] = (),
    memory_format: str = "auto",
    batch_size: int | str = "auto",
    chosen_for: str | None = None,
) -> ReadyModel:
    """Build a model and select its layers; a wrong selector fails on the skeleton, before weights are loaded.

    Without selectors nothing is probed, and the selection is empty. Where every batch has one image, `batch_size` is 1,
    and no layer is refused because its rows depend on other images. `chosen_for` is the kind of device for which the
    memory format is chosen, in place of the one that the options name.
    """
    with report_broken_device("while the model was probed"):  # Outermost: what clears up behind it fails as well.
        try:
            ready = _ready_model(model, weights, options, selectors, excluded, memory_format, batch_size, chosen_for)
        except BaseException:
            release_models()
            raise
    forget_skeletons()
    return ready


def _ready_model(
    model: str,
    weights: str,
    options: ExtractOptions | VisualizeOptions,
    selectors: Sequence[Selector],
    excluded: Sequence[Selector],
    memory_format: str,
    batch_size: int | str,
    chosen_for: str | None,
) -> ReadyModel:
    device = choose_device(options.device)
    bare = skeleton(model, weights, options)
    preprocessing = _override(bare, options)
    check_decoding(preprocessing, device)
    check_precision(options.precision, device)
    try:
        paths = matched_paths(selectors, module_classes(bare.module), model)
    except LayerError as error:
        # A note can tell why the model lacks a layer that is named.
        named = [selector.text for selector in selectors if selector.text.isidentifier()]
        reasons = [note for note in bare.notes if any(name in note.split() for name in named)]
        raise LayerError(str(error), *reasons) from None
    matched_paths(excluded, module_classes(bare.module), model)
    convolutions: list[nn.Conv2d] = []
    if selectors:
        by_path = {path: part for path, part in modules_of(bare.module).items() if isinstance(part, nn.Conv2d)}
        bare_runner = Runner.of(bare.module, bare.forward)
        attention = attention_paths(selectors, module_classes(bare.module))
        probed = _probe(
            *(bare, bare_runner, [*paths, *by_path], preprocessing),
            batch_size=batch_size,
            shapes_only=True,
            attention=attention,
        )
        selection = select(selectors, probed, model, excluded, knows_places=False)
        convolutions = _up_to_last(selection, probed, by_path)

    loaded = load_model(model, weights, options)
    log.info("weights: %s", loaded.weights)
    for note in loaded.notes:
        log.info("%s", note)
    if loaded.cpu_only and device.type != "cpu":
        if options.device != "auto":
            raise UsageError(f"{model} has integer layers that run on the CPU only", "write --device cpu")
        device = torch.device("cpu")
        check_decoding(preprocessing, device)
        check_precision(options.precision, device)
    intended = torch.device(chosen_for) if chosen_for else device
    chosen = choose_memory_format(memory_format, convolutions, intended, options.precision)
    runner = Runner(loaded.module, loaded.forward, device, options.precision, chosen)
    try:
        selection = place_and_select(loaded, runner, preprocessing, selectors, excluded, batch_size)
    except CaptureError:
        if memory_format != "auto" or chosen == "contiguous":
            raise
        # A user's own model may take a view that only NCHW has.
        runner = dataclasses.replace(runner, memory_format="contiguous")
        selection = place_and_select(loaded, runner, preprocessing, selectors, excluded, batch_size)
    for left_out in selection.left_out.values():
        log.info("left out: %s", left_out)
    nondeterministic = {}
    if selectors and has_streams(device):
        nondeterministic = find_nondeterministic(runner, _images(runner, preprocessing)[:1])
        for path, operation in nondeterministic.items():
            log.warning(
                "'%s' runs %s, which has no deterministic algorithm on %s: the same run again can differ by rounding",
                *(path, operation, device_name(device)),
            )
    return ReadyModel(loaded, bare, preprocessing, runner, selection, nondeterministic)


def place_and_select(
    loaded: LoadedModel,
    runner: Runner,
    preprocessing: Preprocessing,
    selectors: Sequence[Selector],
    excluded: Sequence[Selector] = (),
    batch_size: int | str = "auto",
) -> Selection:
    """Move a model to its runner's device and memory format, probe it there, and select its layers."""
    _place(loaded, runner)
    if not selectors:
        return Selection()
    # Published weights can lack a module that their architecture has: GoogLeNet's auxiliary classifiers.
    classes = module_classes(loaded.module)
    paths = matched_paths(selectors, classes, loaded.name)
    # Modules that the weights lack are probed too, for their place in the order of execution.
    paths += (path for path in classes if _is_within(path, loaded.random_paths))
    attention = attention_paths(selectors, classes)
    probed = _probe(loaded, runner, paths, preprocessing, batch_size=batch_size, attention=attention)
    if any(one.address.reduction is not None and one.address.reduction.needs_places for one in selectors):
        probed = prove_patches(runner, _images(runner, preprocessing), probed)
    selection = select(selectors, probed, loaded.name, excluded)
    _tell_of_places(selection.targets)
    _warn_of_random_modules(loaded, probed, selection)
    return selection


def _place(loaded: LoadedModel, runner: Runner) -> None:
    """Move a model to its runner's device and memory format; `CaptureError` if its `.to` fails."""
    try:
        loaded.module.to(runner.device)
        loaded.module.to(memory_format=MEMORY_FORMATS[runner.memory_format])
    except Exception as error:  # Offloaded, quantized and hand-written modules have a `.to` of their own.
        if is_out_of_memory(error):
            raise HookxError(
                f"the device has too little memory for {loaded.name}: {one_line(error)}", "try --device cpu"
            ) from None
        raise CaptureError(
            f"{loaded.name} cannot be moved to {runner.device} as {runner.memory_format}: "
            f"{type(error).__name__}: {one_line(error)}",
            "choose another --device or --memory-format, or move the model where it is built",
        ) from error


def settle_passes(runner: Runner, targets: Sequence[Target], preprocessing: Preprocessing) -> Settled:
    """Settle how passes follow one another; see `hookx.capture.settle`."""
    try:
        return settle(runner, targets, _images(runner, preprocessing))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(1, error) from None


def _probe(
    model: LoadedModel,
    runner: Runner,
    paths: Iterable[str],
    preprocessing: Preprocessing,
    *,
    batch_size: int | str = "auto",
    shapes_only: bool = False,
    attention: Collection[str] = (),
) -> list[Layer]:
    images_NCHW = _images(runner, preprocessing)
    try:
        with explaining_size(model.name, preprocessing):
            return probe(
                runner,
                images_NCHW,
                paths=list(dict.fromkeys(paths)),
                why_never_called=model.why_never_called,
                batch_size=batch_size if isinstance(batch_size, int) else None,
                shapes_only=shapes_only,
                attention=attention,
            )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(len(images_NCHW), error) from None


@contextlib.contextmanager
def explaining_size(name: str, preprocessing: Preprocessing) -> Iterator[None]:
    """Add a next step to the error of a model that fails on images of the size of --size."""
    try:
        yield
    except CaptureError as error:
        if not preprocessing.size:
            raise
        step = f"{name} may not take images of {preprocessing.size}: try another --size, or leave it out"
        raise CaptureError(str(error), step) from error


def _images(runner: Runner, preprocessing: Preprocessing) -> Tensor:
    return example_images(runner, preprocessing.size_px, preprocessing.mean, preprocessing.std)


def _up_to_last(selection: Selection, probed: Sequence[Layer], by_path: Mapping[str, nn.Conv2d]) -> list[nn.Conv2d]:
    """Return the convolutions that run before the last target has returned."""
    order = {layer.path: place for place, layer in enumerate(probed) if layer.calls}
    addresses = [target.address for target in selection.targets]
    last = max(order[address.path] for address in addresses)
    finished = [address.path for address in addresses if not address.is_input]
    return [
        convolution
        for path, convolution in by_path.items()
        if path in order and (order[path] < last or _is_within(path, finished))
    ]


def _tell_of_places(targets: Sequence[Target]) -> None:
    """Log once for each kind of sequence which of its tokens stand for places of the image."""
    reduced = [one for one in targets if one.address.reduction is not None and one.address.reduction.needs_places]
    for patches in dict.fromkeys(target.tensor.patches for target in reduced):
        if patches is not None:
            others = ", ".join(map(str, patches.others)) or "none"
            log.info(
                "%d of %d tokens are %d x %d patches (proved on the model); others: %s",
                *(len(patches.tokens), patches.count, patches.height, patches.width, others),
            )


def _warn_of_random_modules(loaded: LoadedModel, probed: Sequence[Layer], selection: Selection) -> None:
    """Warn of targets that run after, or inside, modules that the weights lack."""
    order = [layer.path for layer in probed]
    random = [path for path in order if _is_within(path, loaded.random_paths)]
    for target in selection.targets:
        path = target.address.path
        before = [other for other in random if order.index(other) <= order.index(path)]
        inside = [other for other in loaded.random_paths if path == "." or other.startswith(f"{path}.")]
        if lacking := before + inside:
            log.warning("'%s' depends on random weights: those of %s were missing", target.address, lacking[0])


def _is_within(path: str, paths: Iterable[str]) -> bool:
    return any(other in (path, ".") or path.startswith(f"{other}.") for other in paths)


def _override(model: LoadedModel, options: ExtractOptions | VisualizeOptions) -> Preprocessing:
    """Return the preprocessing of the weights, changed as the user asks."""
    preprocessing = model.preprocessing
    asked: dict[str, Any] = {
        "resize_px": options.resize,
        "crop_px": options.crop,
        "mean": options.mean and tuple(map(float, options.mean)),
        "std": options.std and tuple(map(float, options.std)),
        "interpolation": options.interpolation,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    _check_sizes(preprocessing, options)
    if preprocessing.custom and (asked or options.decode != "exact"):
        raise UsageError(
            f"this model has its own preprocessing ({preprocessing}), which no option can change",
            "leave out --resize, --crop, --mean, --std, --interpolation and --decode; --size may change its size",
        )
    changed = dataclasses.replace(
        preprocessing, **asked, exif=options.exif, decode=options.decode, grey_range=str(options.grey_range)
    )
    _check_channels(model, changed)
    if changed.crop_px > changed.resize_px:
        flag = "--crop" if options.size_px is None else "--size"
        raise UsageError(
            f"{flag} {changed.crop_px} is larger than --resize {changed.resize_px}",
            f"give both: --resize 256 {flag} 224",
        )
    return changed


def _check_sizes(preprocessing: Preprocessing, options: ExtractOptions | VisualizeOptions) -> None:
    """Raise `UsageError` for a --resize or a --crop that contradicts the size of the input or how images fit."""
    if options.size_px is not None and options.crop is not None:
        raise UsageError(
            f"--size {'x'.join(map(str, options.size_px))} and --crop {options.crop} both set the size of the input",
            "leave out --crop; --size and --resize go together",
        )
    for flag, value in (("--resize", options.resize), ("--crop", options.crop)):
        if value is None or preprocessing.custom:
            continue
        if preprocessing.fit != "crop":
            raise UsageError(
                f"{flag} {value} has no meaning for images that --fit {preprocessing.fit} brings to the input's size",
                f"leave out {flag}, or write --fit crop; --size sets the size of the input",
            )
        if preprocessing.crop_width_px or preprocessing.resize_width_px:
            height, width = preprocessing.size_px
            raise UsageError(
                f"{flag} {value} is for square inputs, and this one is {height} x {width}, height x width",
                f"leave out {flag}, or write --size {value}",
            )


def _check_channels(model: LoadedModel, preprocessing: Preprocessing) -> None:
    """Raise `UsageError` unless the images have the model's channels, and there is a mean and a deviation for each."""
    if preprocessing.loader and preprocessing.decode != "exact":
        raise UsageError(f"--decode {preprocessing.decode} and --loader exclude each other", "leave one of them out")
    if preprocessing.custom:
        return
    mean, std = len(preprocessing.mean), len(preprocessing.std)
    channels = model.channels or (mean if preprocessing.loader else 3)
    if channels != 3 and not preprocessing.loader:
        raise UsageError(
            f"{model.name} takes {channels} channels, and images have the 3 of RGB",
            "read them with a function of your own: --loader file.py:function",
        )
    if not mean == std == channels:
        raise UsageError(
            f"there are {mean} means and {std} deviations for {channels} channels",
            f"give as many of each as {model.name} takes: --mean and --std with {channels} numbers",
        )


def try_loader(ready: ReadyModel, images: ImageList) -> None:
    """Raise `ModelError` if a loader of the user's own returns what is not an image; a bad file is not its fault."""
    loaded = ready.loaded
    if loaded.loader is None:
        return
    for position in range(min(_MAX_IMAGES_TRIED, len(images))):
        try:
            decode(images.files[position], ready.preprocessing, None, loaded.transform, loaded.loader)
            return
        except WrongResultError as error:
            name = ready.preprocessing.loader.partition(" sha256:")[0]
            raise ModelError(f"--loader {name}: {error}", f"it read '{images.keys[position]}'") from None
        except Exception:  # Whatever is wrong with a file, the run finds as well, and reports.
            log.debug("the loader cannot read '%s'", images.keys[position])


def out_of_memory(images_at_once: int, error: Exception) -> HookxError:
    return HookxError(
        f"the device has too little memory for {images_at_once} images at once: {str(error).splitlines()[0]}",
        "try --precision bf16, a smaller --size, or --device cpu",
    )
