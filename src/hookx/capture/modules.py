"""A model's modules by path."""

from __future__ import annotations

import torch
from torch import nn


def module_classes(model: nn.Module) -> dict[str, str]:
    """Return path -> class name of every module, in order of registration; the model itself is '.'.

    Example:
        >>> module_classes(nn.Sequential(nn.ReLU()))
        {'.': 'Sequential', '0': 'ReLU'}
    """
    return {path: type(module).__name__ for path, module in modules_of(model).items()}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, in order of registration; a module registered twice has both paths."""
    return {path or ".": module for path, module in model.named_modules(remove_duplicate=False)}


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
