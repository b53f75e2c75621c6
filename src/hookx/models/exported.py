"""Exported programs (.pt2 of `torch.export`) -> modules whose layers have their dotted paths again."""

from __future__ import annotations

import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookx.errors import ModelError
from hookx.models.checkpoints import sha256_of, trusted_note
from hookx.models.loaded import LoadedModel, imagenet_preprocessing, one_line
from hookx.options import ModelOptions

_HOW_TO_EXPORT = (
    "export it so: torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim('N')},)), "
    "with two images or more"
)
# What behaves differently in training: the operator, and where among its arguments it is told so.
_TOLD_TO_TRAIN = {"aten.dropout": 2, "aten.feature_dropout": 2, "aten.alpha_dropout": 2, "aten.batch_norm": 5}


def load_exported(path: Path) -> nn.Module:
    """Read an exported program, and give its layers their dotted paths back. It runs code that the file names.

    Raises:
        ModelError: the file is no exported program of one batch of images of any number, in eval mode.
    """
    return _read(path)[0]


def load_exported_model(path: Path, options: ModelOptions) -> LoadedModel:
    """Read an exported program as a model, for images of the size that it was exported with.

    `torch.export.load` unpickles tensors and constants without the safe reader, and looks up the operators by names in
    the file; so a file that is not trusted is not opened by it.
    """
    if not options.trust_checkpoint:
        raise ModelError(
            f"'{path}' is an exported program, and reading it can run code: torch.export.load unpickles without "
            "weights_only, and calls whatever functions the program names",
            "if you trust whoever made the file with all that you may do here: --trust-checkpoint",
        )
    module, side_px, most = _read(path)
    preprocessing = imagenet_preprocessing(side_px)
    notes = [
        trusted_note(path),
        f"{path.name} does not say how images are prepared; ImageNet's default is taken, at the size of its example "
        f"input: {preprocessing}",
        f"the layers of {path.name} are those that the export kept: a module that computes nothing (nn.Identity) is "
        "never called, and an output that nothing uses is not there",
    ]
    if most is not None:
        notes.append(f"{path.name} takes at most {most} images at once; choose no larger --batch-size")
    return LoadedModel(
        name=path.name,
        module=module,
        preprocessing=preprocessing,
        weights=f"sha256:{sha256_of(path)}",
        forward=module,
        notes=tuple(notes),
    )


def _read(path: Path) -> tuple[nn.Module, int, int | None]:
    """Return the module, the side of its images in pixels, and the most of them that it takes at once."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/data/aotinductor/" in f"/{name}" for name in names):
        raise ModelError(
            f"'{path}' is compiled (AOTInductor): it has no layers any more", "export it with torch.export.save"
        )
    reader_log = logging.getLogger("torch.export")
    level = reader_log.level
    try:
        reader_log.setLevel(logging.ERROR)  # It prints a traceback for an error that it raises as well.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            program = torch.export.load(file)
            side_px, most = _images_of(program, path)
            module = torch.export.unflatten(program)
    except ModelError:
        raise
    except Exception as error:  # Whatever a damaged file, or one of another version of torch, leads to.
        raise ModelError(
            f"cannot read the exported program '{path}': {one_line(error)}",
            f"an exported program is for the torch that saved it; this one is {torch.__version__}",
        ) from None
    finally:
        reader_log.setLevel(level)
    _name_classes(module)
    return module.eval(), side_px, most


def _name_classes(module: nn.Module) -> None:
    """Let the class of every module have the name that it had before the export, so that `type:Conv2d` finds it."""
    named: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
    for part in module.modules():
        # Older versions of torch do not keep it.
        name = str(getattr(part, "type_name", lambda: "")() or "").rpartition(".")[2]
        if name.isidentifier():
            key = (type(part), name)
            part.__class__ = named.setdefault(key, type(name, (type(part),), {}))


def _images_of(program: Any, path: Path) -> tuple[int, int | None]:
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
        raise ModelError(f"'{path}' takes batches of exactly {_images(shape[0])}", _HOW_TO_EXPORT)
    bounds = program.range_constraints.get(shape[0].node.expr)
    least, most = (int(bounds.lower), _finite(bounds.upper)) if bounds else (0, None)
    # A bound of 2 is what an export writes where it assumed nothing; 1 image is computed as well.
    if least > 2 or (most is not None and most < 3):
        raise ModelError(f"'{path}' takes batches of {least} to {most or 'any number of'} images", _HOW_TO_EXPORT)
    if not all(isinstance(length, int) for length in shape[1:]):  # Images of any size: that of the example.
        shape = tuple(program.example_inputs[0][0].shape)
    if shape[1] != 3 or shape[2] != shape[3]:
        raise ModelError(
            f"'{path}' takes images of {shape[1]} channels, {shape[2]} x {shape[3]}; hookx gives square RGB images"
        )
    for node in program.graph.nodes:
        position = _TOLD_TO_TRAIN.get(".".join(str(node.target).split(".")[:2]).rstrip("_"))
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise ModelError(
                f"'{path}' was exported in training mode ({node.target}), which a program cannot leave",
                _HOW_TO_EXPORT,
            )
    return int(shape[2]), most


def _finite(bound: Any) -> int | None:
    # An exported dimension without a limit has a symbol for infinity as its bound, or a number near 2^63.
    try:
        return int(bound) if int(bound) < 2**31 else None
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
