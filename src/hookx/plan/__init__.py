"""What will be computed, its fingerprint, and how it is cut into shards. No torch, no disk."""

from hookx.plan.plan import FORMAT, IMAGENET, Plan, Preprocessing
from hookx.plan.shards import DTYPES, KINDS, LayerSpec, Shard, ValueCounts, images_per_shard
from hookx.plan.weights import WeightsIdentity

__all__ = [
    "DTYPES",
    "FORMAT",
    "IMAGENET",
    "KINDS",
    "LayerSpec",
    "Plan",
    "Preprocessing",
    "Shard",
    "ValueCounts",
    "WeightsIdentity",
    "images_per_shard",
]
