"""API keys: random, each with a scope, kept as hashes in the catalog of the store.

The catalog was preferred to a file in the store's folder: servers on several machines share it, and a revoked key ends
everywhere at once.

A key has 256 random bits, so nobody guesses one from its SHA-256. bcrypt and its like slow down the guessing of
passwords that people choose; here they would only add a tenth of a second to each request, and let anyone keep the
processors busy with wrong keys.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from kv_memory.config import check_name
from kv_memory.errors import ConfigError
from kv_memory.store import Store
from kv_memory.store.sql.schema import OptionRow, utc_now

_ROW = "api_key:"  # of OptionRow
_MARK = "kvm"  # lets scanners for leaked secrets recognise a key
_NOTHING = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key without its secret.

    Attributes:
        id: Public part of the key.
        name: Name for people: its owner, or its use.
        collections: Names of the collections it may be used on; empty for all.
        write: Whether it may add and remove documents.
        created_at: Time of creation, UTC.
        revoked_at: Time of revocation, UTC; None if it is valid.
    """

    id: str
    name: str
    collections: tuple[str, ...]
    write: bool
    created_at: datetime
    revoked_at: datetime | None = None


class Keys:
    """The keys of a store.

    Args:
        store: Any collection of the store.
    """

    def __init__(self, store: Store) -> None:
        self._catalog = store.catalog

    def create(self, name: str, *, collections: Sequence[str] = (), write: bool = False) -> tuple[ApiKey, str]:
        """Create a key; the second value is the key itself, which is not stored.

        Raises:
            ConfigError: `name` or the name of a collection is not valid.
        """
        check_name(name, where="name", most=100)
        for collection in collections:
            check_name(collection, where="collection", most=255)
        id_ = secrets.token_hex(4)
        key = f"{_MARK}_{id_}_{secrets.token_urlsafe(32)}"
        value: dict[str, Any] = {"name": name, "collections": sorted(set(collections)), "write": write}
        value |= {"sha256": _hash(key), "created_at": utc_now().isoformat(), "revoked_at": None}
        with self._catalog.write() as session:
            session.add(OptionRow(key=_ROW + id_, value=value))
        return _key(id_, value), key

    def list(self) -> list[ApiKey]:
        """All keys, revoked ones included, in the order of their creation."""
        with self._catalog.read() as session:
            rows = session.scalars(select(OptionRow).where(OptionRow.key.startswith(_ROW))).all()
        return sorted((_key(row.key.removeprefix(_ROW), row.value) for row in rows), key=lambda key: key.created_at)

    def revoke(self, id: str) -> ApiKey:
        """Make a key invalid; it stays in the list.

        Raises:
            ConfigError: There is no such key.
        """
        with self._catalog.write() as session:
            row = session.get(OptionRow, _ROW + id)
            if row is None:
                raise ConfigError(f"no key {id!r}", where="ID", next_step="List the ids with `kv-memory keys list`.")
            row.value = {**row.value, "revoked_at": row.value["revoked_at"] or utc_now().isoformat()}
            return _key(id, row.value)

    def find(self, key: str) -> ApiKey | None:
        """The valid key with this secret; None if no valid key has it."""
        mark, _, rest = key.partition("_")
        id_ = rest.partition("_")[0]
        # Compared as hashes of fixed length, in constant time, and also if there is no such id.
        value: dict[str, Any] = {}
        if mark == _MARK and id_.isascii() and id_.isalnum():
            with self._catalog.read() as session:
                row = session.get(OptionRow, _ROW + id_)
                value = {} if row is None else row.value
        same = hmac.compare_digest(_hash(key), value.get("sha256", _NOTHING))
        return _key(id_, value) if same and value and value["revoked_at"] is None else None

    def any(self) -> bool:
        """Whether a key was ever created. Revoking the last one does not open the server to everybody."""
        with self._catalog.read() as session:
            return bool(session.scalar(select(func.count()).where(OptionRow.key.startswith(_ROW))))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _key(id_: str, value: dict[str, Any]) -> ApiKey:
    times = {name: value[name] and datetime.fromisoformat(value[name]) for name in ("created_at", "revoked_at")}
    return ApiKey(id=id_, name=value["name"], collections=tuple(value["collections"]), write=value["write"], **times)
