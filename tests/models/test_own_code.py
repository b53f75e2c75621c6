"""One's own code: what it returns, what it prints, what its arguments are, and everything that can be wrong with it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hookx.errors import ModelError
from hookx.images.decoding import decode
from hookx.models import LoadedModel, ModelOptions, load_model, own_code, skeleton
from hookx.models.arguments import arguments_for
from kit import warm
from kit.second_route import captured_of

NET = """
    from enum import Enum
    from pathlib import Path
    from typing import Literal
    import torch
    from torch import nn

    class Act(Enum):
        relu = nn.ReLU
        tanh = nn.Tanh

    class Net(nn.Module):
        def __init__(self, width: int = 4, act: Act = Act.relu, bias: bool = True, scale: float | None = None):
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3, bias=bias)
            self.norm = nn.BatchNorm2d(width)
            self.act = nn.ReLU(inplace=True) if act is Act.relu else nn.Tanh()
            self.scale = scale

        def forward(self, x):
            x = self.act(self.norm(self.conv(x)))
            return {"map": x, "pooled": x.mean((2, 3)) * (self.scale or 1)}
"""


@pytest.fixture(autouse=True)
def import_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(folder: Path, text: str, name: str = "net.py") -> str:
    (folder / name).write_text(dedent(NET) + dedent(text))
    return str(folder / name)


def made_by(folder: Path, body: str, **options: Any) -> LoadedModel:
    """Load what a factory with this body returns."""
    text = "def factory():\n" + "\n".join(f"    {line}" for line in dedent(body).strip().splitlines())
    return load_model(f"{write(folder, text)}:factory", "default", ModelOptions(**options))


def error_of(ref: str, weights: str = "default", **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ref, weights, ModelOptions(**options))
    return str(caught.value)


# --- the model -----------------------------------------------------------------------------------------------------


def test_every_activation_of_a_file_s_model_is_what_its_layer_returned(tmp_path: Path) -> None:
    loaded = load_model(f"{write(tmp_path, '')}:Net", "none")
    rows = captured_of(loaded, side_px=16)
    assert list(rows) == ["conv", "norm", "act", "./map", "./pooled"]
    assert not torch.equal(rows["norm"], rows["act"])  # In place, and yet both.


def test_a_factory_in_a_package_of_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets_of_a_test").mkdir()
    write(tmp_path / "my_nets_of_a_test", "", "__init__.py")
    write(tmp_path / "my_nets_of_a_test", "", "small.py")
    monkeypatch.chdir(tmp_path)
    for module in ("my_nets_of_a_test", "my_nets_of_a_test.small"):
        assert type(load_model(f"python:{module}:Net").module).__name__ == "Net"


def test_a_file_finds_its_neighbours_leaves_nothing_behind_and_takes_no_installed_name(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_a_test.py").write_text("WIDTH = 5")
    text = "from neighbour_of_a_test import WIDTH\ndef factory():\n    return Net(WIDTH)"
    loaded = load_model(f"{write(tmp_path, text, 'json.py')}:factory")
    assert loaded.module.get_submodule("conv").out_channels == 5
    assert {file.name for file in tmp_path.iterdir()} == {"json.py", "neighbour_of_a_test.py"}
    import json

    assert json.loads("[1]") == [1] and "site-packages" not in str(json.__file__) and str(tmp_path) not in json.__file__


def test_a_model_itself_will_do_and_a_nested_name_too(tmp_path: Path) -> None:
    file = write(tmp_path, "whole = Net()\nclass Zoo:\n    @staticmethod\n    def small():\n        return Net(2)\n")
    assert load_model(f"{file}:whole").module.get_submodule("conv").out_channels == 4
    assert load_model(f"{file}:Zoo.small").module.get_submodule("conv").out_channels == 2


def test_the_factory_is_called_once_for_the_layers_and_the_run(tmp_path: Path) -> None:
    text = """
        def factory():
            with open(Path(__file__).with_suffix(".calls"), "a") as calls:
                calls.write("x")
            return Net()
    """
    ref = f"{write(tmp_path, text)}:factory"
    bare, loaded = skeleton(ref), load_model(ref)
    assert bare.module is loaded.module and (tmp_path / "net.calls").read_text() == "x"
    again = load_model(ref)  # It may have been changed since, so it is made anew.
    assert again.module is not loaded.module and again.weights == loaded.weights


def test_what_a_wrapper_runs_without_hooks_is_taken_out_of_it(tmp_path: Path) -> None:
    loaded = made_by(tmp_path, "return torch.compile(nn.DataParallel(Net()))")
    assert type(loaded.module).__name__ == "Net"
    assert "unwrapped from its OptimizedModule" in loaded.notes[0] and "its DataParallel" in loaded.notes[1]


# --- the state it is in --------------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_put_into_eval_mode_and_it_is_said(tmp_path: Path) -> None:
    loaded = made_by(tmp_path, "return Net()")
    assert not any(module.training for module in loaded.module.modules())
    assert any(note.endswith(":factory: put into eval mode") for note in loaded.notes)
    partly = made_by(tmp_path, "net = Net().eval(); net.norm.train(); return net")
    assert any(note.endswith("put into eval mode (norm was in training mode)") for note in partly.notes)
    assert not any("eval" in note for note in made_by(tmp_path, "return Net().eval()").notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parameters_on_another_device_are_moved_to_the_cpu_and_it_is_said(tmp_path: Path) -> None:
    loaded = made_by(tmp_path, "return Net().cuda()")
    assert {tensor.device.type for tensor in loaded.module.parameters()} == {"cpu"}
    assert any("moved from cuda:0 to the CPU" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return Net().to('meta')", "has parameters on the meta device, which have no values: conv.weight"),
        ("return nn.Sequential(nn.LazyConv2d(4, 1))", "has lazy parameters, which get their shapes in a first forward"),
        ("Net()", "returns None; expected an nn.Module; does it end with 'return model'?"),
        ("return Net(), 3", "returns a tuple of Net, int; expected an nn.Module\n  return only the model"),
        ("return Net().state_dict()", "returns an OrderedDict; expected an nn.Module"),
        ("return Net", "returns a type; expected an nn.Module"),
        ("raise KeyError('width')", "fails: KeyError: 'width' (net.py, line "),
        ("import sys; sys.exit(4)", "fails: SystemExit: 4 (net.py, line "),
        ("return nn.Conv2d(3, -1, 1)", "fails: RuntimeError: Trying to create tensor with negative dimension -1"),
        (
            "net = Net(); net.norm.train = lambda mode=True: net.norm; return net",
            "stays in training mode after eval(): norm",
        ),
        ("net = Net(); net.input_size = (3, 0, 32); return net", "takes images of 0 x 32 pixels"),
    ],
)
def test_what_a_factory_does_wrong_is_an_error(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        made_by(tmp_path, body)
    assert message in str(caught.value) and f"{tmp_path}/net.py:factory " in str(caught.value)


# --- the code ------------------------------------------------------------------------------------------------------


def test_names_that_lead_to_nothing_are_errors_that_say_what_there_is(tmp_path: Path) -> None:
    file = write(tmp_path, "number = 3\n")
    assert f"'{file}' has no 'Nett'; closest: Net" in error_of(f"{file}:Nett")
    assert f"{file}:number is an int; expected a factory or an nn.Module" in error_of(f"{file}:number")
    assert (
        error_of(file)
        == f"'{file}' does not name a factory\n  write {file}:factory, where factory can also be a class or a model"
    )
    assert "write python:numpy:factory" in error_of("python:numpy")
    assert error_of(f"{tmp_path}/none.py:Net") == f"there is no file '{tmp_path}/none.py'"
    message = error_of("python:no_such_package.nets:small")
    assert "there is no module 'no_such_package' for python:no_such_package.nets:small\n" in message
    assert "write a file as path/to/file.py:factory" in message
    assert f"{file}:Net has no weights 'IMAGENET1K_V1'; it has: default" in error_of(f"{file}:Net", "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package' (net.py, line "),
        ("1 / 0", "ZeroDivisionError: division by zero (net.py, line "),
        ("def factory(:", "SyntaxError: invalid syntax (net.py, line "),
        ("raise SystemExit('usage')", "SystemExit: usage (net.py, line "),
    ],
)
def test_code_that_cannot_be_imported_is_an_error_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    assert f"'{file}' cannot be imported: {message}" in error_of(f"{file}:factory")


def test_what_code_prints_goes_to_standard_error(tmp_path: Path) -> None:
    text = """
        import os
        print("while it is imported")
        class Talks(Net):
            def forward(self, x):
                print("while it runs")
                return super().forward(x)
        def factory():
            print("while it is made")
            os.system("echo from another process")
            return Talks()
        def transform():
            def prepare(image):
                print("while it prepares")
                return torch.zeros(3, 8, 8)
            return prepare
    """
    file = write(tmp_path, text)
    program = f"""
        import torch
        from hookx.models import ModelOptions, load_model
        loaded = load_model("{file}:factory", "none", ModelOptions(transform="{file}:transform"))
        loaded.forward(torch.zeros(1, 3, 8, 8))
        print("data")
    """
    done = subprocess.run([*warm.python("torch"), "-c", dedent(program)], capture_output=True, text=True)
    assert done.stdout == "data\n", done.stderr
    for what in ("it is imported", "it is made", "from another process", "it prepares", "it runs"):
        assert what in done.stderr


# --- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_are_read_as_the_annotations_say(tmp_path: Path) -> None:
    ref = f"{write(tmp_path, '')}:Net"
    loaded = load_model(ref, "none", ModelOptions(model_args={"width": "6", "act": "tanh", "bias": "no"}))
    conv = loaded.module.get_submodule("conv")
    assert conv.out_channels == 6 and conv.bias is None and isinstance(loaded.module.get_submodule("act"), nn.Tanh)
    assert loaded.weights.startswith(f"random (seed 0), {ref}(act=tanh, bias=no, width=6) sha256:")
    assert loaded.name == ref


def typed(  # type: ignore[no-untyped-def]
    whole: int,
    real: float,
    text: str,
    flag: bool,
    path: Path,
    many: list[int],
    pair: tuple[int, float],
    either: str | int,
    neither: str | int,
    maybe: float | None,
    bare,
    by_default=True,
    *_: Any,
    **others: Any,
) -> None:
    """Take one of everything."""


def test_a_text_becomes_what_is_annotated() -> None:
    texts = {
        "whole": "3",
        "real": "3",
        "text": "3",
        "flag": "False",
        "path": "a/b",
        "many": "1,2",
        "pair": "1, 2",
        "either": "7",
        "neither": "x",
        "maybe": "none",
        "bare": "[1, 'a']",
        "by_default": "off",
        "other": "1e-3",
    }
    positional, keywords = arguments_for(typed, texts, "typed")
    assert positional == [] and keywords == {
        "whole": 3,
        "real": 3.0,
        "text": "3",
        "flag": False,
        "path": Path("a/b"),
        "many": [1, 2],
        "pair": (1, 2.0),
        "either": 7,
        "neither": "x",
        "maybe": None,
        "bare": [1, "a"],
        "by_default": False,
        "other": 1e-3,
    }
    assert isinstance(keywords["real"], float) and isinstance(keywords["pair"][1], float)


def test_arguments_that_are_missing_unknown_or_of_another_type_are_errors(tmp_path: Path) -> None:
    file = write(tmp_path, "def factory(width: int, depth, *, name='x'):\n    return Net(width)\nwhole = Net()\n")
    ref = f"{file}:factory"
    assert error_of(ref) == (
        f"{ref} needs arguments: width (int), depth\n  pass them: --model-arg width=... --model-arg depth=..."
    )
    given = {"width": "4", "depth": "1"}
    assert f"{ref} takes no argument 'widht'; closest: width" in error_of(ref, model_args={**given, "widht": "4"})
    assert f"{ref}: --model-arg width=4.5 is not (int): " in error_of(ref, model_args={**given, "width": "4.5"})
    wrong = error_of(f"{file}:Net", model_args={"act": "gelu"})
    assert "--model-arg act=gelu is not (Act): one of relu, tanh" in wrong
    assert "is a model, not a factory, so it takes no --model-arg width" in error_of(f"{file}:whole", model_args=given)
    assert "resnet18 takes no --model-arg" in error_of("resnet18", "none", model_args=given)


# --- weights -------------------------------------------------------------------------------------------------------


def test_the_seed_comes_before_the_factory_so_that_a_run_can_be_repeated(tmp_path: Path) -> None:
    ref = f"{write(tmp_path, 'whole = Net()')}"
    for name in ("Net", "whole"):
        one, same, other = (load_model(f"{ref}:{name}", "none", ModelOptions(seed=seed)) for seed in (0, 0, 1))
        assert one.weights == same.weights and one.weights.startswith("random (seed 0), ")
        assert one.weights.partition("sha256:")[2] != other.weights.partition("sha256:")[2]


def test_what_an_import_draws_does_not_change_what_the_factory_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "whole = Net()", "drawn_at_import_of_a_test.py")
    monkeypatch.chdir(tmp_path)
    first, second = (load_model("python:drawn_at_import_of_a_test:Net", "none") for _ in range(2))  # Imported once.
    assert first.weights == second.weights


def test_the_identity_of_the_weights_is_the_digest_of_every_tensor(tmp_path: Path) -> None:
    ref = f"{write(tmp_path, '')}:Net"
    loaded = load_model(ref)
    assert loaded.weights == f"{ref} sha256:{own_code.state_sha256(loaded.module)}"
    digests = {own_code.state_sha256(loaded.module)}
    for tensor in loaded.module.state_dict().values():
        tensor += 1
        digests.add(own_code.state_sha256(loaded.module))
    assert len(digests) == 1 + len(loaded.module.state_dict())
    kinds = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)]  # The same bytes.
    alike = [nn.Module() for _ in kinds]
    for module, tensor in zip(alike, kinds, strict=True):
        module.register_buffer("table", tensor)
    assert len(set(map(own_code.state_sha256, alike))) == 3
    odd = nn.Module()
    for number, dtype in enumerate((torch.bfloat16, torch.bool, torch.int8, torch.complex64)):
        odd.register_buffer(f"b{number}", torch.zeros((), dtype=dtype))
    odd.register_buffer("empty", torch.zeros(0, 3))
    assert len(own_code.state_sha256(odd)) == 64


def test_a_file_of_weights_is_loaded_into_what_the_factory_makes(tmp_path: Path) -> None:
    ref = f"{write(tmp_path, '')}:Net"
    state = {name: torch.full_like(tensor, 3) for name, tensor in load_model(ref).module.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_model(ref, str(tmp_path / "w.safetensors"))
    assert all(bool((tensor == 3).all()) for tensor in loaded.module.state_dict().values())
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert loaded.weights == f"{ref} sha256:{digest}"
    save_file({name: tensor for name, tensor in state.items() if name != "conv.bias"}, tmp_path / "w.safetensors")
    assert "missing (1): conv.bias" in error_of(ref, str(tmp_path / "w.safetensors"))
    partly = load_model(ref, str(tmp_path / "w.safetensors"), ModelOptions(allow_missing=("conv",)))
    assert partly.random_paths == ("conv",) and "as the factory made them: conv" in partly.weights


# --- what it expects of an image -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "side_px"),
    [
        ("input_size = (3, 96, 96)", 96),
        ("image_size = 64", 64),
        ("img_size = (48, 48)", 48),
        ("default_cfg = {'input_size': (3, 80, 80)}", 80),
        ("config = type('Config', (), {'image_size': {'height': 40, 'width': 40}})", 40),
    ],
)
def test_the_size_of_the_images_is_found_from_the_model(says: str, side_px: int, tmp_path: Path) -> None:
    loaded = made_by(tmp_path, f"net = Net(); net.{says}; return net")
    assert loaded.preprocessing.crop_px == side_px and "assumed ImageNet's mean and std" in loaded.notes[-1]


def test_what_a_model_does_not_say_is_assumed_aloud(tmp_path: Path) -> None:
    loaded = made_by(tmp_path, "return Net()")
    assert str(loaded.preprocessing) == str(load_model("resnet18", "none").preprocessing)
    assert "does not say how to prepare images: assumed 224 pixels and ImageNet's mean and std" in loaded.notes[-1]
    assert loaded.notes[-1].endswith("override them with --resize, --crop, --mean, --std, or with --transform")


def test_a_model_s_own_preprocessing_is_taken(tmp_path: Path, photos: Path) -> None:
    file = str(photos / "animals" / "chelsea.jpg")
    preset = "from torchvision.models import ResNet50_Weights"
    loaded = made_by(
        tmp_path, f"{preset}\nnet = Net(); net.preprocessing = ResNet50_Weights.DEFAULT.transforms(); return net"
    )
    assert loaded.preprocessing.resize_px == 232 and loaded.transform is None
    assert not any("assumed" in note for note in loaded.notes)
    imports = "from torchvision.transforms import Compose, Resize, ToTensor"
    composed = made_by(
        tmp_path, f"{imports}\nnet = Net(); net.preprocessing = Compose([Resize((20, 20)), ToTensor()]); return net"
    )
    assert composed.preprocessing.crop_px == 20 and composed.preprocessing.custom.endswith(
        ": Compose( Resize(size=(20, 20), interpolation=bilinear, max_size=None, antialias=True) ToTensor() )"
    )
    with Image.open(file) as image:
        assert composed.transform is not None and composed.transform(image).shape == (3, 20, 20)
    config = "{'input_size': (3, 48, 48), 'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'crop_pct': 0.96}"
    timms = made_by(tmp_path, f"net = Net(); net.pretrained_cfg = {config}; return net")
    assert str(timms.preprocessing) == "resize 50 (bicubic), crop 48, mean 0.5,0.5,0.5, std 0.25,0.25,0.25"
    assert decode(file, timms.preprocessing)[0].shape == (3, 48, 48)


TRANSFORMS = """
    from torchvision.transforms import Compose, RandomCrop, Resize, ToTensor
    from torchvision.models import ResNet18_Weights

    def halves():
        def prepare(image):
            return torch.full((3, 12, 12), image.width / 1000)
        return prepare

    def random():
        return Compose([RandomCrop(32), ToTensor()])

    def sizes():
        return Compose([Resize(32), ToTensor()])

    def grows():
        return lambda image: torch.zeros(3, image.width // 10, image.width // 10)

    def doubles():
        return lambda image: torch.zeros(3, 8, 8, dtype=torch.float64)

    def pictures():
        return Resize((8, 8))

    def fails():
        return lambda image: image.no_such_thing

    def nothing():
        pass

    ready = Compose([Resize((8, 8)), ToTensor()])
    preset = ResNet18_Weights.DEFAULT.transforms
"""


@pytest.mark.parametrize("model", ["resnet18", "{}:Net"])
def test_a_transform_of_ones_own_replaces_the_preprocessing_of_any_model(model: str, tmp_path: Path) -> None:
    file = write(tmp_path, TRANSFORMS)
    for load in (skeleton, load_model):
        loaded = load(model.format(file), "none", ModelOptions(transform=f"{file}:halves"))
        assert loaded.transform is not None and loaded.preprocessing.crop_px == 12
        assert float(loaded.transform(Image.new("RGB", (250, 9)))[0, 0, 0]) == 0.25
        assert loaded.preprocessing.custom == f"{file}:halves: <function halves.<locals>.prepare>"
        assert not any("assumed" in note for note in loaded.notes)
    ready = load_model(model.format(file), "none", ModelOptions(transform=f"{file}:ready"))
    assert ready.preprocessing.crop_px == 8
    preset = load_model(model.format(file), "none", ModelOptions(transform=f"{file}:preset"))
    assert preset.preprocessing.custom == "" and preset.preprocessing.resize_px == 256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random", "is random: it returns different pixels for the same image\n  remove what only training needs"),
        (
            "sizes",
            "returns images of 32 x 42 and 53 x 32 pixels; a batch needs a single size",
        ),
        ("grows", "returns images of 20 x 20 and 32 x 32 pixels; a batch needs a single size"),
        ("doubles", "returned a float64 tensor of shape (3, 8, 8) for an image"),
        ("pictures", "returned Image; expected a float32 tensor of shape (3, height, width)"),
        ("fails", "fails on an RGB image of 320 x 240 pixels: AttributeError: 'Image' object has no attribute"),
        ("nothing", "returns None; expected a function of an RGB image (PIL)\n  --transform names a factory"),
        ("Net.forward", "needs arguments: self, x"),
        ("no_such", "has no 'no_such'"),
    ],
)
def test_what_a_transform_does_wrong_is_an_error(name: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, TRANSFORMS)
    assert message in error_of("resnet18", "none", transform=f"{file}:{name}")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_lists_the_layers_of_ones_own_model(tmp_path: Path) -> None:
    write(tmp_path, "")
    command = [*warm.python("torch"), "-m", "hookx", "list-layers", "net.py:Net", "--model-arg", "width=6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "conv" in done.stdout and "N,6,222,222" in done.stdout
