"""Stages of the construction: concurrent work on items, and one file per stage.

    {"stage": "questions", "inputs": DIGEST}       first line
    {"kept": {..}}                                 an item that the next stage works on
    {"dropped": NAME, "reason": REASON}            an item that fell out here

A file appears when its stage is complete, and is used again if its inputs are the same. A stage
that was interrupted starts again, but its requests are answered from the cache, so that none is
sent twice.
"""

import asyncio
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from mmsr1_jax.data.construction.meter import BudgetError, Meter
from mmsr1_jax.tools.web import WebError
from mmsr1_jax.utils import checked_json, outputs

T = TypeVar("T")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An item that fell out of a stage, with the reason, which is one of few."""

    name: str
    reason: str


@dataclasses.dataclass
class StageResult(Generic[T]):
    """Result of a stage.

    Attributes:
      kept: Items for the next stage.
      dropped: Items that fell out.
      unresolved: Items that could not be worked on because a service was down or overloaded, with
        its error. The result is then not final: the next run works on them again.
    """

    kept: list[T] = dataclasses.field(default_factory=list)
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    unresolved: list[Dropped] = dataclasses.field(default_factory=list)

    def drop(self, name: str, reason: str) -> None:
        self.dropped.append(Dropped(name, reason))

    def extend(self, other: "StageResult[T]") -> None:
        self.kept += other.kept
        self.dropped += other.dropped
        self.unresolved += other.unresolved


async def work_on(
    items: Sequence[S],
    work: Callable[[S], Awaitable[StageResult[T]]],
    *,
    name: str,
    label: Callable[[S], str],
    meter: Meter,
    max_concurrency: int,
) -> StageResult[T]:
    """Work on items concurrently, and return their results in the order of the items.

    Args:
      items: Items.
      work: Async function that works on one item. If it raises WebError, the item is unresolved.
      name: Name of the stage, for the progress bar.
      label: Function that returns the name of an item.
      meter: Meter whose limit ends the stage.
      max_concurrency: Maximum number of items that are worked on at a time.

    Raises:
      BudgetError: A limit on requests is reached.
      UserError: A service refuses all requests.
    """
    slots = asyncio.Semaphore(max_concurrency)

    async def run(item: S) -> StageResult[T]:
        async with slots:
            if meter.exceeded:
                raise BudgetError(meter.exceeded)
            try:
                result = await work(item)
            except WebError as error:
                result = StageResult(unresolved=[Dropped(label(item), str(error))])
            if meter.exceeded:  # treated as the failure of a page
                raise BudgetError(meter.exceeded)
            bar.update()
            return result

    with tqdm(total=len(items), desc=name, unit="item", disable=not items) as bar:
        tasks = [asyncio.ensure_future(run(item)) for item in items]
        try:
            results = await asyncio.gather(*tasks)
        except BudgetError:  # the others end soon, and the requests that were sent count
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    total: StageResult[T] = StageResult()
    for result in results:
        total.extend(result)
    return total


async def stage(
    out: pathlib.Path,
    name: str,
    kind: type[T],
    inputs: Any,
    compute: Callable[[], Awaitable[StageResult[T]]],
) -> tuple[StageResult[T], str]:
    """Return the result of a stage, from its file if that has the same inputs.

    Args:
      out: Directory of the files.
      name: Name of the stage and of its file.
      kind: Dataclass of the items.
      inputs: Everything that the result depends on, as data for JSON.
      compute: Async function that computes the result.

    Returns:
      The result, and a digest of it for the inputs of the next stage.
    """
    path = out / f"{name}.jsonl"
    digest = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
    header = {"stage": name, "inputs": digest}
    result = _read(path, kind, header)
    if result is None:
        result = await compute()
        if not result.unresolved:
            _write(path, header, result)
        else:  # the file shows what there is, but the next run does not use it
            _write(path, header | {"unresolved": len(result.unresolved)}, result)
    items: list[Any] = result.kept  # of a dataclass, which a TypeVar cannot say
    kept = json.dumps([dataclasses.asdict(item) for item in items])
    return result, hashlib.blake2b(kept.encode(), digest_size=16).hexdigest()


def _write(path: pathlib.Path, header: dict[str, Any], result: StageResult[Any]) -> None:
    lines: list[Any] = [header, *({"kept": dataclasses.asdict(item)} for item in result.kept)]
    lines += [{"dropped": item.name, "reason": item.reason} for item in result.dropped]
    with outputs.new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _read(path: pathlib.Path, kind: type[T], header: dict[str, Any]) -> StageResult[T] | None:
    """Return the result in a file, or None if the file is missing or of other inputs."""
    if not path.is_file():
        return None
    result: StageResult[T] = StageResult()
    try:
        for number, line in checked_json.load_jsonl(path, dict):
            name = f"{path}, line {number}"
            if number == 1:
                if line != header:
                    return None
            elif "kept" in line:
                result.kept.append(checked_json.convert(line["kept"], kind, name=name))
            else:
                result.dropped.append(Dropped(str(line.get("dropped")), str(line.get("reason"))))
    except checked_json.FormatError:
        return None  # changed by hand, or by another version: computed again
    return result
