"""Files of weights -> state dicts -> modules, every tensor of which must fit. No code in a file runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import ModelError
from hookx.models.loaded import one_line

_SUFFIXES = (".safetensors", ".pt", ".pth")


def is_weights_file(weights: str) -> bool:
    return weights.lower().endswith(_SUFFIXES) or os.sep in weights or Path(weights).is_file()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no weights file '{path}'")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Any bytes can stand in a file; each reader has its own exceptions for them.
        refused = "Weights only load failed" in str(error)
        problem = "holds more than tensors, and reading it could run code" if refused else one_line(error)
        raise ModelError(
            f"cannot read weights from '{path}': {problem}",
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt')",
        ) from None
    if not (
        isinstance(state, dict)
        and state
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        what = f"keys: {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise ModelError(
            f"'{path}' is not a plain state dict (name -> tensor), but {what}",
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt')",
        )
    return state


def load_state_dict(module: nn.Module, state: Mapping[str, Tensor], ref: str, file: str) -> None:
    """Load a state dict of which every tensor must fit."""
    own = module.state_dict()
    # Batch norm's step counter came with torch 0.4.1 and does not enter an eval-mode forward pass.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or misshapen:
        raise ModelError(
            f"'{file}' does not fit {ref}",
            *(
                f"{kind} ({len(keys)}): {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                for kind, keys in (("missing", missing), ("unexpected", unexpected), ("other shape", misshapen))
                if keys
            ),
        )
    own.update(state)  # It knows the versions of its modules, which a plain dict does not; MNASNet asks for them.
    module.load_state_dict(own)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
