"""Runs whose processes torchrun starts end in the bytes of one process, with an exit code that ends no other rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kit.files import contents
from kit.whole_runs import extract, hookx, variables

pytestmark = pytest.mark.cluster


def test_ranks_are_parts_and_end_with_0_whatever_they_could_not_read(
    pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "hookx", *extract(pictures, out)],
        env=variables(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"part {rank}/2 of the shards, by RANK and WORLD_SIZE" in done.stderr
    assert contents(out) == contents(at_once), "the last one out writes the index"
    assert subprocess.run(hookx("finish", str(out)), env=variables(), capture_output=True).returncode == 3
