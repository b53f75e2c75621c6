"""Where a run lies: a folder of the file system, or a prefix in an object store. Both are used in the same way."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeAlias

from hookx.store.objects.path import ObjectPath

Location: TypeAlias = Path | ObjectPath


def location_of(name: str | os.PathLike[str] | ObjectPath) -> Location:
    """Return the place that a path or a URL names; `UsageError` for a URL that hookx cannot use.

    Example:
        >>> location_of("features"), str(location_of("s3://bucket/features/"))
        (PosixPath('features'), 's3://bucket/features')
    """
    if isinstance(name, ObjectPath):
        return name
    text = os.fspath(name)
    return ObjectPath.parse(text) if re.match("[a-z][a-z0-9+.-]*://", text) else Path(text)


def absolute(place: Location) -> Location:
    """Return a place under a name that means the same in another working directory."""
    return place if isinstance(place, ObjectPath) else Path(os.path.abspath(place))
