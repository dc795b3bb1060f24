"""Services that fail or refuse during a run: counted, or the run is saved and can be resumed."""

import asyncio
import collections
import gc
import json
import types

import jax.numpy as jnp
import pytest

from mmsr1_jax import train
from mmsr1_jax.episodes.episode import ToolCall
from mmsr1_jax.evaluation.scoring import rescore
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools import Query
from mmsr1_jax.tools.build import make_tools
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.training import metrics, train_utils
from mmsr1_jax.utils import fallbacks
from tests.episode_factory import episode_of, reward_of
from tests.tools import fake_services
from tests.tools.fake_services import SECRET, configured, questions


@pytest.fixture(scope="module")
def running():
    with fake_services.run_server() as services:
        yield services


@pytest.fixture
def services(running, monkeypatch):
    fake_services.reset(running, monkeypatch)
    return running


def test_refused_search_is_reported_and_counted(services, capsys):
    config = configured(services.url, "searxng", judge=False)
    tool = make_tools(config)["text_search"]
    services.faults["searxng"] = 403
    fallbacks._logged.clear()

    async def ask():
        query = Query(action="text_search", text="q", question="What?")
        return [await tool(query) for _ in range(3)]

    for observation in asyncio.run(ask()):
        assert observation.status == "failed" and SECRET not in observation.error
    assert fallbacks.take_counts() == {"service/searxng/failed": 3, "service/searxng/refused": 3}
    (line,) = capsys.readouterr().err.splitlines()
    assert f"searxng at {services.url} refuses" in line and "config.services.searxng_url" in line
    assert fallbacks.take_counts() == {}


def test_failed_summaries_and_malformed_cache_values_are_counted(services, tmp_path, monkeypatch):
    config = configured(services.url, "searxng", judge=False, cache=str(tmp_path / "s.sqlite"))
    tool = make_tools(config)["text_search"]
    services.faults["summariser"] = 500
    query = Query(action="text_search", text="q", question="What?")
    assert asyncio.run(tool(query)).status == "failed"
    assert fallbacks.take_counts() == {"service/summariser/failed": 1}
    cached_calls = CachedCalls(ToolCache(tmp_path / "t.sqlite"))
    asyncio.run(cached_calls.put("page", "k", "text"))
    (tmp_path / "t.sqlite").chmod(0o600)
    monkeypatch.setattr(cached_calls._cache, "get", lambda kind, key: (b'{"cut off', False))
    assert asyncio.run(cached_calls.look_up("page", "k")) is None
    assert fallbacks.take_counts() == {"cache/malformed": 1}


def test_partial_and_failed_searches_are_metrics():
    def of(*calls):
        episode = episode_of("<reason>r</reason><answer>x</answer>")
        episode.calls = [ToolCall(turn=0, action="text_search", query="q", status=status,
                                  notes=notes) for status, notes in calls]  # fmt: skip
        facts = metrics.episode_facts([episode], [reward_of(1.0, True)], [""])
        values = metrics.episode_metrics(facts)
        return values | {"tool/partial": metrics.partial_search_fraction(facts)}

    assert of(("ok", ("page 2: HTTP status 403",)), ("ok", ()))["tool/partial"] == 0.5
    assert of(("failed", ("search: HTTP status 403",)))["tool/failed"] == 1
    assert of(("ok", ()), ("failed", ("x",)))["tool/partial"] == 0


def test_evaluation_keeps_verdicts_when_the_judge_refuses(services, tmp_path, caplog):
    lines = [
        {"question": f"What is {n}?", "ground_truth": "it", "data_id": f"q{n}",
         "turns": [{"response": f"<reason>r</reason><answer>a {n}</answer>", "action": "answer"}]}
        for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = configured(services.url, limits=("judge=1000/1",))
    services.faults["judge"] = lambda body: 401 if services.requests["judge"] > 10 else None
    with pytest.raises(ServiceRefusedError, match="judge at"):
        rescore(config, path, tmp_path / "out")
    gc.collect()  # asyncio then logs exceptions that were never retrieved
    assert "Traceback" not in caplog.text
    kept = (tmp_path / "out" / "verdicts.jsonl").read_text().count("\n")
    assert kept == 10 and not (tmp_path / "out" / "results.json").exists()
    services.faults, services.requests = {}, collections.Counter()
    results = rescore(config, path, tmp_path / "out")
    assert services.requests["judge"] == 30 and results["no_verdict"] == results["unreadable"] == 0
    assert results["workflows"]["recorded"]["accuracy"]["judge"]["mean"] == 1


class Learner:
    """Learner whose parameters are a function of the IDs of its questions, in order."""

    def __init__(self, model, *arguments, **keywords):
        self.trained, self.optimizer = {"w": jnp.zeros(4)}, {"m": jnp.zeros(2)}
        self.params = None
        self.snapshot = lambda memory: None
        self.restore = lambda: None
        Learner.now = self


@pytest.fixture
def stubbed_config(services, monkeypatch, tmp_path):
    """A config for a trainer with a real judge, loop, order of questions, checkpoints and metrics,
    in which policy, engine and learner are stubs."""
    config = configured(services.url)
    config.data.train = config.data.validation = (str(questions(tmp_path)),)
    config.run.prompts_per_step, config.run.group_size, config.run.steps = 2, 1, 4
    config.run.save_every, config.run.log_to = 0, ""
    engine = types.SimpleNamespace(
        load=lambda params: None, release=lambda: None, close=lambda: None
    )

    def roll_out(engine, source, config, judge, *, seed, step, timeline, must_stop):
        drawn = next(source)
        episodes = [episode_of(f"<reason>r</reason><answer>{q.id} {step}</answer>", group=i)
                    for i, q in enumerate(drawn)]  # fmt: skip
        rewards = train.compute_rewards(episodes, drawn, config, judge, step=step - 1)
        seen = jnp.array([float(q.id[1:]) + step / 8 for q in drawn] * 2)
        Learner.now.trained = {"w": Learner.now.trained["w"] * 2 + seen}
        pairs = list(zip(episodes, rewards, strict=True))
        questions = dict(enumerate(drawn))
        return train.RolloutBatch([], [], 0, pairs, questions, len(drawn), 0)

    def validate(engine, source, config, judge, *, must_stop):
        episodes = [episode_of("<reason>r</reason><answer>y</answer>")]
        train.compute_rewards(episodes, list(source)[:1], config, judge, step=0)
        return {"validation/accuracy": 1.0}

    model = types.SimpleNamespace(config=random_policy.CONFIG)
    monkeypatch.setattr(train.train_utils, "load_policy", lambda *_: model)
    monkeypatch.setattr(train.train_utils, "save_policy", lambda *_: None)
    monkeypatch.setattr(train, "StopSignal",
                        lambda: types.SimpleNamespace(is_set=lambda: False))  # fmt: skip
    monkeypatch.setattr(train, "make_engine", lambda *_: engine)
    monkeypatch.setattr(train, "Learner", Learner)
    monkeypatch.setattr(train, "roll_out", roll_out)
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "write_episodes", lambda *_: None)
    return config


def run_train(config, path):
    with train_utils.open_workdir(str(path)) as workdir:
        return train.train(config, "policy", workdir)


def update_metrics(workdir):
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_run_is_saved_when_the_judge_refuses_and_resumes_bit_exactly(
    services, stubbed_config, tmp_path
):
    assert run_train(stubbed_config, tmp_path / "unbroken") == 0
    unbroken = Learner.now.trained["w"]
    # One test request and two answers per step: the second answer of the third step is refused.
    services.requests.clear()
    services.faults["judge"] = lambda body: 401 if services.requests["judge"] > 6 else None
    workdir = tmp_path / "run"
    with pytest.raises(ServiceRefusedError, match=f"judge at .*401.*{workdir}: step 2 is saved"):
        run_train(stubbed_config, workdir)
    assert [line["step"] for line in update_metrics(workdir)] == [1, 2]
    assert [path.name for path in (workdir / "checkpoints").glob("[0-9]*")] == ["2"]
    services.faults.clear()
    assert run_train(stubbed_config, workdir) == 0
    assert update_metrics(workdir) == update_metrics(tmp_path / "unbroken")
    assert (Learner.now.trained["w"] == unbroken).all()


def test_refusal_during_validation_ends_the_run_after_that_step(services, stubbed_config, tmp_path):
    stubbed_config.run.validate_every = 2
    services.faults["judge"] = lambda body: 401 if services.requests["judge"] > 5 else None
    with pytest.raises(ServiceRefusedError, match="step 2 is saved"):
        run_train(stubbed_config, tmp_path / "run")
    assert [line["step"] for line in update_metrics(tmp_path / "run")] == [1, 2]
    services.faults.clear()
    assert run_train(stubbed_config, tmp_path / "run") == 0
    lines = update_metrics(tmp_path / "run")
    assert [line.get("validation/accuracy") for line in lines] == [None, None, None, 1.0]


def test_refusal_in_the_first_step_saves_nothing(services, stubbed_config, tmp_path):
    services.faults["judge"] = lambda body: 401 if services.requests["judge"] > 1 else None
    with pytest.raises(ServiceRefusedError, match="no step is complete"):
        run_train(stubbed_config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_service_failures_are_metrics_of_their_step(services, stubbed_config, tmp_path):
    services.faults["judge"] = lambda body: (
        503 if services.requests["judge"] in (2, 3) else None  # both answers of the first step
    )
    fallbacks.count("cache/failed")  # before the first step, so it belongs to no step
    assert run_train(stubbed_config, tmp_path / "run") == 0
    lines = update_metrics(tmp_path / "run")
    assert [line["judge/failed"] for line in lines] == [1, 0, 0, 0]
    assert [line["judge/requests"] for line in lines] == [2] * 4
    assert not any("cache/failed" in line for line in lines)


def test_finished_run_needs_no_service(services, stubbed_config, tmp_path):
    assert run_train(stubbed_config, tmp_path / "run") == 0
    services.faults["judge"] = 401
    assert run_train(stubbed_config, tmp_path / "run") == 0
