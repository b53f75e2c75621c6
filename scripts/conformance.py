#!/usr/bin/env python
"""Compare what hookx captures with what the layers return, for every module, call and part of a zoo's models.

    scripts/conformance.py                      all classification models, some minutes on 2 cores
    scripts/conformance.py 'resnet*' swin_t     some of them
    scripts/conformance.py --kind detection     another kind: segmentation, quantized, detection
    scripts/conformance.py --kind timm          a model of each of timm's families, about 3 minutes; needs timm
    scripts/conformance.py --kind transformers  small models of transformers; also segmentation-models, open-clip
    scripts/conformance.py --kind adversaries   small models written to deceive: stored rightly, or refused
    scripts/conformance.py --device cuda --precision bf16 --channels-last       on a GPU, against passes on that GPU

The second route shares no code with the capture: the model's own forward, with each output cloned as it returns; and,
where torch.fx can trace the model, torchvision's feature extractor, which returns one node at a time. Comparison is bit
for bit. The usual hook, `store[...] = output.detach()`, is compared on the same pass. Exits with 1 if anything is wrong
or missed.

Both routes run on the same device and in the same precision. The second one sets torch's switches for that itself
(`arithmetic`), and they are set the other way round while hookx runs, which has to set its own.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from conformance_sweeps import adversaries, zoos
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from hookx.capture.probe import probe
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.layers.select import Layer, Selection, Target, parse_selectors, select
from hookx.models import list_models, load_model
from hookx.models.torchvision import forward_of
from hookx.options import ModelOptions

BATCH = 2
FX_NODES = 2
AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# A small model of each of timm's families: those that take images of any size, and those that are built for one.
TIMM_OF_ANY_SIZE = """
    caformer_s18 convnext_atto convnextv2_atto crossvit_9_240 cspresnet50 davit_tiny densenet121 dla34 dpn48b
    edgenext_xx_small efficientnet_b0 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw fastvit_t8 focalnet_tiny_srf
    gernet_s ghostnet_100 hardcorenas_a hgnetv2_b0 hrnet_w18_small lambda_resnet26t lcnet_035 mambaout_femto
    mnasnet_small mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny nextvit_small nfnet_l0 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnetz_b16
    repvgg_a0 repvit_m0_9 resnest14d resnet10t resnet50_clip resnetv2_18 rexnet_100 selecsls42 sequencer2d_s
    seresnext26ts shvit_s1 skresnet18 starnet_s1 swiftformer_xs tiny_vit_5m_224 tinynet_e twins_svt_small
    vit_small_patch16_dinov3 xception41 xcit_nano_12_p8_224
""".split()
TIMM_OF_ONE_SIZE = """
    cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224
    efficientformerv2_s0 eva02_tiny_patch14_224 flexivit_small gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 levit_128s
    maxvit_rmlp_pico_rw_256 maxxvitv2_nano_rw_256 mixer_s32_224 nest_tiny pit_ti_224 resmlp_12_224 sebotnet33ts_256
    swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tnt_s_legacy_patch16_224 visformer_tiny
    vit_base_patch32_siglip_256 vit_relpos_small_patch16_224 vit_small_patch14_dinov2 vit_tiny_patch16_224
    vitamin_small_224 volo_d1_224
""".split()

Key = tuple[str, int, tuple[str, ...]]


@dataclass
class Row:
    """One line of the table; all but the name and the time are counts."""

    model: str
    modules: int = 0
    calls: int = 0
    compared: int = 0
    constant: int = 0
    refused: int = 0
    never_called: int = 0
    by_fx: int = 0
    wrong: int = 0
    missed: int = 0
    usual_hook_wrong: int = 0
    usual_hook_differs: int = 0
    seconds: float = 0.0


def small(name: str, kind: str) -> tuple[nn.Module, int]:
    """Build a model with random weights and return it with the side of a small image that it accepts."""
    side = 64
    if kind in zoos.ZOOS:
        ref = f"{zoos.__file__}:{zoos.ZOOS[kind].factory.__name__}"
        loaded = load_model(ref, "none", ModelOptions(model_args={"name": name}))
        return loaded.module, zoos.LARGER_PX.get(name, side)
    if kind == "timm":
        import timm

        torch.manual_seed(0)
        return timm.create_model(name, **({"img_size": side} if name in TIMM_OF_ONE_SIZE else {})).eval(), side
    arguments: dict[str, Any] = {"weights": None}
    if name.startswith("vit_"):
        side = arguments["image_size"] = 56 if name == "vit_h_14" else 64
    elif name == "maxvit_t":
        side = 224  # Its windows divide nothing smaller.
    elif "inception" in name or name in ("alexnet", "squeezenet1_0"):
        side = 96
    if kind in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    if kind == "detection":
        side = 300 if name == "ssd300_vgg16" else 320 if name.startswith("ssdlite") else 128
        if not name.startswith("ssd"):
            arguments.update(min_size=side, max_size=2 * side)
    if kind == "quantized":
        arguments["quantize"] = True
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_model(name, **arguments).eval(), side


def tensors(value: Any, parts: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield parts, value
    elif isinstance(value, dict):
        for name in value:
            yield from tensors(value[name], (*parts, str(name)))
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", range(len(value)))
        for name, item in zip(names, value, strict=True):
            yield from tensors(item, (*parts, str(name)))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for name, item in vars(value).items():
            yield from tensors(item, (*parts, name))


def plain(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Return, on their device, whether two tensors hold different bits; NaN equals the same NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return torch.tensor(True, device=one.device)
    a, b = (view_bits(tensor) for tensor in (one, other))
    return (a != b).any()


def view_bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.itemsize]) if tensor.is_floating_point() else tensor


def set_tf32(allowed: bool) -> None:
    """Switch TF32 on or off for cuBLAS and cuDNN."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def arithmetic(device: str, precision: str) -> Iterator[None]:
    """Compute in a precision and with deterministic algorithms, by torch's own switches."""
    if device == "cpu":
        with torch.autocast("cpu", AUTOCAST[precision], enabled=AUTOCAST[precision] is not None):
            yield
        return
    set_tf32(precision == "tf32")
    deterministic = torch.are_deterministic_algorithms_enabled()
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autocast("cuda", AUTOCAST[precision], enabled=AUTOCAST[precision] is not None):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def by_cloning(
    model: nn.Module, kind: str, pixels_NCHW: Tensor
) -> tuple[dict[Key, Tensor], dict[str, int], set[Key], set[Key]]:
    """Run the model's own forward; return cloned outputs, calls, and what the usual hook would get wrong.

    The last two: tensors that something wrote to after they were returned (by their version counter), and those of
    them whose values are others at the end of the pass.
    """
    cloned: dict[Key, Tensor] = {}
    usual: dict[Key, tuple[Tensor, int]] = {}
    calls: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            call = calls[name]
            calls[name] = call + 1
            for parts, tensor in tensors(output):
                cloned[name, call, parts] = plain(tensor).clone()
                usual[name, call, parts] = (tensor.detach(), tensor._version)

        return module.register_forward_hook(hook)

    handles = []
    for name, module in model.named_modules():
        calls[name or "."] = 0
        handles.append(watch(name or ".", module))
    # no_grad and not inference_mode: inference tensors have no version counters.
    with torch.no_grad():
        model(list(pixels_NCHW) if kind == "detection" else pixels_NCHW)
    for handle in handles:
        handle.remove()
    overwritten = {key for key, (tensor, version) in usual.items() if tensor._version != version}
    different = {key for key in overwritten if not torch.equal(plain(usual[key][0]), cloned[key])}
    return cloned, calls, overwritten, different


@dataclass
class Captured:
    """What hookx finds in a model, and stores of one batch."""

    layers: list[Layer]
    selection: Selection
    rows: dict[str, Tensor]


def capture(
    name: str, kind: str, model: nn.Module, pixels_NCHW: Tensor, precision: str, memory_format: str
) -> Captured:
    """Capture all modules at once, into rows, the way a run does it; the first `BATCH` images are the batch."""
    device = pixels_NCHW.device.type
    if device == "cuda":
        # cuBLAS reads this once, at its first product. It is deterministic with a workspace of its own.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        set_tf32(precision != "tf32")  # The switches of the process must not matter.
    forward = model if kind == "timm" or kind in zoos.ZOOS else forward_of(name, model)
    runner = Runner.of(model, forward, precision=precision, memory_format=memory_format)
    layers = probe(runner, pixels_NCHW)
    # No glob matches the model itself, and by its name it must have a part that can be stored.
    outputs = [info for layer in layers if layer.path == "." for call in layer.calls for info in call.outputs]
    is_usable = kind != "detection" and not all(info.problem or info.is_constant for info in outputs)
    selection = select(parse_selectors("**,." if is_usable else "**"), layers, name)
    rows = allocate_rows(selection.targets, pin_memory=device == "cuda")
    with RowCapture(runner, selection.targets) as capturing:
        capturing.run(pixels_NCHW[:BATCH], rows)
        capturing.wait()
    return Captured(layers, selection, rows)


def allocate_rows(targets: list[Target], *, pin_memory: bool) -> dict[str, Tensor]:
    """Allocate the rows of all targets in one go: pinning memory takes its time."""
    rows: dict[str, Tensor] = {}
    bytes_of = {
        str(target.address): BATCH * math.prod(target.shape) * getattr(torch, stored_dtype(target)).itemsize
        for target in targets
    }
    memory = torch.empty(
        sum(-(-size // 64) * 64 for size in bytes_of.values()), dtype=torch.uint8, pin_memory=pin_memory
    )
    start = 0
    for target in targets:
        size = bytes_of[str(target.address)]
        piece = memory[start : start + size].view(getattr(torch, stored_dtype(target)))
        rows[str(target.address)] = piece.view(BATCH, *target.shape)
        start += -(-size // 64) * 64
    return rows


def key_of(target: Target) -> Key:
    return target.address.path, target.address.call or 0, target.address.parts


def split_images(target: Target, reference: Tensor) -> Tensor:
    """Move a tensor's images to the front, by gathering the rows of each."""
    info = target.tensor
    dim = info.batch_dim or 0
    if info.rows_per_image == 1:
        return reference.movedim(dim, 0)
    in_group = info.rows_per_image // info.groups_per_image
    image_of_row = torch.arange(reference.shape[dim], device=reference.device) // in_group % BATCH
    images = [(image_of_row == image).nonzero().flatten() for image in range(BATCH)]
    return torch.stack([reference.index_select(dim, rows) for rows in images])


def check(
    name: str,
    kind: str = "classification",
    *,
    channels_last: bool = False,
    device: str = "cpu",
    precision: str = "fp32",
    built: tuple[nn.Module, int] | None = None,
) -> Row:
    """Compare every activation of one model; it is `built` before, or here."""
    start, row = time.perf_counter(), Row(name)
    model, side = built or small(name, kind)
    pixels_NCHW = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    pixels_NCHW = pixels_NCHW.contiguous(memory_format=layout)
    batch = pixels_NCHW[:BATCH]

    memory_format = "channels_last" if channels_last else "contiguous"
    captured = capture(name, kind, model, pixels_NCHW, precision, memory_format)
    layers, selection, rows = captured.layers, captured.selection, captured.rows

    # The second route.
    with arithmetic(pixels_NCHW.device.type, precision):
        expected, calls, overwritten, different = by_cloning(model, kind, batch)
    row.modules, row.calls = len(calls), sum(calls.values())
    row.never_called = sum(not layer.calls for layer in layers)
    left: dict[Key, Tensor] = dict(expected)
    differs = {}
    for target in selection.targets:
        address = str(target.address)
        reference = split_images(target, left.pop(key_of(target)))
        differs[address] = differ(rows[address].to(device, non_blocking=True), reference)
    row.compared = len(differs)
    # A device is waited for once.
    for address, is_wrong in zip(differs, torch.stack(list(differs.values())).tolist() if differs else [], strict=True):
        if is_wrong:
            row.wrong += 1
            print(f"wrong: {name} {address}", file=sys.stderr)
    described = {
        (layer.path, call, tensor.parts): tensor
        for layer in layers
        for call, one in enumerate(layer.calls)
        for tensor in one.outputs
    }
    for key in left:
        tensor = described.get(key)
        if tensor is not None and tensor.is_constant:
            row.constant += 1
        elif (tensor is not None and tensor.problem) or (kind == "detection" and not key[0].startswith("backbone")):
            row.refused += 1
        else:
            row.missed += 1
            print(f"missed: {name} {key}", file=sys.stderr)
    row.usual_hook_wrong, row.usual_hook_differs = len(overwritten), len(different)

    if kind == "classification" and not channels_last and precision == "fp32" and device == "cpu":
        row.by_fx, wrong = by_fx(model, batch, rows)
        row.wrong += wrong
    row.seconds = time.perf_counter() - start
    return row


def by_fx(model: nn.Module, batch: Tensor, rows: dict[str, Tensor]) -> tuple[int, int]:
    """Ask torchvision's feature extractor for some nodes, one at a time; return how many, and how many differ."""
    warnings.filterwarnings("ignore", "NOTE: The nodes obtained by tracing the model in eval mode")
    try:
        _, nodes = get_graph_node_names(model)
    except Exception:  # Not every model can be traced: control flow on values, assertions on shapes.
        return 0, 0
    comparable = {}
    for node in nodes:
        # fx names the second call of a module layer1.0.relu_1, and a module that is itself called ln_1 by another name.
        path, _, call = node.rpartition("_")
        candidates = [f"{path}:{call}"] if call.isdigit() else [node, f"{node}:0"]
        for address in candidates:
            if address in rows:
                comparable[node] = address
    wrong = 0
    chosen = random.Random(0).sample(sorted(comparable), min(FX_NODES, len(comparable)))
    for node in chosen:
        with torch.inference_mode():
            alone = create_feature_extractor(model, [node])(batch)[node]
        if differ(alone, rows[comparable[node]]):
            wrong += 1
            print(f"differs from fx: {node}", file=sys.stderr)
    return len(chosen), wrong


def main() -> int:
    """Run the sweep over the models named on the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="MODEL", help="names or globs; default all")
    kinds = ["classification", "segmentation", "quantized", "detection", "timm", *zoos.ZOOS, "adversaries"]
    parser.add_argument("--kind", choices=kinds, default="classification")
    parser.add_argument("--channels-last", action="store_true", help="compare in this memory format")
    parser.add_argument("--device", default="cpu", help="where both routes run: cpu (default) or cuda")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32")
    arguments = parser.parse_args()
    if arguments.kind == "adversaries":
        return adversaries.sweep(arguments.patterns)
    of_timm = sorted(TIMM_OF_ANY_SIZE + TIMM_OF_ONE_SIZE)
    known = of_timm if arguments.kind == "timm" else [n for n, kind in list_models().items() if kind == arguments.kind]
    if arguments.kind in zoos.ZOOS:
        try:
            zoos.ZOOS[arguments.kind].check_installed()
        except zoos.MissingPackageError as error:
            parser.error(str(error))
        known = list(zoos.ZOOS[arguments.kind].names)
    names = [name for name in known if any(fnmatchcase(name, pattern) for pattern in arguments.patterns)]
    if not names:
        parser.error(f"no {arguments.kind} model matches {' '.join(arguments.patterns)}")
    # As in a run: the fast path would skip submodules, and differs by rounding.
    torch.backends.mha.set_fastpath_enabled(False)
    headers = [field.name.replace("_", " ") for field in fields(Row)]
    print("  ".join([f"{headers[0]:30}", *(f"{header:>8}" for header in headers[1:])]))
    total = Row(f"{len(names)} models")
    for name in names:
        row = check(
            name,
            arguments.kind,
            channels_last=arguments.channels_last,
            device=arguments.device,
            precision=arguments.precision,
        )
        print_row(row)
        for field in fields(Row)[1:]:
            setattr(total, field.name, getattr(total, field.name) + getattr(row, field.name))
    print_row(total)
    tensors_seen = total.compared + total.constant + total.refused
    print(
        f"hookx: {total.wrong} wrong and {total.missed} missed of {tensors_seen:,} activations; "
        f"the usual output.detach() hook: {total.usual_hook_wrong:,} overwritten after it ran, "
        f"{total.usual_hook_differs:,} of them with other values"
    )
    return int(total.wrong > 0 or total.missed > 0)


def print_row(row: Row) -> None:
    """Print a line of the table."""
    name, *counts, seconds = astuple(row)
    headers = [field.name for field in fields(Row)][1:-1]
    cells = [f"{count:>{max(8, len(header))}}" for count, header in zip(counts, headers, strict=True)]
    print("  ".join([f"{name:30}", *cells, f"{seconds:8.1f}"]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
