"""Timeline of a rollout as a trace file for https://ui.perfetto.dev or chrome://tracing.

    timeline = Timeline()
    episodes = list(engine.rollout(examples, timeline=timeline))
    timeline.write("timeline.json")

An engine is a process of the trace. Its tracks are the device programs (`prefill`, `decode`,
`encode`), the scheduler (times at which it only waits for tools, and those at which the device
waits for the host), and the lanes. A lane shows the programs and tool calls of its episodes. The
gaps between them become `queued` (the episode waits for a program to include it) or `idle` (the
lane has no episode).

A thread waits for the output of each program and records when it is ready, to within the time that
the interpreter takes to let that thread run (`sys.getswitchinterval`, 5 ms). The host waits for
nothing, so a rollout is scheduled as without a timeline.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Episode, ToolCall

ENCODE, PREFILL, DECODE, SCHEDULER, FORK = "encode", "prefill", "decode", "scheduler", "fork"
_TRACKS = (PREFILL, DECODE, ENCODE, SCHEDULER)  # above the lanes, in this order
_MIN_GAP = 1e-4  # seconds; shorter gaps are not shown

# Name, start, end and arguments of an event.
TimelineEvent = tuple[str, float, float, dict[str, Any]]


@dataclasses.dataclass(eq=False)
class Execution:
    """Execution of a device program. All times are from `time.perf_counter`.

    Attributes:
      program: One of `ENCODE`, `PREFILL` and `DECODE`.
      called: Time at which the call returned. At the latest then the device could start.
      args: JSON values that the viewer shows.
      start: Time at which it started: when it was called, or when the program before it ended.
        Known after `EngineTimeline.finish`.
      end: Time at which its output was ready.
    """

    program: str
    called: float
    args: dict[str, Any]
    start: float = math.nan
    end: float = math.inf

    def has_ended(self) -> None:
        """Record that the output is ready, unless an earlier time is known."""
        self.end = min(self.end, time.perf_counter())


class EngineTimeline:
    """Recorder of the events of one engine, for use by its thread between `begin` and `finish`.

    Args:
      lanes: Number of lanes.
      services: Name of the service that each search uses, by action.
    """

    def __init__(self, lanes: int, services: Mapping[str, str]):
        self._lanes, self._services = lanes, services
        self._events: list[tuple[int | str, TimelineEvent]] = []
        self._executions: list[Execution] = []  # since `begin`, in the order of the calls
        # Lane, name, program and arguments of events that take as long as their program.
        self._lane_programs: list[tuple[int, str, Execution, dict[str, Any]]] = []
        self._unfinished: queue.SimpleQueue[tuple[Execution, Any] | None] = queue.SimpleQueue()
        self._watcher: threading.Thread | None = None

    def begin(self) -> None:
        """Start the thread that waits for programs."""
        assert self._watcher is None
        self._watcher = threading.Thread(target=self._watch, name="timeline", daemon=True)
        self._watcher.start()

    def finish(self) -> None:
        """Wait for all programs, and end the thread."""
        if self._watcher is not None:
            self._unfinished.put(None)
            self._watcher.join()
            self._watcher = None
        last_end = -math.inf
        for execution in self._executions:
            end = max(execution.end, last_end)
            execution.start = min(max(execution.called, last_end), end)
            execution.end = last_end = end
            self.record(
                execution.program, execution.program, execution.start, end, **execution.args
            )
        for lane, name, execution, args in self._lane_programs:
            self.record(lane, name, execution.start, execution.end, **args)
        self._executions.clear()
        self._lane_programs.clear()

    def _watch(self) -> None:
        while (item := self._unfinished.get()) is not None:
            execution, output = item
            with contextlib.suppress(Exception):  # of the program; its caller raises it, too
                jax.block_until_ready(output)
            execution.has_ended()

    def record_program(self, program: str, output: Any, **args: Any) -> Execution:
        """Record a device program whose call has just returned.

        Programs are executed in the order of the calls.

        Args:
          program: One of `ENCODE`, `PREFILL` and `DECODE`.
          output: Arrays that the program returned, which are not donated to another.
          **args: JSON values that the viewer shows.
        """
        execution = Execution(program, time.perf_counter(), args)
        self._executions.append(execution)
        self._unfinished.put((execution, output))
        return execution

    def record(self, lane: int | str, name: str, start: float, end: float, **args: Any) -> None:
        """Record an event.

        Args:
          lane: Index of the lane, or one of `ENCODE`, `PREFILL`, `DECODE` and `SCHEDULER`.
          name: Name of the event.
          start, end: Times from `time.perf_counter`.
          **args: JSON values that the viewer shows for the event, such as its episode and tokens.
        """
        self._events.append((lane, (name, start, end, args)))

    def record_episode(
        self, lane: int, name: str, execution: Execution, episode: Episode, tokens: int
    ) -> None:
        """Record that a program works on a lane's episode.

        Args:
          lane: Index of the lane.
          name: Name of the event.
          execution: The program, from `record_program`.
          episode: The episode.
          tokens: Number of tokens of the lane that the program writes.
        """
        args = dict(episode=episode.index, turn=len(episode.turns), tokens=tokens)
        self._lane_programs.append((lane, name, execution, args))

    def record_search(self, lane: int, start: float, episode: Episode, call: ToolCall) -> None:
        """Record a search of a lane's episode that has ended before now."""
        service = self._services.get(call.action, "none")
        self.record(
            lane, f"{call.action} ({service})", start,
            min(start + call.seconds, time.perf_counter()),
            episode=episode.index, turn=call.turn, service=service, status=call.status,
        )  # fmt: skip

    def tracks(self) -> dict[int | str, list[TimelineEvent]]:
        """Return the events of each track, sorted by start."""
        tracks: dict[int | str, list[TimelineEvent]] = {
            track: [] for track in (*_TRACKS, *range(self._lanes))
        }
        for track, event in self._events:
            tracks[track].append(event)
        return {track: sorted(events, key=lambda e: e[1:3]) for track, events in tracks.items()}

    def host_waits(self) -> list[tuple[float, float]]:
        """Return the starts and ends of the times at which the device waits for the host.

        These are the times between the first and the last device program in which no program runs,
        except those in which the scheduler only waits for tools.
        """
        waits, last_end = [], math.inf
        for start, end in sorted(e[1:3] for track, e in self._events if track in _TRACKS):
            if start > last_end:
                waits.append((last_end, start))
            last_end = end if last_end == math.inf else max(last_end, end)
        return waits

    def span(self) -> tuple[float, float]:
        """Return the start of the first and the end of the last event."""
        starts, ends = [e[1] for _, e in self._events], [e[2] for _, e in self._events]
        return min(starts, default=0.0), max(ends, default=0.0)


class Timeline:
    """Timeline of a rollout on one engine or on a pool of them."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._engines: dict[int, EngineTimeline] = {}

    def engine(self, index: int, config: settings.Config) -> EngineTimeline:
        """Return the recorder of an engine; call it before the engines of a pool run.

        Args:
          index: Index of the engine in its pool; 0 for a single engine.
          config: Settings of the engine.
        """
        if index not in self._engines:
            services = _service_names(config.tools)
            self._engines[index] = EngineTimeline(config.rollout.lanes, services)
        return self._engines[index]

    def trace(self) -> dict[str, Any]:
        """Return the timeline in the trace event format, with times in microseconds."""
        return {"traceEvents": list(self._trace_events()), "displayTimeUnit": "ms"}

    def write(self, path: str | pathlib.Path) -> None:
        """Write the timeline as a JSON file, creating its directory.

        Raises:
          OSError: The file cannot be written.
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.trace()), encoding="utf-8")

    def _trace_events(self) -> Iterator[dict[str, Any]]:
        for index, engine in sorted(self._engines.items()):
            yield _metadata("process_name", index, name=f"engine {index}")
            first, last = engine.span()
            for track, events in engine.tracks().items():
                tid = _thread_id(track)
                name = track if isinstance(track, str) else f"lane {track}"
                yield _metadata("thread_name", index, tid, name=name)
                yield _metadata("thread_sort_index", index, tid, sort_index=tid)
                if track == SCHEDULER:
                    waits = [wait for wait in engine.host_waits() if wait[1] - wait[0] > _MIN_GAP]
                    events = [*events, *(("device waits for host", *wait, {}) for wait in waits)]
                shown = _with_gaps(events, first, last) if isinstance(track, int) else events
                for name, start, end, args in shown:
                    yield {
                        "ph": "X",
                        "name": name,
                        "ts": round((start - self._start) * 1e6, 3),
                        "dur": round((end - start) * 1e6, 3),
                        "pid": index,
                        "tid": tid,
                        "args": args,
                    }


def _service_names(tools: settings.Tools) -> dict[str, str]:
    """Return the name of the service that each search uses, by action."""
    default = "none" if tools.index is None else "local"
    services = {"text_search": tools.text, "image_search": tools.image}
    return {action: default if name == "auto" else name for action, name in services.items()}


def _thread_id(track: int | str) -> int:
    return _TRACKS.index(track) if isinstance(track, str) else len(_TRACKS) + track


def _metadata(kind: str, pid: int, tid: int = 0, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _with_gaps(
    events: Sequence[TimelineEvent], first: float, last: float
) -> Iterator[TimelineEvent]:
    """Yield a lane's events and, between them, the gaps in which nothing works for it.

    Args:
      events: Events of the lane, sorted.
      first, last: Start and end of the timeline.
    """
    end, episode = first, None
    for event in events:
        _, next_start, next_end, args = event
        if next_start - end > _MIN_GAP:
            if episode is not None and args["episode"] == episode:
                yield "queued", end, next_start, {"episode": episode}
            else:
                yield "idle", end, next_start, {}
        yield event
        end, episode = next_end, args["episode"]
    if last - end > _MIN_GAP:
        yield "idle", end, last, {}
