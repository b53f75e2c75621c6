"""Fresh Python processes that can import what the tests import."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def environment_for(test_file: str | Path, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that can import `kit` and, by its name, the test file."""
    path = os.pathsep.join([*sys.path, str(Path(test_file).parent)])
    return {**os.environ, **(variables or {}), "PYTHONPATH": path}
