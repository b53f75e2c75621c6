"""What training scripts leave beside the weights: it is neither read nor needed, and none of its code runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from hookx.errors import ModelError
from hookx.models import LoadedModel, ModelOptions, load_model
from hookx.models.checkpoints import read_weights
from hookx.models.inert import StandIn, load_inert, load_saved

NET = "shufflenet_v2_x0_5"


@functools.lru_cache(maxsize=2)
def state_of(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(get_model(NET, weights=None).state_dict())


def load(file: Path, **options: Any) -> LoadedModel:
    return load_model(NET, str(file), ModelOptions(**options))


def has(model: LoadedModel, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(model.module.state_dict()[name], tensor) for name, tensor in state.items())


STATE = {"conv.weight": torch.rand(4, 3), "conv.bias": torch.rand(4).half()}


def is_read(file: Path) -> bool:
    weights = read_weights(str(file))
    assert weights.entry == "state_dict" and not weights.ran_code
    return weights.state.keys() == STATE.keys() and all(torch.equal(STATE[k], v) for k, v in weights.state.items())


class Settings(dict[str, Any]):
    """A dict with attributes, as those of easydict, yacs, mmengine, mmcv and ml_collections."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class History:
    """Keeps its values in slots, and has a state of its own, as mmengine's HistoryBuffer."""

    __slots__ = ("counts", "values")

    def __init__(self) -> None:
        self.values, self.counts = np.arange(3.0), collections.deque([1, 2], maxlen=5)

    def __getstate__(self) -> tuple[Any, Any]:
        return None, {"values": self.values, "counts": self.counts}


class Items(list[int]):
    pass


class Phase(enum.Enum):
    TRAIN = 1


class Point(collections.namedtuple("Point", ["x", "y"])):
    __slots__ = ()


@dataclass
class Options:
    lr: float = 0.1

    class Inner:
        pass


LIBRARIES: dict[str, type] = {
    "mmengine.logging.history_buffer.HistoryBuffer": History,
    "mmengine.config.config.ConfigDict": Settings,
    "mmcv.utils.config.ConfigDict": Settings,
    "yacs.config.CfgNode": Settings,
    "ml_collections.config_dict.config_dict.ConfigDict": Options,
    "easydict.EasyDict": Settings,
    "omegaconf.listconfig.ListConfig": Items,
    "__main__.Config": Options,
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=0.1)


def scheduler() -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer(), functools.partial(max, 1))


OBJECTS: dict[str, Callable[[], Any]] = {
    "settings": lambda: Settings(model=Settings(depth=18), lr=0.1),
    "history": History,
    "list": lambda: Items([1, 2]),
    "deque": lambda: collections.deque([1, 2, 3], maxlen=9),
    "counter": lambda: collections.Counter("abc"),
    "default dict": lambda: collections.defaultdict(list, {"a": [1]}),
    "namespace": lambda: argparse.Namespace(lr=0.1, phase=Phase.TRAIN, point=Point(1, 2)),
    "simple namespace": lambda: types.SimpleNamespace(a=1),
    "enum": lambda: Phase.TRAIN,
    "named tuple": lambda: Point(1, 2),
    "dataclass": Options,
    "a class within a class": Options.Inner,
    "a function": lambda: has,
    "a method": lambda: Settings(a=1).keys,
    "optimizer": optimizer,
    "scheduler": scheduler,
    "numpy": lambda: {
        "scalar": np.float64(0.5),
        "array": np.arange(4),
        "bool": np.bool_(True),
        "text": np.array(["a"]),
    },
    "random states": lambda: (np.random.RandomState(1), np.random.default_rng(1).bit_generator.state),
    "times": lambda: (datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(3)),
    "path": lambda: pathlib.Path("runs") / "one",
    "numbers": lambda: (complex(1, 2), 2**100, range(3), slice(1, 2), bytes(3), bytearray(3), frozenset({1}), {2, 3}),
    "a loss": lambda: nn.CrossEntropyLoss(weight=torch.ones(3)),
    "an object that refers to itself": lambda: _circle(),
    "device": lambda: (torch.device("cuda:3"), torch.float16, torch.Size([1, 2]), torch.Generator().get_state()),
}


def _circle() -> Settings:
    made = Settings()
    made["self"] = made
    return made


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", OBJECTS)
def test_whatever_stands_beside_the_weights_is_not_read(name: str, zipped: bool, protocol: int, tmp_path: Path) -> None:
    content = {"state_dict": STATE, "epoch": 3, "meta": OBJECTS[name](), "hooks": [OBJECTS[name]()]}
    file = tmp_path / "w.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    assert is_read(file)
    assert read_weights(str(file)).notes == ("weights in w.pth: taken from 'state_dict'",)


def parents_of(module: str) -> list[str]:
    return [module[:cut] for cut, letter in enumerate(module) if letter == "."]


@pytest.mark.parametrize("path", LIBRARIES)
def test_classes_of_libraries_are_neither_imported_nor_called(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = path.rpartition(".")
    kind = type(name, (LIBRARIES[path],), {"__module__": module, "__slots__": ()})
    file = tmp_path / "w.pth"
    with monkeypatch.context() as installed:
        for package in [*parents_of(module), *([module] if module != "__main__" else [])]:
            installed.setitem(sys.modules, package, types.ModuleType(package))
        installed.setattr(sys.modules[module], name, kind, raising=False)
        torch.save({"state_dict": STATE, "meta": kind()}, file)
    with pytest.raises((AttributeError, ImportError)):
        torch.load(file, weights_only=False)
    assert is_read(file)


# --- in place of the weights ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)))


class Marked(Tensor):
    pass


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a module": (Net, f"{__name__}.Net"),
    "a module under its usual name": (lambda: {"model": Net(), "epoch": 1}, f"{__name__}.Net"),
    "a module under another name": (lambda: {"resnet": Net(), "lr": Options()}, f"{__name__}.Net"),
    "a module before its moving average": (lambda: {"model": Net(), "ema": state_of()}, f"{__name__}.Net"),
    "a state dict that is an object": (lambda: {"state_dict": Settings(state_of())}, f"{__name__}.Settings"),
    "a tensor of a class of its own": (
        lambda: {"state_dict": {**state_of(), "fc.bias": state_of()["fc.bias"].as_subclass(Marked)}},
        "torch._tensor._rebuild_from_type_v2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_object_in_place_of_the_weights_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    make, blocked = REFUSED[name]
    file = tmp_path / "w.pth"
    torch.save(make(), file)
    with pytest.raises(ModelError) as caught:
        load(file)
    assert str(caught.value).startswith(
        f"cannot read weights from '{file}': it holds more than tensors, and reading it could run code "
        f"(blocked: {blocked})\n"
    )
    assert "--trust-checkpoint" in str(caught.value)


def test_an_object_beside_whole_weights_needs_no_trust(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"state_dict": state_of(), "optimizer": optimizer(), "criterion": nn.BCELoss(torch.ones(2))}, file)
    for trust in (True, False):
        assert has(model := load(file, trust_checkpoint=trust), state_of())
        assert not any("run code" in note for note in model.notes)


def test_only_shapes_are_read_of_such_a_file_for_a_skeleton(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"state_dict": state_of(), "meta": Options()}, file)
    content = load_saved(file, mapped=True)
    assert {name: tensor.shape for name, tensor in content["state_dict"].items()} == {
        name: tensor.shape for name, tensor in state_of().items()
    }


# --- hostile files -------------------------------------------------------------------------------------------------


class Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(traces: Path) -> dict[str, Any]:
    made = f"__import__('os').mkdir({str(traces)!r})"
    return {
        "os.system": Calls(os.system, f"mkdir {traces}"),
        "os.mkdir": Calls(os.mkdir, str(traces)),
        "eval": Calls(eval, made),
        "exec": Calls(exec, made),
        "a path that makes itself": Calls(pathlib.Path.mkdir, traces),
        "functools.partial": Calls(functools.partial, os.mkdir, str(traces)),
        "functools.reduce": Calls(functools.reduce, os.system, [f"mkdir {traces}"], 0),
        "a getter": Calls(getattr, pathlib.Path(traces), "mkdir"),
        "numpy": Calls(np.save, str(traces), np.ones(1)),
        "torch.load": Calls(torch.save, 1, str(traces)),
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "within settings", "as a tensor", "as a name", "as a whole"])
def test_nothing_in_a_hostile_file_runs(name: str, zipped: bool, place: str, tmp_path: Path) -> None:
    code = attacks(tmp_path / "traces")[name]
    content: Any = {
        "beside": {"state_dict": state_of(), "meta": code},
        "within settings": {"state_dict": state_of(), "meta": Settings(a=[Settings(b=code)])},
        "as a tensor": {"state_dict": {**state_of(), "x": code}},
        "as a name": {"state_dict": state_of(), "names": {1: code}},
        "as a whole": code,
    }[place]
    file = tmp_path / "w.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    try:
        load(file)
    except ModelError as error:
        assert "could run code" in str(error) or "not a state dict" in str(error)
    assert sorted(tmp_path.iterdir()) == [file]


def assemble(*parts: bytes) -> Any:
    return load_inert(io.BytesIO(b"\x80\x02" + b"".join(parts) + b"."))


@pytest.mark.parametrize(
    "parts",
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"}X\x08\x00\x00\x00__code__K\x01sb"),  # changes a function
        (b"ctorch\nSize\n", b"}X\x01\x00\x00\x00aK\x01sb"),  # changes a class
        (b"ccollections\nOrderedDict\n", b"}X\x05\x00\x00\x00itemsK\x01sb"),
        (b"ctorch\nfloat32\n", b"K\x01a"),
        (b"(K\x01t", b"K\x02a"),
        (b"cos\nsystem\n", b"X\x02\x00\x00\x00id\x85R"),
        (b"cposix\nsystem\n", b"X\x02\x00\x00\x00id\x85R"),
        (b"(cbuiltins\neval\n", b"X\x01\x00\x00\x001o"),  # OBJ
        (b"(X\x01\x00\x00\x001i__builtin__\neval\n",),  # INST
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93",),  # STACK_GLOBAL
    ],
)
def test_what_could_change_or_call_anything_is_refused(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(pickle.UnpicklingError):
        assemble(*parts)


@pytest.mark.parametrize(
    "parts",
    [
        (b"cbuiltins\ngetattr\n", b"ctorch\nload\n\x85R"),
        (b"ctorch.hub\nload\n", b"X\x01\x00\x00\x00a\x85R"),
        (b"ctorch\n_C\n", b"X\x01\x00\x00\x00a\x85R"),
        (b"ctorch._utils\n_import_dotted_name\n", b"X\x01\x00\x00\x00a\x85R"),
        (b"c__main__\nx.y.z\n", b")\x81"),
        (b"\x82\x01",),  # EXT1
    ],
)
def test_every_other_name_is_a_stand_in(parts: tuple[bytes, ...]) -> None:
    assert type(assemble(*parts)) is StandIn
