"""Answers as they come in: what is recorded, counted, and handed on of each participant."""

from __future__ import annotations

import statistics
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from games.average import Average
from simulation.errors import Ended, KnownCause, UnusableAnswer, failure_of
from simulation.game.answer_sheet import CAUSES_COUNTED, KEPT, UNDECIDED, Answers, AnswerSheet, bins_of
from simulation.game.game import closest
from simulation.game.rules import to_units
from simulation.game.tally import (
    INTERRUPTED,
    OTHER_CAUSES,
    WINNERS_NAMED,
    RoundResult,
    Tally,
    Winners,
    merge,
)
from simulation.results.answers_parquet import tables_of, tally_in
from simulation.results.console_report import histogram

answers = st.lists(st.one_of(st.integers(0, 50), st.sampled_from(["no number", "ValueError"])), max_size=60)


def sheet_of(entries: list[int | str], first: int = 0) -> AnswerSheet:
    sheet = AnswerSheet(first, len(entries))
    for place, entry in enumerate(entries):
        if isinstance(entry, str):
            sheet.fail(place, (entry, None, Ended.COMPLETE))
        else:
            sheet.record(place, entry)
    return sheet


def said_in(part: Answers) -> dict[int, int | str]:
    return {
        part.first + place: part.cause_of(part.first + place) or units
        for place, units in enumerate(part.units.tolist())
    }


@given(answers, answers, answers)
def test_tallies_merge_in_any_order(one, two, three):
    a, b, c = (sheet_of(entries).tally() for entries in (one, two, three))
    assert (a + b) + c == a + (b + c) == c + b + a == sheet_of(one + two + three).tally()
    assert a + Tally(0) == a


@given(answers)
def test_figures_are_those_of_the_list(entries):
    tally = sheet_of(entries).tally()
    numbers = [entry for entry in entries if isinstance(entry, int)]
    assert tally.asked == len(entries) == tally.answered + tally.failed
    if not numbers:
        assert tally.average() is tally.median() is tally.std() is None
        assert closest(tally.units, Fraction(3)).tolist() == []
    else:
        assert tally.average() == Fraction(sum(numbers), len(numbers))
        assert tally.median() == Fraction(statistics.median(numbers))
        assert tally.std() == pytest.approx(statistics.pstdev(numbers))


@given(answers, st.fractions(-10, 70))
def test_the_closest_answers_are_exact(entries, target):
    sheet = sheet_of(entries, first=1000)
    distances = {1000 + place: abs(e - target) for place, e in enumerate(entries) if isinstance(e, int)}
    best = [index for index, distance in distances.items() if distance == min(distances.values())]
    units = sheet.tally().units
    winners = sheet.winners(tuple(units[closest(units, target)].tolist()))
    assert winners == Winners(len(best), tuple(best[:WINNERS_NAMED]))


@given(answers, st.integers(1, 7))
def test_parts_add_up_to_the_tally(entries, distinct):
    tally = sheet_of(entries).tally()
    assert merge(tally.parts(distinct)) == tally
    assert all(len(part.units) <= distinct for part in tally.parts(distinct))


def test_an_undecided_participant_is_not_counted():
    with pytest.raises(ValueError, match="asked 2"):
        AnswerSheet(0, 2).tally()


def test_causes_are_bounded_and_no_failure_is_lost():
    sheet = sheet_of([f"cause {place}" for place in range(3 * CAUSES_COUNTED)])
    assert len(sheet.tally().failures) == CAUSES_COUNTED + 1
    assert sheet.tally().failed == 3 * CAUSES_COUNTED


@pytest.mark.parametrize("ended", Ended)
def test_how_a_round_ended_survives_any_number_of_causes(ended):
    often = [f"cause {place}" for place in range(CAUSES_COUNTED + 50)] * 2
    sheet = AnswerSheet(0, len(often) + 1)
    for place, cause in enumerate(often):
        sheet.fail(place, (cause, None, Ended.COMPLETE))
    sheet.fail(len(often), ("once", None, ended))
    assert sheet.tally().ended is ended and "once" not in sheet.tally().failures
    assert merge([Tally(0), *sheet_of([3, INTERRUPTED]).tally().parts(1), *sheet.tally().parts(1)]).ended is ended
    answers = [sheet.answers(0, len(often) + 1)]
    read = tally_in(next(tables_of(RoundResult(1, sheet.tally()), answers, Average(), False, {})), 1)
    assert read.failed == len(often) + 1 and read.ended is Ended.COMPLETE


def test_a_finished_round_cannot_be_interrupted():
    assert sheet_of([3, "interrupted"]).with_missing_failed().tally().ended is Ended.COMPLETE
    assert AnswerSheet(0, 1).with_missing_failed().tally().ended is Ended.INTERRUPTED


class Rude(UnusableAnswer):
    """As a person may write it: without what its base keeps."""

    def __init__(self, text: Any) -> None:
        if text is not None:
            self.text = text

    def __str__(self) -> str:
        return "model server: down"


@pytest.mark.parametrize(
    ("error", "cause", "text"),
    [
        (UnusableAnswer("interrupted"), "UnusableAnswer: interrupted", None),
        (UnusableAnswer("other causes", "hm"), "UnusableAnswer: other causes", "hm"),
        (UnusableAnswer("no", 5), "UnusableAnswer: no", None),  # type: ignore[arg-type]
        (Rude(None), "Rude: model server: down", None),
        (Rude(np.str_("hm")), "Rude: model server: down", "hm"),
        (type("interrupted", (Exception,), {})(), "interrupted: no words", None),
        (type("model server", (Exception,), {})("HTTP 500"), "Exception: HTTP 500", None),
        (type("a\nb", (ValueError,), {})(), "Exception", None),
        (ValueError(), "ValueError", None),
        (type("Derived", (KnownCause,), {})("interrupted"), "Derived: interrupted", None),
        (KnownCause("interrupted", 5, ended=Ended.INTERRUPTED), "interrupted", None),  # type: ignore[arg-type]
    ],
)
def test_causes_of_participants_differ_from_those_of_the_program(error, cause, text):
    known = type(error) is KnownCause
    assert failure_of(error) == (cause, text, Ended.INTERRUPTED if known else Ended.COMPLETE)
    assert type(failure_of(error)[1]) in (str, type(None))


@given(answers, st.integers(0, 80), st.integers(0, 80))
def test_answers_are_sliced_exactly(entries, first, count):
    part = sheet_of(entries, first=10).answers(first, count)
    expected = {10 + place: entry for place, entry in enumerate(entries) if first <= 10 + place < first + count}
    assert said_in(part) == expected
    assert set(part.causes) == {entry for entry in expected.values() if isinstance(entry, str)}


@given(st.lists(st.one_of(st.none(), st.integers(0, 50), st.sampled_from(["no number", "ValueError"])), max_size=60))
def test_missing_answers_count_as_failed(entries):
    sheet = AnswerSheet(0, len(entries))
    for place, entry in enumerate(entries):
        if isinstance(entry, str):
            sheet.fail(place, (entry, None, Ended.COMPLETE))
        elif entry is not None:
            sheet.record(place, entry)
    closed = sheet.with_missing_failed()
    assert list(said_in(closed.answers(0, len(entries))).values()) == [
        INTERRUPTED if entry is None else entry for entry in entries
    ]
    assert closed.done == closed.tally().asked == len(entries)
    assert sheet.done == len(entries) - entries.count(None)
    assert [int(units) == UNDECIDED for units in sheet.answers(0, len(entries)).units] == [e is None for e in entries]


def test_no_answer_is_mistaken_for_a_failure():
    with pytest.raises(ValueError, match="-3 units"):
        AnswerSheet(0, 1).record(0, -3)


class Odd(float):
    """A kind of number that a person's participant may return."""

    def __round__(self, *_: Any) -> int:  # type: ignore[override]
        raise KeyError("odd")


plain = st.one_of(
    st.integers(-3, 103), st.floats(-3, 103), st.integers(0, 200).map(lambda n: n / 2), st.sampled_from([-0.0, 0, 100])
)
strange: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, np.True_, "37", "none", "1 or 2", float("nan"), float("inf"), 10**400, -(10**400)]),
    st.sampled_from([np.float64(3.5), np.int32(4), Decimal("4.5"), Fraction(9, 2), Odd(3), [5], 2**63, 5j]),
    st.text(max_size=5),
)
in_range = st.one_of(st.integers(0, 100), st.floats(0, 100), st.integers(0, 200).map(lambda n: n / 2))


@given(
    st.one_of(st.lists(in_range), st.lists(plain), st.lists(st.one_of(plain, strange))),
    st.integers(0, 6),
    st.booleans(),
)
@example([0.5, 1.5, 2.5, 100.0, 0], 0, True)
@example([10**400, 1], 2, False)
def test_recording_many_equals_recording_one_by_one(said, decimals, neighbours):
    game = Average(7, 100, decimals, 0.0)
    places: Any = range(2, 2 + len(said)) if neighbours else [2 * (len(said) - at) for at in range(len(said))]
    one, together = (AnswerSheet(5, 2 * len(said) + 2) for _ in range(2))
    for place, answer in zip(places, said, strict=True):
        try:
            one.record(place, to_units(answer, game))
        except (UnusableAnswer, KeyError) as error:
            one.fail(place, failure_of(error))
    together.record_many(places, said, game)
    assert together.done == one.done == len(said)
    shown = [{place: each.get("text") for place, each in sheet.examples.items()} for sheet in (one, together)]
    assert shown[0] == shown[1]
    everyone = [sheet.with_missing_failed().answers(0, 1000) for sheet in (one, together)]
    assert said_in(everyone[0]) == said_in(everyone[1])


def test_answers_match_their_indices():
    with pytest.raises(ValueError, match="1 answers for 2 offsets"):
        AnswerSheet(0, 2).record_many([0, 1], [5], Average(7, 100, 0, 0.0))


def test_a_different_cause_per_participant_is_kept():
    sheet = AnswerSheet(0, 100_000)
    for place in range(100_000):
        sheet.fail(place, (f"cause {place}", f"text {place}", Ended.COMPLETE))
    part = sheet.answers(70_000, 10)
    assert part.causes == [part.cause_of(place) for place in range(70_000, 70_010)]
    assert part.causes[0] == "cause 70000"
    assert sheet.tally().failures[OTHER_CAUSES] == 100_000 - CAUSES_COUNTED
    assert list(sheet.examples) == list(range(2 * KEPT))


@pytest.mark.parametrize(
    ("low", "high", "most", "width", "rest"),  # `rest` numbers form a narrower last bin
    [
        *((0, 1, most, 1, 0) for most in (15, 51, 101)),
        *((0, 20, most, 3 if most == 15 else 1, 0) for most in (15, 51, 101)),
        (0, 100, 101, 1, 0),
        (0, 100, 51, 2, 1),  # 101 is a prime number
        (0, 100, 15, 10, 1),
        (1, 100, 15, 10, 0),
        (1, 500, 15, 50, 0),
        (1, 500, 101, 5, 0),
        (0, 500, 101, 5, 1),
        (0, 1000, 15, 77, 0),
        (0, 1000, 101, 11, 0),
        (0, 10_000, 15, 1000, 1),  # 0 to 100 with decimals=2
        (0, 10_000, 101, 137, 0),
        (0, 10**15, 15, (10**15 + 1) // 13, 0),
        (0, 157, 15, 20, 18),
    ],
)
def test_the_bins_of_a_histogram_are_equal_or_only_the_last_one_is_narrower(low, high, most, width, rest):
    edges, counts = histogram(Tally(high - low, np.array([low, high]), np.array([high - low - 1, 1])), low, high, most)
    assert bins_of(high - low + 1, most) == (width, len(counts))
    assert (edges[0], edges[-1], len(edges)) == (low, high + 1, len(counts) + 1)
    *full, last = np.diff(edges).tolist()
    assert {*full} <= {width} and last == (rest or width)
    assert counts[0] == high - low - 1 and counts[-1] == 1 and counts.sum() == high - low


@given(st.integers(1, 10**16), st.sampled_from([15, 51, 101]))
def test_every_range_has_bins(numbers, most):
    width, bins = bins_of(numbers, most)
    assert 1 <= bins <= most and width * (bins - 1) < numbers <= width * bins
    assert width == 1 or bins >= most // 3
