"""Every service is asked once before the first step; what refuses ends the command with one line,
and a judge that refuses later saves the run, which resumes bit-exactly."""

import asyncio
import collections
import gc
import io
import json
import socket
import types

import jax.numpy as jnp
import PIL.Image
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mmsr1_jax import curate, train
from mmsr1_jax.config import settings
from mmsr1_jax.data import Question, write_parquet
from mmsr1_jax.episodes.episode import ToolCall
from mmsr1_jax.evaluation import run as evaluation
from mmsr1_jax.evaluation.scoring import rescore
from mmsr1_jax.tools import Query
from mmsr1_jax.tools.build import check_services, make_tools
from mmsr1_jax.tools.cached_tool import CachedCalls
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.training import metrics, sft_dataset
from mmsr1_jax.utils import fallbacks
from tests.servers import serve
from tests.test_step import episode_of, reward_of

SECRET = "s3cret"
SETTINGS = {
    "serpapi": "config.services.serpapi_url, SERPAPI_API_KEY",
    "serper": "config.services.serper_url, SERPER_API_KEY",
    "searxng": "config.services.searxng_url",
    "retrieval": "config.services.retrieval_url",
    "reader": "config.services.jina_url, JINA_API_KEY",
    "summariser": "config.services.summariser_url, config.services.summariser_model",
    "judge": "config.services.judge_url, config.services.judge_model, JUDGE_API_KEY",
    "publisher": "config.services.upload_url, PUBLISHER_AUTHORIZATION",
}


class Services:
    """All services on one server, each under its name; `faults` makes one answer otherwise."""

    def __init__(self):
        self.faults, self.asked, self.url = {}, collections.Counter(), None

    async def answer(self, request):
        name = request.path_params["name"]
        body = await request.body()
        self.asked[name] += 1
        fault = self.faults.get(name)
        if callable(fault) and not isinstance(fault, Response):
            fault = fault(body)
        if isinstance(fault, Response):
            return fault
        if fault is not None:
            return Response(f"no: {SECRET}", status_code=fault)
        if name in ("summariser", "judge"):
            reply = '{"correct": true, "reason": "ok"}'
            return JSONResponse({"choices": [{"message": {"content": reply}}]})
        if name == "retrieval":
            return JSONResponse({"result": [[{"document": {"contents": "Title\nText."}}]]})
        if name == "reader":
            return PlainTextResponse("text of a page")
        found = {"url": "http://h/", "link": "http://h/", "title": "t", "content": "c"}
        return JSONResponse({k: [found] for k in ("results", "organic", "organic_results")})


@pytest.fixture(scope="module")
def running():
    services = Services()
    methods = ["GET", "POST", "PUT"]
    route = Route("/{name}/{rest:path}", services.answer, methods=methods)
    with serve(Starlette(routes=[route])) as services.url:
        yield services


@pytest.fixture
def services(running, monkeypatch):
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY", "JUDGE_API_KEY", "PUBLISHER_QUERY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("mmsr1_jax.tools.judge._PAUSE", 0.0)
    running.faults, running.asked = {}, collections.Counter()
    fallbacks.take_counts()
    return running


def configured(url, text="none", image="none", judge=True, **more):
    config = settings.Config()
    config.tools.text, config.tools.image = text, image
    fields = {"serpapi_url": "serpapi", "serper_url": "serper", "searxng_url": "searxng",
              "retrieval_url": "retrieval", "jina_url": "reader", "summariser_url": "summariser",
              "upload_url": "publisher/", "public_url": "public"}  # fmt: skip
    fields |= {"judge_url": "judge"} if judge else {}
    of = {field: f"{url}/{name}" for field, name in fields.items()}
    config.services = settings.Services(**(of | {"max_attempts": 1, "reader": "jina"} | more))
    return config


# What is asked


@pytest.mark.parametrize(
    "text, image, judge, asked",
    [
        ("none", "none", False, ""),
        ("none", "none", True, "judge"),
        ("searxng", "none", False, "searxng reader summariser"),
        ("retrieval", "none", True, "retrieval judge"),
        ("serpapi", "serpapi", True, "serpapi reader summariser publisher judge"),
        ("searxng", "serper", False, "searxng reader summariser serper publisher"),
        ("auto", "auto", True, "judge"),
    ],
)
def test_every_service_that_is_used_is_asked_once(services, capsys, text, image, judge, asked):
    config = configured(services.url, text, image, judge)
    check_services(config, [config.turns])
    assert services.asked == collections.Counter(asked.split())
    assert capsys.readouterr().err == "" and fallbacks.take_counts() == {}


def test_what_no_episode_may_search_for_is_not_asked(services):
    config = configured(services.url, "searxng", "serper")
    check_services(config, [settings.Turns(max_text_searches=0, max_searches=0)])
    assert set(services.asked) == {"judge"}
    check_services(config, [settings.Turns(max_text_searches=0)], judge=False)
    assert set(services.asked) == {"judge", "serper", "publisher"}
    config.services.reader = "none"  # then nothing is summarised either
    check_services(config, [settings.Turns(max_image_searches=0)], judge=False)
    assert services.asked["searxng"] == 1 and not services.asked["summariser"]


def test_a_replay_makes_no_connection(services, tmp_path):
    path = tmp_path / "store.sqlite"
    ToolCache(path).close()
    config = configured(services.url, "serper", "serper", cache=str(path), cache_mode="replay")
    check_services(config, [config.turns])
    assert not services.asked


# What refuses


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("status", [401, 402, 403, 404, 400, 301])
def test_a_refusal_names_service_address_and_setting_in_one_line(services, capsys, name, status):
    services.faults[name] = status
    text = name if name in ("serpapi", "serper", "retrieval") else "searxng"
    config = configured(services.url, text, "serper" if name == "publisher" else "none")
    with pytest.raises(ServiceRefusedError) as raised:
        check_services(config, [config.turns])
    line = str(raised.value)
    for words in (f"{name} at {services.url} ", f"HTTP status {status}", SETTINGS[name]):
        assert words in line
    assert SECRET not in line and "\n" not in line and capsys.readouterr().err == ""


def test_secrets_in_an_address_are_not_shown(services):
    host = services.url.removeprefix("http://")
    for url in (f"http://user:{SECRET}@{host}/judge", f"{services.url}/judge?key={SECRET}",
                f"{services.url}/{SECRET}/nothing"):  # fmt: skip
        services.faults[SECRET] = services.faults["judge"] = 403
        config = configured(services.url)
        config.services.judge_url = url
        with pytest.raises(ServiceRefusedError, match="judge at") as raised:
            check_services(config, [config.turns])
        assert SECRET not in str(raised.value) and host in str(raised.value)


def test_several_refusals_are_one_line(services):
    services.faults = {"searxng": 403, "judge": 401}
    config = configured(services.url, "searxng")
    with pytest.raises(ServiceRefusedError, match="searxng at .*; judge at ") as raised:
        check_services(config, [config.turns])
    assert "\n" not in str(raised.value)


def test_a_server_that_is_not_there_is_a_refusal():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url, words in (
        (f"http://127.0.0.1:{port}", "connection refused"),
        ("http://no-such-host.invalid", "(no such host name|its name cannot be looked up)"),
        ("localhost:1", "not an http or https address"),
    ):
        config = configured(url)
        with pytest.raises(ServiceRefusedError, match=f"judge.*{words}"):
            check_services(config, [config.turns])


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, PlainTextResponse("<html>"), JSONResponse({"error": "quota"}),
     JSONResponse({"choices": [{"message": {"content": "Yes"}}]})],
)  # fmt: skip
def test_what_may_pass_is_said_and_ends_nothing(services, capsys, fault):
    services.faults["judge"] = fault
    config = configured(services.url, max_attempts=2)
    check_services(config, [config.turns])
    passing = isinstance(fault, int) or b"Yes" not in fault.body
    assert services.asked["judge"] == (2 if passing else 1)
    assert capsys.readouterr().err.startswith("warning: judge failed its test: ")


def test_a_silent_server_is_not_waited_for_without_end(services, monkeypatch, capsys):
    async def never(_):
        await asyncio.sleep(60)

    monkeypatch.setattr("mmsr1_jax.tools.build._TEST_SECONDS", 0.05)
    monkeypatch.setattr(Judge, "test", never)
    config = configured(services.url)
    check_services(config, [config.turns])
    assert "judge failed its test: no answer within 0.05 s" in capsys.readouterr().err


# Before the first step of every command


def questions(tmp_path, count=4):
    path, file = tmp_path / "q.parquet", io.BytesIO()
    PIL.Image.new("RGB", (56, 56)).save(file, "png")
    write_parquet(path, [Question(id=f"q{i}", question="Which?", images=(file.getvalue(),),
                                  answers=("x",))
                         for i in range(count)])  # fmt: skip
    return path


def test_training_evaluation_and_curation_ask_before_they_load_anything(
    services, tmp_path, monkeypatch
):
    services.faults["judge"] = 401
    config = configured(services.url)
    data = (str(questions(tmp_path)),)
    config.data.train = config.eval.data = data
    with pytest.raises(ServiceRefusedError, match="judge at"):
        train.train(config, str(tmp_path / "no policy"), tmp_path / "run")
    for command in (evaluation.evaluate, curate.roll_out):
        monkeypatch.setattr(evaluation, "make_engine", None)
        monkeypatch.setattr(
            evaluation, "make_processor", lambda *_: types.SimpleNamespace(images=None)
        )
        with pytest.raises(ServiceRefusedError, match="judge at"):
            command(config, "no policy", tmp_path / command.__name__)
    assert services.asked["judge"] == 3


def test_stories_that_are_searched_for_ask_first(services, tmp_path):
    services.faults["searxng"] = 403
    config = configured(services.url, "searxng")
    with pytest.raises(ServiceRefusedError, match="searxng at"):
        sft_dataset._tools(config, None)
    (tmp_path / "pages.jsonl").write_text('{"title": "q"}')
    assert sft_dataset._tools(config, tmp_path)  # of an index of their own: nobody is asked
    assert not services.asked["judge"]


# Later


def test_a_search_that_is_refused_later_is_words_and_a_figure(services, capsys):
    config = configured(services.url, "searxng", judge=False)
    tool = make_tools(config)["text_search"]
    services.faults["searxng"] = 403
    fallbacks._logged.clear()

    async def ask():
        query = Query(action="text_search", text="q", question="What?")
        return [await tool(query) for _ in range(3)]

    for found in asyncio.run(ask()):
        assert found.status == "failed" and SECRET not in found.error
    assert fallbacks.take_counts() == {"service/searxng/failed": 3, "service/searxng/refused": 3}
    (line,) = capsys.readouterr().err.splitlines()
    assert f"searxng at {services.url} refuses" in line and "config.services.searxng_url" in line
    assert fallbacks.take_counts() == {}


def test_summaries_that_fail_and_a_store_that_fails_are_counted(services, tmp_path, monkeypatch):
    config = configured(services.url, "searxng", judge=False, cache=str(tmp_path / "s.sqlite"))
    tool = make_tools(config)["text_search"]
    services.faults["summariser"] = 500
    query = Query(action="text_search", text="q", question="What?")
    assert asyncio.run(tool(query)).status == "failed"
    assert fallbacks.take_counts() == {"service/summariser/failed": 1}
    stored = CachedCalls(ToolCache(tmp_path / "t.sqlite"))
    asyncio.run(stored.put("page", "k", "text"))
    (tmp_path / "t.sqlite").chmod(0o600)
    monkeypatch.setattr(stored._store, "get", lambda kind, key: (b'{"cut off', False))
    assert asyncio.run(stored.look("page", "k")) is None
    assert fallbacks.take_counts() == {"store/damaged": 1}


def test_searches_that_lack_results_are_a_figure():
    def of(*calls):
        episode = episode_of("<reason>r</reason><answer>x</answer>")
        episode.calls = [ToolCall(turn=0, action="text_search", query="q", status=status,
                                  notes=notes) for status, notes in calls]  # fmt: skip
        figures = metrics.episode_metrics([episode], [reward_of(1.0, True)], [""])
        return figures | {"tool/partial": metrics.partial_searches([episode])}

    assert of(("ok", ("page 2: HTTP status 403",)), ("ok", ()))["tool/partial"] == 0.5
    assert of(("failed", ("search: HTTP status 403",)))["tool/failed"] == 1
    assert of(("ok", ()), ("failed", ("x",)))["tool/partial"] == 0


def test_an_evaluation_keeps_what_is_judged_when_the_judge_refuses(services, tmp_path, caplog):
    lines = [
        {"question": f"What is {n}?", "ground_truth": "it", "data_id": f"q{n}",
         "turns": [{"response": f"<reason>r</reason><answer>a {n}</answer>", "action": "answer"}]}
        for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = configured(services.url, limits=("judge=1000/1",))
    services.faults["judge"] = lambda body: 401 if services.asked["judge"] > 10 else None
    with pytest.raises(ServiceRefusedError, match="judge at"):
        rescore(config, path, tmp_path / "out")
    gc.collect()  # what asyncio says of errors that nobody looked at, it says then
    assert "Traceback" not in caplog.text
    kept = (tmp_path / "out" / "verdicts.jsonl").read_text().count("\n")
    assert kept == 10 and not (tmp_path / "out" / "results.json").exists()
    services.faults, services.asked = {}, collections.Counter()
    results = rescore(config, path, tmp_path / "out")
    assert services.asked["judge"] == 30 and results["no_verdict"] == results["unreadable"] == 0
    assert results["workflows"]["recorded"]["accuracy"]["judge"]["mean"] == 1


class Learner:
    """Learns by adding the ids of the questions that it has seen."""

    def __init__(self, model, *arguments, **keywords):
        self.trained, self.optimizer = {"w": jnp.zeros(4)}, {"m": jnp.zeros(2)}
        self.params = None
        self.snapshot = lambda memory: None
        Learner.now = self


@pytest.fixture
def stand_ins(services, monkeypatch, tmp_path):
    """A trainer whose policy, engine and updates are stand-ins; the judge is real, and so are the
    loop, the questions' order, the checkpoints and the figures."""
    config = configured(services.url)
    config.data.train = config.data.validation = (str(questions(tmp_path)),)
    config.run.prompts_per_step, config.run.group_size, config.run.steps = 2, 1, 4
    config.run.save_every, config.run.log_to = 0, ""
    engine = types.SimpleNamespace(load=lambda params: None, close=lambda: None)

    def roll_out(engine, source, config, judge, *, seed, step):
        drawn = next(source)
        episodes = [episode_of(f"<reason>r</reason><answer>{q.id} {step}</answer>", group=i)
                    for i, q in enumerate(drawn)]  # fmt: skip
        rewards = train.compute_rewards(episodes, drawn, config, judge, step=step - 1)
        seen = jnp.array([float(q.id[1:]) + step / 8 for q in drawn] * 2)
        Learner.now.trained = {"w": Learner.now.trained["w"] * 2 + seen}
        return train.RolloutBatch([], list(zip(episodes, rewards, strict=True)), drawn, 0)

    def validate(engine, source, config, judge):
        episodes = [episode_of("<reason>r</reason><answer>y</answer>")]
        train.compute_rewards(episodes, list(source)[:1], config, judge, step=0)
        return {"validation/accuracy": 1.0}

    model = types.SimpleNamespace(config=None)
    monkeypatch.setattr(train.train_utils, "load_policy", lambda *_: model)
    monkeypatch.setattr(train.train_utils, "save_policy", lambda *_: None)
    monkeypatch.setattr("mmsr1_jax.training.training_run.StopSignal",
                        lambda: types.SimpleNamespace(is_set=lambda: False))  # fmt: skip
    monkeypatch.setattr(train, "make_engine", lambda *_: engine)
    monkeypatch.setattr(train, "Learner", Learner)
    monkeypatch.setattr(train, "roll_out", roll_out)
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "write_episodes", lambda *_: None)
    return config


def update_metrics(workdir):
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_a_judge_that_refuses_later_saves_the_run_which_resumes_bit_exactly(
    services, stand_ins, tmp_path
):
    assert train.train(stand_ins, "policy", tmp_path / "unbroken") == 0
    unbroken = Learner.now.trained["w"]
    # The test question and two answers a step: the third step is refused at its second answer.
    services.asked.clear()
    services.faults["judge"] = lambda body: 401 if services.asked["judge"] > 6 else None
    workdir = tmp_path / "run"
    with pytest.raises(ServiceRefusedError, match=f"judge at .*401.*{workdir}: step 2 is saved"):
        train.train(stand_ins, "policy", workdir)
    assert [line["step"] for line in update_metrics(workdir)] == [1, 2]
    assert [path.name for path in (workdir / "checkpoints").glob("[0-9]*")] == ["2"]
    services.faults.clear()
    assert train.train(stand_ins, "policy", workdir) == 0
    assert update_metrics(workdir) == update_metrics(tmp_path / "unbroken")
    assert (Learner.now.trained["w"] == unbroken).all()


def test_a_refusal_in_a_validation_ends_the_run_after_its_step(services, stand_ins, tmp_path):
    stand_ins.run.validate_every = 2
    services.faults["judge"] = lambda body: 401 if services.asked["judge"] > 5 else None
    with pytest.raises(ServiceRefusedError, match="step 2 is saved"):
        train.train(stand_ins, "policy", tmp_path / "run")
    assert [line["step"] for line in update_metrics(tmp_path / "run")] == [1, 2]
    services.faults.clear()
    assert train.train(stand_ins, "policy", tmp_path / "run") == 0
    lines = update_metrics(tmp_path / "run")
    assert [line.get("validation/accuracy") for line in lines] == [None, None, None, 1.0]


def test_a_refusal_in_the_first_step_saves_nothing(services, stand_ins, tmp_path):
    services.faults["judge"] = lambda body: 401 if services.asked["judge"] > 1 else None
    with pytest.raises(ServiceRefusedError, match="no step is complete"):
        train.train(stand_ins, "policy", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_faults_of_services_are_figures_of_their_step(services, stand_ins, tmp_path):
    services.faults["judge"] = lambda body: (
        503 if services.asked["judge"] in (2, 3) else None  # both answers of the first step
    )
    fallbacks.count("store/failed")  # before the first step: of none
    assert train.train(stand_ins, "policy", tmp_path / "run") == 0
    lines = update_metrics(tmp_path / "run")
    assert [line["judge/failed"] for line in lines] == [1, 0, 0, 0]
    assert [line["judge/requests"] for line in lines] == [2] * 4
    assert not any("store/failed" in line for line in lines)


def test_a_finished_run_needs_no_service(services, stand_ins, tmp_path):
    assert train.train(stand_ins, "policy", tmp_path / "run") == 0
    services.faults["judge"] = 401
    assert train.train(stand_ins, "policy", tmp_path / "run") == 0
