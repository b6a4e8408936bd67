"""`serve` and `keys`: the HTTP server, and the keys of its clients."""

from __future__ import annotations

from typing import Any

from kv_memory.cli.options import Changes, Place, command
from kv_memory.cli.output import FAILED, Output
from kv_memory.errors import ConfigError
from kv_memory.serve.settings import ServeSettings


@command("model", "adapter")
def serve(
    *, host: str = "127.0.0.1", port: int = 8000, limits: ServeSettings, changes: Changes, place: Place, out: Output
) -> Any:
    """Serve the store over HTTP, in OpenAI's API.

    The base URL for clients is http://127.0.0.1:8000/v1. The model MODEL answers alone, MODEL/COLLECTION from the
    documents of a collection. Without keys, only this machine can reach the server.

    Options:
        host (ADDRESS): Address to listen on; one that other machines can reach needs a key.
        port (PORT): Port to listen on; 0 takes one that is free.
    """
    with out.working("Starting"):
        try:
            from kv_memory.serve.app import create_app
            from kv_memory.serve.server import Server, is_loopback, listen
            from kv_memory.serve.sources import model_name
        except ImportError as error:
            raise ConfigError(
                f"the server needs a package that is not installed: {error.name}",
                where="serve",
                next_step="Run `pip install 'kv-memory[serve]'`.",
            ) from error
        from kv_memory.serve.keys import Keys
    out.stopped = "The server has stopped; what was added is stored."
    batching = {"max_batch": limits.max_batch, "max_queue": limits.max_queue}
    with place.open_memory(out, create=True, **batching, **changes) as memory:
        listening = listen(host, port, Keys(memory.store))
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}/v1"
        with listening:
            app = create_app(memory, limits, loopback=is_loopback(host))

            def on_ready() -> None:
                out.note(f"Serving {memory.path} on {url}")
                if out.as_json:
                    out.json({"url": url, "model": model_name(memory)})

            server = Server(app, limits, on_ready=on_ready)
            server.run(sockets=[listening])
    if not server.started:
        out.code = FAILED
    return None


@command()
def create_key(name: str, *, only: list[str] | None = None, write: bool = False, place: Place, out: Output) -> Any:
    """Create a key for clients of the server, and print it. It is not stored, and cannot be shown again.

    Options:
        name (NAME): Name for people: the key's owner, or its use.
        only (NAME): Collection that the key is for; repeat it for several.  [default: all]
        write: Let it add and remove documents too.
    """
    from kv_memory.serve.keys import Keys

    with place.open_store(out) as opened:
        made, key = Keys(opened).create(name, collections=only or (), write=write)
    out.line(key)
    out.note("Give it to the client now: only its hash is stored.")
    return {"id": made.id, "name": made.name, "key": key}


@command()
def list_keys(*, place: Place, out: Output) -> Any:
    """List the keys, without their secrets."""
    from kv_memory.serve.keys import Keys

    with place.open_store(out) as opened:
        keys = Keys(opened).list()
    rows = [
        (
            key.id,
            key.name,
            ", ".join(key.collections) or "all",
            "read, write" if key.write else "read",
            f"{key.created_at:%Y-%m-%d %H:%M}",
            "-" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d %H:%M}",
        )
        for key in keys
    ]
    if rows:
        out.table(("ID", "Name", "Collections", "Scope", "Created (UTC)", "Revoked (UTC)"), rows)
    else:
        out.note("There are no keys: the server can only be reached from this machine. See kv-memory keys create")
    return {"keys": keys}


@command()
def revoke_key(id: str, *, place: Place, out: Output) -> Any:
    """Make a key invalid, at once and for every server of the store.

    Options:
        id (ID): Id of the key, as `kv-memory keys list` shows it.
    """
    from kv_memory.serve.keys import Keys

    with place.open_store(out) as opened:
        key = Keys(opened).revoke(id)
    out.line(f"The key {key.id} ({key.name}) is revoked.")
    return {"key": key}
