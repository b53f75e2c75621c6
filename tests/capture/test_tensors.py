"""What is found in a module's output: one path for each tensor, and a reason for whatever is not taken."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import tv_tensors

from hookx.capture.probe import probe
from hookx.capture.runner import Runner
from hookx.capture.tensors import Unusable, look_into, tensors_given, tensors_in
from hookx.errors import LayerError
from hookx.layers.address import Address
from hookx.layers.select import parse_selectors, select
from kit.nets import captured_rows, images, targets_of

ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


class Colour(enum.Enum):
    RED = 1


class Plain:
    """A class that stores what it is given, and would fail if its properties were read."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    @property
    def broken(self) -> Tensor:
        raise AssertionError("a property was read")

    @functools.cached_property
    def late(self) -> Tensor:
        raise AssertionError("a property was read")


class Slots:
    """A class without a __dict__, and with a slot that has no value."""

    __slots__ = ("_hidden", "first", "unset")

    def __init__(self) -> None:
        self.first, self._hidden = ONE, TWO


@dataclasses.dataclass
class Fields:
    """A dataclass with an attribute beyond its fields."""

    second: Tensor
    first: Tensor

    def __post_init__(self) -> None:
        self.more = [ONE]


class WithAttributes(dict[str, Tensor]):
    """A dict that can have attributes, too."""


def found_in(value: Any) -> dict[str, Tensor | str]:
    return {
        Address(".", parts=parts).place: found.reason if isinstance(found, Unusable) else found
        for parts, found in look_into(value)
    }


# --- one address for each part --------------------------------------------------------------------------------------

keys = st.one_of(
    st.text(max_size=4),
    st.integers(-2, 12),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.tuples(st.integers(0, 1), st.text(max_size=1)),
    st.sampled_from(
        [Colour.RED, "Colour.RED", "0", "int=0", "str=0", "str=str=0", "", "in", "%empty", "a/b", "é", "\n"]
    ),
    st.builds(object),
)


@given(st.lists(keys, min_size=1, max_size=8, unique=True), st.lists(keys, max_size=4, unique=True))
def test_every_tensor_in_nested_dicts_has_one_address_that_reads_back(outer: list[Any], inner: list[Any]) -> None:
    expected = [torch.tensor(float(number)) for number in range(len(outer) + len(inner))]
    value: dict[Any, Any] = dict(zip(outer, expected, strict=False))
    value[outer[0]] = dict(zip(inner, expected[len(outer) :], strict=True))
    addresses = [(str(Address("layer", parts=parts)), found) for parts, found in tensors_in(value)]
    assert len({address for address, _ in addresses}) == len(addresses) == len(expected) - 1
    for (parts, _), (address, _) in zip(tensors_in(value), addresses, strict=True):
        assert Address.parse(address) == Address("layer", parts=parts)
        assert [str(selector.address) for selector in parse_selectors(address)] == [address]


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ({"out": ONE, "aux": (TWO, None)}, ["out", "aux/0"]),
        ({0: ONE, "1": TWO}, ["0", "1"]),
        ({0: ONE, "0": TWO}, ["int=0", "str=0"]),
        ({"0": ONE, 0: TWO, "int=0": ONE}, ["str=0", "int=0#1", "int=0#2"]),
        ({"": ONE, "''": TWO}, ["%empty", "''"]),
        ({"%empty": ONE}, ["%25empty"]),
        ({(0, 1): ONE, Colour.RED: TWO}, ["(0%2C%201)", "Colour.RED"]),
        ({object(): ONE, object(): TWO}, ["object=object#0", "object=object#1"]),
        ({"": {"": ONE}}, ["%empty/%empty"]),
        ({"in": {"in": ONE}}, ["%69n/in"]),
    ],
)
def test_a_part_is_named_by_its_key_and_by_its_type_only_where_two_have_the_same_text(
    value: Any, places: list[str]
) -> None:
    assert list(found_in(value)) == places


def test_two_keys_with_one_text_are_two_activations() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> dict[Any, Any]:
            return {0: x, "0": -x, "": 2 * x}

    pixels = images(2)
    rows = captured_rows(Net(), ".", pixels)
    assert list(rows) == ["./int=0", "./str=0", "./%empty"]
    assert torch.equal(rows["./int=0"], pixels) and torch.equal(rows["./str=0"], -pixels)
    assert torch.equal(captured_rows(Net(), "./%empty", pixels)["./%empty"], 2 * pixels)


def test_arguments_by_position_and_by_a_keyword_of_the_same_text_are_two_activations() -> None:
    assert [parts for parts, _ in tensors_given((ONE,), {"0": TWO})] == [("int=0",), ("str=0",)]
    assert [parts for parts, _ in tensors_given((3, ONE), {"flag": True})] == [()]


# --- objects are searched -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (Plain(first=ONE, rest=[TWO, {"deep": ONE}], name="x"), ["first", "rest/0", "rest/1/deep"]),
        (Slots(), ["_hidden", "first"]),
        (Fields(ONE, TWO), ["second", "first", "more/0"]),
        (types.SimpleNamespace(a=ONE), ["a"]),
        (torch.distributions.Normal(ONE, TWO), ["loc", "scale"]),
        (collections.deque([ONE, TWO]), ["0", "1"]),
        (collections.UserDict(a=ONE), ["a"]),
        (collections.UserList([ONE]), ["0"]),
        (types.MappingProxyType({"a": ONE}), ["a"]),
        ({"a": ONE}.values(), ["0"]),
        (torch.ones(2, 2).max(0), ["0", "1"]),
    ],
)
def test_objects_are_searched_as_dataclasses_are(value: Any, places: list[str]) -> None:
    assert list(found_in(value)) == places
    assert all(isinstance(found, Tensor) for found in found_in(value).values())


def test_transformers_outputs_and_encodings_are_searched() -> None:
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=ONE, hidden_states=(ONE, TWO))
    assert list(found_in(output)) == ["last_hidden_state", "hidden_states/0", "hidden_states/1"]
    assert list(found_in(transformers.BatchEncoding({"mask": ONE}))) == ["mask"]


def test_classes_of_attrs_are_searched() -> None:
    attrs = pytest.importorskip("attrs")
    made = attrs.make_class("Made", ["first", "rest"], slots=True)
    assert list(found_in(made(ONE, [TWO]))) == ["first", "rest/0"]


def test_tensors_that_a_dict_has_as_attributes_are_parts_beside_its_items() -> None:
    value = WithAttributes(a=ONE, b=ONE)
    vars(value).update(a=TWO, c=-ONE, b=value["b"])
    assert list(found_in(value)) == ["str=a", "b", "attribute=a", "c"]


def test_what_leads_into_the_program_is_not_searched_and_a_cycle_ends() -> None:
    value = Plain(x=ONE, model=nn.Linear(2, 2), kind=Plain, call=print, error=ValueError(TWO))
    vars(value).update(me=value, around=[value])
    assert list(found_in(value)) == ["x"]


def test_one_tensor_in_two_places_has_both_addresses() -> None:
    shared = [ONE]
    assert list(found_in({"a": shared, "b": shared, "c": ONE})) == ["a/0", "b/0", "c"]


def test_an_output_without_end_costs_little() -> None:
    wide: Any = [ONE]
    for _ in range(40):
        wide = [wide, wide]
    *_, (parts, last) = look_into(wide)
    assert parts == () and last == Unusable("it holds more than 10,000 objects")
    deep: Any = ONE
    for _ in range(2000):
        deep = [deep]
    assert [found for _, found in look_into(deep)] == [Unusable("it is nested more than 50 levels deep")]


def test_numbers_cost_nothing_of_the_budget() -> None:
    assert list(found_in([*range(20_000), ONE])) == ["20000"]


# --- what is not taken says why -------------------------------------------------------------------------------------


class Unreadable(dict[str, Tensor]):
    """A mapping whose code fails."""

    def items(self) -> Any:
        raise OSError("gone")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: {ONE}, "it is a set, which has no order: return a list or a dict"),
        (lambda: frozenset([ONE]), "it is a frozenset, which has no order"),
        (lambda: (one for one in [ONE]), "it is a generator, which reading would use up: return a list"),
        (lambda: map(abs, [ONE]), "it is a map, which reading would use up"),
        (lambda: torch.eye(3).to_sparse(), "it is not a dense tensor (sparse_coo): use .to_dense() in the model"),
        (lambda: torch.eye(3).to_sparse_csr(), "it is not a dense tensor (sparse_csr)"),
        (lambda: torch.eye(3).to_mkldnn(), "it is not a dense tensor (mkldnn)"),
        (lambda: torch.nested.nested_tensor([ONE, ONE]), "it is a nested tensor, whose images differ in shape"),
        (lambda: torch.masked.masked_tensor(ONE, ONE > 0), "it is a MaskedTensor, which keeps its values in other"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "it is bits8, which torch cannot convert"),
        (lambda: np.ones(2), "it is a numpy.ndarray, not a tensor, and hookx cannot look into it"),
        (lambda: Unreadable(a=ONE), "its items cannot be read: OSError: gone"),
    ],
)
def test_what_holds_values_and_cannot_be_taken_says_why(make: Any, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some of these are prototypes.
        [(parts, found)] = look_into(("text", make()))
    assert parts == ("1",) and isinstance(found, Unusable) and reason in found.reason


@pytest.mark.parametrize("value", [None, 3, "text", np.float32(1), {1, 2}, torch.float32, (), object(), Colour.RED])
def test_what_holds_no_tensor_is_passed_over(value: Any) -> None:
    assert not found_in([value])


def test_a_tensor_of_a_class_that_only_renames_functions_is_taken_as_a_plain_one() -> None:
    image = tv_tensors.Image(torch.rand(3, 4, 4))
    [(_, found)] = tensors_in(image)
    assert type(found) is Tensor and found.data_ptr() == image.data_ptr()


class Mixed(nn.Module):
    """A layer of which one part can be taken, and one of which none can."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.none, self.stream = self.Returns("some"), self.Returns("none"), self.Returns("stream")

    class Returns(nn.Module):
        def __init__(self, what: str) -> None:
            super().__init__()
            self.what = what

        def forward(self, x: Tensor) -> Any:
            if self.what == "stream":
                return (one for one in [x])
            return {"x": x if self.what == "some" else {x}, "edges": torch.eye(3).to_sparse(), "table": torch.ones(3)}

    def forward(self, x: Tensor) -> Tensor:
        self.some(x), self.none(x)
        [x] = self.stream(x)
        return x


def test_a_part_that_cannot_be_taken_is_left_out_and_said() -> None:
    selection = select(parse_selectors("some,*"), probe(Runner.of(Mixed()), images()), "net")
    assert [str(target.address) for target in selection.targets] == ["some/x"]
    assert selection.left_out["some/edges"].startswith("'some/edges' cannot be captured: it is not a dense tensor")
    assert selection.left_out["stream"].endswith("it is a generator, which reading would use up: return a list")


@pytest.mark.parametrize("selector", ["none", "non*"])
def test_when_no_part_of_a_layer_can_be_taken_all_are_named(selector: str) -> None:
    with pytest.raises(LayerError) as caught:
        targets_of(Mixed(), selector)
    assert all(part in str(caught.value) for part in ("'none/x'", "'none/edges'", "'none/table'"))


def test_the_generator_that_a_layer_returns_is_left_to_the_model() -> None:
    pixels = images(2)
    assert torch.equal(captured_rows(Mixed(), ".", pixels)["."], pixels)


def test_a_module_that_is_given_a_generator_can_still_be_captured() -> None:
    class Joins(nn.Module):
        def forward(self, x: Tensor, more: Iterator[Tensor]) -> Tensor:
            return torch.cat([x, *more], 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joins = Joins()

        def forward(self, x: Tensor) -> Tensor:
            joined: Tensor = self.joins(x, (2 * one for one in [x]))
            return joined

    rows = captured_rows(Net(), "joins,joins/in", images(2))
    assert list(rows) == ["joins", "joins/in"] and rows["joins"].shape == (2, 6, 8, 8)
