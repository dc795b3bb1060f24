"""A random policy whose tokenizer has tokens for complete actions, so that turns of random lengths
end in searches, answers and malformed tags."""

import dataclasses
import json

import numpy as np

from mmsr1_jax.models import checkpoint
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.scripts import random_policy

# Number of tokens for each action; a token may contain text after the closing tag.
ACTIONS = {
    "<reason>r{}</reason> <text_search>bridge {}</text_search>\n": 24,
    "<reason>r{}</reason> <search><img></search>": 16,
    "<reason>r{}</reason> <answer>a {}</answer>.\n": 12,
    "b{}</search>": 12,
}


def scripted_tokenizer(vocab_size: int, actions=ACTIONS) -> str:
    """Return a `tokenizer.json` whose tokens fill the vocabulary but for 8 unused ids."""
    raw = json.loads(random_policy.make_tokenizer().to_str())
    vocabulary = raw["model"]["vocab"]
    letters = str.maketrans({" ": "\u0120", "\n": "\u010a"})  # of a byte-level vocabulary
    for text, count in actions.items():
        for index in range(count):
            vocabulary[text.replace("{}", str(index)).translate(letters)] = len(vocabulary)
    rng = np.random.default_rng(0)
    while len(vocabulary) < vocab_size - 8:
        vocabulary["".join(rng.choice(list("abcdefghijklmnop"), 9))] = len(vocabulary)
    return json.dumps(raw)


def scripted_processor(
    vocab_size: int = 640, *, actions=ACTIONS, images: ImageProcessor = random_policy.IMAGES
) -> Processor:
    """Return the policy's processor."""
    return Processor(scripted_tokenizer(vocab_size, actions), images)


def config_for(vocab_size: int, base: ModelConfig | None = None) -> ModelConfig:
    """Return `base`, or else the random policy's config, with a vocabulary of another size."""
    base = base or random_policy.CONFIG
    text = dataclasses.replace(base.text, vocab_size=vocab_size)
    return dataclasses.replace(base, text=text, video_token_id=vocab_size - 1)


def write(directory, *, vocab_size: int = 640, actions=ACTIONS, seed: int = 3) -> None:
    """Write the policy as an HF directory."""
    checkpoint.save(random_policy.random_model(config_for(vocab_size), seed=seed), directory)
    tokenizer = scripted_tokenizer(vocab_size, actions)
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    image_settings = json.dumps(random_policy.IMAGES.to_hf())
    (directory / "preprocessor_config.json").write_text(image_settings)
