"""Files of episodes that the processes of an evaluation write, and that become one.

    OUT/episodes.jsonl       all episodes; with one process, it is written directly
    OUT/episodes.P.jsonl     those that process P has sampled since

Process 0 appends the second to the first, also those of an evaluation that was killed, whatever
its number of processes was.
"""

import pathlib
import re

from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.utils import outputs, processes

_PART = re.compile(r"episodes\.\d+\.jsonl")


def own_path(out: pathlib.Path) -> pathlib.Path:
    """Return the file to which this process appends its episodes."""
    if processes.count() == 1:
        return out / EPISODES
    return out / f"episodes.{processes.index()}.jsonl"


def absorb(out: pathlib.Path) -> None:
    """Append the episodes of all processes to `out/episodes.jsonl`, and remove their files.

    An episode that is there already, because a command was killed between the two, is dropped.
    """
    files = sorted(path for path in out.glob("episodes.*.jsonl") if _PART.fullmatch(path.name))
    if not files:
        return
    path = out / EPISODES
    outputs.truncate_partial_line(path)
    lines = records.scan(path) if path.is_file() else ()
    known = {(line["workflow"], line["index"]) for _, _, line in lines}
    for part in files:
        outputs.truncate_partial_line(part)
        with open(part, "rb") as source, open(path, "ab") as file:
            for offset, _, line in records.scan(part):
                key = line["workflow"], line["index"]
                if key not in known:
                    known.add(key)
                    source.seek(offset)
                    file.write(source.readline())
        part.unlink()
