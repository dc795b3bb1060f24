"""Reward settings. The other settings are in `config/settings.py`."""

import dataclasses

from mmsr1_jax.config import bounds
from mmsr1_jax.config.bounds import ConfigError, setting
from mmsr1_jax.config.choices import MATCHES

# Action names used in `Rewards.sequences`.
ACTIONS = ("answer", "image", "text")
SEQUENCES = ("answer", "image,answer", "text,answer", "image,text,answer")


@dataclasses.dataclass(kw_only=True, slots=True)
class Rewards:
    """Reward function. The defaults are the published scoring.

    Attributes:
      match: Criterion for a correct answer: `EM` if it equals a gold answer after `normalise`,
        `SubEM` if it contains one.
      search_penalty: Fraction p of a correct answer's reward that is deducted if the episode
        searches.
      per_search_penalty: Whether p applies to each search, with the factor (1 - p)^searches,
        instead of once per episode.
      penalty_warmup: Number of steps over which the penalty grows from -p (searches are rewarded)
        to p. With 0 it is p from the start.
      format_penalty: Weight a of the format reward, as a fraction of the total reward.
      sequences: Action sequences that count as well formed, each a comma-separated list of
        `answer`, `image` and `text`, of any length. The published ones omit `text,text,answer`,
        although two text searches are allowed.
      strict_form: Whether only white space may separate the reasoning of a turn from its action
        (`turns.strict_form`). If false, any text may (`turns.published_form`, the published rule).
    """

    match: str = setting("EM", one_of=MATCHES)
    search_penalty: float = setting(0.1, at_least=0, at_most=1)
    per_search_penalty: bool = False
    penalty_warmup: int = setting(0, at_least=0, at_most=2**31 - 1)
    format_penalty: float = setting(0.1, at_least=0, at_most=1)
    sequences: tuple[str, ...] = SEQUENCES
    strict_form: bool = False


def check(settings: Rewards, name: str = "rewards") -> Rewards:
    """Return `settings` if their types and values are valid.

    Args:
      settings: Settings to check.
      name: Name of `settings` in error messages.

    Raises:
      ConfigError: A setting is invalid; the message names the field.
    """
    bounds.check(settings, name)
    for sequence in settings.sequences:
        if not set(sequence.split(",")) <= set(ACTIONS):
            raise ConfigError(
                f"{name}.sequences={sequence!r:.100} must be a list of {', '.join(ACTIONS)}, "
                "separated by commas without spaces"
            )
    return settings
