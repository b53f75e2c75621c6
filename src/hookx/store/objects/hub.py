"""Repositories of the Hugging Face Hub, which are listed by its library, and read as files behind https:// are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from hookx.store.objects.bucket import RefusedError
from hookx.store.objects.http import HttpServer, kind_of

_KINDS = {"datasets": "dataset", "spaces": "space"}


class HubRepository(HttpServer):
    """A repository at a revision, as in `datasets/OWNER/NAME@REVISION`; HF_ENDPOINT and HF_TOKEN hold."""

    def __init__(self, name: str) -> None:
        self._name, _, revision = name.partition("@")
        self._revision = unquote(revision) or None
        first, _, rest = self._name.partition("/")
        self._kind = _KINDS.get(first)
        self._repository = rest if self._kind else self._name
        scheme, _, host = HfApi().endpoint.partition("://")
        super().__init__(scheme, host.partition("/")[0])

    def walk(self, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        try:
            tree = HfApi().list_repo_tree(
                self._repository,
                prefix.rstrip("/") or None,
                recursive=True,
                revision=self._revision,
                repo_type=self._kind,
            )
            # The Hub lists in its own order, and from the beginning: what came already is left out.
            is_after = not after
            for entry in tree:
                size_bytes = getattr(entry, "size", None)
                if size_bytes is not None and is_after:
                    yield entry.path, size_bytes
                is_after = is_after or entry.path == after
        except EntryNotFoundError:
            return
        except GatedRepoError:
            raise RefusedError(
                "unknown", f"'{self._repository}' asks for its terms to be accepted first: set HF_TOKEN"
            ) from None
        except RepositoryNotFoundError:
            raise RefusedError(
                "unknown", f"there is no {self._kind or 'model'} '{self._repository}', or it is private: set HF_TOKEN"
            ) from None
        except RevisionNotFoundError:
            raise RefusedError("failed", f"'{self._repository}' has no revision '{self._revision}'") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            raise RefusedError(kind_of(status), f"the Hub answers {status}") from None
        except Exception as error:  # of whichever library it talks through: no connection, or a broken one
            raise RefusedError("busy", f"the Hub does not answer: {type(error).__name__}") from None

    def _url(self, key: str) -> str:
        return hf_hub_url(self._repository, key, repo_type=self._kind, revision=self._revision)

    def _headers(self) -> Mapping[str, str]:
        return {**build_hf_headers(), "Accept-Encoding": "identity"}
