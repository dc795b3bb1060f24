"""Gap between the log-probs of the engine and of the trainer, as part of `tests.device`."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmsr1_jax.config import settings
from mmsr1_jax.models.config import ModelConfig
from mmsr1_jax.processing.batching import num_prompt_windows
from mmsr1_jax.rl import packing
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.scripts.random_policy import CONFIG
from tests import engines
from tests.bench import model as model_bench
from tests.device_parity import Measurement, precision
from tests.scripted_policy import ACTIONS, config_for, scripted_processor

# Bars of the mean and of the largest difference between log-probs of engine and trainer.
GAP_BARS = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 0.2)}


def gap(tiny: bool) -> list[Measurement]:
    """Compare recorded log-probs with the trainer's, for the same tokens.

    In bfloat16 on an accelerator; `demo` compares them in float32.
    """
    if tiny:
        small = functools.partial(logprob_gap, config_for(640), ACTIONS, "float32")
        return [Measurement("float32, tiny policy", small)]
    base = model_bench.SHAPES["7b"]
    vocabulary = base.text.vocab_size
    base = dataclasses.replace(base, text=dataclasses.replace(base.text, num_layers=2))
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    config = dataclasses.replace(
        config_for(vocabulary, base), **{name: getattr(CONFIG, name) for name in names}
    )
    # One token in 64 ends a turn.
    actions = {text: count * vocabulary // 4096 for text, count in ACTIONS.items()}
    large = functools.partial(logprob_gap, config, actions, "bfloat16")
    return [Measurement("bfloat16, 2 layers of 7B width", large)]


def logprob_gap(config: ModelConfig, actions: dict[str, int], dtype: str) -> dict[str, Any]:
    """Sample episodes with images and searches, and compute their log-probs as an update does.

    The policy is random. Rows of 2,048 tokens hold several episodes of up to 1,024, so that an
    accelerator's kernels compute attention on both sides.
    """
    processor = scripted_processor(config.text.vocab_size, actions=actions)
    limits = dataclasses.replace(engines.LIMITS, max_new_tokens=128)
    engine_config = engines.make_config(limits=limits, lanes=16, decode_batch_size=16)
    model = model_bench.quick_random_model(config, dtype=dtype, logprob_chunk=256)
    engine = Engine(model, processor, engine_config, engines.search_tools())
    sampling = settings.Sampling(seed=1)
    episodes = list(engine.rollout(engines.examples(4), group_size=4, sampling=sampling))
    engine.close()
    errors = {episode.error for episode in episodes if episode.end == "error"}
    if errors:
        raise RuntimeError(f"episodes ended with errors: {sorted(map(str, errors))}")
    samples = [
        packing.Sample(
            prompt=episode.conversation, mask=episode.loss_mask,
            weights=np.ones(len(episode), np.float32), advantages=np.ones(len(episode), np.float32),
            rollout_logprobs=episode.logprobs,
        )
        for episode in episodes
    ]  # fmt: skip
    windows = max(num_prompt_windows(s.prompt, config) for s in samples)
    batches = packing.pack(samples, config, packing.RowShape(1, 2048, 4 * windows))
    graph, params = nnx.split(model)

    @jax.jit
    def score(params, batch):
        model = nnx.merge(graph, params)
        return model.statistics(batch.rows, batch.logit_columns, batch.targets)[0]

    with precision(dtype):
        ours = [np.asarray(score(params, batch))[batch.mask] for batch in batches]
    recorded = np.concatenate([batch.rollout_logprobs[batch.mask] for batch in batches])
    calls = sum(len(episode.calls) for episode in episodes)
    return {**compared_logprobs(np.concatenate(ours), recorded, dtype), "calls": calls}


def compared_logprobs(ours: np.ndarray, recorded: np.ndarray, dtype: str) -> dict[str, Any]:
    """Return the differences between log-probs of the trainer and of the engine, with their bars.

    Args:
      ours, recorded: Log-probs by the trainer and by the engine, float32[tokens].
      dtype: Compute dtype, which decides the bars. NaN does not pass.
    """
    difference, bars = np.abs(ours - recorded), GAP_BARS[dtype]
    mean, largest = float(difference.mean()), float(difference.max())
    return {
        "mean_difference": mean,
        "largest_difference": largest,
        "bars": list(bars),
        "passed": mean <= bars[0] and largest <= bars[1],
        "mean_logprob": float(recorded.mean()),
        "tokens": len(recorded),
    }
