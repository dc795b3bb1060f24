"""Scoring of existing answers without a policy, by matching and by judges that fail."""

import json
import zlib

import pytest

from mmsr1_jax.config import settings
from mmsr1_jax.evaluation.scoring import rescore
from mmsr1_jax.evaluation.table import format_results
from mmsr1_jax.rewards.reward_function import exact_match
from mmsr1_jax.tools.service import ServiceRefusedError
from tests.checksum_judge import verdict_text
from tests.programs import read_jsonl


def judge_config(server, **fields):
    config = settings.Config()
    config.services = settings.Services(
        judge_url=server and server.url, timeout=5.0, max_attempts=1, **fields
    )
    return config


def test_recorded_answers_are_scored_without_a_policy(shared, tmp_path, capsys):
    path = shared / "data" / "transcripts.jsonl"
    results = rescore(judge_config(None), path, tmp_path)
    assert results["recorded"] == {"episodes": 26, "same_actions": 26}
    assert "actions parsed as recorded: 26 of 26" in capsys.readouterr().out
    recorded = read_jsonl(path)
    correct = searches = 0
    for line, written in zip(recorded, read_jsonl(tmp_path / "episodes.jsonl"), strict=True):
        golds = line["candidate_answers"]
        golds = json.loads(golds) if isinstance(golds, str) else golds
        final = line["turns"][-1]
        answer = final["payload"] if final["action"] == "answer" else None
        assert (written["answer"] or "") == (answer or "") and written["id"] == line["data_id"]
        correct += exact_match(answer, [line["ground_truth"], *golds])
        searches += sum(turn["action"] in ("image_search", "text_search") for turn in line["turns"])
    metrics = results["workflows"]["recorded"]
    assert metrics["accuracy"]["em"]["mean"] == pytest.approx(correct / 26)
    assert metrics["searches"]["made"] == searches and metrics["questions"] == 26
    # The written file is scored again, with the same results.
    assert rescore(judge_config(None), tmp_path / "episodes.jsonl", None) == {
        **results, "provenance": {"rescored": str(tmp_path / "episodes.jsonl")},
    }  # fmt: skip
    with pytest.raises(ValueError, match="--out: required"):
        rescore(judge_config(None), path, None)


def test_answers_without_a_verdict_are_retried(shared, tmp_path, judge):
    path = shared / "data" / "transcripts.jsonl"
    judge.fault = True
    results = rescore(judge_config(judge), path, tmp_path)
    lines = read_jsonl(tmp_path / "episodes.jsonl")
    num_of_kind = {kind: 0 for kind in range(4)}
    for line in lines:
        verdict = line["judge"]
        if verdict["by"] == "match":  # no answer, or exactly a gold answer
            continue
        kind = zlib.crc32(line["answer"].encode()) % 4
        num_of_kind[kind] += 1
        if kind == 3:
            assert verdict["correct"] == json.loads(verdict_text(line["answer"]))["correct"]
            assert verdict["reason"] == f"length {len(line['answer'])}"
        elif kind == 2:
            assert verdict["correct"] is False
            assert verdict["reason"].startswith("no verdict in the reply: ")
        else:
            assert verdict["correct"] is None and verdict["reason"].startswith("no verdict: ")
    assert all(num_of_kind.values())
    failed = num_of_kind[0] + num_of_kind[1]
    retried = failed + num_of_kind[2]
    assert results["unreadable"] == num_of_kind[2]
    assert f"{failed} answers have no verdict" in format_results(results)
    accuracy = results["workflows"]["recorded"]["accuracy"]["judge"]
    assert results["no_verdict"] == accuracy["no_verdict"] == failed

    judge.fault, judge.num_requests = False, 0
    results = rescore(judge_config(judge), tmp_path / "episodes.jsonl", None)
    assert judge.num_requests == retried and results["no_verdict"] == 0
    for line in (judged := read_jsonl(tmp_path / "episodes.jsonl")):
        if line["judge"]["by"] == "judge":
            correct = json.loads(verdict_text(line["answer"]))["correct"]
            assert line["judge"]["correct"] is correct
    correct = sum(line["judge"]["correct"] for line in judged)
    accuracy = results["workflows"]["recorded"]["accuracy"]["judge"]
    assert accuracy["mean"] == pytest.approx(correct / 26)
    # Complete verdicts are not requested again, except by another judge; without one they are kept.
    rescore(judge_config(judge), tmp_path / "episodes.jsonl", None)
    assert judge.num_requests == retried
    assert rescore(judge_config(None), tmp_path / "episodes.jsonl", None)["no_verdict"] == 0
    rescore(judge_config(judge, judge_model="other"), tmp_path / "episodes.jsonl", None)
    assert judge.num_requests == retried + sum(num_of_kind.values())


def test_an_unreachable_judge_ends_the_evaluation(shared, tmp_path):
    config = settings.Config()
    config.services = settings.Services(judge_url="http://127.0.0.1:1", max_attempts=1)
    with pytest.raises(ServiceRefusedError, match="judge at http://127.0.0.1:1 .*refused"):
        rescore(config, shared / "data" / "transcripts.jsonl", tmp_path)
