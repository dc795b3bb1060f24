"""Share of a step that hosts wait for the slowest rollout, by simulation.

    python -m tests.bench.hosts [--questions=128] [--median=14 --percentile95=40] [--timeout=60]

Hosts roll out on their own and meet in the update, so a step takes as long as the longest rollout.
A host has 8 engines with 128 lanes, of which 64 decode at a time, in chunks of 16 steps of 10.3 ms
(`docs/performance.md`, one H100, 7B). An episode has up to two searches, whose latency is
log-normal, and turns of a geometric number of tokens. Whatever is left of a group's episodes goes
to the engine with the most free lanes.

| | |
|---|---|
| weak scaling | `--questions` for each host |
| strong scaling | 512 questions for all hosts, as in the paper |
"""

import argparse

import numpy as np

ENGINES, LANES, ROWS, CHUNK = 8, 128, 64, 16
STEP_SECONDS = 10.3e-3
EXTEND_SECONDS = 20e-3  # of a prompt or a result of up to 1,024 tokens, in place of decoding
GROUP = 8
TURN_TOKENS = 150  # mean
SEARCHES = (0.3, 0.35, 0.35)  # probabilities of 0, 1, 2
# A row of 8,192 tokens and its images take 1.0 s for the gradient; prompts count once a group.
UPDATE_SECONDS_PER_EPISODE = 1.5e3 / 8192 * 1.0 / 8


def rollout_seconds(
    hosts: int, questions: int, rng: np.random.Generator, latency, timeout: float
) -> np.ndarray:
    """Return the seconds of each host's rollout, float64[hosts].

    Args:
      hosts: Number of hosts, which do not depend on each other.
      questions: Number of questions of each host.
      rng: Random numbers.
      latency: Median of a search's latency, and its 95th percentile, in seconds.
      timeout: Seconds after which a search fails.
    """
    episodes = questions * GROUP
    searches = rng.choice(3, size=(hosts, episodes), p=SEARCHES)
    tokens = rng.geometric(1 / TURN_TOKENS, size=(hosts, episodes, 3))
    median, p95 = latency
    waits = rng.lognormal(np.log(median), np.log(p95 / median) / 1.645, size=(hosts, episodes, 3))
    waits = np.minimum(waits, timeout)
    shape = hosts, ENGINES, LANES
    episode = np.full(shape, -1)  # of each lane; -1: free
    turn, left = np.zeros(shape, int), np.zeros(shape, int)
    ready = np.zeros(shape)  # when the search of a lane ends
    started, time = np.zeros(hosts, int), np.zeros(hosts)
    end = np.zeros(hosts)
    h, e = np.arange(hosts)[:, None, None], np.arange(ENGINES)[None, :, None]
    order = np.arange(LANES) * ENGINES + e  # lanes are filled by turns of the engines
    while True:
        free = episode < 0
        keys = np.where(free, order, 10**6).reshape(hosts, -1)
        position = keys.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        new = started[:, None, None] + position.reshape(shape)
        take = free & (new < episodes)
        episode[take] = new[take]
        started += take.sum(axis=(1, 2))
        turn[take], ready[take] = 0, 0
        left[take] = tokens[np.broadcast_to(h, shape)[take], episode[take], 0]
        busy = episode >= 0
        active = busy.any(axis=(1, 2))
        if not active.any():
            return end
        runnable = busy & (ready <= time[:, None, None])
        # Of more than 64 runnable lanes the first ones decode; which does not matter on average.
        decoding = runnable & (runnable.cumsum(axis=2) <= ROWS)
        left[decoding] -= CHUNK
        stops = decoding & (left <= 0)
        index = np.nonzero(stops)
        number, search = episode[index], turn[index]
        more = search < searches[index[0], number]
        time += np.where(active, CHUNK * STEP_SECONDS, 0)
        time += EXTEND_SECONDS * stops.sum(axis=2).max(axis=1)
        goes_on = tuple(i[more] for i in index)
        ready[goes_on] = time[goes_on[0]] + waits[goes_on[0], number[more], search[more]]
        turn[goes_on] += 1
        left[goes_on] = tokens[goes_on[0], number[more], search[more] + 1]
        ended = tuple(i[~more] for i in index)
        episode[ended] = -1
        np.maximum.at(end, ended[0], time[ended[0]])


def lost_share(seconds: np.ndarray, hosts: int, update: float, rng) -> float:
    """Return the mean share of a step that a host waits, for sets of `hosts` rollouts."""
    sets = rng.choice(seconds, size=(200, hosts))
    longest = sets.max(axis=1)
    return float(((longest - sets.mean(axis=1)) / (longest + update)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=128, help="of a host, in weak scaling")
    parser.add_argument("--median", type=float, default=14.0, help="latency in seconds")
    parser.add_argument("--percentile95", type=float, default=40.0, help="latency in seconds")
    parser.add_argument("--timeout", type=float, default=60.0, help="tools.timeout")
    parser.add_argument("--rollouts", type=int, default=512, help="simulated rollouts")
    options = parser.parse_args()
    rng, latency = np.random.default_rng(0), (options.median, options.percentile95)
    print("| scaling | hosts | questions a host | rollout, mean | longest | lost to waiting |")
    print("|---|---|---|---|---|---|")
    for hosts in (8, 32, 128, 512):
        for name, questions in (("weak", options.questions), ("strong", max(1, 512 // hosts))):
            count = max(hosts, options.rollouts) if name == "strong" else options.rollouts
            seconds = rollout_seconds(count, questions, rng, latency, options.timeout)
            update = questions * GROUP * UPDATE_SECONDS_PER_EPISODE
            longest = rng.choice(seconds, size=(200, hosts)).max(axis=1).mean()
            share = lost_share(seconds, hosts, update, rng)
            print(
                f"| {name} | {hosts} | {questions} | {seconds.mean():.0f} s | {longest:.0f} s | "
                f"{share:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
