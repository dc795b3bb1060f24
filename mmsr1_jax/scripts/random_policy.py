"""Write a small random policy with a small tokenizer as an HF directory, for demos and tests.

python -m mmsr1_jax.scripts.random_policy --out=DIR [--family=MODEL_TYPE] [--tokenizer=HF_DIR]
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import flags
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmsr1_jax import cli
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.models import checkpoint
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.models.families import FAMILIES
from mmsr1_jax.models.layers import Linear
from mmsr1_jax.models.policy import Policy
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import CONTROL_TOKENS
from mmsr1_jax.utils import outputs

# Training corpus of the small tokenizer: the words of the task.
_CORPUS = """
You are a helpful assistant. system user assistant
Look at the picture and answer the question. Think first between <reason> and </reason>.
Then do one of three things: <answer>the answer</answer>, <search><img></search>, or
<text_search>what you want to know</text_search>. The results come between <information> and
</information>. What is the name of this building? Who designed the bridge in the photograph, and
in which year was it opened? How tall is the tower? Which river does it cross?
[Text Search Results] [Image Search Results] 1. image: title: link: summary:
"""

CONFIG = next(iter(FAMILIES.values())).small["random"]

# Distributions of the random parameters that are not kernels.
_MEAN_AND_STD = {"embedding": (0.0, 0.02), "head": (0.0, 0.02), "scale": (1.0, 0.1),
                 "bias": (0.0, 0.1), "position_embedding": (0.0, 0.5)}  # fmt: skip


def image_processor(config: ModelConfig) -> ImageProcessor:
    """Return a processor for images of 16 to 256 visual tokens, which take seconds on a CPU."""
    vision = config.vision
    area = (vision.patch_size * vision.merge_size) ** 2
    return ImageProcessor(
        min_pixels=16 * area, max_pixels=256 * area, patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size, merge_size=vision.merge_size,
    )  # fmt: skip


IMAGES = image_processor(CONFIG)


def make_tokenizer() -> tokenizers.Tokenizer:
    """Train a byte-level BPE of fewer than 512 tokens, the first of them Qwen's control tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS.splitlines(), trainer)
    return bpe


def random_model(config: ModelConfig, seed: int, **kwargs: Any) -> Policy:
    """Create a model in which every parameter is random, including biases and norms.

    Args:
      config: Architecture of the model.
      seed: Random seed.
      kwargs: Other arguments of `Policy`.
    """
    model = checkpoint.abstract_model(config, **kwargs)
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        for name, variable in vars(module).items():
            if not isinstance(variable, nnx.Param):
                continue
            shape, dtype = variable.get_value().shape, variable.get_value().dtype
            if name == "kernel":  # [.., *inputs]
                assert isinstance(module, Linear)
                mean, std = 0.0, math.prod(shape[-module.contracted :]) ** -0.5
            else:
                mean, std = _MEAN_AND_STD[name]
            noise = rng.standard_normal(shape, np.float32)  # of numpy, which compiles nothing
            variable.set_value(jnp.asarray(mean + std * noise, dtype))
    return model


def write(
    directory: str | os.PathLike,
    *,
    config: ModelConfig = CONFIG,
    images: ImageProcessor = IMAGES,
    seed: int = 0,
    param_dtype: DTypeLike = jnp.float32,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> None:
    """Write a random policy, its tokenizer and its processor settings as an HF directory.

    The tokenizer defaults to that of `make_tokenizer`.
    """
    checkpoint.check_replaceable(pathlib.Path(directory))
    with outputs.new_directory(directory) as partial:
        checkpoint.save(random_model(config, seed, param_dtype=param_dtype), partial)
        (tokenizer or make_tokenizer()).save(str(partial / "tokenizer.json"))
        (partial / "preprocessor_config.json").write_text(json.dumps(images.to_hf(), indent=2))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def with_vocabulary(config: ModelConfig, tokenizer: tokenizers.Tokenizer) -> ModelConfig:
    """Return `config` with a tokenizer's vocabulary size and control token ids.

    The vocabulary has one additional, unused id.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    unused = max(ids.values()) + 1
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, vocab_size=unused + 1),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids.get("<|video_pad|>", unused),
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def main(argv: Sequence[str]) -> None:
    del argv
    config, tokenizer = FAMILIES[_FAMILY.value].small["random"], None
    if _TOKENIZER.value is not None:
        tokenizer = _read_tokenizer(pathlib.Path(_TOKENIZER.value, "tokenizer.json"))
        config = with_vocabulary(config, tokenizer)
    images = image_processor(config)
    write(_OUT.value, config=config, images=images, seed=_SEED.value, tokenizer=tokenizer)
    print(f"wrote a random policy to {_OUT.value}")


def _read_tokenizer(file: pathlib.Path) -> tokenizers.Tokenizer:
    """Read a tokenizer. Raise UserError if it is unreadable or lacks a required control token."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"--tokenizer: {file}: cannot be read ({error})") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for token in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"):
        if token not in vocabulary:
            raise UserError(f"--tokenizer: {file} has no token {token!r}")
    return tokenizer


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "directory to write", required=True)
    _FAMILY = flags.DEFINE_enum("family", next(iter(FAMILIES)), list(FAMILIES), "its model_type")
    _SEED = flags.DEFINE_integer("seed", 0, "seed of the random parameters")
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "HF directory whose tokenizer to use")
    cli.run(main)
