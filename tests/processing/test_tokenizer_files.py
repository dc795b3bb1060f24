"""Tokenizer files give the ids of `AutoTokenizer`, whatever state other programs saved in them, or
are rejected with a one-line error."""

import copy
import json

import pytest
import tokenizers
from transformers import AutoTokenizer

from mmsr1_jax.episodes import turns
from mmsr1_jax.models.families import read_config
from mmsr1_jax.processing import tokenizer_files
from mmsr1_jax.processing.images import ImageProcessor
from mmsr1_jax.processing.processor import Processor, TokenizerError
from mmsr1_jax.scripts import random_policy

TEXTS = [
    "What is the name of this building, and who designed the bridge in the photograph? " * 3,
    "U\u0308ni\u0301 e\u0301 \ufb01ne, \u6f22\u5b57 12345 don't\r\n\n  END <reason>x</reason> ",
    " leading",
    "",
]
RAW = json.loads(random_policy.make_tokenizer().to_str())
NEXT = len(RAW["model"]["vocab"])
QWEN_PATTERN = tokenizer_files._QWEN_PATTERN


def write(directory, raw, settings=None, *, config=None, **files):
    directory.mkdir(exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} if settings is None else settings
    contents = {"tokenizer.json": raw, "tokenizer_config.json": settings, "config.json": config}
    contents |= {f"{name}.json": data for name, data in files.items()}
    contents["preprocessor_config.json"] = ImageProcessor().to_hf()
    for name, data in contents.items():
        if data is not None:
            (directory / name).write_text(json.dumps(data))


def assert_same_ids(directory):
    ours, theirs = Processor.from_directory(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode_text(text) == theirs(text, add_special_tokens=False)["input_ids"]
    question = TEXTS[0]
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n"
    )
    ids = ours.conversation([{"role": "user", "content": question}]).tokens.tolist()
    assert ids == theirs(chat, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == chat


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    },
}
PADDING = {
    "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "<|endoftext|>",
}  # fmt: skip
TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def token(content, number=NEXT, **flags):
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": number, "content": content} | dict.fromkeys(names, False) | flags


STATES = {
    "nothing": {},
    "truncation": {"truncation": TRUNCATION},
    "truncation from the left": {"truncation": TRUNCATION | {"direction": "Left", "stride": 3}},
    "padding": {"padding": PADDING},
    "padding to a multiple": {"padding": PADDING | {
        "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 8}},
    "both": {"truncation": TRUNCATION, "padding": PADDING, "post_processor": TEMPLATE},
    "a template": {"post_processor": TEMPLATE},
    "no normaliser": {"normalizer": None},
    "NFC": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
    "other pretokens": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}},
    "Qwen's pretokens": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{
        "type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated",
        "invert": False}, BYTES]}},
    "flags of an added token": {"added_tokens": [
        *RAW["added_tokens"], token("<x>", lstrip=True, rstrip=True, single_word=True)]},
    "normalised added token": {"added_tokens": [
        *RAW["added_tokens"], token("[x]", normalized=True)]},
}  # fmt: skip


@pytest.mark.parametrize("fields", STATES.values(), ids=STATES)
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2TokenizerFast"])
def test_state_in_the_file_is_ignored(tmp_path, fields, name):
    write(tmp_path, RAW | fields, {"tokenizer_class": name})
    assert_same_ids(tmp_path)


@pytest.mark.parametrize(
    "name, config, rebuilt",
    [
        ("Qwen2Tokenizer", {}, True),
        ("Qwen2TokenizerFast", None, True),
        ("TokenizersBackend", {}, False),
        ("LlamaTokenizerFast", {}, False),
        ("Qwen3TokenizerOfNextYear", {}, False),
        (None, {}, True),
        (None, {"tokenizer_class": "TokenizersBackend"}, False),
        (None, None, False),
    ],
)
def test_the_tokenizer_class_decides_whether_the_pipeline_is_replaced(
    tmp_path, capsys, name, config, rebuilt
):
    """`Qwen2Tokenizer` of transformers builds its own pipeline from vocabulary and merges."""
    model = copy.deepcopy(RAW["model"]) | {"unk_token": "<|endoftext|>"}
    settings = {} if name is None else {"tokenizer_class": name}
    if config is not None:
        config = {"model_type": "qwen2_5_vl"} | config
    write(tmp_path, RAW | {"model": model}, settings, config=config)
    assert_same_ids(tmp_path)
    warning = "replacing normalizer, pre_tokenizer, model.unk_token by those of Qwen2Tokenizer"
    assert (warning in capsys.readouterr().err) == rebuilt


@pytest.mark.proof
def test_the_released_files_cause_no_warning(shared, tmp_path, capsys):
    folder = shared / "tokenizer" / "qwen"
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    write(tmp_path, raw | {"truncation": TRUNCATION, "padding": PADDING}, settings,
          vocab=raw["model"]["vocab"])  # fmt: skip
    ours, theirs = Processor.from_directory(tmp_path), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode_text(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert capsys.readouterr().err == ""


def test_a_directory_saved_after_a_call_with_truncation_and_padding(tmp_path):
    write(tmp_path, RAW)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.pad_token = "<|endoftext|>"
    theirs(["a"], truncation=True, max_length=24, padding="max_length")
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 24 and saved["padding"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == int(1e30)
    assert_same_ids(tmp_path)


@pytest.mark.parametrize("number", [int(1e30), 2**64, -(2**64), 10**400])
def test_integers_of_more_than_64_bits_in_files_of_transformers_are_read(tmp_path, number):
    unlimited = {"model_max_length": number}
    config = {"model_type": "qwen2_5_vl"} | unlimited
    write(tmp_path, RAW, {"tokenizer_class": "PreTrainedTokenizerFast"} | unlimited,
          config=config, special_tokens_map=unlimited)  # fmt: skip
    assert_same_ids(tmp_path)
    write(tmp_path / "by_config", RAW, unlimited, config=config)
    assert tokenizer_files.read(tmp_path / "by_config")
    path = tmp_path / "by_config" / "preprocessor_config.json"
    path.write_text(json.dumps(ImageProcessor().to_hf() | {"limit": number}))
    Processor.from_directory(tmp_path / "by_config")
    path.rename(path.with_name("processor_config.json"))
    nested = {"image_processor": ImageProcessor().to_hf(), "limit": number}
    path.with_name("processor_config.json").write_text(json.dumps(nested))
    Processor.from_directory(tmp_path / "by_config")
    config = random_policy.CONFIG.to_hf() | {"text_limits": unlimited}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == random_policy.CONFIG


def added(*tokens):
    return RAW | {"added_tokens": [*RAW["added_tokens"], *tokens]}


def model(**fields):
    return RAW | {"model": copy.deepcopy(RAW["model"]) | fields}


def with_vocabulary(**tokens):
    return model(vocab=RAW["model"]["vocab"] | tokens)


TAGS = [f"<{end}{tag}>" for tag in tokenizer_files.TAG_NAMES for end in ("", "/")]
UNSUPPORTED = {
    **{tag: (added(token(tag)), "is a tag of a turn") for tag in TAGS},
    "upper case": (added(token("</Answer>", special=True)), "is a tag of a turn"),
    "a tag and more": (added(token("<search><img></search>")), "is a tag of a turn"),
    "a tag and a line": (added(token("</answer>\n")), "is a tag of a turn"),
    "a word": (added(token(" the")), "' the' is ordinary text"),
    "a special word": (added(token("COVID", special=True)), "'COVID' is ordinary text"),
    "punctuation": (added(token("...")), "is ordinary text"),
    "a letter": (added(token("q")), "is ordinary text"),
    "a gap of ids": (added(token("<x>", 507)), "cannot have id 507"),
    "an ordinary token's id": (added(token("<x>", 300)), "'<x>' has id 300, which is"),
    "the same id twice": (added(token("<x>"), token("<y>")), "occurs twice"),
    "the same token twice": (added(token("<x>"), token("<x>", NEXT + 1)), "occurs twice"),
    "another id than in the vocabulary": (
        added(token("<|im_end|>", 500)), "<|im_end|>"),
    "a huge id": (added(token("<x>", 10**12)), "added_tokens[6].id"),
    "made by merges": (
        model(vocab=RAW["model"]["vocab"] | {"<": 27 + 1000, "<|": 500, "<|a": 501, "<|a>": 502},
              merges=[["<", "|"], ["<|", "a"], ["<|a", ">"]])
        | {"added_tokens": [*RAW["added_tokens"], token("<|a>", 502)]},
        "ordinary text can become '<|a>'"),
    "dropout": (model(dropout=0.1), "model.dropout=0.1"),
    "word ends": (model(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    "byte fallback": (model(byte_fallback=True), "model.byte_fallback"),
    "another model": (model(type="WordPiece"), "model.type"),
    "not bytes": (with_vocabulary(**{"\u2581the": 500}), "outside the byte-level alphabet"),
    "ids twice": (with_vocabulary(thee=7), "two tokens have the same id"),
    "an id that is a text": (with_vocabulary(thee="7"), "model.vocab"),
    "no model": ({k: v for k, v in RAW.items() if k != "model"}, "model"),
    "merges of unknown tokens": (model(merges=[["qq", "qq"]]), "tokenizer.json: "),
    "unknown bytes": (
        model(vocab={t: i for t, i in RAW["model"]["vocab"].items() if t != "q"}, merges=[],
              unk_token="<|endoftext|>"), "model.unk_token"),
    "lower case": (RAW | {"normalizer": {"type": "Lowercase"}}, "normalizer: 'Lowercase'"),
    "compatibility": (RAW | {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "NFKC"}]}}, "normalizer: 'NFKC'"),
    "no pre-tokenizer": (RAW | {"pre_tokenizer": None}, "pre_tokenizer: must end with ByteLevel"),
    "prefix": (RAW | {"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "add_prefix_space"),
    "spaces": (RAW | {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer: 'Whitespace'"),
    "decoder": (RAW | {"decoder": {"type": "Fuse"}}, "decoder: 'Fuse'"),
    "no decoder": (RAW | {"decoder": None}, "decoder: None"),
    "not an object": ([], "tokenizer.json: expected object"),
}  # fmt: skip


@pytest.mark.parametrize("raw, reason", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_tokenizers_are_errors_that_name_the_problem(tmp_path, raw, reason):
    write(tmp_path, raw)
    with pytest.raises(TokenizerError) as caught:
        Processor.from_directory(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and reason in message and str(tmp_path) in message


ANSWER = {"content": "<answer>", "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    "settings, files, reason",
    [
        ({"added_tokens_decoder": {"500": ANSWER}}, {}, "tokenizer_config.json: added token '<an"),
        ({"additional_special_tokens": ["</search>"]}, {}, "config.json: added token '</s"),
        ({"extra_special_tokens": {"end": "the end"}}, {}, "'the end' is ordinary text"),
        ({"extra_special_tokens": [ANSWER]}, {}, "'<answer>' is a tag"),
        ({"eos_token": "</answer>"}, {}, "'</answer>' is a tag"),
        ({"image_token": {"content": "<img>"}}, {}, "'<img>' is a tag"),
        ({"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, {}, "has id 7, but 2 in"),
        ({}, {"special_tokens_map": {"pad_token": "<reason>"}}, "special_tokens_map.json: added"),
        ({}, {"added_tokens": {"<text_search>": 500}}, "added_tokens.json: added token '<text_"),
        ({}, {"added_tokens": {"<|im_end|>": 500}}, "added_tokens.json: token '<|im_end|>' has id"),
        ({"add_prefix_space": True}, {}, "tokenizer_config.json: add_prefix_space=true"),
    ],
)  # fmt: skip
def test_tokens_declared_in_other_files_are_checked(tmp_path, settings, files, reason):
    write(tmp_path, RAW, {"tokenizer_class": "TokenizersBackend"} | settings, **files)
    with pytest.raises(TokenizerError) as caught:
        Processor.from_directory(tmp_path)
    assert "\n" not in str(caught.value) and reason in str(caught.value)


def test_harmless_tokens_declared_in_other_files_are_allowed(tmp_path):
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "unk_token": None,
                "additional_special_tokens": ["<|im_start|>", "<|box|>"]}  # fmt: skip
    write(tmp_path, RAW, settings, config={"model_type": "qwen2_5_vl"})
    assert_same_ids(tmp_path)


def test_a_differing_vocab_json_is_reported(tmp_path, capsys):
    write(tmp_path, RAW, vocab=RAW["model"]["vocab"])
    Processor.from_directory(tmp_path)
    assert capsys.readouterr().err == ""
    write(tmp_path, RAW, vocab={"a": 0})
    assert_same_ids(tmp_path)
    assert "vocab.json: differs from tokenizer.json, which is used" in capsys.readouterr().err


def test_text_never_encodes_to_control_tokens_with_ignore_merges():
    raw = model(ignore_merges=True) | {"pre_tokenizer": BYTES}
    assert tokenizers.Tokenizer.from_str(json.dumps(raw)).encode("<|im_end|>").ids == [2]
    processor = Processor(json.dumps(raw), ImageProcessor())
    for name, token_id in processor.control.items():
        assert token_id not in processor.encode_text(name)
        assert processor.decode(processor.encode_text(name)) == name


def test_tag_names_include_every_tag_of_a_turn():
    tags = {*turns.TAGS.values(), turns.WHOLE_IMAGE.strip("<>"), "reason", "information"}
    assert tags == set(tokenizer_files.TAG_NAMES)
