"""Every setting, typed. A config file returns a `Config`; flags override single fields.

    python -m mmsr1_jax.score --config=configs/qwen7b.py --config.mesh.tensor=2 ...

A field that does not exist, a value of the wrong type, or values that do not fit together end the
program at once with one line that names the field.
"""

import dataclasses
import logging
import pathlib
import sys
import typing
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import config_flags

from mmsr1_jax import allowed, config_training, ending, rewards
from mmsr1_jax.allowed import ConfigError, setting
from mmsr1_jax.config_tools import (  # noqa: F401  (the choices are read here by others)
    IMAGE_SEARCHES,
    READERS,
    STORE_MODES,
    TEXT_SEARCHES,
    Services,
    Tools,
    secret_mistake,
)
from mmsr1_jax.config_training import Data, Objective, Run, Update
from mmsr1_jax.evaluation.workflows import WORKFLOWS
from mmsr1_jax.models.attention import IMPLEMENTATIONS
from mmsr1_jax.rewards import Rewards

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")


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
    attention: str = setting("auto", one_of=IMPLEMENTATIONS)
    remat: str = setting("none", one_of=REMAT)
    logprob_chunk: int = setting(512, at_least=1, at_most=2**20)


@dataclasses.dataclass(kw_only=True, slots=True)
class Mesh:
    """Devices along each mesh axis (`sharding.py`); one may be -1, "what is left".

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
      rows: lanes that a decoding program computes at a time. With more lanes than rows, those that
        wait for a tool leave no row idle.
      chunk: decoding steps before the host looks at what was drawn.
      extend_lengths: tokens that a program writes into a lane, ascending; a prompt or a tool's
        result is cut into such pieces.
      extend_tokens: a program writes into as many lanes as fit into this many tokens, at least one.
      encode_windows: an image program has as many images as fit into this many windows of 64
        patches, at least one; an image's own windows are those of `buckets.image_windows`.
      image_tokens: tokens of encoded images that are kept for use by other episodes. A picture has
        at most half of what is left of it beside one of `extend_lengths`.
      compile_ahead: compile all programs at the start, not each when it is first needed; then none
        is compiled later.
    """

    lanes: int = setting(16, at_least=1, at_most=65536)
    rows: int = setting(16, at_least=1, at_most=65536)
    chunk: int = setting(16, at_least=1, at_most=65536)
    extend_lengths: tuple[int, ...] = setting((32, 128, 512), at_most=2**20)
    extend_tokens: int = setting(512, at_least=1, at_most=2**26)
    encode_windows: int = setting(16, at_least=1, at_most=2**20)
    image_tokens: int = setting(40960, at_least=1, at_most=2**28)
    compile_ahead: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class Turns:
    """The rules of an episode (`rollout/rules.py`). Defaults: the published ones.

    Attributes:
      turns: of the policy, at most; the last one should be an answer.
      searches: of both kinds together, at most.
      image_searches, text_searches: of each kind, at most.
      turn_tokens: tokens that the policy may write in a turn.
      tokens: of an episode in all: prompt, turns and results.
      least_tokens: room that results leave for the turn after them.
      result_tokens: tokens of a user turn with results, pictures and instruction included.
      prompts: a directory of prompts that replaces the built-in ones (`rollout/prompts.py`).
    """

    turns: int = setting(3, at_least=1, at_most=1000)
    searches: int = setting(2, at_least=0, at_most=1000)
    image_searches: int = setting(1, at_least=0, at_most=1000)
    text_searches: int = setting(2, at_least=0, at_most=1000)
    turn_tokens: int = setting(2048, at_least=1, at_most=2**24)
    tokens: int = setting(8192, at_least=1, at_most=2**24)
    least_tokens: int = setting(256, at_least=1, at_most=2**24)
    result_tokens: int = setting(4096, at_least=1, at_most=2**24)
    prompts: str | None = None


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
      rows: the first so many questions; 0: all.
      workflows: of `evaluation/workflows.py`, in the order of the table.
      samples: episodes of each question; with more than one there is pass@k.
      temperature: of sampling; 0: always the likeliest token.
    """

    data: tuple[str, ...] = ()
    benchmark: str = ""
    page_tokens: int = setting(6144, at_least=1, at_most=2**24)
    rows: int = setting(0, at_least=0, at_most=2**31 - 1)
    workflows: tuple[str, ...] = setting(
        ("on_demand", "rag", "direct", "agent"), one_of=tuple(WORKFLOWS)
    )
    samples: int = setting(1, at_least=1, at_most=100_000)
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
    from mmsr1_jax import config  # this file may be loaded under another name, as a config file

    return config.Config()


def validate(config: Config) -> Config:
    """Return `config` where all settings are valid, see `allowed.check`, and fit together.

    Raises:
      ConfigError: naming the field.
    """
    if isinstance(config.sampling, Sampling):
        validate_sampling(config.sampling)
    allowed.check(config, "config")
    if problem := secret_mistake(dataclasses.asdict(config)):
        raise ConfigError(problem)
    for field in ("replica", "fsdp", "tensor"):
        if getattr(config.mesh, field) == 0:
            raise ConfigError(f"config.mesh.{field}=0 must be positive, or -1")
    if [config.mesh.replica, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        raise ConfigError("config.mesh: only one of replica, fsdp and tensor may be -1")
    _ascending("buckets.lengths", config.buckets.lengths)
    _ascending("buckets.image_windows", config.buckets.image_windows)
    _ascending("rollout.extend_lengths", config.rollout.extend_lengths)
    turns = config.turns
    if turns.least_tokens > min(turns.turn_tokens, turns.tokens - 1):
        raise ConfigError(
            f"config.turns.least_tokens={turns.least_tokens} leaves no room in "
            f"turn_tokens={turns.turn_tokens} and tokens={turns.tokens}"
        )
    if config.rollout.image_tokens < 3 * config.rollout.extend_lengths[-1]:
        raise ConfigError(
            f"config.rollout.image_tokens={config.rollout.image_tokens} must be at least three "
            f"times the last of extend_lengths, {config.rollout.extend_lengths[-1]}"
        )
    try:
        rewards.check(config.rewards)
    except rewards.RewardsError as error:
        raise ConfigError(f"config.rewards.{error}") from None
    mistake = config_training.mistake(config.objective, config.update, config.run)
    if mistake:
        raise ConfigError(f"config.{mistake}")
    buffer = config.objective.overlong_buffer
    if config.objective.overlong == "penalty" and buffer >= turns.tokens:
        raise ConfigError(
            f"config.objective.overlong_buffer={buffer} must be less than "
            f"turns.tokens={turns.tokens}"
        )
    if not config.eval.workflows:
        raise ConfigError("config.eval.workflows=() must not be empty")
    if config.eval.samples > 1 and config.eval.temperature < 1e-6:
        raise ConfigError(
            f"config.eval.temperature={config.eval.temperature} must not be negative, and over 0 "
            f"where there are several eval.samples ({config.eval.samples}): they would be the same"
        )
    low, high = config.images.min_pixels, config.images.max_pixels
    if low is not None and high is not None and low > high:
        raise ConfigError(f"config.images.min_pixels={low} is more than max_pixels={high}")
    return config


def validate_sampling(sampling: Sampling) -> None:
    """Raise ConfigError where tokens cannot be drawn like that."""
    try:
        allowed.check(sampling, "sampling")
    except ConfigError as error:
        raise ConfigError(f"config.sampling: {str(error).removeprefix('sampling.')}") from None


def _ascending(field: str, sizes: Sequence[int]) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ConfigError(f"config.{field}={sizes} must be positive and ascending")


def define_flag() -> flags.FlagHolder:
    """Defines `--config=FILE` and `--config.field=value`; call it before `run`."""
    return config_flags.DEFINE_config_file("config", None, "a file with get_config(); see configs/")


def run(
    main: Callable[[Sequence[str]], int | None], *, interrupted: int = ending.INTERRUPTED
) -> None:
    """`absl.app.run`, but a mistake in flags or settings ends the program with one line, and so
    does Ctrl-C, with the exit code `interrupted` (`ending.guard`). Does not return."""

    def parse(argv):
        try:
            return _parse_flags(argv)
        except (flags.Error, ConfigError, OSError, *_CONFIG_FILE_ERRORS) as error:
            sys.exit(f"error: {_one_line(error)}")

    def quietly(argv):
        # They tell of every backend that there is not, and of every file that is written. Here, as
        # absl sets its own level after it has read the flags.
        for name in ("jax", "absl"):
            logging.getLogger(name).setLevel(logging.WARNING)
        return main(argv)

    app.run(ending.guard(quietly, interrupted=interrupted), flags_parser=parse)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    if "config" in flags.FLAGS:
        names = [a.lstrip("-").split("=")[0] for a in argv[1:] if a.startswith("-")]
        for name in names:
            if name.startswith("config."):
                _check_field(name)
        if "config" not in names:
            argv = [argv[0], f"--config={pathlib.Path(__file__)}", *argv[1:]]
        # The file has to be known before what overrides it.
        files = [a for a in argv[1:] if a.startswith(("--config=", "-config="))]
        argv = [argv[0], *files, *(a for a in argv[1:] if a not in files)]
        sys.argv = argv  # where ml_collections looks them up
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
        raise flags.Error(f"unexpected argument {rest[1]!r}")
    if "config" in flags.FLAGS:
        file = flags.FLAGS["config"].config_filename.split(":")[0]
        if not pathlib.Path(file).is_file():
            raise ConfigError(f"--config={file}: no such file")
        config = flags.FLAGS["config"].value
        if not isinstance(config, Config):
            raise ConfigError(f"--config={file}: get_config() must return a config.Config")
        validate(config)
    return rest


def _check_field(name: str) -> None:
    """Raises ConfigError where `config.part.field` is no setting."""
    kind, known = Config, "config"
    for part in name.split(".")[1:]:
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            raise ConfigError(f"{name}: {known} has no field {part!r}, only {', '.join(hints)}")
        kind, known = hints[part], f"{known}.{part}"


# What reading a config file or looking up a field in it may raise.
_CONFIG_FILE_ERRORS = (AttributeError, KeyError, TypeError, ValueError, ImportError, SyntaxError)


def _one_line(error: BaseException) -> str:
    """The last line of a message, which says it: ml_collections puts tracebacks before it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
