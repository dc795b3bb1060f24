"""All settings as typed dataclasses. A config file returns a `Config`; flags override its fields.

    python -m mmsr1_jax.score --config=configs/qwen7b.py --config.mesh.tensor=2 ...

An unknown field, a value of the wrong type or an inconsistent combination of values ends the
program at startup with a one-line error that names the field.
"""

import dataclasses
from collections.abc import Sequence

from mmsr1_jax.config import bounds, construction, rewards, training
from mmsr1_jax.config.bounds import ConfigError, setting
from mmsr1_jax.config.choices import ATTENTION, DTYPES, LOCKSTEP, REMAT, WORKFLOWS
from mmsr1_jax.config.construction import Construction
from mmsr1_jax.config.rewards import Rewards
from mmsr1_jax.config.tools import Services, Tools, credential_error
from mmsr1_jax.config.training import Data, Objective, Run, Update


@dataclasses.dataclass(kw_only=True, slots=True)
class Model:
    """Numerics and implementation of the policy.

    Attributes:
      dtype: Dtype of parameters and matrix products, `float32` or `bfloat16`. Norms, rotary
        embeddings, softmax and log-probs are always computed in float32.
      attention: Implementation of attention (`models/attention.py`). `auto` selects one by platform
        and length.
      remat: Rematerialisation of layers in the backward pass: `none`, `dots` or `full` (least
        memory).
      logprob_chunk: Number of tokens of a row whose logits over the whole vocabulary take as much
        memory as those that are computed at a time, a block of the vocabulary for all tokens.
    """

    dtype: str = setting("float32", one_of=DTYPES)
    attention: str = setting("auto", one_of=ATTENTION)
    remat: str = setting("none", one_of=REMAT)
    logprob_chunk: int = setting(512, at_least=1, at_most=2**20)


@dataclasses.dataclass(kw_only=True, slots=True)
class Mesh:
    """Number of devices along each mesh axis (`models/sharding.py`).

    One of the sizes may be -1, which is then inferred from the number of devices.

    Attributes:
      replica: Number of copies of the parameters.
      fsdp: Number of shards of the parameters and the batch.
      tensor: Number of shards of attention heads, feed-forward layers and vocabulary.
    """

    replica: int = setting(1, at_least=-1, at_most=65536)
    fsdp: int = setting(-1, at_least=-1, at_most=65536)
    tensor: int = setting(1, at_least=-1, at_most=65536)


@dataclasses.dataclass(kw_only=True, slots=True)
class Processes:
    """Time limits of a run on several hosts, one process each (`utils/processes.py`).

    Attributes:
      start_seconds: Seconds for which processes wait for each other at the start.
      timeout_seconds: Seconds for which they wait later. The rollouts of a step may not differ more
        in length.
      update_seconds: Seconds after which an update is taken to be stuck.
      heartbeat_seconds: Seconds of silence after which a process is taken to be dead.
    """

    start_seconds: float = setting(300.0, at_least=1, at_most=3600)
    timeout_seconds: float = setting(1800.0, at_least=1, at_most=86400)
    update_seconds: float = setting(1800.0, at_least=1, at_most=86400)
    heartbeat_seconds: float = setting(30.0, at_least=4, at_most=3600)


@dataclasses.dataclass(kw_only=True, slots=True)
class Buckets:
    """Shape buckets. A conversation is computed in the smallest bucket that it fits into.

    Attributes:
      lengths: Row lengths in tokens, ascending. Longer conversations are rejected.
      image_windows: Numbers of windows of 64 patches for the images of a row, ascending. Smaller
        windows, at the edges of images, share one. Rows without images have a shape of their own.
      batch_tokens: Maximum number of tokens in a batch, which bounds its number of rows. A batch
        has at least one row.
      batch_windows: Maximum number of windows of patches in a batch, which also bounds its number
        of rows.
    """

    # The released pixel limits allow images of 16,384 tokens in up to 1,250 windows.
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
    """Input images.

    Attributes:
      max_file_pixels: Maximum number of pixels of an image file. Larger files are rejected before
        they are decompressed.
      min_pixels, max_pixels: Bound on the image size after resizing, in pixels. None takes the
        bound from the checkpoint's `preprocessor_config.json`.
    """

    max_file_pixels: int = setting(100_000_000, at_least=1, at_most=2**31 - 1)
    min_pixels: int | None = setting(None, at_least=1, at_most=2**31 - 1)
    max_pixels: int | None = setting(None, at_least=1, at_most=2**31 - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Rollout:
    """Rollout engine.

    A process runs one engine for each group of `mesh.tensor` devices. All sizes are per engine.

    The shapes (`decode_batch_size`, `prefill_buckets`, `prefill_tokens`, `encode_windows`,
    `page_size`) affect rounding, and therefore which episodes are sampled. `lanes`,
    `cache_tokens`, `decode_steps`, `image_cache_tokens` and `precompile` do not, except that
    `image_cache_tokens` bounds the size of an image.

    Attributes:
      lanes: Number of concurrent episodes, including those that wait for tools.
      cache_tokens: Number of tokens of all lanes that the KV cache holds; episodes of a group share
        those of their prompt. 0: `lanes` times `turns.max_episode_tokens`. If it is full, the
        youngest episodes move to host memory until there is room (metric `rollout/offloaded`).
      page_size: Number of tokens in a page of the KV cache.
      decode_batch_size: Number of lanes that a decoding program computes at a time. With more lanes
        than this, lanes that wait for a tool leave no row of the batch idle.
      decode_steps: Number of decoding steps between two reads of the sampled tokens by the host.
      prefill_buckets: Chunk lengths in tokens, ascending, into which a prompt or a tool result is
        split for prefill.
      prefill_tokens: Maximum number of tokens of a prefill program, which bounds its number of
        lanes. It has at least one lane.
      encode_windows: Maximum number of windows of 64 patches of an image encoding program, which
        bounds its number of images. It has at least one image, whose windows are padded to
        `buckets.image_windows`.
      image_cache_tokens: Number of tokens of encoded images that are cached for use by several
        episodes. An image may take at most half of what remains after subtracting the largest of
        `prefill_buckets`.
      precompile: Whether to compile all programs at startup instead of at their first use, so that
        none is compiled later.
      lockstep: Whether the engines of all processes run their programs as one, because the devices
        cannot run those of one engine alone. `auto`: on TPU v5e and v6e if `mesh.tensor` > 1.
    """

    lanes: int = setting(16, at_least=1, at_most=65536)
    cache_tokens: int = setting(0, at_least=0, at_most=2**31 - 1)
    page_size: int = setting(128, at_least=1, at_most=65536)
    decode_batch_size: int = setting(16, at_least=1, at_most=65536)
    decode_steps: int = setting(16, at_least=1, at_most=65536)
    prefill_buckets: tuple[int, ...] = setting((32, 128, 512), at_most=2**20)
    prefill_tokens: int = setting(512, at_least=1, at_most=2**26)
    encode_windows: int = setting(16, at_least=1, at_most=2**20)
    image_cache_tokens: int = setting(40960, at_least=1, at_most=2**28)
    precompile: bool = True
    lockstep: str = setting("auto", one_of=LOCKSTEP)


@dataclasses.dataclass(kw_only=True, slots=True)
class Turns:
    """Rules of an episode (`episodes/rules.py`). The defaults are the published rules.

    Attributes:
      max_turns: Maximum number of turns of the policy. The last one should be an answer.
      max_searches: Maximum number of searches of both kinds together.
      max_image_searches, max_text_searches: Maximum number of searches of this kind.
      max_new_tokens: Maximum number of tokens that the policy writes in a turn.
      max_episode_tokens: Maximum number of tokens of an episode, including prompt, turns and search
        results.
      min_turn_tokens: Number of tokens that prompts and search results leave free for the next
        turn.
      max_result_tokens: Maximum number of tokens of a user turn with search results, including
        images and instruction.
      prompt_dir: Directory of prompts that replaces the built-in ones (`episodes/prompts.py`).
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
    """Sampling of tokens.

    Attributes:
      temperature: Sampling temperature. 0 selects greedy decoding.
      top_k: Number of most likely tokens to sample from. 0 keeps all tokens.
      top_p: Nucleus sampling threshold, applied after `top_k`: tokens are sampled from the smallest
        set with at least this probability. 1 keeps all tokens.
      seed: Random seed.
    """

    temperature: float = setting(1.0, at_least=0, at_most=1000)
    top_k: int = setting(0, at_least=0, at_most=2**31 - 1)
    top_p: float = setting(1.0, over=0, at_most=1)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1)


@dataclasses.dataclass(kw_only=True, slots=True)
class Eval:
    """Evaluation (`evaluate.py`). It takes top_k, top_p and seed from `Sampling`.

    Attributes:
      data: Question files: parquet files, directories of them, or glob patterns. If empty,
        `data.validation` is used.
      benchmark: Benchmark that the questions belong to, one of `data/benchmarks`. If empty, the
        files follow the veRL schema.
      page_tokens: Maximum number of image tokens for all document pages of a question together, in
        benchmarks with documents.
      max_questions: Number of questions taken from the start. With 0, all questions are used.
      workflows: Workflows to evaluate (`evaluation/workflows.py`), in the order of the table.
      num_samples: Number of episodes for each question. With more than one, pass@k is reported.
      temperature: Sampling temperature. 0 selects greedy decoding.
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
    processes: Processes = dataclasses.field(default_factory=Processes)
    eval: Eval = dataclasses.field(default_factory=Eval)
    construction: Construction = dataclasses.field(default_factory=Construction)


def get_config() -> Config:
    """Return the default settings, which commands use without `--config`."""
    from mmsr1_jax.config import (
        settings as config,  # this file may be loaded under another name, as a config file
    )

    return config.Config()


def validate(config: Config) -> Config:
    """Return `config` if all settings are valid (see `bounds.check`) and consistent.

    Raises:
      ConfigError: A setting is invalid or inconsistent with another; the message names the field.
    """
    if isinstance(config.sampling, Sampling):
        validate_sampling(config.sampling)
    bounds.check(config, "config")
    if problem := credential_error(dataclasses.asdict(config)):
        raise ConfigError(problem)
    _check_mesh(config.mesh)
    _check_ascending("buckets.lengths", config.buckets.lengths)
    _check_ascending("buckets.image_windows", config.buckets.image_windows)
    _check_ascending("rollout.prefill_buckets", config.rollout.prefill_buckets)
    _check_token_limits(config)
    rewards.check(config.rewards, "config.rewards")
    construction.check(config.construction)
    if problem := training.inconsistency(config.objective, config.update, config.run):
        raise ConfigError(f"config.{problem}")
    if not config.eval.workflows:
        raise ConfigError("config.eval.workflows=() must not be empty")
    if config.eval.num_samples > 1 and config.eval.temperature < 1e-6:
        raise ConfigError(
            f"config.eval.temperature={config.eval.temperature} must be greater than 0 with "
            f"eval.num_samples={config.eval.num_samples}, since all samples of a question would be "
            "the same"
        )
    low, high = config.images.min_pixels, config.images.max_pixels
    if low is not None and high is not None and low > high:
        raise ConfigError(f"config.images.min_pixels={low} must be at most max_pixels={high}")
    return config


def validate_sampling(sampling: Sampling) -> None:
    """Raise ConfigError if a sampling setting is invalid."""
    try:
        bounds.check(sampling, "sampling")
    except ConfigError as error:
        raise ConfigError(f"config.sampling: {str(error).removeprefix('sampling.')}") from None


def _check_mesh(mesh: Mesh) -> None:
    for field in ("replica", "fsdp", "tensor"):
        if getattr(mesh, field) == 0:
            raise ConfigError(f"config.mesh.{field}=0 must be positive, or -1")
    if [mesh.replica, mesh.fsdp, mesh.tensor].count(-1) > 1:
        raise ConfigError("config.mesh: only one of replica, fsdp and tensor may be -1")


def _check_token_limits(config: Config) -> None:
    turns, rollout, objective = config.turns, config.rollout, config.objective
    if turns.min_turn_tokens > min(turns.max_new_tokens, turns.max_episode_tokens - 1):
        raise ConfigError(
            f"config.turns.min_turn_tokens={turns.min_turn_tokens} must be at most "
            f"max_new_tokens={turns.max_new_tokens} and less than "
            f"max_episode_tokens={turns.max_episode_tokens}"
        )
    size = rollout.page_size
    smallest = (-(-turns.max_episode_tokens // size) + 1) * size  # an episode and a page to copy to
    if 0 < rollout.cache_tokens < smallest:
        raise ConfigError(
            f"config.rollout.cache_tokens={rollout.cache_tokens} must be at least {smallest}, for "
            f"an episode of turns.max_episode_tokens={turns.max_episode_tokens} and another page; "
            "0 is enough for all lanes"
        )
    if rollout.image_cache_tokens < 3 * rollout.prefill_buckets[-1]:
        raise ConfigError(
            f"config.rollout.image_cache_tokens={rollout.image_cache_tokens} must be at least "
            f"three times the last of prefill_buckets, {rollout.prefill_buckets[-1]}"
        )
    buffer = objective.overlong_buffer
    if objective.overlong == "penalty" and buffer >= turns.max_episode_tokens:
        raise ConfigError(
            f"config.objective.overlong_buffer={buffer} must be less than "
            f"turns.max_episode_tokens={turns.max_episode_tokens}"
        )


def _check_ascending(field: str, sizes: Sequence[int]) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ConfigError(f"config.{field}={sizes} must be positive and ascending")
