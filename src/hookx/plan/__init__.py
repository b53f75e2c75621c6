"""What a run computes: its plan, and what that consists of. No torch, no disk."""

from hookx.plan.counts import KINDS, ValueCounts
from hookx.plan.grey import RangeCounts, RangeUse, are_range_counts
from hookx.plan.plan import DTYPES, FORMAT, OF_THE_IMAGES, LayerSpec, Plan, Shard, Shards, images_per_shard
from hookx.plan.preprocessing import IMAGENET, Preprocessing
from hookx.plan.weights import WeightsIdentity, describe_arguments

__all__ = [
    "DTYPES",
    "FORMAT",
    "IMAGENET",
    "KINDS",
    "OF_THE_IMAGES",
    "LayerSpec",
    "Plan",
    "Preprocessing",
    "RangeCounts",
    "RangeUse",
    "Shard",
    "Shards",
    "ValueCounts",
    "WeightsIdentity",
    "are_range_counts",
    "describe_arguments",
    "images_per_shard",
]
