"""A random policy that acts: its tokenizer has tokens whose bytes are whole actions, so that turns
end at random lengths in searches, answers and nonsense."""

import dataclasses
import json

import numpy as np

from mmsr1_jax.models import qwen2_5_vl
from mmsr1_jax.models.qwen2_5_vl import ModelConfig
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.scripts import random_policy

# Turns, and how many tokens there are of each; what follows a tag may be in its token.
ACTIONS = {
    "<reason>r{}</reason> <text_search>bridge {}</text_search>\n": 24,
    "<reason>r{}</reason> <search><img></search>": 16,
    "<reason>r{}</reason> <answer>a {}</answer>.\n": 12,
    "b{}</search>": 12,
}


def acting_tokenizer(vocab_size: int, actions=ACTIONS) -> str:
    """The `tokenizer.json` for a model of that vocabulary (it has a few tokens less)."""
    raw = json.loads(random_policy.make_tokenizer().to_str())
    vocabulary = raw["model"]["vocab"]
    letter = str.maketrans({" ": "\u0120", "\n": "\u010a"})  # as a byte-level vocabulary has them
    for text, count in actions.items():
        for number in range(count):
            vocabulary[text.replace("{}", str(number)).translate(letter)] = len(vocabulary)
    rng = np.random.default_rng(0)
    while len(vocabulary) < vocab_size - 8:
        vocabulary["".join(rng.choice(list("abcdefghijklmnop"), 9))] = len(vocabulary)
    return json.dumps(raw)


def acting_processor(
    vocab_size: int = 640, *, actions=ACTIONS, images: ImageProcessor = random_policy.IMAGES
) -> Processor:
    return Processor(acting_tokenizer(vocab_size, actions), images)


def config_for(vocab_size: int, base: ModelConfig = random_policy.CONFIG) -> ModelConfig:
    """`base` with another vocabulary."""
    text = dataclasses.replace(base.text, vocab_size=vocab_size)
    return dataclasses.replace(base, text=text, video_token_id=vocab_size - 1)


def write(directory, *, vocab_size: int = 640, actions=ACTIONS) -> None:
    """The policy as an HF directory."""
    qwen2_5_vl.save(random_policy.random_model(config_for(vocab_size), seed=3), directory)
    tokenizer = acting_tokenizer(vocab_size, actions)
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    settings = json.dumps(random_policy.IMAGES.to_hf())
    (directory / "preprocessor_config.json").write_text(settings)
