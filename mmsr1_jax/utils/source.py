"""The version of the code that runs."""

import functools
import hashlib
import pathlib


@functools.cache
def source_digest(directory: pathlib.Path) -> str:
    """Return a digest of the source in a directory: a program depends on all of the package."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
