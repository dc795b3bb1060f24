"""The construction from end to end: concepts, sources, questions, checks, labels, parquet.

OUT/concepts.jsonl     concepts in the order in which they are worked on
OUT/sources.jsonl      pages and pictures        OUT/images/   the pictures
OUT/questions.jsonl    questions that a model wrote and that pass the rules
OUT/checked.jsonl      questions that pass the checks
OUT/labelled.jsonl     with other forms of the answers, and categories
OUT/questions.parquet  the data set
OUT/calls.sqlite       recorded answers of all services, unless `services.cache` is set
OUT/calls.jsonl        requests that were sent, and tokens
OUT/measured.json      their numbers when the last run ended, for estimates
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmsr1_jax.config import settings
from mmsr1_jax.config.bounds import ConfigError
from mmsr1_jax.data.construction import concepts, estimates
from mmsr1_jax.data.construction.checks import check_questions
from mmsr1_jax.data.construction.concepts import Concept
from mmsr1_jax.data.construction.labels import (
    Labelled,
    label_question,
    read_alias_table,
    read_taxonomy,
)
from mmsr1_jax.data.construction.meter import Meter, read_limits, read_prices
from mmsr1_jax.data.construction.models import PROMPTS, Model
from mmsr1_jax.data.construction.overlap import TestSet, read_test_set
from mmsr1_jax.data.construction.questions import Draft, write_questions
from mmsr1_jax.data.construction.sources import Source, find_sources, read_picture
from mmsr1_jax.data.construction.stages import Dropped, StageResult, stage, work_on
from mmsr1_jax.data.parquet import Question, write_parquet
from mmsr1_jax.data.questions import QuestionSource
from mmsr1_jax.tools.build import make_clients, make_tools
from mmsr1_jax.tools.cached_tool import CachedImages
from mmsr1_jax.tools.image_search import ImageFetcher
from mmsr1_jax.tools.picture_search import LocalPictureSearch, PictureSearch
from mmsr1_jax.tools.service_clients import ServiceClients, ToolsError

CACHE, CALLS, MEASURED = "calls.sqlite", "calls.jsonl", "measured.json"
PARQUET = "questions.parquet"
SOURCE = "constructed"  # data_source of the questions
STAGES = ("sources", "questions", "checked", "labelled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstructionResult:
    """A finished construction.

    Attributes:
      config: Settings, see `resolve`.
      concepts: Concepts that were worked on.
      num_concepts: Number of concepts of the whole construction, of which a pilot takes a few.
      results: Result of each stage, keyed by its name in `STAGES`.
      questions: Constructed questions that were written, without those from other files.
      added: Number of questions added from each other file.
      meter: Meter of the requests.
    """

    config: settings.Config
    concepts: Sequence[Concept]
    num_concepts: int
    results: dict[str, StageResult[Any]]
    questions: Sequence[Labelled]
    added: dict[str, int]
    meter: Meter


def resolve(config: settings.Config, out: pathlib.Path) -> settings.Config:
    """Return the settings with the defaults of a construction.

    Answers of services are cached, in `out` by default, so that an interrupted construction repeats
    no request. Pages are not summarised, and `auto` is replaced by the name of a search.

    Raises:
      ConfigError, ToolsError: A setting is missing or cannot be used here.
    """
    options, tools, services = config.construction, config.tools, config.services
    if not options.concepts:
        raise ConfigError("config.construction.concepts: name at least one file of concepts")
    text = tools.text
    if text == "auto":
        text = "none" if tools.index is None else "local"
    if text == "none":
        raise ToolsError("config.tools.text=none: construct needs a text search")
    pictures = options.pictures
    if pictures == "auto":
        pictures = text if text in ("searxng", "serpapi", "serper") else "local"
    if pictures == "local" and tools.index is None:
        raise ToolsError("config.tools.index is not set, but config.construction.pictures=local")
    if services.cache is None:
        services = dataclasses.replace(services, cache=str(out / CACHE), cache_max_bytes=2**60)
    if services.cache_mode == "use":
        services = dataclasses.replace(services, cache_mode="resume")
    return dataclasses.replace(
        config,
        construction=dataclasses.replace(options, pictures=pictures),
        tools=dataclasses.replace(
            tools, text=text, image="none", max_result_chars=options.page_chars
        ),
        services=dataclasses.replace(services, summariser_url=None),
    )


def dry_run(config: settings.Config, out: pathlib.Path) -> str:
    """Return a table of the expected and the maximum number of requests, without sending any.

    If both searches are local, pages and pictures of all concepts are found, as for the whole
    construction.

    Args:
      config: Settings.
      out: Directory of the construction, perhaps with a pilot in it.
    """
    config = resolve(config, out)
    options = config.construction
    limits, prices = read_limits(options.max_calls), read_prices(options.prices)
    selected = concepts.select(options)
    meter, measured = Meter(out / CALLS, limits), estimates.read_measured(out / MEASURED)
    num_sources = None
    if measured is not None and config.tools.text == options.pictures == "local":
        found, _ = asyncio.run(_Run(config, out, meter).sources(selected))
        num_sources = len(found.kept)
    rows = estimates.estimate(config, len(selected), num_sources, measured, meter, limits, prices)
    return estimates.format_table(rows, len(selected), measured)


def construct(config: settings.Config, out: pathlib.Path, *, pilot: int = 0) -> ConstructionResult:
    """Construct questions and write the files listed in the module docstring.

    Args:
      config: Settings.
      out: Directory, created by the caller.
      pilot: Number of concepts to work on; 0 works on all.

    Raises:
      UserError: A setting or a file is unusable, a limit on requests is reached, or a service
        refuses all requests. What was done is kept, and the same call resumes.
    """
    config = resolve(config, out)
    options = config.construction
    read_prices(options.prices)
    meter = Meter(out / CALLS, read_limits(options.max_calls))
    also = _read_also(options.also)
    selected = concepts.select(options)
    working = selected[:pilot] if pilot else selected
    tests = read_test_set(options.test_sets, options.overlap_bits, config.data.image_roots)
    results = asyncio.run(_Run(config, out, meter).stages(working, tests))
    questions = _select(results["labelled"].kept, options.max_questions, options.seed)
    added: dict[str, int] = {}
    rows = [_question(item, out) for item in questions]
    for name, more in _sampled_sets(config, also, tests).items():
        added[name] = len(more)
        rows += more
    if rows:
        write_parquet(out / PARQUET, rows)
    else:
        (out / PARQUET).unlink(missing_ok=True)
    estimates.write_measured(out / MEASURED, len(working), len(results["sources"].kept), meter)
    return ConstructionResult(
        config=config, concepts=working, num_concepts=len(selected), results=results,
        questions=questions, added=added, meter=meter,
    )  # fmt: skip


class _Run:
    """Stages of one run."""

    def __init__(self, config: settings.Config, out: pathlib.Path, meter: Meter):
        self._config, self._options, self._out = config, config.construction, out
        self._meter = meter
        self._aliases = read_alias_table(self._options.aliases)
        self._taxonomy = read_taxonomy(self._options.taxonomy)
        clients = make_clients(config, before_request=meter.before_request)
        self._text_search = make_tools(config, clients=clients)["text_search"]
        self._picture_search = _picture_search(config, clients)
        self._writer, self._checker = (
            Model(name, clients.client(name), clients.cached_calls, meter)
            for name in ("writer", "checker")
        )

    async def sources(self, working: Sequence[Concept]) -> tuple[StageResult[Source], str]:
        """Return the sources of concepts and the digest of the stage."""

        async def keep() -> StageResult[Concept]:
            return StageResult(kept=list(working))

        async def find() -> StageResult[Source]:
            return await self._find(working)

        names = [dataclasses.asdict(concept) for concept in working]
        _, digest = await stage(self._out, "concepts", Concept, names, keep)
        return await stage(self._out, "sources", Source, [self._inputs(), digest], find)

    async def stages(
        self, working: Sequence[Concept], tests: TestSet
    ) -> dict[str, StageResult[Any]]:
        """Return the result of each stage."""
        found, digest = await self.sources(working)
        results: dict[str, StageResult[Any]] = {"sources": found}
        computations = {
            "questions": (Draft, self._write),
            "checked": (Draft, lambda drafts: self._check(drafts, tests)),
            "labelled": (Labelled, self._label),
        }
        previous: Sequence[Any] = found.kept
        for name, (kind, compute) in computations.items():

            async def run(compute=compute, items=previous) -> StageResult[Any]:
                return await compute(items)

            inputs = [self._inputs(), digest]
            results[name], digest = await stage(self._out, name, kind, inputs, run)
            previous = results[name].kept
        return results

    def _inputs(self) -> list[Any]:
        """Return the settings and files that the results of the stages depend on."""
        others = ("max_calls", "prices", "max_concurrency", "max_questions", "also")
        options = dataclasses.asdict(self._options)
        services = self._config.services
        prompts = {path.name: path.read_text() for path in sorted(PROMPTS.glob("*.txt"))}
        return [
            {name: value for name, value in options.items() if name not in others},
            dataclasses.asdict(self._config.tools), prompts, _file_stamps(self._options),
            services.reader, services.writer_model, services.checker_model,
        ]  # fmt: skip

    async def _find(self, working: Sequence[Concept]) -> StageResult[Source]:
        options = self._options
        heldout = read_test_set(
            options.heldout_sets, options.overlap_bits, self._config.data.image_roots
        )
        return await find_sources(
            working, self._text_search, self._picture_search, self._options, heldout,
            self._meter, self._out, timeout=self._config.tools.timeout,
        )  # fmt: skip

    async def _write(self, sources: Sequence[Source]) -> StageResult[Draft]:
        async def work(source: Source) -> StageResult[Draft]:
            image = read_picture(source, self._out)
            return await write_questions(source, image, self._writer, self._options)

        return await self._work_on(sources, work, "questions", lambda source: source.concept)

    async def _check(self, drafts: Sequence[Draft], tests: TestSet) -> StageResult[Draft]:
        kept: StageResult[Draft] = StageResult()
        groups: dict[tuple[str, str], list[Draft]] = {}
        for draft in drafts:
            overlap = tests.question_overlap(draft.question, draft.answer, draft.source.hashes)
            if overlap:
                kept.drop(draft.name, overlap)
            else:
                key = draft.source.url or draft.source.page, draft.source.concept
                groups.setdefault(key, []).append(draft)

        async def work(group: Sequence[Draft]) -> StageResult[Draft]:
            image = read_picture(group[0].source, self._out)
            return await check_questions(group, image, self._checker, self._options)

        checked = await self._work_on(
            list(groups.values()), work, "checked", lambda group: group[0].source.concept
        )
        kept.extend(checked)
        return _without_repetitions(kept)

    async def _label(self, drafts: Sequence[Draft]) -> StageResult[Labelled]:
        async def work(draft: Draft) -> StageResult[Labelled]:
            return await label_question(
                draft, self._writer, self._checker, self._aliases, self._taxonomy, self._options
            )

        return await self._work_on(drafts, work, "labelled", lambda draft: draft.name)

    async def _work_on(self, items, work, name, label) -> StageResult[Any]:
        return await work_on(
            items, work, name=name, label=label, meter=self._meter,
            max_concurrency=self._options.max_concurrency,
        )  # fmt: skip


def _without_repetitions(result: StageResult[Draft]) -> StageResult[Draft]:
    """Keep one of several questions about a concept that have the same text or answer."""
    kept = StageResult[Draft](dropped=list(result.dropped), unresolved=list(result.unresolved))
    seen: set[tuple[str, str]] = set()
    for draft in result.kept:
        key = draft.source.concept, draft.question.casefold()
        if key in seen:
            kept.dropped.append(Dropped(draft.name, "same question about the same concept"))
        else:
            seen.add(key)
            kept.kept.append(draft)
    return kept


def _select(items: Sequence[Labelled], count: int, seed: int) -> list[Labelled]:
    """Return `count` questions, as equally over the categories as possible; 0 returns all."""
    if not count or len(items) <= count:
        return list(items)
    rng = np.random.default_rng([seed, 2])
    queues: dict[str, list[int]] = {}
    for index in rng.permutation(len(items)).tolist():
        queues.setdefault(items[index].category, []).append(index)
    chosen: list[int] = []
    while len(chosen) < count:
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return [items[index] for index in sorted(chosen)]


def question_id(item: Labelled) -> str:
    """Return the ID of a constructed question, which depends on its text and picture."""
    key = json.dumps([item.draft.question, item.draft.answer, item.draft.source.image])
    return f"{SOURCE}-{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}"


def _question(item: Labelled, out: pathlib.Path) -> Question:
    return Question(
        id=question_id(item),
        question=item.draft.question,
        images=(read_picture(item.draft.source, out),),
        answers=(item.draft.answer, *item.aliases),
        source=SOURCE,
        category=item.category,
    )


def _read_also(texts: Sequence[str]) -> dict[str, int]:
    """Parse `FILE=COUNT` of `config.construction.also`. Raises ConfigError."""
    counts = {}
    for text in texts:
        file, _, number = text.rpartition("=")
        if not file or not number.isdecimal() or len(number) > 12:
            raise ConfigError(f"config.construction.also: {text!r} is not FILE=COUNT")
        counts[file] = int(number)
    return counts


def _sampled_sets(
    config: settings.Config, counts: Mapping[str, int], tests: TestSet
) -> dict[str, list[Question]]:
    """Return a sample of the questions of each file, without those of the test sets."""
    samples: dict[str, list[Question]] = {}
    for file, count in counts.items():
        source = QuestionSource(
            file,
            image_roots=config.data.image_roots,
            max_bad_rows=config.data.max_bad_rows,
            max_file_pixels=config.images.max_file_pixels,
        )
        rng = np.random.default_rng([config.construction.seed, 3])
        order = rng.permutation(len(source))[:count]
        chosen = source.read(sorted(order.tolist()))
        samples[file] = [question for question in chosen if not tests.overlaps(question)]
    return samples


def _picture_search(
    config: settings.Config, clients: ServiceClients
) -> PictureSearch | LocalPictureSearch:
    name, licences = config.construction.pictures, config.construction.licences
    if name == "local":
        if licences:
            raise ToolsError(
                f"config.construction.licences={licences}: a local index knows no licences. Index "
                "only pictures that may be used and set licences=(), or set "
                "config.construction.pictures to a web search"
            )
        return LocalPictureSearch(config.tools.index or "")
    fetch = CachedImages(ImageFetcher(clients.any_host("thumbnails")), clients.cached_calls)
    return PictureSearch(
        clients.client(name), fetch, clients.cached_calls, name, free=bool(licences)
    )


def _file_stamps(options: settings.Construction) -> list[list[Any]]:
    """Return name, size and modification time in ns of the files that the stages read."""
    names = [*options.heldout_sets, *options.test_sets, options.aliases, options.taxonomy]
    stats = [(name, pathlib.Path(name).stat()) for name in names if name]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def count_reasons(result: StageResult[Any]) -> dict[str, int]:
    """Return how many items fell out of a stage for each reason, most frequent first."""
    counts = collections.Counter(dropped.reason for dropped in result.dropped)
    return dict(counts.most_common())
