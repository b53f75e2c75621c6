"""What will be computed, its fingerprint, and how it is cut into shards. No torch, no disk."""

from hookx.plan.counts import ValueCounts
from hookx.plan.plan import FORMAT, Plan
from hookx.plan.preprocessing import Preprocessing
from hookx.plan.shards import DTYPES, LayerSpec, Shard, images_per_shard
from hookx.plan.weights import WeightsIdentity

__all__ = [
    "DTYPES",
    "FORMAT",
    "LayerSpec",
    "Plan",
    "Preprocessing",
    "Shard",
    "ValueCounts",
    "WeightsIdentity",
    "images_per_shard",
]
