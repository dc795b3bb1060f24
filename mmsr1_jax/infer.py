"""Answer one question with a policy that may search.

    python -m mmsr1_jax.infer --model=DIR --image=PATH --question="..." \\
        [--tools.index=DIR] [--json] [--config=FILE --config.sampling.temperature=0.7 ..]

Print the turns as they arrive: reasoning, search, results, answer. With `--json`, print only the
whole episode as one JSON object, including tokens and log-probs. The exit code is 1 if the question
cannot be answered, such as one with an unreadable image.

Decoding is greedy unless a `--config.sampling` flag is given, since the sampling settings of a
config file are meant for training. Images are downscaled to at most 2 x 672 x 672 pixels, as in the
published script, unless `config.images.max_pixels` is set or the checkpoint has a lower limit.
"""

import json
from collections.abc import Sequence

import numpy as np
from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.episodes.episode import Episode, Example
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout.build import make_engine
from mmsr1_jax.utils.logs import log


def main(argv: Sequence[str]) -> int:
    del argv
    config = _CONFIG.value
    if _INDEX.value is not None:
        config.tools.index = _INDEX.value
    if not any(name.startswith("config.sampling.") for name in flags.FLAGS):
        config.sampling.temperature = 0.0
    # One question needs one lane, and only the programs that it uses need to be compiled.
    config.rollout.lanes = config.rollout.decode_batch_size = 1
    config.rollout.precompile = False
    engine = make_engine(config, _MODEL.value, engines=1)
    example = Example(question=_QUESTION.value, images=_IMAGE.value)
    on_event = (lambda episode, event: None) if _JSON.value else Printer(engine.processor)
    (episode,) = engine.rollout([example], on_event=on_event)
    engine.close()
    if _JSON.value:
        print(json.dumps(episode.to_json(engine.processor), ensure_ascii=False))
    if episode.end == "error":
        log.error("error: %s", episode.error)
    return 1 if episode.end == "error" else 0


class Printer:
    """Printer of an episode's turns as they arrive: an `OnEvent` callback."""

    def __init__(self, processor: Processor):
        self._processor = processor

    def __call__(self, episode: Episode, event: str) -> None:
        if event == "turn":
            self._print_turn(episode)
        elif event == "reply":
            text = self._processor.decode(self._collapse_images(episode.segments[-1].tokens))
            text = text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0]
            print(f"--- to the policy\n{text}\n", flush=True)
        elif event == "end":
            calls = [call for call in episode.calls if call.status != "refused"]
            print(f"--- end: {episode.end}, {len(episode.turns)} turns, {len(calls)} searches")
            print(f"answer: {episode.answer}", flush=True)

    def _print_turn(self, episode: Episode) -> None:
        turn = episode.turns[-1]
        print(f"--- turn {len(episode.turns)}")
        if turn.strict_form is None:  # the turn has more than reasoning and action
            print(self._processor.decode(episode.segments[-1].tokens))
        else:
            print(f"reasoning: {turn.reason}")
        if turn.problem:
            print(f"(malformed: {turn.problem})")
        if turn.action:
            print(f"{turn.action.replace('_', ' ')}: {turn.payload or 'the whole image'}")
        print(flush=True)

    def _collapse_images(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        """Collapse the placeholders of each image to one."""
        image = self._processor.control["<|image_pad|>"]
        return [t for i, t in enumerate(tokens) if t != image or tokens[i - 1] != image]


if __name__ == "__main__":
    _CONFIG = cli.define_flag()
    _MODEL = flags.DEFINE_string("model", None, "HF directory of the policy", required=True)
    _IMAGE = flags.DEFINE_multi_string("image", [], "image of the question; may be repeated")
    _QUESTION = flags.DEFINE_string("question", None, "the question", required=True)
    _INDEX = flags.DEFINE_string(
        "tools.index",
        None,
        "local index to search in (config.tools.index); see mmsr1_jax.scripts.index",
    )
    _JSON = flags.DEFINE_bool("json", False, "print the episode as JSON")
    cli.run(main)
