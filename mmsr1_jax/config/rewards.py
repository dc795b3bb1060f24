"""Reward settings. The other settings are in `config/settings.py`."""

import dataclasses

from mmsr1_jax.config.choices import MATCHES
from mmsr1_jax.config.errors import UserError

# Action names used in `Rewards.sequences`.
ACTIONS = ("answer", "image", "text")
SEQUENCES = ("answer", "image,answer", "text,answer", "image,text,answer")


class RewardsError(UserError):
    """An invalid reward setting; the message begins with the field."""


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
        (`turns.strict_form`). If false, any words may (`turns.published_form`, the published rule).
    """

    match: str = "EM"
    search_penalty: float = 0.1
    per_search_penalty: bool = False
    penalty_warmup: int = 0
    format_penalty: float = 0.1
    sequences: tuple[str, ...] = SEQUENCES
    strict_form: bool = False


def check(settings: Rewards) -> Rewards:
    """Return `settings` if they are valid. Raise RewardsError otherwise."""
    if settings.match not in MATCHES:
        raise RewardsError(f"match={settings.match!r} is not one of {', '.join(MATCHES)}")
    for field in ("search_penalty", "format_penalty"):
        value = getattr(settings, field)
        if not 0 <= value <= 1:
            raise RewardsError(f"{field}={value} must be in [0, 1]")
    if settings.penalty_warmup < 0:
        raise RewardsError(f"penalty_warmup={settings.penalty_warmup} must not be negative")
    for sequence in settings.sequences:
        if not set(sequence.split(",")) <= set(ACTIONS):
            raise RewardsError(
                f"sequences: {sequence!r} is not a list of {', '.join(ACTIONS)} with commas "
                "and no spaces"
            )
    return settings
