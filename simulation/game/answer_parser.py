"""The parser that reads the number in an answer text. It does not depend on the game or the range of its numbers.

It accepts a text if its last line only states a number, such as "33" or "Answer: 33", in one of many languages (see
answer_words.yaml), and no earlier line suggests another number or author. A retry is better than a wrong number.
"""

import html
import json
import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

import yaml

from simulation.errors import NO_NUMBER, UNCERTAIN, KnownCause

TEXT_READ = 20_000  # maximum length of an answer, in characters
LINE_READ = 1_000  # maximum length of a line that states a number


class _Loader(yaml.SafeLoader):
    """A loader that joins each list of alternatives into one pattern."""


_Loader.add_constructor("tag:yaml.org,2002:seq", lambda _, node: "|".join(each.value for each in node.value))
WORDS = yaml.load(Path(__file__).with_name("answer_words.yaml").read_text(encoding="utf-8"), _Loader)

# Atomic groups and bounded repetitions: a very long number must not cause long backtracking.
_NUMBER = (
    r"-?(?>\d{1,3}(?:,\d{3}){1,10}(?:\.\d{1,30})?|\d{1,30}(?:\.\d{1,30})?|(?<!\.)\.\d{1,30})(?>(?:e[-+]?\d{1,3})?)"
)
_IGNORED = re.compile(  # ranges, totals and negated numbers
    rf"(?:between {_NUMBER} and {_NUMBER}|from {_NUMBER} to {_NUMBER}"
    rf"|(?<![\d.:-]){_NUMBER} ?(?:to|[-–…]|\.\.+) ?{_NUMBER}(?![-:]?\d))(?! \d)"
    r"|(?<![\d.,] )(?<=\d)(?: (?:out of|of) | ?/ ?)1,?0{2,3}(?:,?000){0,2}\b"  # 2/3 is not a total
    rf"|(?:, ?)?\bnot {_NUMBER}(?:,? (?:or|nor|and|&) {_NUMBER}|, {_NUMBER})*(?:,? but\b)?"
)
# This pattern excludes numbers that may be part of an expression, as in "10 million", "P17", "minus 5" or "33-ish".
_SURE = (  # in scripts without spaces between words, from U+2E80 on, a letter may precede a number
    r"(?!0,\d)(?=[-.\d])(?<![^\W_\u2e80-\ud7ff])(?<![负負点點第№])(?<![-‐‑‒–﹣－√∛±≤≥~≈<>,٫٬])"
    r"(?<![-‐‑‒–﹣－√∛±≤≥~≈<>№] )(?<![<>]=)(?<![<>]= )(?<!(?<!\w)—)(?<!(?<!\.)\.)(?<!\d[:/])"
    rf"{_NUMBER}(?![^\W_\u2e80-\ud7ff]|[万萬千百亿億兆点點分半만천백억割第回番号號人名位]|-\w|[.,٫٬:]\d| ?[¼-¾⅐-⅞‰²³¹]"
    r"| ?(?:[-+×÷^x/=→]|->|\*\*?) ?\d| ?(?:%|percent) of\b"
    r"| (?:(?:hundred|thousand|\w{1,5}illion|dozen|lakh|crore)s?|k|m|mil|mn|bn|point|plus|times|squared|cubed"
    r"|and a half)\b)"
)
_COMMA_NUMBER = rf"(?<![\w.,-])\d{{1,3}},\d{{1,2}}(?![\w,]|\.\d| ?[+×÷^x/%])|(?!\d{{1,3}}[.,]\d{{3}}(?!\d)){_SURE}"
_DIGITS = re.compile(r"[\d²³¹¼-¾⅐-⅞]")

_AROUND = r"[\s\"'“”„«»‘’「」()\[\]{}<>$#|•=—]"  # characters around a number


def _line(statement: str) -> str:
    """Return the pattern of a whole line that consists of the pattern `statement` and permitted words around it."""
    opening = rf"\W*(?:(?:{WORDS['opening']})(?!\w)[\s,:;.!…—-]*)*"
    closing = rf"(?: ?(?:{WORDS['units']}))?(?:{WORDS['closing']})?"
    return rf"{opening}{statement}{closing}{_AROUND}{{0,4}}[.!。！।]*{_AROUND}{{0,4}}"


_ALONE = re.compile(_line(rf"(?:boxed: )?{_AROUND}{{0,9}}?({_SURE})(?:[ ,]{{1,3}}(?:and |again )+\1)*"))


@cache  # compiled on first use, which takes 0.03 s per language
def _statement(language: str) -> re.Pattern[str]:
    """Return the pattern of a line that states a number. The group `formal` matches only in texts like "Answer: 33"."""
    words = WORDS["languages"][language]
    number = _COMMA_NUMBER if words.get("comma", True) else _SURE
    return re.compile(
        _line(
            rf"(?:(?:(?P<formal>(?:{words['labels']})(?: ?\( ?\))? ?[:=—]"
            rf"|(?:{words['owns']})(?![^\W\d\u2e80-\ud7ff]))|(?:{words['states']}))"
            rf"(?: ?(?:{WORDS['the_number']})(?!\w))?[ :=—]{{0,2}}(?:boxed: )?{_AROUND}{{0,4}}(?P<number>{number})"
            rf"|(?:{words.get('before', '(?!)')})(?P<before>{number})(?:{words.get('after', '')}))"
        )
    )


@lru_cache(maxsize=1024)  # models often give the same answers
def stated_number(text: str) -> float:
    """Return the author's own number: 37 for "I choose 37.", "**37**" and "37 of 100".

    Ignore reasoning (<think>...</think>), ranges, totals and negated numbers. Raises KnownCause if no number is
    certain: a number may belong to another player or an earlier round, be part of an expression, or be withdrawn.
    """
    if len(text) > TEXT_READ:
        raise KnownCause(f"text of more than {TEXT_READ} characters", text)
    plain = _plain(text)
    if not _DIGITS.search(plain):
        raise KnownCause(NO_NUMBER, text)
    *before, last = _lines(_NUMBER_QUOTED.sub("", plain)) or [""]
    number = None if _FOREIGN.search(plain) else _stated(last, only_formal=bool(before))
    if number is None or (before and not _may_precede(before, last, number)):
        raise KnownCause(UNCERTAIN, text)
    return number


def _stated(line: str, only_formal: bool = False) -> float | None:
    """Return the number that a line states, or None if the line does not consist of just one such statement.

    If `only_formal`, accept only a bare number or a formal answer, such as "Answer: 33".
    """
    if len(line) > LINE_READ:
        return None
    alone = _ALONE.fullmatch(line)
    matches = () if alone else (_statement(language).fullmatch(line) for language in WORDS["languages"])
    found = (each["number"] or each["before"] for each in matches if each and (each["formal"] or not only_formal))
    if (number := alone[1] if alone else next(found, None)) is None:
        return None
    has_thousands = re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\..*)?", number)
    return float(number.replace(",", "" if has_thousands else "."))


def _may_precede(before: list[str], last: str, number: float) -> bool:
    """Return whether the lines `before` may precede the line `last`, which states the answer `number`.

    They have no quotation, speaker, supposition or other number, and end with a sentence or a value.
    """
    if any(_QUOTES.search(line) or _SPEAKS.match(line) for line in before):
        return False
    lines = (_ITEM.sub("", line, count=1) for line in before)
    for sentence in (each for line in lines for each in _SENTENCE_ENDS.split(line) if each):
        if _SUPPOSES.match(sentence) or _stated(sentence) not in (None, number):
            return False
    if last.startswith("=") or last.endswith("%") or _LEADS.match(before[-1]) or _ASKS.match(before[-1]):
        return False
    if _ITEM.fullmatch(last) and any(_ITEM.match(line) for line in before):
        return False
    ends = before[-1].rstrip(")]").endswith((".", "!", "。", "！", "।")) and not _ABBREVIATED.search(before[-1])
    return ends or _VALUE.fullmatch(before[-1]) is not None


_PLAIN = str.maketrans("−：，．（）％＝！？’", "-:,.()%=!?'")
_TAG = re.compile(
    rf"<[ \t]*(/?)[ \t]*(?:{WORDS['thoughts']})\b[^<>]{{0,40}}>|◁[ \t]*(/?)[ \t]*think[ \t]*▷|\[(/?)think(?:ing)?\]"
)
_TOKEN = re.compile(
    r"</s>|<\|(?:im_end|eot_id|endoftext|end|assistant)\|>|<end_of_turn>|</?(?:b|i|p|em|strong|br ?/?)>"
)
_ELEMENT = re.compile(r"<((?:final[-_ ]?)?(?:answer|number|choice))>([^<>]*)</\1>")
_BOXED = re.compile(r"\\boxed\s{0,3}\{(?:\\(?:text|mathbf|mathrm)\s{0,3}\{)?([^{}]*)\}+")
_STRUCK_DIGIT = re.compile(r"(?<=\d)~~[^~\n]*~~|~~[^~\n]*~~(?=\d)")
_STRUCK = re.compile(r"~~[^~\n]*~~|```\w*|\\[()\[\]]")
_EMPHASIS = re.compile(r"(?<!\d)\*++|\*++(?!\d)|(?<![^\W_])__++|__++(?![^\W_])|`|\$(?!\d)")
# Further signs of a text that is not only an answer: markup, JSON, quotations, tables, reasoning
_FOREIGN = re.compile(
    r"<[^\W\d_][^<>]{0,60}>|<[!/|][^<>]{0,60}>|[‹〈《【]|\[/?[a-z]+\]|[{}]|^[ \t]*[>|]"
    r"|^\W*(?:thinking|thoughts?|analysis)\b",
    re.M,
)
_QUOTES = re.compile(r"[\"“”„«»「」『』]")
_NUMBER_QUOTED = re.compile(r"[\"“”„«»「」](?=\d)|(?<=\d)[\"“”„«»「」]")
_ASKS = re.compile(r".*(?:[?？]|[か吗嗎呢][。.]?)\W*$")
_LABELS, _OWNS = ("|".join(each[key] for each in WORDS["languages"].values()) for key in ("labels", "owns"))
_LABEL_LINE = re.compile(rf"\W*(?:{_LABELS}|{_OWNS})\W*")
_ITEM = re.compile(r"^\W{0,4}\d{1,2}[.)](?: |$)")  # the number of a list item
_SUPPOSES = re.compile(rf"\W*(?:{WORDS['supposing']})|.*(?:가정|仮定)")
_LEADS = re.compile(WORDS["leading"])
_SPEAKS = re.compile(rf"(?!\W*(?:{WORDS['headings']})\W*:)[^:]{{1,100}}:")  # "Player 2: I go first."
_ABBREVIATED = re.compile(r"\b(?:avg|approx|no|est|nr|etc)\.\W*$")
_VALUE = re.compile(rf".*=.*\d\W*|\W*(?:{WORDS['headings']})\W*[:=≈→].*\d\W*")  # "target: 33"
_SENTENCE_ENDS = re.compile(r"(?<=[.!?…])[\"')\]”]* +|(?<=[。！？।])")
_KEY = re.compile(rf"{_LABELS}|numero")
_BESIDE = re.compile(rf"{WORDS['headings']}|rationale|thoughts?|thinking|confidence|round|思考")


def _lines(text: str) -> list[str]:
    """Remove ranges, totals and negated numbers, and return the non-empty lines, each label joined to the next line."""
    lines: list[str] = []
    for raw in text.splitlines():
        line = " ".join(_IGNORED.sub(" ", " ".join(raw.split())).split())  # single spaces keep patterns short and fast
        if line and lines and (lines[-1].endswith(":") or _LABEL_LINE.fullmatch(lines[-1])):
            label = lines.pop().strip(" #")
            lines.append(f"{label} {line}" if label.endswith((":", "is")) else f"{label}: {line}")
        elif line:
            lines.append(line)
    return lines


def _plain(text: str) -> str:
    """Return the text in lower case with ASCII digits, without reasoning and markup; "" if the reasoning is cut off."""
    plain = _without_thoughts(html.unescape(text).lower().translate(_PLAIN))
    plain = "".join(str(unicodedata.decimal(each)) if each.isdecimal() else each for each in plain)
    plain = _STRUCK.sub(" ", _STRUCK_DIGIT.sub(" n0 ", _TOKEN.sub(" ", plain))).strip()  # n0 is no number
    plain = _BOXED.sub(r" boxed: \1", _object(plain))
    return _EMPHASIS.sub("", _ELEMENT.sub(r"answer: \2\n", plain))


def _without_thoughts(text: str) -> str:
    """Return the text without <think>...</think> and similar elements, or "" if a closing tag is missing."""
    outside, depth, at = "", 0, 0
    for tag in _TAG.finditer(text):
        if depth == 0:
            outside += text[at : tag.start()]
        closes = any(tag.groups())
        if closes and depth == 0:  # the opening tag is in the prompt
            outside = ""
        depth = max(depth - 1, 0) if closes else depth + 1
        at = tag.end()
    return "" if depth else outside + "\n" + text[at:]


def _object(text: str) -> str:
    """Rewrite a JSON object as lines of text if its last key is a word like "answer". Return other texts unchanged."""
    if not text.startswith("{"):
        return text
    try:
        fields = json.loads(text if '"' in text else text.replace("'", '"'), object_pairs_hook=list)
        *before, (key, number) = ((key.replace("_", " "), value) for key, value in fields)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text
    known = _KEY.fullmatch(key) and all(_BESIDE.fullmatch(other) for other, _ in before)
    if not known or type(number) not in (int, float, str):
        return text
    texts = (f"{value.rstrip('.')}." for _, value in before if isinstance(value, str))
    return "\n".join([*texts, f"answer: {number}"])
