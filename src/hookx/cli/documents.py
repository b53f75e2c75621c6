"""The JSON documents that commands print with --json, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hookx.layers.address import Address
from hookx.layers.select import Layer
from hookx.plan import LayerSpec

if TYPE_CHECKING:  # They import torch.
    from hookx.check.inspect import Inspection
    from hookx.check.recompute import Recomputation
    from hookx.check.verify import Problem, Verification
    from hookx.pictures.gallery import Gallery
    from hookx.run.prepare import Job
    from hookx.run.summary import Summary

# The fields of a summary's document, in order.
_SUMMARY = (
    *("out", "model", "weights", "notes", "preprocessing", "layers", "images", "failures", "shards", "shards_computed"),
    *("images_computed", "bytes", "device", "precision", "memory_format", "batch_size", "workers", "rotations_ignored"),
    *("counts", "seconds_total", "seconds_reading", "seconds_model", "seconds_copying", "seconds_writing"),
    *("busy", "bound_by", "files"),
)
# A model's name -> the names of its weights, and whether each is in the cache.
ModelWeights = Mapping[str, Sequence[tuple[str, bool]]]


def describe_summary(summary: Summary) -> dict[str, Any]:
    """Describe what a run did."""
    document: dict[str, Any] = {name: getattr(summary, name) for name in _SUMMARY}
    document["preprocessing"] = plain(summary.preprocessing)
    document["layers"] = [_describe_layer(layer, summary.images) for layer in summary.layers]
    return document


def describe_job(job: Job) -> dict[str, Any]:
    """Describe what a run would do."""
    plan = job.plan
    return {
        "dry_run": True,
        "out": str(job.out),
        "model": plan.model,
        "weights": plan.weights,
        "preprocessing": plain(plan.preprocessing),
        "layers": [_describe_layer(layer, plan.image_count) for layer in plan.layers],
        "images": plan.image_count,
        "shards": len(plan.shards),
        "shards_pending": len(job.pending),
        "images_per_shard": plan.images_per_shard,
        "bytes_to_write": job.bytes_to_write,
        "bytes_free": job.bytes_free,
        "device": str(job.device),
        "precision": plan.precision,
        "memory_format": plan.memory_format,
        "batch_size": plan.batch_size,
        "workers": job.workers,
        "fingerprint": plan.fingerprint,
    }


def describe_verification(verification: Verification, recomputation: Recomputation | None = None) -> dict[str, Any]:
    """Describe what is wrong and right with a run, and the rows that were computed again, if any were."""
    document = plain(verification)
    document["problems"] = [plain(problem) for problem in problems_of(verification, recomputation)]
    document["ok"] = not document["problems"]
    if recomputation is not None:
        document["recomputed"] = {
            "device": recomputation.device,
            "rows": [plain(row) for row in recomputation.rows],
            "rows_with_same_bits": recomputation.rows_with_same_bits,
        }
    return document


def describe_inspection(inspection: Inspection) -> dict[str, Any]:
    """Describe what a run holds."""
    document = plain(inspection)
    document["plan"] = {
        "fingerprint": inspection.plan.fingerprint,
        **inspection.plan.identity,
        "batch_size": inspection.plan.batch_size,
    }
    document["shards"] = len(inspection.plan.shards)
    document["is_finished"] = inspection.is_finished
    return document


def describe_gallery(gallery: Gallery) -> dict[str, Any]:
    """Describe the pictures that were drawn; an overview has no layer."""
    document = plain(gallery)
    for picture in document["pictures"]:
        picture.update({name: picture[name] or None for name in ("image", "model", "layer")})
    return document


def describe_layers(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Describe a model's layers; in a shape, null stands for the batch."""
    return [
        {
            "path": str(Address(layer.path)),
            "class": layer.class_name,
            "parameters": layer.parameters,
            "calls": len(layer.calls),
            "never_called_because": layer.never_called_because or None,
            "same_as": layer.same_as or None,
            "outputs": [
                {
                    "address": str(address),
                    "shape": _shape_with_batch(tensor),
                    "dtype": tensor.dtype,
                    "constant": tensor.is_constant,
                    "problem": tensor.problem or None,
                }
                for address, tensor in layer.addresses().items()
            ],
        }
        for layer in layers
    ]


def describe_models(kinds: Mapping[str, str], weights: ModelWeights) -> dict[str, Any]:
    """Describe models, by name."""
    return {
        name: {"kind": kind, "weights": [{"name": weight, "cached": cached} for weight, cached in weights[name]]}
        for name, kind in kinds.items()
    }


def _shape_with_batch(tensor: Any) -> list[int | None]:
    shape: list[int | None] = list(tensor.shape)
    if tensor.batch_dim is not None:
        shape.insert(tensor.batch_dim, None)
    return shape


def _describe_layer(layer: LayerSpec, images: int) -> dict[str, Any]:
    return {
        "address": layer.address,
        "shape": [images, *layer.shape],
        "dtype": layer.dtype,
        "bytes": images * layer.bytes_per_image,
    }


def plain(record: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON values."""
    return dataclasses.asdict(record)


def problems_of(verification: Verification, recomputation: Recomputation | None) -> list[Problem]:
    """Return the problems that a verification found, then those of a recomputation."""
    return [*verification.problems, *(recomputation.problems if recomputation is not None else ())]
