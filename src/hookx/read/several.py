"""Several runs read as one, as if one run had computed all of their images."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hookx.errors import StoreError, UsageError
from hookx.keys import Keys, images_sha256
from hookx.plan import OF_THE_IMAGES, Plan
from hookx.read.activations import Positions, RowIndex
from hookx.read.columns import Columns
from hookx.store.columns import Kind

if TYPE_CHECKING:
    from hookx.read.features import Features

_DTYPES = {"int": np.int64, "float": np.float64, "bool": np.bool_, "text": np.object_}


def merge(runs: Sequence[Features]) -> tuple[Plan, RowIndex, Columns]:
    """Order the rows of runs by their keys; `StoreError` if they differ in more than their images, or share one."""
    if not runs:
        raise UsageError("no run is named", "give at least one, as in hookx.open(['monday/', 'tuesday/'])")
    for other in runs[1:]:
        _check_alike(runs[0], other)
    keys, numbers = list[bytes](), list[int]()
    for key, number in heapq.merge(*(_numbered(run, number) for number, run in enumerate(runs))):
        if keys and keys[-1] == key:
            raise StoreError(
                f"{runs[numbers[-1]].path}/ and {runs[number].path}/ both hold '{key.decode(errors='replace')}'",
                "only runs of different images are read as one; hookx.join aligns those of the same",
            )
        keys.append(key)
        numbers.append(number)
    packed, run_of = Keys.pack(keys), np.array(numbers, np.int64)
    place_of = np.empty(len(packed), np.int64)  # the row of each, in its own run
    chosen = np.empty(len(packed), np.int64)  # where it is, if the files of all runs follow one another
    before = 0
    for number, run in enumerate(runs):
        own = np.arange(len(run.keys))
        place_of[run_of == number] = own
        chosen[run_of == number] = before + run.rows.in_files(own)
        before += int(run.rows.first_rows[-1])
    counts = np.concatenate([np.diff(run.rows.first_rows) for run in runs])
    failures = {key: reason for run in runs for key, reason in run.failures.items() if key not in packed}
    plan = replace(
        runs[0].plan,
        image_count=len(packed) + len(failures),
        images_sha256=images_sha256(packed, [0] * len(packed)),
    )
    rows = RowIndex(
        path=runs[0].path,
        plan=plan,
        keys=packed,
        failures=failures,
        files=[file for run in runs for file in run.rows.files],
        first_rows=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        chosen=chosen,
        fingerprints=[run.plan.fingerprint for run in runs for _ in run.rows.files],
    )
    return plan, rows, ColumnsOfSeveral([run.columns for run in runs], run_of, place_of)


def _numbered(run: Features, number: int) -> Iterator[tuple[bytes, int]]:
    return ((run.keys.encoded(position), number) for position in range(len(run.keys)))


def _check_alike(first: Features, other: Features) -> None:
    if differences := first.plan.differences(other.plan, but=OF_THE_IMAGES):
        raise StoreError(
            f"{first.path}/ and {other.path}/ cannot be read as one: {'; '.join(differences)}",
            "hookx.join aligns the rows of different runs of the same images",
        )


class ColumnsOfSeveral(Columns):
    """The columns of several runs; one that a run does not have is lacking in its rows."""

    def __init__(self, runs: Sequence[Columns], run_of: Positions, place_of: Positions) -> None:
        self._runs, self._run_of, self._place_of = runs, run_of, place_of

    @property
    def kinds(self) -> Mapping[str, Kind]:
        kinds: dict[str, Kind] = {}
        for run in self._runs:
            for name, kind in run.kinds.items():
                known = kinds.setdefault(name, kind)
                if known != kind:
                    kinds[name] = "float" if {known, kind} == {"int", "float"} else "text"
        return kinds

    def read(self, name: str, rows: slice = slice(None)) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        self.check(name)
        kind, run_of = self.kinds[name], self._run_of[rows]
        values: NDArray[Any] = np.zeros(len(run_of), _DTYPES[kind])
        present = np.zeros(len(run_of), bool)
        for number, run in enumerate(self._runs):
            mine = run_of == number
            if name not in run or not mine.any():
                continue
            places = self._place_of[rows][mine]
            found, has_value = run.read(name, slice(int(places[0]), int(places[-1]) + 1))
            if kind == "text" and run.kinds[name] != "text":
                found = np.array(list(map(str, found.tolist())), object)
            values[mine] = found
            present[mine] = True if has_value is None else has_value
        if kind == "text":
            values[~present] = ""
        return values, None if present.all() else present
