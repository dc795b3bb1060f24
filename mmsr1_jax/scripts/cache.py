"""Inspect, export or import a cache of search results.

    python -m mmsr1_jax.scripts.cache info STORE
    python -m mmsr1_jax.scripts.cache export STORE FILE      write all entries to one file
    python -m mmsr1_jax.scripts.cache import STORE FILE      add the entries that STORE lacks

STORE is a file written by `mmsr1_jax/tools/tool_cache.py`, or the URL of a Redis server
(`mmsr1_jax/tools/redis_cache.py`). FILE is a cache file.
"""

import pathlib
import sys

from absl import app

from mmsr1_jax.tools.redis_cache import is_redis, open_cache
from mmsr1_jax.tools.tool_cache import ToolCacheError
from mmsr1_jax.utils import shutdown

_ARGUMENTS = {"info": 1, "export": 2, "import": 2}


def main(argv) -> None:
    action, *paths = argv[1:] or [""]
    if _ARGUMENTS.get(action) != len(paths):
        sys.exit(
            "usage: python -m mmsr1_jax.scripts.cache info STORE | export STORE FILE | "
            "import STORE FILE"
        )
    needed = paths[0] if action in ("info", "export") else paths[1]
    try:
        if any(map(is_redis, paths[1:])):
            raise ToolCacheError("FILE must be a file, not the address of a server")
        if not is_redis(needed) and not pathlib.Path(needed).is_file():
            raise ToolCacheError(f"{needed}: no such store")
        if action == "import":
            store = open_cache(paths[0])
            print(f"{store.import_entries(paths[1])} entries taken from {paths[1]}")
        else:
            store = open_cache(paths[0], "replay")
            if action == "export":
                store.export(paths[1])
        for kind, entries, size in store.info():
            print(f"{kind}: {entries} entries, {size / 1e6:.1f} MB")
        store.close()
    except (ToolCacheError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(shutdown.guard(main))
