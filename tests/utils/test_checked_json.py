"""Untrusted JSON: invalid values are errors that name the source and the field."""

import dataclasses
import io
import json
import math
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest

from mmsr1_jax.apps.serve import app
from mmsr1_jax.data import DataError
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.evaluation import batched_queries, records
from mmsr1_jax.tools.web import BodyError, WebResponse
from mmsr1_jax.training import metrics
from mmsr1_jax.utils import checked_json
from mmsr1_jax.utils.checked_json import FormatError, NotJsonError
from tests.test_figures import line


@dataclasses.dataclass
class Limits:
    lanes: Annotated[int, msgspec.Meta(ge=1, le=8)]
    names: tuple[str, ...] = ()


class Item(TypedDict):
    limits: Limits
    kind: Literal["a", "b"]


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_nesting_is_limited_to_64_levels(opening, closing):
    pairs = 64 // len(closing)
    valid = opening * pairs + "1" + closing * pairs
    assert checked_json.loads(valid) == json.loads(valid)
    with pytest.raises(FormatError, match="f: .*nested"):
        checked_json.loads(f"[{valid}]", name="f")
    empty = "[" * 65 + "]" * 65
    for text in (empty, opening * 200_000, "[" * 990 + "]" * 990):
        with pytest.raises(FormatError, match="nested"):
            checked_json.loads(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": {"b": [1, NaN]}}', "a.b[1]: must not be nan"),
        ('{"a": -Infinity}', "a: must not be -inf"), ("1e999", "must not be inf"),
        ('[{"a": 1e400}, 2]', "[0].a: must not be inf"),
        ('{"a": 18446744073709551616}', "a: must not be an integer of more than 64 bits"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ('{"a": ["\\ud800"]}', "a[0]: contains a lone surrogate"),
        ('{"x": {"\\udfff": 1}}', "x: contains a lone surrogate"),
        ("", "not JSON"), ("[1", "not JSON"),
        ("{'a': 1}", "not JSON"), ('"a\nb"', "not JSON"), ("[1]]", "not JSON"),
    ],
)  # fmt: skip
def test_invalid_values_are_errors_that_name_the_field(text, message):
    with pytest.raises(FormatError) as caught:
        checked_json.loads(text, name="x.json")
    assert str(caught.value).startswith(f"x.json: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"limits": {"lanes": True}, "kind": "a"}, "limits.lanes: expected int, got bool"),
        ({"limits": {"lanes": 3.0}, "kind": "a"}, "limits.lanes: expected int, got float"),
        ({"limits": {"lanes": 9}, "kind": "a"}, "limits.lanes: expected int <= 8"),
        ({"limits": {"lanes": 1, "names": ["a", None]}, "kind": "a"}, "limits.names[1]: expected"),
        ({"limits": [], "kind": "a"}, "limits: expected object, got array"),
        ({"limits": {"lanes": 1}, "kind": " - at `$.limits`" * 9}, "kind: invalid enum value"),
        ({"kind": "a"}, "object missing required field limits"), ([], "expected object, got array"),
    ],
)  # fmt: skip
def test_fields_of_the_wrong_type_are_errors_that_name_the_field(value, message):
    with pytest.raises(FormatError) as caught:
        checked_json.loads(json.dumps(value), Item)
    assert str(caught.value).startswith(message)


def test_exceptions_are_allowed_on_request():
    assert checked_json.loads(b'\xef\xbb\xbf{"a": 1, "a": 2}') == {"a": 2}
    assert checked_json.loads('"\\ud83d\\ude00"', str) == "😀"
    assert checked_json.loads('["\\ud800"]', surrogates=True) == ["\ud800"]
    assert math.isnan(checked_json.loads('{"a": NaN, "b": 1}', nan=True)["a"])
    assert checked_json.loads("[1.50, NaN, 7]", parse_number=str) == ["1.50", "NaN", "7"]
    assert checked_json.loads("[1, 2]", list[float]) == [1.0, 2.0]
    with pytest.raises(FormatError, match="64 bits"):
        checked_json.loads('{"a": NaN, "b": 99999999999999999999}', nan=True)


def test_large_integers_are_allowed_on_request():
    large = '{"a": [-99999999999999999999, 1]}'
    assert checked_json.loads(large, dict[str, Any], large=True) == json.loads(large)
    with pytest.raises(FormatError, match="a: must not be nan"):
        checked_json.loads('{"b": 99999999999999999999, "a": NaN}', large=True)


def test_files_and_lines_are_bounded_and_errors_name_the_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b"1," * 100 + b"1]")
    assert len(checked_json.load(path, list)) == 101
    with pytest.raises(FormatError, match="a.json: cannot be read .*more than 100"):
        checked_json.load(path, max_bytes=100)
    with pytest.raises(FormatError, match="none.json: cannot be read"):
        checked_json.load(tmp_path / "none.json")
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(checked_json.load_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]
    path.write_bytes(b'{"a": 1}\n{"a": "x"}\n')
    with pytest.raises(FormatError, match=r"a.json, line 2: a: expected int, got str"):
        list(checked_json.load_jsonl(path, TypedDict("A", {"a": int})))
    with pytest.raises(FormatError, match="line 2: longer than 8 bytes"):
        list(checked_json.jsonl_lines(io.BytesIO(b"1\n" + b"2" * 20), max_bytes=8))
    path.write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(NotJsonError, match="a.json, line 2: not UTF-8"):
        list(checked_json.load_jsonl(path))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[]\n", "line 1: expected object"), (b"{}\n", "line 1: .*field step"),
        (b"[" * 100_000, "line 1: .*nested"), (b"\xff\n", "line 1: not UTF-8"),
        (b'{"step": 1}\n{"st\n{"step": 3}\n', "line 2: not JSON"),
        (b'{"step": -1}\n', "line 1: step: expected int >= 0"),
        (b'{"step": "1"}\n', "line 1: step: expected int"), (b'{"step": 1.0}\n', "line 1: step"),
    ],
)  # fmt: skip
def test_an_invalid_metrics_file_is_an_error_that_names_the_line(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"metrics.jsonl, {message}"):
        metrics.Log(tmp_path, "", step=5, config={})


def test_metrics_with_a_truncated_last_line_and_nan_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in metrics.read(path)] == [1, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"turns": "x"}, {"turns": [5]}, {"turns": {}},
        {"calls": [{"status": 1, "action": "x"}]}, {"calls": [{"status": "ok"}]}, {"group": "0"},
        {"group": -1}, {"index": None}, {"sample": 1.5}, {"tokens": 1e300}, {"question": ["q"]},
        {"answers": ["a", 5]}, {"answers": "abc"}, {"answer": 7}, {"judge": {}}, {"judge": "yes"},
        {"judge": {"correct": "yes"}}, {"reward": {"reward": "1", "format": True}},
        {"reward": {"reward": math.nan, "format": True}}, {"score": True}, {"score": math.inf},
        {"images": [None]}, {"extracted": {"answer": 3, "error": None, "model": "m"}},
        {"pages_left_out": "3"}, {"id": None}, {"answer_format": ["Int"]},
    ],
)  # fmt: skip
def test_an_invalid_episode_is_an_error_that_names_the_line(tmp_path, fields):
    path = tmp_path / "episodes.jsonl"
    path.write_text(json.dumps(line()) + "\n" + json.dumps(line(**fields)) + "\n")
    with pytest.raises(DataError, match="episodes.jsonl, line 2: "):
        list(records.scan(path))


@pytest.mark.parametrize(
    "fields",
    [
        {"turns": [{"action": 5, "payload": None, "reason": None, "problem": None}]},
        {"calls": [{"turn": "0", "action": "a", "query": None, "status": "ok"}]},
        {"calls": [{"turn": 0, "action": "a", "query": None, "status": "ok", "notes": 7}]},
        {"end": ["answer"]}, {"error": {}}, {"segments": [{"kind": "model", "tokens": [1e300]}]},
    ],
)  # fmt: skip
def test_a_saved_episode_with_fields_of_the_wrong_type_is_an_error(fields):
    with pytest.raises(ValueError):
        Episode.from_json({"segments": [], **fields})


@pytest.mark.parametrize(
    "text", ["5\n", "[]\n", '["d"]\n', '["d", 5]\n', '["d", {"correct": 1}]\n', "[" * 70 + "\n"]
)
def test_cached_replies_of_an_evaluation_are_validated(tmp_path, text):
    path = tmp_path / "verdicts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"verdicts.jsonl, line 1: "):
        batched_queries.replies_to(
            {"d": 1}, None, None, path, shape=records.Verdict, pauses=(), what="judge"
        )


def answer(body: bytes) -> WebResponse:
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(WebResponse)}
    return WebResponse(**fields | {"body": body})


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a": NaN}', b"\xff", b'{"a": 1e999}', b"<p>"])
def test_a_response_that_is_not_json_is_a_failure(body):
    with pytest.raises(BodyError):
        answer(body).json()
    assert answer(b'{"a": "\\ud800"}').json() == {"a": "\ud800"}


@pytest.mark.parametrize(
    "head", [b"[]", b"5", b'{"question": 5}', b'{"question": ["a"]}', b"{", b"[" * 500, b"null"]
)
def test_the_first_line_of_a_request_must_contain_a_question(head):
    with pytest.raises(app.Refused):
        app.split(head + b"\npicture", app.Limits())
