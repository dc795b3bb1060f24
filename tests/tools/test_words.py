# ruff: noqa: RUF001
"""Full-text search in every script: pages and paragraphs with the answer are found."""

import asyncio
import json
import sqlite3
import unicodedata

import pytest

from mmsr1_jax.tools import Query
from mmsr1_jax.tools.index_builder import LocalIndexError, build_index
from mmsr1_jax.tools.local_index import LocalIndex
from mmsr1_jax.tools.passages import best_passages
from mmsr1_jax.tools.words import TOKENIZER, fts_query, search_form
from tests.timing import assert_linear

# Script: (question, sentence with the answer, another sentence, filler).
SCRIPTS = {
    "Chinese": ("莲花塔是谁建造的", "莲花塔由工程师李明于一九三二年建造。",
                "这条河很长，水很冷。", "这里的天气没有什么可说的，人们早上出门晚上回家。"),
    "Japanese": ("蓮の塔を建てたのは誰ですか", "蓮の塔は一九三二年に田中が建てた。",
                 "この川は長くて水が冷たい。", "ここの天気については特に言うことがありません。"),
    "katakana": ("タワーの設計者は", "ﾀﾜｰの設計者は田中である。", "橋は長い。", "天気はよい。"),
    "Korean": ("연꽃탑을 누가 세웠나", "연꽃탑의 건축가는 김철수이다.", "이 강은 길고 물이 차갑다.",
               "이곳의 날씨에 대해서는 할 말이 없다. "),
    "Thai": ("ใครสร้างหอคอยบัว", "หอคอยบัวสร้างโดยสมชายในปี ๒๔๗๕", "แม่น้ำสายนี้ยาวและน้ำเย็น",
             "ไม่มีอะไรจะพูดเกี่ยวกับสภาพอากาศที่นี่ "),
    "Lao": ("ໃຜສ້າງຫໍດອກບົວ", "ຫໍດອກບົວສ້າງໂດຍສົມຊາຍ", "ແມ່ນ້ຳຍາວ", "ອາກາດດີ "),
    "Khmer": ("តើអ្នកណាសាងសង់ប្រាសាទឈូក", "ប្រាសាទឈូកត្រូវបានសាងសង់ដោយសុខ",
              "ទន្លេវែង", "អាកាសធាតុល្អ "),
    "Burmese": ("ကြာပန်းမျှော်စင်ကိုဘယ်သူဆောက်သလဲ", "ကြာပန်းမျှော်စင်ကိုမောင်မောင်ဆောက်ခဲ့သည်။",
                "မြစ်ရှည်သည်။", "ရာသီဥတုကောင်းသည်။ "),
    "Hindi": ("कमल मीनार किसने बनाई", "कमल मीनार 1932 में मोहन ने बनाई।", "यह नदी लंबी है।",
              "यहाँ के मौसम के बारे में कुछ नहीं कहना है। "),
    "Hindi joiner": ("शक्ति मंदिर", "शक्\u200dति मंदिर पुराना है।", "नदी लंबी है।", "मौसम। "),
    "Tamil": ("தாமரை கோபுரம்", "தாமரை கோபுரம் 1932 இல் கட்டப்பட்டது.", "ஆறு நீளம்.", "வானிலை. "),
    "Arabic": ("من بنى برج اللوتس", "بُرْجُ اللوتس بناهُ عليّ عام ١٩٣٢.", "النهر طويل.", "لا يوجد. "),
    "Persian": ("برج نیلوفر می\u200cسازد کیست", "برج نيلوفر را علي مي سازد.", "رود بلند است.",
                "هوا خوب است. "),
    "Hebrew": ("מי בנה את מגדל הלוטוס", "אֶת מִגְדַּל הַלּוֹטוּס בָּנָה כֹּהֵן.", "הנהר ארוך.", "אין חדש. "),
    "Russian": ("Кто построил ёлочную башню", "Елочную башню построил Иванов.", "Река длинна.",
                "О погоде нечего. "),
    "Greek": ("Ποιος έχτισε τον ΠΥΡΓΟΣ", "Ο πύργος κτίστηκε το 1932.", "Ο ποταμός.", "Καιρός. "),
    "Turkish": ("ISPARTA kulesi DİYARBAKIR", "Diyarbakır kulesi ısparta yolunda.", "Nehir uzun.",
                "Hava. "),
    "Vietnamese": (unicodedata.normalize("NFD", "Tháp Sen Huế"), "Tháp Sen ở Huế.", "Sông dài.",
                   "Thời tiết. "),
    "German NFD": (unicodedata.normalize("NFD", "Lötturm"), "Der Lötturm von Müller.",
                   "Der Fluss.", "Sonst nichts. "),
    "German sharp s": ("WEISSTURM", "Der Weißturm von Müller.", "Der Fluss.", "Sonst nichts. "),
    "full width": ("Lotus Tower", "Ｌｏｔｕｓ Ｔｏｗｅｒ １９３２", "The river.", "Nothing. "),
    "soft hyphens": ("Lighthouse", "The Light\u00adhouse is tall.", "The river.", "Nothing. "),
    "rare ideographs": ("𠮷野家在哪里", "𠮷野家在东京。", "河很长。", "天气很好。"),
}  # fmt: skip


def search(folder, text, **settings):
    query = Query(action="text_search", text=text, question=text)
    return asyncio.run(LocalIndex(folder, **settings).text_search(query))


def write_pages(folder, texts):
    lines = [json.dumps({"url": f"http://{index}", "text": t}) for index, t in enumerate(texts)]
    (folder / "pages.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("script", SCRIPTS)
def test_page_with_the_answer_ranks_first(tmp_path, script):
    question, answer, other, filler = SCRIPTS[script]
    write_pages(tmp_path, [other, filler, answer])
    results = search(tmp_path, question).results
    assert results and results[0][0].text == f"link: http://2\nsummary: {answer}"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("separator", ["\n", ""])
def test_paragraph_with_the_answer_is_selected(script, separator):
    """The page may be a single line."""
    question, answer, _, filler = SCRIPTS[script]
    around = separator.join([filler * 3] * 40)
    results = best_passages(separator.join([around, answer, around]), question, 200)
    assert answer in results.replace("\n", " ").replace("  ", " ") or answer in results
    assert len(results) <= 200


def test_single_letters_of_scripts_without_spaces_are_found(tmp_path):
    write_pages(tmp_path, ["这条河很长。", "城里有一座塔。"])
    for text in ("塔", "座塔", "塔?"):
        assert len(search(tmp_path, text).results) == 1, text
    assert search(tmp_path, "山").status == "empty"


def test_english_text_is_indexed_unchanged():
    for text in ("Plain words, ‘quotes’ — dashes… € ©", 'a" OR (b*) NEAR c'):
        assert search_form(text) == text
    assert search_form("Lego™ bricks") == "Lego  bricks"
    assert fts_query("Who’s Bridge bridge") == '"Who" OR "s" OR "Bridge" OR "bridge"'


def test_query_operators_are_ordinary_words_in_any_script():
    index = sqlite3.connect(":memory:")
    index.execute(f'CREATE VIRTUAL TABLE t USING fts5(x, tokenize = "{TOKENIZER}")')
    for text in (
        '塔" OR (b*) NEAR',
        "a\0b",
        "\0塔",
        '塔\0"',
        "＂塔＊",
        "x\u0301" * 50,
        "_",
        "\u0301",
    ):
        if query := fts_query(text):
            index.execute("SELECT * FROM t WHERE t MATCH ?", (query,)).fetchall()


def test_english_pages_are_ranked_as_by_plain_fts5(shared, tmp_path):
    """The recorded pages and questions, compared with FTS5's own porter tokenizer."""
    from pyarrow import parquet

    file = shared / "data" / "web_pages.jsonl"
    pages = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = parquet.read_table(shared / "data" / "fvqa_mini.parquet").to_pylist()
    questions = [row["prompt"][-1]["content"] for row in rows]
    questions += sorted({page["query"] for page in pages})
    build_index(tmp_path, [file])
    reference = sqlite3.connect(":memory:")
    reference.execute(
        "CREATE VIRTUAL TABLE page USING fts5(url UNINDEXED, title, snippet, text, "
        "tokenize = 'porter')"
    )
    reference.executemany(
        "INSERT INTO page VALUES (?, ?, ?, ?)",
        [(p["url"], p["title"], p["snippet"], p.get("text") or p["summary"]) for p in pages],
    )
    assert len(questions) > 40
    for question in questions:
        expected = reference.execute(
            "SELECT url FROM page WHERE page MATCH ? ORDER BY bm25(page, 1, 2, 1, 1), rowid "
            "LIMIT 5",
            (fts_query(question),),
        ).fetchall()
        results = search(tmp_path, question).results
        links = [result[0].text.split("\n")[0].removeprefix("link: ") for result in results]
        assert links == [url for (url,) in expected], question


def test_index_of_an_earlier_version_is_rejected_in_one_line(tmp_path):
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        connection.executescript(
            "CREATE VIRTUAL TABLE page USING fts5(url UNINDEXED, title, snippet, text, "
            "tokenize = 'porter'); CREATE TABLE picture (hash, title, link, thumbnail, embedding);"
        )
    connection.close()
    command = r"rebuild the index: python -m mmsr1_jax\.scripts\.index"
    with pytest.raises(LocalIndexError, match=command) as raised:
        LocalIndex(tmp_path)
    assert "\n" not in str(raised.value)


HOSTILE = {
    "marks in the wrong order": lambda n: "a" + "\u0301" * n + "\u0327" * n,
    "marks in turns": lambda n: "a" + "\u0301\u0327" * n,
    "marks of Hebrew": lambda n: "\u05d0" + "\u05b4\u0591\u05bc" * n,
    "an ideograph": lambda n: "塔" * n,
    "zero width": lambda n: "塔" + "\u200b" * n + "塔",
    "joiners": lambda n: "क" + "\u200d" * n,
    "a character that decomposes into 18": lambda n: "\ufdfa" * (n // 5),
    "ends of sentences": lambda n: "。" * n,
    "quotes after a stop": lambda n: "x." + '"' * n,
    "spaces and stops": lambda n: ". " * n,
    "lines": lambda n: "a\n" * (n // 3),
    "one word": lambda n: "y" * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_search_takes_linear_time(name):
    def search(length):
        text = HOSTILE[name](length)
        return lambda: (best_passages(text, "塔 a y x", 1000), fts_query(text[: length // 10]))

    assert_linear(search, 10_000, slack=0.05)
