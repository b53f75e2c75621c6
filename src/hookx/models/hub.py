"""Files of the Hugging Face hub, from its cache or downloaded.

A cached file is used without asking the hub for a newer one, so that a run can finish without a network and with the
weights that it began with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hookx.errors import ModelError, one_line

log = logging.getLogger("hookx")

_TIMEOUT_SECONDS = 15.0
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def cached_file(repository: str, names: Sequence[str], revision: str | None = None) -> Path | None:
    """Return the first of a repository's files that is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(repository, name, revision=revision) for name in names)
    return next((Path(found) for found in cached if isinstance(found, str)), None)


def fetch_file(
    what: str, repository: str, names: Sequence[str], revision: str | None, *next_steps: str, required: bool = True
) -> Path | None:
    """Return the first of some files that a repository has; download it unless it is in the cache.

    Args:
        names: preferred files first.
        revision: a branch, a tag or a commit; None for the main branch.
        required: raise an error if the repository has none of the files; otherwise return None.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        if found := cached_file(repository, names, revision):
            return found
        # The cache also records which files a repository does not have.
        if not required and all(try_to_load_from_cache(repository, name, revision=revision) for name in names):
            return None
        # Ask once: downloading right away would try each file six times, for half a minute, before giving up.
        info = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_SECONDS)
        there = {sibling.rfilename for sibling in info.siblings or ()}
        if name := next((name for name in names if name in there), None):
            log.info("downloading %s of %s", name, repository)
            return Path(hf_hub_download(repository, name, revision=revision))
    except Exception as error:  # Names, permissions, sockets, proxies, disks: each has its own exceptions.
        missing = f"weights for {what} are" if names[0] in WEIGHTS else f"{names[0]} for {what} is"
        unknown = [f"{missing} not in the cache and could not be downloaded: {one_line(error)}"]
        known = {
            "HFValidationError": [f"'{repository}' is not a valid repository name on the Hugging Face hub"],
            "RepositoryNotFoundError": [
                f"{what}: the Hugging Face hub has no repository '{repository}', or it is private",
                "if it is yours: hf auth login",
            ],
            "RevisionNotFoundError": [f"{what}: the repository {repository} has no revision '{revision}'"],
            "GatedRepoError": [
                f"{what}: its authors ask you to accept their terms first",
                f"on the page of {repository}; then: hf auth login",
            ],
        }
        raise ModelError(*known.get(type(error).__name__, unknown), *next_steps) from None
    if required:
        raise ModelError(f"{what}: the repository {repository} has none of the files {', '.join(names)}", *next_steps)
    return None


def fetch_shards(what: str, repository: str, file: Path, revision: str | None, *next_steps: str) -> Path:
    """Return a weights file; if it is an index, fetch the shards that it names first."""
    if file.name.endswith(".index.json"):
        for name in sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())):
            fetch_file(what, repository, [name], revision, *next_steps)
    return file


def commit_of(file: Path) -> str:
    """Return the commit that a cached file belongs to, which is the name of its folder."""
    return file.parts[file.parts.index("snapshots") + 1]


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Make every `torch.load` in a library read only tensors, so that no pickle runs code."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)
