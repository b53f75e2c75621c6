"""A run read back: an array on the disk for every address, by row and by key, joined, and as torch's datasets."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset
from typer.testing import CliRunner

import hookx
from hookx.cli.app import app
from hookx.errors import NotStoredError, ShardError, StoreError, UsageError
from hookx.keys import Keys
from hookx.plan import LayerSpec
from hookx.read.datasets import ShardSampler
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from kit.files import files_opened
from kit.runs import UNREADABLE, plan_of, random_rows, same_bits, write_run
from kit.shards import publish

LAYERS = (
    LayerSpec("layer1", (2, 3), "float32"),
    LayerSpec("avgpool", (5,), "bfloat16"),
    LayerSpec("labels", (), "int64"),
    LayerSpec("mask", (2, 1), "bool"),
    LayerSpec("phase", (3,), "complex64"),
    LayerSpec("nothing", (0, 2), "uint8"),
)
# Ten images in shards of three, four of them unreadable: shards of 3, 2, 0 and 1 rows.
KEYS = ["00", "01", "02", "03", "05", "09"]
Opened = tuple[hookx.Features, dict[str, Tensor]]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    path = tmp_path_factory.mktemp("opened")
    written = write_run(path, plan_of(LAYERS, 10, 3))
    return hookx.open(path), written


def write_images(
    path: Path, keys: Sequence[str], images_per_shard: int = 3, layer: LayerSpec = LAYERS[0]
) -> hookx.Features:
    """Write a run of these images, and open it; the first value of a row is the row's number."""
    plan = plan_of((layer,), len(keys), images_per_shard)
    with RunDirectory(path, plan) as directory:
        for shard in plan.shards:
            tensors = random_rows(plan, len(shard), seed=shard.number)
            tensors[layer.address].flatten(1)[:, 0] = torch.arange(shard.start, shard.stop)
            publish(directory, shard, tensors, ShardRecord(list(keys[shard.start : shard.stop])))
    return hookx.open(path)


def proc(file: str, field: str) -> int:
    """Return a number that the system keeps of this process."""
    match = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self", file).read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def mapped_file(address: int) -> str:
    """Return which file is mapped to where an address of this process lies; '' if none is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, file = line.split(maxsplit=5) if len(line.split()) > 5 else (line.split()[0], "")
        start, end = (int(bound, 16) for bound in place.split("-"))
        if start <= address < end:
            return file
    raise AssertionError("no memory of this process")


# --- a mapping -----------------------------------------------------------------------------------------------------


def test_opened_features_show_what_there_is_before_an_activation_is_read(opened: Opened) -> None:
    features, _ = opened
    assert list(features) == [layer.address for layer in LAYERS] and len(features) == 6 and "fc" not in features
    for layer, (address, activations) in zip(LAYERS, features.items(), strict=True):
        assert (activations.address, activations.shape, len(activations)) == (address, (6, *layer.shape), 6)
        assert activations.dtype == getattr(torch, layer.dtype)
    assert features.failures == UNREADABLE
    assert features.plan.images_per_shard == 3
    assert repr(features["avgpool"]) == "Activations('avgpool', shape=(6, 5), dtype=torch.bfloat16)"
    assert "6 images, layer1, avgpool" in repr(features)


def test_keys_are_those_of_the_images_and_when_called_the_addresses_of_the_mapping(opened: Opened) -> None:
    features, _ = opened
    assert features.keys == KEYS and list(features.keys) == KEYS and features.keys_of_rows == KEYS
    assert features.keys[-1] == "09" and features.keys[1:3] == ["01", "02"]
    assert "05" in features.keys and "04" not in features.keys
    assert repr(features.keys) == "<6 keys: '00', '01', '02', ...>"
    addresses = list(features)
    assert list(features.keys()) == addresses == list(dict(features))
    assert list({**features}) == addresses
    assert features["layer1"].keys == KEYS


def test_a_misspelt_address_is_a_key_error_with_the_closest(opened: Opened) -> None:
    with pytest.raises(KeyError, match="/ does not hold 'avgpol'; closest: avgpool"):
        opened[0]["avgpol"]
    assert opened[0].get("avgpol") is None


NAMES = st.lists(st.binary(min_size=1, max_size=4).map(os.fsdecode), unique=True, max_size=20)


@given(NAMES, NAMES)
def test_keys_are_found_like_in_a_list_and_whatever_bytes_they_are(names: list[str], others: list[str]) -> None:
    expected = sorted(names, key=os.fsencode)
    keys = Keys.pack(map(os.fsencode, expected))
    assert keys == expected and expected == keys and keys != [*expected, "x"] and keys != "".join(expected)
    for name in [*names, *others, "\ud800"]:
        assert (name in keys) == (name in expected)
        if name in expected:
            assert keys.index(name) == expected.index(name)
            with pytest.raises(ValueError, match="is not among"):
                keys.index(name, expected.index(name) + 1)
        else:
            with pytest.raises(ValueError):
                keys.index(name)


# --- rows ----------------------------------------------------------------------------------------------------------

ROW = st.integers(-6, 5)
NUMBERS = st.lists(ROW, max_size=9)
MASK = st.lists(st.booleans(), min_size=6, max_size=6)
INDEX: st.SearchStrategy[Any] = st.one_of(
    ROW,
    ROW.map(np.int16),
    ROW.map(np.array),
    ROW.map(torch.tensor),
    st.slices(6),
    st.slices(100),
    NUMBERS,
    NUMBERS.map(lambda rows: np.array(rows, dtype=np.int32)),
    NUMBERS.map(lambda rows: torch.tensor(rows, dtype=torch.int64)),
    st.lists(st.integers(0, 5)).map(lambda rows: np.array(rows, dtype=np.uint64)),
    MASK,
    MASK.map(np.array),
    MASK.map(torch.tensor),
    st.slices(6).map(lambda rows: range(6)[rows]),
)
ADDRESSES = st.sampled_from([layer.address for layer in LAYERS])


@given(ADDRESSES, INDEX)
@settings(max_examples=300)
def test_every_index_gives_the_rows_that_numpy_would_take_out_of_all(opened: Opened, address: str, index: Any) -> None:
    features, written = opened
    # For numpy, an empty list is one of floats.
    as_numpy = index if isinstance(index, slice) else np.asarray(index, dtype=None if np.size(index) else int)
    rows = np.arange(6)[as_numpy]
    assert same_bits(features[address][index], written[address][torch.from_numpy(np.array(rows))])


@pytest.mark.parametrize("outside", [6, -7, [0, 6], [-7], np.array([2**64 - 1], dtype=np.uint64), torch.tensor([9])])
def test_a_row_that_there_is_not_is_an_index_error_that_names_it(opened: Opened, outside: Any) -> None:
    named = np.asarray(outside).ravel()[-1]
    with pytest.raises(IndexError, match=f"row {named} is out of range for 6 rows"):
        opened[0]["layer1"][outside]


@pytest.mark.parametrize(
    ("foreign", "said"),
    [
        ((0, 1), r"not \(0, 1\); index the rows first, then their tensor: \[rows\]\[:, 0\]"),
        ((slice(None), 0), "index the rows first"),
        ([True, False], r"not \[True, False\]"),
        (True, "not True"),
        (np.True_, "not"),
        (torch.tensor(True), r"not an array of torch.bool with shape \(\)"),
        (1.0, "not 1.0"),
        ([0.0, 1.0], r"not \[0.0, 1.0\]"),
        ([[0, 1]], r"not \[\[0, 1\]\]"),
        ([[0], [0, 1]], "not"),
        (np.zeros((6, 2), dtype=bool), r"not an array of bool with shape \(6, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), r"not an array of torch.int64 with shape \(2, 2\)"),
        (None, "not None"),
        (..., "not Ellipsis"),
        ("03", r"not '03'; look an image up by key with .of\('03'\)"),
    ],
)
def test_an_index_that_names_no_rows_is_refused_and_never_guessed(opened: Opened, foreign: Any, said: str) -> None:
    with pytest.raises(
        TypeError, match=f"rows must be an integer, a slice, a list of integers or a mask of length 6, .*{said}"
    ):
        opened[0]["layer1"][foreign]


@given(ADDRESSES, st.lists(st.sampled_from(KEYS)))
@settings(max_examples=40)
def test_an_image_has_its_row_by_its_key(opened: Opened, address: str, keys: list[str]) -> None:
    features, written = opened
    assert same_bits(features[address].of(keys), written[address][[KEYS.index(key) for key in keys]])
    for key in keys:
        assert same_bits(features[address].of(key), written[address][KEYS.index(key)])


def test_an_image_that_could_not_be_read_or_is_not_there_is_a_key_error_that_says_which(opened: Opened) -> None:
    layer1 = opened[0]["layer1"]
    with pytest.raises(NotStoredError, match=r"^'04' could not be read: OSError: cut$"):
        layer1.of(["00", "04"])
    with pytest.raises(KeyError, match=r"/ does not hold '9'; closest: 09"):
        layer1.of("9")


def test_rows_are_a_copy_that_is_the_readers_to_change(opened: Opened) -> None:
    features, written = opened
    for index in (0, slice(0, 3), [2, 1], slice(None)):
        features["labels"][index].fill_(7)
        features["layer1"].torch().zero_()
    assert same_bits(features["labels"][:], written["labels"])
    assert same_bits(features["layer1"][:], written["layer1"])


def test_an_index_opens_each_file_that_it_needs_once_and_no_other(opened: Opened) -> None:
    features, written = opened
    features["labels"][:]  # Where the rows begin in the files is known from now on.
    for rows, shards in (
        ([5, 0, 5, 2, 1, 0], {0, 3}),
        (slice(3, 5), {1}),
        ([], set()),
        (slice(1, 6), {0, 1, 3}),
        ([0, 2, 4], {0, 1}),
    ):
        with files_opened() as names:
            assert same_bits(features["labels"][rows], written["labels"][rows])
        assert sorted(names) == [features.plan.shard_file(features.plan.shards[number]) for number in sorted(shards)]


@on_linux
def test_only_the_rows_asked_for_are_read_and_neighbours_at_once(tmp_path: Path) -> None:
    keys = [f"{row:03}" for row in range(200)]
    conv1 = write_images(tmp_path, keys, 100, LayerSpec("conv1", (64, 1024), "float32"))["conv1"]
    conv1[:]
    for rows, stretches in (([150, 2, 150], 2), (slice(10, 90), 1), (slice(50, 150), 2), ([7, 9, 8, 6, 5], 1)):
        bytes_before, reads_before = proc("io", "rchar"), proc("io", "syscr")
        chosen = conv1[rows]
        bytes_read, reads = proc("io", "rchar") - bytes_before, proc("io", "syscr") - reads_before
        numbers = chosen[:, 0, 0].tolist()
        assert numbers == np.arange(200)[rows].tolist()
        assert 0 <= bytes_read - len(set(numbers)) * conv1.bytes_per_row < 50_000  # The rest is /proc itself.
        assert stretches <= reads < stretches + 10


def test_a_loop_over_rows_of_any_size_gives_each_of_them(tmp_path: Path) -> None:
    conv1 = write_images(tmp_path, KEYS, 4, LayerSpec("conv1", (500, 1000), "float32"))["conv1"]
    assert [int(row[0, 0]) for row in conv1] == [0, 1, 2, 3, 4, 5]


def test_iteration_batches_and_shards_give_all_rows_in_order_with_their_keys(opened: Opened) -> None:
    features, written = opened
    for address, activations in features.items():
        assert same_bits(torch.stack(list(activations)), written[address])
        for pieces in (activations.batches(4), activations.batches(1), activations.batches(100), activations.shards()):
            tensors, keys = zip(*pieces, strict=True)
            assert same_bits(torch.cat(tensors), written[address]) and [*chain(*keys)] == KEYS
            assert all(len(tensor) == len(some) for tensor, some in zip(tensors, keys, strict=True))
    assert [len(keys) for _, keys in features["layer1"].batches(4)] == [4, 2]
    assert [len(keys) for _, keys in features["layer1"].shards()] == [3, 2, 1]
    with pytest.raises(UsageError, match="the batch size must be at least 1, got 0"):
        next(features["layer1"].batches(0))


# --- all of it -----------------------------------------------------------------------------------------------------


@on_linux
def test_whole_shards_are_the_files_themselves_and_take_no_memory(tmp_path: Path) -> None:
    side = 4096
    features = write_images(tmp_path, ["a", "b"], 2, LayerSpec("conv1", (side, side), "float32"))
    conv1, shard_kilobytes = features["conv1"], 2 * side * side * 4 // 1024
    conv1[1]
    before = proc("status", "RssAnon")
    held: list[Any] = [conv1.torch(), next(conv1.shards())[0], conv1.numpy(), np.asarray(conv1)]
    lengths = {np.count_nonzero(some) for some in held}  # All of it has been looked at.
    assert len(lengths) == 1 and proc("status", "RssAnon") - before < shard_kilobytes / 4
    copied = conv1[:]
    addresses = [some.data_ptr() if isinstance(some, Tensor) else some.ctypes.data for some in [*held, copied]]
    shard = str(next(tmp_path.rglob("*.safetensors")))
    assert [mapped_file(address) == shard for address in addresses] == [True] * 4 + [False]
    assert same_bits(copied, held[0])


def test_what_is_written_to_a_shard_that_is_mapped_reaches_neither_the_file_nor_another_reader(tmp_path: Path) -> None:
    features = write_images(tmp_path, ["a", "b"])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    expected = features["layer1"][:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of an array that cannot be written to.
        for mapped in (features["layer1"].torch(), torch.from_numpy(features["layer1"].numpy())):
            mapped.fill_(7)
    next(features["layer1"].shards())[0].fill_(7)
    assert same_bits(features["layer1"][:], expected) and same_bits(features["layer1"].torch(), expected)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_torch_and_numpy_get_the_stored_values(opened: Opened) -> None:
    features, written = opened
    for address in ("layer1", "labels", "mask", "phase", "nothing"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            array = features[address].numpy()
            assert same_bits(features[address].torch(), written[address])
            assert same_bits(torch.from_numpy(array), written[address])
            assert same_bits(torch.from_numpy(np.asarray(features[address])), written[address])
    assert np.asarray(features["labels"], dtype=np.float64).dtype == np.float64
    assert np.concatenate([features["labels"], features["labels"]]).shape == (12,)
    with pytest.raises(ValueError, match="an array of it is always a copy"):
        np.asarray(features["labels"], copy=False)


def test_bfloat16_stays_itself_in_torch_and_becomes_equal_float32_in_numpy_which_is_said_aloud(opened: Opened) -> None:
    features, written = opened
    avgpool, exact = features["avgpool"], written["avgpool"].float().numpy()
    for convert in (lambda: avgpool.numpy(), lambda: np.asarray(avgpool), lambda: np.abs(np.asarray(avgpool))):
        with pytest.warns(UserWarning, match=r"'avgpool' is bfloat16, .* it becomes float32, exactly") as said:
            array = convert()
        assert array.dtype == np.float32 and len(said) == 1 and said[0].filename == __file__
    assert np.array_equal(array, np.abs(exact), equal_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(avgpool.torch(), written["avgpool"]) and avgpool[:2].dtype == torch.bfloat16
        asked = np.asarray(avgpool, dtype=np.float32)  # Who asks for a type has said it.
    assert np.array_equal(asked, exact, equal_nan=True)


# --- which runs are opened -----------------------------------------------------------------------------------------


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreError, match=r"holds no run of hookx: cannot read plan.json"):
            hookx.open(path)


def test_an_unfinished_run_is_refused_unless_partial_and_then_shows_the_shards_there_are(tmp_path: Path) -> None:
    plan = plan_of(LAYERS, 10, 3)
    written = write_run(tmp_path, plan)
    (tmp_path / plan.shard_file(plan.shards[0])).unlink()
    with pytest.raises(StoreError, match="is not finished: 3 of 4 shards") as refused:
        hookx.open(tmp_path)
    assert f"hookx.open('{tmp_path}', partial=True)" in str(refused.value)
    features = hookx.open(tmp_path, partial=True)
    assert features.keys == ["03", "05", "09"]
    assert same_bits(features["layer1"][:], written["layer1"][3:])
    for shard in plan.shards[1:]:
        (tmp_path / plan.shard_file(shard)).unlink()
    nothing = hookx.open(tmp_path, partial=True)
    assert nothing.keys == [] and nothing["layer1"].shape == (0, 2, 3)
    assert nothing["layer1"][:].shape == nothing["layer1"].torch().shape == nothing["layer1"][[]].shape == (0, 2, 3)
    assert not list(nothing["layer1"].shards()) and not list(nothing.dataset("layer1").sampler())


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--resize 40 --crop 32 --mean 0.1,0.2,0.3 --std 0.7,0.8,0.9000000001 --interpolation bicubic --exif apply",
        "--precision bf16 --seed 3 --batch-size 4 --shard-images 5",
        "--dtype fp16 --resize 64 --crop 64",
        "--precision bf16 --dtype fp32 --exif apply --max-shard-size 100kB",
    ],
)
def test_the_command_that_an_unfinished_run_shows_resumes_it(thumbnails: Path, tmp_path: Path, options: str) -> None:
    def run(arguments: list[str]) -> None:
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0

    out, images = tmp_path / "my features", thumbnails / "things"
    asked = ["-m", "resnet18", "-w", "none", "-l", "fc,layer1.0.relu@mean23", *options.split()]
    run(["extract", *asked, "-o", str(out), str(images)])
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    first = next(name for name in sorted(files) if name.startswith("shard-"))
    (out / first).unlink()
    (out / "index.csv").unlink()
    with pytest.raises(StoreError) as refused:
        hookx.open(out)
    [command] = re.findall("hookx extract .*", str(refused.value))
    _, *arguments, last = shlex.split(command)
    assert last == "IMAGES"
    run([*arguments, str(images)])
    assert files == {file.name: file.read_bytes() for file in out.iterdir()}


def test_a_run_whose_images_are_not_in_order_is_refused(tmp_path: Path) -> None:
    for number, keys in enumerate((["b", "a", "c"], ["a", "a"], ["b", "c", "d", "a"])):
        with pytest.raises(
            ShardError, match=r"shard-0000\d.* is damaged: its images are not in the order of their keys"
        ):
            write_images(tmp_path / str(number), keys)


def test_a_shard_that_changes_or_vanishes_after_the_run_was_opened_is_an_error_and_never_a_wrong_row(
    tmp_path: Path,
) -> None:
    keys = ["a", "b", "c", "d"]
    features = write_images(tmp_path / "run", keys)
    first, second = map(Path, map(str, features.rows.files))
    read: list[Callable[[], object]] = [
        lambda: features["layer1"][0],
        lambda: next(features["layer1"].shards()),
        lambda: list(features.dataset("layer1").sampler()),
    ]
    read[0]()
    for change in (lambda: shutil.copy(second, first), first.unlink):
        change()
        for reader in read:
            with pytest.raises(StoreError, match=first.name):
                reader()
    assert features["layer1"][3].shape == (2, 3)


def test_features_are_read_by_another_process_and_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "run", KEYS)
    monkeypatch.chdir(tmp_path)
    features = hookx.open("run")
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(features))
    assert same_bits(again["layer1"][:], features["layer1"][:])
    assert again.keys == KEYS and list(again.keys()) == ["layer1"] and again.plan == features.plan


# --- datasets ------------------------------------------------------------------------------------------------------


def doubled(activation: Tensor) -> Tensor:
    return activation.mul_(2)


def flattened(activations: dict[str, Tensor]) -> Tensor:
    return torch.cat([activation.flatten().float() for activation in activations.values()])


def test_an_item_of_a_dataset_is_an_activation_and_its_key(opened: Opened) -> None:
    features, written = opened
    dataset = features.dataset("layer1")
    assert len(dataset) == 6 and dataset.keys == KEYS
    for row, (activation, key) in enumerate(map(dataset.__getitem__, range(6))):
        assert same_bits(activation, written["layer1"][row]) and key == KEYS[row]
    assert dataset[-1][1] == "09"
    with pytest.raises(IndexError):
        dataset[6]


def test_a_transform_may_change_its_row_in_place_and_gets_a_dict_of_several_addresses(opened: Opened) -> None:
    features, written = opened
    dataset = features.dataset("labels", doubled)
    for _ in range(2):
        assert [int(dataset[row][0]) for row in range(6)] == (written["labels"] * 2).tolist()
    several, key = features.dataset(["labels", "layer1"])[4]
    assert key == "05" and list(several) == ["labels", "layer1"]
    assert same_bits(several["labels"], written["labels"][4]) and same_bits(several["layer1"], written["layer1"][4])
    assert features.dataset(["mask", "layer1"], transform=flattened)[0][0].shape == (8,)
    with pytest.raises(UsageError, match="a dataset needs at least one address"):
        features.dataset([])
    with pytest.raises(NotStoredError, match="closest: mask"):
        features.dataset(["labels", "maks"])


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_a_loader_gives_every_row_once_with_its_key_whatever_its_workers(opened: Opened, context: str | None) -> None:
    features, written = opened
    dataset = features.dataset("labels", doubled)
    dataset[0]  # What the parent has read, its children do not trip over.
    loader = DataLoader(
        dataset,
        batch_size=4,
        sampler=dataset.sampler(seed=1),
        num_workers=2 if context else 0,
        multiprocessing_context=context,
        persistent_workers=context is not None,
    )
    for _ in range(2):
        seen = [(key, int(label)) for labels, keys in loader for key, label in zip(keys, labels, strict=True)]
        assert sorted(seen) == list(zip(KEYS, (written["labels"] * 2).tolist(), strict=True))


def test_a_batch_of_a_loader_opens_each_file_once(opened: Opened) -> None:
    dataset = opened[0].dataset("labels")
    dataset[0], dataset[3], dataset[5]  # Where the rows begin in the files is known from now on.
    for batch in ([5, 0, 2, 1], [1, 3, 0]):
        with files_opened() as names:
            next(iter(DataLoader(dataset, batch_sampler=[batch])))
        assert len(names) == len(set(names)) == 2


# --- the sampler ---------------------------------------------------------------------------------------------------

SHARDS = st.lists(st.integers(0, 12), max_size=8)  # rows of each


def sampler_of(shards: list[int], stretch: int, window: int, seed: int = 0, **more: Any) -> ShardSampler:
    borders = np.cumsum([0, *shards])
    return ShardSampler(borders, rows_per_stretch=stretch, rows_per_window=window, seed=seed, **more)


@given(SHARDS, st.integers(1, 15), st.integers(0, 40), st.integers(0, 5), st.integers(0, 5))
def test_a_sampler_gives_every_row_once_in_an_order_of_its_seed_and_epoch(
    shards: list[int], stretch: int, window: int, seed: int, epoch: int
) -> None:
    sampler = sampler_of(shards, stretch, window, seed)
    sampler.set_epoch(epoch)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(sum(shards))) and len(sampler) == sum(shards)
    again = sampler_of(shards, stretch, window, seed)
    again.set_epoch(epoch + 1)
    assert list(again) == second


@given(SHARDS, st.integers(1, 15), st.integers(1, 40))
def test_a_window_holds_whole_stretches_of_shards_which_were_fetched_before(
    shards: list[int], stretch: int, window: int
) -> None:
    fetched: list[tuple[int, int]] = []
    borders = np.cumsum([0, *shards]).tolist()
    sampler = sampler_of(shards, stretch, window, prefetch=lambda start, stop: fetched.append((start, stop)))
    in_use: set[int] = set()
    for row in sampler:
        [(start, stop)] = [(start, stop) for start, stop in fetched if start <= row < stop]
        assert stop - start <= stretch and any(a <= start < stop <= b for a, b in pairwise(borders))
        # A window holds all stretches that are begun and not finished.
        in_use ^= {row}
        begun = {s for s in fetched if any(s[0] <= r < s[1] for r in in_use)}
        unfinished = {s for s in begun if not all(r in in_use for r in range(*s))}
        assert len(unfinished) <= max(1, window // stretch)
    assert sorted(row for some in fetched for row in range(*some)) == list(range(sum(shards)))


def test_the_next_window_is_fetched_while_one_is_used() -> None:
    fetched: list[int] = []
    sampler = sampler_of([90], 10, 30, prefetch=lambda start, stop: fetched.append(start))
    assert [len(fetched) for _ in sampler] == [6] * 30 + [9] * 60  # A window has three stretches.


def test_seeds_and_epochs_differ_and_a_negative_seed_is_refused() -> None:
    orders = {tuple(sampler_of([50, 50], 10, 40, seed)) for seed in range(5)}
    sampler = sampler_of([50, 50], 10, 40)
    orders |= {tuple(sampler) for _ in range(5)}
    assert len(orders) == 9  # The first epoch of the seed 0 is there twice.
    with pytest.raises(UsageError, match="the seed must be at least 0, got -1"):
        sampler_of([1], 1, 1, seed=-1)


def test_every_window_mixes_rows_from_all_over_the_run() -> None:
    classes = 100  # 100 neighbours each, like folders.
    order = list(sampler_of([1000] * 10, 20, 2000))
    for start in range(0, 10_000, 500):
        assert len({row // classes for row in order[start : start + 500]}) > 50


def test_a_run_that_fits_into_a_window_is_shuffled_without_a_limit() -> None:
    count = 20_000
    order = np.array(list(sampler_of([2000] * 10, 100, count)))
    rows = np.arange(count)
    assert abs(np.corrcoef(order, rows)[0, 1]) < 0.05
    assert abs(np.abs(order - rows).mean() / count - 1 / 3) < 0.01  # the mean distance of two random numbers


def test_the_sampler_of_a_dataset_cuts_by_the_bytes_of_a_row(tmp_path: Path) -> None:
    features = write_images(tmp_path, [f"{row:03}" for row in range(200)], 150, LayerSpec("fc", (2**16,), "float32"))
    sampler = features.dataset("fc").sampler(window="3MiB")
    assert (sampler.rows_per_stretch, sampler.stretches_per_window, sampler.borders.tolist()) == (4, 3, [0, 150, 200])
    assert sorted(sampler) == list(range(200))
    assert features.dataset("fc").sampler(window=1).stretches_per_window == 1


# --- joins ---------------------------------------------------------------------------------------------------------

SOME_KEYS = st.lists(
    st.sampled_from([f"{letter}/{number}" for letter in "abé" for number in range(5)]), min_size=1, unique=True
)


@given(SOME_KEYS, SOME_KEYS, INDEX)
@settings(max_examples=15)
def test_a_join_has_the_rows_of_both_runs_under_one_key_and_names_the_others(
    tmp_path_factory: pytest.TempPathFactory, one: list[str], other: list[str], index: Any
) -> None:
    one, other = sorted(one), sorted(other)
    left = write_images(tmp_path_factory.mktemp("left"), one)
    right = write_images(tmp_path_factory.mktemp("right"), other, 2)
    both = hookx.join(left, right)
    common = sorted(set(one) & set(other))
    assert both.keys == both.left.keys == both.right.keys == common
    assert both.only_left == sorted(set(one) - set(other)) and both.only_right == sorted(set(other) - set(one))
    for features, keys, joined in ((left, one, both.left), (right, other, both.right)):
        rows = torch.tensor([keys.index(key) for key in common], dtype=torch.int64)
        expected = features["layer1"].torch()[rows]
        assert joined["layer1"].shape == (len(common), 2, 3)
        for all_rows in (joined["layer1"].torch(), joined["layer1"][:], joined["layer1"][np.arange(len(common))]):
            assert same_bits(all_rows, expected)
        pieces = list(joined["layer1"].shards())
        assert [*chain(*(keys for _, keys in pieces))] == common
        assert not pieces or same_bits(torch.cat([rows for rows, _ in pieces]), expected)
        for key in common:
            assert same_bits(joined["layer1"].of(key), features["layer1"].of(key))
        assert sorted(joined.dataset("layer1").sampler()) == list(range(len(common)))


def test_what_is_joined_can_be_joined_again_and_read_side_by_side(tmp_path: Path) -> None:
    abc, bcd, cde = (write_images(tmp_path / keys, list(keys), 2) for keys in ("abcd", "bcde", "cdef"))
    both = hookx.join(hookx.join(abc, bcd).left, cde)
    assert both.keys == ["c", "d"] and both.only_left == ["b"] and both.only_right == ["e", "f"]
    assert both.left["layer1"][:][:, 0, 0].tolist() == [2, 3] and both.right["layer1"][1][0, 0] == 1
    pairs = StackDataset(both.left.dataset("layer1"), both.right.dataset("layer1"))
    for (one, key), (other, same_key) in DataLoader(pairs, batch_size=2):
        assert list(key) == list(same_key) == ["c", "d"]
        assert (one[:, 0, 0] - other[:, 0, 0]).tolist() == [2, 2]


def test_failures_of_a_joined_run_say_why_an_image_is_missing(opened: Opened, tmp_path: Path) -> None:
    features, _ = opened
    both = hookx.join(write_images(tmp_path, ["03", "04", "05"]), features)
    assert both.keys == ["03", "05"] and both.only_left == ["04"] and both.right.failures["04"] == "OSError: cut"
