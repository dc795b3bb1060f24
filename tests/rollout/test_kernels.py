"""Attention over pages inside an engine: with `--kernels`, by the kernels of accelerators.

The interpreter of kernels for GPUs takes seconds for a call, so that with `--kernels=gpu` only this
file runs, which makes as few calls as show prefill, forks, decoding, and prefill behind a prompt.
"""

import dataclasses

import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Example
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.scripts import random_policy
from tests.engines import compare_logprobs_with_score, make_config, search_tools
from tests.scripted_policy import config_for, scripted_processor

PROMPTS = {"question": "{images}{question}", "after_text_search": "{results}\n{question}"}
VOCAB_SIZE = 1024
# A token in three is a search.
ACTIONS = {"<reason>r{}</reason> <text_search>q{}</text_search>\n": VOCAB_SIZE // 3}


@pytest.mark.interpretable
def test_two_rollouts_of_a_prompt_with_searches(tmp_path):
    """Log-probs recorded over pages equal those of the trainer's forward pass."""
    for name, text in PROMPTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    limits = settings.Turns(
        max_new_tokens=6, max_episode_tokens=384, min_turn_tokens=6, max_result_tokens=60,
        prompt_dir=str(tmp_path),
    )  # fmt: skip
    config = make_config(
        limits=limits, lanes=2, decode_batch_size=2, decode_steps=4, prefill_buckets=(64,),
        page_size=64,
    )  # fmt: skip
    policy = config_for(VOCAB_SIZE)
    policy = dataclasses.replace(policy, text=dataclasses.replace(policy.text, num_layers=1))
    model = random_policy.random_model(policy, seed=3)
    processor = scripted_processor(VOCAB_SIZE, actions=ACTIONS)
    engine = Engine(model, processor, config, search_tools())
    episodes = list(engine.rollout([Example(question="Who built it?", images=[])], group_size=2))
    engine.close()
    assert any(call.status == "ok" for episode in episodes for call in episode.calls)
    assert min(len(episode) for episode in episodes) > config.rollout.page_size
    assert compare_logprobs_with_score(model, episodes, 1.0) > 5
