"""Reading the number that a text answers with, pure: it knows neither the game nor the range of its numbers.

A text is read only where its writer's own number is certain. Few forms state a number: "33" alone on a line,
"Answer: 33", "I choose 33", in the languages of answer_words.py. What stands before a statement in its sentence must be
known to change nothing, all statements must agree, and what follows may explain the number, but not take it back or
name another. All other texts are refused: it is better to ask again than to count somebody else's number.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

from simulation.answer_words import (
    COPULA,
    EXPLANATION,
    FOLLOWING,
    IFS,
    LANGUAGES,
    SUBJECT,
    SUPPOSING,
    THE_NUMBER,
    UNITS,
    Words,
)
from simulation.errors import KnownCause

TEXT_READ = 20_000  # characters of an answer at most
SHORT = 64  # characters of an answer that is worth remembering
NO_NUMBER, UNCERTAIN = "no number in the answer", "not certain which number is the answer"
TOO_LONG = f"text of more than {TEXT_READ} characters"


class _Later:
    """A regular expression that is compiled when it is used: most answers are a number alone, and need none of them."""

    def __init__(self, source: str, flags: int) -> None:
        self._source, self._flags = source, flags

    def __getattr__(self, name: str) -> Any:
        pattern = re.compile(self._source, self._flags)
        self.match, self.search, self.fullmatch = pattern.match, pattern.search, pattern.fullmatch
        self.finditer, self.findall, self.sub, self.split = (
            pattern.finditer,
            pattern.findall,
            pattern.sub,
            pattern.split,
        )
        return getattr(pattern, name)


def _pattern(source: str, flags: int = 0) -> re.Pattern[str]:
    return cast(re.Pattern[str], _Later(source, flags))


# Bounded, as is the text, and atomic: a participant that answers a million digits must not hold up its server.
_NUMBER = (
    r"-?(?>\d{1,3}(?:,\d{3}){1,10}(?:\.\d{1,30})?|\d{1,30}(?:\.\d{1,30})?|(?<!\.)\.\d{1,30})(?>(?:e[-+]?\d{1,3})?)"
)
_LEFT_OUT = _pattern(  # ranges, totals, and what is said not to be the number
    rf"between {_NUMBER} and {_NUMBER}|from {_NUMBER} to {_NUMBER}"
    rf"|(?<![\d.-]){_NUMBER} ?(?:to|[-–…]|\.\.+) ?{_NUMBER}(?!-\d)"
    rf"|(?<=\d) ?(?:(?:out of|of) ?{_NUMBER}|/ ?1[,0]*0\b)"  # 2/3 is no total
    rf"|\bnot {_NUMBER}(?:,? (?:or|nor|and|&) {_NUMBER}|, {_NUMBER})*"
    rf"|\b(?:nicht|niet|no|non|pas|não|не|nie|inte|ikke) {_NUMBER},? "
    r"(?:sondern|maar|sino|ma|mais|mas|а|tylko|utan|men)\b"
)
# A number that may stand for another one, as in "10 million", "P17", "minus 5", "√2" or "33-ish", is not read.
_SURE = (  # the writing systems without blanks between words, from U+2E80 on, may have a letter before a number
    r"(?=[-.\d])(?<![^\W_\u2e80-\ud7ff])(?<![負负點点])(?<![-‐‑‒–﹣－√∛±≤≥~≈<>,٫٬])(?<![-‐‑‒–﹣－√∛±≤≥~≈<>] )"
    rf"(?<!(?<!\w)—)(?<!(?<!\.)\.){_NUMBER}(?![^\W_\u2e80-\ud7ff]|[万萬千百亿億兆点點分半만천백억割第回番号號人名位]|-\w"
    r"|[.,٫٬]\d| ?[¼-¾⅐-⅞‰²³¹]| ?(?:[+×÷^x/]|\*\*?) ?\d| ?(?:%|percent) of\b"
    r"| (?:(?:hundred|thousand|\w{1,5}illion|dozen|lakh|crore)s?|k|m|mil|mn|bn|point|plus|times|squared|cubed"
    r"|and a half)\b)"
)
_BARE = re.compile(r"\s*\d{1,15}(?:\.\d{1,15})?\s*", re.ASCII)
_DIGITS = _pattern(r"[\d²³¹¼-¾⅐-⅞]|\b(?:twen|thir|for|fif|six|seven|eigh|nine)ty\b")

# --- What states a number --------------------------------------------------------------------------------------------


def _any(field: str, languages: Iterable[Words] = LANGUAGES.values()) -> str:
    """A pattern of what any of the languages has in a field."""
    return "(?:" + "|".join(getattr(words, field) for words in languages) + ")"


_SO, _TURN, _NOW, _BECAUSE, _LABEL = map(_any, ("so", "turn", "now", "because", "labels"))
_WORD_BEGINS = r"(?:(?<!\w)|(?<=[\u2e80-\ud7ff]))"
_WORD_ENDS = r"(?!(?<=[a-z])\w)"
_TO_NUMBER = r"[ :=—\"'“„«(\[$#]{0,4}(?:boxed: )?(?=[-.\d])"
_SURE_NUMBER = _pattern(_SURE)
_COMMA_NUMBER = _pattern(
    rf"(?<![\w.,-])\d{{1,3}},\d{{1,2}}(?![\w,]|\.\d| ?[+×÷^x/%])|(?!\d{{1,3}}\.\d{{3}}(?!\d)){_SURE}"
)


def _forms() -> Iterator[tuple[re.Pattern[str], re.Pattern[str], bool]]:
    """What states a number that follows it, with how the number is written, and whether it is final."""
    comma = [words for words in LANGUAGES.values() if words.comma]
    point = [words for words in LANGUAGES.values() if not words.comma]
    yield _pattern(rf"(?:{_any('final', point)}|boxed){_TO_NUMBER}"), _SURE_NUMBER, True
    yield _pattern(_any("final", comma) + _TO_NUMBER), _COMMA_NUMBER, True
    for languages, number in ((comma, _COMMA_NUMBER), (point, _SURE_NUMBER)):
        labelled = rf"(?:{_any('labels', languages)}(?: ?\([^()]{{0,40}}\))? ?[:=—]+ ?)+"
        yield _pattern(rf"(?:{_any('states', languages)}{THE_NUMBER}|{labelled}){_TO_NUMBER}"), number, False


_FORMS = tuple(_forms())
_OPENINGS = 8  # words that change nothing before a statement, at most
_SUBJECT, _STATED = _pattern(SUBJECT), _pattern(_any("stated"))
_CLOSED = _pattern(  # what a stated number is followed by: the end, a mark, an explanation
    rf"{UNITS}{COPULA}(?=[)\]\"'”’»」}}$]*"
    rf"(?:[^\w+<>~%-]*$| *[.,;:!—–…(。，；、！।]| -+ (?!\d)| ?(?:{_BECAUSE}|{FOLLOWING})(?!\w)))"
)
_OPENING = _pattern(  # what may stand before a statement at the beginning of a sentence
    rf"(?:i (?:\w+ not|not|\w+n't)\b[^,;]{{0,80}}(?=[,;])|{_SO}|{_TURN}|{_NOW}|{_LABEL}(?=:))"
    r"(?:[\s,:;.…—–、，*-]+|(?<=[\u2e80-\ud7ff]))"
)
_CONCLUDING = _pattern(rf"(?:[,;:.…—–、，；)] ?|{_WORD_BEGINS})(?:(?P<so>{_SO})|{_TURN})[ ,:、]*")
_CLAUSE = _pattern(r"[,;—–、，；] ?")
_ALONE = _pattern(
    rf"\W{{0,9}}?(?:(?:{_TURN}|{_NOW}|(?:the )?number)\b\W{{0,9}}?)*?({_SURE})(?:\W{{1,9}}(?:and |again )*\1)*"
)
_EXPLAINS = _pattern(rf"\W*+(?:(?:{FOLLOWING})\b\W*+)?{_BECAUSE}")
_TAKES_BACK = _pattern(rf"{_WORD_BEGINS}{_any('back')}{_WORD_ENDS}")
_HEADING = _pattern(rf"\W*+(?:{EXPLANATION})\W{{0,5}}[:?？]")
_SUPPOSES = _pattern(SUPPOSING)
_DEPENDS = _pattern(rf"{_WORD_BEGINS}(?:{IFS}){_WORD_ENDS}|{SUPPOSING}")
_SAYS_NOTHING = _pattern(rf"\W*+(?:(?:{_NOW}|{_TURN})\b\W*+)*")
_WORD = _pattern(r"[^\W\d_]")
_MARKS = " .,;:!)]}\"'”’»」*$"

# --- What a text is without its marks --------------------------------------------------------------------------------

_PLAIN = str.maketrans("−：，．（）％＝！？", "-:,.()%=!?")
_THOUGHTS = "think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad"
_TAG = _pattern(rf"<\s*(/?)\s*(?:{_THOUGHTS})\b[^<>]{{0,40}}>|◁\s*(/?)\s*think\s*▷|\[(/?)think\]")
_OBJECT = _pattern(r"(?<!\w)\{[^{}]*:[^{}]*\}|\A\{.*\}\Z", re.S)
_KEY = _pattern(rf"{_LABEL}|value|final answer|(?:chosen|selected) number|nombre|numero")
_WHO = _pattern(r"\b(?:player|participant|agent|name|who)")
_UNREAD = " n0 "  # digits that state nothing
_BOXED = _pattern(r"\\boxed\s*\{(?:\\\w+\s*\{)?([^{}]*)\}+")
_ELEMENT = _pattern(r"<(?:final[-_ ]?)?(?:answer|number|choice)>([^<>]*)<[^<>]*>")
_STRUCK = _pattern(r"~~[^~]*~~|```\w*|</?(?:b|i|p|em|strong|br ?/?)>|\\[()\[\]]")
_EMPHASIS = _pattern(r"(?<!\d)\*++|\*++(?!\d)|(?<![^\W_])_++|_++(?![^\W_])|`|^\s*+[>#]++(?!\d)|\$(?!\d)", re.M)
_ITEM = _pattern(r"^\W{0,4}\d{1,2}[.)] +(?=\D)", re.M)  # of a list
_QUOTED = _pattern(r"\"[^\"\n]*\"|“[^”\n]*”|„[^“”\n]*[“”]|«[^»\n]*»|「[^」\n]*」|‘[^’\n]*’|(?<!\w)'[^'\n]*'(?!\w)")
_BLANK = " \t\"'“”„«»()[]{}*_#>|-–—.,;:!…•"  # what may stand before a sentence
_GOES_ON = _pattern(r"[\W_]*\d")
_SENTENCE_ENDS = _pattern(r"(?<=[.!?…])[\"')\]”]* +|(?<=[。！？।])")
_QUESTION = _pattern(r"[?？][\"')”*]*$")


class _Sentence(NamedTuple):
    text: str
    alone: bool  # nothing before it on its line


class _Statement(NamedTuple):
    number: float
    end: int  # of what states it, in its sentence
    own: bool  # else it is a number alone, which counts where nothing is stated
    final: bool


def parse_number(text: str) -> float:
    """Read the number that is its writer's own: "others pick 50, so I choose 37", "**37**" and "37 of 100" are 37.

    Thoughts (<think>...</think>), quotations, ranges, totals and what is negated are left out.

    Raises:
        KnownCause: There is no number, or it is not certain which one is the writer's: somebody else may have given
            it, or may give it, it may be of an earlier round, be part of another one as in "10 million", or be taken
            back.
    """
    if len(text) > TEXT_READ:
        raise KnownCause(TOO_LONG, text)
    if bare := _BARE.fullmatch(text):
        return float(bare[0])
    return _read_short(text) if len(text) <= SHORT else _read(text)


def _read(text: str) -> float:
    sentences = _sentences(_plain(text))
    found = [
        (at, each)
        for at, sentence in enumerate(sentences)
        if not (at and _SUPPOSES.match(sentences[at - 1].text))
        for each in _statements(sentence)
    ]
    owns = any(each.own for _, each in found)
    counted = [(at, each) for at, each in found if each.own or not owns or at == 0]
    if not counted:
        raise KnownCause(UNCERTAIN if any(_DIGITS.search(each.text) for each in sentences) else NO_NUMBER, text)
    at, last = counted[-1]
    agreed = last.final or len({each.number for _, each in counted}) == 1
    after = [sentences[at].text[last.end :], *(sentence.text for sentence in sentences[at + 1 :])]
    explained = next((place for place, each in enumerate(after) if _HEADING.match(each)), len(after))
    if (
        not agreed
        or any(_TAKES_BACK.search(each) for each in after)
        or not all(_leaves(last, each) for each in after[:explained])
    ):
        raise KnownCause(UNCERTAIN, text)
    return last.number


_read_short = lru_cache(maxsize=4096)(_read)  # models say the same few things again and again


def _statements(sentence: _Sentence) -> Iterator[_Statement]:
    """What a sentence states, in order."""
    text = sentence.text
    if _QUESTION.search(text):
        return
    stated = _stated_at(text, len(text) - len(text.lstrip(_BLANK)))
    if stated is None and sentence.alone and (alone := _ALONE.match(text)) and _CLOSED.match(text, alone.end()):
        yield _Statement(_to_float(alone[1]), alone.end(), False, False)
        return
    while stated := stated or _next_stated(text, 0):
        yield stated
        stated = _next_stated(text, stated.end)
        if stated is None:
            return


def _stated_at(text: str, at: int) -> _Statement | None:
    """What is stated at a place of a sentence, after words that change nothing."""
    for _ in range(_OPENINGS):
        for leads, number, final in _FORMS:
            lead = leads.match(text, at)
            found = lead and number.match(text, lead.end())
            if found and (closed := _CLOSED.match(text, found.end())):
                return _Statement(_to_float(found[0]), closed.end(), True, final)
        lead = _SUBJECT.match(text, at)
        found = lead and _SURE_NUMBER.match(text, lead.end())
        if found and (closed := _STATED.match(text, found.end())):
            return _Statement(_to_float(found[0]), closed.end(), True, False)
        if not (opening := _OPENING.match(text, at)):
            break
        at = opening.end()
    return None


def _next_stated(text: str, at: int) -> _Statement | None:
    """What is stated next after something else, and is the writer's own, and of now, whatever that is."""
    for begins in _CONCLUDING.finditer(text, at):
        if begins[0].startswith(":") or not (stated := _stated_at(text, begins.end())):
            continue  # after a colon, who knows whose words these are
        if not (_SUPPOSES if begins["so"] else _DEPENDS).search(text, 0, begins.start()):
            return stated
    if _EXPLAINS.match(text):
        for begins in _CLAUSE.finditer(text, at):
            if (stated := _stated_at(text, begins.end())) and not _DEPENDS.search(text, 0, begins.start()):
                return stated
    return None


def _leaves(said: _Statement, after: str) -> bool:
    """Whether what follows a statement names no other number but to explain its own."""
    more = _others(after, said.number) or (not said.own and _WORD.search(after))
    return not more or not after.strip(_MARKS) or _EXPLAINS.match(after) is not None


def _others(text: str, number: float) -> bool:
    """Whether a text holds any number but this one."""
    return bool(_DIGITS.search(_SURE_NUMBER.sub(lambda each: "" if _to_float(each[0]) == number else "0", text)))


# --- Texts as sentences ----------------------------------------------------------------------------------------------


def _sentences(text: str) -> list[_Sentence]:
    """The sentences of a text; what follows a colon or a question, or a line that a number goes on, is no new line."""
    lines: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if lines and lines[-1].endswith((":", "?")):
            lines[-1] += f" {line}"
        elif lines and lines[-1][-1].isalpha() and _GOES_ON.match(line):
            lines[-1] += f": {line}"
        else:
            lines.append(line)
    found = []
    for line in lines:
        alone = True
        for part in _SENTENCE_ENDS.split(_one_blank(_LEFT_OUT.sub(" ", _one_blank(line)))):
            found.append(_Sentence(part, alone))
            alone = alone and _SAYS_NOTHING.fullmatch(part) is not None
    return found


def _plain(text: str) -> str:
    """A text in lower case, with ASCII digits, without thoughts, quotations and marks of Markdown, LaTeX or HTML."""
    said = _without_thoughts(text.lower().translate(_PLAIN))
    said = "".join(str(unicodedata.decimal(each)) if each.isdecimal() else each for each in said)
    said = _BOXED.sub(r" boxed: \1", _OBJECT.sub(_stated_in, said.strip()))
    said = _EMPHASIS.sub("", _STRUCK.sub(" ", _ELEMENT.sub(r"\nanswer: \1\n", said)))
    if len(_ITEM.findall(said)) > 1:
        said = _ITEM.sub("", said)
    return _QUOTED.sub(lambda each: each[0] if each[0] == said or not _WORD.search(each[0]) else " ", said).strip()


def _without_thoughts(text: str) -> str:
    """What is said outside of <think>...</think> and the like, also where only one of the two is there."""
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


def _stated_in(found: re.Match[str]) -> str:
    """A JSON object as the statement that it makes."""
    try:
        fields = json.loads(found[0] if '"' in found[0] else found[0].replace("'", '"'))
    except (ValueError, RecursionError):
        return _UNREAD
    if not isinstance(fields, dict):
        return _UNREAD
    named: list[Any] = [value for key, value in fields.items() if _KEY.fullmatch(key.replace("_", " "))]
    if len(named) != 1 or isinstance(named[0], (bool, list, dict)) or named[0] is None or _WHO.search(" ".join(fields)):
        return _UNREAD
    return f"\nanswer: {named[0]}\n"


def _one_blank(text: str) -> str:
    """The text with one blank wherever there is white space, which keeps the patterns short and fast."""
    return " ".join(text.split())


def _to_float(text: str) -> float:
    thousands = re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\..*)?", text)
    return float(text.replace(",", "" if thousands else "."))
