"""`python -m mmsr1_jax.scripts.tiny_world` writes files that the other commands read."""

import json

import pytest

from mmsr1_jax.data import QuestionSource
from mmsr1_jax.models.families import read_config
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools.local_index import LocalIndex
from tests.programs import run_module as run


@pytest.mark.proof
def test_written_files_are_read_by_the_other_commands(tmp_path):
    out = tmp_path / "world"
    counts = ["--train=8", "--heldout=4", "--unmet=4", "--sft_examples=3"]
    done = run(f"--out={out}", *counts, module="mmsr1_jax.scripts.tiny_world")
    assert done.returncode == 0, done.stderr
    for split, count in (("train", 8), ("heldout", 4), ("unmet", 4)):
        assert len(list(QuestionSource(out / f"{split}.parquet"))) == count
    Processor.from_directory(out / "policy").check_fits(read_config(out / "policy"))
    assert LocalIndex(out / "index")
    for name in ("demonstrations", "memories", "practice"):
        examples = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert len(examples) == 3 and all(example["turns"] for example in examples)
        assert all((out / path).is_file() for example in examples for path in example["images"])
        indices = {example["index"] for example in examples if "index" in example}
        assert bool(indices) == (name == "practice")
        assert all(LocalIndex(out / index) for index in indices)
