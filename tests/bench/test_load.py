"""Searches of a training step by one process."""

import json
import subprocess
import sys

import pytest


@pytest.mark.proof
def test_2000_concurrent_searches_with_faults():
    command = [sys.executable, "-m", "tests.bench.tools", "--reader=jina", "--searches=2000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    cold = results["cold"]
    assert cold["ok"] + cold.get("failed", 0) == 2000 and cold["ok"] > 1800
    assert results["times_one_by_one"] >= 10
    assert results["memory_grown_mb"] < 100
    assert results["replay"]["searches_per_second"] >= 2000


@pytest.mark.proof
def test_a_few_searches_with_faults():
    command = [sys.executable, "-m", "tests.bench.tools", "--searches=60", "--alone=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["cold"]["ok"] > 45
    assert results["cold"]["ok"] + results["cold"].get("failed", 0) == 60
