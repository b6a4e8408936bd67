"""Access of a request: its key, and what the key's scope allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from kv_memory.serve.errors import ApiError
from kv_memory.serve.keys import Keys

_bearer = HTTPBearer(auto_error=False, description="A key made by `kv-memory keys create`.")


@dataclass(frozen=True)
class Access:
    """What a request may do.

    Attributes:
        collections: Names of the collections it may use; empty for all.
        write: Whether it may add and remove documents.
    """

    collections: tuple[str, ...] = ()
    write: bool = True

    def may_use(self, collection: str) -> bool:
        """Whether the scope includes a collection."""
        return not self.collections or collection in self.collections

    def check(self, collection: str, *, write: bool = False) -> None:
        """Raise an `ApiError` unless the scope includes this."""
        if not self.may_use(collection):
            # Also for a collection that does not exist: its name is not for this key either.
            raise ApiError(403, f"this key is not for the collection {collection!r}", code="wrong_collection")
        if write and not self.write:
            raise ApiError(403, "this key may only ask questions, not change documents", code="read_only_key")


def access_of(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> Access:
    """The access of a request; a dependency of every endpoint under `/v1` and of `/metrics`."""
    keys: Keys = request.app.state.keys
    if request.app.state.open_to_all and not keys.any():
        return Access()  # whatever key is given: many clients insist on sending one
    if given is None:
        raise ApiError(401, "this server needs a key: `Authorization: Bearer KEY`", code="missing_api_key")
    found = keys.find(given.credentials)
    if found is None:
        raise ApiError(401, "this key is unknown or revoked", code="invalid_api_key")
    return Access(found.collections, found.write)


Reader = Annotated[Access, Depends(access_of)]
