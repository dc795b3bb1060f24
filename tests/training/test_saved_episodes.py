"""Episodes that a training run saves, read again and used as an SFT dataset."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from mmsr1_jax import sft
from mmsr1_jax.config import settings
from mmsr1_jax.data import Question
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.processing.images import read_image
from mmsr1_jax.rewards.reward_function import episode_reward
from mmsr1_jax.training import sft_dataset
from tests import whole_turn_policy
from tests.engines import episode_record
from tests.programs import ROOT

# Writes the episodes in another process, so that they cannot share objects with this one.
WRITE = """
import pickle, sys, types, pathlib
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.training.rollouts import RolloutBatch, write_episodes
from mmsr1_jax.training.workdir import Workdir
pairs, questions, tokenizer, images = pickle.load(sys.stdin.buffer)
engine = types.SimpleNamespace(processor=Processor(tokenizer, images))
batch = RolloutBatch([pairs], [0], 1, pairs, dict(enumerate(questions)), 1, 1)
write_episodes(Workdir(pathlib.Path(sys.argv[1])), 7, batch, len(pairs), engine)
"""


def test_saved_episodes_become_bit_identical_training_samples(tmp_path):
    rollout = whole_turn_policy.roll_out()
    episodes, processor = rollout.episodes, rollout.processor
    pairs = [(e, episode_reward(e, ("a 1",), settings.Rewards(), 0, None)) for e in episodes]
    questions = [Question(id=str(i), question="?", images=(), answers=("a 1",)) for i in range(6)]
    (tmp_path / "episodes").mkdir()
    subprocess.run(
        [sys.executable, "-c", WRITE, tmp_path], cwd=ROOT, check=True,
        input=pickle.dumps((pairs, questions, whole_turn_policy.tokenizer(), processor.images)),
    )  # fmt: skip
    (path,) = (tmp_path / "episodes").iterdir()

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line, episode in zip(lines, episodes, strict=True):
        images = [read_image(path.parent / name, processor.images) for name in line["images"]]
        saved = Episode.from_json(line, images)
        assert episode_record(saved) == episode_record(episode)
        assert (saved.index, saved.group) == (episode.index, episode.group)
    # Images that several episodes contain are saved once.
    assert sum(len(line["images"]) for line in lines) > len(list((tmp_path / "images").iterdir()))

    config = dataclasses.replace(rollout.config, data=settings.Data(train=(str(path.parent),)))
    (tmp_path / "run").mkdir()
    dataset = tmp_path / "run" / "examples.jsonl"
    sft_dataset.prepare(dataset, config, processor, rollout.model_config)
    samples = sft.make_samples(sft_dataset.load(dataset, config), processor.images)
    num_tokens = sum(int(episode.loss_mask.sum()) for episode in episodes)
    for sample, episode in zip(samples, episodes, strict=True):
        np.testing.assert_array_equal(sample.prompt.tokens, episode.tokens)
        np.testing.assert_array_equal(sample.mask, episode.loss_mask)
        assert sample.weights == pytest.approx(1 / num_tokens)
        for ours, expected in zip(sample.prompt.images, episode.images, strict=True):
            assert ours.grid == expected.grid
            assert ours.values.tobytes() == expected.values.tobytes()
