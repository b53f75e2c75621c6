"""A file as a model: a checkpoint that names its architecture, a pickled module, or an exported program (`.pt2`)."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from hookx.errors import ModelError, one_line
from hookx.models import checkpoints, entries
from hookx.models.archives import check_archive
from hookx.models.fitting import convert_to_float32
from hookx.models.preprocessing import imagenet_preprocessing
from hookx.models.source import LoadedModel, Source
from hookx.models.torchvision import Torchvision
from hookx.models.unexpected import split_patterns
from hookx.models.zoo import explaining, refuse_without_file
from hookx.options import ModelOptions
from hookx.plan import Preprocessing, WeightsIdentity

_HOW_TO_EXPORT = (
    "export it with torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim('N')},)) "
    "and at least two images"
)
# Operators that behave differently in training, and the position of the argument that says so.
_TRAINING_ARGUMENT = {"aten.dropout": 2, "aten.feature_dropout": 2, "aten.alpha_dropout": 2, "aten.batch_norm": 5}


class ModelFiles(Source):
    """Files that hold weights together with their architecture: its name, a pickled module, or an exported program."""

    def owns(self, ref: str) -> bool:
        """Return whether a reference names a file, which need not exist."""
        return Path(ref).is_file() or (not re.match(r"\w+:", ref) and checkpoints.is_weights_file(ref))

    def load_model(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        return self._load(ref, weights, options, shapes_only=False)

    def skeleton(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        return self._load(ref, weights, options, shapes_only=True)

    def _load(self, ref: str, weights: str, options: ModelOptions, *, shapes_only: bool) -> LoadedModel:
        path, zoo = Path(ref), Torchvision()
        if not path.is_file():
            raise ModelError(f"there is no model file '{ref}'", "list the names of models: hookx list-models")
        if weights != "default":
            raise ModelError(
                f"'{ref}' holds its own weights; --weights {weights} asks for others",
                f"leave out --weights, or name an architecture: --model NAME --weights {weights}",
            )
        check_archive(path)
        if checkpoints.kind_of(path) == "exported program":
            return _load_exported(path, trust=options.trust_checkpoint)
        content = checkpoints.read_content(path, options, shapes_only=shapes_only)
        architecture = checkpoints.architecture_of(content.value)
        if zoo.owns(architecture):
            load = zoo.skeleton if shapes_only else zoo.load_model
            loaded = load(architecture, ref, options)
            note = f"{path.name} says that its architecture is {architecture}, taken to be torchvision's"
            return dataclasses.replace(loaded, notes=(note, *loaded.notes))
        found = entries.choose(content.value, options.weights_key, path, split_patterns(options.ignore_unexpected))
        if isinstance(module := found.value, nn.Module):
            refuse_without_file(options)
            while isinstance(module, nn.DataParallel):
                module = module.module  # So that paths are those of the model itself.
            try:
                module = module.to("cpu")
            except Exception as error:  # A quantized or offloaded module can have a `.to` of its own.
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise ModelError(f"the model in '{ref}' cannot be moved to the CPU: {reason}") from error
            with explaining(f"the model in '{ref}' cannot be converted to float32"):
                notes = convert_to_float32(module, path.name)
            return _describe(path, module, found.entry, imagenet_preprocessing(), "ImageNet's default", *notes)
        named = f"'{architecture}', which torchvision does not have" if architecture else "no architecture"
        settings = " (an entry 'arch')" if isinstance(content.value, Mapping) and not architecture else ""
        raise ModelError(
            f"'{ref}' holds weights and names {named}{settings}",
            f"name it: --model {f'timm:{architecture}' if architecture else 'NAME'} --weights {ref}",
        )


def _load_exported(path: Path, *, trust: bool) -> LoadedModel:
    """Read what `torch.export.save` wrote; its modules get their dotted paths and the names of their classes back.

    `torch.export.load` unpickles tensors and constants without the safe reader, and looks up operators by names in the
    file, so only a trusted file is opened.
    """
    if not trust:
        raise ModelError(
            f"'{path}' is an exported program, and reading it can run code: torch.export.load unpickles without "
            "weights_only, and calls whatever functions the program names",
            checkpoints.TRUST,
        )
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/data/aotinductor/" in f"/{name}" for name in names):
        problem = f"'{path}' is compiled (AOTInductor) and no longer has layers"
        raise ModelError(problem, "export it with torch.export.save")
    reader_log = logging.getLogger("torch.export")
    level = reader_log.level
    try:
        reader_log.setLevel(logging.ERROR)  # It prints a traceback before it raises the same error.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            program = torch.export.load(file)
            size_px, max_images = _check_input(program, path)
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
    notes = [
        f"{path.name} has the layers that the export kept: a module that computes nothing (nn.Identity) is never "
        "called, and an output that nothing uses is absent"
    ]
    if max_images is not None:
        notes.append(f"{path.name} takes at most {max_images} images at once; choose no larger --batch-size")
    assumed = "ImageNet's default at the size of its example input"
    return _describe(path, module, "", imagenet_preprocessing(size_px), assumed, *notes)


def _describe(
    path: Path, module: nn.Module, entry: str, preprocessing: Preprocessing, assumed: str, *notes: str
) -> LoadedModel:
    note = f"{path.name} does not say how to prepare images; assumed {assumed}: {preprocessing}"
    return LoadedModel(
        name=path.name,
        module=module.eval(),
        preprocessing=preprocessing,
        weights=str(WeightsIdentity.of_file(checkpoints.sha256_of(path), entry)),
        forward=module,
        notes=(checkpoints.trusted_note(path), note, *notes),
    )


def _name_classes(module: nn.Module) -> None:
    """Give every module's class its name from before the export, so that `type:Conv2d` matches."""
    named: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
    for part in module.modules():
        # Older versions of torch do not store the name.
        name = str(getattr(part, "type_name", lambda: "")() or "").rpartition(".")[2]
        if name.isidentifier():
            key = (type(part), name)
            part.__class__ = named.setdefault(key, type(name, (type(part),), {}))


def _check_input(program: Any, path: Path) -> tuple[tuple[int, int], int | None]:
    """Return the height and the width of a program's images, and how many it takes at once; None if any number."""

    def refuse(problem: str, *next_steps: str) -> NoReturn:
        raise ModelError(f"'{path}' {problem}", *next_steps)

    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
        refuse(f"takes {len(inputs)} inputs; hookx gives one batch of images", _HOW_TO_EXPORT)
    dtype, shape = inputs[0].dtype, tuple(inputs[0].shape)
    if len(shape) != 4 or dtype != torch.float32:
        refuse(f"takes {dtype} of shape {shape}; hookx gives torch.float32 (N, 3, height, width)", _HOW_TO_EXPORT)
    count, channels, height, width = shape
    if isinstance(count, int):
        refuse(f"takes batches of exactly {count} image{'' if count == 1 else 's'}", _HOW_TO_EXPORT)
    bounds = program.range_constraints.get(count.node.expr)
    lower, upper = (int(bounds.lower), _finite(bounds.upper)) if bounds else (0, None)
    # An export writes a lower bound of 2 if it assumed nothing; the program takes 1 image as well.
    if lower > 2 or (upper is not None and upper < 3):
        refuse(f"takes batches of {lower} to {upper or 'any number of'} images", _HOW_TO_EXPORT)
    if not all(isinstance(length, int) for length in shape[1:]):  # Takes images of any size: use the example's.
        _, channels, height, width = program.example_inputs[0][0].shape
    if channels != 3:
        refuse(f"takes images with {channels} channels, {height} x {width}; hookx gives RGB images")
    for node in program.graph.nodes:
        position = _TRAINING_ARGUMENT.get(".".join(str(node.target).split(".")[:2]).rstrip("_"))
        if position is not None and len(node.args) > position and node.args[position] is True:
            refuse(f"was exported in training mode ({node.target}), which cannot be undone", _HOW_TO_EXPORT)
    return (int(height), int(width)), upper


def _finite(bound: Any) -> int | None:
    # An unlimited dimension has a symbol for infinity as its bound, or a number near 2^63.
    try:
        return int(bound) if int(bound) < 2**31 else None
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
