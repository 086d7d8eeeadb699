"""Reading the one number that a text answers with, pure: it knows neither the game nor the range of its numbers."""

from __future__ import annotations

import re
from functools import lru_cache

from simulation.errors import UnusableAnswer

TEXT_READ = 20_000  # characters of an answer at most
SHORT = 64  # characters of an answer that is worth remembering
NO_NUMBER, AMBIGUOUS = "no number in the answer", "more than one number"
TOO_LONG = f"text of more than {TEXT_READ} characters"

# Bounded, as is the text, and atomic: a participant that answers a million digits must not hold up its server.
_NUMBER = (
    r"-?(?>\d{1,3}(?:,\d{3}){1,10}(?:\.\d{1,30})?|\d{1,30}(?:\.\d{1,30})?|(?<!\.)\.\d{1,30})(?>(?:e[-+]?\d{1,3})?)"
)
_VERB = (
    r"(?:be|choos(?:e|ing)|pick(?:ing)?|say(?:ing)?|guess(?:ing)?|answer(?:ing)?|giv(?:e|ing)|tak(?:e|ing)|want"
    r"|go(?:ing)? with|the number)"
)
_LEFT_OUT = re.compile(  # ranges, totals, and what is said not to be the number
    rf"between {_NUMBER} and {_NUMBER}|from {_NUMBER} to {_NUMBER}"
    rf"|{_NUMBER} ?(?:to|[-–…]|\.\.+) ?{_NUMBER}"
    rf"|(?<=\d) ?(?:out of|of|/(?= ?\d[\d,])) ?{_NUMBER}"  # 2/3 is no total
    rf"|(?:\b(?:not|cannot|never|except|avoid)|n['’]t)(?: {_VERB}){{0,2}} {_NUMBER}"
    rf"(?:,? (?:or|nor|and|&) {_NUMBER}|, {_NUMBER})*"
)
_UNSURE_AFTER = (
    "minus|negative|half|half of|third of|thirds of|quarter of|quarters of|root of|twice|double|than|below|above|under"
    "|over|least|most|up to"
)
_SURE = (  # the writing systems without blanks between words, from U+2E80 on, may have a letter before a number
    r"(?=[-.\d])(?<![^\W_\u2e80-\ud7ff])(?<![負负點点])(?<![-‐‑‒–﹣－√∛±≤≥,٫٬])(?<![-‐‑‒–﹣－√∛±≤≥] )"
    r"(?<!(?<!\w)—)(?<!(?<!\.)\.)"
    + "".join(rf"(?<!{words} )" for words in _UNSURE_AFTER.split("|"))
    + _NUMBER
    + r"(?![^\W_]|[.,٫٬]\d| ?[¼-¾⅐-⅞‰]| ?(?:[+×÷^x/]|\*\*?) ?\d| ?(?:%|percent) of\b"
    r"| (?:(?:hundred|thousand|\w{1,5}illion|dozen|lakh|crore)s?|k|m|mil|mn|bn|point|plus|times|squared|cubed"
    r"|and a half)\b)"
)
_SURE_NUMBERS = re.compile(_SURE)
_CHOSEN = re.compile(
    rf"(?:choose|chose|pick|say|guess|answer(?: is)?|number(?: is|:)) ?:? ?({_SURE})"
    rf"(?!,? \(?(?:or|and|&) (?:maybe |perhaps |even )?{_NUMBER}|, ?{_NUMBER})"
)


def parse_number(text: str) -> float:
    """Read the one number that a text answers with: "between 0 and 100 I choose 37" and "37 of 100" are 37.

    Ranges, totals and what is negated are left out. A number that may stand for another one, as in "10 million",
    "P17", "minus 5" or "√2", is not read. Raises UnusableAnswer if no number can be read, or several can, or some
    cannot, and none that can is marked as chosen.
    """
    if len(text) > TEXT_READ:
        raise UnusableAnswer(TOO_LONG, text)
    return _read_short(text) if len(text) <= SHORT else _read(text)


def last_line(text: str) -> str:
    """The last line that says anything."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def _read(text: str) -> float:
    said = _one_blank(text.lower().replace("−", "-"))
    rest = _one_blank(_LEFT_OUT.sub(" ", said))
    found = {_to_float(match) for match in _SURE_NUMBERS.findall(rest)}
    if not found:
        raise UnusableAnswer(NO_NUMBER, text)
    if len(found) > 1 or re.search(r"\d", _SURE_NUMBERS.sub("", rest)):
        found = {_to_float(match) for match in _CHOSEN.findall(rest)}
        if len(found) != 1:
            raise UnusableAnswer(AMBIGUOUS, text)
    return found.pop()


def _one_blank(text: str) -> str:
    """The text with one blank wherever there is white space, which keeps the patterns short and fast."""
    return " ".join(text.split())


_read_short = lru_cache(maxsize=4096)(_read)  # models say the same few things again and again


def _to_float(text: str) -> float:
    return float(text.replace(",", ""))
