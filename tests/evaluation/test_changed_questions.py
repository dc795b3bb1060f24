"""An evaluation is not resumed with other questions."""

import json

import pytest

from mmsr1_jax.config.settings import Config, Eval
from mmsr1_jax.data import DataError
from mmsr1_jax.data.benchmarks import read
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.evaluation.run import evaluate, to_line
from tests.benchmark_files import livevqa, png


def test_an_evaluation_is_not_resumed_if_its_questions_have_changed(tmp_path, tiny_dir, processor):
    """The first row gets its image only after the second question was answered, with index 0."""
    policy, out = tmp_path / "policy", tmp_path / "out"
    policy.mkdir()  # without parameters, so that no question is answered
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (policy / name).write_bytes((tiny_dir / name).read_bytes())
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [livevqa(3, query_image="late.png"), livevqa(4, query_image="a.png")]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    config = Config(eval=Eval(data=(str(tmp_path),), benchmark="livevqa"))
    (question,) = read("livevqa", tmp_path)
    out.mkdir()
    episode = Episode(example=question.example(), group=0, index=0, end="turns")
    line = json.dumps(to_line(episode, question, "direct", config, processor, out)) + "\n"
    (out / "episodes.jsonl").write_text(line + line[:40])  # as after a kill
    with pytest.raises(ValueError, match=f"{policy}.*config.json"):
        evaluate(config, policy, out)
    (tmp_path / "late.png").write_bytes(png(2))
    with pytest.raises(
        DataError, match="question 0 is '4', but the data now has '3' .*qa.json, row 0"
    ):
        evaluate(config, policy, out)
    assert (out / "episodes.jsonl").read_text() == line
