"""Leave the tests of clusters out, unless a run asks for them by `-m cluster`: they need Slurm, Ray and minutes."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "cluster" else True
