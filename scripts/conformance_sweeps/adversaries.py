"""Run hookx on the traps in `scripts/adversaries/`, and compare what it stores with each model's own pass.

The second route shares no code with hookx: torchvision's transforms, and for every image a model made anew, one pass,
and hooks that clone. Each trap runs in a process of its own, so that none can disturb another.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import hookx

ADVERSARIES = Path(__file__).parents[1] / "adversaries"
PHOTOGRAPHS = Path(__file__).parents[2] / "images"
SIDE_PX, BATCH = 32, 4  # Four images are the default batch of so short a list.
IMAGES = 9  # So that the last batch is a smaller one.
SECONDS = 60  # for one trap
ROUNDING = 1e-4  # of the row's largest magnitude; far below what a trap does to a row

STORED, REFUSED = "stored rightly", "refused rightly"
STORED_WRONGLY, NOT_REFUSED = "stored WRONGLY", "not refused"
REFUSED_WRONGLY, CRASHED = "refused wrongly", "crashed"
VERDICTS = (STORED, REFUSED, STORED_WRONGLY, NOT_REFUSED, REFUSED_WRONGLY, CRASHED)
CHECKS = ("in batches", "one by one", "layer before")

Rows = dict[str, list[list[Tensor]]]  # path of a module -> each tensor that it returned -> its row for each image


class HarnessError(Exception):
    """The trap or its second route is at fault; nothing can be said about hookx."""


@dataclass(frozen=True)
class Check:
    """What became of one run."""

    name: str
    verdict: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict in (STORED, REFUSED)


def load_traps() -> dict[str, Any]:
    """Import the traps anew, with all that their classes and modules keep."""
    if str(ADVERSARIES) not in sys.path:
        sys.path.insert(0, str(ADVERSARIES))
    for file in sorted(ADVERSARIES.glob("*_traps.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec and spec.loader
        module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    traps: dict[str, Any] = importlib.import_module("deceit").TRAPS
    return traps


def write_pictures(folder: Path) -> None:
    """Write small pictures: the photographs, and a corner of two of them."""
    for number, file in enumerate(sorted(PHOTOGRAPHS.rglob("*.jpg"))[:8]):
        with Image.open(file) as photograph:
            small = photograph.convert("RGB").resize((40, 36))
        small.save(folder / f"{number}.png")
        if number < IMAGES - 8:
            small.crop((20, 18, 40, 36)).resize((40, 36)).save(folder / f"{number}-corner.png")


def read_pixels(folder: Path) -> Tensor:
    """Read the pictures as the models expect them, by torchvision."""
    prepare = transforms.Compose(
        [
            *(transforms.Resize(SIDE_PX), transforms.CenterCrop(SIDE_PX), transforms.ToTensor()),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return torch.stack([prepare(Image.open(file)) for file in sorted(folder.iterdir())])


# --- the second route ------------------------------------------------------------------------------------------------


def tensors(value: Any, above: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Yield the tensors of a structure, in any order."""
    if isinstance(value, Tensor):
        yield value.dequantize() if value.is_quantized else value
    elif id(value) not in above and not isinstance(value, nn.Module | str | int | float | type(None)):
        if hasattr(value, "items"):
            items = [item for _, item in value.items()]
        elif hasattr(value, "__iter__"):
            items = list(value)
        else:
            names = [*getattr(value, "__dict__", ()), *getattr(value, "__slots__", ())]
            items = [getattr(value, name) for name in names if hasattr(value, name)]
        for item in items:
            yield from tensors(item, (*above, id(value)))


def pass_over(model: nn.Module, paths: Sequence[str], batch: Tensor) -> dict[str, list[Tensor]]:
    """Make one pass; return clones of what some modules returned."""
    returned: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _module, _args, output, path=path: returned[path].extend(t.clone() for t in tensors(output))
        )
        for path in paths
    ]
    with torch.inference_mode():
        model(batch)
    for handle in handles:
        handle.remove()
    return returned


def make(trap: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = trap.make()
    return model.eval()


def rows_alone(trap: Any, paths: Sequence[str], pixels_NCHW: Tensor) -> Rows:
    """Return what a new model returns for each image alone."""
    rows: Rows = {path: [] for path in paths}
    for number in range(len(pixels_NCHW)):
        fresh = load_traps()[trap.name] if trap.outside else trap
        for path, returned in pass_over(make(fresh), paths, pixels_NCHW[number : number + 1]).items():
            rows[path] = rows[path] or [[] for _ in returned]
            for row, tensor in zip(rows[path], returned, strict=True):
                row.append(tensor)
    return rows


def check_by_hand(trap: Any, paths: Sequence[str], pixels_NCHW: Tensor, alone: Rows) -> None:
    """Prove that a trap is one: a loop over batches is wrong if the trap is to be refused, and right if not."""
    rows: Rows = {path: [] for path in paths}
    model = make(load_traps()[trap.name] if trap.outside else trap)
    for batch in pixels_NCHW.split(BATCH):
        for path, returned in pass_over(model, paths, batch).items():
            rows[path] = rows[path] or [[] for _ in returned]
            for row, tensor in zip(rows[path], returned, strict=True):
                row.extend(tensor.split(1))
    wrong = [path for path in paths for row, ref in zip(rows[path], alone[path], strict=True) if find_wrong(row, ref)]
    if trap.batched.kind == "refused" and not wrong:
        raise HarnessError("a plain loop over batches is right, so there is nothing to refuse")
    if trap.batched.kind == "same" and wrong:
        raise HarnessError(f"a plain loop over batches is wrong at {wrong[0]}, so it cannot be right")


def find_wrong(rows: Sequence[Tensor], references: Sequence[Tensor]) -> str:
    """Return which row differs from its reference by more than rounding, '' if none does."""
    if len(rows) != len(references):
        return f"{len(rows)} rows in place of {len(references)}"
    for number, (row, reference) in enumerate(zip(rows, references, strict=True)):
        if row.numel() != reference.numel():
            return f"row {number} has the shape {list(row.shape)} in place of {list(reference.shape)}"
        if row.is_complex():
            row, reference = torch.view_as_real(row), torch.view_as_real(reference)
        one, other = (tensor.flatten().to(torch.float64) for tensor in (row, reference))
        same = (one == other) | (one.isnan() & other.isnan())
        scale = float(other.nan_to_num(0, 0, 0).abs().max()) if len(other) else 0.0
        allowed = ROUNDING * scale if reference.is_floating_point() else 0.0
        same |= (one - other).abs() <= allowed
        if not bool(same.all()):
            difference = float((one - other)[~same].abs().nan_to_num(nan=float("inf")).max())
            return f"row {number} differs by {difference:.2g} of {scale:.2g}"
    return ""


# --- hookx -----------------------------------------------------------------------------------------------------------


def extract(trap: Any, layers: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Run hookx; return the rows of every address that it stores."""
    with tempfile.TemporaryDirectory() as out:
        hookx.extract(
            f"{trap.file}:{trap.name}",
            layers,
            folder,
            out=f"{out}/features",
            **{"weights": "none", "workers": 0, "resize": SIDE_PX, "crop": SIDE_PX, **trap.options, **options},
        )
        features = hookx.open(f"{out}/features")
        return {address: features[address][:] for address in features}


def compare(stored: Mapping[str, Tensor], expected: Rows, *, any_type: bool) -> str:
    """Return what is wrong with stored rows, '' if each reference is stored once, under whatever name, and no other."""
    left: dict[str, list[str]] = {path: [] for path in expected}
    for address in stored:
        left.setdefault(re.split("[:/@]", address)[0], []).append(address)
    for path, addresses in left.items():
        references = expected.get(path, [])
        if len(addresses) != len(references):
            names = ", ".join(addresses) or "nothing"
            return f"'{path}' returns {len(references)} tensors, and stored is {names}"
        for reference in references:
            reasons = {address: find_wrong(list(stored[address]), reference) for address in addresses}
            types = {address: stored[address].dtype == reference[0].dtype or any_type for address in addresses}
            fitting = [address for address in addresses if not reasons[address] and types[address]]
            if not fitting:
                address = addresses[0]
                return f"'{address}': {reasons[address] or f'stored as {stored[address].dtype}'}"
            addresses.remove(fitting[0])
    return ""


def judge(
    name: str, trap: Any, expected: Any, rows: Rows, folder: Path, layers: str, **options: Any
) -> tuple[Check, dict[str, Tensor]]:
    """Run hookx once; return whether it did what it must."""
    try:
        stored = extract(trap, layers, folder, **options)
    except hookx.HookxError as error:
        said = " ".join(str(error).split())
        if expected.kind == "same":
            return Check(name, REFUSED_WRONGLY, said), {}
        if not re.search(expected.reason, str(error)):
            return Check(name, REFUSED_WRONGLY, f"for another reason than /{expected.reason}/: {said}"), {}
        return Check(name, REFUSED, said), {}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        return Check(name, CRASHED, " ".join(said.split())), {}
    wrong = compare(stored, rows, any_type="dtype" in trap.options)
    if wrong:
        return Check(name, STORED_WRONGLY, wrong), stored
    if expected.kind == "refused":
        return Check(name, NOT_REFUSED, "the rows of these images are right"), stored
    return Check(name, STORED), stored


def run_trap(trap: Any, folder: Path) -> list[Check]:
    """Run one trap: in batches of the default size, one image at a time, and the layer before the trouble."""
    pixels_NCHW = read_pixels(folder)
    paths = trap.stored or tuple(trap.layers.split(","))
    alone = rows_alone(trap, paths, pixels_NCHW)
    if trap.by_hand and trap.kind not in ("names", "types"):  # A loop over batches has no names for what it returns.
        check_by_hand(trap, paths, pixels_NCHW, alone)
    in_batches, stored = judge(CHECKS[0], trap, trap.batched, alone, folder, trap.layers)
    # What was stored under a name must be found under it again.
    layers = ",".join(stored) if stored and trap.kind in ("names", "types") else trap.layers
    checks = [in_batches, judge(CHECKS[1], trap, trap.alone, alone, folder, layers, batch_size=1)[0]]
    if trap.batched.kind == "refused" and trap.before:
        before = rows_alone(trap, (trap.before,), pixels_NCHW)
        checks.append(judge(CHECKS[2], trap, SAME, before, folder, trap.before)[0])
    return checks


@dataclass(frozen=True)
class _Same:
    kind: str = "same"
    reason: str = ""


SAME = _Same()


def run_apart(trap: Any, folder: Path) -> list[Check]:
    """Run one trap in a process of its own.

    Raises:
        HarnessError: the trap's second route fails, or the trap is none.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_checks, args=(trap, folder, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return [Check(CHECKS[0], CRASHED, f"no answer after {SECONDS} seconds")]
        answer = receiver.recv()
    except EOFError:
        process.join()
        return [Check(CHECKS[0], CRASHED, f"the process ended with {process.exitcode}")]
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, str):
        raise HarnessError(f"{trap.name}: {answer}")
    checks: list[Check] = answer
    return checks


def _send_checks(trap: Any, folder: Path, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("hookx").setLevel(logging.CRITICAL)
    try:
        sender.send(run_trap(trap, folder))
    except HarnessError as error:
        sender.send(str(error))
    except BaseException:
        sender.send(traceback.format_exc())
    sender.close()


def sweep(patterns: Sequence[str]) -> int:
    """Run the traps whose names or kinds match; print a table, surprises and totals; return the exit code."""
    torch.set_num_threads(1)
    traps = load_traps()
    chosen = [trap for name, trap in traps.items() if any(fnmatchcase(name, p) or trap.kind == p for p in patterns)]
    if not chosen:
        print(f"no adversary matches {' '.join(patterns)}", file=sys.stderr)
        return 2
    totals: Counter[str] = Counter()
    surprises: list[str] = []
    broken: list[str] = []
    print("  ".join([f"{'adversary':26}", f"{'kind':10}", *(f"{check:15}" for check in CHECKS), "seconds"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder)
        for trap in chosen:
            start = time.perf_counter()
            try:
                checks = run_apart(trap, folder)
            except HarnessError as error:
                broken.append(str(error))
                continue
            print_row(trap, checks, time.perf_counter() - start)
            totals.update(check.verdict for check in checks)
            for check in checks:
                if not check.is_right:
                    detail = check.detail or f"must be {trap.batched}"
                    surprises.append(f"{check.verdict}: {trap.name}, {check.name}: {detail}\n    {trap.why}")
    if surprises:
        print("\n" + "\n".join(surprises))
    counts = ", ".join(f"{totals[verdict]:,} {verdict}" for verdict in VERDICTS)
    print(f"\nhookx: {len(chosen)} adversaries, {totals.total():,} runs: {counts}")
    if broken:
        print("\nno verdict, because the trap itself is at fault:\n" + "\n".join(broken), file=sys.stderr)
    return 2 if broken else int(bool(surprises))


def print_row(trap: Any, checks: Sequence[Check], seconds: float) -> None:
    """Print a line of the table."""
    verdicts = {check.name: check.verdict for check in checks}
    cells = [f"{verdicts.get(name, '-'):15}" for name in CHECKS]
    print("  ".join([f"{trap.name:26}", f"{trap.kind:10}", *cells, f"{seconds:7.1f}"]), flush=True)
