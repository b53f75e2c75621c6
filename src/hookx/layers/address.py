"""Addresses, the names of activations.

address = path [":" call] ["/in"] ["/" part]... ["@attention"] ["@" step]...
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from hookx.errors import AddressError
from hookx.layers.reductions import Reduction

# These have a meaning in addresses or terminals; within a name they are written %XX.
_RESERVED = re.compile(r"[:/@,%*?\[\]\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_BRACKET = re.compile(r"\[\s*(?:(\d+)|'([^'\]]+)'|\"([^\"\]]+)\")\s*\]")
ATTENTION = "@attention"  # the part of a layer that holds the weights of the attention within it
_EMPTY = "%empty"  # how the name '' is written; a '%' in a name is written %25


def quote(name: str) -> str:
    """Escape the name of a module or a part, so that none of its characters is read as grammar: a/b -> a%2Fb."""
    if not name:
        return _EMPTY
    return _RESERVED.sub(
        lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass")), name
    )


def unquote(text: str) -> str:
    """Undo `quote`."""
    if text == _EMPTY:
        return ""
    try:
        return unquote_to_bytes(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise AddressError(f"'{text}' is not a layer address: its %XX escapes are not UTF-8") from None


def dotted(path_text: str) -> str:
    """Replace brackets by dots: layer3[0] -> layer3.0, [0].conv -> 0.conv."""
    path = _BRACKET.sub(lambda match: "." + (match[1] or match[2] or match[3]), path_text)
    return path.removeprefix(".") if path_text.startswith("[") else path


def _parse_path(path_text: str, whole_text: str) -> str:
    if path_text == ".":
        return path_text
    path = dotted(path_text)
    if not all(path.split(".")) or re.search(r"[\[\]*?,\s]", path):
        raise AddressError(
            f"'{whole_text}' is not a layer address",
            "write the dotted path of the module, as in layer3.0.downsample.1 or layer3[0].downsample[1]",
        )
    return unquote(path)


@dataclass(frozen=True)
class Address:
    """The name of an activation, which is its key in a shard.

    Example:
        >>> address = Address.parse("layer3[0].relu:1/in@mean32@l2")
        >>> address.path, address.call, address.is_input, [step.name for step in address.reduction.steps]
        ('layer3.0.relu', 1, True, ['mean', 'l2'])
        >>> str(address)
        'layer3.0.relu:1/in@mean23@l2'
    """

    path: str
    call: int | None = None
    is_input: bool = False
    parts: tuple[str, ...] = ()
    reduction: Reduction | None = None

    @classmethod
    def parse(cls, text: str, parse_path: Callable[[str, str], str] = _parse_path) -> Address:
        """Parse an address; raise `AddressError` with the reason if the text is not one."""
        body, at, reduction_text = text.partition("@")
        is_attention = reduction_text.partition("@")[0] == "attention"
        if is_attention:
            _, at, reduction_text = reduction_text.partition("@")
        head, *segments = body.split("/")
        path_text, colon, call_text = head.partition(":")
        if colon and not (call_text.isascii() and call_text.isdigit()):
            raise AddressError(
                f"'{text}' is not a layer address: ':' takes the number of a call, as in layer1.0.relu:1"
            )
        is_input = bool(segments) and segments[0] == "in"
        if not all(segments):
            raise AddressError(f"'{text}' is not a layer address: '/' takes 'in' or the name of a part, as in attn/0")
        if is_attention and segments:
            raise AddressError(
                f"'{text}' is not a layer address: @attention belongs to a layer, and not to a part of what it returns",
                f"write {head}{ATTENTION}",
            )
        return cls(
            path=parse_path(path_text, text),
            call=int(call_text) if colon else None,
            is_input=is_input,
            parts=(ATTENTION,) if is_attention else tuple(unquote(segment) for segment in segments[is_input:]),
            reduction=Reduction.parse(reduction_text) if at else None,
        )

    @property
    def is_attention(self) -> bool:
        return self.parts == (ATTENTION,)

    @property
    def place(self) -> str:
        """The tensor's place in what the module returns or is given, as the address writes it: 'out/0'; '' for all."""
        if self.is_attention:
            return ATTENTION
        parts = [quote(part) for part in self.parts]
        if parts and not self.is_input and parts[0] == "in":
            parts[0] = "%69n"  # A part named 'in' must not read as the module's input.
        return "/".join(parts)

    def __str__(self) -> str:
        text = (
            (self.path if self.path == "." else ".".join(quote(name) for name in self.path.split(".")))
            + (f":{self.call}" if self.call is not None else "")
            + ("/in" if self.is_input else "")
            + (("" if self.is_attention else "/") + self.place if self.parts else "")
            + (f"@{self.reduction}" if self.reduction else "")
        )
        # A safetensors file keeps its metadata under this name.
        return text if text != "__metadata__" else "%5F_metadata__"
