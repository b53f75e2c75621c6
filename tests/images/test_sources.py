"""Sources of images: the same keys whichever names a file, a part of a list, and nothing that is passed over."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import hookx
from hookx.cli.app import app
from hookx.errors import HookxError, ImageError, UsageError
from hookx.images.listing import Choice, list_images
from hookx.images.sources.kinds import NotTaken, describe_not_taken
from hookx.options import ExtractOptions
from hookx.run.listed import absolute_sources

SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "workers": 0}
FLAGS = ["-m", "resnet18", "-w", "none", "--resize", "32", "--crop", "32", "-j", "0", "-l", "avgpool"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the default --out, features/, from meaning a directory of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: object, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input=given)


def refused(*arguments: object, given: str | None = None, exit_code: int = 1) -> str:
    error = run(*arguments, given=given).exception
    assert isinstance(error, HookxError) and error.exit_code == exit_code
    return str(error)


def error_of(*sources: Path | str, **settings: Any) -> str:
    with pytest.raises(ImageError) as caught:
        list_images(sources, **settings)
    return str(caught.value)


# --- keys ----------------------------------------------------------------------------------------------------------


def test_with_a_root_every_source_gives_a_photograph_the_same_key(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(thumbnails, tmp_path / "data" / "photos")
    monkeypatch.chdir(tmp_path)
    files = sorted(map(str, Path("data/photos").rglob("*.png")))
    expected = [file.removeprefix("data/") for file in files]
    for root in ("data", str(tmp_path / "data"), "data/photos/.."):
        for sources in (["data"], ["data/photos"], files, [f"{tmp_path}/data/photos"], ["./data/../data/photos"]):
            images = list_images(sources, root=root)
            assert list(images.keys) == expected
            assert all(os.path.samefile(str(file), name) for file, name in zip(images.files, files, strict=True))
        for listed in ("\n".join(files), "\n".join(str(tmp_path / file) for file in files)):
            result = run(
                "extract", *FLAGS, "--root", root, "-o", tmp_path / "o", "--dry-run", "--json", "-", given=listed
            )
            assert result.exit_code == 0, result.output
            other = run("extract", *FLAGS, "--root", root, "-o", tmp_path / "o", "--dry-run", "--json", "data/photos")
            fingerprints = [json.loads(one.stdout)["fingerprint"] for one in (result, other)]
            assert fingerprints[0] == fingerprints[1]


def test_an_archive_has_a_key_below_the_root_as_well(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x.png").write_bytes(b"x")
    subprocess.run(["tar", "cf", tmp_path / "a" / "b" / "c.tar", "-C", tmp_path / "a", "x.png"], check=True)
    for source in ("a/b/c.tar", "a/b"):
        assert list(list_images([tmp_path / source], root=tmp_path).keys) == ["a/b/c.tar/x.png"]


def test_a_source_outside_of_the_root_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "inside.png").touch()
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path, tmp_path / "inside.png", "inside.png"):
        assert "is not within --root 'in'" in error_of(source, root="in")
    message = refused("extract", *FLAGS, "--root", "in", "-", given="in/a.png\ninside.png\n")
    assert "inside.png', named by standard input, is not within --root 'in'" in message


def test_a_run_with_a_root_is_computed_again_and_drawn_with_it(thumbnails: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    hookx.extract("resnet18", "conv1", thumbnails / "sky", root=thumbnails, out=out, **SMALL)
    assert all(key.startswith("sky/") for key in hookx.open(out).keys_of_rows)
    assert not hookx.recompute(out, 2, thumbnails / "sky", root=thumbnails).problems
    drawn = ["-o", tmp_path / "maps", "--image", "sky/hubble-0.png", "--images", thumbnails / "sky"]
    assert run("visualize", out, *drawn, "--root", thumbnails).exit_code == 0
    assert "does not contain 'sky/hubble-0.png'" in refused("visualize", out, *drawn)


def test_a_join_of_runs_that_share_no_key_warns(thumbnails: Path, tmp_path: Path) -> None:
    for name, root in (("a", None), ("b", thumbnails)):
        hookx.extract("resnet18", "avgpool", thumbnails / "sky", root=root, out=tmp_path / name, **SMALL)
    one, other = hookx.open(tmp_path / "a"), hookx.open(tmp_path / "b")
    with pytest.warns(UserWarning, match="no key in common: the first are 'hubble-0.png' and 'sky/hubble-0.png'"):
        assert len(hookx.join(one, other).keys) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(hookx.join(one, one).keys) == 3


# --- a part of the images ------------------------------------------------------------------------------------------


def test_a_limit_takes_the_first_images_by_key_and_a_sample_any_by_the_seed(thumbnails: Path) -> None:
    everything = list_images([thumbnails])
    keys = list(everything.keys)
    limited = list_images([thumbnails], choice=Choice(limit=5), packed_at_once=2)
    assert list(limited.keys) == keys[:5] and list(limited.sizes_bytes) == list(everything.sizes_bytes)[:5]
    sampled = list_images([thumbnails], choice=Choice(sample=5))
    assert list(sampled.keys) == sorted(sampled.keys) and set(sampled.keys) < set(keys) and len(sampled) == 5
    assert list(list_images([thumbnails], choice=Choice(sample=5)).keys) == list(sampled.keys)
    assert list(list_images([thumbnails], choice=Choice(sample=5, seed=1)).keys) != list(sampled.keys)
    for choice in (Choice(limit=24), Choice(sample=24), Choice(limit=99), Choice(sample=99)):
        images = list_images([thumbnails], choice=choice)
        assert images.sha256 == everything.sha256 and not images.remarks.chosen


def test_every_image_is_as_likely_in_a_sample(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.png").touch()
    counts = dict.fromkeys([f"{name}.png" for name in "abcdef"], 0)
    for seed in range(600):
        for key in list_images([tmp_path], choice=Choice(sample=2, seed=seed)).keys:
            counts[key] += 1
    assert all(150 < count < 250 for count in counts.values()), counts


def test_a_limited_run_says_so_and_is_another_run(thumbnails: Path, tmp_path: Path) -> None:
    limited = run("extract", *FLAGS, "-o", tmp_path / "o", "--limit", "4", thumbnails)
    assert "4 of 24 images, by --limit 4: a list, and so a run, of its own" in limited.stdout
    assert len(hookx.open(tmp_path / "o").keys_of_rows) == 4
    assert "holds another run" in refused("extract", *FLAGS, "-o", tmp_path / "o", thumbnails)
    again = run("extract", *FLAGS, "-o", tmp_path / "o", "--limit", "4", "--json", thumbnails)
    assert json.loads(again.stdout)["chosen"] == "--limit 4" and json.loads(again.stdout)["images_computed"] == 0
    both = refused("extract", *FLAGS, "-o", tmp_path / "o", "--limit", "4", "--sample", "2", thumbnails, exit_code=2)
    assert both.startswith("--limit and --sample exclude each other")


def test_a_list_beside_a_plan_is_that_of_the_same_choice_and_root() -> None:
    def sources(**settings: Any) -> list[str]:
        return absolute_sources(ExtractOptions(model="m", layers="l", images="images", **settings))

    settings: list[dict[str, Any]] = [{}, {"limit": 3}, {"sample": 3}, {"sample": 3, "seed": 1}, {"root": "images"}]
    assert len({tuple(sources(**one)) for one in settings}) == len(settings)


def test_devices_compute_a_sample_of_an_archive_and_say_what_was_not_taken(thumbnails: Path, tmp_path: Path) -> None:
    shutil.copytree(thumbnails, tmp_path / "photos")
    (tmp_path / "photos" / "a.txt").touch()
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", tmp_path / "photos", "."], check=True)
    options = ["--sample", "7", "--shard-images", "2", "--json", tmp_path / "a.tar"]
    one = json.loads(run("extract", *FLAGS, "-o", tmp_path / "one", *options).stdout)
    two = json.loads(run("extract", *FLAGS, "-o", tmp_path / "two", "--devices", "cpu*2", *options).stdout)
    assert one["not_taken"] == two["not_taken"] == {".txt": 1}
    assert one["chosen"] == two["chosen"] == "--sample 7 --seed 0" and two["images"] == 7
    shards = sorted(file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert len(shards) == 4
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in shards)


# --- nothing passed over -------------------------------------------------------------------------------------------


def test_what_is_not_taken_is_counted_by_suffix(thumbnails: Path, tmp_path: Path) -> None:
    shutil.copytree(thumbnails / "sky", tmp_path / "photos" / "sky")
    for name in ("a.MP4", "b.mp4", "sky/c.mp4", "d.dcm", "sky/e.dcm", "f.txt", "g.txt", ".DS_Store", "README"):
        (tmp_path / "photos" / name).touch()
    sentence = "9 files not taken: 3 .mp4 (take its frames with ffmpeg), 2 .dcm (--loader), 2 .txt, 2 without suffix"
    result = run("extract", *FLAGS, "-o", tmp_path / "o", tmp_path / "photos")
    assert result.exit_code == 0 and sentence in " ".join(result.stdout.split())
    result = run("extract", *FLAGS, "-o", tmp_path / "o", "--dry-run", "--json", tmp_path / "photos")
    assert json.loads(result.stdout)["not_taken"] == {".mp4": 3, ".dcm": 2, ".txt": 2, "without suffix": 2}


def test_a_thousand_suffixes_take_no_more_memory_than_that() -> None:
    not_taken = NotTaken()
    for number in range(5000):
        not_taken.add(b"frame.%d" % number)
    assert len(not_taken.counts) == 1001 and sum(not_taken.counts.values()) == 5000
    assert describe_not_taken(not_taken.counts).startswith("5,000 files not taken: 4,000 others, 1 .0, ")


REFUSED = {
    "clip.MP4": "is a video, and not an image\n  take its frames: mkdir frames && ffmpeg -i {}",
    "paper.pdf": "is a PDF, and not an image\n  take its pages: mkdir pages && pdftoppm -png {}",
    "list.txt": "is a list, and not an image\n  to read the paths that it holds, one per line: hookx extract ... - <",
    "photos.7z": "is an archive that hookx does not read, and not an image\n  unpack it, and name the folder: 7z",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_named_as_an_image_and_cannot_be_one_is_refused_at_once(name: str, tmp_path: Path) -> None:
    file = tmp_path / "my files" / name
    file.parent.mkdir()
    file.touch()
    assert REFUSED[name].replace("{}", shlex.quote(str(file))) in error_of(file)
    assert REFUSED[name].partition("\n")[0] in refused("extract", *FLAGS, "-", given=f"a.png\n{file}\n")


def test_an_archive_that_a_list_names_is_refused_with_the_way_to_read_it(tmp_path: Path) -> None:
    message = refused("extract", *FLAGS, "-", given="a.png\nmore/b.TAR\n")
    assert "names 'more/b.TAR', which is an archive" in message


def test_a_run_that_stored_no_row_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "photos" / name).write_text("not an image")
    for _ in range(2):
        message = refused("extract", *FLAGS, "-o", tmp_path / "o", tmp_path / "photos")
        assert message.startswith(f"no image could be read, so {tmp_path}/o/ holds no row")
    assert refused("finish", tmp_path / "o") == message


@pytest.mark.parametrize("order", range(3))
def test_the_order_of_sources_is_of_no_consequence(order: int, thumbnails: Path, tmp_path: Path) -> None:
    shutil.copytree(thumbnails / "sky", tmp_path / "sky")
    subprocess.run(["tar", "cf", tmp_path / "sky.tar", "-C", thumbnails, "things"], check=True)
    subprocess.run(["tar", "cf", tmp_path / "sky-1.tar", "-C", thumbnails, "people"], check=True)
    sources = [tmp_path / "sky", tmp_path / "sky.tar", tmp_path / "sky-1.tar"]
    expected = list_images(sources)
    random.Random(order).shuffle(sources)
    images = list_images(sources)
    assert images.sha256 == expected.sha256 and list(images.files) == list(expected.files)
    assert list(images.keys) == sorted(images.keys, key=os.fsencode)


def test_a_limit_must_be_at_least_1() -> None:
    with pytest.raises(UsageError, match="--limit must be at least 1, got 0"):
        ExtractOptions(model="m", layers="l", images="images", limit=0)
