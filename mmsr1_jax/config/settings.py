"""Every setting, typed. A config file returns a `Config`; flags override single fields.

    python -m mmsr1_jax.score --config=configs/qwen7b.py --config.mesh.tensor=2 ...

A field that does not exist, a value of the wrong type, or values that do not fit together end the
program at once with one line that names the field.
"""

import dataclasses
from collections.abc import Sequence

from mmsr1_jax.config import bounds, rewards, training
from mmsr1_jax.config.bounds import ConfigError, setting
from mmsr1_jax.config.choices import ATTENTION, DTYPES, REMAT, WORKFLOWS
from mmsr1_jax.config.rewards import Rewards
from mmsr1_jax.config.tools import (  # noqa: F401  (the choices are read here by others)
    IMAGE_SEARCHES,
    READERS,
    STORE_MODES,
    TEXT_SEARCHES,
    Services,
    Tools,
    secret_mistake,
)
from mmsr1_jax.config.training import Data, Objective, Run, Update


@dataclasses.dataclass(kw_only=True, slots=True)
class Model:
    """How the policy is computed.

    Attributes:
      dtype: of parameters and matrix products, `float32` or `bfloat16`. Norms, rotations, softmax
        and log-probs are float32 always.
      attention: an implementation of `models/attention.py`; `auto` chooses by platform and length.
      remat: what a backward pass keeps of a layer: `none`, `dots` or `full` (least memory).
      logprob_chunk: tokens of a row whose [tokens, vocabulary] logits are held at a time.
    """

    dtype: str = setting("float32", one_of=DTYPES)
    attention: str = setting("auto", one_of=ATTENTION)
    remat: str = setting("none", one_of=REMAT)
    logprob_chunk: int = setting(512, at_least=1, at_most=2**20)


@dataclasses.dataclass(kw_only=True, slots=True)
class Mesh:
    """Devices along each mesh axis (`models/sharding.py`); one may be -1, "what is left".

    Attributes:
      replica: copies of the parameters.
      fsdp: parts that parameters and batch are cut into.
      tensor: parts that heads, feed-forward and vocabulary are cut into.
    """

    replica: int = setting(1, at_least=-1, at_most=65536)
    fsdp: int = setting(-1, at_least=-1, at_most=65536)
    tensor: int = setting(1, at_least=-1, at_most=65536)


@dataclasses.dataclass(kw_only=True, slots=True)
class Buckets:
    """The one table of shapes. A conversation is computed in the smallest that holds it.

    Attributes:
      lengths: tokens of a row, ascending. What is longer than the last is refused.
      image_windows: windows of 64 patches that a row's images may take, ascending; one more shape
        is "no images".
      batch_tokens: a program has as many rows as fit into this many tokens, at least one.
      batch_windows: and into this many windows of patches.
    """

    # The released pixel limits let a picture have 16,384 tokens in up to 1,250 windows.
    lengths: tuple[int, ...] = setting(
        (256, 512, 1024, 2048, 4096, 8192, 16384, 20480, 40960), at_most=2**24
    )
    image_windows: tuple[int, ...] = setting(
        (16, 32, 64, 128, 256, 512, 1024, 1280, 2560), at_most=2**20
    )
    batch_tokens: int = setting(8192, at_least=1, at_most=2**30)
    batch_windows: int = setting(128, at_least=1, at_most=2**24)


@dataclasses.dataclass(kw_only=True, slots=True)
class Images:
    """Pictures from outside.

    Attributes:
      max_file_pixels: a file with more is refused before it is decompressed.
      min_pixels, max_pixels: bounds on what the policy sees, after resizing; None for those of the
        checkpoint's own `preprocessor_config.json`.
    """

    max_file_pixels: int = setting(100_000_000, at_least=1, at_most=2**31 - 1)
    min_pixels: int | None = setting(None, at_least=1, at_most=2**31 - 1)
    max_pixels: int | None = setting(None, at_least=1, at_most=2**31 - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Rollout:
    """The rollout engine; there is one for each `mesh.tensor` devices of a process, and lanes and
    rows are of each. What an episode is depends on `rows` and on the tables, as its rounding
    does, and on nothing else here (but that `image_tokens` bounds the size of a picture).

    Attributes:
      lanes: episodes that are under way at a time, waiting for tools or not; each holds a KV cache.
      decode_batch_size: lanes that a decoding program computes at a time. With more lanes than
        rows, those that wait for a tool leave no row idle.
      decode_steps: decoding steps before the host looks at what was drawn.
      prefill_buckets: tokens that a program writes into a lane, ascending; a prompt or a tool's
        result is cut into such pieces.
      prefill_tokens: a program writes into as many lanes as fit into this many tokens, at least
        one.
      encode_windows: an image program has as many images as fit into this many windows of 64
        patches, at least one; an image's own windows are those of `buckets.image_windows`.
      image_cache_tokens: tokens of encoded images that are kept for use by other episodes. A
        picture has at most half of what is left of it beside one of `prefill_buckets`.
      precompile: compile all programs at the start, not each when it is first needed; then none
        is compiled later.
    """

    lanes: int = setting(16, at_least=1, at_most=65536)
    decode_batch_size: int = setting(16, at_least=1, at_most=65536)
    decode_steps: int = setting(16, at_least=1, at_most=65536)
    prefill_buckets: tuple[int, ...] = setting((32, 128, 512), at_most=2**20)
    prefill_tokens: int = setting(512, at_least=1, at_most=2**26)
    encode_windows: int = setting(16, at_least=1, at_most=2**20)
    image_cache_tokens: int = setting(40960, at_least=1, at_most=2**28)
    precompile: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class Turns:
    """The rules of an episode (`episodes/rules.py`). Defaults: the published ones.

    Attributes:
      max_turns: of the policy, at most; the last one should be an answer.
      max_searches: of both kinds together, at most.
      max_image_searches, max_text_searches: of each kind, at most.
      max_new_tokens: tokens that the policy may write in a turn.
      max_episode_tokens: of an episode in all: prompt, turns and results.
      min_turn_tokens: room that results leave for the turn after them.
      max_result_tokens: tokens of a user turn with results, pictures and instruction included.
      prompt_dir: a directory of prompts that replaces the built-in ones (`episodes/prompts.py`).
    """

    max_turns: int = setting(3, at_least=1, at_most=1000)
    max_searches: int = setting(2, at_least=0, at_most=1000)
    max_image_searches: int = setting(1, at_least=0, at_most=1000)
    max_text_searches: int = setting(2, at_least=0, at_most=1000)
    max_new_tokens: int = setting(2048, at_least=1, at_most=2**24)
    max_episode_tokens: int = setting(8192, at_least=1, at_most=2**24)
    min_turn_tokens: int = setting(256, at_least=1, at_most=2**24)
    max_result_tokens: int = setting(4096, at_least=1, at_most=2**24)
    prompt_dir: str | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: logits are divided by it; 0: always the likeliest token.
      top_k: only the k likeliest tokens; 0: all.
      top_p: of those, the smallest set that has this much of the probability; 1: all.
      seed: of the random numbers.
    """

    temperature: float = setting(1.0, at_least=0, at_most=1000)
    top_k: int = setting(0, at_least=0, at_most=2**31 - 1)
    top_p: float = setting(1.0, over=0, at_most=1)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Eval:
    """An evaluation (`evaluate.py`). Its top_k, top_p and seed are those of `Sampling`.

    Attributes:
      data: questions: parquet files, directories of them, or patterns; empty: `data.validation`.
      benchmark: that they are of, one of `data/benchmarks`; empty: files in veRL's schema.
      page_tokens: of a benchmark's documents: of all pages of a question together.
      max_questions: the first so many questions; 0: all.
      workflows: of `evaluation/workflows.py`, in the order of the table.
      num_samples: episodes of each question; with more than one there is pass@k.
      temperature: of sampling; 0: always the likeliest token.
    """

    data: tuple[str, ...] = ()
    benchmark: str = ""
    page_tokens: int = setting(6144, at_least=1, at_most=2**24)
    max_questions: int = setting(0, at_least=0, at_most=2**31 - 1)
    workflows: tuple[str, ...] = setting(("on_demand", "rag", "direct", "agent"), one_of=WORKFLOWS)
    num_samples: int = setting(1, at_least=1, at_most=100_000)
    temperature: float = setting(0.0, at_least=0, at_most=1000)


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    """All settings."""

    model: Model = dataclasses.field(default_factory=Model)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    buckets: Buckets = dataclasses.field(default_factory=Buckets)
    images: Images = dataclasses.field(default_factory=Images)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    turns: Turns = dataclasses.field(default_factory=Turns)
    tools: Tools = dataclasses.field(default_factory=Tools)
    services: Services = dataclasses.field(default_factory=Services)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    data: Data = dataclasses.field(default_factory=Data)
    rewards: Rewards = dataclasses.field(default_factory=Rewards)
    objective: Objective = dataclasses.field(default_factory=Objective)
    update: Update = dataclasses.field(default_factory=Update)
    run: Run = dataclasses.field(default_factory=Run)
    eval: Eval = dataclasses.field(default_factory=Eval)


def get_config() -> Config:
    """The defaults: what a command uses that is given no `--config`."""
    from mmsr1_jax.config import (
        settings as config,  # this file may be loaded under another name, as a config file
    )

    return config.Config()


def validate(config: Config) -> Config:
    """Return `config` where all settings are valid, see `allowed.check`, and fit together.

    Raises:
      ConfigError: naming the field.
    """
    if isinstance(config.sampling, Sampling):
        validate_sampling(config.sampling)
    bounds.check(config, "config")
    if problem := secret_mistake(dataclasses.asdict(config)):
        raise ConfigError(problem)
    for field in ("replica", "fsdp", "tensor"):
        if getattr(config.mesh, field) == 0:
            raise ConfigError(f"config.mesh.{field}=0 must be positive, or -1")
    if [config.mesh.replica, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        raise ConfigError("config.mesh: only one of replica, fsdp and tensor may be -1")
    _ascending("buckets.lengths", config.buckets.lengths)
    _ascending("buckets.image_windows", config.buckets.image_windows)
    _ascending("rollout.prefill_buckets", config.rollout.prefill_buckets)
    turns = config.turns
    if turns.min_turn_tokens > min(turns.max_new_tokens, turns.max_episode_tokens - 1):
        raise ConfigError(
            f"config.turns.min_turn_tokens={turns.min_turn_tokens} leaves no room in "
            f"max_new_tokens={turns.max_new_tokens} and "
            f"max_episode_tokens={turns.max_episode_tokens}"
        )
    if config.rollout.image_cache_tokens < 3 * config.rollout.prefill_buckets[-1]:
        raise ConfigError(
            f"config.rollout.image_cache_tokens={config.rollout.image_cache_tokens} must be at "
            f"least three times the last of prefill_buckets, {config.rollout.prefill_buckets[-1]}"
        )
    try:
        rewards.check(config.rewards)
    except rewards.RewardsError as error:
        raise ConfigError(f"config.rewards.{error}") from None
    mistake = training.mistake(config.objective, config.update, config.run)
    if mistake:
        raise ConfigError(f"config.{mistake}")
    buffer = config.objective.overlong_buffer
    if config.objective.overlong == "penalty" and buffer >= turns.max_episode_tokens:
        raise ConfigError(
            f"config.objective.overlong_buffer={buffer} must be less than "
            f"turns.max_episode_tokens={turns.max_episode_tokens}"
        )
    if not config.eval.workflows:
        raise ConfigError("config.eval.workflows=() must not be empty")
    if config.eval.num_samples > 1 and config.eval.temperature < 1e-6:
        raise ConfigError(
            f"config.eval.temperature={config.eval.temperature} must not be negative, and over 0 "
            f"where there are several eval.num_samples ({config.eval.num_samples}): they would be "
            "the same"
        )
    low, high = config.images.min_pixels, config.images.max_pixels
    if low is not None and high is not None and low > high:
        raise ConfigError(f"config.images.min_pixels={low} is more than max_pixels={high}")
    return config


def validate_sampling(sampling: Sampling) -> None:
    """Raise ConfigError where tokens cannot be drawn like that."""
    try:
        bounds.check(sampling, "sampling")
    except ConfigError as error:
        raise ConfigError(f"config.sampling: {str(error).removeprefix('sampling.')}") from None


def _ascending(field: str, sizes: Sequence[int]) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ConfigError(f"config.{field}={sizes} must be positive and ascending")
