"""Resumable evaluation of a policy: each workflow answers all questions.

for each workflow:
    rules                limits, prompts, forced actions
    episodes             sampled by the engine, each written as it ends
    verdicts, metrics    see `scoring`, and `extraction` for questions about documents
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx
from tqdm import tqdm

from mmsr1_jax.config import redaction, settings
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data import DataError, Question, QuestionSource, benchmarks
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.evaluation import parts, records
from mmsr1_jax.evaluation.extraction import score_documents
from mmsr1_jax.evaluation.records import EPISODES
from mmsr1_jax.evaluation.scoring import PROVENANCE, score_episodes
from mmsr1_jax.evaluation.workflows import WORKFLOWS, max_searches, workflow_limits
from mmsr1_jax.models import sharding
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rl.train_batch import make_loss
from mmsr1_jax.rollout.build import make_engine, make_processor
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.tools.build import make_judge
from mmsr1_jax.tools.index_builder import INDEX_FILE
from mmsr1_jax.tools.service_checks import check_services
from mmsr1_jax.training import sft_dataset, train_utils
from mmsr1_jax.training.checkpoint import Checkpoints
from mmsr1_jax.utils import checked_json, outputs, processes
from mmsr1_jax.utils.logs import log

# Fields of `config.services` that the episodes depend on.
_SERVICES = (
    "serpapi_url", "serper_url", "searxng_url", "retrieval_url", "jina_url", "reader",
    "summariser_url", "summariser_model", "fvqa_cache", "allowed_hosts", "cache", "cache_mode",
)  # fmt: skip
_WAIT_SECONDS = 86400.0  # while others roll out, or process 0 asks the judge
_PROMPTS = "prompts."  # prefix of a workflow's name; the value is a digest of its prompts


def evaluate(
    config: settings.Config, model_dir: str | os.PathLike, out: pathlib.Path,
    *, checkpoint: tuple[pathlib.Path, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the policy on the questions of `config.eval` with each of its workflows.

    Episodes that `out` already contains are not repeated. Return the results that are written to
    `out/results.json`. With several processes, each answers its part of the questions, and process
    0 scores all; the others return no results.

    Args:
      config: Settings. Rewards are computed as at step `run.steps` of training; `services`
        configures the judge.
      model_dir: HF directory of the policy.
      out: Results directory, created if necessary.
      checkpoint: Run directory and step of a checkpoint whose parameters replace those of
        `model_dir`.

    Raises:
      UserError: The settings, data or policy are invalid, or `out` contains a different
        evaluation.
      ServiceRefusedError: A service refuses requests before the first episode, or the judge refuses
        all requests later; `out` keeps the episodes and verdicts so far.
    """
    out.mkdir(parents=True, exist_ok=True)
    images = make_processor(config, str(model_dir)).images
    if config.eval.benchmark in benchmarks.DOCUMENT_BENCHMARKS:
        min_pixels = benchmarks.page_processor(images).min_pixels
        image_settings = dataclasses.replace(config.images, min_pixels=min_pixels)
        config = dataclasses.replace(config, images=image_settings)
    source = EvalQuestions(config, images)
    provenance = _provenance(config, source, model_dir, checkpoint)
    processes.agree({"the data": provenance["data"]})
    if processes.main():
        provenance = _check_provenance(out / PROVENANCE, provenance)
        parts.absorb(out)
        _check_questions(out / EPISODES, source)
        limits = [workflow_limits(name, config.turns) for name in config.eval.workflows]
        check_services(config, limits)
    processes.barrier("evaluation")
    judge = make_judge(config, num_loops=1)  # of process 0
    engine = make_engine(config, str(model_dir))
    results: dict[str, Any] = {}
    try:
        if checkpoint is not None:
            engine.release()  # the memory is free for restoring
            engine.load(restore_params(config, str(model_dir), *checkpoint))
        for name in config.eval.workflows:
            processes.phase(f"workflow {name}")
            run_workflow(engine, config, name, source, out)
            processes.barrier(f"episodes of {name}", timeout=_WAIT_SECONDS)
            if processes.main():
                parts.absorb(out)
                model = config.services.judge_model
                results = score_episodes(out / EPISODES, out, judge, model, provenance)
                results = score_documents(config, out, results)
            processes.barrier(f"scores of {name}", timeout=_WAIT_SECONDS)
    finally:
        engine.close()
    return results


class EvalQuestions:
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
        self._benchmark, self._max_questions = config.eval.benchmark, config.eval.max_questions
        self._patterns = config.eval.data or config.data.validation
        self._limits: dict[str, Any] = {
            "image_roots": config.data.image_roots,
            "max_bad_rows": config.data.max_bad_rows,
            "max_file_pixels": config.images.max_file_pixels,
        }
        self._pages: dict[str, Any] = {
            "processor": images,
            "page_tokens": config.eval.page_tokens,
        }
        if not self._patterns:
            raise DataError("config.eval.data: must name at least one file")
        if self._benchmark:
            self._read()  # raises early if the files are unusable
            files = benchmarks.files(self._benchmark, self._patterns)
            self.count, self.fingerprint = None, [[f.name, f.stat().st_size] for f in files]
        else:
            self._source = QuestionSource(self._patterns, **self._limits)
            self.count = min(self._max_questions or len(self._source), len(self._source))
            self.fingerprint = self._source.fingerprint()

    def __iter__(self) -> Iterator[Question]:
        questions = self._read() if self._benchmark else self._source
        return itertools.islice(questions, self._max_questions or None)

    def _read(self) -> Iterator[Question]:
        return benchmarks.read(self._benchmark, self._patterns, **self._limits, **self._pages)


def run_workflow(
    engine: Engine | EnginePool, config: settings.Config, name: str, source: EvalQuestions,
    out: pathlib.Path,
) -> None:  # fmt: skip
    """Sample the episodes of a workflow that `out` lacks and append them to its file.

    With several processes, those of every P-th question, to a file of this process.
    """
    num_samples, path = config.eval.num_samples, out / EPISODES
    if processes.main():
        outputs.truncate_partial_line(path)
    processes.barrier(f"start of {name}")
    stored = (line for _, _, line in records.scan(path)) if path.is_file() else ()
    done = {line["index"] for line in stored if line["workflow"] == name}
    limits = workflow_limits(name, config.turns)
    texts = prompts.load(config.turns.prompt_dir, name)
    rules = engine.make_rules(limits, texts, WORKFLOWS[name].forced)
    sampling = dataclasses.replace(config.sampling, temperature=config.eval.temperature)
    questions: dict[int, Question] = {}  # without their images, which may be large

    def missing() -> Iterator[tuple[int, Example]]:
        own = itertools.islice(enumerate(source), processes.index(), None, processes.count())
        for index, question in own:
            if not done.issuperset(range(index * num_samples, (index + 1) * num_samples)):
                questions[index] = dataclasses.replace(question, images=())
                yield index, question.example()

    indices, examples = itertools.tee(missing())
    episodes = engine.rollout(
        (example for _, example in examples),
        group_size=num_samples,
        sampling=sampling,
        rules=rules,
        indices=(index for index, _ in indices),
    )
    total = source.count and source.count * num_samples
    bar = tqdm(
        episodes, desc=name, initial=len(done), total=total, unit="episode",
        disable=not processes.main(),
    )  # fmt: skip
    with open(parts.own_path(out), "a", encoding="utf-8") as file, bar:
        for episode in bar:
            if episode.index in done:  # only other samples of its question were missing
                continue
            question = questions[episode.group]
            if episode.end == "error":
                log.warning("%s, question %s: %s", name, question.id, episode.error)
            line = to_line(episode, question, name, config, engine.processor, out)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()


def to_line(
    episode: Episode,
    question: Question,
    name: str,
    config: settings.Config,
    processor: Processor,
    out: pathlib.Path,
) -> dict[str, Any]:
    """Convert an episode to an unjudged line of `out/episodes.jsonl`, see `records`."""
    line = sft_dataset.to_line(episode, processor, out, out / "images")
    reward = reward_function.episode_reward(
        episode, question.answers, config.rewards, config.run.steps
    )
    limits = workflow_limits(name, config.turns)
    line |= {"answers": question.answers, "category": question.category, "source": question.source}
    line |= {
        "reward": dataclasses.asdict(reward),
        "workflow": name,
        "sample": episode.index % config.eval.num_samples,
        "allowed": max_searches(limits, bool(episode.example.images)),
        "tokens": len(episode),
        "tokens_sampled": int(episode.loss_mask.sum()),
    }
    line["em"], line["subem"] = records.match_answer(line)
    if isinstance(question, benchmarks.BenchmarkQuestion):
        grade = benchmarks.grader(config.eval.benchmark)
        if grade is not None:
            line["score"] = grade(episode.answer, question)
            line["answer_format"] = question.answer_format
        if config.eval.benchmark in benchmarks.DOCUMENT_BENCHMARKS:
            line["omitted_pages"] = question.omitted_pages
    return line | {"judge": None}


def restore_params(
    config: settings.Config, model_dir: str, run: pathlib.Path, step: int
) -> nnx.State:
    """Restore the parameters of a run's checkpoint, as the trainer holds them."""
    mesh = sharding.make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    model = train_utils.load_policy(config, model_dir, mesh)
    learner = Learner(
        model, make_loss(config.objective), config.update, mesh,
        temperature=config.sampling.temperature, seed=config.run.seed,
    )  # fmt: skip
    checkpoints = Checkpoints(run / "checkpoints", keep=None)
    state = {"trained": learner.trained, "optimizer": learner.optimizer}
    state, _ = checkpoints.restore(step, state)
    checkpoints.close()
    learner.trained = state["trained"]
    return learner.params


def _provenance(
    config: settings.Config, source: EvalQuestions, model_dir: str | os.PathLike,
    checkpoint: tuple[pathlib.Path, int] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the settings and files that episodes depend on, as plain data for JSON.

    `rollout` settings on which they do not depend, such as `lanes`, are omitted.
    """
    provenance: dict[str, Any] = {
        "model": str(model_dir),
        "model files": _file_stamps(sorted(pathlib.Path(model_dir).glob("*.safetensors"))),
        "checkpoint": checkpoint and [str(checkpoint[0]), checkpoint[1]],
        "data": source.fingerprint,
    }
    for part in ("model", "buckets", "images", "rollout", "turns", "tools", "rewards"):
        for name, value in dataclasses.asdict(getattr(config, part)).items():
            provenance[f"{part}.{name}"] = value
    for name in ("lanes", "decode_steps", "image_cache_tokens", "precompile"):
        del provenance[f"rollout.{name}"]
    for name in ("benchmark", "page_tokens", "max_questions", "num_samples", "temperature"):
        provenance[f"eval.{name}"] = getattr(config.eval, name)
    for name in ("top_k", "top_p", "seed"):
        provenance[f"sampling.{name}"] = getattr(config.sampling, name)
    for name in _SERVICES:
        provenance[f"services.{name}"] = getattr(config.services, name)
    sources = [path for path in (config.tools.index, config.services.fvqa_cache) if path]
    names = ("", INDEX_FILE, "pages.jsonl")
    provenance["tools.files"] = _file_stamps(
        pathlib.Path(path, name) for path in sources for name in names
    )
    for name in config.eval.workflows:
        texts = json.dumps(prompts.load(config.turns.prompt_dir, name), sort_keys=True)
        digest = hashlib.blake2b(texts.encode(), digest_size=16).hexdigest()
        provenance[_PROMPTS + name] = digest
    return json.loads(json.dumps(redaction.redact(provenance)))


def _file_stamps(files: Iterable[pathlib.Path]) -> list[list[Any]]:
    """Return name, size in bytes and modification time in ns of the files that exist."""
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _check_provenance(path: pathlib.Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Check `provenance` against the file `path` and write it to that file.

    Return it together with the prompt digests of workflows evaluated earlier.

    Raises:
      UserError: `path` belongs to an evaluation with other settings or files.
    """
    stored = checked_json.load(path, dict[str, Any]) if path.is_file() else {}
    merged = {**stored, **provenance}
    # Workflows may be evaluated by separate commands, so only the prompts of both are compared.
    compared = [
        name
        for name in merged
        if not name.startswith(_PROMPTS) or (name in stored and name in provenance)
    ]
    for name in compared:
        if stored and stored.get(name) != provenance.get(name):
            raise UserError(
                f"{path.parent}: already contains an evaluation with {name}={stored.get(name)}; "
                f"this command has {name}={provenance.get(name)}. Use another --out, or the same "
                "settings"
            )
    if merged != stored:
        with outputs.new_file(path) as partial:
            partial.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    return merged


def _check_questions(path: pathlib.Path, source: EvalQuestions) -> None:
    """Check that each question still has the index that it has in the file.

    Unusable rows have no index, so indices shift if such a row becomes usable, or the reverse.

    Raises:
      DataError: The index of a question has changed.
    """
    outputs.truncate_partial_line(path)
    stored: dict[int, tuple[str, str]] = {}
    for _, _, line in records.scan(path) if path.is_file() else ():
        stored[line["group"]] = line["id"], line["question"]
    if not stored:
        return
    for index, question in enumerate(itertools.islice(source, max(stored) + 1)):
        expected = stored.get(index)
        if expected is not None and expected != (question.id, question.question):
            raise DataError(
                f"{path}: question {index} is {expected[0]!r}, but the data now has "
                f"{question.id!r} at this index ({question.file}, row {question.row}). The file or "
                "image of an earlier row became readable or unreadable. Restore it, or use another "
                "--out"
            )
