"""The plan: what its fingerprint covers, how it is written and read, and how it cuts the images into shards."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hookx.errors import StoreError, UsageError
from hookx.keys import images_sha256
from hookx.options import parse_bytes
from hookx.plan import DTYPES, LayerSpec, Plan, Preprocessing, Shard, WeightsIdentity, images_per_shard

PLAN = Plan(
    model="resnet18",
    weights="ResNet18_Weights.IMAGENET1K_V1",
    layers=(LayerSpec("conv1", (64, 112, 112), "float32"), LayerSpec("avgpool", (512, 1, 1), "float16")),
    preprocessing=Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"),
    precision="fp32",
    memory_format="contiguous",
    image_count=1000,
    images_sha256=images_sha256(["a.jpg"], [1]),
    images_per_shard=160,
    batch_size=32,
)

channels = st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3)
plans = st.builds(
    Plan,
    model=st.text(st.characters()),
    weights=st.text(),
    layers=st.lists(
        st.builds(
            LayerSpec,
            st.text(st.characters()).filter(lambda address: address != "__metadata__"),
            st.lists(st.integers(0, 9), max_size=4).map(tuple),
            st.sampled_from(list(DTYPES)),
        ),
        max_size=3,
        unique_by=lambda layer: layer.address,
    ).map(tuple),
    preprocessing=st.builds(
        Preprocessing, *[st.integers(1, 999)] * 2, channels, channels, st.text(), st.booleans(), st.text(), st.text()
    ),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    memory_format=st.sampled_from(["contiguous", "channels_last"]),
    image_count=st.integers(1, 10**9),
    images_sha256=st.text(),
    images_per_shard=st.integers(1, 10**6),
    batch_size=st.integers(1, 10**6),
    hardware=st.dictionaries(st.text(), st.text(), max_size=3).map(lambda values: tuple(values.items())),
)


# --- the fingerprint -----------------------------------------------------------------------------------------------


def altered(value: Any) -> Iterator[tuple[str, Any]]:
    """Alter a record in one place at a time, in every place there is; each with the name of the place."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            for place, other in altered(getattr(value, field.name)):
                yield f"{field.name}{place}", dataclasses.replace(value, **{field.name: other})
    elif isinstance(value, tuple):
        yield "[reversed]", value[::-1]
        yield "[shorter]", value[:-1]
        for index, item in enumerate(value):
            for place, other in altered(item):
                yield f"[{index}]{place}", (*value[:index], other, *value[index + 1 :])
    elif isinstance(value, bool):
        yield "", not value
    elif isinstance(value, int | float):
        yield "", value + 1
    else:
        yield "", f"?{value}"  # In front: a digest is shown by its beginning.


ALTERED = dict(altered(PLAN))
DECIDING = [place for place in ALTERED if not place.startswith(("batch_size", "notes", "hardware"))]


@pytest.mark.parametrize("place", DECIDING)
def test_the_fingerprint_covers_everything_that_decides_the_numbers(place: str) -> None:
    assert ALTERED[place].fingerprint != PLAN.fingerprint


def test_the_fingerprint_does_not_cover_the_batch_size() -> None:
    assert ALTERED["batch_size"] != PLAN and ALTERED["batch_size"].fingerprint == PLAN.fingerprint
    assert PLAN.differences(ALTERED["batch_size"]) == []


def test_the_fingerprint_does_not_cover_the_kind_of_machine_which_is_kept() -> None:
    insisting = dataclasses.replace(PLAN, hardware=(("device", "cpu"), ("instructions", "AVX2")))
    assert insisting.fingerprint == PLAN.fingerprint and PLAN.differences(insisting) == []
    assert Plan.from_json(insisting.to_json()) == insisting


def test_a_plan_without_a_transform_of_its_own_does_not_speak_of_one() -> None:
    # So it has the fingerprint that it had before there were any.
    assert "custom" not in PLAN.identity["preprocessing"]
    own = dataclasses.replace(PLAN.preprocessing, custom="net.py:transform: Resize(8)")
    changed = dataclasses.replace(PLAN, preprocessing=own)
    assert changed.fingerprint != PLAN.fingerprint and "net.py:transform" in changed.to_json()
    assert (
        str(own) == "net.py:transform: Resize(8), 224 x 224"
        and len(str(dataclasses.replace(own, custom="x" * 999))) < 200
    )


@given(plans, plans)
def test_two_plans_share_a_fingerprint_if_and_only_if_they_do_not_differ(one: Plan, other: Plan) -> None:
    assert (one.fingerprint == other.fingerprint) == (one.differences(other) == [])
    assert one.differences(one) == []


@pytest.mark.parametrize("place", DECIDING)
def test_one_alteration_is_one_difference_that_shows_both_values(place: str) -> None:
    [phrase] = PLAN.differences(ALTERED[place])
    [back] = ALTERED[place].differences(PLAN)
    there, asked = phrase.split(" differ (there: ")[1].removesuffix(")").split("; asked: ")
    assert there != asked
    assert back.endswith(f" differ (there: {asked}; asked: {there})")


def test_differing_layers_are_shown_by_address_and_by_shape_where_the_addresses_agree() -> None:
    only_conv1 = dataclasses.replace(PLAN, layers=PLAN.layers[:1])
    assert only_conv1.differences(PLAN) == ["layers differ (there: conv1; asked: conv1, avgpool)"]
    halves = dataclasses.replace(PLAN, layers=(dataclasses.replace(PLAN.layers[0], dtype="float16"),))
    assert only_conv1.differences(halves) == [
        "layers differ (there: conv1 [64, 112, 112] float32; asked: conv1 [64, 112, 112] float16)"
    ]


@example([("a", 12)], [("a1", 2)])
@example([("a", 1), ("b", 2)], [("a\n1b", 2)])
@given(*[st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.integers(-1, 10**12)))] * 2)
def test_different_image_lists_have_different_digests(one: list[tuple[str, int]], other: list[tuple[str, int]]) -> None:
    assume(not any("\0" in key for key, _ in one + other))  # No file name holds one.
    digests = [images_sha256([key for key, _ in some], [size for _, size in some]) for some in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


def test_a_file_name_that_is_no_utf_8_has_a_digest() -> None:
    assert images_sha256(["caf\udce9.jpg"], [1]) != images_sha256(["café.jpg"], [1])


# --- plan.json -----------------------------------------------------------------------------------------------------


@given(plans)
def test_a_plan_that_is_written_and_read_is_the_same_plan(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    plan.to_json().encode("ascii")  # So any encoding reads it.


@given(plans, st.data())
def test_a_plan_json_with_one_character_altered_is_refused_or_means_the_same(plan: Plan, data: st.DataObject) -> None:
    text = plan.to_json()
    position = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from('09az -.,:{}[]"\n'))
    try:
        read = Plan.from_json(text[:position] + other + text[position + 1 :])
    except StoreError:
        return
    assert read.identity == plan.identity


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, 1.5, math.inf, math.nan, [None], [[]], {"a": 1}])
@pytest.mark.parametrize("field", list(json.loads(PLAN.to_json())))
def test_a_plan_json_with_a_foreign_value_in_it_is_refused(field: str, value: Any) -> None:
    if (field, value) == ("notes", []):
        return  # A plan may have none.
    document = {**json.loads(PLAN.to_json()), field: value}
    with pytest.raises(StoreError, match=r"^plan\.json (cannot be read|was altered|has the format)"):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "{}", PLAN.to_json()[:-3], '{"format": "hookx 1"}'])
def test_a_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match=r"plan\.json cannot be read"):
        Plan.from_json(text)


def test_a_plan_json_that_was_edited_by_hand_is_refused() -> None:
    with pytest.raises(StoreError, match="its fingerprint does not match its contents"):
        Plan.from_json(PLAN.to_json().replace('"fp32"', '"bf16"'))


def test_a_plan_of_another_format_is_refused_by_its_name() -> None:
    with pytest.raises(StoreError, match="has the format 'hookx 2'; this hookx reads 'hookx 1'"):
        Plan.from_json(PLAN.to_json().replace('"hookx 1"', '"hookx 2"'))


# --- shards and batches --------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 200), st.integers(1, 70))
def test_batches_partition_the_shards_and_shards_the_images(images: int, per_shard: int, batch_size: int) -> None:
    plan = dataclasses.replace(PLAN, image_count=images, images_per_shard=per_shard, batch_size=batch_size)
    batches = [(shard, batch) for shard in plan.shards for batch in shard.batches(batch_size)]
    assert [position for _, batch in batches for position in batch] == list(range(images))
    assert all(0 < len(batch) <= batch_size for _, batch in batches)
    assert all(shard.start <= batch.start and batch.stop <= shard.stop for shard, batch in batches)
    # Only the last of a kind is smaller than the others.
    assert all(len(shard) == per_shard for shard in plan.shards[:-1])
    assert all(len(batch) == batch_size for (shard, batch), (next_shard, _) in pairwise(batches) if shard == next_shard)


@given(st.integers(1, 500), st.integers(1, 200))
def test_shard_files_sort_by_name_as_they_do_by_position(images: int, per_shard: int) -> None:
    plan = dataclasses.replace(PLAN, image_count=images, images_per_shard=per_shard)
    names = [plan.shard_file(shard) for shard in plan.shards]
    assert names == sorted(set(names))
    assert all(name.endswith(f"-of-{len(names):05}.safetensors") for name in names)


@given(st.integers(0, 10**10), st.integers(1, 10**10), st.integers(1, 10**5))
def test_a_shard_is_within_both_limits_or_a_single_image(bytes_per_image: int, max_bytes: int, max_images: int) -> None:
    count = images_per_shard(bytes_per_image, max_bytes, max_images)
    assert 1 <= count <= max_images
    assert count == 1 or count * bytes_per_image <= max_bytes
    # And as large as they allow, but for the rounding down to whole batches.
    assert count == max_images or (count + 32) * max(bytes_per_image, 1) > max_bytes


def test_the_bytes_of_an_image_are_those_of_its_layers() -> None:
    assert PLAN.bytes_per_image == 64 * 112 * 112 * 4 + 512 * 2
    assert LayerSpec("scalar", (), "bool").bytes_per_image == 1


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
        ("resnet18", "ResNet18_Weights.IMAGENET1K_V1", "--weights IMAGENET1K_V1"),
        ("resnet18", "ResNet18_QuantizedWeights.IMAGENET1K_FBGEMM_V1", "--weights IMAGENET1K_FBGEMM_V1"),
        ("resnet18", "random (seed 0)", "--weights none"),
        ("python:my.code:net", "random (seed 7), python:my.code:net(width=2) sha256:0", "--weights none --seed 7"),
        ("resnet18", "sha256:0 (key 'model')", "--weights WEIGHTS"),
        ("timm:resnet18.a1_in1k", "sha256:0; random (seed 0): fc", "--weights WEIGHTS"),
        ("timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k", ""),
        ("hf:facebook/dinov2-small", "hf:facebook/dinov2-small@0", ""),
        ("checkpoint.pth.tar", "sha256:0 (resnet18)", ""),
        ("python:my.code:net", "python:my.code:net sha256:0", ""),
    ],
)
def test_the_command_of_a_plan_names_the_weights_as_far_as_the_plan_tells(model: str, weights: str, words: str) -> None:
    command = dataclasses.replace(PLAN, model=model, weights=weights).command("my features/")
    begins = f"hookx extract --model {model} {words}".rstrip()
    assert command == f"{begins} --layers conv1,avgpool --out 'my features/' IMAGES"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 5, "memory_format": "channels_last"}, ""),  # A resumed run keeps them.
        ({"precision": "bf16"}, "--precision bf16"),
        ({"layers": PLAN.layers[1:], "images_per_shard": 4096}, "--dtype float16"),
        ({"preprocessing": dataclasses.replace(PLAN.preprocessing, exif="apply")}, "--exif apply"),
        ({"preprocessing": dataclasses.replace(PLAN.preprocessing, decode="fast")}, "--decode fast"),
        ({"preprocessing": dataclasses.replace(PLAN.preprocessing, decode="nvjpeg")}, "--decode nvjpeg"),
        ({"preprocessing": dataclasses.replace(PLAN.preprocessing, custom="its own")}, ""),
    ],
)
def test_the_command_of_a_plan_says_what_is_not_the_default(change: dict[str, Any], words: str) -> None:
    plan = dataclasses.replace(PLAN, **change)
    options = plan.command("out").partition("avgpool")[2].removesuffix("--out out IMAGES")
    assert options.strip() == words


@given(st.integers(1, 2**31), st.integers(1, 2**32), st.integers(1, 65_536))
@example(2**20, 2**31, 1000)
def test_the_command_of_a_plan_cuts_the_images_as_the_plan_does(
    values_per_image: int, max_bytes: int, max_images: int
) -> None:
    layer = LayerSpec("conv1", (values_per_image,), "uint8")
    cut = images_per_shard(layer.bytes_per_image, max_bytes, max_images)
    command = dataclasses.replace(PLAN, layers=(layer,), images_per_shard=cut).command("out").split()
    asked = {"--max-shard-size": "512MiB", "--shard-images": "4096", **dict(pairwise(command))}
    again = images_per_shard(
        layer.bytes_per_image, parse_bytes(asked["--max-shard-size"]), int(asked["--shard-images"])
    )
    assert again == cut


def test_the_length_of_a_shard_is_its_number_of_images() -> None:
    assert len(Shard(3, 10, 15)) == sum(map(len, Shard(3, 10, 15).batches(2))) == 5


# --- sizes ---------------------------------------------------------------------------------------------------------

UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)}}
UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)}


@given(st.integers(1, 10**30), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str, space: str) -> None:
    assert parse_bytes(f"{number}{space}{unit}") == number * UNITS[unit]


def test_a_size_may_have_a_fraction_and_leave_out_the_b() -> None:
    assert parse_bytes("1.5GiB") == parse_bytes("1536 MiB") == parse_bytes("1536Mi")
    assert parse_bytes("0.1G") == parse_bytes("100M") == parse_bytes(" 100 MB ")


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e9", "0", "0.0GB", "0.4", "5iB", "5 XB", "1,5GB", "1 2", "nan"])
def test_a_text_that_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; write it as in 512MiB, 2GB or 4096"):
        parse_bytes(text)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(-60, 60))
def test_shards_are_indexed_like_a_list_of_them(images: int, per_shard: int, index: int) -> None:
    shards = dataclasses.replace(PLAN, image_count=images, images_per_shard=per_shard).shards
    listed = list(shards)
    assert [shard.number for shard in listed] == list(range(len(shards)))
    assert shards[index:] == listed[index:] and shards[:index:2] == listed[:index:2]
    if -len(listed) <= index < len(listed):
        assert shards[index] == listed[index]
    else:
        with pytest.raises(IndexError):
            shards[index]


# --- the identity of weights ---------------------------------------------------------------------------------------

SHA = "0" * 64
FILE = WeightsIdentity.of_file(SHA, "state_dict", "without module.")
# In the words of plans that were written before: a change of any would keep their runs from being resumed.
IDENTITIES = {
    "random (seed 3)": WeightsIdentity.of_seed(3),
    "random (seed 0) (global_pool=max, num_classes=3)": WeightsIdentity.of_seed(0).with_arguments(
        {"num_classes": 3, "global_pool": "max"}
    ),
    f"sha256:{SHA}": WeightsIdentity.of_file(SHA, "", ""),
    f"sha256:{SHA} (state_dict; without module.)": FILE,
    f"sha256:{SHA} (state_dict; without module.); random (seed 7): fc, conv1": FILE.lacking(
        ["fc", "conv1"], str(WeightsIdentity.of_seed(7))
    ),
    f"python:nets:make(width=6) sha256:{SHA}": WeightsIdentity.of_factory("python:nets:make(width=6)", SHA),
    f"random (seed 0), python:nets:make sha256:{SHA}": WeightsIdentity.of_factory("python:nets:make", SHA, 0),
    f"python:nets:make sha256:{SHA} (state_dict; without module.)": FILE.in_factory_model("python:nets:make"),
    f"net.py:make sha256:{SHA}; as the factory made them: fc (sha256:{SHA})": WeightsIdentity.of_file(SHA)
    .lacking(["fc"], "as the factory made them")
    .in_factory_model("net.py:make", SHA),
}


@pytest.mark.parametrize("text", IDENTITIES)
def test_the_identity_of_weights_is_printed_as_it_always_was(text: str) -> None:
    assert str(IDENTITIES[text]) == text


@pytest.mark.parametrize(
    ("text", "name", "seed", "is_file"),
    [
        ("ResNet18_Weights.IMAGENET1K_V1", "IMAGENET1K_V1", None, False),
        ("ResNet18_QuantizedWeights.IMAGENET1K_FBGEMM_V1", "IMAGENET1K_FBGEMM_V1", None, False),
        ("random (seed 3)", "", 3, False),
        ("random (seed -1)", "", -1, False),
        (f"random (seed {2**64 - 1}), python:nets:make sha256:{SHA}", "", 2**64 - 1, False),
        (f"sha256:{SHA} (state_dict)", "", None, True),
        (f"sha256:{SHA}; random (seed 3): fc", "", None, True),
        ("timm:resnet18.a1_in1k", "", None, False),
        # What only a crafted plan holds.
        (f"random (seed {2**64})", "", None, False),
        (f"random (seed {'9' * 5000})", "", None, False),
        ("ResNet18_Weights.IMAGENET1K_V1; rm", "", None, False),
    ],
)
def test_the_identity_of_weights_tells_how_they_are_loaded_again(
    text: str, name: str, seed: int | None, is_file: bool
) -> None:
    identity = WeightsIdentity(text)
    assert (identity.published_name, identity.seed, identity.is_file) == (name, seed, is_file)


@given(st.text())
def test_no_text_is_too_odd_to_be_an_identity(text: str) -> None:
    identity = WeightsIdentity(text)
    assert str(identity) == text and isinstance(identity.published_name, str) and identity.seed is None
