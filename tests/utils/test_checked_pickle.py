"""Untrusted pickles: plain data is loaded, anything else is rejected before it takes memory."""

import io
import pickle
import pickletools
import resource
import struct
import subprocess
import sys

import PIL.Image
import pytest

from mmsr1_jax.episodes import prompts
from mmsr1_jax.processing.image_files import upright_rgb
from mmsr1_jax.tools.services import fvqa
from mmsr1_jax.utils import checked_pickle
from mmsr1_jax.utils.checked_pickle import PickleError

PLAIN = {
    "a": [1, -5, 2**40, 2.5, None, True, "é\n😀" * 5, b"x\x00\xff", (1,), (), (1, 2, 3, 4)],
    3: {"z": bytearray(b"abc"), "": [[], {}]},
    "same": [shared := ["x"], shared],
}


def harmless_class(module, name):
    known = {"encode": lambda text, encoding: text.encode("latin-1"), "bytes": bytes}
    return known.get(name, bytearray)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_loaded_as_by_pickle(protocol):
    data = pickle.dumps(PLAIN, protocol)
    for form in (data, pickletools.optimize(data)):
        assert checked_pickle.loads(form, harmless_class) == pickle.loads(form) == PLAIN


def with_state(state: bytes) -> bytes:
    return b"cPIL.Image\nImage\n)R" + state + b"b"


def cached(image: bytes) -> bytes:
    """Return a cache of one example with one image."""
    return (
        b"\x80\x02}X\x02\0\0\0id}(X\x1c\0\0\0tool_returned_web_title_list](X\x01\0\0\0te"
        b"X\x19\0\0\0tool_returned_images_urls](" + image + b"eus."
    )


def sized(size, mode="RGB", pixels=b"x" * 10) -> bytes:
    return cached(with_state(pickle.dumps([None, mode, size, None, pixels], 2)[2:-1]))


BOMBS = {
    "memo index": (b"\x80\x02X\x01\0\0\0ar" + struct.pack("<I", 100_000_000) + b".", "memo index"),
    "memo index as text": (b"X\x01\0\0\0ap99999999\n.", "memo index"),
    "negative memo index": (b"X\x01\0\0\0ap-1\n.", "memo index|corrupt"),
    "memo index not set": (b"h\x07.", "memo index 7"),
    "bytes of 4 GB": (b"\x80\x04\x8e" + struct.pack("<Q", 4 << 30) + b"x.", "corrupt"),
    "text of 4 GB": (b"\x80\x04\x8d" + struct.pack("<Q", 4 << 30) + b"x.", "corrupt"),
    "text of 2**63": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"x.", "corrupt"),
    "bytearray of 4 GB": (b"\x80\x05\x96" + struct.pack("<Q", 4 << 30) + b"x.", "corrupt"),
    "frame of 4 GB": (b"\x80\x04\x95" + struct.pack("<Q", 4 << 30) + b"N.", "a frame of"),
    "integer of 2 GB": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "corrupt"),
    "integer of 200 bytes": (b"\x80\x02\x8a\xc8" + b"\x01" * 200 + b".", "more than 64 bits"),
    "LONG4": (b"\x80\x02\x8b\x01\0\0\0\x05.", "opcode LONG4"),
    "100,000 digits": (b"I" + b"9" * 100_000 + b"\n.", "digits"),
    "4,000 digits": (b"L" + b"9" * 4_000 + b"L\n.", "more than 64 bits"),
    "5 million marks": (b"\x80\x02" + b"(" * 5_000_000 + b".", "nested"),
    "tuples in tuples": (b"\x80\x02)" + b"\x85" * 3_000_000 + b".", "nested"),
    "a deep tuple as key": (b"\x80\x02})" + b"\x85" * 60 + b"Ns.", "a key"),
    "a memoised tuple as key": (b"\x80\x02)\x85q\x00}h\x00Ns.", "a key"),
    "lists in lists": (b"]" * 1000 + b"a" * 999 + b".", "nested"),
    "dicts in dicts": (b"}" + b"K\x01}" * 1000 + b"s" * 1000 + b".", "nested"),
    "duplicates": (b"]" + b"2" * 1000 + b".", "opcode DUP"),
    "an extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "a persistent id": (b"Pabc\n.", "opcode PERSID"),
    "a persistent id of the stack": (b"NQ.", "opcode BINPERSID"),
    "an instance": (b"(ios\nsystem\n.", "opcode INST"),
    "an object": (b"(cos\nsystem\no.", "opcode OBJ"),
    "keyword arguments": (b"\x80\x04ca\nb\n)}\x92.", "opcode NEWOBJ_EX"),
    "a set": (b"\x80\x04\x8f(K\x01\x90.", "opcode EMPTY_SET"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "nothing": (b"", "corrupt|truncated"), "no end": (b"\x80\x02N", "corrupt|truncated"),
    "an empty stack": (b".", "corrupt"), "values left over": (b"NN.", "corrupt"),
    "a tuple of nothing": (b"\x80\x02\x85.", "corrupt"), "no mark": (b"Nt.", "corrupt"),
    "a key without value": (b"}(Nu.", "a key"), "a list below a mark": (b"](Na.", "corrupt"),
    "an unknown opcode": (b"\xfe.", "corrupt"), "a newer protocol": (b"\x80\x63N.", "corrupt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_operations_that_plain_data_does_not_need_are_rejected(name):
    data, reason = BOMBS[name]
    with pytest.raises(PickleError, match=reason):
        checked_pickle.loads(data, harmless_class)


def test_globals_are_rejected_unless_they_are_replaced():
    for data in (b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x8c\x02os\x8c\x06system\x93."):
        with pytest.raises(PickleError, match="refers to os.system"):
            checked_pickle.loads(data)
    with pytest.raises(PickleError, match="larger than 10 bytes"):
        checked_pickle.loads(pickle.dumps("a" * 10), max_bytes=10)


def test_the_number_of_containers_is_limited(monkeypatch):
    monkeypatch.setattr(checked_pickle, "_MAX_ITEMS", 1000)
    assert len(checked_pickle.loads(b"](" + b"]" * 900 + b"e.")) == 900
    with pytest.raises(PickleError, match="more than 1000 containers"):
        checked_pickle.loads(b"](" + b"]" * 1100 + b"e.")


MEASURE = """
import resource, sys
from mmsr1_jax.tools.services import fvqa
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = peak()
for path in sys.argv[1:]:
    try: fvqa.load_results(path)
    except fvqa.FvqaCacheError: pass
print((peak() - start) // 1024)
"""


def test_malicious_pickles_neither_take_memory_nor_end_the_process(tmp_path):
    bombs = {name: data for name, (data, _) in BOMBS.items()}
    bombs |= {
        "size of text": sized(["A", 2_000_000_000]), "size of a list": sized([[0], 300_000_000]),
        "negative size": sized([-(2**31), -(2**31)]), "size of floats": sized([1e9, 1e9]),
        "size of booleans": sized([True, True]), "many pixels": sized([30_000, 30_000]),
        "four bytes a pixel": sized([4000, 4000], "RGBA", b"x" * 4000), "mode": sized([1, 1], "no"),
        "the same text encoded": b"\x80\x02X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
        + b"q\x00](" + b"c_codecs\nencode\nh\x00X\x06\0\0\0latin1\x86R" * 3000 + b"e\x86.",
    }  # fmt: skip
    paths = []
    for number, data in enumerate(bombs.values()):
        paths.append(tmp_path / f"{number}.pkl")
        paths[-1].write_bytes(data)
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 64  # MB; the largest file has 5 MB


@pytest.mark.parametrize(
    "data, reason",
    [
        (BOMBS["memo index"][0], "not a pickle of text .memo index"),
        (BOMBS["a deep tuple as key"][0], "not a pickle of text"),
        (pickle.dumps(b"bytes"), "contains a bytes"),
        (b"cos\nsystem\n(S'true'\ntR.", "not a pickle of text .refers to os.system"),
    ],
)
def test_pickled_prompts_contain_text_only(tmp_path, data, reason):
    (tmp_path / "round_1_user_prompt_x.pkl").write_bytes(data)
    with pytest.raises(prompts.PromptsError, match=f"round_1_user_prompt_x.pkl: {reason}"):
        prompts.load(tmp_path)


MODES = ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]


def test_cached_images_of_all_modes_equal_those_of_pillow(tmp_path):
    jpeg = io.BytesIO()
    PIL.Image.radial_gradient("L").resize((13, 7)).convert("RGB").save(jpeg, "jpeg", dpi=(72, 72))
    images = [PIL.Image.radial_gradient("L").resize((13, 7)).convert("RGB").convert(mode)
                if mode in ("RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "L", "1", "P", "LA")
                else PIL.Image.new(mode, (13, 7), 3) for mode in MODES]  # fmt: skip
    images.append(PIL.Image.open(jpeg))
    titles = [str(number) for number in range(len(images))]
    data = {"a": {"tool_returned_web_title_list": titles, "tool_returned_images_urls": images}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(data, protocol))
        results = fvqa.load_results(path)["a"]
        assert [title for title, _ in results] == titles
        for (_, image), original in zip(results, images, strict=True):
            assert image.tobytes() == upright_rgb(original).tobytes()


def test_a_shared_image_is_decoded_once_and_results_are_bounded(tmp_path):
    red, path = PIL.Image.new("RGB", (100, 100), "red"), tmp_path / "cache.pkl"
    shared = {"tool_returned_web_title_list": ["t"] * 500, "tool_returned_images_urls": [red] * 500}
    path.write_bytes(pickle.dumps({str(number): shared for number in range(50)}))
    cache = fvqa.load_results(path)
    assert {len(results) for results in cache.values()} == {100}
    assert len({id(image) for results in cache.values() for _, image in results}) == 1
    # Images that share their pixels take more memory than the size of the file.
    pixels = red.tobytes()
    first = b"B" + struct.pack("<I", len(pixels)) + pixels + b"q\x63"
    states = [b"](NX\x03\0\0\0RGB](KdKdeN" + data + b"e" for data in (first, *[b"h\x63"] * 90)]
    images = b"".join(map(with_state, states))
    path.write_bytes(cached(images).replace(b"](X\x01\0\0\0t", b"](" + b"X\x01\0\0\0t" * 91))
    with pytest.raises(fvqa.FvqaCacheError, match="have more bytes than the file"):
        fvqa.load_results(path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"a": [{"title": 5, "thumbnail_url": "u"}, {"title": "t", "thumbnail_url": {}}, 7]}', []),
        ('{"a": 5}', []), ('{"a": [{"title": "\\ud800", "thumbnail_url": "u"}]}', [("?", "u")]),
        ("[]", "expected object, got array"), ("[" * 100_000, "nested"), ('{"a": NaN}', "nan"),
    ],
)  # fmt: skip
def test_a_json_cache_is_validated(tmp_path, text, expected):
    path = tmp_path / "cache.json"
    path.write_text(text)
    if isinstance(expected, list):
        assert fvqa.load_results(path) == {"a": expected}
    else:
        with pytest.raises(fvqa.FvqaCacheError, match=f"cache.json: .*{expected}"):
            fvqa.load_results(path)
