"""Stop strings on the device: an automaton over the bytes of every vocabulary token.

Tags do not align with token boundaries: a BPE merges `?</` and `>\n`. The automaton therefore reads
bytes, and a table maps every state and token to the state after that token's bytes. Decoding
carries one small integer per lane and looks it up; no text is ever searched.

    states      0 .. R-1                 running: matched prefix of a stop string
                R .. R+n-1               stop string i is complete
                R+n ..                   end token j was read

Final states are absorbing. Example for the single stop string `</a>`, with R = 4:

    token          `x</`   `a`   `>\n`
    state      0      2     3      4        complete inside the token `>\n`
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class StopTable:
    """Transition table of the stop automaton.

    Attributes:
      next_state: State after each token, int16[states, V].
      running: Number of running states, R. The turn has ended in states from R on.
      reasons: Stop string or name of the end token that leads to each state from R on.
    """

    next_state: np.ndarray
    running: int
    reasons: tuple[str, ...]

    def reason(self, state: int) -> str | None:
        """Return the stop string or end token that ended the turn; None while it is running."""
        return self.reasons[state - self.running] if state >= self.running else None


def build(
    token_bytes: Sequence[bytes],
    vocab_size: int,
    stops: Sequence[str],
    end_tokens: dict[str, int],
) -> StopTable:
    """Build the transition table (Aho and Corasick, CACM 18(6), 1975).

    Args:
      token_bytes: Bytes of every token, by id.
      vocab_size: Number of columns of the table, V. Ids unknown to the tokenizer keep the state.
      stops: Strings at which a turn pauses. If two end at the same byte, the longer one counts.
      end_tokens: Ids of the tokens that end a turn by themselves, by name.

    Raises:
      ValueError: There is no stop string, or one is empty.
    """
    if not stops or not all(stops):
        raise ValueError(f"stop strings must not be empty: {list(stops)}")
    delta = _byte_automaton([s.encode() for s in stops])
    states = len(delta)
    running = states - len(stops)
    column = np.arange(states, dtype=np.int16)[:, None]
    table = np.repeat(column, vocab_size, axis=1)
    by_length = sorted(range(len(token_bytes)), key=lambda i: -len(token_bytes[i]))
    lengths = np.array([len(token_bytes[i]) for i in by_length])
    order = np.array(by_length)
    for position in range(int(lengths.max(initial=0))):
        longer = order[: np.searchsorted(-lengths, -position)]  # tokens with a byte here
        byte = np.array([token_bytes[i][position] for i in longer])
        table[:, longer] = delta[table[:, longer], byte]
    ends = states + np.arange(len(end_tokens), dtype=np.int16)
    table = np.concatenate([table, np.repeat(ends[:, None], vocab_size, axis=1)])
    for state, token in zip(ends, end_tokens.values(), strict=True):
        table[:running, token] = state
    return StopTable(table, running, (*stops, *end_tokens))


def _byte_automaton(stops: Sequence[bytes]) -> np.ndarray:
    """Return the state after each byte, int16[R + n, 256]; R + i means `stops[i]` is complete."""
    prefixes = [b""]
    for stop in stops:
        prefixes += [stop[:i] for i in range(1, len(stop)) if stop[:i] not in prefixes]
    # A prefix that already contains a whole stop string is never reached.
    prefixes = [p for p in prefixes if not any(stop in p for stop in stops)]
    state = {prefix: i for i, prefix in enumerate(prefixes)}
    longest_first = sorted(range(len(stops)), key=lambda i: -len(stops[i]))
    delta = np.zeros((len(prefixes) + len(stops), 256), np.int16)
    for prefix, index in state.items():
        for byte in range(256):
            read = prefix + bytes([byte])
            complete = next((i for i in longest_first if read.endswith(stops[i])), None)
            if complete is not None:
                delta[index, byte] = len(prefixes) + complete
                continue
            while read not in state:  # find the longest suffix that begins a stop string
                read = read[1:]
            delta[index, byte] = state[read]
    for i in range(len(prefixes), len(delta)):
        delta[i] = i
    return delta
