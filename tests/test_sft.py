"""Supervised training: stories told as the engine would have, saved episodes to the bit, a loss
that is torch's, and `python -m mmsr1_jax.sft` as a user runs it, killed and stopped on the way."""

import dataclasses
import json
import os
import pathlib
import pickle
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from flax import nnx

from mmsr1_jax import sft
from mmsr1_jax.config import settings
from mmsr1_jax.data.parquet import DataError
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.episodes.scripted import ScriptedEpisode, replay
from mmsr1_jax.episodes.turns import STOPS
from mmsr1_jax.models import qwen2_5_vl, sharding
from mmsr1_jax.models.qwen2_5_vl import checkpoint
from mmsr1_jax.processing.images import ImageError, ImageProcessor, read_picture, write_picture
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.rl import packing
from mmsr1_jax.rl.learner import Learner
from mmsr1_jax.rollout.engine import Engine
from mmsr1_jax.scripts import random_policy
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import metrics, sft_dataset
from tests.engines import episode_record, examples, make_config, search_tools
from tests.reference import torch, torch_inputs, torch_model
from tests.scripted_policy import config_for, scripted_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORIES = 8
MODEL = dataclasses.replace(
    random_policy.CONFIG,
    text=dataclasses.replace(random_policy.CONFIG.text, num_layers=2),
    vision=dataclasses.replace(
        random_policy.CONFIG.vision, num_layers=2, full_attention_layers=(1,)
    ),
)


def noise(seed, width=112, height=112):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# Pictures


@pytest.mark.parametrize("width, height", [(112, 112), (640, 480), (31, 900), (1000, 41)])
def test_a_picture_comes_back_from_its_patches(tmp_path, width, height):
    processor = ImageProcessor(min_pixels=56 * 56, max_pixels=300 * 300)
    image = noise(width, width, height)
    patches = processor(image)
    back = processor.uncut(patches)
    rows, columns = processor.target_size(height, width)
    resized = image.resize((columns, rows), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(resized))
    path = write_picture(patches, processor, tmp_path)
    # What bounds their size were cut by does not matter.
    read = read_picture(path, processor.with_limits(28 * 28, 28 * 28))
    assert read.grid == patches.grid and read.values.tobytes() == patches.values.tobytes()


def test_every_colour_comes_back():
    levels = np.arange(256, dtype=np.uint8).repeat(4).reshape(1, 32, 32)
    image = PIL.Image.fromarray(np.concatenate([levels, levels[:, ::-1], levels]).T.copy())
    processor = ImageProcessor(patch_size=8)
    patches = processor.cut(image)
    np.testing.assert_array_equal(np.asarray(processor.uncut(patches)), np.asarray(image))


def test_pictures_that_are_not_what_they_were(tmp_path):
    processor = ImageProcessor()
    path = write_picture(processor.cut(noise(0)), processor, tmp_path)
    with pytest.raises(ImageError, match="no multiples of 28"):
        processor.cut(noise(1, 112, 100))
    with pytest.raises(ImageError, match="no picture"):
        dataclasses.replace(processor, patch_size=7).uncut(processor.cut(noise(0)))
    with pytest.raises(ImageError, match="not the picture that the file is named after"):
        read_picture(path, dataclasses.replace(processor, mean=(0.5, 0.5, 0.5)))
    noise(2).save(path)
    with pytest.raises(ImageError, match="not the picture that the file is named after"):
        read_picture(path, processor)


# Stories and the engine's episodes

# Most tokens are turns, which the tokenizer too makes of their texts.
ACTIONS = {
    "<reason>r{}</reason> <text_search>bridge {}</text_search>": 700,
    "<reason>r{}</reason> <search><img></search>": 500,
    "<reason>r{}</reason> <answer>a {}</answer>": 300,
    "b{}</search>": 100,
}


@pytest.fixture(scope="module")
def whole_turns():
    raw = json.loads(scripted_tokenizer(2200, ACTIONS))
    raw["model"]["ignore_merges"] = True  # a text that is a token becomes that token
    raw["pre_tokenizer"]["use_regex"] = False
    return json.dumps(raw)


@pytest.fixture(scope="module")
def rolled_out(whole_turns):
    """Episodes of the engine, its processor and its settings."""
    processor = Processor(whole_turns, random_policy.IMAGES)
    model = random_policy.random_model(config_for(2200, MODEL), seed=3)
    limits = dataclasses.replace(make_config().turns, max_episode_tokens=700, max_text_searches=1)
    config = make_config(limits=limits)
    engine = Engine(model, processor, config, search_tools())
    episodes = sorted(engine.rollout(examples(6), rollouts=8), key=lambda e: e.index)
    engine.close()
    return episodes, processor, config, model.config


def test_a_story_is_told_as_the_engine_would_have(rolled_out):
    episodes, processor, config, model_config = rolled_out

    def texts(episode):
        return [processor.decode(s.tokens) for s in episode.segments if s.kind == "model"]

    def as_written(episode):
        """Whether each turn is what the tokenizer makes of its text, and ends at a tag."""
        written = [s.tokens.tolist() for s in episode.segments if s.kind == "model"]
        own = written == [processor.encode_text(text) for text in texts(episode)]
        return own and all(any(stop in text for stop in STOPS) for text in texts(episode))

    chosen = [episode for episode in episodes if as_written(episode)]
    calls = [call for episode in chosen for call in episode.calls]
    assert {call.action for call in calls} == {"text_search", "image_search"}
    assert "refused" in {call.status for call in calls}
    assert {episode.end for episode in chosen} >= {"answer", "turns"} and len(chosen) > 10
    assert any(turn.action is None for episode in chosen for turn in episode.turns)

    rules = sft_dataset.make_rules(config, processor, model_config)
    given = [ScriptedEpisode(episode.example, texts(episode)) for episode in chosen]
    told = list(replay(given, processor, rules, search_tools()))

    def without_probabilities(episode):
        found = episode_record(episode) | {
            "segments": [s.tokens.tolist() for s in episode.segments]
        }
        del found["logprobs"], found["sampling"]
        return found

    for ours, theirs in zip(told, chosen, strict=True):
        assert without_probabilities(ours) == without_probabilities(theirs)


WRITE = """
import pickle, sys, types, pathlib
from mmsr1_jax import train
from mmsr1_jax.processing.processor import Processor
pairs, asked, tokenizer, images = pickle.load(sys.stdin.buffer)
engine = types.SimpleNamespace(processor=Processor(tokenizer, images))
train.write_episodes(pathlib.Path(sys.argv[1]), 7, pairs, asked, engine)
"""


def test_saved_episodes_are_learned_to_the_bit(rolled_out, whole_turns, tmp_path):
    from mmsr1_jax.data import Question
    from mmsr1_jax.rewards.reward_function import episode_reward

    episodes, processor, config, model_config = rolled_out
    pairs = [(e, episode_reward(e, ("a 1",), settings.Rewards(), 0, None)) for e in episodes]
    asked = [Question(id=str(i), question="?", images=(), answers=("a 1",)) for i in range(6)]
    (tmp_path / "episodes").mkdir()
    subprocess.run(
        [sys.executable, "-c", WRITE, tmp_path], cwd=ROOT, check=True,
        input=pickle.dumps((pairs, asked, whole_turns, processor.images)),
    )  # fmt: skip
    (path,) = (tmp_path / "episodes").iterdir()

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line, episode in zip(lines, episodes, strict=True):
        images = [read_picture(path.parent / name, processor.images) for name in line["images"]]
        again = Episode.from_json(line, images)
        assert episode_record(again) == episode_record(episode)
        assert (again.index, again.group) == (episode.index, episode.group)
    assert sum(len(line["images"]) for line in lines) > len(list((tmp_path / "pictures").iterdir()))

    config = dataclasses.replace(config, data=settings.Data(train=(str(path.parent),)))
    (tmp_path / "run").mkdir()
    sft_dataset.prepare(tmp_path / "run" / "examples.jsonl", config, processor, model_config)
    lessons = sft_dataset.load(tmp_path / "run" / "examples.jsonl", config)
    samples = sft.make_samples(lessons, processor.images)
    total = sum(int(episode.loss_mask.sum()) for episode in episodes)
    for sample, episode in zip(samples, episodes, strict=True):
        np.testing.assert_array_equal(sample.prompt.tokens, episode.tokens)
        np.testing.assert_array_equal(sample.mask, episode.loss_mask)
        assert sample.weights == pytest.approx(1 / total)
        for ours, theirs in zip(sample.prompt.images, episode.images, strict=True):
            assert ours.grid == theirs.grid and ours.values.tobytes() == theirs.values.tobytes()


# Stories of one's own


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a small policy, an index, and rows: answers, and searches with answers."""
    folder = tmp_path_factory.mktemp("material")
    random_policy.write(folder / "policy", config=MODEL, seed=2)
    for i in range(STORIES):
        noise(i).save(folder / f"{i}.png")
    pages = [
        {"url": f"http://p/{i}", "title": f"tower {i}", "summary": f"Opened in {1900 + i}."}
        for i in range(STORIES)
    ]
    pictures = [{"image": f"{i}.png", "title": f"bridge {i}"} for i in range(STORIES)]
    build_index(
        folder / "index",
        [write_lines(folder / "pages.jsonl", pages)],
        [write_lines(folder / "pictures.jsonl", pictures)],
    )
    rows = []
    for i in range(STORIES):
        reason = f"<reason> It is {i}.</reason>"
        searches = [[], ["<search><img></search>"], [f"<text_search> tower {i}</text_search>"]]
        actions = [*searches[i % 3], f"<answer> {1900 + i}</answer>"]
        image = [{"image": f"{i}.png"}, {"images": [f"{i}.png"]}, {}][i % 3]
        turns = [f"{reason} {action}" for action in actions]
        rows.append({"question": f"Which year is {i}?", "turns": turns, **image})
    write_lines(folder / "rows.jsonl", rows)
    return folder


def flags_of(folder, **more):
    given = {
        "tools.index": folder / "index",
        "tools.max_results": 1,
        "turns.max_episode_tokens": 2048,
        "data.train": f"('{folder / 'rows.jsonl'}',)",
        "update.pack_length": 384,
        "update.pack_windows": 12,
        "update.learning_rate": 3e-3,
        "run.prompts_per_step": 6,
        "run.steps": 56,
        "run.save_every": 6,
    }
    return ["--config=configs/tiny.py", *(f"--config.{k}={v}" for k, v in (given | more).items())]


def config_of(folder, **more):
    config = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
    config.tools.index, config.tools.max_results = str(folder / "index"), 1
    config.turns.max_episode_tokens = 2048
    config.data.train = (str(folder / "rows.jsonl"),)
    config.update.pack_length, config.update.pack_windows = 384, 12
    for field, value in more.items():
        part, _, name = field.partition("_")
        setattr(getattr(config, part), name, value)
    return config


@pytest.fixture(scope="module")
def lessons(material, tmp_path_factory):
    processor = Processor.from_directory(material / "policy")
    path = tmp_path_factory.mktemp("run") / "examples.jsonl"
    sft_dataset.prepare(path, config_of(material), processor, MODEL)
    return sft_dataset.load(path, config_of(material)), processor


def test_the_searches_of_a_story_are_made(material, lessons):
    found, processor = lessons
    rows = [json.loads(line) for line in (material / "rows.jsonl").read_text().splitlines()]
    assert len(found) == STORIES
    for i, (lesson, row) in enumerate(zip(found, rows, strict=True)):
        text = processor.decode(lesson.tokens)
        assert f"Which year is {i}?" in text
        assert ("title: bridge" in text) == (i % 3 == 1)
        assert (f"Opened in {1900 + i}." in text) == (i % 3 == 2)
        assert processor.decode(lesson.tokens[lesson.mask]) == "".join(row["turns"])
        assert len(lesson.images) == (1, 2, 0)[i % 3]


def test_a_story_may_name_its_own_index(material, tmp_path):
    """Two lines, one after the other, ask the same and find different things."""
    page = [{"url": "other", "title": "tower 2", "summary": "It fell."}]
    build_index(tmp_path / "other", [write_lines(tmp_path / "pages.jsonl", page)], [])
    row = json.loads((material / "rows.jsonl").read_text().splitlines()[2])
    lines = [row, row | {"index": "other"}, row, row | {"index": "none"}, row | {"index": 3}]
    rows = write_lines(tmp_path / "rows.jsonl", lines)
    config = config_of(material, data_train=(str(rows),))
    processor = Processor.from_directory(material / "policy")
    sft_dataset.prepare(tmp_path / "examples.jsonl", config, processor, MODEL)
    texts = [
        processor.decode(x.tokens) for x in sft_dataset.load(tmp_path / "examples.jsonl", config)
    ]
    assert ["It fell." in text for text in texts] == [False, True, False]
    assert ["Opened in 1902." in text for text in texts] == [True, False, True]


def test_loss_and_gradients_equal_torch(lessons):
    """Labels are -100 everywhere but in the policy's turns: from the opening of an assistant's turn
    up to its end."""
    (found, processor), count = lessons, 3
    mesh = sharding.make_mesh(1, 1, 1, devices=sharding.jax.devices()[:1])
    model = random_policy.random_model(MODEL, seed=2, logprob_chunk=16)
    theirs = torch_model(model)
    update = settings.Update(max_grad_norm=0.0, b1=0.9)
    one = Learner(model, sft.likelihood_loss, update, mesh)
    samples = sft.make_samples(found[:count], processor.images)
    shape = packing.RowShape(1, 384, 12)
    figures = one.update(packing.pack(samples, MODEL, shape), 0.0)

    opening = [processor.control["<|im_start|>"], *processor.encode_text("assistant\n")]
    end, total, losses = processor.control["<|im_end|>"], 0, []
    with torch.enable_grad():
        for sample in samples:
            tokens = sample.prompt.tokens.tolist()
            labels = np.full(len(tokens), -100)
            for start in range(len(tokens)):
                if tokens[start : start + len(opening)] == opening:
                    begin = start + len(opening)
                    rest = tokens[begin:]
                    stop = begin + (rest.index(end) if end in rest else len(rest))
                    labels[begin:stop] = tokens[begin:stop]
            logits = theirs(**torch_inputs(sample.prompt, MODEL)).logits[0]
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
                )
            )
            total += int((labels >= 0).sum())
        wanted = sum(losses) / total
        wanted.backward()
    assert figures["tokens"] == total and figures["finite"]
    assert figures["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    carrier = one.model()
    nnx.update(carrier, one.optimizer[1].mu)  # a tenth of the gradients
    ours = dict(checkpoint.hf_tensors(carrier, checkpoint.LAYOUTS[1]))
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(
            10 * ours[name], parameter.grad.numpy(), rtol=1e-3, atol=2e-5, err_msg=name
        )


def test_lines_that_cannot_be_used_are_named(material, tmp_path, capfd):
    answer = "<reason> r</reason> <answer> a</answer>"
    row = {"question": "q", "turns": [answer]}
    episode = {"segments": [{"kind": "prompt", "tokens": [6, 7]}, {"kind": "model", "tokens": [8]}]}

    def with_segment(**segment):
        return {"segments": [episode["segments"][0], {"kind": "model", "tokens": [8]} | segment]}

    bad = {
        "must be an object": [1],
        "has no 'question'": {"turns": ["x"]},
        "'turns' must be a list of strings": row | {"turns": "x"},
        "'turns' must be a list of one or more": row | {"turns": []},
        "'turns' is not valid Unicode": row | {"turns": ["\ud800"]},
        "'question' must be a non-empty string": row | {"question": 5},
        "nowhere.png: no such file": row | {"image": "nowhere.png"},
        "rows.jsonl: not an image": row | {"images": [str(material / "rows.jsonl")]},
        "has both 'image' and 'images'": row | {"image": "0.png", "images": ["0.png"]},
        "ends with turns[0] of 2: that turn answers": row | {"turns": [answer] * 2},
        "config.turns.max_turns allows no more": row | {"turns": ["x", "x", "x", "x"]},
        "the image search failed": row | {"turns": ["<search><img></search>", answer]},
        "update.pack_length=384": row | {"question": "long " * 300},
        "could not be run: ValueError": {"end": "error", "error": "ValueError", "segments": []},
        "must begin with a prompt": {"segments": []},
        "no tokens that the policy wrote": {"segments": episode["segments"][:1]},
        "outside the policy's vocabulary of 512": with_segment(tokens=[512]),
        "whose 'kind' is one of": with_segment(kind="?"),
        "'tokens' must be a list of token ids": with_segment(tokens=[-1]),
        "'logprobs' must be a list of a number": with_segment(logprobs=[1.0, 2.0]),
        "lacks 'images'": episode | {"image_grids": [[1, 8, 8]]},
        "placeholders for 1 image tokens": with_segment(tokens=[5, 8]),
        "named after": episode | {"images": [str(material / "0.png")]},
        "'turns' or 'calls'": episode | {"turns": [{"nothing": 1}]},
    }
    path = write_lines(tmp_path / "bad.jsonl", [*bad.values(), episode, row])
    with open(path, "ab") as file:
        file.write(b"\xff\n{\n\n" + b"[" * 100_000 + b"\n")
    bad |= {"not UTF-8": 0, "cannot be read (Expecting property name": 0, "nested too deeply": 0}
    processor = Processor.from_directory(material / "policy")
    roots = (str(material),)
    config = config_of(
        material, data_train=(str(path),), data_max_bad_rows=len(bad), data_image_roots=roots
    )
    sft_dataset.prepare(tmp_path / "examples.jsonl", config, processor, MODEL)
    assert len(sft_dataset.load(tmp_path / "examples.jsonl", config)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.endswith("; skipped")]
    numbers = [*range(1, len(bad) - 2), len(bad), len(bad) + 1, len(bad) + 3]
    for number, reason, line in zip(numbers, bad, said, strict=True):
        assert f"bad.jsonl, line {number}: " in line and reason in line

    config.data.max_bad_rows = 5
    with pytest.raises(DataError, match="6 lines, more than .*max_bad_rows=5; .*line 6: "):
        sft_dataset.prepare(tmp_path / "other.jsonl", config, processor, MODEL)
    assert not list(tmp_path.glob("*other.jsonl*"))
    write_lines(path, [row | {"turns": ["<text_search> x</text_search>", answer]}])
    config.tools.index = None
    with pytest.raises(DataError, match="no line can be used"):
        sft_dataset.prepare(tmp_path / "other.jsonl", config, processor, MODEL)
    assert "no tool for text_search" in capfd.readouterr().err
    with pytest.raises(DataError, match="nowhere matches no JSONL file"):
        sft_dataset.prepare(
            tmp_path / "other.jsonl", config_of(material, data_train=("nowhere",)), processor, MODEL
        )


def test_stories_belong_to_their_settings(material, lessons, tmp_path):
    path = lessons[0][0].images[0].parents[1] / "examples.jsonl"
    with pytest.raises(DataError, match="made with config.update.pack_length=384, but .* sets 400"):
        sft_dataset.load(path, config_of(material, update_pack_length=400))
    (tmp_path / "cut.jsonl").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        sft_dataset.load(tmp_path / "cut.jsonl", config_of(material))


@pytest.mark.parametrize("count, size", [(10, 4), (3, 7), (5, 5)])
def test_each_lesson_once_an_epoch(count, size):
    steps = [sft_dataset.choose(step, count, size, seed=3) for step in range(1, count + 1)]
    assert all(len(step) == size for step in steps)
    order = np.concatenate(steps).reshape(-1, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in order)
    assert len({tuple(epoch) for epoch in order}) > 1
    assert sft_dataset.choose(1, 10, 10, seed=3) != sft_dataset.choose(1, 10, 10, seed=4)


# The command


def command(workdir, *arguments):
    return [sys.executable, "-m", "mmsr1_jax.sft", f"--workdir={workdir}", *map(str, arguments)]


def environment():
    """One device; and optimised code, as there are many steps."""
    return {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def run(arguments):
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )


def start(arguments):
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results(workdir):
    """All that a run leaves behind but its times."""
    lines = [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    files = sorted((workdir / "policy").glob("*.safetensors"))
    assert files
    return lines, [path.read_bytes() for path in files], (workdir / "examples.jsonl").read_text()


@pytest.fixture(scope="module")
def unbroken(material, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run(command(workdir, f"--model={material / 'policy'}", *flags_of(material)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "8 training episodes, 8 of them replayed from scripted turns; skipped 0 lines"
        in done.stderr
    )
    return workdir


@pytest.mark.proof
def test_it_learns_its_stories_by_heart(unbroken):
    lines = metrics.read(unbroken / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 57))
    assert lines[0]["loss"] > 4 and max(line["loss"] for line in lines[-3:]) < 0.05
    assert all(line["nonfinite"] == 0 and line["tokens"] > 100 for line in lines)
    assert lines[-1]["epoch"] == 56 * 6 / 8
    assert lines[0]["time/compiles"] > 0 and lines[5]["time/compiles"] == lines[-1]["time/compiles"]
    mesh = sharding.make_mesh(1, 1, 1, devices=sharding.jax.devices()[:1])
    qwen2_5_vl.load(unbroken / "policy", mesh=mesh)
    assert (unbroken / "policy" / "tokenizer.json").is_file()


@pytest.mark.proof
def test_killed_in_a_save_then_asked_to_stop_and_gone_on_with(unbroken, material, tmp_path):
    workdir, until = tmp_path / "run", time.monotonic() + 300
    saved, log = workdir / "checkpoints", workdir / "metrics.jsonl"
    process = start(command(workdir, f"--model={material / 'policy'}", *flags_of(material)))
    while not (any(saved.glob("12.*")) or (saved / "12").exists()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()

    before = metrics.read(log)[-1]["step"]
    process = start(command(workdir))
    while metrics.read(log)[-1]["step"] <= before:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "which is saved" in said, said[-3000:]
    assert "resuming after step" in said and before < metrics.read(log)[-1]["step"] < 56

    done = run(command(workdir))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(workdir) == results(unbroken)


def test_mistakes_are_said_in_one_line(material, tmp_path):
    done = run(command(tmp_path / "run", *flags_of(material, **{"run.model": ""})))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: a new run needs a policy")
