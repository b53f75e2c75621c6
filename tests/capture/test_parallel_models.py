"""`Capture` of models on several devices and in several processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from hookx import Capture
from hookx.errors import CaptureError, LayerError, NotCapturedError
from kit import nets
from kit.nets import Features, hooks_on, images


def test_replicas_of_data_parallel_are_refused() -> None:
    net = Features().eval()
    with Capture(net, "conv"):
        replica = net._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        with pytest.raises(CaptureError, match=r"under nn\.DataParallel"):
            replica(images())


def test_data_parallel_on_several_devices_is_refused_before_any_pass() -> None:
    net = nn.DataParallel(nets.InPlace()).eval()
    net.device_ids = [0, 1]  # as on a machine with two devices
    with pytest.raises(LayerError, match=r"nn.DataParallel runs copies of '.' side by side on 2 devices") as caught:
        Capture(net, "module.conv")
    assert "capture and call model.module, or use DistributedDataParallel" in str(caught.value)
    assert hooks_on(net) == 0
    Capture(net, ".").remove()


def in_one_gloo_process(work: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
        try:
            work()
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("hooked_first", [True, False])
def test_a_model_of_distributed_data_parallel_is_captured_with_its_gradients(hooked_first: bool) -> None:
    def work() -> None:
        net, pixels = Features().train(), images()
        raw = net.conv(pixels)
        capture = Capture(net, "conv,.", keep=None, detach=False) if hooked_first else None
        parallel = nn.parallel.DistributedDataParallel(net)
        if capture is None:
            capture = Capture(parallel, "module.conv,module", keep=None, detach=False)
        loss = parallel(pixels).sum()
        path = "conv" if hooked_first else "module.conv"
        assert torch.equal(capture[path], raw) and len(capture.history(path)) == 1
        [gradient] = torch.autograd.grad(loss, capture[path], retain_graph=True)
        assert gradient.shape == raw.shape
        loss.backward()

    in_one_gloo_process(work)


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("way", ["FullyShardedDataParallel", "fully_shard"])
def test_a_sharded_model_is_captured(way: str, hooked_first: bool) -> None:
    def work() -> None:
        net, pixels = Features().eval(), images()
        raw = net.conv(pixels).detach()
        capture = Capture(net, "**", keep=None) if hooked_first else None
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        if way == "fully_shard":
            fully_shard(net, mesh=mesh)
            sharded: nn.Module = net
        else:
            sharded = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
        if capture is None:
            capture = Capture(sharded, "**", keep=None)
        sharded(pixels).sum().backward()
        path = "conv" if hooked_first or way == "fully_shard" else "_fsdp_wrapped_module.conv"
        assert torch.equal(capture[path], raw) and type(capture[path]) is Tensor
        assert len(capture.history(path)) == 1

    in_one_gloo_process(work)


def run_in_another_process(_rank: int, net: nn.Module, pixels: Tensor, answers: Any) -> None:
    answers.put(net(pixels).detach().numpy())


def test_a_captured_model_goes_to_a_process_that_is_spawned() -> None:
    net, pixels = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), images()
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with Capture(net, "**", keep=None) as capture:
        output = net(pixels)
        torch.multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
            run_in_another_process, (net, pixels, answers)
        )
        assert np.array_equal(answers.get(), output.detach().numpy())
        assert len(capture.history("0")) == 1


def test_a_model_of_data_parallel_without_devices_is_captured() -> None:
    net = nn.DataParallel(nets.InPlace()).eval()
    with Capture(net, "module.conv") as capture:
        net(images())
    with pytest.raises(NotCapturedError):
        capture["module.relu"]
    assert torch.equal(capture["module.conv"], net.module.conv(images()))
