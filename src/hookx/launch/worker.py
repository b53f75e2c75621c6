"""The program of a worker: it gets a model ready once, and computes the shards that it is told, a block at a time.

    python -m hookx.launch.worker PARENT

A worker reads messages on standard input and answers on standard output; what a model prints goes to standard error.
Whoever starts it is any launcher's process, on this host or on a node. It never shares a process with another engine:
hookx forks its decoders, which an engine's own processes must not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hookx.errors import THEN_RESUME, DeviceError, HookxError, ImageError, system_failure
from hookx.images.mapped import map_list
from hookx.launch.messages import LogSender, Sender, error_to_json, options_from_json
from hookx.models import borrowed_models
from hookx.plan import Shard
from hookx.run.defaults import device_name
from hookx.run.listed import here
from hookx.run.prepare import Job, prepare_listed
from hookx.run.run import begin, compute
from hookx.run.summary import Timing
from hookx.signals import begin_child
from hookx.store.location import location_of


def main() -> None:
    """Serve the process that started this one, until it closes the pipe."""
    begin_child(int(sys.argv[1]))
    sender = Sender(os.dup(1))
    os.dup2(2, 1)
    messages = map(json.loads, os.fdopen(os.dup(0), "rb"))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with _logged_by(sender):
        try:
            try:
                serve(messages, sender)
            except HookxError:
                raise
            except Exception as error:
                if (failure := system_failure(error)) is None:
                    raise
                raise failure from None
        except HookxError as error:
            sender.send(error=error_to_json(error))
            if isinstance(error, DeviceError):
                os._exit(error.exit_code)  # PyTorch aborts a process that frees memory on a device that has failed.
            sys.exit(error.exit_code)


@contextlib.contextmanager
def _logged_by(sender: Sender) -> Iterator[None]:
    log, handler = logging.getLogger("hookx"), LogSender(sender)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield


def serve(messages: Iterator[dict[str, Any]], sender: Sender) -> None:
    """Prepare the run that the first message describes, wait until it is begun, and compute block after block."""
    first = next(messages)
    os.chdir(first["folder"])
    options = options_from_json(first["options"])
    with here(location_of(first["images"]), options.scratch) as file:
        if file is None:
            raise ImageError(f"the list of images {first['images']} was removed", THEN_RESUME)
        images = map_list(file)
    with borrowed_models():
        job = prepare_listed(options, images, is_helper=True)
        whole = Timing.of(job)
        sender.send(
            ready={
                "plan": job.plan.to_json(),
                "device": device_name(job.device),
                "workers": job.workers,
                "processes": whole.processes,
                "takes_turns": whole.takes_turns,
            }
        )
        first_block = next(messages, None)  # The run has been begun by then.
        if first_block is None:
            return
        with begin(job, "") as (directory, job):
            for message in itertools.chain([first_block], messages):
                block = _block_of(job, message["shards"], message["replaced"])
                timing = Timing.of(block)
                compute(block, directory, timing, sender.progress)
                sender.flush()
                sender.send(done=message["shards"], seconds=timing.seconds)


def _block_of(job: Job, numbers: Sequence[int], replaced: Sequence[int]) -> Job:
    """Return the part of a run that these shards are, with as many processes as have work in them."""
    shards: list[Shard] = [job.plan.shards[number] for number in numbers]
    batches = sum(math.ceil(len(shard) / job.plan.batch_size) for shard in shards)
    return dataclasses.replace(job, pending=shards, replaced=frozenset(replaced), workers=min(job.workers, batches))


if __name__ == "__main__":
    main()
