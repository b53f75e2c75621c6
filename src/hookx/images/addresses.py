"""URLs of images: where they lead, and how they are shown."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from hookx.errors import ImageError

_URL = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://")
_REPOSITORY = r"(?:(?:datasets|spaces)/)?[^/@]+/[^/@]+(?:@(?:refs/(?:convert|pr)/[^/]+|[^/]+))?"
_HUB = re.compile(f"({_REPOSITORY})(?:/(.*))?", re.DOTALL)
_HTTP = ("http", "https")
SCHEMES = ("s3", "gs", "az", "hf", *_HTTP)


class Address(NamedTuple):
    """Where an object lies: its bucket (or server, or repository), and its key there."""

    scheme: str
    bucket: str
    key: str

    @property
    def can_be_listed(self) -> bool:
        return self.scheme not in _HTTP


@dataclass(frozen=True)
class Remote:
    """A file behind a URL; as a text without what may be a signature."""

    url: str = field(repr=False)

    def __str__(self) -> str:
        return shown_url(self.url)


def is_url(name: bytes) -> bool:
    """Return whether a name is a URL, as no path is: those have no '//' once they are in one spelling.

    Example:
        >>> is_url(b"s3://bucket/photos/"), is_url(b"photos/s3/a.jpg")
        (True, False)
    """
    return b"://" in name and _URL.match(name) is not None


def parse_url(url: str) -> Address:
    """Read a URL; `ImageError` if it is none that hookx can use, which never repeats what may be a password.

    Example:
        >>> parse_url("s3://bucket/photos/a.jpg").key, parse_url("https://host/a.jpg?size=2#top").key
        ('photos/a.jpg', 'a.jpg?size=2')
        >>> parse_url("hf://datasets/owner/name@main/train/a.jpg")
        Address(scheme='hf', bucket='datasets/owner/name@main', key='train/a.jpg')
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ImageError(f"hookx cannot read '{scheme}://'", f"use one of {known}, or download the files")
    if scheme == "hf":
        match = _HUB.fullmatch(rest)
        if match is None:
            raise ImageError(f"'{shown_url(url)}' names no repository", "as in hf://datasets/OWNER/NAME/PATH")
        return Address(scheme, match[1], match[2] or "")
    bucket, _, key = rest.partition("/")
    if scheme in _HTTP:
        bucket, query, _ = bucket.partition("?")
        key = (key if not query else "").partition("#")[0]
    if "@" in bucket:
        raise ImageError(
            f"credentials do not belong into a URL: write {scheme}://{bucket.rpartition('@')[2]}/...",
            "give them as the tools of the store take them, in variables or files",
        )
    if not bucket:
        raise ImageError(f"'{shown_url(url)}' names no place", f"as in {scheme}://HOST/PATH")
    return Address(scheme, bucket, key)


def without_query(url: str) -> str:
    """Return a URL of a web server without what follows the path, which may be a signature.

    Example:
        >>> without_query("https://host/a.jpg?sig=aGVsbG8"), without_query("s3://bucket/what?.jpg")
        ('https://host/a.jpg', 's3://bucket/what?.jpg')
    """
    if not url.lower().startswith(("http://", "https://")):
        return url
    return re.split("[?#]", url, maxsplit=1)[0]


def shown_url(name: str) -> str:
    """Return a name as it may be shown and stored: a URL without its query and its password.

    Example:
        >>> shown_url("https://me:secret@host/a.jpg?sig=aGVsbG8"), shown_url("photos/what?.jpg")
        ('https://***@host/a.jpg', 'photos/what?.jpg')
    """
    if not is_url(os.fsencode(name)):
        return name
    scheme, _, rest = without_query(name).partition("://")
    host, slash, path = rest.partition("/")
    user, at, host = host.rpartition("@") if scheme.lower() != "hf" else ("", "", host)
    return f"{scheme}://{'***' if user else ''}{at}{host}{slash}{path}"


def check_named(url: str) -> None:
    """Raise `ImageError` for a URL that hookx cannot use, or one of a store with options, as no object is named."""
    address = parse_url(url)
    if address.can_be_listed and "?" in url:
        raise ImageError(
            f"credentials and options do not belong into a URL: '{url.partition('?')[0]}?...'",
            "give credentials as the tools of the store take them, in variables or files",
        )


def join_url(folder: str, path: str) -> str:
    """Return the URL of a path that something in a folder names.

    Example:
        >>> join_url("s3://bucket/tables/", "../photos/a.jpg"), join_url("https://host/tables/", "/a#1.jpg")
        ('s3://bucket/photos/a.jpg', 'https://host/a%231.jpg')
    """
    if is_url(os.fsencode(path)):
        return path
    address = parse_url(folder)
    if address.scheme in _HTTP:
        path = path.replace("#", "%23")  # It is the name of a file, which ends where the path does.
    root = folder.removesuffix(address.key)
    key = posixpath.normpath(posixpath.join("/", address.key, path)).lstrip("/")
    return f"{root if root.endswith('/') else root + '/'}{key}"


def folder_and_name(url: str) -> tuple[str, str]:
    """Part a URL without its query behind its last '/'.

    Example:
        >>> folder_and_name("https://host/photos/a.jpg?sig=aGVsbG8")
        ('https://host/photos/', 'a.jpg')
    """
    folder, slash, name = without_query(url).rpartition("/")
    return folder + slash, name
