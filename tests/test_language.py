"""The language of the project: phrases and names that readers of the field would have to guess."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("mmsr1_jax", "configs", "docs", "launch", "tests", "third_party", ".github")
KINDS = {".py", ".md", ".js", ".html", ".css", ".txt", ".sh", ".yml", ".toml"}
SKIPPED = ("_build", "settings.md", "prompts", "__pycache__")  # generated, or the policy's text

PHRASES = (
    "goes on with", "go on with", "gone on with", "is told", "was begun", "is begun",
    "that is to be", "none there", "gives way", "give way to", "what was done", "what happened",
    "what it does then", "what it would have done", "a setting that cannot be", "asked to stop",
    "once it is written", "what an episode brings", "says nothing", "turns that are given",
    "with its manners", "goes on in words", "means nothing", "without spread",
)  # fmt: skip

# Names at the start of the redesign, each replaced by the term of the field (as whole words).
NAMES = (
    "retell", "Lesson", "Rolled", "Teller", "Thumbnails", "_Lifeless", "engine_gap",
    "tokens_a_second", "kl_weight", "importance_cap", "bad_in_a_row", "row_tokens",
    "extend_lengths", "compile_ahead", "put_url", "least_tokens",
)  # fmt: skip


def test_no_phrase_or_name_of_a_private_language():
    pattern = re.compile("|".join(rf"\b{re.escape(p)}\b" for p in (*PHRASES, *NAMES)))
    occurrences = []
    for path in sorted(_files()):
        text = path.read_text(encoding="utf-8")
        joined = re.sub(r"\s+(?:#|//|\*)?\s*", " ", text)  # phrases may be wrapped
        occurrences += [f"{path.relative_to(ROOT)}: {m[0]}" for m in pattern.finditer(joined)]
    assert not occurrences, "\n".join(occurrences)


def test_the_check_finds_phrases():
    assert sum(1 for _ in _files()) > 200
    assert re.search(r"\bgoes on with\b", "the run goes on with it")


def _files():
    for folder in (ROOT, *(ROOT / name for name in FOLDERS)):
        for path in folder.glob("*") if folder == ROOT else folder.rglob("*"):
            skipped = any(part in path.relative_to(ROOT).parts for part in SKIPPED)
            named = path.name in ("CHANGELOG.md", pathlib.Path(__file__).name)
            if path.is_file() and path.suffix in KINDS and not skipped and not named:
                yield path
