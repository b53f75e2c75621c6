"""A selection of the models that are written to deceive, and proof that what runs them cannot be deceived."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kit import warm

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def where_scripts_find_each_other() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.syspath_prepend(SCRIPTS / "adversaries")
        yield


@pytest.fixture(scope="module")
def adversaries() -> Any:
    return import_module("conformance_sweeps.adversaries")


@pytest.fixture(scope="module")
def traps(adversaries: Any) -> dict[str, Any]:
    return dict(adversaries.load_traps())


@pytest.fixture(scope="module")
def pictures(adversaries: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    adversaries.write_pictures(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "Lagging",  # a buffer that follows the mean
        "KeepsMaps",  # what is kept and never used
        "KeepsFirst",  # what the end of a pass would have cleared
        "BatchTopK",  # the largest codes of the batch
        "Ranks",  # integers
        "Numbered",  # the place in the batch
        "ManyOrFew",  # the number of images
        "NumpyNoise",  # a generator that torch does not know
        "FixedNoise",  # noise that is the same every time
        "AssertsFinite",  # a model that refuses NaN itself
        "Punctuation",  # names made of what addresses are made of
        "InASet",  # tensors without a name
        "OtherFloat8UnderAGlob",  # a type that no file can hold
    ],
)
def test_an_adversary_is_stored_rightly_or_refused_for_the_right_reason(
    adversaries: Any, traps: dict[str, Any], pictures: Path, name: str
) -> None:
    checks = adversaries.run_apart(traps[name], pictures)
    assert len(checks) in (2, 3)
    assert [check for check in checks if not check.is_right] == []


def test_there_are_adversaries_of_every_kind_and_each_says_why_it_is_one(traps: dict[str, Any]) -> None:
    kinds = Counter(trap.kind for trap in traps.values())
    assert len(traps) >= 80 and all(trap.why for trap in traps.values())
    assert min(kinds[kind] for kind in ("state", "stopped", "companions", "random", "right", "names", "types")) >= 8
    assert kinds["place"] >= 3 and kinds["number"] >= 3


# --- what runs them cannot be deceived ------------------------------------------------------------------------------


def test_rows_that_are_not_the_model_s_own_are_called_wrong(
    adversaries: Any, traps: dict[str, Any], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extract(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = honest(*arguments, **options)
        return {address: tensor + 1e-2 for address, tensor in rows.items()}

    honest = adversaries.extract
    monkeypatch.setattr(adversaries, "extract", extract)
    checks = adversaries.run_apart(traps["Counts"], pictures)
    assert [check.verdict for check in checks] == [adversaries.STORED_WRONGLY] * 2
    assert checks[0].detail.startswith("'out': row 0 differs by 0.01 of ")


def test_a_refusal_for_another_reason_and_a_model_that_should_be_refused_are_surprises(
    adversaries: Any, traps: dict[str, Any], pictures: Path
) -> None:
    other = replace(traps["Ranks"], batched=replace(traps["Ranks"].batched, reason="no such reason"), before="")
    assert adversaries.run_apart(other, pictures)[0].verdict == adversaries.REFUSED_WRONGLY
    lenient = replace(traps["Counts"], batched=traps["Ranks"].batched, by_hand=False)
    assert adversaries.run_apart(lenient, pictures)[0].verdict == adversaries.NOT_REFUSED


def test_a_trap_that_is_none_has_no_verdict(adversaries: Any, traps: dict[str, Any], pictures: Path) -> None:
    with pytest.raises(adversaries.HarnessError, match="BatchTopK: a plain loop over batches is wrong"):
        adversaries.run_apart(replace(traps["BatchTopK"], batched=traps["Counts"].batched), pictures)
    with pytest.raises(adversaries.HarnessError, match="Counts: a plain loop over batches is right"):
        adversaries.run_apart(replace(traps["Counts"], batched=traps["BatchTopK"].batched), pictures)


def test_a_process_that_ends_or_an_error_that_is_none_of_hookx_s_is_a_crash(
    adversaries: Any, traps: dict[str, Any], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_arguments: Any, **_options: Any) -> None:
        os._exit(11)

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise KeyError("a bug")

    for extract, detail in ((end, "the process ended with 11"), (fail, "KeyError: 'a bug'")):
        monkeypatch.setattr(adversaries, "extract", extract)
        check = adversaries.run_apart(traps["Counts"], pictures)[0]
        assert check.verdict == adversaries.CRASHED and detail in check.detail


def test_the_script_prints_a_table_the_surprises_and_the_totals() -> None:
    command: list[str | Path] = [*warm.python("torch"), SCRIPTS / "conformance.py", "--kind", "adversaries"]
    done = subprocess.run([*command, "Counts", "InASet"], capture_output=True, text=True)
    header, first, second, _, totals = done.stdout.splitlines()
    assert done.returncode == 0 and header.split()[:2] == ["adversary", "kind"]
    assert {first.split()[0], second.split()[0]} == {"Counts", "InASet"}
    assert totals.startswith("hookx: 2 adversaries, 5 runs: 3 stored rightly, 2 refused rightly, 0 stored WRONGLY")
    refused = subprocess.run([*command, "Nobody"], capture_output=True, text=True)
    assert refused.returncode == 2 and "no adversary matches Nobody" in refused.stderr
