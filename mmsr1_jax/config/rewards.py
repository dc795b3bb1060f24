"""The settings of rewards; `config/settings.py` has the others."""

import dataclasses

from mmsr1_jax.config.choices import MATCHES

# Names of actions in `Rewards.sequences`.
ACTIONS = ("answer", "image", "text")
SEQUENCES = ("answer", "image,answer", "text,answer", "image,text,answer")


class RewardsError(ValueError):
    """A setting of the reward that cannot be; the message begins with the field."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Rewards:
    """How episodes are scored. Defaults: the published scoring.

    Attributes:
      match: `EM`: the answer is a gold one, after `normalise`; `SubEM`: it holds one.
      search_penalty: p, the share of the reward of a correct answer that searching costs.
      per_search_penalty: p is paid for each search, not once: the factor is (1 - p)^searches.
      penalty_warmup: steps over which the penalty grows from -p (searches are rewarded) to p; 0: it
        is p from the start.
      format_penalty: a, the share of the reward that is for the form.
      sequences: orders of actions that are of the right form, each a list of `answer`, `image` and
        `text` with commas, of any length. The published ones leave out `text,text,answer`,
        although two text searches are allowed.
      strict_form: Whether nothing but white space may stand between the reasoning of a turn and its
        action (`turns.strict_form`). False: the published form, with any words between them
        (`turns.published_form`).
    """

    match: str = "EM"
    search_penalty: float = 0.1
    per_search_penalty: bool = False
    penalty_warmup: int = 0
    format_penalty: float = 0.1
    sequences: tuple[str, ...] = SEQUENCES
    strict_form: bool = False


def check(settings: Rewards) -> Rewards:
    """Returns `settings` if they can be, else raises RewardsError."""
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
