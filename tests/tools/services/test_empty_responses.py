"""Responses without content, or with an error: never mistaken for an empty result."""

import asyncio
import json

import pytest

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.cached_tool import CachedCalls, CachedFinder, CachedReader, CachedSearch
from mmsr1_jax.tools.services import Hit
from mmsr1_jax.tools.services.jina import Jina
from mmsr1_jax.tools.services.reader import Reader
from mmsr1_jax.tools.services.retrieval import Retrieval
from mmsr1_jax.tools.services.searxng import SearXNG
from mmsr1_jax.tools.services.serpapi import SerpApi
from mmsr1_jax.tools.services.serper import Serper
from mmsr1_jax.tools.services.summariser import Summariser
from mmsr1_jax.tools.text_search import PassageSearch, TextSearch
from mmsr1_jax.tools.tool_cache import ToolCache
from mmsr1_jax.tools.web import StatusError, WebError, WebResponse


class ScriptedService:
    """Service with scripted responses, in order; the last one repeats. Exceptions are raised."""

    def __init__(self, *responses):
        self.responses, self.calls = list(responses), 0

    async def call(self, method, url, parse=lambda response: response, **request):
        self.calls += 1
        response = self.responses[0] if len(self.responses) == 1 else self.responses.pop(0)
        if isinstance(response, Exception):
            raise response
        if isinstance(response, WebResponse):
            return parse(response)
        return parse(WebResponse("", "application/json", None, json.dumps(response).encode()))


def text_page(text, charset=None, media_type="text/plain"):
    body = text if isinstance(text, bytes) else text.encode()
    return WebResponse("", media_type, charset, body)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY", "JINA_API_KEY", "SUMMARISER_API_KEY"):
        monkeypatch.setenv(name, "secret")


FINDERS = {
    "serpapi": SerpApi,
    "serper": Serper,
    "searxng": lambda service: SearXNG(service, base_url="http://x"),
}
CALLS = {name: lambda make, service: make(service).search("q", 5) for name in FINDERS} | {
    "serpapi lens": lambda make, service: SerpApi(service).lens("http://p"),
    "serper lens": lambda make, service: Serper(service).lens("http://p"),
    "retrieval": lambda make, service: Retrieval(service, base_url="http://x").passages("q", 5),
}


def search_results(name, answer):
    return asyncio.run(CALLS[name](FINDERS.get(name), ScriptedService(answer)))


META = {"search_metadata": {"status": "Success"}, "search_parameters": {"q": "x"}}
NONE = "Google hasn't returned any results for this query."


@pytest.mark.parametrize("name, answer", [
    ("serpapi", META | {"error": NONE}),
    ("serpapi", META | {"search_information": {"organic_results_state": "Fully empty"}}),
    ("serpapi", META | {"organic_results": []}),
    ("serpapi lens", META | {"error": "Google Lens hasn't returned any results for this query."}),
    ("serper", {"searchParameters": {}, "organic": [], "credits": 1}),
    ("serper lens", {"organic": []}),
    ("searxng", {"results": [], "answers": [], "infoboxes": []}),
    ("retrieval", {"result": [[]]}),
    ("retrieval", {"results": []}),
])  # fmt: skip
def test_explicitly_empty_response_has_no_results(name, answer):
    assert search_results(name, answer) == []


@pytest.mark.parametrize("name, answer", [
    ("serpapi", META), ("serpapi", {}), ("serpapi", [1]), ("serpapi", None),
    ("serpapi", {"search_metadata": {"status": "Processing"}}),
    ("serpapi", {"search_metadata": {"status": "Queued"}}),
    ("serpapi", META | {"error": "We couldn't get valid results for this search."}),
    ("serpapi", META | {"organic_results": {"0": {"link": "http://a"}}}),
    ("serpapi", META | {"organic_results": [None, {}, {"link": 3}]}),
    ("serpapi lens", META), ("serpapi lens", META | {"visual_matches": [{"title": None}]}),
    ("serper", {"searchParameters": {"q": "x"}, "credits": 1}), ("serper", {"organic": "x"}),
    ("serper", {"organic": [{"title": "no link"}]}), ("serper", {"error": {"message": "busy"}}),
    ("serper lens", {"searchParameters": {}}),
    ("searxng", {"query": "q"}), ("searxng", {"results": [{"title": "t"}]}),
    ("searxng", {"results": [], "error": "engine failed"}),
    ("searxng", {"results": [], "unresponsive_engines": [["google", "CAPTCHA"]]}),
    ("retrieval", {}), ("retrieval", {"result": []}), ("retrieval", {"error": "index not loaded"}),
    ("retrieval", {"result": [[{"document": {"id": "1"}, "score": 1}, None]]}),
    ("retrieval", {"result": [[{"document": {"contents": " \n"}}]]}),
    ("retrieval", {"results": [{"id": "1", "content": "..."}]}),
    ("retrieval", {"result": [[], []]}),
])  # fmt: skip
def test_response_without_result_list_is_an_error(name, answer):
    with pytest.raises(WebError) as raised:
        search_results(name, answer)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name, answer, status", [
    ("serpapi", {"error": "Your account has run out of searches."}, 402),
    ("serpapi", {"error": "Invalid API key. Your API key should be here: https://x"}, 401),
    ("serpapi", StatusError(429, None, b'{"error": "Your account has run out of searches."}'), 402),
    ("serpapi", StatusError(401, None, b'{"error": "Invalid API key."}'), 401),
    ("serpapi", {"error": "Your account has been suspended"}, 403),
    ("serper", {"message": "Not enough credits", "statusCode": 400}, 402),
    ("serper", StatusError(400, None, b'{"message":"Not enough credits","statusCode":400}'), 402),
    ("serper", {"message": "Unauthorized.", "statusCode": 403}, 401),
    ("serper", {"message": "odd", "statusCode": 403}, 403),
    ("searxng", StatusError(403, None, b"<h1>Forbidden</h1>"), 403),
    ("retrieval", {"error": {"message": "insufficient quota", "code": 429}}, 402),
])  # fmt: skip
def test_refusal_messages_are_mapped_to_a_status(name, answer, status):
    with pytest.raises(StatusError) as raised:
        search_results(name, answer)
    assert raised.value.status == status and not raised.value.transient


@pytest.mark.parametrize("name, answer", [
    ("serpapi", {"error": "You are exceeding 200 searches per hour limit of your plan."}),
    ("serpapi", StatusError(429, None, b'{"error": "Rate limit exceeded, try again"}')),
    ("serper", {"message": "Too many requests", "statusCode": 429}),
    ("serper", {"message": "Internal", "statusCode": 500}),
    ("searxng", StatusError(503, None, b"unauthorized upstream")),
    ("retrieval", {"error": "CUDA out of memory"}),
])  # fmt: skip
def test_transient_errors_are_not_refusals(name, answer):
    with pytest.raises(WebError) as raised:
        search_results(name, answer)
    assert raised.value.transient or not isinstance(raised.value, StatusError)
    assert getattr(raised.value, "status", None) not in (401, 402, 403)


def test_results_take_precedence_over_an_error_field():
    entry = {"link": "http://a", "title": "t", "snippet": "s"}
    answer = META | {"error": NONE, "organic_results": [entry, None, {"link": None}]}
    assert search_results("serpapi", answer) == [Hit("http://a", "t", "s")]


@pytest.mark.parametrize("name, answer, text", [
    ("serpapi", META | {"answer_box": {"answer": "1932"}}, "1932"),
    ("serpapi", META | {"organic_results": [], "knowledge_graph": {"title": "Tower",
                        "description": "Built in 1932"}}, "Built in 1932"),
    ("serper", {"answerBox": {"snippet": "1932", "title": "Tower"}, "organic": []}, "1932"),
    ("serper", {"knowledgeGraph": {"title": "Tower", "description": "Built in 1932"}},
     "Built in 1932"),
    ("searxng", {"results": [], "answers": [{"answer": "1932", "url": "http://a"}]}, "1932"),
    ("searxng", {"results": [], "answers": ["1932"], "unresponsive_engines": [["x", "y"]]}, "1932"),
    ("searxng", {"results": [], "infoboxes": [{"infobox": "T", "content": "1932"}]}, "1932"),
])  # fmt: skip
def test_answer_boxes_are_shown_as_hits_without_reading_a_page(name, answer, text):
    class Unused:
        async def read(self, url):
            raise AssertionError(url)

    (hit,) = search_results(name, answer)
    search = TextSearch(FINDERS[name](ScriptedService(answer)), Unused())
    (result,) = asyncio.run(search(query())).results
    assert hit.snippet == text and result[0].text.endswith(f"\nsummary: {text}")
    assert not result[0].text.startswith("link: \n")


def query():
    return Query(action="text_search", text="q", question="When was it built?")


DOCUMENTS = [
    ({"result": [[{"document": {"contents": '"Tower"\nBuilt in 1932.'}, "score": 0.9}]]},
     ("Tower", "Built in 1932.")),
    ({"result": [[{"document": {"title": "Tower", "text": "Built in 1932."}, "score": 0.9}]]},
     ("Tower", "Built in 1932.")),
    ({"result": [[{"document": {"title": "Tower", "contents": "Built in 1932.\nIt is tall."}}]]},
     ("Tower", "Built in 1932.\nIt is tall.")),
    ({"result": [[{"title": "Tower", "contents": '"Tower"\nBuilt in 1932.'}]]},
     ("Tower", "Built in 1932.")),
    ({"query": "q", "results": [{"id": "1", "content": "Built in 1932.", "score": 0.9}]},
     ("Built in 1932.", "Built in 1932.")),
    ({"results": [[{"document": "Tower\nBuilt in 1932."}]]}, ("Tower", "Built in 1932.")),
    ({"result": [["Tower\nBuilt in 1932."]]}, ("Tower", "Built in 1932.")),
    ({"result": [[{"document": {"contents": " ", "text": "Built in 1932.", "title": "T"}}]]},
     ("T", "Built in 1932.")),
]  # fmt: skip


@pytest.mark.parametrize("answer, passage", DOCUMENTS)
def test_retrieval_documents_are_parsed_in_every_known_format(answer, passage):
    assert search_results("retrieval", answer) == [passage]


HEADER = "Title: report.pdf\n\nURL Source: http://first.example/report.pdf\n\n"
JINA_WITHOUT_PAGE = {
    "blank": text_page(""),
    "a blank page": text_page(HEADER + "Markdown Content:\n"),
    "all fields": text_page(HEADER + "Published Time: Tue, 01 Jan 2030 00:00:00 GMT\n\n"
                              "Number of Pages: 3\n\nMarkdown Content:\n\n\n"),
    "no content field": text_page("Title: \n\nURL Source: http://first.example\n"),
    "title only": text_page("Title: The tower of Porto"),
    "target refused": text_page(HEADER + "Warning: Target URL returned error 403: Forbidden\n\n"
                                  "Markdown Content:\n## Access denied and some more text"),
    "CAPTCHA": text_page(HEADER + "Warning: This page maybe requiring CAPTCHA, please make sure "
                           "you are authorized.\n\nMarkdown Content:\nJust a moment..."),
    "challenge by title": text_page("Title: Just a moment...\n\nMarkdown Content:\nexample.com"),
    "images only": text_page(HEADER + "Markdown Content:\n![Image 1: a logo](http://x/y.png)"),
    "JSON": text_page('{"code": 200, "data": {"title": "T", "content": ""}}', None,
                        "application/json"),
    "JSON of an error": text_page('{"data": null, "code": 422, "message": "Failed to goto"}'),
    "JSON of another service": text_page('{"status": "ok"}', None, "application/json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", JINA_WITHOUT_PAGE)
def test_jina_header_without_page_is_an_error(kind):
    jina = Jina(ScriptedService(JINA_WITHOUT_PAGE[kind]))
    with pytest.raises(WebError):
        asyncio.run(jina.read("http://first.example"))


@pytest.mark.parametrize("answer, status", [
    ({"data": None, "code": 402, "name": "InsufficientBalanceError",
      "message": "Account balance not enough to run this query"}, 402),
    ({"data": None, "code": 401, "name": "AuthenticationFailedError"}, 401),
    ({"data": None, "code": 429, "name": "RateLimitTriggeredError"}, 429),
])  # fmt: skip
def test_jina_errors_keep_their_status(answer, status):
    with pytest.raises(StatusError) as raised:
        asyncio.run(Jina(ScriptedService(answer)).read("http://x"))
    assert raised.value.status == status


def test_error_of_a_page_is_not_a_refusal_of_the_service():
    """The status 403 of a page must not stop a run as a refused key does."""
    with pytest.raises(WebError, match="HTTP status 403") as raised:
        asyncio.run(Jina(ScriptedService(JINA_WITHOUT_PAGE["target refused"])).read("http://x"))
    assert not isinstance(raised.value, StatusError)


@pytest.mark.parametrize("answer, text", [
    (text_page(HEADER + "Markdown Content:\nBuilt in 1932."), "Built in 1932."),
    (text_page("# Tower\nBuilt in 1932."), "# Tower\nBuilt in 1932."),
    (text_page(HEADER + "Warning: This is a cached snapshot\n\nMarkdown Content:\nBuilt in 1932"),
     "Built in 1932"),
    (text_page("Title: x\n\nMarkdown Content:\nfür 5 Jahre".encode("latin-1"), "iso-8859-1"),
     "für 5 Jahre"),
    (text_page("塔建于1932年".encode("gbk"), "gb2312"), "塔建于1932年"),
    (text_page('{"code": 200, "data": {"title": "T", "content": "Built in 1932"}}', None,
                 "application/json"), "Built in 1932"),
    (text_page('{"name": "a page that is JSON itself"}'), '{"name": "a page'),
])  # fmt: skip
def test_jina_pages_are_parsed(answer, text):
    assert text in asyncio.run(Jina(ScriptedService(answer)).read("http://x"))


def test_page_without_content_is_replaced_by_the_next_hit():
    hits = {"results": [{"url": f"http://{n}", "title": "t"} for n in range(3)]}
    pages = [
        text_page("Just a moment..."),
        text_page(HEADER),
        text_page("Built in 1932."),
    ]
    finder = SearXNG(ScriptedService(hits), base_url="http://x")
    observation = asyncio.run(
        TextSearch(finder, Jina(ScriptedService(*pages)), max_results=1, num_spare=2)(query())
    )
    assert [result[0].text for result in observation.results] == [
        "link: http://2\nsummary: Built in 1932."
    ]
    assert "page 1: " in observation.error and "page 2: " in observation.error


def test_hits_without_text_are_skipped():
    entries = [{"link": "http://a"}, {"link": "http://b", "title": None, "snippet": ["x"]},
               {"link": "http://c", "title": "Tower", "snippet": "..."}]  # fmt: skip
    service = ScriptedService(META | {"organic_results": entries})
    observation = asyncio.run(TextSearch(SerpApi(service))(query()))
    assert [result[0].text for result in observation.results] == ["link: http://c\nsummary: Tower"]


@pytest.mark.parametrize("summary", ["", " \n", "...", "\u200b"])
def test_blank_summary_is_an_error(summary):
    service = ScriptedService({"choices": [{"message": {"content": summary}}]})
    summariser = Summariser(service, base_url="http://x", model="m")
    with pytest.raises(WebError, match="no summary"):
        asyncio.run(summariser.summarise("page", "q"))


def test_failures_are_retried_in_mode_use(tmp_path):
    """Metadata without results, an error with status 200, a blank page: none of them is cached."""
    full = META | {"organic_results": [{"link": "http://a", "title": "T", "snippet": "s"}]}
    answers = [META, {"error": "Invalid API key."}, full]
    pages = [text_page(HEADER + "Markdown Content:\n"), text_page("Just a moment..."),
             text_page("Built in 1932.")]  # fmt: skip
    service, reader_service = ScriptedService(*answers), ScriptedService(*pages)

    def search():
        cached_calls = CachedCalls(ToolCache(tmp_path / "s.sqlite", "use"))
        finder = CachedFinder(SerpApi(service), cached_calls, "serpapi")
        reader = CachedReader(Jina(reader_service), cached_calls, "jina")
        return asyncio.run(CachedSearch(TextSearch(finder, reader), cached_calls, "x")(query()))

    assert [search().status for _ in range(6)] == ["failed"] * 4 + ["ok"] * 2
    assert service.calls == 3 and reader_service.calls == 3


def test_response_without_passages_is_not_cached(tmp_path):
    good = DOCUMENTS[0][0]
    service = ScriptedService({"result": [[{"document": {"id": "1"}}]]}, {"error": "busy"}, good)
    retrieval = Retrieval(service, base_url="http://x")
    search = PassageSearch(retrieval, CachedCalls(ToolCache(tmp_path / "s.sqlite", "use")), "x")
    statuses = [asyncio.run(search(query())).status for _ in range(4)]
    assert statuses == ["failed", "failed", "ok", "ok"] and service.calls == 3


@pytest.mark.parametrize("body", [
    b"<html><body><p>...</p></body></html>", b"\x1f\x8b\x08" + bytes(30), b"",
    b"<html><head><title>Just a moment...</title></head><body><h2>Enable JavaScript and cookies to "
    b"continue</h2></body></html>",
])  # fmt: skip
def test_reader_rejects_pages_without_content(body):
    reader = Reader(ScriptedService(text_page(body, None, "text/html")))
    with pytest.raises(WebError):
        asyncio.run(reader.read("http://x"))
