"""Questions fall where the right episodes say, mixes are exact, and `python -m mmsr1_jax.curate`
ends with the same files, killed or not."""

import collections
import dataclasses
import fractions
import itertools
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from mmsr1_jax.config import Rewards
from mmsr1_jax.data import Question, QuestionSource, curation, write_parquet
from mmsr1_jax.data.curation import attempt_of, cheapest, choose, class_of, read_mix
from mmsr1_jax.episodes.episode import Episode, Example, ToolCall
from mmsr1_jax.episodes.turns import parse
from mmsr1_jax.processing.processor import Processor
from mmsr1_jax.tools.index_builder import build_index
from mmsr1_jax.training import sft_dataset
from tests import scripted_policy
from tests.servers import serve
from tests.test_data import picture
from tests.test_train import ROOT, SMALL, kill_when, run, start

KINDS = {"i": "image_search", "t": "text_search"}
TURNS = {
    "i": "<reason>r</reason> <search><img></search>",
    "t": "<reason>r</reason> <text_search>q</text_search>",
    "+": "<reason>r</reason> <answer>Tagus</answer>",
    "-": "<reason>r</reason> <answer>Douro</answer>",
}


def episode(written, number=0, status="ok"):
    """`it+`: an image search, a text search, a right answer; `!`: it could not be run."""
    if written == "!":
        return Episode(example=Example(question="?"), group=0, index=number, end="error")
    return Episode(
        example=Example(question="?"),
        group=0,
        index=number,
        turns=[parse(TURNS[letter]) for letter in written],
        calls=[
            ToolCall(turn=turn, action=KINDS[letter], query=None, status=status)
            for turn, letter in enumerate(written)
            if letter in KINDS
        ],
        end="answer",
    )


def line(episode):
    data = {"index": episode.index, "group": episode.group, "end": episode.end}
    data["turns"] = [dataclasses.asdict(turn) for turn in episode.turns]
    data["calls"] = [dataclasses.asdict(call) for call in episode.calls]
    return data | {"answers": ["Tagus", "Tejo"]}


def attempts(*written, **keywords):
    return [
        attempt_of(line(episode(text, number, **keywords)), Rewards())
        for number, text in enumerate(written)
    ]


# Classes


@pytest.mark.parametrize(
    "written, expected",
    [
        ("- i- t- it- it", "never_right"),
        ("! !", "not_run"),
        ("! -", "never_right"),
        ("it+ i+ t+ + -", "search_free"),
        ("! +", "search_free"),
        ("- t- i+", "image_required"),
        ("i+ i+ ! it-", "image_required"),
        ("- i- t+", "text_required"),
        ("tt+ t+", "text_required"),
        ("- i- t- it+", "mix_required"),
        ("ti+ it+", "mix_required"),
        ("i+ t+", "mix_required"),
        ("it+ i+", "mix_required"),
        ("it+ t+", "mix_required"),
    ],
)
def test_classes(written, expected):
    for order in itertools.islice(itertools.permutations(written.split()), 24):
        assert class_of(attempts(*order)) == expected


def test_a_refused_search_is_none_and_a_failed_one_is():
    assert class_of(attempts("i+", status="refused")) == "search_free"
    for status in ("failed", "empty"):
        assert class_of(attempts("i+", status=status)) == "image_required"


def test_who_says_what_is_right():
    wordy = parse("<reason>r</reason> <answer>It is the Tejo.</answer>")
    data = line(dataclasses.replace(episode("t-"), turns=[parse(TURNS["t"]), wordy]))
    assert not attempt_of(data, Rewards()).right
    assert attempt_of(data, Rewards(match="SubEM")).right
    assert attempt_of(data, Rewards(), True).right
    assert not attempt_of(line(episode("t+")), Rewards(), False).right
    assert not attempt_of(line(episode("t")), Rewards(), True).right  # without an answer
    # Published: 0.9 * 0.9 + 0.1 for a right answer after a search, 1 without, 0.1 for a wrong one.
    found = [attempt.reward.reward for attempt in attempts("t+", "it+", "+", "i-")]
    np.testing.assert_allclose(found, [0.91, 0.91, 1.0, 0.1], rtol=1e-12)


def test_the_cheapest_come_first():
    bad = {"turns": [parse("So: " + TURNS["i"]), parse(TURNS["+"])]}
    some = attempts("it+", "i+", "-", "t+", "it+", "!")
    some.append(attempt_of(line(dataclasses.replace(episode("i+", 1), **bad)), Rewards()))
    some[-1] = dataclasses.replace(some[-1], index=-1)  # badly formed, but earlier
    assert [attempt.index for attempt in cheapest(some, 9)] == [1, 3, -1, 0, 4]
    assert [attempt.index for attempt in cheapest(some, 2)] == [1, 3]
    assert cheapest(attempts("-", "!"), 3) == []


# Mixes


def slow_sizes(shares, there):
    """The largest set: every total is tried, with exact fractions."""
    exact = {part: fractions.Fraction(str(share)) for part, share in shares.items()}
    best = dict.fromkeys(shares, 0)
    for total in range(1, sum(there.values()) + 1):
        if any(share * total > there[part] for part, share in exact.items()):
            return best
        best = {part: int(share * total) for part, share in exact.items()}
        rest = sorted(exact, key=lambda part: best[part] - exact[part] * total)
        for part in rest[: total - sum(best.values())]:
            best[part] += 1
    return best


def test_sizes_of_shares():
    rng = np.random.default_rng(0)
    for _ in range(100):
        parts = rng.permutation(curation.USEFUL)[: rng.integers(1, 5)].tolist()
        cuts = np.sort(rng.choice(np.arange(1, 100), len(parts) - 1, replace=False))
        hundredths = np.diff([0, *cuts, 100])
        shares = {part: int(n) / 100 for part, n in zip(parts, hundredths, strict=True)}
        there = {part: int(rng.integers(0, 40)) for part in parts}
        found = curation.sizes_of(shares, there)
        assert found == slow_sizes(shares, there), (shares, there)
        assert all(found[part] <= there[part] for part in parts)


def test_the_published_mix():
    paper = read_mix(curation.PAPER_MIX)
    for free in (1600, 2000):
        there = {"search_required": 3400, "search_free": free}
        assert curation.sizes_of(paper, there) == {"search_required": 3400, "search_free": 1600}


def test_a_choice():
    rng = np.random.default_rng(1)
    classes = rng.choice(curation.CLASSES, 400).tolist()

    def counts(mix, seed=0):
        chosen = choose(classes, read_mix(mix), seed)
        assert chosen == sorted(set(chosen))
        return chosen, collections.Counter(classes[number] for number in chosen)

    everything, found = counts("")
    assert set(found) == set(curation.USEFUL)
    assert len(everything) == sum(name in curation.USEFUL for name in classes)
    fewer, found = counts("search_free=10,text_required=7")
    assert found == {"search_free": 10, "text_required": 7}
    more, found = counts("search_free=20,text_required=100000")
    assert found == {"search_free": 20, "text_required": classes.count("text_required")}
    assert set(fewer) < set(more)
    assert counts("search_free=10,text_required=7")[0] == fewer
    other, found = counts("search_free=10,text_required=7", seed=1)
    assert other != fewer and found == {"search_free": 10, "text_required": 7}
    shared, found = counts("search_required=0.5,search_free=0.5")
    assert found["search_free"] == sum(found.values()) / 2 == classes.count("search_free")
    assert len({classes[number] for number in shared}) == 4
    assert choose(["never_right", "not_run"], read_mix(""), 0) == []
    assert choose(["never_right", "text_required"], read_mix(curation.PAPER_MIX), 0) == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("never_right=3", "the part must be one of"),
        ("search_free", "must be search_free=NUMBER"),
        ("search_free=many", "must be search_free=NUMBER"),
        ("search_free=1,search_free=2", "comes twice"),
        ("search_free=-1", "must not be negative"),
        ("search_free=0.4,text_required=0.5", "sum to 1"),
        ("search_free=1.5,text_required=-0.5", "over 0"),
        ("search_free=0.4,text_required=3", "not both"),
        ("search_free=nan.0", "must be search_free=NUMBER"),
        ("search_required=3,text_required=3", "together"),
    ],
)
def test_mixes_that_cannot_be(text, said):
    with pytest.raises(ValueError, match=said):
        read_mix(text)


def test_figures():
    groups = [attempts(*w.split()) for w in ("+ -", "+ +", "t+ !", "- -", "! !")]
    classes = [class_of(group) for group in groups]
    found = curation.figures(groups, classes, [1, 2], {"search_required": 3, "search_free": 1})
    assert (found["questions"], found["episodes"], found["errors"], found["chosen"]) == (
        5,
        10,
        3,
        2,
    )
    own = found["classes"]
    assert own["search_free"] == {"questions": 2, "share": 0.4, "right": 0.75, "chosen": 1}
    assert own["text_required"] == {"questions": 1, "share": 0.2, "right": 0.5, "chosen": 1}
    assert own["never_right"] == {"questions": 1, "share": 0.2, "right": 0.0, "chosen": 0}
    assert own["image_required"] == {"questions": 0, "share": 0.0, "right": None, "chosen": 0}
    assert found["parts"]["search_required"] == {"wanted": 3, "there": 1, "chosen": 1}
    rows = [row.split() for row in curation.table(found).splitlines()]
    assert ["search_free", "2", "40.0", "75.0", "1"] in rows
    assert ["image_required", "0", "0.0", "-", "0"] in rows
    assert rows[-1] == ["all", "5", "100.0", "-", "2"]


# The command

ROLLOUTS = 4
ANSWERS = 60
# A fifth of the policy's tokens are whole turns; the answers are "a 0" to "a 59".
ACTIONS = {
    "<reason>r{}</reason> <text_search>bridge {}</text_search>": 60,
    "<reason>r{}</reason> <search><img></search>": 40,
    "<reason>r{}</reason> <answer>a {}</answer>": ANSWERS,
}
VOCABULARY = 832


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Policy, questions and index in a directory."""
    directory = tmp_path_factory.mktemp("world")
    scripted_policy.write(directory / "policy", vocab_size=VOCABULARY, actions=ACTIONS)
    write_parquet(
        directory / "questions.parquet",
        [
            Question(
                id=f"q{i}", question=f"Which number is {i}?", images=(picture(i, (112, 112)),),
                # Of all answers a seventh, two sevenths .. are right, and for some questions none.
                answers=tuple(f"a {k}" for k in range(ANSWERS) if k % 7 < i % 7) or ("none",),
                source="made", category="old",
            )
            for i in range(12)
        ],
    )  # fmt: skip
    pages = directory / "pages.jsonl"
    pages.write_text(json.dumps({"url": "http://b", "title": "Bridge", "summary": "Of 1937."}))
    for number in range(0, 12, 2):  # of the others nothing is found
        (directory / f"{number}.png").write_bytes(picture(number, (112, 112)))
    pictures = directory / "pictures.jsonl"
    titles = [{"image": f"{number}.png", "title": f"Bridge {number}"} for number in range(0, 12, 2)]
    pictures.write_text("\n".join(map(json.dumps, titles)))
    build_index(directory / "index", [pages], [pictures])
    return directory


def command(world, out, *arguments, model=True):
    given = [f"--model={world / 'policy'}"] * model
    return [
        sys.executable, "-m", "mmsr1_jax.curate", f"--out={out}", *given, *SMALL,
        f"--config.data.train=('{world / 'questions.parquet'}',)",
        f"--config.run.group_size={ROLLOUTS}", f"--config.tools.index={world / 'index'}",
        "--config.tools.text=local", "--config.tools.image=local",
        *arguments,
    ]  # fmt: skip


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def results(out):
    """All that is left behind, but the times."""
    found = {}
    for name in ("episodes.jsonl", "sft.jsonl"):
        found[name] = read(out / name)
        for call in itertools.chain(*(episode["calls"] for episode in found[name])):
            del call["seconds"]
    for path in [out / "curated.parquet", *(out / "pictures").iterdir()]:
        found[path.name] = path.read_bytes()
    return found | {"figures": json.loads((out / "curation.json").read_text())}


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated") / "out"
    done = run(command(world, out, "--mix=", "--keep=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def expected(episodes):
    """Class and right episodes of each question, told from the lines alone."""
    found = {}
    for number, group in itertools.groupby(episodes, key=lambda episode: episode["group"]):
        right = []
        for one in group:
            made = [call["action"] for call in one["calls"] if call["status"] != "refused"]
            if one["answer"] in one["answers"]:
                right.append((len(made), one["index"], set(made)))
        kinds = set().union(*(made for *_, made in right)) if right else set()
        if not right:
            name = "never_right"
        elif min(right)[0] == 0:
            name = "search_free"
        elif len(kinds) == 2:
            name = "mix_required"
        else:
            name = f"{kinds.pop().removesuffix('_search')}_required"
        found[number] = name, [(searches, place) for searches, place, _ in sorted(
            right, key=lambda one: one[:2])]  # fmt: skip
    return found


@pytest.mark.proof
def test_what_is_left_behind(world, unbroken):
    out, said = unbroken
    episodes = read(out / "episodes.jsonl")
    assert sorted(e["index"] for e in episodes) == list(range(12 * ROLLOUTS))
    calls = list(itertools.chain(*(episode["calls"] for episode in episodes)))
    assert {call["action"] for call in calls if call["num_shown"]} == set(KINDS.values())
    found = expected(episodes)
    names = [found[number][0] for number in range(12)]
    assert {"never_right", "search_free"} < set(names)

    figures = json.loads((out / "curation.json").read_text())
    for name in curation.CLASSES:
        assert figures["classes"][name]["questions"] == names.count(name)
        assert [name, str(names.count(name))] in [row.split()[:2] for row in said.splitlines()]
    asked = list(QuestionSource(world / "questions.parquet"))
    back = list(QuestionSource(out / "curated.parquet", max_bad_rows=0))
    kept = [number for number in range(12) if names[number] != "never_right"]
    assert [question.category for question in back] == [names[number] for number in kept]
    for question, number in zip(back, kept, strict=True):
        fields = {name: getattr(question, name) for name in ("category", "file", "row")}
        assert question == dataclasses.replace(asked[number], **fields)

    taught = read(out / "sft.jsonl")
    assert figures["sft"] == {"episodes": len(taught), "questions": len(kept)}
    for number in kept:
        own = [episode for episode in taught if episode["group"] == number]
        right = found[number][1]
        fewest = [searches for searches, _ in right[:2]]
        assert [episode["reward"]["searches"] for episode in own] == fewest
        assert {episode["index"] for episode in own} <= {place for _, place in right}
        assert all(episode["category"] == names[number] for episode in own)


@pytest.mark.proof
def test_sft_reads_it(world, unbroken, tmp_path):
    out, _ = unbroken
    config = runpy.run_path(str(ROOT / "tests" / "small_config.py"))["get_config"]()
    config.data.train, config.data.max_bad_rows = (str(out / "sft.jsonl"),), 0
    processor = Processor.from_directory(world / "policy")
    path = tmp_path / "examples.jsonl"
    sft_dataset.prepare(path, config, processor, scripted_policy.config_for(VOCABULARY))
    lessons, taught = sft_dataset.load(path, config), read(out / "sft.jsonl")
    assert len(lessons) == len(taught) > 5
    for lesson, line in zip(lessons, taught, strict=True):
        tokens = [token for segment in line["segments"] for token in segment["tokens"]]
        sampled = [s["kind"] == "model" for s in line["segments"] for _ in s["tokens"]]
        assert lesson.tokens.tolist() == tokens and lesson.mask.tolist() == sampled
        prompt = lesson.prompt(processor.images)
        assert [list(image.grid) for image in prompt.images] == line["image_grids"]


@pytest.mark.proof
def test_killed_and_gone_on_with(world, unbroken, tmp_path):
    out = tmp_path / "out"
    path = out / "episodes.jsonl"
    arguments = command(world, out, "--mix=", "--keep=2")
    kill_when(start(arguments), lambda: path.is_file() and path.read_bytes().count(b"\n") > 5)
    complete = [json.loads(text) for text in path.read_bytes().split(b"\n")[:-1]]
    assert 5 < len(complete) < 12 * ROLLOUTS and not (out / "curation.json").exists()
    with open(path, "ab") as file:  # and a line cut off in the middle
        file.write(b'{"id": "q')
    early = run(command(world, out, model=False))
    assert early.returncode == 1 and "--model" in early.stderr.splitlines()[-1], early.stderr
    done = run(arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(out) == results(unbroken[0])


@pytest.mark.proof
def test_another_mix_and_judge_need_no_policy(world, unbroken, tmp_path):
    out = shutil.copytree(unbroken[0], tmp_path / "out")
    names = {number: name for number, (name, _) in expected(read(out / "episodes.jsonl")).items()}

    done = run(command(world, out, "--mix=search_free=2,mix_required=900", model=False))
    assert done.returncode == 0, done.stderr[-3000:]
    there = list(names.values()).count("mix_required")
    assert f"mix_required: 900 of the set were asked for, there are {there}" in done.stdout
    back = [question.category for question in QuestionSource(out / "curated.parquet")]
    assert collections.Counter(back) == collections.Counter(
        {"search_free": 2, "mix_required": there}
    )

    async def chat(request):
        verdict = '{"correct": true, "reason": "ok"}'
        return JSONResponse({"choices": [{"message": {"content": verdict}}]})

    route = Route("/v1/chat/completions", chat, methods=["POST"])
    with serve(Starlette(routes=[route])) as address:
        done = run(
            command(world, out, "--mix=", f"--config.services.judge_url={address}", model=False)
        )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((out / "curation.json").read_text())
    answered = {e["group"] for e in read(out / "episodes.jsonl") if e["answer"]}
    assert figures["chosen"] == len(answered) > len(back) and figures["no_verdict"] == 0

    done = run(command(world, out, "--mix=search_free=0", model=False))
    assert done.returncode == 1 and "another --mix" in done.stderr.splitlines()[-1]
    assert not (out / "curated.parquet").exists() and (out / "sft.jsonl").exists()
