"""A run from its options: in this process, or by the workers that they ask for.

What computes is imported where it is called: a process that hands shards out needs neither models nor torchvision.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from hookx.errors import OtherRunError, UsageError
from hookx.launch import ray
from hookx.launch.append import appending, beside_run, place_of
from hookx.launch.devices import devices_of, workers_each
from hookx.launch.handed_out import HandedOut
from hookx.options import ExtractOptions, takes
from hookx.options.option import options_of
from hookx.run.listed import list_images_of
from hookx.run.summary import Summary

if TYPE_CHECKING:
    from hookx.images.listing import ImageList
    from hookx.plan import Plan
    from hookx.run.prepare import Job


class Begun(Protocol):
    """A run that was checked, and that `run` computes."""

    @property
    def plan(self) -> Plan: ...

    @property
    def image_count(self) -> int: ...

    @property
    def images_done(self) -> int: ...

    def run(self, progress: Callable[[int], None]) -> Summary: ...


class InThisProcess:
    """A run that this process and the workers that it forks compute."""

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, job.plan

    @property
    def image_count(self) -> int:
        return self.job.image_count

    @property
    def images_done(self) -> int:
        return self.job.image_count - sum(map(len, self.job.pending))

    def run(self, progress: Callable[[int], None]) -> Summary:
        from hookx.run.run import run

        return run(self.job, progress)


@contextlib.contextmanager
def begin_run(options: ExtractOptions, images: ImageList | None = None) -> Iterator[Begun]:
    """Check a run, and begin it with as many workers as the options ask for, while the block lasts.

    Args:
        images: those of the run, if they are listed already.
    """
    if options.append:
        with appending(options, begin_run) as begun:
            yield begun
        return
    if options.launcher == "slurm":
        raise UsageError("--launcher slurm submits jobs, and gives back no summary", "use the command: hookx extract")
    if options.launcher is None and (lonely := _of_a_launcher(options)):
        raise UsageError(f"{lonely} needs a launcher", "name it: --launcher slurm or --launcher ray")
    if options.launcher == "ray":
        if options.devices or options.device != "auto":
            raise UsageError("Ray gives a worker its device", "leave out --device and --devices; see --gpus-per-worker")
        with ray.connected(options.ray_address):
            places = ray.places_of(options)
            # A folder that all nodes see: that of the shards.
            with HandedOut(options, places, ray.workers_each(options, places), is_local=False) as handed_out:
                yield handed_out
    elif options.devices:
        devices = devices_of(options)
        with HandedOut(options, devices, workers_each(options, devices), images=images) as handed_out:
            yield handed_out
    else:
        from hookx.models import borrowed_models
        from hookx.run.prepare import prepare_listed

        with borrowed_models():
            yield InThisProcess(prepare_listed(options, list_images_of(options) if images is None else images))


def _of_a_launcher(options: ExtractOptions) -> str:
    """Return the flag of an option that was given and only a launcher takes; '' if there is none."""
    known = options_of(ExtractOptions)
    names = ("tasks", "at_once", "sbatch", "ray_address", "gpus_per_worker")
    return next((known[name].flag for name in names if getattr(options, name) != known[name].default), "")


def check_run(options: ExtractOptions) -> Job:
    """Check a run as `prepare` does, in this process; one of several devices on the first of them."""
    from hookx.run.prepare import prepare

    if options.append:
        place_of(options)
        try:
            return check_run(dataclasses.replace(options, append=False))
        except OtherRunError:
            options = beside_run(options)
    if options.devices is not None:
        devices = devices_of(options)
        workers = workers_each(options, devices)
        options = dataclasses.replace(options, device=devices[0].option, devices=None, workers=workers)
    return prepare(**vars(options))


@takes(ExtractOptions)
def extract(options: ExtractOptions) -> Summary:
    """Store the activations of a folder of images, as `hookx extract` does.

    The same call again finishes an interrupted run, or finds it done.

    Raises:
        HookxError: an argument is wrong, which shows before the first shard; or the disk fails on the way.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     summary = extract("resnet18", "conv1,avgpool", "images", weights="none", out=out)
        >>> summary.images, [layer.shape for layer in summary.layers]
        (8, [(64, 112, 112), (512, 1, 1)])
    """
    with begin_run(options) as begun:
        return begun.run(options.progress)
