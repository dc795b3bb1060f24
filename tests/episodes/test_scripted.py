"""Replay of scripted episodes, compared with the engine's episodes."""

from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.episodes.scripted import ScriptedEpisode, replay
from mmsr1_jax.episodes.turns import STOPS
from mmsr1_jax.training import sft_dataset
from tests import whole_turn_policy
from tests.engines import episode_record, search_tools


def test_a_replay_equals_the_episode_of_the_engine():
    rollout = whole_turn_policy.roll_out()
    processor = rollout.processor

    def turn_texts(episode: Episode) -> list[str]:
        return [processor.decode(s.tokens) for s in episode.segments if s.kind == "model"]

    def is_reproducible(episode: Episode) -> bool:
        """Return whether the texts of all turns encode to their tokens and end at a stop tag."""
        texts = turn_texts(episode)
        tokens = [s.tokens.tolist() for s in episode.segments if s.kind == "model"]
        encoded = [processor.encode_text(text) for text in texts]
        return tokens == encoded and all(any(stop in text for stop in STOPS) for text in texts)

    def without_logprobs(episode: Episode) -> dict:
        data = episode_record(episode) | {"segments": [s.tokens.tolist() for s in episode.segments]}
        del data["logprobs"], data["sampling"]
        return data

    episodes = [episode for episode in rollout.episodes if is_reproducible(episode)]
    calls = [call for episode in episodes for call in episode.calls]
    assert {call.action for call in calls} == {"text_search", "image_search"}
    assert "refused" in {call.status for call in calls}
    assert {episode.end for episode in episodes} >= {"answer", "turns"} and len(episodes) > 10
    assert any(turn.action is None for episode in episodes for turn in episode.turns)

    rules = sft_dataset.make_rules(rollout.config, processor, rollout.model_config)
    scripted = [ScriptedEpisode(episode.example, turn_texts(episode)) for episode in episodes]
    replayed = replay(scripted, processor, rules, search_tools())
    for ours, expected in zip(replayed, episodes, strict=True):
        assert without_logprobs(ours) == without_logprobs(expected)
