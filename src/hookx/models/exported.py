"""Exported programs (`.pt2`, from `torch.export`) -> modules whose layers have their dotted paths back."""

from __future__ import annotations

import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookx.errors import ModelError, one_line
from hookx.models.checkpoints import TRUST, kind_of, sha256_of, trusted_note
from hookx.models.files import check_own_weights, is_model_file
from hookx.models.preprocessing import imagenet_preprocessing
from hookx.models.source import LoadedModel, Source
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity

_HOW_TO_EXPORT = (
    "export it with torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim('N')},)) "
    "and at least two images"
)
# Operators that behave differently in training, and the position of the argument that says so.
_TRAINING_ARGUMENT = {"aten.dropout": 2, "aten.feature_dropout": 2, "aten.alpha_dropout": 2, "aten.batch_norm": 5}


class ExportedPrograms(Source):
    """Files that `torch.export.save` wrote, as models for images of the size that they were exported with.

    `torch.export.load` unpickles tensors and constants without the safe reader, and looks up operators by names in the
    file, so only a trusted file is opened.
    """

    def owns(self, ref: str) -> bool:
        return is_model_file(ref) and kind_of(Path(ref)) == "exported program"

    def load_model(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        check_own_weights(ref, weights)
        path = Path(ref)
        if not options.trust_checkpoint:
            raise ModelError(
                f"'{path}' is an exported program, and reading it can run code: torch.export.load unpickles without "
                "weights_only, and calls whatever functions the program names",
                TRUST,
            )
        module, side_px, max_images = _read(path)
        preprocessing = imagenet_preprocessing(side_px)
        notes = [
            trusted_note(path),
            f"{path.name} does not say how to prepare images; assumed ImageNet's default at the size of its example "
            f"input: {preprocessing}",
            f"{path.name} has the layers that the export kept: a module that computes nothing (nn.Identity) is never "
            "called, and an output that nothing uses is absent",
        ]
        if max_images is not None:
            notes.append(f"{path.name} takes at most {max_images} images at once; choose no larger --batch-size")
        return LoadedModel(
            name=path.name,
            module=module,
            preprocessing=preprocessing,
            weights=str(WeightsIdentity.of_file(sha256_of(path))),
            forward=module,
            notes=tuple(notes),
        )

    def skeleton(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        return self.load_model(ref, weights, options)


def _read(path: Path) -> tuple[nn.Module, int, int | None]:
    """Return the module, the side of its images in pixels, and how many it takes at once; None if any number."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/data/aotinductor/" in f"/{name}" for name in names):
        raise ModelError(
            f"'{path}' is compiled (AOTInductor) and no longer has layers", "export it with torch.export.save"
        )
    reader_log = logging.getLogger("torch.export")
    level = reader_log.level
    try:
        reader_log.setLevel(logging.ERROR)  # It prints a traceback before it raises the same error.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            program = torch.export.load(file)
            side_px, max_images = _check_input(program, path)
            module = torch.export.unflatten(program)
    except ModelError:
        raise
    except Exception as error:  # A damaged file, or one of another torch version, can raise anything.
        raise ModelError(
            f"cannot read the exported program '{path}': {one_line(error)}",
            f"use the torch version that saved it; this one is {torch.__version__}",
        ) from None
    finally:
        reader_log.setLevel(level)
    _name_classes(module)
    return module.eval(), side_px, max_images


def _name_classes(module: nn.Module) -> None:
    """Give every module's class its name from before the export, so that `type:Conv2d` matches."""
    named: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
    for part in module.modules():
        # Older versions of torch do not store the name.
        name = str(getattr(part, "type_name", lambda: "")() or "").rpartition(".")[2]
        if name.isidentifier():
            key = (type(part), name)
            part.__class__ = named.setdefault(key, type(name, (type(part),), {}))


def _check_input(program: Any, path: Path) -> tuple[int, int | None]:
    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
        raise ModelError(f"'{path}' takes {len(inputs)} inputs; hookx gives one batch of images", _HOW_TO_EXPORT)
    (images,) = inputs
    shape = tuple(images.shape)
    if len(shape) != 4 or images.dtype != torch.float32:
        raise ModelError(
            f"'{path}' takes {images.dtype} of shape {shape}; hookx gives torch.float32 (N, 3, height, width)",
            _HOW_TO_EXPORT,
        )
    if isinstance(shape[0], int):
        raise ModelError(f"'{path}' takes batches of exactly {_count_images(shape[0])}", _HOW_TO_EXPORT)
    bounds = program.range_constraints.get(shape[0].node.expr)
    lower, upper = (int(bounds.lower), _finite(bounds.upper)) if bounds else (0, None)
    # An export writes a lower bound of 2 if it assumed nothing; the program takes 1 image as well.
    if lower > 2 or (upper is not None and upper < 3):
        raise ModelError(f"'{path}' takes batches of {lower} to {upper or 'any number of'} images", _HOW_TO_EXPORT)
    if not all(isinstance(length, int) for length in shape[1:]):  # Takes images of any size: use the example's.
        shape = tuple(program.example_inputs[0][0].shape)
    if shape[1] != 3 or shape[2] != shape[3]:
        raise ModelError(
            f"'{path}' takes images with {shape[1]} channels, {shape[2]} x {shape[3]}; hookx gives square RGB images"
        )
    for node in program.graph.nodes:
        position = _TRAINING_ARGUMENT.get(".".join(str(node.target).split(".")[:2]).rstrip("_"))
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise ModelError(
                f"'{path}' was exported in training mode ({node.target}), which cannot be undone",
                _HOW_TO_EXPORT,
            )
    return int(shape[2]), upper


def _finite(bound: Any) -> int | None:
    # An unlimited dimension has a symbol for infinity as its bound, or a number near 2^63.
    try:
        return int(bound) if int(bound) < 2**31 else None
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None


def _count_images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
