"""Inspect, export or import a cache of search results.

    python -m mmsr1_jax.scripts.cache info CACHE
    python -m mmsr1_jax.scripts.cache export CACHE FILE      write all entries to one file
    python -m mmsr1_jax.scripts.cache import CACHE FILE      add the entries that CACHE lacks

CACHE is a file written by `mmsr1_jax/tools/tool_cache.py`, or the URL of a Redis server
(`mmsr1_jax/tools/redis_cache.py`). FILE is a cache file.
"""

import pathlib
from collections.abc import Sequence

from mmsr1_jax import cli
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.tools.redis_cache import is_redis, open_cache

_NUM_PATHS = {"info": 1, "export": 2, "import": 2}


def main(argv: Sequence[str]) -> None:
    action, *paths = argv[1:] or [""]
    if _NUM_PATHS.get(action) != len(paths):
        raise UserError("usage: mmsr1 cache info CACHE | export CACHE FILE | import CACHE FILE")
    source = paths[1] if action == "import" else paths[0]
    if any(map(is_redis, paths[1:])):
        raise UserError("FILE must be a file, not the address of a server")
    if not is_redis(source) and not pathlib.Path(source).is_file():
        raise UserError(f"{source}: no such cache")
    if action == "import":
        cache = open_cache(paths[0])
        print(f"{cache.import_entries(paths[1])} entries imported from {paths[1]}")
    else:
        cache = open_cache(paths[0], "replay")
        if action == "export":
            cache.export(paths[1])
    for kind, entries, size in cache.info():
        print(f"{kind}: {entries} entries, {size / 1e6:.1f} MB")
    cache.close()


if __name__ == "__main__":
    cli.run(main, max_arguments=3)
