"""What a file holds that its model has no place for: what a user leaves out, and which of several networks is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hookx.errors import ModelError, closest
from hookx.layers.select import Selector

OPTION = "--ignore-unexpected"

# What self-supervised training keeps several of, first what is used afterwards: the average of a teacher, the encoder
# of the queries; last what only the training needs.
_BY_USE = (
    r"teacher|ema|averaged|swa",
    r"encoder_q|q|query|base_encoder|online",
    r"student|encoder_k|k|key|momentum|target",
)
_NO_MODEL = r"loss|losses|criterion|queue|bank|optim|optimizer|scheduler|scaler|metrics?|center"


def _has_word(name: str, words: str) -> bool:
    return re.search(rf"(?:^|[._])(?:{words})(?:[._]|$)", name) is not None


def is_no_model(name: str) -> bool:
    """Return whether tensors under a name belong to a loss, a queue or an optimizer.

    Example:
        >>> [is_no_model(name) for name in ("dino_loss", "module.queue", "teacher", "closs")]
        [True, True, False, False]
    """
    return _has_word(name, _NO_MODEL)


def _rank(name: str) -> int:
    first, second, last = (_has_word(name, words) for words in _BY_USE)
    return 0 if first else 1 if second else 3 if last else 2


def order_by_use(names: Iterable[str]) -> list[str]:
    """Order networks of one file, first those that are used after training.

    Example:
        >>> order_by_use(["student", "backbone", "module.encoder_k.", "module.encoder_q.", "teacher"])
        ['teacher', 'module.encoder_q.', 'backbone', 'student', 'module.encoder_k.']
    """
    return sorted(names, key=_rank)


def settle(names: Sequence[str], patterns: Sequence[str], entry: str = "") -> str | None:
    """Return which of several networks to take if the user leaves out the others, or all of them; otherwise None.

    If patterns match all of them, it is the one that is used after training, if the names tell.

    Example:
        >>> [settle(["student", "teacher"], [pattern]) for pattern in ("teacher", "*", "neck")]
        ['student', 'teacher', None]
    """
    if not patterns:
        return None
    aliases = {alias: name for name in names for alias in (name.rstrip("."), f"{entry}.{name.rstrip('.')}")}
    left_out = {aliases[alias] for pattern in patterns for alias in find_matching(pattern, aliases)}
    left = [name for name in names if name not in left_out]
    if len(left) == 1:
        return left[0]
    first, second = order_by_use(names)[:2]
    return first if not left and _rank(first) < _rank(second) else None


def find_matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the tensors that a glob matches, by their own names or by those of modules that hold them.

    Example:
        >>> sorted(find_matching("neck.*", ["neck.0.weight", "neck.0.bias", "conv.weight"]))
        ['neck.0.bias', 'neck.0.weight']
    """
    above = {name: modules_above(name) for name in names}
    nodes = dict.fromkeys((node for nodes in above.values() for node in nodes), "")
    matched = set(Selector.parse(pattern).paths(nodes)) if pattern else set()
    return {name for name, path in above.items() if matched.intersection(path)}


def modules_above(name: str) -> list[str]:
    """Return the paths of the modules around a tensor, and its own name.

    Example:
        >>> modules_above("layer1.0.weight")
        ['layer1', 'layer1.0', 'layer1.0.weight']
    """
    return [name[:cut] for cut, letter in enumerate(name) if letter == "."] + [name]


def split_patterns(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(piece.strip() for text in texts for piece in text.split(",")))


def ignore(
    patterns: Sequence[str], unexpected: Mapping[str, Sequence[str]], beside: Sequence[str], file: Any
) -> set[str]:
    """Return the unexpected tensors that patterns match.

    Args:
        patterns: the globs of `--ignore-unexpected`.
        unexpected: name of a tensor -> the names that it has in the file, with and without what was unwrapped.
        beside: what was left out before. It needs no pattern; a pattern may match it.
        file: what they are in, for an error.

    Raises:
        ModelError: a pattern matches nothing.
    """
    aliases = {alias: name for name, others in unexpected.items() for alias in (name, *others)}
    ignored: set[str] = set()
    for pattern in patterns:
        matched = {aliases[alias] for alias in find_matching(pattern, aliases)}
        if not matched and not find_matching(pattern, beside):
            known = [*unexpected, *beside]
            what = f"closest: {closest(pattern, known)}" if known else "all of them have a place in the model"
            raise ModelError(f"{OPTION} '{pattern}' matches no unexpected tensor of '{file}'; {what}")
        ignored |= matched
    return ignored


def propose(unexpected: Sequence[str]) -> str:
    """Return the option that leaves tensors out, '' if it would take too many patterns to be read.

    Example:
        >>> propose(["conv.total_ops", "fc.total_ops", "total_ops"])
        "--ignore-unexpected '**.total_ops'"
        >>> propose(["neck.0.weight", "neck.0.bias", "mask_token"])
        '--ignore-unexpected neck,mask_token'
    """
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in unexpected))
    first = list(dict.fromkeys(name.partition(".")[0] for name in unexpected))
    if len(last) < len(first) and len(last) <= _MAX_PROPOSED:
        return f"{OPTION} '{','.join(f'**.{name}' for name in last)}'"
    return f"{OPTION} {','.join(first)}" if len(first) <= _MAX_PROPOSED else ""


_MAX_PROPOSED = 6
