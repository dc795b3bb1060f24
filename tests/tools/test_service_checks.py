"""Test requests: every used service gets one, and refusals end the command with one line."""

import asyncio
import collections
import socket
import types

import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from mmsr1_jax import curate, train
from mmsr1_jax.config import settings
from mmsr1_jax.evaluation import run as evaluation
from mmsr1_jax.tools.judge import Judge
from mmsr1_jax.tools.service import ServiceRefusedError
from mmsr1_jax.tools.service_checks import check_services
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.training import sft_dataset
from mmsr1_jax.training.workdir import Workdir
from mmsr1_jax.utils import fallbacks
from tests.tools import fake_services
from tests.tools.fake_services import SECRET, configured, questions

SETTINGS = {
    "serpapi": "config.services.serpapi_url, SERPAPI_API_KEY",
    "serper": "config.services.serper_url, SERPER_API_KEY",
    "searxng": "config.services.searxng_url",
    "retrieval": "config.services.retrieval_url",
    "reader": "config.services.jina_url, JINA_API_KEY",
    "summariser": "config.services.summariser_url, config.services.summariser_model",
    "judge": "config.services.judge_url, config.services.judge_model, JUDGE_API_KEY",
    "uploader": "config.services.upload_url, UPLOAD_AUTHORIZATION",
}


@pytest.fixture(scope="module")
def running():
    with fake_services.run_server() as services:
        yield services


@pytest.fixture
def services(running, monkeypatch):
    fake_services.reset(running, monkeypatch)
    return running


@pytest.mark.parametrize(
    "text, image, judge, requested",
    [
        ("none", "none", False, ""),
        ("none", "none", True, "judge"),
        ("searxng", "none", False, "searxng reader summariser"),
        ("retrieval", "none", True, "retrieval judge"),
        ("serpapi", "serpapi", True, "serpapi reader summariser uploader judge"),
        ("searxng", "serper", False, "searxng reader summariser serper uploader"),
        ("auto", "auto", True, "judge"),
    ],
)
def test_every_used_service_gets_one_test_request(services, capsys, text, image, judge, requested):
    config = configured(services.url, text, image, judge)
    check_services(config, [config.turns])
    assert services.requests == collections.Counter(requested.split())
    assert capsys.readouterr().err == "" and fallbacks.take_counts() == {}


def test_services_of_forbidden_searches_are_skipped(services):
    config = configured(services.url, "searxng", "serper")
    check_services(config, [settings.Turns(max_text_searches=0, max_searches=0)])
    assert set(services.requests) == {"judge"}
    check_services(config, [settings.Turns(max_text_searches=0)], judge=False)
    assert set(services.requests) == {"judge", "serper", "uploader"}
    config.services.reader = "none"  # so pages are not summarised either
    check_services(config, [settings.Turns(max_image_searches=0)], judge=False)
    assert services.requests["searxng"] == 1 and not services.requests["summariser"]


def test_replay_mode_sends_no_test_requests(services, tmp_path):
    path = tmp_path / "store.sqlite"
    ToolCache(path).close()
    config = configured(services.url, "serper", "serper", cache=str(path), cache_mode="replay")
    check_services(config, [config.turns])
    assert not services.requests


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("status", [401, 402, 403, 404, 400, 301])
def test_refusal_names_service_address_and_settings_in_one_line(services, capsys, name, status):
    services.faults[name] = status
    text = name if name in ("serpapi", "serper", "retrieval") else "searxng"
    config = configured(services.url, text, "serper" if name == "uploader" else "none")
    with pytest.raises(ServiceRefusedError) as raised:
        check_services(config, [config.turns])
    line = str(raised.value)
    for text in (f"{name} at {services.url} ", f"HTTP status {status}", SETTINGS[name]):
        assert text in line
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


def test_several_refusals_are_reported_in_one_line(services):
    services.faults = {"searxng": 403, "judge": 401}
    config = configured(services.url, "searxng")
    with pytest.raises(ServiceRefusedError, match="searxng at .*; judge at ") as raised:
        check_services(config, [config.turns])
    assert "\n" not in str(raised.value)


def test_unreachable_server_is_a_refusal():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url, text in (
        (f"http://127.0.0.1:{port}", "connection refused"),
        ("http://no-such-host.invalid", "(no such host name|its name cannot be looked up)"),
        ("localhost:1", "not an http or https URL"),
    ):
        config = configured(url)
        with pytest.raises(ServiceRefusedError, match=f"judge.*{text}"):
            check_services(config, [config.turns])


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, PlainTextResponse("<html>"), JSONResponse({"error": "quota"}),
     JSONResponse({"choices": [{"message": {"content": "Yes"}}]})],
)  # fmt: skip
def test_transient_failure_is_logged_and_ignored(services, capsys, fault):
    services.faults["judge"] = fault
    config = configured(services.url, max_attempts=2)
    check_services(config, [config.turns])
    passing = isinstance(fault, int) or b"Yes" not in fault.body
    assert services.requests["judge"] == (2 if passing else 1)
    assert capsys.readouterr().err.startswith("warning: the test request to judge failed (")


def test_unresponsive_server_is_waited_for_until_the_timeout(services, monkeypatch, capsys):
    async def never(_):
        await asyncio.sleep(60)

    monkeypatch.setattr("mmsr1_jax.tools.service_checks._TIMEOUT", 0.05)
    monkeypatch.setattr(Judge, "test", never)
    config = configured(services.url)
    check_services(config, [config.turns])
    assert "test request to judge failed (no response within 0.05 s)" in capsys.readouterr().err


def test_train_evaluate_and_curate_check_services_before_loading(services, tmp_path, monkeypatch):
    services.faults["judge"] = 401
    config = configured(services.url)
    data = (str(questions(tmp_path)),)
    config.data.train = config.eval.data = data
    with pytest.raises(ServiceRefusedError, match="judge at"):
        train.train(config, str(tmp_path / "no policy"), Workdir(tmp_path / "run"))
    for command in (evaluation.evaluate, curate.roll_out):
        monkeypatch.setattr(evaluation, "make_engine", None)
        monkeypatch.setattr(
            evaluation, "make_processor", lambda *_: types.SimpleNamespace(images=None)
        )
        with pytest.raises(ServiceRefusedError, match="judge at"):
            command(config, "no policy", tmp_path / command.__name__)
    assert services.requests["judge"] == 3


def test_sft_checks_services_before_searching(services, tmp_path):
    services.faults["searxng"] = 403
    config = configured(services.url, "searxng")
    with pytest.raises(ServiceRefusedError, match="searxng at"):
        sft_dataset._tools(config, None)
    (tmp_path / "pages.jsonl").write_text('{"title": "q"}')
    assert sft_dataset._tools(config, tmp_path)  # with its own index, no service is used
    assert not services.requests["judge"]
