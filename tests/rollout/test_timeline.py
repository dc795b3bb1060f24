"""Timelines: events of a lane do not overlap, cover programs and tools, and form a trace file."""

import collections
import itertools
import json
import time

import jax
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.models import sharding
from mmsr1_jax.rollout import build
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.rollout.pool import EnginePool
from mmsr1_jax.rollout.timeline import EngineTimeline, Timeline, _with_gaps
from tests.engines import VOCAB_SIZE, by_index, examples, make_config, search_tools
from tests.scripted_policy import scripted_processor

DELAY = 0.1  # seconds that a search takes


@pytest.fixture(scope="module")
def processor():
    return scripted_processor(VOCAB_SIZE)


@pytest.fixture(scope="module")
def engine(model, processor):
    engine = Engine(model, processor, make_config(lanes=2), search_tools(lambda: DELAY))
    yield engine
    engine.close()


def by_track(trace: dict) -> dict[tuple[int, str], list[dict]]:
    """Return the events of each track, by the index of the engine and the name of the track."""
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    tracks = collections.defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["pid"], names[event["pid"], event["tid"]]].append(event)
    return tracks


def assert_no_overlap(events: list[dict]) -> None:
    events = sorted(events, key=lambda event: event["ts"])
    for event, following in itertools.pairwise(events):
        assert event["dur"] >= 0
        assert event["ts"] + event["dur"] <= following["ts"] + 1e-2  # rounded to 1e-3 µs


def test_lanes_show_programs_tools_and_idle_times(engine, tmp_path):
    timeline = Timeline()
    episodes = list(engine.rollout(examples(3), group_size=2, timeline=timeline))
    path = tmp_path / "timelines" / "000012.json"
    timeline.write(path)
    trace = json.loads(path.read_text(encoding="utf-8"))
    tracks = by_track(trace)
    names = {name for _, name in tracks}
    assert names == {"prefill", "decode", "encode", "scheduler", "lane 0", "lane 1"}
    for events in tracks.values():
        assert_no_overlap(events)
    lane_events = [e for lane in range(2) for e in tracks[0, f"lane {lane}"]]
    assert {"prefill", "decode", "fork", "idle"} <= {event["name"] for event in lane_events}
    waits = {"wait for tools", "device waits for host"}
    assert {e["name"] for e in tracks[0, "scheduler"]} == waits
    # The device runs one program at a time.
    tracks_of_device = ("prefill", "decode", "encode", "scheduler")
    assert_no_overlap([event for track in tracks_of_device for event in tracks[0, track]])
    # Each search and each token of the episodes is in an event of its episode.
    searches = [e for e in lane_events if e["name"].endswith("_search (none)")]
    calls = [c for episode in episodes for c in episode.calls if c.status != "refused"]
    assert len(searches) == len(calls) > 3
    assert all(event["dur"] >= DELAY * 1e6 for event in searches)
    decoded = collections.Counter()
    for event in lane_events:
        if event["name"] == "decode":
            decoded[event["args"]["episode"]] += event["args"]["tokens"]
    assert decoded == {e.index: int(e.loss_mask.sum()) for e in episodes}
    # A decoded lane lies within the program that decodes it.
    programs = [(e["ts"], e["ts"] + e["dur"]) for e in tracks[0, "decode"]]
    for event in lane_events:
        if event["name"] == "decode":
            assert any(
                start <= event["ts"] + 1000 and event["ts"] <= end for start, end in programs
            )


def test_work_of_the_host_does_not_count_as_decoding(engine, pytestconfig):
    """A device that has long finished does not decode until the host looks at its tokens."""
    if pytestconfig.getoption("kernels"):
        pytest.skip("interpreted kernels take longer than the host, and nothing else is compared")
    source, calls, timeline = list(enumerate(examples(3))), [], Timeline()
    recorder = timeline.engine(0, engine.config)

    def on_tokens(episode, tokens):
        calls.append(episode)
        time.sleep(0.05)

    def next_examples(count):
        taken = source[:count]
        del source[:count]
        return taken

    list(engine.rollout(examples(3)))  # compiles
    list(engine.rollout_part(
        next_examples, group_size=2, sampling=settings.Sampling(), on_tokens=on_tokens,
        timeline=recorder,
    ))  # fmt: skip
    decoding = sum(end - start for _, start, end, _ in recorder.tracks()["decode"])
    waits = sum(end - start for start, end in recorder.host_waits())
    asleep = 0.05 * len(calls)
    assert decoding < 0.4 * asleep and 0.6 * asleep < waits
    assert all(args["steps"] > 0 for *_, args in recorder.tracks()["decode"])


def test_a_timeline_changes_no_episode_and_is_off_by_default(engine):
    recorded = by_index(engine.rollout(examples(3), group_size=2, timeline=Timeline()))
    assert engine.device._timeline is None
    assert by_index(engine.rollout(examples(3), group_size=2)) == recorded


@pytest.mark.proof
def test_engines_of_a_pool_are_different_processes(model, processor, tmp_path):
    meshes = [sharding.make_mesh(1, 1, 1, devices=[device]) for device in jax.devices()[:2]]
    models = build.replicate(model, meshes)
    pool = EnginePool(models, processor, make_config(lanes=2), search_tools(lambda: DELAY))
    timeline = Timeline()
    for _ in range(2):  # the rollouts of a step are recorded one after another
        episodes = list(pool.rollout(examples(4), group_size=2, timeline=timeline))
    pool.close()
    tracks = by_track(timeline.trace())
    assert {pid for pid, _ in tracks} == {0, 1} and len(episodes) == 8
    for events in tracks.values():
        assert_no_overlap(events)
    for pid in range(2):
        assert tracks[pid, "decode"] and tracks[pid, "prefill"]
        shown = {e["name"] for lane in range(2) for e in tracks[pid, f"lane {lane}"]}
        assert {"prefill", "decode"} <= shown
    titles = [e["args"]["name"] for e in timeline.trace()["traceEvents"]
              if e["name"] == "process_name"]  # fmt: skip
    assert titles == ["engine 0", "engine 1"]


def test_gaps_are_queued_within_an_episode_and_idle_between_episodes():
    engine = EngineTimeline(1, {})
    for start, episode in ((1.0, 4), (2.0, 4), (4.0, 5)):
        engine.record(0, "decode", start, start + 0.5, episode=episode)
    events = [
        (name, start, end) for name, start, end, _ in _with_gaps(engine.tracks()[0], 0.0, 6.0)
    ]
    assert events == [
        ("idle", 0.0, 1.0), ("decode", 1.0, 1.5), ("queued", 1.5, 2.0), ("decode", 2.0, 2.5),
        ("idle", 2.5, 4.0), ("decode", 4.0, 4.5), ("idle", 4.5, 6.0),
    ]  # fmt: skip


def test_the_device_waits_for_the_host_while_nothing_else_explains_it():
    engine = EngineTimeline(1, {})
    assert engine.host_waits() == []
    for track, start, end in (
        ("decode", 1.0, 2.0), ("prefill", 2.5, 3.0), ("scheduler", 3.0, 5.0), ("decode", 5.25, 6.0),
        (0, 1.0, 7.0), ("encode", 6.0, 6.5),
    ):  # fmt: skip
        engine.record(track, "", start, end, episode=0)
    assert engine.host_waits() == [(2.0, 2.5), (5.0, 5.25)]
