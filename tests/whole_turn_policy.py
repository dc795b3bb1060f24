"""Episodes of an engine whose turns are single tokens, so that replaying their texts is exact."""

import dataclasses
import functools
import json

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.scripts import random_policy
from tests.engines import examples, make_config, search_tools
from tests.scripted_policy import config_for, scripted_tokenizer
from tests.sft_files import MODEL

VOCAB_SIZE = 2200  # most tokens are whole turns, which the tokenizer also produces from their text
ACTIONS = {
    "<reason>r{}</reason> <text_search>bridge {}</text_search>": 700,
    "<reason>r{}</reason> <search><img></search>": 500,
    "<reason>r{}</reason> <answer>a {}</answer>": 300,
    "b{}</search>": 100,
}


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Episodes of an engine, with the processor and settings that it used."""

    episodes: list[Episode]
    processor: Processor
    config: settings.Config
    model_config: ModelConfig


def tokenizer() -> str:
    """Return the text of a `tokenizer.json` in which turns are tokens."""
    data = json.loads(scripted_tokenizer(VOCAB_SIZE, ACTIONS))
    data["model"]["ignore_merges"] = True  # a text that is a token becomes that token
    data["pre_tokenizer"]["use_regex"] = False
    return json.dumps(data)


@functools.cache
def roll_out() -> Rollout:
    """Return 48 episodes of a random policy, sorted by index; they must not be changed."""
    processor = Processor(tokenizer(), random_policy.IMAGES)
    model = random_policy.random_model(config_for(VOCAB_SIZE, MODEL), seed=5)
    limits = dataclasses.replace(make_config().turns, max_episode_tokens=700, max_text_searches=1)
    config = make_config(limits=limits)
    engine = Engine(model, processor, config, search_tools())
    episodes = sorted(engine.rollout(examples(6), group_size=8), key=lambda e: e.index)
    engine.close()
    return Rollout(episodes, processor, config, model.config)
