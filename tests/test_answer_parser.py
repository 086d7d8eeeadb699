"""Reading the number that a text answers with: nobody else's, and none that is not certain."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.errors import UnusableAnswer
from simulation.game.answer_parser import TEXT_READ
from simulation.game.rules import parse_number

ANSWERS = Path(__file__).parent / "data" / "answers.jsonl"  # as language models write them, in twenty languages


def read(text: str) -> float | None:
    """The number, or None where the text is refused."""
    try:
        return parse_number(text)
    except UnusableAnswer:
        return None


def test_only_the_author_s_own_number_is_read():
    """Who wrote these texts, and says what a careful reader takes them for, did not know the program."""
    answers = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    assert len(answers) > 900
    found = [(answer["text"], read(answer["text"]), answer["number"]) for answer in answers]
    assert [each for each in found if each[1] not in (None, each[2])] == []
    sure = [number for _, number, right in found if right is not None]
    assert sure.count(None) / len(sure) < 0.6  # who corrects itself, or explains, is asked again


@pytest.mark.parametrize(
    "text",
    [
        "The rest will say 60, I am sure.",
        "Shall I go with 41?",
        "Last time I chose 62.",
        "If they all choose 50, I choose 33.",
        "<think>I choose 47",
        "<reasoning>My number is 47.</reasoning>",
        "My number is 47.</think>",
        "What will the others choose?\n47",
        "Player 4:\nI choose 47.",
        "Suppose I am naive. I choose 47.",
        "They are sure to pick 47, so I pick 31, they say.",
        "I go with 47, as two thirds of that is 31.",
        "Player 2: I have no idea what the rest does. I choose 47.",
        "Average = (40 + 54) / 2\n= 47",
        "Bob is the next one to speak. My number is 47.",
        "Then I would choose 47.",
        "4~~7~~",
        "A naive player thinks: they are random, so I choose 47.",
        "My guess is 47. Two thirds of that is 31.",
        "What will the average be? My answer is 47.",
        "47 if the average is 70, and 31 if it is 47.",
        "Expected average\n\n47",
        "### Naive strategy\n\nI choose 47.",
        "Answer:\n1. Estimate the average.",
        "I think aloud.\n1. They are random.\n2. They go lower.\n3.",
        'The moderator said:\n"All is open.\nI choose 47.',
        "I choose 47, said Player 2.",
        "I choose 47, next round.",
        "<scratch>I choose 47.</scratch>",
        '{"last_round": {"number": 47}}',
        '{"metric": "average", "value": 47}',
        'My friend says {"number": 47}',
        "| Average |\n|---|\n| 47 |",
        "I choose 47. Hmm, that is too high.",
        "My number is 47. No: 31.",
        "Round 1 answer: 47\nRound 2: 31",
        "I do not think I choose 47",
        "\\boxed{47} is the average",
        '{"average": 47}',
        '{"number": 47, "choice": 31}',
        "1. I think\n2. I decide\n47 is what the others choose",
        "Alle anderen wählen 47.",
        "Si les autres choisissent 47, je choisis 31.",
        "Ayer elegí 47.",
        "大家都会选47。",
        "Final answer: 47\n\nThe next round begins now.\n\nFinal answer: 31",
        "Spieler 2 überlegt noch einmal.\nMeine Zahl ist 47.",
        "玩家2：大家都会选一个很高的数字。\n答案：47",
        "Supongamos que juego al azar.\nMi número es 47.",
        "Je choisis 47, parce que les autres jouent haut, attends, c'est trop.",
        '{"number": 47, "explanation": "stop, that is too high"}',
        "Myra: I go low this time.\nMy number is 47.",
        "(thinking) They go for the middle.\n47",
        "My confidence is rather high.\n47%",
        "I go a little below 47, with 31.\n\nConfidence (of 100)\n80",
        "Expected avg.\n47",
    ],
)
def test_a_number_that_may_be_another_player_s_is_refused(text):
    assert read(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "31.",
        "**31**",
        "\\boxed{31}",
        "Answer: 31",
        "My number is 31",
        "<think>I choose 47. Or lower.</think>\n\n31",
        "47 is far too high for me.\n\nFinal answer: 31",
        "## Reasoning\n\nMost of them will pick 47.\n\n## Answer\n\n31",
        "Average: 47\nTarget: 31.3\nMy number: 31",
        "1. They pick 47.\n2. Two thirds of that is about 31.\n\nMy number is **31**.",
        '{"thoughts": "they pick 47", "number": 31}',
        "Die anderen werden sicher 47 nehmen.\nMeine Zahl: 31.",
        "Je choisis 31.",
        "Mi número es 31.",
        "私は31を選びます。",
        "３１",
    ],
)
def test_the_author_s_number_is_read_among_others(text):
    assert read(text) == 31


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("49.5", 49.5),
        ("between 0 and 100 I choose 37", 37),
        ("37 of 100", 37),
        ("37 out of 100", 37),
        ("37/100", 37),
        ("I pick 12, not 40", 12),
        ("0-100: 55", 55),
        ("From 0 to 100, my answer is 66.", 66),
        ("1,000", 1000),
        ("-5", -5),
        ("The number is **42**", 42),
        ("7 and again 7", 7),
        ("1e2", 100),
        (".5", 0.5),
        ('{"number": ".5"}', 0.5),
        ("−5", -5),
        ("0−100: 12", 12),
        ("37%", 37),
        ("Well...37.", 37),
        ("my choice — 37!", 37),
        ("我选择37。", 37),
        ("<answer>37</answer>", 37),
        ("I choose from 0 to 100: 37", 37),
        ("not 40 but 37", 37),
        ("In the 2nd round I choose 37", 37),
    ],
)
def test_a_text_holds_one_number(text, number):
    assert parse_number(text) == number


NO_ONE_NUMBER = ["", "none", "I like 3 and 7", "between 0 and 100", "1" * 19_999, "7" + " " * 20_000]
NO_ONE_NUMBER += ["I choose 37 or 38", "I pick 37, 38, or 39", "I will not pick 37", "I won't say 37 or 38"]
NO_ONE_NUMBER += ["I would not pick 40 or 41, I pick 37", "10 million reasons, and I choose 37"]
NO_ONE_NUMBER += ["I choose 2/3 of the average", "I choose 2/3 of 50", "5 plus 5", "5*5", "5,5", "1,0000", "1.2.3"]


@pytest.mark.parametrize("text", NO_ONE_NUMBER)
def test_a_text_without_one_number_is_unusable(text):
    with pytest.raises(UnusableAnswer):
        parse_number(text)


@given(
    number=st.one_of(st.integers(0, 10**9), st.decimals(0, 1000, places=2)),
    before=st.sampled_from(["", "**", "“", "[", "=", "#", "$", "I choose ", "Answer: ", "My number\tis\n", "答案是"]),
    after=st.sampled_from(["", ".", "!", "**", "”", "]", ", I think", " of 1,000", " out of 100", "/100", " (final)"]),
)
def test_a_number_is_read_in_many_surroundings(number, before, after):
    assert parse_number(f"{before}{number}{after}") == float(number)


ODD_BEFORE = [
    "–",
    "- ",
    "– ",
    "− ",
    "minus ",
    "Negative ",
    "P",
    "x",
    "√",
    "±",
    "٫",
    ",",
    "½",
    "²",
    "负",
    "half of ",
    "than ",
]
ODD_AFTER = [
    "k",
    "½",
    " ¾",
    "²",
    "m",
    "th",
    " million",
    " Thousand",
    " k",
    " billions",
    " dozen",
    " point five",
    "e",
    "x3",
]


@given(
    number=st.one_of(st.integers(0, 10**9), st.decimals(0, 1000, places=2)),
    odd=st.sampled_from([(before, "") for before in ODD_BEFORE] + [("", after) for after in ODD_AFTER]),
    around=st.sampled_from(["{}", "I choose {}", '{{"number": "{}"}}', "it is {}.", "{}, as 37"]),
)
def test_a_number_that_may_be_part_of_an_expression_is_refused(number, odd, around):
    with pytest.raises(UnusableAnswer):
        parse_number(around.format(odd[0] + str(number) + odd[1]))


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1 ",
        "1,",
        "1.",
        ".",
        "-",
        "- ",
        "*",
        "{",
        "1 - ",
        "1e1",
        "1,111,",
        "not ",
        "not 1, ",
        "not be ",
        "minus 1 ",
        "1 to ",
        "/11",
    ]
    + [
        "choose 1 or ",
        "so i choose 1, ",
        "so ",
        "i don't, ",
        "<think>",
        "from 1 to ",
        "between 1 and ",
        "number is: ",
        "1 million ",
        "½",
        "P1",
        "9" * 30 + ".9e999 to ",
        "٣",
    ],
)
def test_no_text_delays_a_server(piece):
    texts = [(begin + piece * TEXT_READ)[: TEXT_READ - 1] + end for begin in ("", "not 1") for end in ("1", "x")]
    for text in texts:
        began = time.process_time()
        with contextlib.suppress(UnusableAnswer):
            parse_number(text)
        assert time.process_time() - began < 1  # 0.1 s at most here; quadratic in time would be minutes
