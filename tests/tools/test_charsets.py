# ruff: noqa: RUF001
"""Pages in the charsets of the web, with a correct, wrong or missing declaration."""

import codecs
import os

import pytest

from mmsr1_jax.tools.charsets import decode
from tests.timing import assert_linear

TEXTS = {
    "en": "The majestic tower was built by the engineer Möller between 1931 and 1932.",
    "fr": "La tour fut bâtie en 1932 par l'ingénieur Léon; c'est là le plus élevé des édifices.",
    "ru": "Башня была построена инженером Ивановым в 1932 году, её высота девяносто метров.",
    "uk": "Вежу збудував інженер Іваненко у 1932 році, її висота становить дев'яносто метрів.",
    "zh": "这座塔由工程师李明于一九三二年建成，高度为九十米，每年有许多游客来参观。",
    "tw": "這座塔由工程師李明於一九三二年建成，高度為九十公尺，每年有許多遊客來參觀。",
    "ja": "この塔は一九三二年に技師の田中によって建てられ、高さは九十メートルで、"
          "最も高い建物です。",
    "ko": "이 탑은 1932년에 기술자 김철수가 세웠으며 높이는 90미터로 가장 높은 건물이다.",
    "pl": "Wieża została zbudowana w 1932 roku przez inżyniera Żółkiewskiego, ma dziewięćdziesiąt "
          "metrów wysokości i leży wśród drzew.",
    "cs": "Věž byla postavena v roce 1932 inženýrem Dvořákem a je vysoká devadesát metrů, což je "
          "nejvíc ve městě.",
    "el": "Ο πύργος χτίστηκε το 1932 από τον μηχανικό Παπαδόπουλο και έχει ύψος ενενήντα μέτρα.",
    "tr": "Kule 1932 yılında mühendis tarafından inşa edildi, şehrin en yüksek yapısıdır.",
    "he": "המגדל נבנה בשנת 1932 על ידי המהנדס כהן וגובהו תשעים מטרים, הגבוה ביותר בעיר הזאת.",
    "ar": "بني البرج عام 1932 على يد المهندس علي ويبلغ ارتفاعه تسعين مترا، وهو أعلى مبنى.",
    "th": "หอคอยนี้สร้างโดยวิศวกรสมชายในปี พ.ศ. 2475 มีความสูงเก้าสิบเมตร สูงที่สุดในเมืองนี้",
}  # fmt: skip
# Language, label in the page, codec of the page.
PAGES = [
    ("en", "utf-8", "utf-8"), ("en", "iso-8859-1", "cp1252"), ("en", "latin1", "cp1252"),
    ("fr", "ISO-8859-15", "iso8859-15"), ("fr", "us-ascii", "cp1252"),
    ("ru", "windows-1251", "cp1251"), ("ru", "cp1251", "cp1251"), ("ru", "koi8-r", "koi8-r"),
    ("ru", "iso-8859-5", "iso8859-5"), ("ru", "UTF8", "utf-8"), ("uk", "koi8-u", "koi8-u"),
    ("uk", "windows-1251", "cp1251"), ("zh", "gb2312", "gb2312"), ("zh", "GBK", "gb18030"),
    ("zh", "x-gbk", "gbk"), ("zh", "gb18030", "gb18030"), ("zh", "utf-8", "utf-8"),
    ("tw", "big5", "big5"), ("tw", "Big5-HKSCS", "big5hkscs"), ("ja", "shift_jis", "cp932"),
    ("ja", "x-sjis", "cp932"), ("ja", "windows-31j", "cp932"), ("ja", "euc-jp", "euc_jp"),
    ("ja", "iso-2022-jp", "iso2022_jp"), ("ko", "euc-kr", "euc_kr"),
    ("ko", "ks_c_5601-1987", "cp949"), ("pl", "iso-8859-2", "iso8859-2"),
    ("pl", "windows-1250", "cp1250"), ("cs", "iso-8859-2", "iso8859-2"),
    ("el", "iso-8859-7", "iso8859-7"), ("el", "windows-1253", "cp1253"),
    ("tr", "iso-8859-9", "cp1254"), ("he", "windows-1255", "cp1255"),
    ("ar", "windows-1256", "cp1256"), ("th", "tis-620", "cp874"), ("th", "windows-874", "cp874"),
    ("ru", "utf-16", "utf-16"), ("ru", "utf-16", "utf-16-le"), ("ru", "utf-16be", "utf-16-be"),
    ("zh", "utf-16le", "utf-16-le"),
]  # fmt: skip


def page(text, declaration="", menu=0):
    links = "".join(f"<li><a href='/{i}'>menu {i}</a></li>" for i in range(menu))
    return (
        f"<!DOCTYPE html><html><head>{declaration}<title>Page</title></head><body><ul>{links}</ul>"
        f"<p>{text}</p><p>{text}</p></body></html>"
    )


@pytest.mark.parametrize("language, label, codec", PAGES)
@pytest.mark.parametrize("menu", [0, 900])
def test_page_is_decoded_from_header_declaration_or_detection(language, label, codec, menu):
    text = TEXTS[language]
    meta = f'<meta charset="{label}">'
    old = f"<META content='text/html; charset={label}' http-equiv=Content-Type>"
    for header in (label, None, "utf-8", "no-such-charset"):
        for declaration in (meta, old, ""):
            if header == "utf-8" and codec == "iso8859-15":
                continue  # indistinguishable from windows-1252 for this text
            assert text in decode(page(text, declaration, menu).encode(codec), header)


@pytest.mark.parametrize("language, label, codec", PAGES)
def test_plain_text_is_decoded_with_and_without_header(language, label, codec):
    text = TEXTS[language]
    assert text in decode((text + "\n").encode(codec), label, markup=False)
    if label in ("utf-16le",):
        return  # Chinese text without a zero byte cannot be detected
    assert text in decode((text + "\n").encode(codec) * 3, None, markup=False)


@pytest.mark.parametrize("label, written, codec", [
    ("shift_jis", "①髙㈱", "cp932"), ("euc-jp", "①Ⅱ㈱", "euc_jis_2004"),
    ("gb2312", "镕€", "gb18030"), ("euc-kr", "똠방각하", "cp949"), ("big5", "嘅", "big5hkscs"),
    ("latin1", "€“”", "cp1252"),
])  # fmt: skip
def test_labels_are_interpreted_as_in_browsers(label, written, codec):
    assert decode(written.encode(codec), label, markup=False) == written


def test_byte_order_mark_takes_precedence_over_header():
    text = "Żółw"
    for mark, codec in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_BE, "utf-16-be"),
                        (codecs.BOM_UTF32_LE, "utf-32-le")):  # fmt: skip
        assert decode(mark + text.encode(codec), "windows-1251") == text


def test_header_takes_precedence_over_declaration():
    body = page(TEXTS["ru"], "<meta charset=koi8-r>").encode("cp1251")
    assert TEXTS["ru"] in decode(body, "windows-1251")


def test_declarations_are_found_anywhere_in_the_page():
    text = TEXTS["pl"]
    for declaration in (
        '<?xml version="1.0" encoding="iso-8859-2"?>',
        "<!-- <meta charset=utf-8> --><meta charset=iso-8859-2>",
        "<script>"
        + "x" * 50_000
        + "</script><meta name=a content=b><meta charset = 'iso-8859-2' >",
    ):
        assert text in decode((declaration + page(text)).encode("iso-8859-2")), declaration[:60]
    late = page("menu " * 20_000 + '<meta http-equiv="x" content="text/html;charset=iso-8859-2">'
                + text)  # fmt: skip
    assert text in decode(late.encode("iso-8859-2"))


def test_a_few_damaged_bytes_do_not_change_the_charset():
    body = page(TEXTS["ru"]).encode()
    assert TEXTS["ru"] in decode(body + b"\xff\xd0", "utf-8")
    assert TEXTS["ru"] in decode(body + b"\xff\xd0")
    assert decode("für alle".encode("cp1252"), "utf-8", markup=False) == "für alle"


def test_page_truncated_inside_a_character_is_decoded():
    for language, label, codec in PAGES:
        body = (TEXTS[language] * 2).encode(codec)
        assert TEXTS[language][:30] in decode(body[:-1], label)


@pytest.mark.parametrize(
    "label", ["idna", "undefined", "hex", "utf-7", "unicode_escape", "punycode", "rot13", "zip",
              "mbcs", "replacement", "iso-2022-kr", "x" * 10_000, "\0", "", "é"]
)  # fmt: skip
def test_labels_that_are_not_web_charsets_are_ignored(label):
    assert decode("für +AGE- \\u0041".encode(), label) == "für +AGE- \\u0041"


HOSTILE = {
    "high bytes": lambda n: b"\xe4" * n,
    "noise": os.urandom,
    "tags": lambda n: b"<" * n,
    "meta": lambda n: b"<meta" * (n // 5),
    "comments": lambda n: b"<!--><meta" * (n // 10),
    "charsets": lambda n: b"<meta charset=x>" * (n // 16),
    "escapes": lambda n: b"\x1b$B" * (n // 3),
    "between tags": lambda n: b"<\xe4>" * (n // 3),
    "xml": lambda n: b"<?xml" + b" encoding" * (n // 9),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_decoding_takes_linear_time(name):
    def decoding(length):
        body = HOSTILE[name](length)
        return lambda: decode(body, "utf-8")

    assert_linear(decoding, 100_000, slack=0.05)
