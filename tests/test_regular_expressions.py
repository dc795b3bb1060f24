"""Every regular expression of the package takes time in proportion to its text.

Untrusted text (a page, a reply of a judge, a turn of the policy) may be crafted to make an
expression backtrack, which Python cannot interrupt. Therefore all expressions are listed here, and
each is timed on texts made of its own parts. Add a new one to `EXPRESSIONS`, with its own texts
if you can think of worse ones.
"""

import ast
import collections
import dataclasses
import importlib
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterator

import pytest

import mmsr1_jax
from tests.timing import cpu_seconds

ROOT = pathlib.Path(mmsr1_jax.__file__).parent
LIBRARIES = ("re", "regex")
METHODS = ("match", "fullmatch", "search", "findall", "finditer", "split", "sub", "subn")
Text = Callable[[int], str]
MIN_TIME, MAX_TIME = 0.0005, 0.03  # seconds: shortest measurable time; limit for SHORT characters
SHORT = 1024
BEYOND = 2048  # above all repetition limits, such as `{0,500}`, up to which time may grow faster
# Small steps first, to detect exponential growth before it takes too long.
SIZES = [*range(8, 48, 4), *(2**i for i in range(6, 22))]

# Expressions for which `texts_for` suffices.
WITHOUT_TEXTS = (
    "apps.plan.collectives._CHANNEL", "apps.plan.collectives._LIST", "apps.plan.parts._SCOPE",
    "tools.verdicts._HARMONY_FRAME", "data.benchmarks.readers._slidevqa",
    "data.benchmarks.grading._EXTRACTED", "data.benchmarks.grading._FORMAT",
    "data.construction.checks._DATED",
    "data.benchmarks.grading.parse_extraction", "data.benchmarks.grading.vqa_normalise",
    "apps.plan.collectives._LISTED", "apps.plan.collectives._SHAPED",
    "apps.plan.collectives._MESH", "apps.plan.collectives._SIZE", "apps.plan.collectives._AXIS",
    "apps.plan.figures._STATED_SIZE", "apps.plan.flops._CONTRACTED",
    "apps.plan.flops._CUBLAS_CONTRACTED", "apps.plan.flops._LABELS", "apps.plan.flops._WINDOW",
    "apps.plan.flops._BATCH_GROUPS", "apps.plan.hlo._ARRAY", "apps.plan.hlo._SPACE",
    "apps.plan.hlo._OP", "apps.plan.hlo._NAME", "apps.plan.hlo._OP_NAME",
    "apps.plan.hlo._BRANCHES", "apps.plan.loops._INDEX", "apps.plan.loops._KNOWN",
    "apps.plan.targets._SHAPE", "apps.plan.traffic._KERNELS", "apps.plan.traffic._TARGET",
    "apps.plan.traffic._CYCLES", "apps.plan.traffic._ESTIMATE", "apps.plan.traffic._STATED",
    "apps.plan.targets.gpu_description", "rewards.reward_function._ARTICLES",
    "rollout.forcing._TAG", "episodes.prompts._FIELD", "episodes.turns._CLOSE",
    "tools.service_clients._parse_limit", "tools.redis_cache._public_address",
    "tools.redis_cache.is_redis", "tools.services.jina._FAILED", "tools.web._HOST",
    "tools.web._retry_after", "utils.checked_json._SURROGATE", "utils.outputs._HOLDER",
    "utils.outputs._LEFTOVER", "config.redaction._PARAMETER_MARKS", "config.redaction._USER",
    "config.redaction._has_password", "config.redaction._describe_secret",
    "config.redaction._is_secret", "config.redaction._redact_address", "config.redaction.redact",
    "rl.adapter_files._FACTOR", "rl.lora._tensor", "episodes.escaping._CLOSED",
    "episodes.escaping._CONTROL_TOKEN", "episodes.escaping._HAS_INVISIBLE_ASCII",
    "episodes.escaping._HEADER", "episodes.escaping._CAPTION", "episodes.escaping._LINK",
    "episodes.escaping._SUMMARY", "episodes.escaping._OVERRIDE", "episodes.escaping._QUESTION",
    "episodes.escaping._TAG", "episodes.layout._SENTENCE", "episodes.layout._UNSPACED",
    "processing.tokenizer_files._MARKUP", "processing.tokenizer_files._TAG",
    "tools.charset_detection._BETWEEN_TAGS", "tools.charset_detection._CONTROL",
    "tools.charset_detection._LETTER", "tools.charset_detection._NON_ASCII",
    "tools.charset_detection._PUNCTUATION", "tools.charset_detection._RUN",
    "tools.charsets._DECLARED", "tools.charsets._XML_DECLARED", "tools.links._BREAK",
    "tools.links._DOTS", "tools.links._PORT", "tools.links._UNSAFE", "tools.links._WEB",
    "tools.lookalikes._LATIN", "tools.page_checks._ADDRESS", "tools.page_checks._IMAGE",
    "tools.page_checks._LETTER", "tools.page_checks._NOTICE", "tools.page_checks._REFUSAL",
    "tools.page_checks._SENTENCE", "tools.page_checks._TITLE", "tools.page_checks._WIDE",
    "tools.page_text._BROKEN", "tools.page_text._CONTROLS", "tools.page_text._MANY_MARKS",
    "tools.page_text._TAG", "tools.passages._SENTENCE_END", "tools.services.__init__._TRANSIENT",
    "tools.services.__init__._REFUSALS", "tools.services.__init__.has_text",
    "tools.services.jina._FIELD", "tools.words._FOREIGN", "tools.words._INDIAN_JOINER",
    "tools.words._MANY_MARKS", "tools.words._RUN", "tools.words._WORD",
)  # fmt: skip

# Location of an expression (module, and the name or function that it belongs to) -> functions that
# return texts of about n characters, in addition to those of `texts_for`.
EXPRESSIONS: dict[str, tuple[Text, ...]] = {
    **dict.fromkeys(WITHOUT_TEXTS, ()),
    "apps.plan.collectives._PAIRS": (lambda n: " source_target_pairs={" + "{1,1}," * (n // 6),),
    "evaluation.parts._PART": (lambda n: "episodes." + "1" * n,),
    "tools.verdicts._THINK_FRAME": (lambda n: "</think" * (n // 7),),
    "data.benchmarks.grading._EXACT": (lambda n: "a." * n, lambda n: "a@" + "b." * n),
    "data.benchmarks.grading._clean": (lambda n: " " * n + "x", lambda n: "'" * n),
    "apps.report.records._IMAGE": (lambda n: "<|vision_start|>" + "<|image_pad|>" * (n // 13),),
    "episodes.turns._REASON": (
        lambda n: " " * n + "x",
        lambda n: "<reason>" * (n // 8),
        lambda n: "<reason></reason>" + " " * n + "x",
    ),
    "tools.services.summariser._SENTENCE_END": (lambda n: "ab." + " " * n + "x",),
    "scripts.settings.field_meanings": (),  # reads docstrings of this package
    "config.redaction._ADDRESS": (lambda n: "a:b@" * (n // 4), lambda n: "a" * n + "?"),
    "config.redaction._SECRET_NAMES": (lambda n: "api_" * (n // 4), lambda n: "key_id" * (n // 6)),
    "episodes.escaping._ENCODED": (
        lambda n: "&amp;" * (n // 5),
        lambda n: "&" + "amp;" * (n // 4),
        lambda n: "%" + "25" * (n // 2),
        lambda n: "&#" + "0" * n,
    ),
    "episodes.escaping._FIRST_AMPERSANDS": (lambda n: "&" + "amp;" * (n // 4),),
    "episodes.escaping._LONE_NUMBER": (lambda n: "\n" + " " * n,),
    "episodes.escaping._NUMBER": (lambda n: "&#" + "0" * n,),
    "episodes.escaping._NUMBERED_LINE": (lambda n: "1 " * (n // 2),),
    "episodes.escaping._UNNUMBERED": (lambda n: "\n" + " " * n,),
    "episodes.escaping._NUMBERED": (lambda n: "0" * n, lambda n: "1 " * (n // 2)),
    "tools.words._ZERO_WIDTH": (),
}
# Expressions that are compiled where they are used, with their possible patterns.
DYNAMIC: dict[str, tuple[str, ...]] = {"data.benchmarks.tables.open_rows": (r"page_\d+", "image")}


@dataclasses.dataclass(frozen=True)
class Use:
    """An expression, and the method that it is used by."""

    location: str
    pattern: re.Pattern
    method: str

    def cpu_time(self, text: str) -> float:
        """Return the CPU time of one use, in seconds.

        Methods that find several matches are timed by `finditer`: they search alike, and what the
        others make of the matches takes time that depends on the memory in use.
        """
        text = text if isinstance(self.pattern.pattern, str) else text.encode("latin-1", "replace")
        if self.method in ("match", "fullmatch", "search"):
            return cpu_seconds(lambda: getattr(self.pattern, self.method)(text), runs=1)
        matches = self.pattern.finditer
        return cpu_seconds(lambda: collections.deque(matches(text), maxlen=0), runs=1)


def uses() -> Iterator[Use]:
    """Yield all expressions of the package. Fail if one cannot be determined from the source."""
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            other = isinstance(node, ast.ImportFrom) and node.module in LIBRARIES
            if isinstance(node, ast.Import):
                other = any(name.name in LIBRARIES and name.asname for name in node.names)
            if other:
                pytest.fail(
                    f"{path}: import the library under its own name, so that its uses can be found"
                )
        yield from _of_module(module, tree)


def _of_module(module: str, tree: ast.Module) -> Iterator[Use]:
    for top in tree.body:
        for node in ast.walk(top):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in LIBRARIES
                and node.func.attr in ("compile", *METHODS)
            ):
                continue
            location = f"{module}.{_name_of(top, node)}"
            names = {ast.unparse(node), *_targets(top)}
            methods = {node.func.attr}
            if node.func.attr == "compile":
                methods = {
                    other.attr
                    for other in ast.walk(tree)
                    if isinstance(other, ast.Attribute)
                    and other.attr in METHODS
                    and ast.unparse(other.value) in names
                } or {"search"}
            for pattern, method in itertools.product(
                _patterns(module, location, node), sorted(methods)
            ):
                yield Use(location, pattern, method)


def _targets(top: ast.stmt) -> list[str]:
    return [ast.unparse(target) for target in top.targets] if isinstance(top, ast.Assign) else []


def _name_of(top: ast.stmt, node: ast.Call) -> str:
    """Return the assigned name, or the innermost function, with its class."""
    names, scope = _targets(top)[:1], top
    while isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        names.append(scope.name)
        inner = (
            child
            for child in scope.body
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and any(other is node for other in ast.walk(child))
        )
        scope = next(inner, None)
    return ".".join(names)


def _patterns(module: str, location: str, node: ast.Call) -> Iterator[re.Pattern]:
    library = importlib.import_module(node.func.value.id)
    flags = [word.value for word in node.keywords if word.arg == "flags"]
    at = {"compile": 1, "sub": 4, "subn": 4, "split": 3}.get(node.func.attr, 2)
    flags += node.args[at : at + 1]
    flag = eval(ast.unparse(flags[0]), {node.func.value.id: library}) if flags else 0
    if location in DYNAMIC:
        yield from (library.compile(pattern, flag) for pattern in DYNAMIC[location])
        return
    try:
        pattern = ast.literal_eval(node.args[0])
    except ValueError:
        known = vars(importlib.import_module(f"mmsr1_jax.{module}"))
        try:
            pattern = eval(ast.unparse(node.args[0]), dict(known))
        except NameError:
            pytest.fail(f"{location}: DYNAMIC must list the values of {ast.unparse(node.args[0])}")
    yield library.compile(pattern, flag) if isinstance(pattern, (str, bytes)) else pattern


def texts_for(pattern: re.Pattern) -> list[Text]:
    """Return texts that repeat one or two words or letters of the expression.

    They may begin with one of its words, and end with a letter at which the match fails.
    """
    try:
        words, letters = _atoms(re._parser.parse(pattern.pattern, pattern.flags & re.VERBOSE))
    except re.error:  # what only `regex` knows, such as scripts
        words, letters = (
            [],
            [*dict.fromkeys("中กé́" + re.sub(r"\\p\{\w+\}|\W", "", pattern.pattern))],
        )
    letters = list(dict.fromkeys([*letters, " ", "\n", "a", "1", "<"]))[:8]
    atoms = [*words[:4], *letters]
    bodies = [*atoms, *("".join(pair) for pair in itertools.permutations(atoms[:7], 2))]
    return [
        lambda n, head=head, body=body, end=end: head + body * (n // len(body)) + end
        for head, body, end in itertools.product(["", *words[:2]], bodies, ["", "\x00"])
    ]


def _atoms(parsed) -> tuple[list[str], list[str]]:
    """Return the words (sequences of letters) and single letters of a parsed expression."""
    words: dict[str, None] = {}
    letters: dict[str, None] = {}

    def walk(items) -> None:
        row = ""
        for code, value in [*items, (None, None)]:
            if str(code) == "LITERAL":
                row += chr(value)
                continue
            if row:
                (words if len(row) > 1 else letters)[row] = None
                letters[row[0]] = letters[row[-1]] = None
            row = ""
            if str(code) in ("IN", "NOT_LITERAL", "ANY"):
                letters.update(dict.fromkeys(_letters_of_class(code, value)))
            for inner in value if isinstance(value, (tuple, list)) else ():
                for part in inner if isinstance(inner, list) else [inner]:
                    if isinstance(part, re._parser.SubPattern):
                        walk(part)

    walk(parsed)
    return list(words), list(letters)


def _letters_of_class(code, value) -> list[str]:
    """Return some letters of a character class."""
    if str(code) != "IN":
        return ["x"]
    samples = {"CATEGORY_SPACE": " ", "CATEGORY_DIGIT": "1", "CATEGORY_WORD": "a"}
    letters = []
    for kind, content in value:
        if str(kind) == "LITERAL":
            letters.append(chr(content))
        elif str(kind) == "RANGE":
            letters.append(chr(content[0]))
        else:
            letters.append(samples.get(str(content), "-"))
    return letters


def growth(use: Use, text: Text) -> float:
    """Return the factor by which the time grows if a measurable text becomes 10 times as long.

    If 4 times the text takes far too long already, the result is an estimate or infinity.
    """
    for n in SIZES:
        seconds = use.cpu_time(text(n))
        if n <= SHORT and seconds > MAX_TIME:
            return math.inf
        if n >= BEYOND and seconds > MIN_TIME:
            break
    else:
        return 0.0  # even the longest text takes no measurable time
    ratio = math.inf
    for attempt in range(4):  # other processes can only increase the time
        seconds = min(use.cpu_time(text(n)) for _ in range(5 if seconds < 0.001 else 2))
        by_four = use.cpu_time(text(4 * n)) / seconds
        if by_four > 12:
            ratio = min(ratio, by_four ** math.log(10, 4))
            if attempt:
                break
            continue
        long = text(10 * n)
        ratio = min(ratio, min(use.cpu_time(long) for _ in range(3 + 2 * attempt)) / seconds)
        if ratio < 13:
            break
    return ratio


def worst(use: Use) -> list[Text]:
    """Return the texts that are slowest for an expression, or the first that is far too slow."""
    timed = []
    for text in texts_for(use.pattern):
        for n in SIZES[: SIZES.index(SHORT) + 1]:
            seconds = use.cpu_time(text(n))
            if seconds > MAX_TIME:
                return [text]
        timed.append((seconds, len(timed), text))
    return [text for _, _, text in sorted(timed)[-2:]]


USES = list(uses())


def test_every_regular_expression_is_listed():
    locations = {use.location for use in USES}
    missing, gone = locations - {*EXPRESSIONS, *DYNAMIC}, {*EXPRESSIONS, *DYNAMIC} - locations
    assert not missing, f"add them to EXPRESSIONS: {sorted(missing)}"
    assert not gone, f"no longer in the package: {sorted(gone)}"


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.location}-{use.method}")
def test_ten_times_the_text_takes_at_most_fifteen_times_as_long(use):
    for text in [*EXPRESSIONS.get(use.location, ()), *worst(use)]:
        assert growth(use, text) <= 15, f"{use.pattern.pattern!r} with {text(60)!r}"


@pytest.mark.parametrize(
    "pattern, method",
    [
        (r"\s*x", "search"), (r"```(?:json)?\s*\n(.*)\n\s*```", "match"), (r"(a+)+b", "fullmatch"),
        (r"<a>(.*?)</a>", "findall"), (r"\s+$", "sub"), (r"(?:x|xx)+y", "match"),
        (rb"charset=.*?;", "search"), (r"(\w+\s?)+:", "match"),
    ],
)  # fmt: skip
def test_a_backtracking_expression_is_detected(pattern, method):
    use = Use("", re.compile(pattern, re.DOTALL), method)
    assert any(growth(use, text) > 15 for text in worst(use))
