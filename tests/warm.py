"""The command in processes of its own that need not import torch first: they are forked from one that has."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "hookx.cli", "warm"])


def run(line: str, folder: Path, output: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run a line such as 'hookx --help' in a folder, with everything it prints in a file; return its exit code."""
    environment = {**os.environ, "COLUMNS": "110", **(environment or {})}
    process = _CONTEXT.Process(target=_run, args=(shlex.split(line), folder, output, environment))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], folder: Path, output: Path, environment: dict[str, str]) -> None:
    assert arguments[0] == "hookx"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(printed, stream)
    from hookx.cli import main

    main()
