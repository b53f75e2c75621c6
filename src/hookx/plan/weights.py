"""The identity of a model's weights: a line of text that tells them from all others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def describe_arguments(arguments: Mapping[str, object]) -> str:
    """Return a model's arguments as an identity shows them: 'act=tanh, width=6'."""
    return ", ".join(f"{name}={value}" for name, value in sorted(arguments.items()))


@dataclass(frozen=True)
class WeightsIdentity:
    """Where weights come from, precisely enough to tell them from all others.

    The text is part of a plan's fingerprint, so its wording never changes. It has one of these forms:

        ResNet18_Weights.IMAGENET1K_V1                           published weights
        random (seed 3)                                          no weights
        sha256:1f0a... (state_dict; without module.)             a file, and what was unwrapped from it
        timm:resnet18.a1_in1k, hf:facebook/dinov2-small@4f2a...  weights that belong to the model's name
        python:nets:make(width=6) sha256:9b1c...                 what a factory returned
        random (seed 3), python:nets:make sha256:9b1c...         the same, seeded on request

    '; random (seed 3): fc' follows if the weights lack modules, and '(img_size=96)' if the model has arguments.

    Example:
        >>> identity = WeightsIdentity.of_file("1f0a", "state_dict", "without module.")
        >>> str(identity), identity.published_name, identity.seed, identity.is_file
        ('sha256:1f0a (state_dict; without module.)', '', None, True)
    """

    text: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of_seed(cls, seed: int) -> WeightsIdentity:
        return cls(f"random (seed {seed})")

    @classmethod
    def of_file(cls, sha256: str, *unwrapped: str) -> WeightsIdentity:
        """Return the identity of a file, and of what was unwrapped to get at the weights."""
        steps = "; ".join(filter(None, unwrapped))
        return cls(f"sha256:{sha256}" + (f" ({steps})" if steps else ""))

    @classmethod
    def of_factory(cls, call: str, state_sha256: str, seed: int | None = None) -> WeightsIdentity:
        """Return the identity of what a factory returned; `call` is its name with its arguments."""
        return cls(("" if seed is None else f"{cls.of_seed(seed)}, ") + f"{call} sha256:{state_sha256}")

    def in_factory_model(self, call: str, state_sha256: str = "") -> WeightsIdentity:
        """Return the identity of these weights in a factory's model; the digest covers what they lack."""
        return WeightsIdentity(f"{call} {self}" + (f" (sha256:{state_sha256})" if state_sha256 else ""))

    def lacking(self, paths: Iterable[str], instead: str) -> WeightsIdentity:
        """Return the identity of these weights without some modules, and what those hold instead."""
        return WeightsIdentity(f"{self}; {instead}: {', '.join(paths)}")

    def with_arguments(self, arguments: Mapping[str, object]) -> WeightsIdentity:
        return WeightsIdentity(f"{self} ({describe_arguments(arguments)})") if arguments else self

    @property
    def published_name(self) -> str:
        """The name that `--weights` takes for published weights; '' for all others."""
        published = re.fullmatch(r"\w+Weights\.(\w+)", self.text)
        return published[1] if published else ""

    @property
    def seed(self) -> int | None:
        """The seed of random weights; None for all others."""
        random = re.match(r"random \(seed (-?\d{1,20})\)", self.text)
        # `torch.manual_seed` accepts no others.
        return int(random[1]) if random and -(2**63) <= int(random[1]) < 2**64 else None

    @property
    def is_file(self) -> bool:
        """Whether a file holds the weights: one of their own, or the model's."""
        return self.text.startswith("sha256:")
