"""A run as a table of pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hookx.errors import UsageError
from hookx.read.activations import Activations
from hookx.read.columns import as_objects
from hookx.store.columns import free_names

if TYPE_CHECKING:
    import pandas

    from hookx.read.features import Features

_NULLABLE = {"int": "Int64", "bool": "boolean"}  # the types of pandas that can lack values


def to_pandas(features: Features, addresses: Sequence[str]) -> pandas.DataFrame:
    """See `Features.to_pandas`."""
    try:
        import pandas as pd
    except ImportError:
        raise UsageError(
            "to_pandas needs pandas, which is not installed",
            "install it as an extra of hookx: pip install 'hookx-vision[pandas]'",
        ) from None
    columns: dict[str, Any] = {}
    for name, free in zip(features.columns, free_names(features.columns, addresses), strict=True):
        values, present = features.columns.read(name)
        nullable = None if present is None else _NULLABLE.get(features.columns.kinds[name])
        objects = as_objects(values, present)
        columns[free] = pd.array(objects, nullable) if nullable else objects
    for address in addresses:
        columns[address] = _arrays(features, address)
    return pd.DataFrame(columns, index=pd.Index(list(features.keys), name="key"), copy=False)


def _arrays(features: Mapping[str, Activations], address: str) -> list[Any]:
    """Return the activation of each row as an array; all of them share one block of memory."""
    return list(features[address].numpy())
