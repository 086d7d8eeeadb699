"""Reading the number that a text answers with, pure: it knows neither the game nor the range of its numbers.

A text is read only where its writer's own number is certain: where all of it is one statement, such as "33", "I choose
33" or "Answer: 33" (answer_words.py has these in many languages), or where its last line does nothing but give the
answer, and no line before may make it another one's. All other texts are refused: it is better to ask again than to
count somebody else's number.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from functools import lru_cache
from typing import Any

from simulation.errors import KnownCause
from simulation.game import answer_words as words

TEXT_READ = 20_000  # characters of an answer at most
SHORT = 64  # characters of an answer that is worth remembering
LINE_READ = 1_000  # characters of a line that states a number
NO_NUMBER, UNCERTAIN = "no number in the answer", "not certain which number is the answer"
TOO_LONG = f"text of more than {TEXT_READ} characters"


class _Later:
    """A regular expression that is compiled when it is used: most answers are a number alone, and need none of them."""

    def __init__(self, source: str, flags: int = 0) -> None:
        self._source, self._flags = source, flags

    def __getattr__(self, name: str) -> Any:
        vars(self)["_pattern"] = pattern = vars(self).get("_pattern") or re.compile(self._source, self._flags)
        return getattr(pattern, name)


# --- Numbers ---------------------------------------------------------------------------------------------------------

# Bounded, as is the text, and atomic: a participant that answers a million digits must not hold up its server.
_NUMBER = (
    r"-?(?>\d{1,3}(?:,\d{3}){1,10}(?:\.\d{1,30})?|\d{1,30}(?:\.\d{1,30})?|(?<!\.)\.\d{1,30})(?>(?:e[-+]?\d{1,3})?)"
)
_BARE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*", re.ASCII)
_LEFT_OUT = _Later(  # ranges, totals, and what is said not to be the number
    rf"(?:between {_NUMBER} and {_NUMBER}|from {_NUMBER} to {_NUMBER}"
    rf"|(?<![\d.:-]){_NUMBER} ?(?:to|[-–…]|\.\.+) ?{_NUMBER}(?![-:]?\d))(?! \d)"
    r"|(?<![\d.,] )(?<=\d)(?: (?:out of|of) | ?/ ?)1,?0{2,3}(?:,?000){0,2}\b"  # 2/3 is no total
    rf"|(?:, ?)?\bnot {_NUMBER}(?:,? (?:or|nor|and|&) {_NUMBER}|, {_NUMBER})*(?:,? but\b)?"
)
# A number that may stand for another one, as in "10 million", "P17", "minus 5", "√2" or "33-ish", is not read.
_SURE = (  # the writing systems without blanks between words, from U+2E80 on, may have a letter before a number
    r"(?!0,\d)(?=[-.\d])(?<![^\W_\u2e80-\ud7ff])(?<![负負点點第№])(?<![-‐‑‒–﹣－√∛±≤≥~≈<>,٫٬])"
    r"(?<![-‐‑‒–﹣－√∛±≤≥~≈<>№] )(?<![<>]=)(?<![<>]= )(?<!(?<!\w)—)(?<!(?<!\.)\.)(?<!\d[:/])"
    rf"{_NUMBER}(?![^\W_\u2e80-\ud7ff]|[万萬千百亿億兆点點分半만천백억割第回番号號人名位]|-\w|[.,٫٬:]\d| ?[¼-¾⅐-⅞‰²³¹]"
    r"| ?(?:[-+×÷^x/=→]|->|\*\*?) ?\d| ?(?:%|percent) of\b"
    r"| (?:(?:hundred|thousand|\w{1,5}illion|dozen|lakh|crore)s?|k|m|mil|mn|bn|point|plus|times|squared|cubed"
    r"|and a half)\b)"
)
_COMMA_NUMBER = rf"(?<![\w.,-])\d{{1,3}},\d{{1,2}}(?![\w,]|\.\d| ?[+×÷^x/%])|(?!\d{{1,3}}[.,]\d{{3}}(?!\d)){_SURE}"
_DIGITS = re.compile(r"[\d²³¹¼-¾⅐-⅞]")

# --- What states a number --------------------------------------------------------------------------------------------

_AROUND = r"[\s\"'“”„«»‘’「」()\[\]{}<>$#|•=—]"  # marks beside a number
_END = r"[.!。！।]*"
_LABELS = "|".join(each.labels for each in words.LANGUAGES.values())
_OPENING = rf"\W*(?:(?:{words.OPENING})(?!\w)[\s,:;.!…—-]*)*"


def _statement(each: words.Words) -> str:
    """A pattern of a line that states a number in one language; `formal` where it does nothing else."""
    number = _COMMA_NUMBER if each.comma else _SURE
    before, after = each.around
    return (
        rf"{_OPENING}(?:(?:(?P<formal>(?:{each.labels})(?: ?\( ?\))? ?[:=—]"
        rf"|(?:{each.owns})(?![^\W\d\u2e80-\ud7ff]))|(?:{each.states}))"
        rf"(?: ?(?:{words.THE_NUMBER})(?!\w))?[ :=—]{{0,2}}(?:boxed: )?{_AROUND}{{0,4}}(?P<number>{number})"
        rf"|(?:{before})(?P<before>{number})(?:{after}))"
        rf"{words.UNITS}{words.CLOSING}{_AROUND}{{0,4}}{_END}{_AROUND}{{0,4}}"
    )


_STATEMENTS = tuple(_Later(_statement(each)) for each in words.LANGUAGES.values())
_ALONE = _Later(
    rf"{_OPENING}(?:boxed: )?{_AROUND}{{0,9}}?({_SURE})(?:[ ,]{{1,3}}(?:and |again )+\1)*{words.UNITS}{words.CLOSING}"
    rf"{_AROUND}{{0,4}}{_END}{_AROUND}{{0,4}}"
)


def parse_number(text: str) -> float:
    """Read the number that is its writer's own: "I choose 37.", "**37**" and "37 of 100" are 37.

    Thoughts (<think>...</think>), ranges, totals and what is negated are left out.

    Raises:
        KnownCause: There is no number, or it is not certain which one is the writer's: somebody else may have given
            it, or may give it, it may be of an earlier round, be part of another one as in "10 million", or be taken
            back.
    """
    if len(text) > TEXT_READ:
        raise KnownCause(TOO_LONG, text)
    if bare := _BARE.fullmatch(text):
        return float(bare[1])
    return _read_short(text) if len(text) <= SHORT else _read(text)


def _read(text: str) -> float:
    said = _plain(text)
    if not _DIGITS.search(said):
        raise KnownCause(NO_NUMBER, text)
    *before, last = _lines(_NUMBER_QUOTED.sub("", said)) or [""]
    number = None if _FOREIGN.search(said) else _stated(last, only_formal=bool(before))
    if number is None or not (all(_leaves(number, line) for line in before) and _leads_to(before, last)):
        raise KnownCause(UNCERTAIN, text)
    return number


_read_short = lru_cache(maxsize=4096)(_read)  # models say the same few things again and again


def _stated(line: str, only_formal: bool = False) -> float | None:
    """The number that a line states, if it does nothing else.

    Args:
        line: The line.
        only_formal: Whether it has to give the answer as such: the number alone, or with a label as in "Answer: 33".
    """
    if len(line) > LINE_READ:
        return None
    if match := _ALONE.fullmatch(line):
        return _to_float(match[1])
    for pattern in _STATEMENTS:
        if (match := pattern.fullmatch(line)) and (match["formal"] or not only_formal):
            return _to_float(match["number"] or match["before"])
    return None


def _leaves(number: float, line: str) -> bool:
    """Whether the number on the last line may be its writer's own after this line, in which nobody else may speak."""
    if _QUOTES.search(line) or _SPEAKS.match(line):
        return False
    sentences = [each for each in _SENTENCE_ENDS.split(_ITEM.sub("", line, count=1)) if each]
    return all(not _SUPPOSES.match(each) and _stated(each) in (None, number) for each in sentences)


def _leads_to(before: list[str], last: str) -> bool:
    """Whether the lines before the last one are whole sentences, or figures, that it does not belong to."""
    if not before:
        return True
    if last.startswith("=") or last.endswith("%") or _LEADS.match(before[-1]) or _ASKS.match(before[-1]):
        return False
    if _ITEM.fullmatch(last) and any(_ITEM.match(line) for line in before):
        return False
    ends = before[-1].rstrip(")]").endswith((".", "!", "。", "！", "।")) and not _ABBREVIATED.search(before[-1])
    return ends or _VALUE.fullmatch(before[-1]) is not None


# --- Texts as lines --------------------------------------------------------------------------------------------------

_PLAIN = str.maketrans("−：，．（）％＝！？’", "-:,.()%=!?'")
_THOUGHTS = (
    "think(?:ing)?|thoughts?|thought_process|reason(?:ing)?|analysis|reflection|scratch_?pad|inner_monologue|cot|plan"
    "|rationale"
)
_TAG = _Later(rf"<[ \t]*(/?)[ \t]*(?:{_THOUGHTS})\b[^<>]{{0,40}}>|◁[ \t]*(/?)[ \t]*think[ \t]*▷|\[(/?)think(?:ing)?\]")
_TOKEN = _Later(r"</s>|<\|(?:im_end|eot_id|endoftext|end|assistant)\|>|<end_of_turn>|</?(?:b|i|p|em|strong|br ?/?)>")
_ELEMENT = _Later(r"<((?:final[-_ ]?)?(?:answer|number|choice))>([^<>]*)</\1>")
_BOXED = _Later(r"\\boxed\s{0,3}\{(?:\\(?:text|mathbf|mathrm)\s{0,3}\{)?([^{}]*)\}+")
_STRUCK = _Later(r"~~[^~\n]*~~|```\w*|\\[()\[\]]")
_EMPHASIS = _Later(r"(?<!\d)\*++|\*++(?!\d)|(?<![^\W_])__++|__++(?![^\W_])|`|\$(?!\d)")
# What may say in other ways whose words a text holds: markup, objects, quotations, tables, thoughts
_FOREIGN = _Later(
    r"<[^\W\d_][^<>]{0,60}>|<[!/|][^<>]{0,60}>|[‹〈《【]|\[/?[a-z]+\]|[{}]|^[ \t]*[>|]"
    r"|^\W*(?:thinking|thoughts?|analysis)\b",
    re.M,
)
_QUOTES = _Later(r"[\"“”„«»「」『』]")
_NUMBER_QUOTED = _Later(r"[\"“”„«»「」](?=\d)|(?<=\d)[\"“”„«»「」]")
_ASKS = _Later(r".*(?:[?？]|[か吗嗎呢][。.]?)\W*$")
_LABEL_LINE = _Later(rf"\W*(?:{_LABELS}|{'|'.join(each.owns for each in words.LANGUAGES.values())})\W*")
_ITEM = _Later(r"^\W{0,4}\d{1,2}[.)](?: |$)")  # the number of one, in a list
_SUPPOSES = _Later(rf"\W*(?:{words.SUPPOSING})|.*(?:가정|仮定)")
_LEADS = _Later(words.LEADING)
_SPEAKS = _Later(rf"(?!\W*(?:{words.HEADINGS})\W*:)[^:]{{1,100}}:")  # "Player 2: I go first."
_ABBREVIATED = _Later(r"\b(?:avg|approx|no|est|nr|etc)\.\W*$")
_VALUE = _Later(rf".*=.*\d\W*|\W*(?:{words.HEADINGS})\W*[:=≈→].*\d\W*")  # "target: 33"
_SENTENCE_ENDS = _Later(r"(?<=[.!?…])[\"')\]”]* +|(?<=[。！？।])")
_KEY = _Later(rf"{_LABELS}|numero")
_BESIDE = _Later(rf"{words.HEADINGS}|rationale|thoughts?|thinking|confidence|round|思考")
_JSON = _Later(r"\s*(\{.*\})\s*", re.S)


def _lines(text: str) -> list[str]:
    """The lines of a text that say something; a label on a line of its own is joined to the line after it."""
    lines: list[str] = []
    for line in filter(None, (_one_blank(_LEFT_OUT.sub(" ", _one_blank(each))) for each in text.splitlines())):
        if lines and (lines[-1].endswith(":") or _LABEL_LINE.fullmatch(lines[-1])):
            label = lines.pop().strip(" #")
            lines.append(f"{label} {line}" if label.endswith((":", "is")) else f"{label}: {line}")
        else:
            lines.append(line)
    return lines


def _plain(text: str) -> str:
    """A text in lower case, with ASCII digits, without thoughts and marks; empty where nobody knows what it says."""
    said = _without_thoughts(html.unescape(text).lower().translate(_PLAIN))
    said = "".join(str(unicodedata.decimal(each)) if each.isdecimal() else each for each in said)
    said = _STRUCK.sub(_struck, _TOKEN.sub(" ", said)).strip()
    said = _BOXED.sub(r" boxed: \1", _object(said))
    said = _ELEMENT.sub(r"answer: \2\n", said)
    return _EMPHASIS.sub("", said)


def _struck(found: re.Match[str]) -> str:
    """What stands for something struck out; next to a digit nobody knows what is left of the number."""
    beside = found.string[max(found.start() - 1, 0) : found.start()] + found.string[found.end() : found.end() + 1]
    return " n0 " if found[0].startswith("~~") and re.search(r"\d", beside) else " "


def _without_thoughts(text: str) -> str:
    """What is said outside of <think>...</think> and the like, also where it began in the prompt; empty if cut off."""
    said, depth, at = "", 0, 0
    for tag in _TAG.finditer(text):
        if depth == 0:
            said += text[at : tag.start()]
        closes = any(tag.groups())
        if closes and depth == 0:  # it began in the prompt
            said = ""
        depth = max(depth - 1, 0) if closes else depth + 1
        at = tag.end()
    return "" if depth else said + "\n" + text[at:]


def _object(text: str) -> str:
    """A text that is a JSON object as the lines it stands for, if the answer comes last, after what explains it."""
    if (match := _JSON.fullmatch(text)) is None:
        return text
    try:
        fields = json.loads(match[1] if '"' in match[1] else match[1].replace("'", '"'), object_pairs_hook=list)
        *before, (key, number) = ((key.replace("_", " "), value) for key, value in fields)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text
    if (
        type(number) not in (int, float, str)
        or not _KEY.fullmatch(key)
        or not all(_BESIDE.fullmatch(key) for key, _ in before)
    ):
        return text
    texts = (f"{value.rstrip('.')}." for _, value in before if isinstance(value, str))
    return "\n".join([*texts, f"answer: {number}"])


def _one_blank(text: str) -> str:
    """The text with one blank wherever there is white space, which keeps the patterns short and fast."""
    return " ".join(text.split())


def _to_float(text: str) -> float:
    thousands = re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\..*)?", text)
    return float(text.replace(",", "" if thousands else "."))
