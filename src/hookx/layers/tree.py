"""The records that a probe fills in: a model's layers, their calls, and the tensors of each call."""

from __future__ import annotations

from dataclasses import dataclass

from hookx.layers.address import Address


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a module returned or was given."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]  # for one image, without the batch dimension; for a constant, the whole shape
    dtype: str
    batch_dim: int | None = 0  # the position of the batch dimension; None for a constant
    rows_per_image: int = 1  # above 1, dimension 0 holds this many rows for each image, image after image
    problem: str = ""  # why its rows cannot be assigned to images

    @property
    def is_constant(self) -> bool:
        return self.batch_dim is None and not self.problem

    @property
    def shape_text(self) -> str:
        """The shape as the layer returns it, with N for the batch: 'N,64,56,56', '49,N,768', '64N,49,96'."""
        lengths = [str(length) for length in self.shape]
        if self.rows_per_image > 1:
            lengths[0] += "N"
        elif self.batch_dim is not None:
            lengths.insert(self.batch_dim, "N")
        return ",".join(lengths) or "scalar"


@dataclass(frozen=True)
class Call:
    """One call of a module during a forward pass."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Layer:
    """A module and its calls in a forward pass."""

    path: str
    class_name: str
    parameters: int
    calls: tuple[Call, ...] = ()
    never_called_because: str = ""
    same_as: str = ""  # the module's first path, if it is registered under another one too

    def addresses(self, *, of_inputs: bool = False) -> dict[Address, TensorInfo]:
        """Return the canonical address of every tensor that the module returns, or is given."""
        return {
            Address(self.path, number if len(self.calls) > 1 else None, of_inputs, tensor.parts): tensor
            for number, call in enumerate(self.calls)
            for tensor in (call.inputs if of_inputs else call.outputs)
        }


@dataclass(frozen=True)
class Target:
    """An activation to capture: its address, and the tensor before its reduction."""

    address: Address
    tensor: TensorInfo
    calls: int = 1  # how often a forward pass calls the module

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that is stored for one image."""
        reduction = self.address.reduction
        return reduction.shape(self.tensor.shape) if reduction else self.tensor.shape
