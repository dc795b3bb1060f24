"""`python -m mmsr1_jax.score`, run as a command."""

import codecs
import dataclasses
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest

from mmsr1_jax import score
from mmsr1_jax.config import settings as config_module
from mmsr1_jax.processing.batching import Bucket
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor, Prompt
from mmsr1_jax.scripts import random_policy
from tests.programs import ROOT, read_jsonl, run_module, write_jsonl


def image_part(path):
    return {"type": "image", "image": str(path)}


def text_part(text):
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with images, and with valid and invalid conversations of many lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(300, 500), (123, 77), (640, 200)]):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    PIL.Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    (folder / "page.png").write_text("<html>")
    valid = [
        {"id": "plain", "messages": [{"role": "user", "content": "What\u2028is\x85this?"}]},
        {
            "id": 7,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [image_part("0.png"), text_part("What? 漢字")]},
                {"role": "assistant", "content": "<reason>A bridge</reason>"},
                {"role": "user", "content": [text_part("a"), image_part(folder / "1.png")]},
            ],
        },
        {"id": "two", "messages": [{"role": "user", "content": [image_part("2.png")] * 2}]},
        *(
            {"id": f"long {n}", "messages": [{"role": "user", "content": "word " * n}]}
            for n in (20, 150, 40, 200, 5, 60)
        ),
    ]
    invalid = [
        {"id": "gone", "messages": [{"role": "user", "content": [image_part("none.png")]}]},
        {"id": "html", "messages": [{"role": "user", "content": [image_part("page.png")]}]},
        {"id": "bomb", "messages": [{"role": "user", "content": [image_part("bomb.png")]}]},
        {"id": "role", "messages": [{"role": "robot", "content": "hello"}]},
        {"id": "endless", "messages": [{"role": "user", "content": "word " * 5000}]},
        b"{not json",
        b"",
        {
            "id": "url",
            "messages": [{"role": "user", "content": [image_part("data:" + "x" * 5000)]}],
        },
        b'{"id": "half", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"id": "\\udfff", "messages": 3}',
        b'{"id": "latin", "messages": [{"role": "user", "content": "caf\xe9"}]}',
        b'{"id": "deep", "messages": ' + b"[" * 100_000,
    ]
    lines = [valid[0], invalid[0], valid[1], *invalid[1:4], *valid[2:5], *invalid[4:], *valid[5:]]
    write_jsonl(folder / "in.jsonl", lines)
    write_jsonl(folder / "good.jsonl", valid)
    (folder / "in.jsonl").write_bytes(codecs.BOM_UTF8 + (folder / "in.jsonl").read_bytes())
    return folder


@pytest.fixture(scope="module")
def scored(tiny_dir, inputs):
    out = inputs / "out.jsonl"
    arguments = ["--config=tests/small_config.py", f"--model={tiny_dir}", f"--out={out}"]
    return run_module(*arguments, f"--conversations={inputs / 'in.jsonl'}"), out


def test_invalid_lines_are_reported_and_skipped(scored, inputs):
    process, out = scored
    assert process.returncode == 1, process.stderr
    lines = read_jsonl(out)
    ids = ["plain", "gone", 7, "html", "bomb", "role", "two", "long 20", "long 150", "endless"]
    ids += [None, "url", "half", "\udfff", None, None, "long 40", "long 200", "long 5", "long 60"]
    assert [line["id"] for line in lines] == ids
    errors = [line["error"] for line in lines if "error" in line]
    expected = [
        "line 2: none.png: no such file",
        f"line 4: {inputs / 'page.png'}: not an image",
        f"line 5: {inputs / 'bomb.png'}: 12000x12000 pixels are more than the 100000000",
        "line 6: message 1: unknown role 'robot'",
        "line 10: 20019 tokens, more than the largest of buckets.lengths, 1024",
        "line 11: not JSON",
        "line 13: data:xxx",
        "line 14: message 1: text is not valid Unicode",
        "line 15: messages must be a non-empty list",
        "line 16: not UTF-8",
        "line 17: not JSON",
    ]
    for error, start in zip(errors, expected, strict=True):
        assert error.startswith(start), error
        assert f", {error}" in process.stderr
    assert "11 of 20 lines could not be scored" in process.stderr
    assert "scored 9 of 20 conversations" in process.stdout
    assert "Traceback" not in process.stderr
    assert sorted(p.name for p in inputs.iterdir() if "partial" in p.name) == []


def test_logprobs_equal_those_of_torch(scored, tiny_dir, inputs):
    import jax

    from mmsr1_jax.models import checkpoint, sharding
    from tests.reference import torch, torch_inputs, torch_model

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    reference = torch_model(checkpoint.load(tiny_dir, mesh=mesh))
    processor = Processor.from_directory(tiny_dir)
    results = {line["id"]: line for line in read_jsonl(scored[1])}
    conversations = read_jsonl(inputs / "good.jsonl")
    for line in conversations:
        for message in line["messages"]:
            if isinstance(message["content"], list):
                for part in message["content"]:
                    if "image" in part:
                        part["image"] = str(inputs / part["image"])
        prompt = processor.conversation(line["messages"])
        result = results[line["id"]]
        assert result["tokens"] == prompt.tokens.tolist()
        logits = reference(**torch_inputs(prompt, random_policy.CONFIG)).logits[0]
        targets = torch.tensor(prompt.tokens[1:, None], dtype=torch.long)
        expected = torch.log_softmax(logits[:-1], -1).gather(-1, targets)[:, 0]
        assert result["logprobs"][0] is None
        assert len(result["logprobs"]) == len(result["tokens"])
        np.testing.assert_allclose(result["logprobs"][1:], expected, atol=2e-4, rtol=0)


def test_results_do_not_depend_on_other_lines(scored, tiny_dir, inputs):
    """Results are bit-identical in a smaller file with another order."""
    together = {line["id"]: line for line in read_jsonl(scored[1])}
    lines = read_jsonl(inputs / "good.jsonl")
    write_jsonl(inputs / "few.jsonl", [lines[4], lines[1]])
    process = run_module(
        "--config=tests/small_config.py",
        f"--model={tiny_dir}",
        f"--conversations={inputs / 'few.jsonl'}",
        f"--out={inputs / 'few_out.jsonl'}",
    )
    assert process.returncode == 0, process.stderr
    few = read_jsonl(inputs / "few_out.jsonl")
    assert [line["id"] for line in few] == [lines[4]["id"], 7]
    for line in few:
        assert line == together[line["id"]]


@pytest.mark.proof
def test_eight_devices_and_bfloat16(scored, tiny_dir, inputs):
    exact = {line["id"]: line for line in read_jsonl(scored[1])}
    out = inputs / "half.jsonl"
    process = run_module(
        "--config=tests/small_config.py",
        "--config.mesh.tensor=2",
        "--dtype=bfloat16",
        f"--model={tiny_dir}",
        f"--conversations={inputs / 'good.jsonl'}",
        f"--out={out}",
        devices=8,
    )
    assert process.returncode == 0, process.stderr
    for line in read_jsonl(out):
        assert line["tokens"] == exact[line["id"]]["tokens"]
        gap = np.subtract(line["logprobs"][1:], exact[line["id"]]["logprobs"][1:])
        assert 1e-5 < np.abs(gap).max() < 0.2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.model.dtpe=float32"], "config.model.dtpe"),
        pytest.param(["--config.modl.dtype=float32"], "config.modl.dtype", marks=pytest.mark.proof),
        pytest.param(
            ["--config.model.logprob_chunk=many"],
            "config.model.logprob_chunk",
            marks=pytest.mark.proof,
        ),
        pytest.param(
            ["--config.model.logprob_chunk=0"],
            "config.model.logprob_chunk=0 must be at least 1",
            marks=pytest.mark.proof,
        ),
        pytest.param(
            ["--config.model.dtype=float8"],
            "config.model.dtype='float8' is not one of",
            marks=pytest.mark.proof,
        ),
        (["--config.model.attention=flash"], "config.model.attention='flash' is not one of"),
        pytest.param(
            ["--config.mesh.fsdp=-1", "--config.mesh.tensor=-1"],
            "config.mesh: only one of",
            marks=pytest.mark.proof,
        ),
        (["--config.mesh.fsdp=3"], "fsdp=3 x tensor=1 does not match 1 devices"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--dtype=float16"], "dtype"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["stray"], "stray"),
        (["--model=/nowhere"], "/nowhere"),
        (["--conversations=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--out=/nowhere/out.jsonl"], "--out=/nowhere/out.jsonl: must be a file"),
        (
            ["--config.images.min_pixels=9", "--config.images.max_pixels=5"],
            "must be at most max_pixels=5",
        ),
    ],
)
def test_user_errors_are_shown_in_one_line(tiny_dir, inputs, arguments, message):
    base = {
        "--model": tiny_dir,
        "--conversations": inputs / "good.jsonl",
        "--out": inputs / "never.jsonl",
    }
    given = {a.split("=")[0] for a in arguments}
    process = run_module(*arguments, *(f"{k}={v}" for k, v in base.items() if k not in given))
    assert process.returncode == 2
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], (
        process.stderr
    )
    assert not (inputs / "never.jsonl").exists()


@pytest.mark.parametrize(
    "body, message",
    [
        ("c.model.dtpe = 'float32'", "dtpe"),
        ("c.model.logprob_chunk = 'many'", "config.model.logprob_chunk must be of type int"),
        ("c.buckets.lengths = [64, 128]", "config.buckets.lengths must be of type tuple"),
        ("c.buckets.lengths = (128, 64)", "config.buckets.lengths=(128, 64) must be positive and"),
        ("c.mesh = None", "config.mesh must be a Mesh"),
        ("c = {}", "mine.py: get_config() must return"),
    ],
)
def test_config_files_are_checked(tmp_path, tiny_dir, inputs, body, message):
    file = tmp_path / "mine.py"
    file.write_text(
        "from mmsr1_jax.config import Config\n"
        f"def get_config():\n    c = Config()\n    {body}\n    return c\n"
    )
    process = run_module(
        f"--config={file}",
        f"--model={tiny_dir}",
        f"--conversations={inputs / 'good.jsonl'}",
        f"--out={inputs / 'never.jsonl'}",
    )
    assert process.returncode == 2
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and message in lines[0], process.stderr


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size=16, but the model's vision"),
        ("config.json", {"image_token_id": 9}, "<|image_pad|> has id 5, but config.json has"),
        ("config.json", {"vocab_size": 300}, "lm_head.weight has shape [512, 128]"),
    ],
)
def test_inconsistent_checkpoint_files_are_named(tmp_path, tiny_dir, inputs, file, change, message):
    shutil.copytree(tiny_dir, tmp_path / "policy")
    path = tmp_path / "policy" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    process = run_module(
        f"--model={tmp_path / 'policy'}",
        f"--conversations={inputs / 'good.jsonl'}",
        f"--out={inputs / 'never.jsonl'}",
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: ") and message in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_a_tokenizer_larger_than_the_vocabulary_is_rejected(processor):
    text = dataclasses.replace(random_policy.CONFIG.text, vocab_size=300)
    with pytest.raises(ValueError, match="token id 4.. is outside the model's vocabulary of 300"):
        processor.check_fits(dataclasses.replace(random_policy.CONFIG, text=text))
    processor.check_fits(random_policy.CONFIG)


def test_nonfinite_logprobs_are_an_error():
    prompt = Prompt(np.arange(5, dtype=np.int32), ())
    rows = np.array([[0, -1, -2, np.nan, -3, 0], [0, -1, -2, -1, -3, 0]], np.float32)
    bucket = Bucket(length=8, rows=2, windows=0)
    batch = [
        score.Conversation(4, "a", prompt, bucket),
        score.Conversation(9, "b", prompt, bucket),
    ]
    (_, invalid), (line_number, valid) = score.finish(batch, rows)
    assert invalid == {"id": "a", "error": "line 4: the log-prob of token 3 is not finite"}
    assert line_number == 9 and valid["logprobs"] == [None, -1, -2, -1, -3]


def test_a_batch_of_a_rare_shape_is_not_delayed_forever(tiny_dir, processor, monkeypatch):
    """Its batch is computed before it is full, with the same result."""
    import jax

    from mmsr1_jax.models import checkpoint, sharding

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = checkpoint.load(tiny_dir, mesh=mesh)
    config = load_config(CONFIG_FILES[-1])
    assert CONFIG_FILES[-1].stem == "tiny"
    texts = ["word " * 40, *["short"] * 40]
    lines = [
        (i, json.dumps({"id": i, "messages": [{"role": "user", "content": t}]}).encode())
        for i, t in enumerate(texts)
    ]

    def scored():
        with jax.set_mesh(mesh):
            folder = pathlib.Path()
            return list(score.score_lines(lines, model, processor, config, mesh, folder))

    patient = scored()
    monkeypatch.setattr(score, "_MAX_WAIT", 5)
    hasty = scored()
    positions = [[number for number, _ in results].index(0) for results in (patient, hasty)]
    assert positions[0] > 30 and positions[1] == 0
    assert dict(patient) == dict(hasty)


def load_config(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("file", [None, *CONFIG_FILES], ids=lambda f: f.stem if f else "default")
def test_the_buckets_of_every_config_fit_its_largest_images(file):
    config = config_module.validate(load_config(file) if file else config_module.get_config())
    # configs/tiny.py is for policies of `random_policy`, the others for released checkpoints.
    directory = random_policy.IMAGES if file and file.stem == "tiny" else ImageProcessor()
    limits = directory.with_limits(config.images.min_pixels, config.images.max_pixels)
    max_tokens = limits.max_pixels // 28**2
    windows = 0
    for h in range(1, max_tokens + 1):
        w = min(max_tokens // h, 200 * h)
        if h <= 200 * w:
            windows = max(windows, -(-h // 4) * -(-w // 4))
    assert windows <= config.buckets.image_windows[-1]
    assert max_tokens + 256 <= config.buckets.lengths[-1]
