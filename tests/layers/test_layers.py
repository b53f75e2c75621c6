"""The grammar of addresses, and what selectors select in a model that is written down here by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookx.errors import AddressError, LayerError, closest
from hookx.layers.address import Address, quote, unquote
from hookx.layers.reductions import Reduction, Step
from hookx.layers.select import Call, Layer, Selection, Selector, TensorInfo, matched_paths, parse_selectors, select

# Any characters, surrogates and control characters too; torch allows no '.' in the name of a module.
module_names = st.text(st.characters(exclude_characters="."), min_size=1) | st.sampled_from(
    ["in", "type", "0", "%", "%2F", "a/b", "a:1", "a@mean1", "a b", "*", "**", "?", "[0]", "a,b", "\n", "'", "\udcff"]
)
part_names = st.text(st.characters()) | st.sampled_from(
    ["in", "0", ".", "..", "%69n", "a/b", "@cls", ":0", "", "%empty", "''"]
)
paths = st.just(".") | st.lists(module_names, min_size=1, max_size=4).map(".".join)
dims = st.sets(st.integers(1, 9)).map(lambda some: tuple(sorted(some)))
over_dims = st.builds(Step, st.sampled_from(["mean", "max", "min", "sum", "norm"]), dims)
steps = over_dims | st.builds(Step, st.sampled_from(["cls", "flatten", "patches", "cls+patchmean", "grid", "l2"]))
reductions = st.builds(Reduction, st.lists(steps, min_size=1, max_size=3).map(tuple))
addresses = st.builds(
    Address,
    path=paths,
    call=st.none() | st.integers(0, 10**6),
    is_input=st.booleans(),
    parts=st.lists(part_names, max_size=3).map(tuple),
    reduction=st.none() | reductions,
)


# --- the grammar ---------------------------------------------------------------------------------------------------


@given(addresses)
def test_an_address_that_is_printed_and_read_is_the_same_address(address: Address) -> None:
    assert Address.parse(str(address)) == address


@given(st.lists(addresses))
def test_printed_addresses_joined_by_commas_select_just_themselves(some: list[Address]) -> None:
    selectors = parse_selectors(",".join(map(str, some)))
    assert [(selector.kind, selector.address) for selector in selectors] == [("path", address) for address in some]


@given(addresses)
def test_a_printed_address_has_nothing_in_it_that_a_terminal_or_a_line_could_break_on(address: Address) -> None:
    assert not re.search(r"[\s,\x00-\x1f\x7f-\x9f]", str(address))
    str(address).encode()  # UTF-8, whatever the name was


def test_no_activation_has_the_name_under_which_a_safetensors_file_keeps_its_metadata() -> None:
    assert str(Address("__metadata__")) == "%5F_metadata__"
    assert Address.parse("%5F_metadata__") == Address.parse("__metadata__") == Address("__metadata__")


@given(st.text(st.characters()))
def test_quoting_is_undone_by_unquoting(name: str) -> None:
    assert unquote(quote(name)) == name


@given(st.text(st.sampled_from("ab0F.:/@%*?[]'\", \n") | st.characters()))
def test_a_text_that_is_no_address_is_an_address_error_and_nothing_else(text: str) -> None:
    try:
        Address.parse(text)
        Selector.parse(text)
    except AddressError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("layer3[0].downsample[1]", "layer3.0.downsample.1"),
        ("[0].conv", "0.conv"),
        ("[0][ 1 ]", "0.1"),
        ("blocks['0'].attn", "blocks.0.attn"),
        ('blocks["0"].attn', "blocks.0.attn"),
        ("layer1[0].relu:01/in@mean32", "layer1.0.relu:1/in@mean23"),
        (".", "."),
        (".:0/logits", ".:0/logits"),
        ("attn/%empty", "attn/%empty"),
        ("attn/%25empty", "attn/%25empty"),
    ],
)
def test_python_s_brackets_are_normalised_to_dots(text: str, canonical: str) -> None:
    assert str(Address.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a layer address\n  write the dotted path"),
        ("a..b", "is not a layer address"),
        ("a.", "is not a layer address"),
        ("layer3[", "is not a layer address"),
        ("layer3[x]", "is not a layer address"),
        ("two words", "is not a layer address"),
        ("relu:", "is not a layer address: ':' takes the number of a call, as in layer1.0.relu:1"),
        ("relu:-1", "':' takes the number of a call"),
        ("relu:first", "':' takes the number of a call"),
        ("relu:²", "':' takes the number of a call"),
        ("attn/", "is not a layer address: '/' takes 'in' or the name of a part, as in attn/0"),
        ("attn//0", "'/' takes 'in' or the name of a part"),
        ("attn/%FF", "not UTF-8"),
        ("layer4@avg", "'@avg' is not a reduction; closest: @"),
        ("layer4@maen23", "closest: @mean"),
        ("layer4@", "'@' is not a reduction"),
        ("layer4@mean0", "cannot reduce dimension 0, the batch; count from 1"),
        ("layer4@mean22", "names a dimension twice"),
        ("layer4@cls1", "cls takes no dimensions; write @cls"),
        ("type:", "is not a selector: 'type:' takes the name of a class, as in type:Conv2d"),
        ("type:Conv*", "'type:' takes the name of a class"),
        ("layer***", "is not a glob over layer paths"),
        ("layer*..conv", "is not a glob over layer paths"),
    ],
)
def test_a_malformed_selector_is_refused_with_the_form_that_is_right(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=re.escape(message)):
        Selector.parse(text)


@given(over_dims, st.lists(st.integers(0, 9), max_size=5).map(tuple))
def test_a_reduction_keeps_the_dimensions_it_does_not_name(step: Step, shape: tuple[int, ...]) -> None:
    try:
        reduced = step.shape(shape, None)
    except ValueError as error:
        assert str(error)
        return
    assert list(reduced) == [length for dim, length in enumerate(shape, 1) if str(dim) not in str(step)]


# --- globs ---------------------------------------------------------------------------------------------------------


def matches_by_components(glob: Sequence[str], path: Sequence[str]) -> bool:
    """Match a glob the slow way, one component after the other."""
    if not glob:
        return not path
    head, *rest = glob
    if head == "**":
        return any(matches_by_components(rest, path[taken:]) for taken in range(0 if rest else 1, len(path) + 1))
    return bool(path) and fnmatchcase(path[0], head) and matches_by_components(rest, path[1:])


short_paths = st.lists(st.sampled_from(["a", "b", "ab", "ba", "0"]), min_size=1, max_size=5)
short_globs = st.lists(st.sampled_from(["a", "ab", "*", "?", "a*", "*b", "?b", "**"]), min_size=1, max_size=4).filter(
    lambda components: any(re.search("[*?]", component) for component in components)
)


@given(short_globs, short_paths)
def test_a_glob_matches_what_its_components_match_one_by_one(glob: list[str], path: list[str]) -> None:
    selector = Selector.parse(".".join(glob))
    assert selector.kind == "glob"
    assert selector.paths({".": "Net", ".".join(path): "Net"}) == [".".join(path)] * matches_by_components(glob, path)


NAMES = dict.fromkeys([".", "layer1", "layer1.0", "layer1.0.conv1", "layer1.0.relu", "layer10", "layerconv1"], "Net")


@pytest.mark.parametrize(
    ("glob", "selected"),
    [
        ("*", ["layer1", "layer10", "layerconv1"]),  # and not '.', the model itself
        ("layer?", ["layer1"]),
        ("layer1?", ["layer10"]),
        ("layer1.*", ["layer1.0"]),
        ("layer1[0].*", ["layer1.0.conv1", "layer1.0.relu"]),
        ("layer1.**", ["layer1.0", "layer1.0.conv1", "layer1.0.relu"]),
        ("**.conv1", ["layer1.0.conv1"]),
        ("layer**.conv1", ["layer1.0.conv1"]),
        ("**", [name for name in NAMES if name != "."]),
    ],
)
def test_one_star_stays_within_a_name_and_two_cross_the_dots(glob: str, selected: list[str]) -> None:
    assert Selector.parse(glob).paths(NAMES) == selected


# --- a model, by hand ----------------------------------------------------------------------------------------------


def tensor(*shape: int, part: str = "", batch_dim: int | None = 0, rows: int = 1, problem: str = "") -> TensorInfo:
    return TensorInfo((part,) if part else (), shape, "float32", batch_dim, rows, problem)


def layer(path: str, class_name: str, *outputs: TensorInfo, calls: int = 1, because: str = "", same: str = "") -> Layer:
    call = Call(inputs=(tensor(3, 8, 8),), outputs=outputs)
    return Layer(path, class_name, 0, (call,) * calls, never_called_because=because, same_as=same)


LAYERS = [
    layer(".", "Net", tensor(10)),
    layer("stem", "Conv2d", tensor(64, 56, 56)),
    layer("block", "Block", tensor(64, 56, 56)),
    layer("block.conv", "Conv2d", tensor(64, 56, 56)),
    layer("block.relu", "ReLU", tensor(64, 56, 56), calls=2),
    layer("attn", "Attention", tensor(49, 768, part="0"), tensor(4, 7, part="1", batch_dim=None)),
    layer("attn.out_proj", "Linear", calls=0, because="Attention uses its weights directly"),
    layer("norm", "LayerNorm", tensor(7, 7, 768)),
    layer("table", "Linear", tensor(169, 3, batch_dim=None)),
    layer("mixed", "Windows", tensor(64, 96, rows=64, problem="its rows are not adjacent")),
    layer("spare", "Linear", calls=0),
    layer("empty", "Nothing"),
    layer("pooled", "Pool", tensor()),
    layer("head", "Linear", tensor(10)),
    layer("tied", "Linear", tensor(10), same="head"),
]


def selected(layers: str, exclude: str = "") -> Selection:
    return select(parse_selectors(layers), LAYERS, "net", parse_selectors(exclude))


def names(layers: str, exclude: str = "") -> list[str]:
    return [str(target.address) for target in selected(layers, exclude).targets]


def error_of(layers: str, exclude: str = "") -> str:
    with pytest.raises(LayerError) as caught:
        selected(layers, exclude)
    return str(caught.value)


SELECTORS = [*("stem", "block", "block.*", "block.relu", "block.relu:1", "type:Conv2d", "type:Linear", "stem@mean23")]
SELECTORS += ["**", "*", ".", "head", "tied", "attn/0", "block.relu/in", "?tem:0", "head@flatten"]


@given(st.lists(st.sampled_from(SELECTORS), min_size=1))
def test_a_selection_keeps_the_order_of_its_selectors_and_never_repeats(some: list[str]) -> None:
    one_by_one = [name for selector in some for name in names(selector)]
    assert names(",".join(some)) == list(dict.fromkeys(one_by_one))


@given(st.lists(st.sampled_from(SELECTORS), min_size=1), st.sampled_from(["stem:0", "block.*", "head", "type:Conv2d"]))
def test_what_is_excluded_is_missing_and_nothing_else_is(some: list[str], exclude: str) -> None:
    gone = {target.address.path for target in selected(exclude).targets}
    kept = [target for target in selected(",".join(some)).targets if target.address.path not in gone]
    if kept:
        assert selected(",".join(some), exclude).targets == kept
    else:
        assert "--exclude leaves no layer to capture" in error_of(",".join(some), exclude)


def test_a_bare_path_is_every_call_and_every_part() -> None:
    assert names("block.relu") == ["block.relu:0", "block.relu:1"]
    assert names("block.relu:1") == ["block.relu:1"]
    assert names("stem:0") == names("stem") == ["stem"]
    assert names("block.relu/in@mean23") == ["block.relu:0/in@mean23", "block.relu:1/in@mean23"]


def test_a_call_a_part_an_input_or_a_reduction_applies_to_every_match_of_a_glob() -> None:
    assert names("block.*/in@mean1") == ["block.conv/in@mean1", "block.relu:0/in@mean1", "block.relu:1/in@mean1"]
    assert names("block.*:0") == ["block.conv", "block.relu:0"]
    assert names("type:Attention/0@cls") == ["attn/0@cls"]


def test_an_activation_and_its_reduction_can_be_taken_together() -> None:
    [whole, mean] = selected("stem,stem@mean23").targets
    assert (whole.shape, mean.shape) == ((64, 56, 56), (64,))


def test_excluding_a_call_or_a_reduction_excludes_no_more() -> None:
    assert names("block.relu", exclude="block.relu:0") == ["block.relu:1"]
    assert names("stem,stem@mean23", exclude="stem@mean23") == ["stem"]
    assert names("stem,stem/in", exclude="stem/in") == ["stem"]
    assert names("stem@mean23,head", exclude="stem") == ["head"]


def test_an_excluded_layer_need_not_fit() -> None:
    assert "does not fit" in error_of("?tem@mean23,h*@mean23")
    assert names("?tem@mean23,h*@mean23", exclude="head") == ["stem@mean23"]
    selection = selected("**", exclude="spare,table,attn/1")
    assert not {"spare", "table"} & selection.left_out.keys()


def test_a_module_with_two_names_is_taken_once_by_a_glob_that_matches_both() -> None:
    assert names("h*") == names("type:Linear") == ["head"]
    assert names("ti*") == ["tied"]  # The other name is not among the matches.
    assert names("tied,head") == ["tied", "head"]


def test_a_target_that_a_glob_and_a_name_select_counts_as_named() -> None:
    named = {str(target.address): target.is_named for target in selected("s*,norm,stem,nor?").targets}
    assert named == {"stem": True, "norm": True} and not selected("s*").targets[0].is_named


# --- what cannot be captured ---------------------------------------------------------------------------------------


def test_a_glob_leaves_out_what_cannot_be_captured_and_says_why() -> None:
    selection = selected("**")
    stored = {target.address.path for target in selection.targets}
    assert stored == {"stem", "block", "block.conv", "block.relu", "attn", "norm", "pooled", "head"}
    assert selection.left_out == {
        "attn/1": "'attn/1' is constant (4,7): it does not depend on the image",
        "attn.out_proj": "'attn.out_proj' is never called in a forward pass",
        "table": "'table' is constant (169,3): it does not depend on the image",
        "mixed": "'mixed' (64N,96) cannot be split by image: its rows are not adjacent",
        "spare": "'spare' is never called in a forward pass",
        "empty": "'empty' returns no tensor",
    }


def test_a_constant_under_a_glob_is_left_out_with_a_reduction_too() -> None:
    assert names("type:Linear@flatten") == ["head@flatten"]
    assert "constant" in selected("type:Linear@flatten").left_out["table"]


def test_a_part_that_is_constant_is_left_out_of_a_layer_that_is_named() -> None:
    assert names("attn") == ["attn/0"]
    assert selected("attn").left_out.keys() == {"attn/1"}


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("block.con", "no layer matches 'block.con' in net; closest: block.conv"),
        ("stm@mean23", "no layer matches 'stm@mean23' in net; closest: stem"),
        ("blok.*", "no layer matches 'blok.*' in net; closest: block"),
        ("type:Conv2D", "no layer matches 'type:Conv2D' in net; closest: Conv2d"),
        ("stem@mean", "'stem@mean' does not fit: mean over which dimensions? stem is N,64,56,56 in net\n"),
        ("stem@mean", "for this shape: @mean23 if the channels are dimension 1, @mean12 if they are dimension 3"),
        ("norm@max", "for this shape: @max23 if the channels are dimension 1, @max12 if they are dimension 3"),
        (
            "attn/0@mean",
            "attn/0 is N,49,768 in net\n"
            "  for this shape: @patchmean over the patches, @mean1 over all tokens, @cls for the class token",
        ),
        ("stem@mean4", "'stem@mean4' does not fit: dimension 4 does not exist. stem is N,64,56,56 in net\n"),
        ("stem@cls", "cls takes tokens, N,tokens,channels. stem is N,64,56,56"),
        ("stem@cls", "for this shape: @mean23"),
        ("head@mean23", "head is N,10 in net\n  for this shape: no reduction at all"),
        ("pooled@flatten", "pooled is N in net\n  for this shape: no reduction at all"),
        ("stem:2", "'stem:2' does not exist: stem is called once in a forward pass\n  write stem"),
        ("block.relu:2", "block.relu is called twice in a forward pass\n  its calls: block.relu:0, block.relu:1"),
        ("attn/2", "'attn/2' does not exist: attn returns attn/0 (N,49,768), attn/1 (4,7)"),
        ("stem/in/0", "'stem/in/0' does not exist: stem is given stem/in (N,3,8,8)"),
        ("attn.out_proj", "'attn.out_proj' is never called in a forward pass\n  (Attention uses its weights directly)"),
        ("attn.out_proj", "the enclosing module can be captured"),
        ("spare", "'spare' is never called in a forward pass"),
        ("table", "'table' is constant (169,3): it does not depend on the image"),
        ("attn/1", "'attn/1' is constant (4,7): it does not depend on the image"),
        ("mixed", "'mixed' (64N,96) cannot be split by image: its rows are not adjacent"),
        ("empty", "'empty' returns no tensor"),
        ("spar*", "nothing can be captured of what 'spar*' matches in net: 'spare' is never called in a forward pass"),
        ("attn*,tabl*", "nothing can be captured of what 'tabl*' matches in net: 'table' is constant (169,3)"),
    ],
)
def test_a_selector_that_cannot_be_satisfied_says_what_there_is_instead(selector: str, message: str) -> None:
    assert message in error_of(selector)


@given(st.sampled_from(LAYERS), st.sampled_from(["mean", "max", "min", "sum", "norm"]))
def test_the_spelling_that_an_error_suggests_is_one_that_works(layer: Layer, name: str) -> None:
    for address, info in layer.addresses().items():
        if info.batch_dim is None or info.problem:
            continue
        spellings = re.findall(r"@\w+", error_of(f"{address}@{name}").partition("for this shape: ")[2])
        for spelling in set(spellings) - {"@patchmean"}:  # That is to be proved on a model.
            assert names(f"{address}{spelling}") == [f"{address}{spelling}"]


def test_a_longer_common_beginning_comes_first_among_equally_close_names() -> None:
    names = ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer4.1.conv1"]
    assert closest("layer1.1.con1", names, 2) == "layer1.1.conv1, layer1.0.conv1"


def test_a_path_that_matches_nothing_is_an_error_before_any_probe() -> None:
    class_names = {layer.path: layer.class_name for layer in LAYERS}
    assert matched_paths(parse_selectors("block.*,stem,stem"), class_names, "net") == [
        *("block.conv", "block.relu", "stem")
    ]
    with pytest.raises(LayerError, match=r"list them all: hookx list-layers net"):
        matched_paths(parse_selectors("stem,stern"), class_names, "net")


@pytest.mark.parametrize(
    ("info", "text"),
    [
        (tensor(64, 56, 56), "N,64,56,56"),
        (tensor(), "N"),
        (tensor(49, 768, batch_dim=1), "49,N,768"),
        (tensor(64, 49, 96, rows=64), "64N,49,96"),
        (tensor(4, 7, batch_dim=None), "4,7"),
        (tensor(batch_dim=None), "scalar"),
    ],
)
def test_a_shape_is_written_as_the_layer_returns_it(info: TensorInfo, text: str) -> None:
    assert info.shape_text == text
