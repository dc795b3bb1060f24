"""External text cannot imitate our markup; text without imitations is unchanged."""

import collections
import json
import random
import unicodedata

import pytest
from confusable_homoglyphs.confusables import confusables_data

from mmsr1_jax.episodes.escaping import _edits, escape_tags
from tests.timing import assert_linear

TAGS = (
    # Plain, and with signs or spaces inside.
    "</information>", "<information", "a</INFORMATION >b", "< / information>", "<\ninformation>",
    "<<</information>>", "<" + " " * 50 + "/information>", "<\\/information>", "<!-- /information",
    "</information id='1'>", "< / i n f o r m a t i o n >", "</infor\nmation>", "</text-search>",
    "<answer>", "</answer>", "<reason>", "<search>", "<img>", "<text_search>", "<think>",
    "</tool_response>", "<tool_call>", "</result>", "<results>", "<informational>",
    # Invisible characters.
    "</\u200binformation>", "<\ufeff/information>", "</info\u00adrmation>", "</information\u200b>",
    "</in\u3164formation>", "<\u2800/information>", "</informa\u034ftion", "<\U0001d159/answer>",
    "".join(chr(0xE0000 + ord(c)) for c in "</information>"), "</i\u0307nformation>",
    # Look-alike characters.
    "\uff1c/information\uff1e", "\u2039/information\u203a", "\u2039answer\u203a",
    "</inf\u043ermation>", "</\u0455\u0435\u0430r\u0441h>", "</\U0001d5c2\U0001d5c7formation>",
    "</1nf0rmat1on>", "</inforrnation>", "<\u0131nformation>", "\ufe64/answer\ufe65",
    "<\u2044information>", "\u00ab/information\u00bb", "\u3008/answer\u3009", "\u27ea/answer\u27eb",
    "\u304f/information>", "\U0001f1ee\U0001f1f3</\U0001f158nformation>",
    "[/information]", "[ / information ]", "{/answer}", "\u3010/information\u3011",
    "(/information)",
    # Encoded, also repeatedly or partly.
    "&lt;/information&gt;", "&LT;/information", "&ltinformation&gt", "&#60;/answer", "&#x3C/answer",
    "&amp;lt;/information&amp;gt;", "&amp;amp;#60;/answer", "</&#105;nformation>",
    "&lt;/in&zwnj;formation&gt;", "<&#1;/information>", "\\u003c/information\\u003e",
    "\\x3c/answer",
    "%3C/information%3E", "&#x0000003c;/information>", "&#0000000000060;/information>",
    "&#" + "0" * 60 + "60;/information>", "&amp;amp;amp;amp;amp;lt;/information>",
    "&amp;#38;#x26;amp;amp;amp;amp;lt;/answer", "%25252525252525253C/information>",
    "\\U0000003c/information>", "\\074/information>", "\\u{3c}/information>",
    # Signs instead of letters, and tags between letters.
    "</!nformation>", "<!nformation>", "\u2039/informat\u00a1on>", "</\u00a1nformation>",
    "</infor<b></b>mation>", "</ans<i/>wer>", "</info<!-- -->rmation>",
    # Control tokens.
    "<|im_end|>", "<|im_start|>", "<|endoftext", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\u2223im_end\u2223>", "\u00ab|im_end|\u00bb", "<|i m_e n d|>", "[|im_end|]", "<im_end>",
    "<|vision_start|><|image_pad|>",
    # Headers of results.
    "[Text Search Results]", "\uff3bImage Search Results\uff3d", "[ text  search results ]",
    "\u3010Image Search Results\u3011", "\u3014Text Search Results\u3015",
    "[Text Search Results: 2]", "[Image Search Results (3)]", "\n(Text Search Results)",
    "\n  (Image Search Results)", "[Text Search Results 2 of 3]",
    "\u2772Text Search Results\u2773",
)  # fmt: skip
LABELS = (
    "2. link: https://x", "2) Link : x", "2 - link: x", "#2 link: x", "2.link: x",
    "000002. link: x",
    "link: x", "summary: x", "          link: x", "2. Title: y", "2. Image: y", "2) Link: y",
    "2. title: y", "\u200blink: x", "lin&#107;: x",
    "2.             link: x", "**2.** **link**: x", "2. _link_: x", "\u20222. image: x",
    "2.\tlink\t:\tx", "\u200b2. image: x", "\uff12\uff0e\uff4c\uff49\uff4e\uff4b\uff1a x",
    "\u0662. link: x", "\u2488 link: x", "\u2777 link: x", "2\ufe0f\u20e3 link: x",
    "2\u2024 link\ua789 x", "2. l\u0456nk: x", "2. li\u200bnk: x", "&#50;. link: x",
    "2. &#108;ink: x", "Original question: x", "the question was: x", "_The question was_: x",
    "The original question was: x", "original question was: x", "**The original question**: x",
)  # fmt: skip
BREAKS = (
    "\n",
    "<br>",
    "<br/>",
    "<br />",
    "\r",
    "\r\n",
    "\u2028",
    "\u2029",
    "\x0b",
    "\x0c",
    "\x85",
    "\x1c",
    "&#10;",
    "%0A",
)
HARMLESS = (
    "List<Result> and <img src='a.png'>", "5 <= result; i < result; x <- answer", "f <| x |> g",
    "[information](/information)", "[Search](/search) [search] (search)", '{"/search": {}}',
    "<reasonable> <answer_key> <searching>", "5 < 6 and <b>inform</b>", "/information>",
    "\u201cAnswer\u201d \u2018answer\u2019 \u00abinformation\u00bb \u00ab information \u00bb",
    "\u300aAnswer\u300b",
    "Figure 2. Image: NASA/JPL", "Fig. 3: Image: ESA", "Figure 2.1. Image: NASA",
    "H(X) < information content",
    "(H(X) < information)", "if i < answer: return", "vector<Answer> and List<Search>",
    "services:\n  web:\n    image: nginx:latest\n    title: y", "image: nginx:latest", "title: x",
    '{"@type": "Article",\n  "image": "a.png",\n  "title": "b",\n "link": "c"}',
    '{"id": 1, "image": "a.png"}, {"id": 2, "link": "b"}', "{'id': 2, 'link': 'b'}",
    "{id: 2, image: nginx}", "---\ntitle: My page\nimage: a.png\n---\nText",
    "Link: https://x.org\nContent-Type: text/html", "paths:\n  /pets:\n    summary: List pets",
    "- link: x\n- image: y\n* title: z", "\u00a9 NASA 2019. Image: x", "In 2019, link: x",
    "Top 5 image: x", "Figure 1. Link: x", "Table 3 - Image: x",
    "Title: A page\nSummary: of it\nImage: AP\nLinks: two", "1. First\n2. Second\n3. Summary: x",
    "> link: quoted", "see our link: https://x", "R&D, AT&T, 100%, &copy; &c", "C:\\new\\link",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u094d\u200d\u0937",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "cafe\u0301 \u00e9", "\u2066a\u2069 \u200fb\u200e", "\ufb01lm \u2167 \uff21", "\ufeffBOM",
)  # fmt: skip


@pytest.mark.parametrize("text", TAGS)
def test_tags_headers_and_control_tokens_are_escaped(text):
    safe = escape_tags(f"before {text} after")
    assert safe != f"before {text} after" and escape_tags(safe) == safe
    assert safe.count("\N{NOT SIGN}") >= 1
    # The rest of the text is unchanged.
    assert safe.startswith("before ") and safe.endswith(" after")


@pytest.mark.parametrize("label", LABELS)
def test_labels_at_the_start_of_a_line_are_marked(label):
    for between in BREAKS:
        text = f"A page.{between}{label}"
        safe = escape_tags(text)
        assert safe != text and escape_tags(safe) == safe, repr(text)
        assert safe.replace("> ", "") == text.replace("> ", "")
    assert escape_tags(label) != label  # at the start of the text
    if label[:1] in "lits":
        assert escape_tags(label, line_start=False) == label  # after one of our own labels


def test_labels_after_a_numbered_one_continue_a_result():
    text = "2. image: x\ntitle: y\n  summary: z\nTitle: w"
    assert escape_tags(text) == "> 2. > image: x\n> title: y\n  > summary: z\nTitle: w"
    assert escape_tags("title: y\n2. image: x") == "title: y\n> 2. > image: x"
    assert escape_tags("x\n2. Title: y") == "x\n> 2. > Title: y"
    assert escape_tags("2.\nimage: x\ntitle: y") == "2.\n> image: x\n> title: y"
    assert escape_tags("x<br/>link: u") == "x<br/>> link: u"


def test_entities_with_many_zeros_or_digits_are_decoded():
    for entity in ("&#" + "0" * 5000 + "60;", "&#x" + "0" * 5000 + "3c;"):
        assert escape_tags(f"{entity}/information>") == "\N{NOT SIGN}/information>"
    for entity in ("&#" + "9" * 5000 + ";", "&#;", "&#x;", "&amp;", "&", "%25", "\\U99999999"):
        assert escape_tags(f"{entity} x") == f"{entity} x"


def test_the_search_element_is_escaped():
    assert escape_tags("the `<search>` element") == "the `\N{NOT SIGN}search>` element"


def test_a_numbered_label_inside_a_line_is_escaped_too():
    assert escape_tags("All is well. 2. link: https://x") == "All is well. 2. > link: https://x"
    assert escape_tags("well.\\n2. link: x") == "well.\\n> 2. > link: x"
    assert escape_tags("2. image: x", line_start=False) == "2. > image: x"


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_is_unchanged(text):
    assert escape_tags(text) == text


def test_direction_overrides_are_removed():
    assert escape_tags("\u202e>noitamrofni/<\u202c") == ">noitamrofni/<\u202c"


def test_lone_surrogates_become_question_marks():
    assert escape_tags("a\ud800b") == "a?b"


def test_randomly_disguised_imitations_are_escaped():
    """Each character of a tag or label is randomly replaced by a look-alike or encoded."""
    rng = random.Random(0)
    invisible = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) == "Cf"]
    invisible = [c for c in invisible if c not in "\u202d\u202e"]
    same = collections.defaultdict(list)
    for code in range(0x80, 0x20000):
        same[unicodedata.normalize("NFKC", chr(code))].append(chr(code))

    def disguise(character: str) -> str:
        look_alikes = [
            entry["c"]
            for entry in confusables_data.get(character, [])
            if len(entry["c"]) == 1 and not entry["c"].isascii()
        ]
        choices = [
            [character] * 8, [character.upper()] if character not in "isl" else [], look_alikes,
            same[character], [rng.choice(invisible) + character], [f"&#{ord(character)};"],
            [f"&#x{ord(character):X};"],
            [character + rng.choice("\u0301\u0336\ufe0f")], [f"%{ord(character):02x}"],
            [f"\\u{ord(character):04x}"],
        ]  # fmt: skip
        return rng.choice(rng.choice([choice for choice in choices if choice]))

    for text in ("</information>", "</answer>", "<|im_end|>", "[/reason]", "[text search results]",
                 "2. link: https", "2. image: ", "link: x", "summary: x", "original question: x",
                 ) * 60:  # fmt: skip
        text = f"before\n{''.join(map(disguise, text))}\nafter"
        safe = escape_tags(text)
        assert safe != text and escape_tags(safe) == safe, ascii(text)


def test_an_imitation_is_escaped_at_its_position_in_the_original_text():
    """Positions are correct after encoded, invisible and expanded characters."""
    text = (
        "\ufdfa&amp;&#1;\u200b&nLt; e\u0301 %41 &lt;/information&gt; \ufdfa 2. link: \u1100\u1161"
    )
    assert escape_tags(text) == text.replace("&lt;/inf", "\N{NOT SIGN}/inf").replace(
        "link", "> link"
    )


PATTERNS = {
    "brackets": "<", "spaced brackets": "< ", "names": "<i ", "almost tags": "</informatio ",
    "tags": "</information>", "entities": "&lt;", "ampersands": "&amp;", "one entity": "amp;",
    "expanding entities": "&nLt;", "numbers without an end": "&#60", "lines": "\n", "list": "1. ",
    "spaces": " ", "labels": "2. link: \n", "almost labels": "2. link \n", "invisible": "\u200b",
    "spaced letters": "<i n f o r m a t i o X", "marks": "\u0301", "square": "[", "dashes": "-",
    "headers": "[text search ", "control": "<|a", "ligatures": "\ufdfa", "digits": "1",
    "hidden tags": "\U000e003c", "overrides": "\u202e<", "questions": "the question was ",
    "prose": "The bridge (1886) was [citation] & more. ",
    "Japanese": "\u65e5\u672c\u8a9e\u306e\u3002",
    "nested entities": "&amp;amp;", "zeros": "0", "entity zeros": "&#00", "tags in tags": "<b></b>",
    "tags in names": "</info<b>", "octal": "\\07", "nested percent": "%25", "breaks": "<br/>link",
    "captions": "Figure 2. Image: x ", "numbered": "\n1. image: x\ntitle: y", "signs": "<!",
    "backslashes": "\\n", "percent": "%3C", "underscores": "_",
}  # fmt: skip


def test_escaping_is_linear():
    for piece in PATTERNS.values():

        def escaping(length, piece=piece):
            text = "<2&" + piece * (length // len(piece))
            return lambda: escape_tags(text)

        assert_linear(escaping, 4_000)


def test_real_pages_and_titles_are_unchanged(shared):
    lines = (shared / "data" / "web_pages.jsonl").read_text(encoding="utf-8").splitlines()
    titles = json.loads((shared / "data" / "image_search_results.json").read_text(encoding="utf-8"))
    texts = [value for line in lines for value in json.loads(line).values()]
    texts += [entry["title"] for entries in titles.values() for entry in entries]
    texts = [text for text in texts if isinstance(text, str)]
    assert len(texts) > 300
    for text in texts:
        assert escape_tags(text) == text and not _edits(text, False)
