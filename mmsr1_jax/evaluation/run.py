"""Resumable evaluation of a policy: each workflow answers all questions.

for each workflow:
    rules                limits, prompts, forced actions
    episodes             rolled out by the engine, each written as it ends
    verdicts, metrics    see `scoring`, and `extraction` for questions about documents
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx
from tqdm import tqdm

from mmsr1_jax.config import redaction, settings
from mmsr1_jax.data import DataError, Question, QuestionSource, benchmarks
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.extraction import finish_documents
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.scoring import MADE_WITH, finish
from mmsr1_jax.evaluation.workflows import WORKFLOWS, allowed, limits_of
from mmsr1_jax.models import sharding
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.rl import train_batch as rl_samples
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rollout.build import make_engine, make_processor
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.index_builder import INDEX_FILE
from mmsr1_jax.tools.service_checks import check_services
from mmsr1_jax.training import sft_dataset, train_utils
from mmsr1_jax.training.checkpoint import Checkpoints
from mmsr1_jax.utils import checked_json, outputs

# Fields of `config.services` that the episodes depend on.
_SERVICES = (
    "serpapi_url", "serper_url", "searxng_url", "retrieval_url", "jina_url", "reader",
    "summariser_url", "summariser_model", "fvqa_cache", "allowed_hosts", "cache", "cache_mode",
)  # fmt: skip
_PROMPTS = "prompts."  # prefix of a workflow's name; the value is the digest of its prompts


def evaluate(
    config: settings.Config, model_dir: str | os.PathLike, out: pathlib.Path,
    *, checkpoint: tuple[pathlib.Path, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the policy on the questions of `config.eval` with each of its workflows.

    Episodes that `out` already contains are not repeated. Return the results that are written to
    `out/results.json`.

    Args:
      config: Settings. Rewards are computed as at step `run.steps` of training; `services`
        configures the judge.
      model_dir: HF directory of the policy.
      out: Results directory, created if necessary.
      checkpoint: Run directory and step of a checkpoint whose parameters replace those of
        `model_dir`.

    Raises:
      ValueError, OSError: The settings, data or policy are invalid, or `out` contains a different
        evaluation.
      ServiceRefusedError: A service refuses requests before the first episode, or the judge refuses
        all requests later; `out` keeps the episodes and verdicts so far.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = make_processor(config, str(model_dir)).images
    if config.eval.benchmark in benchmarks.DOCUMENT_BENCHMARKS:
        least = benchmarks.page_processor(images).min_pixels
        shown = dataclasses.replace(config.images, min_pixels=least)
        config = dataclasses.replace(config, images=shown)
    source = Source(config, images)
    made_with = _made_with(config, source, model_dir, checkpoint)
    made_with = _check_same(out / MADE_WITH, made_with)
    _check_questions(out / EPISODES, source)
    check_services(config, [limits_of(name, config.turns) for name in config.eval.workflows])
    judge = make_judge(config)
    engine = make_engine(config, str(model_dir))
    if checkpoint is not None:
        engine.load(parameters(config, str(model_dir), *checkpoint))
    results: dict[str, Any] = {}
    try:
        for name in config.eval.workflows:
            answer(engine, config, name, source, out)
            model = config.services.judge_model
            results = finish(out / EPISODES, out, judge, model, made_with)
            results = finish_documents(config, out, results)
    finally:
        engine.close()
    return results


class Source:
    """Re-iterable source of the questions of `config.eval`, always in the same order.

    Attributes:
      count: Number of questions, or None if it is unknown without reading them all.
      fingerprint: Fingerprint that identifies the data.
    """

    def __init__(self, config: settings.Config, images: ImageProcessor):
        """Open the data.

        Args:
          config: Settings.
          images: The policy's image processor.

        Raises:
          DataError: The data cannot be read.
        """
        self._benchmark, self._rows = config.eval.benchmark, config.eval.max_questions
        self._where = config.eval.data or config.data.validation
        self._bounds = {
            "image_roots": config.data.image_roots,
            "max_bad_rows": config.data.max_bad_rows,
            "max_file_pixels": config.images.max_file_pixels,
        }
        self._pages = {"processor": images, "page_tokens": config.eval.page_tokens}
        if not self._where:
            raise DataError("config.eval.data: no file was named")
        if self._benchmark:
            self._read()  # raises early if the files cannot be used
            files = benchmarks.files(self._benchmark, self._where)
            self.count, self.fingerprint = None, [[f.name, f.stat().st_size] for f in files]
        else:
            self._source = QuestionSource(self._where, **self._bounds)
            self.count = min(self._rows or len(self._source), len(self._source))
            self.fingerprint = self._source.fingerprint()

    def __iter__(self) -> Iterator[Question]:
        questions = self._read() if self._benchmark else self._source
        return itertools.islice(questions, self._rows or None)

    def _read(self) -> Iterator[Question]:
        return benchmarks.read(self._benchmark, self._where, **self._bounds, **self._pages)


def answer(
    engine: Engine | EnginePool, config: settings.Config, name: str, source: Source,
    out: pathlib.Path,
) -> None:  # fmt: skip
    """Roll out the episodes of a workflow that `out` lacks and append them to its file."""
    samples, path = config.eval.num_samples, out / EPISODES
    records.truncate_partial_line(path)
    known = (line for _, _, line in records.scan(path)) if path.is_file() else ()
    done = {line["index"] for line in known if line["workflow"] == name}
    limits = limits_of(name, config.turns)
    texts = prompts.load(config.turns.prompt_dir, name)
    rules = engine.make_rules(limits, texts, WORKFLOWS[name].forced)
    sampling = dataclasses.replace(config.sampling, temperature=config.eval.temperature)
    asked: dict[int, Question] = {}

    def missing() -> Iterator[tuple[int, Example]]:
        for number, question in enumerate(source):
            if not done.issuperset(range(number * samples, (number + 1) * samples)):
                asked[number] = dataclasses.replace(question, images=())
                yield number, question.example()

    numbers, examples = itertools.tee(missing())
    episodes = engine.rollout(
        (example for _, example in examples),
        rollouts=samples,
        sampling=sampling,
        rules=rules,
        indices=(number for number, _ in numbers),
    )
    total = source.count and source.count * samples
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(episodes, desc=name, initial=len(done), total=total, unit="episode") as bar,
    ):
        for episode in bar:
            if episode.index in done:  # only other samples of its question were missing
                continue
            question = asked[episode.group]
            if episode.end == "error":
                bar.write(f"{name}, question {question.id}: {episode.error}", file=sys.stderr)
            line = line_of(episode, question, name, config, engine.processor, out)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()


def line_of(
    episode: Episode,
    question: Question,
    name: str,
    config: settings.Config,
    processor: Processor,
    out: pathlib.Path,
) -> dict[str, Any]:
    """Convert an episode to an unjudged line of `out/episodes.jsonl`, see `records`."""
    line = sft_dataset.line_of(episode, processor, out, out / "pictures")
    reward = reward_function.episode_reward(
        episode, question.answers, config.rewards, config.run.steps
    )
    limits = limits_of(name, config.turns)
    line |= {"answers": question.answers, "category": question.category, "source": question.source}
    line |= {
        "reward": dataclasses.asdict(reward),
        "workflow": name,
        "sample": episode.index % config.eval.num_samples,
        "allowed": allowed(limits, bool(episode.example.images)),
        "tokens": len(episode),
        "tokens_sampled": int(episode.loss_mask.sum()),
    }
    line["em"], line["subem"] = records.matched(line)
    score = benchmarks.grader(config.eval.benchmark) if config.eval.benchmark else None
    if score is not None:
        line["score"] = score(episode.answer, question)
        line["answer_format"] = question.answer_format
    if config.eval.benchmark in benchmarks.DOCUMENT_BENCHMARKS:
        line["pages_left_out"] = question.omitted_pages
    return line | {"judge": None}


def parameters(config: settings.Config, model_dir: str, run: pathlib.Path, step: int) -> nnx.State:
    """Restore the parameters of a run's checkpoint, as the trainer holds them."""
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    model = train_utils.load_policy(config, model_dir, mesh)
    learner = Learner(
        model, rl_samples.make_loss(config.objective), config.update, mesh,
        temperature=config.sampling.temperature, seed=config.run.seed,
    )  # fmt: skip
    checkpoints = Checkpoints(run / "checkpoints", keep=None)
    state = {"trained": learner.trained, "optimizer": learner.optimizer}
    state, _ = checkpoints.restore(step, state)
    checkpoints.close()
    learner.trained = state["trained"]
    return learner.params


def _made_with(
    config: settings.Config, source: Source, model_dir: str | os.PathLike,
    checkpoint: tuple[pathlib.Path, int] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the settings and files that episodes depend on, as plain data for JSON.

    `rollout` settings on which they do not depend, such as `lanes`, are left out.
    """
    found: dict[str, Any] = {
        "model": str(model_dir),
        "model files": _stamps(sorted(pathlib.Path(model_dir).glob("*.safetensors"))),
        "checkpoint": checkpoint and [str(checkpoint[0]), checkpoint[1]],
        "data": source.fingerprint,
    }
    for part in ("model", "buckets", "images", "rollout", "turns", "tools", "rewards"):
        for name, value in dataclasses.asdict(getattr(config, part)).items():
            found[f"{part}.{name}"] = value
    for name in ("lanes", "decode_steps", "image_cache_tokens", "precompile"):
        del found[f"rollout.{name}"]
    for name in ("benchmark", "page_tokens", "max_questions", "num_samples", "temperature"):
        found[f"eval.{name}"] = getattr(config.eval, name)
    for name in ("top_k", "top_p", "seed"):
        found[f"sampling.{name}"] = getattr(config.sampling, name)
    for name in _SERVICES:
        found[f"services.{name}"] = getattr(config.services, name)
    searched = [path for path in (config.tools.index, config.services.fvqa_cache) if path]
    names = ("", INDEX_FILE, "pages.jsonl")
    found["tools.files"] = _stamps(pathlib.Path(p, name) for p in searched for name in names)
    for name in config.eval.workflows:
        texts = json.dumps(prompts.load(config.turns.prompt_dir, name), sort_keys=True)
        found[_PROMPTS + name] = hashlib.blake2b(texts.encode(), digest_size=16).hexdigest()
    return json.loads(json.dumps(redaction.redact(found)))


def _stamps(files: Iterable[pathlib.Path]) -> list[list[Any]]:
    """Return name, size in bytes and modification time in ns of the files that exist."""
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _check_same(path: pathlib.Path, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Check `made_with` against `path` and write it there.

    Return it together with the prompt digests of workflows evaluated earlier.

    Raises:
      ValueError: `path` belongs to an evaluation with other settings or files.
    """
    known = checked_json.load(path, dict[str, Any]) if path.is_file() else {}
    both = {**known, **made_with}
    # Workflows may be evaluated by separate commands, so only those of both are compared.
    compared = [n for n in both if not n.startswith(_PROMPTS) or (n in known and n in made_with)]
    odd = [name for name in compared if known and known.get(name) != made_with.get(name)]
    if odd:
        raise ValueError(
            f"{path.parent}: already contains an evaluation with {odd[0]}={known.get(odd[0])}; "
            f"this command has {odd[0]}={made_with.get(odd[0])}. Use another --out, or the same "
            "settings"
        )
    if both != known:
        outputs.write_text(path, json.dumps(both, indent=1) + "\n")
    return both


def _check_questions(path: pathlib.Path, source: Source) -> None:
    """Check that each question still has the number that it has in the file.

    Unusable rows have no number, so numbers shift if such a row becomes usable, or the reverse.

    Raises:
      DataError: The number of a question has changed.
    """
    records.truncate_partial_line(path)
    there: dict[int, tuple[str, str]] = {}
    for _, _, line in records.scan(path) if path.is_file() else ():
        there[line["group"]] = line["id"], line["question"]
    if not there:
        return
    for number, question in enumerate(itertools.islice(source, max(there) + 1)):
        known = there.get(number)
        if known is not None and known != (question.id, question.question):
            raise DataError(
                f"{path}: question {number} is {known[0]!r} there, and now it is {question.id!r} "
                f"({question.file}, row {question.row}): a row before it could not be used then, "
                "and can be now (its picture or document is there, say), or the other way round. "
                "Make that as it was, or give another --out"
            )
