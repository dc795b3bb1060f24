import json
import runpy

import numpy as np
import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.episodes.episode import Example
from mmsr1_jax.evaluation.metrics import compute_metrics
from mmsr1_jax.rollout.build import make_engine
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools.index_builder import build_index
from tests import scripted_policy
from tests.browser import launch_chromium
from tests.reports import (
    CATEGORIES,
    HOSTILE,
    METRICS,
    PAGE,
    SUBJECTS,
    image_reply,
    make_episode,
    make_line,
    make_outcome,
    patches,
    run_report,
    text_reply,
)
from tests.serving import CONFIG, IMAGES, QUESTIONS, TURNS
from tests.serving import HOSTILE as HOSTILE_PAGE


@pytest.fixture(scope="module")
def browser():
    """A browser of Playwright.

    Until it is closed, its event loop runs in this process, so that `asyncio.run` fails.
    """
    with launch_chromium() as chromium:
        yield chromium


@pytest.fixture(scope="session")
def run_with_episodes(tmp_path_factory, processor):
    """The directory of a run of 60 steps, its 1,000 episodes, and its evaluation results.

    Some lines of its files are invalid, and two episodes have hostile texts.
    """
    run = tmp_path_factory.mktemp("report") / "run"
    (run / "episodes").mkdir(parents=True)
    (run / "policy").mkdir()
    (run / "policy" / "tokenizer.json").write_text(random_policy.make_tokenizer().to_str())
    image_settings = json.dumps(random_policy.IMAGES.to_hf())
    (run / "policy" / "preprocessor_config.json").write_text(image_settings)
    rng = np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 61):
            values = {name: float(rng.uniform()) for name in METRICS}
            if step % 20 == 0:
                values["validation/accuracy"] = 0.5
            values["update/kl"] = float("nan") if step % 2 else float("inf")
            file.write(json.dumps({"step": step, **values}) + "\n")
    lines = _lines(run, processor, rng)
    for start in range(0, 1000, 250):
        texts = [json.dumps(line) for line in lines[start : start + 250]]
        if start == 250:
            texts[100:100] = ["{not json", "[1]", '{"segments": 3}', "", '{"segments": [{}]}']
        (run / "episodes" / f"{start // 250 + 1:06d}.jsonl").write_text("\n".join(texts))
    outcomes = {
        name: [make_outcome(name, index, rng) for index in range(40)]
        for name in ("on_demand", "rag", "direct", "agent")
    }
    results = {"workflows": {name: compute_metrics(some) for name, some in outcomes.items()}}
    (run / "results.json").write_text(json.dumps(results))
    return run, lines, results


def _lines(run, processor, rng):
    """Return 1,000 lines, of which the first 36 are distinct episodes."""
    lines = []
    for index in range(1000):
        subject = SUBJECTS[index % 6]
        texts = [
            f"<reason>{subject} {'why not ' * 20}✓</reason> <search><img></search>",
            f"<reason>{'It may be so. ' * 10}</reason> <text_search>{subject} name</text_search>",
            f"<reason>Now I know.</reason> <answer>{subject}</answer>",
        ][index % 3 :]
        replies = [image_reply(processor, index % 20, f"A {subject}"),
                   text_reply(PAGE, f"the {subject} " * 40)][index % 3 :]  # fmt: skip
        if index < 36:
            episode = make_episode(
                processor, index, texts=texts, replies=replies,
                question=f"What {subject} is this?",
                images=[patches(processor, 100 + index % 30)], rng=rng,
            )  # fmt: skip
            line = make_line(episode, processor, run / "episodes", ["Bridge", "canal"])
        else:
            line = lines[index % 36]
        category = CATEGORIES[index % 7 % 3]
        lines.append(line | {"id": f"q{index}", "category": category, "source": "made up"})
    lines[1] |= {"question": HOSTILE, "category": HOSTILE, "answers": [HOSTILE]}
    hostile = make_episode(
        processor, 2, question=HOSTILE, images=[patches(processor, 1)], rng=rng,
        texts=[f"<reason>{HOSTILE}</reason> <search><img></search>",
               f"<reason>{HOSTILE}</reason> <text_search>{HOSTILE}</text_search>",
               f"<reason>x</reason> <answer>{HOSTILE}</answer>"],
        replies=[image_reply(processor, 5, HOSTILE), text_reply("javascript:alert(1)", HOSTILE)],
    )  # fmt: skip
    lines[2] = make_line(hostile, processor, run / "episodes", ["x"], category="", source="made up")
    return lines


@pytest.fixture(scope="session")
def report(run_with_episodes, tmp_path_factory):
    """The page as the command writes it, and the finished command."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    done = run_report(run_with_episodes[0], f"--out={out}", "--episodes=2000")
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


@pytest.fixture(scope="session")
def setup(tmp_path_factory):
    """The directory of an acting policy, that of an index with hostile pages, and a config file."""
    policy, index = tmp_path_factory.mktemp("policy") / "acting", tmp_path_factory.mktemp("index")
    settings_file = tmp_path_factory.mktemp("config") / "config.py"
    settings_file.write_text(CONFIG)
    scripted_policy.write(policy, vocab_size=896, actions=TURNS, seed=5)
    page = {
        "url": "http://bridges/1?a=b&c",
        "title": HOSTILE_PAGE,
        "summary": f"{HOSTILE_PAGE} bridge\n2. x",
    }
    other = {"url": "javascript:window.hacked=1", "title": "bridge", "summary": "A bridge " * 60}
    (index / "p.jsonl").write_text("\n".join(map(json.dumps, (page, other))))
    lines = []
    for i, file in enumerate(IMAGES):
        (index / f"{i}.png").write_bytes(file)
        lines.append(json.dumps({"image": f"{i}.png", "title": f"Picture {i} {HOSTILE_PAGE}"}))
    (index / "i.jsonl").write_text("\n".join(lines))
    build_index(index, [index / "p.jsonl"], [index / "i.jsonl"])
    return policy, index, settings_file


@pytest.fixture(scope="session")
def engine(setup):
    """Two engines of two lanes."""
    config = runpy.run_path(str(setup[2]))["get_config"]()
    config.tools.index = str(setup[1])
    config.sampling = settings.Sampling(temperature=1.0, seed=1)
    pool = make_engine(config, str(setup[0]), engines=2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def alone(engine):
    """The episode of each question without concurrent requests."""
    episodes = []
    for question, file in zip(QUESTIONS, IMAGES, strict=True):
        (episode,) = engine.rollout([Example(question=question, images=[file])])
        episodes.append(episode)
    assert all(episode.calls for episode in episodes)  # so that the gate blocks them
    assert {call.action for e in episodes for call in e.calls} == {"text_search", "image_search"}
    assert any(episode.answer for episode in episodes)
    return episodes
