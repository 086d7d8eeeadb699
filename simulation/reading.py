"""Reading the number that a text answers with, pure: it knows neither the game nor the range of its numbers.

A text is read only where its writer's own number is certain. Few forms state a number: "33" alone on a line,
"Answer: 33", "I choose 33", in the languages of answer_words.py. Such a statement has to be all that the text says, or
be its last line, or be followed by nothing but an explanation without numbers. All other texts are refused: it is
better to ask again than to count somebody else's number.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from functools import lru_cache
from typing import Any, NamedTuple

from simulation import answer_words as words
from simulation.errors import KnownCause

TEXT_READ = 20_000  # characters of an answer at most
SHORT = 64  # characters of an answer that is worth remembering
SENTENCES_READ, SENTENCE_READ = 400, 2_000  # how many, and characters of one, at most
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
_DIGITS = _Later(r"[\d²³¹¼-¾⅐-⅞]|\b(?:zero|twelve|ten|hundred|(?:twen|thir|for|fif|six|seven|eigh|nine)(?:ty|teen))\b")

# --- What states a number --------------------------------------------------------------------------------------------

_GAP = r"[\s,:;.…—–、，-]"
_TO_NUMBER = r"[ :=—\"'“„«「(\[$#]{0,4}(?:boxed: )?(?=[-.\d])"
_ENDS = r"(?!(?<=[a-zа-я])\w)"  # of a word, also where words have no blanks between them
_MARKS = r"[\s\"'“”„«»‘’「」()\[\]{}<>$#|•🎯✅👉=-]{0,9}?"  # around a number that stands alone
_AFTER = r"[)\]\"'”’»」}$*]*"


def _unspaced(spaced: str, unspaced: str) -> str:
    return rf"(?<!\w)(?:{spaced})(?!\w)|n't\b|{unspaced}"


def _statement(each: words.Words) -> str:
    """A pattern of a sentence that states a number in one language, as far as the number."""
    number = _COMMA_NUMBER if each.comma else _SURE
    before, after = each.stated
    form = (
        rf"(?:(?:(?P<final>{each.final}|boxed)[ :=]*|(?P<weak>{each.perhaps})|(?:{each.labels}) ?[:=—]"
        rf"|(?:{each.states}))"
        rf"{words.THE_NUMBER}{_TO_NUMBER}(?P<number>{number}){words.UNITS}{words.COPULA}"
        rf"|(?P<subject>{before})(?P<before>{number}){after})"
    )
    opening = rf"(?:(?:{each.now})(?!\w){_GAP}*|(?:{each.now})(?<=[\u2e80-\ud7ff]))*"
    opening += rf"(?:(?:{each.labels}): ?)?"
    rest = (
        rf"{_AFTER} ?(?:[.!。！।]*$|(?:{_GAP}+|[ ]\()(?:{words.CLOSING})[.!)]*$"
        rf"|(?P<because>{_GAP}*(?:{each.because}){_ENDS}.*))"
    )
    return rf"\W*{opening}{form}{rest}"


_STATEMENTS = tuple(_Later(_statement(each), re.S) for each in words.LANGUAGES.values())
_LABELS = "|".join(each.labels for each in words.LANGUAGES.values())
_FINAL = "|".join(each.final for each in words.LANGUAGES.values())
_BECAUSE = "|".join(each.because for each in words.LANGUAGES.values())
_OPENINGS = "|".join(each.now for each in words.LANGUAGES.values())
_ALONE = _Later(
    rf":? ?{_MARKS}(?:(?:ok(?:ay)?|well|sure|again|this time)(?!\w)[,.:! ]*)*{_MARKS}({_SURE})"
    rf"(?:[ ,]{{1,3}}(?:and |again )+\1)*{words.UNITS}{words.COPULA}"
    rf"(?:{_MARKS}[.!。！।]*{_MARKS}$|{_GAP}{{1,3}}(?:{words.CLOSING})[.!)]*$| \((?:{words.CLOSING})\)[.!]?$)"
)
_QUOTED = _Later(r"[\"“”„«»「」]")
_BACK = _Later(_unspaced(words.BACK, words.BACK_UNSPACED))
_CLOSING = _Later(rf"\W*+(?:(?:{words.CLOSING})(?!\w)\W*+)*+")
_EXPLAINS = _Later(rf"\W*(?:{_BECAUSE}){_ENDS}.*")
_SAYS_NOTHING = _Later(rf"[^\w?]*(?:(?:{_OPENINGS})(?!\w)[^\w?]*)*")


class _Sentence(NamedTuple):
    text: str
    begins_line: bool  # nothing that says anything is before it on its line
    follows: bool  # what is before it ends as a sentence does


class _Statement(NamedTuple):
    number: float
    kind: str  # "final", "own", "weak" (it counts where nothing else is said), "alone" (a number on its line)


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
    sentences = _core(_sentences(said))
    if not _DIGITS.search(said):
        raise KnownCause(NO_NUMBER, text)
    stated = [_stated(each) for each in sentences[:SENTENCES_READ]]
    found = None
    if 0 < len(sentences) <= SENTENCES_READ and not _dubious(said):
        found = _only(sentences, stated) or _first(sentences, stated) or _last(sentences, stated)
    if found is None or (found.kind != "final" and any(each and each.number != found.number for each in stated)):
        raise KnownCause(UNCERTAIN, text)
    return found.number


_read_short = lru_cache(maxsize=4096)(_read)  # models say the same few things again and again


def _core(sentences: list[_Sentence]) -> list[_Sentence]:
    """The sentences without those at the beginning and the end that say nothing: "Sure!", "Good luck!"."""
    first, end = 0, len(sentences)
    while first < end and _SAYS_NOTHING.fullmatch(sentences[first].text):
        first += 1
    while end > first and _CLOSING.fullmatch(sentences[end - 1].text):
        end -= 1
    return sentences[first:end]


def _only(sentences: list[_Sentence], stated: list[_Statement | None]) -> _Statement | None:
    """The statement that is all that the text says, explained at most by itself."""
    return stated[0] if len(sentences) == 1 and not _DEPENDS.search(sentences[0].text) else None


def _first(sentences: list[_Sentence], stated: list[_Statement | None]) -> _Statement | None:
    """The statement that the text begins with, if all after it explains it, or closes the text."""
    said, after = stated[0], [each.text for each in sentences[1:]]
    if said is None or said.kind == "weak" or not after:
        return None
    harmless = all(
        (_EXPLAINS.fullmatch(each) and _explains(each)) or (other is not None and other.number == said.number)
        for each, other in zip(after, stated[1:], strict=True)
    )
    return said if harmless else None


def _last(sentences: list[_Sentence], stated: list[_Statement | None]) -> _Statement | None:
    """The statement on the last line, if nothing before it says that it is another one's, or supposed."""
    if len(sentences) == 1 or (said := stated[-1]) is None or said.kind == "weak":
        return None
    *_, before, last = sentences
    if (
        not last.begins_line
        or not last.follows
        or _SUPPOSED.search(last.text)
        or _QUOTED.search(last.text)
        or last.text.startswith("=")
    ):
        return None
    if _LEADS.match(before.text) or any(_SUPPOSES.match(each.text) or _SPEAKS.match(each.text) for each in sentences):
        return None
    return None if said.kind == "alone" and _ITEM.fullmatch(last.text) and said.number < 10 else said


def _stated(sentence: _Sentence) -> _Statement | None:
    """What a sentence states, if it does and does nothing else, but for an explanation."""
    text = sentence.text
    if len(text) > SENTENCE_READ or not _DIGITS.search(text):
        return None
    for pattern in _STATEMENTS:
        if match := pattern.fullmatch(text):
            kind = "final" if match["final"] else "weak" if match["weak"] else "own"
            if match["before"] and not match["subject"].strip():
                kind = "weak"  # others may be its subject
            if kind == "weak" and match["because"]:
                continue
            return _explained(match["number"] or match["before"], kind, match["because"])
    if sentence.begins_line and (match := _ALONE.fullmatch(text)):
        return _Statement(_to_float(match[1]), "alone")
    return None


def _explains(text: str) -> bool:
    """Whether a text may explain a number: it names none, takes none back, and nobody else speaks in it."""
    return not _DIGITS.search(text) and not _BACK.search(text) and not _QUOTED.search(text)


def _explained(number: str, kind: str, because: str | None) -> _Statement | None:
    """A statement, unless what explains it takes it back."""
    explained = because or ""
    return _Statement(_to_float(number), kind) if _explains(explained) else None


# --- Texts as sentences ----------------------------------------------------------------------------------------------

_PLAIN = str.maketrans("−：，．（）％＝！？’", "-:,.()%=!?'")
_THOUGHTS = (
    "think(?:ing)?|thoughts?|thought_process|reason(?:ing)?|analysis|reflection|scratch_?pad|inner_monologue|cot|plan"
    "|rationale"
)
_TAG = _Later(rf"<[ \t]*(/?)[ \t]*(?:{_THOUGHTS})\b[^<>]{{0,40}}>|◁[ \t]*(/?)[ \t]*think[ \t]*▷|\[(/?)think(?:ing)?\]")
_TOKEN = _Later(r"</s>|<\|(?:im_end|eot_id|endoftext|end|assistant)\|>|<end_of_turn>|</?(?:b|i|p|em|strong|br ?/?)>")
_ELEMENT = _Later(r"<((?:final[-_ ]?)?(?:answer|number|choice))>([^<>]*)</\1>")
_MARKUP = _Later(r"<[a-z!/|_][^<>]{0,60}>|【|\[/?[a-z]+\]")  # of which nobody knows what it says
_OWN_KEY = _Later("my (?:number|answer|choice|guess|pick)|final (?:number|answer|choice)|(?:chosen|selected) number")
_KEY = _Later(rf"{_LABELS}|guess|nombre|numero|bid|response")
_REVISED = _Later(r"\b(?:wait|actually|no,|hmm|instead|too (?:high|low)|should (?:take|choose|pick))")
_BESIDE = _Later(
    "reason(?:ing|s)?|explanation|rationale|thoughts?|thinking|confidence|round|begründung|raisonnement|explication"
    "|razonamiento|explicación|ragionamento|spiegazione|raciocínio|理由|推理|思考"
)
_BOXED = _Later(r"\\boxed\s{0,3}\{(?:\\(?:text|mathbf|mathrm)\s{0,3}\{)?([^{}]*)\}+")
_STRUCK = _Later(r"~~[^~\n]*~~|```\w*|\\[()\[\]]")
_EMPHASIS = _Later(r"(?<!\d)\*++|\*++(?!\d)|(?<![^\W_])__++|__++(?![^\W_])|`|\$(?!\d)")
_LABEL_LINE = _Later(rf"[#\s]*(?:{_LABELS}|{_FINAL})[.\s]*")
_ITEM = _Later(r"\W{0,4}\d{1,2}[.)]\W*")  # the number of one, in a list
_LIST = _Later(r"^\W{0,4}\d{1,2}[.)] .*^\W{0,4}\d{1,2}[.)]\W*\Z", re.M | re.S)  # that ends in such a number
_SUPPOSES = _Later(rf"\W*(?:(?:{_OPENINGS})(?!\w)\W*)*(?:{words.SUPPOSING})")
_LEADS = _Later(words.LEADING)
_SPEAKS = _Later(rf"(?!{words.OWN_HEADING})[^.!?:]{{1,40}}: ?.*[^\W\d_].* .*")  # "Player 2: I go first."
_DEPENDS = _Later(r"\bthen\b.*(?:\bwould\b|'d\b)")
_SUPPOSED = _Later(r"\b(?:would|then|round \d+|\d+(?:st|nd|rd|th) round)\b|'d\b")  # of another case, or round
_ABBREVIATED = _Later(
    r"(?:\b(?:[^\W\d]|mr|ms|dr|st|vs|nr|no|pl|ex|np|e\.g|i\.e|z\.b|d\.h)|approx|max|min|avg|etc|bzw|напр)\.$"
)
_VALUE = _Later(rf".*\d.*=.*\d\W*|\W*(?:\w+ )?(?:{words.FIGURES})\b[^.!?]{{0,40}}[=:≈→].*\d\W*")  # "target: 33"
_SENTENCE_ENDS = _Later(r"(?<=[.!?…])[\"')\]”]* +|(?<=[。！？।])")
_ASIDE = _Later(r"^[ \t]*>.*[^\W\d]|^[ \t]*\||^[ \t]*##.*\s\d+$|^analysis(?!\s*:)", re.M)  # quoted, in a table, thought
_FIELDS = _Later(r"\{[^{}:]*:[^{}]*\}")  # an object among other things
_AROUND_NUMBER = _Later(r"[\"“”„«»「」](?=\d)|(?<=\d)[\"“”„«»「」]")
_JOINED = _Later(r"^\W*#[1-9]$")  # the number of one, in a list
_HEADING = _Later(r"^[ \t]*#+[ \t]*([^\s\d#].*)$", re.M)
_JSON = _Later(r"((?:[^{}\n]*:)?\s*)(\{.*\})\W*", re.S)


def _sentences(text: str) -> list[_Sentence]:
    """The sentences of a text; a line that goes on with a number, or after a colon, is joined to what is before it."""
    lines: list[str] = []
    breaks: list[bool] = []  # whether the line before ends as a sentence does
    for line in filter(None, map(str.strip, text.splitlines())):
        before = lines[-1] if lines else ""
        listed = re.match(r"\W{0,4}\d{1,2}[.)] +\w", line)
        if (before.endswith(":") and not listed) or (before[-1:].isalpha() and re.match(r"[\W_]*\d", line)):
            lines[-1] += f"{':' if _LABEL_LINE.fullmatch(before) else ''} {line}"
        else:
            lines.append(line)
            ends = (
                before.endswith((".", "!", "。", "！", "।"))
                or _VALUE.fullmatch(before)
                or _LABEL_LINE.fullmatch(before)
            )
            breaks.append(bool(ends))
    found: list[_Sentence] = []
    for line, follows in zip(lines, breaks, strict=True):
        begins = True
        for part in filter(None, _SENTENCE_ENDS.split(_one_blank(_LEFT_OUT.sub(" ", _one_blank(line))))):
            ends = (not begins or follows) and (not found or _ends(found[-1].text))
            if not (begins and part != line and _ITEM.fullmatch(part)):
                found.append(_Sentence(part, begins, ends or (begins and line.startswith("#"))))
            begins = begins and _SAYS_NOTHING.fullmatch(part) is not None
    return found


def _ends(text: str) -> bool:
    """Whether a sentence is one, so that another one begins after it, and no question, heading or name."""
    if text.endswith(("?", "?)", "...", "…")) or _ABBREVIATED.search(text):
        return False
    words_of_it = len(text.split())
    unspaced = re.search(r"[\u3040-\ud7ff]", text)
    if words_of_it > 4 or (unspaced and len(text) > 9) or _VALUE.fullmatch(text):
        return True
    return bool(_LABEL_LINE.fullmatch(text) or _SAYS_NOTHING.fullmatch(text))


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


def _dubious(text: str) -> bool:
    """Whether a text may say whose words it holds in ways that are not read: markup, quotations, tables, headings."""
    if (
        _MARKUP.search(text)
        or _ASIDE.search(text)
        or _LIST.search(text)
        or _JOINED.search(text)
        or _FIELDS.search(text)
    ):
        return True
    marks = _AROUND_NUMBER.sub("", text)
    opened, closed = (sum(map(marks.count, each)) for each in ("“«「„", "”»」"))
    if marks.count('"') % 2 or opened != closed:
        return True
    headings = _HEADING.findall(text)
    return bool(headings) and not _LABEL_LINE.fullmatch(headings[-1])


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
    """A text that ends in a JSON object with the object as the statement that it makes, if it is a simple one."""
    match = _JSON.fullmatch(text) if text.endswith("}") else None
    if match is None:
        return text
    try:
        found = json.loads(match[2] if '"' in match[2] else match[2].replace("'", '"'), object_pairs_hook=list)
        fields = dict(found)
    except (ValueError, TypeError, RecursionError):
        return text
    keys = {key.replace("_", " "): value for key, value in fields.items()}
    named = [key for key in keys if _OWN_KEY.fullmatch(key) or _KEY.fullmatch(key)]
    beside = {key: value for key, value in keys.items() if key not in named}
    if len(named) != 1 or len(found) != len(keys) or not all(map(_BESIDE.fullmatch, beside)):
        return text
    number = keys[named[0]]
    before, after = _texts(keys, named[0])
    said = [each for value in before for each in map(_stated, _sentences(value)) if each]
    simple = type(number) in (int, float, str) and not isinstance(beside.get("round"), str)
    revised = any(map(_REVISED.search, before)) or any(f"{each.number:g}" != f"{number}" for each in said)
    return f"{match[1]}answer: {number}" if simple and not revised and all(map(_explains, after)) else text


def _texts(fields: dict[str, Any], number: str) -> tuple[list[str], list[str]]:
    """The texts of an object before and after the field that holds the number."""
    at = list(fields).index(number)
    texts = [(place, value) for place, value in enumerate(fields.values()) if isinstance(value, str)]
    return [value for place, value in texts if place < at], [value for place, value in texts if place > at]


def _one_blank(text: str) -> str:
    """The text with one blank wherever there is white space, which keeps the patterns short and fast."""
    return " ".join(text.split())


def _to_float(text: str) -> float:
    thousands = re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\..*)?", text)
    return float(text.replace(",", "" if thousands else "."))
