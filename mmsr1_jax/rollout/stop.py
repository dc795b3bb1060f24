"""Stop strings on the device: an automaton over the bytes of every vocabulary token.

Tags do not fall on token borders: a BPE merges `?</` and `>\n`. So the automaton reads bytes, and a
table says for every state and token where that token's bytes lead. Decoding carries one small
integer a lane and looks it up; no text is ever searched.

    states      0 .. R-1                 running: how much of a stop string has been read
                R .. R+n-1               stop string i is complete
                R+n ..                   end token j was read

A finished state stays what it is, whatever follows. Example, for the one stop string `</a>`, R = 4:

    token          `x</`   `a`   `>\n`
    state      0      2     3      4        complete inside the token `>\n`
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class StopTable:
    """The automaton.

    Attributes:
      next_state: int16[states, V]: the state after a token.
      running: R; a state from R on means that the turn has ended.
      reasons: why it has: for state R + i, `reasons[i]` is the stop string or the end token's name.
    """

    next_state: np.ndarray
    running: int
    reasons: tuple[str, ...]

    def reason(self, state: int) -> str | None:
        """What ended the turn, None while it runs."""
        return self.reasons[state - self.running] if state >= self.running else None


def build(
    token_bytes: Sequence[bytes],
    vocab_size: int,
    stops: Sequence[str],
    end_tokens: dict[str, int],
) -> StopTable:
    """Builds the table (Aho and Corasick, CACM 18(6), 1975).

    Args:
      token_bytes: the bytes of every token, by id.
      vocab_size: columns of the table, V; ids that the tokenizer does not have change nothing.
      stops: the strings at which a turn pauses. Where two end at the same byte, the longer counts.
      end_tokens: tokens that end a turn by themselves, id by name.

    Raises:
      ValueError: no stop string, or an empty one.
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
    """int16[R + n, 256]: the state after a byte; state R + i: `stops[i]` is complete."""
    prefixes = [b""]
    for stop in stops:
        prefixes += [stop[:i] for i in range(1, len(stop)) if stop[:i] not in prefixes]
    # A prefix that already holds a whole stop string is never reached.
    prefixes = [p for p in prefixes if not any(stop in p for stop in stops)]
    state = {prefix: i for i, prefix in enumerate(prefixes)}
    longest_first = sorted(range(len(stops)), key=lambda i: -len(stops[i]))
    delta = np.zeros((len(prefixes) + len(stops), 256), np.int16)
    for prefix, number in state.items():
        for byte in range(256):
            read = prefix + bytes([byte])
            done = next((i for i in longest_first if read.endswith(stops[i])), None)
            if done is not None:
                delta[number, byte] = len(prefixes) + done
                continue
            while read not in state:  # the longest suffix that is the beginning of a stop string
                read = read[1:]
            delta[number, byte] = state[read]
    for i in range(len(prefixes), len(delta)):
        delta[i] = i
    return delta
