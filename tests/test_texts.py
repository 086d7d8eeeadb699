"""What language models write: which texts are kept, in which files, and what shows them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, until
from hypothesis import given
from hypothesis import strategies as st

from simulation.agents import group as groups
from simulation.cluster.rounds import Simulation
from simulation.errors import SettingsError
from simulation.game.population import MOST_TEXTS, Combination, ModelShare, Persona, PlayerShare, Population, stratified
from simulation.llm.prompts import KeptText, Prompt
from simulation.results.report_page import TEXT_FOLDED
from simulation.results.run_directory import RunDirectory
from simulation.rpc.endpoints import Endpoint, GroupAssignment
from simulation.settings import SimulationConfig

LLM = ("--agent-type", "llm", "--seed", "7")


def thirds(*names):
    return tuple(Persona(name, Fraction(1, len(names))) for name in names)


def population_of(seed, total, asking=None):
    """Two sets of personas, and if `asking` is given, models for this share of the participants."""
    sets = {"one": thirds("a", "b", "c"), "two": (Persona("rare", Fraction(1, 50)), Persona("often", Fraction(49, 50)))}
    models = (ModelShare("m1", Fraction(1, 3), "M"), ModelShare("m2", Fraction(2, 3), "N"))
    kinds = (PlayerShare("llm", asking, models), PlayerShare("random", 1 - asking)) if asking else ()
    return Population(seed, total, sets, players=kinds)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(0, 500))
def test_a_sample_has_the_share_of_each_stratum(sizes, size):
    size = min(size, sum(sizes))
    split = stratified(sizes, size)
    assert sum(split) == size
    assert all(0 <= each <= most for each, most in zip(split, sizes, strict=True))
    if size >= sum(each > 0 for each in sizes):
        assert all(each > 0 for each, most in zip(split, sizes, strict=True) if most)
    if all(each * size >= sum(sizes) > 0 for each in sizes):
        assert all(abs(part * sum(sizes) - size * each) < sum(sizes) for part, each in zip(split, sizes, strict=True))


@given(st.integers(0, 2**64 - 1), st.integers(1, 700), st.sampled_from(["all", "none", "3", "50"]), st.integers(1, 9))
def test_a_panel_does_not_depend_on_placement(seed, total, keep, groups):
    for asking in (None, Fraction(1, 5)):
        population = population_of(seed, total, asking)
        panel = population.panel(keep, 2, 0, total)
        cuts = np.linspace(0, total, groups + 1).astype(int).tolist()
        parts = [population.panel(keep, 2, *cut) for cut in zip(cuts, np.diff(cuts).tolist(), strict=False)]
        assert np.concatenate(parts).tolist() == panel.tolist()
        asks = np.ones(total, bool) if asking is None else population.kind_indices(0, total) == 0
        assert panel.sum() == min(population.texts_per_round(keep, 2), asks.sum()) and not (panel & ~asks).any()


def test_a_panel_has_its_share_of_each_combination():
    population = population_of(7, 5000, Fraction(1, 2))
    strata = Combination(population.groupings).name_indices(0, 5000)
    panel = population.panel("100", 1, 0, 5000)
    everyone, sampled = Counter(strata[population.kind_indices(0, 5000) == 0]), Counter(strata[panel])
    assert sum(sampled.values()) == 100 and everyone.keys() == sampled.keys()  # also of rare personas
    assert all(sampled[each] <= max(count * 100 / 2500 + 1, 1) for each, count in everyone.items())
    other = population_of(8, 5000, Fraction(1, 2)).panel("100", 1, 0, 5000)
    assert (panel != other).any()


@pytest.mark.parametrize(
    ("keep", "total", "rounds", "kept"),
    [
        ("auto", 1000, 100, 1000),
        ("auto", 1001, 100, 1000),
        ("auto", MOST_TEXTS, 1, MOST_TEXTS),
        ("auto", MOST_TEXTS + 1, 1, 1000),
        ("all", MOST_TEXTS + 1, 9, MOST_TEXTS + 1),
        ("none", 10, 1, 0),
        ("7", 10, 1, 7),
        ("70", 10, 1, 10),
    ],
)
def test_how_many_texts_are_kept(keep, total, rounds, kept):
    assert Population(7, total).texts_per_round(keep, rounds) == kept
    assert SimulationConfig(keep_texts=keep).keep_texts == keep


@pytest.mark.parametrize("keep", ["", "0", "-1", "some", "ALL", "1.5", "1000000000", "all\n"])
def test_other_numbers_of_texts_are_refused(keep):
    with pytest.raises(SettingsError, match=r"^--keep-texts .*: must be all, none, auto, or a number") as refused:
        SimulationConfig(keep_texts=keep)
    assert "\n" not in str(refused.value)


def text_of(participant, user="What?", text="33", thoughts=None):
    return KeptText(participant, "M", Prompt("Rules.", user), text, thoughts)


def rows_in(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def test_prompts_are_written_once(tmp_path):
    """Also if later rounds use them, and after a resume that plays a round again."""
    directory = RunDirectory(tmp_path / "run")
    pieces = [[text_of(0), text_of(1, "Why?")], [], [text_of(2), text_of(3, "\ud83d?")]]
    assert directory.write_texts(1, iter(pieces)) == (4, 0)
    assert directory.write_texts(2, iter([[text_of(0), text_of(1, "How?")]])) == (2, 0)
    assert directory.write_texts(3, iter([[text_of(0, "Last?")]])) == (1, 0)
    directory.join_answers()
    users = {row["prompt"]: row["user"] for row in rows_in(directory.path, "prompts")}
    assert [*users.values()] == ["What?", "Why?", "\ufffd?", "How?", "Last?"]
    assert users["5c25f4cdd53c051f"] == "What?"  # also in other runs
    texts = [(row["round"], row["participant"], users[row["prompt"]]) for row in rows_in(directory.path, "texts")]
    assert texts[4:] == [(2, 0, "What?"), (2, 1, "How?"), (3, 0, "Last?")]
    directory.go_back_to(2)
    assert directory.write_texts(3, iter([[text_of(0, "At last?")]])) == (1, 0)
    directory.join_answers()
    assert {row["user"] for row in rows_in(directory.path, "prompts")} == {*users.values()} - {"Last?"} | {"At last?"}
    assert [row["round"] for row in rows_in(directory.path, "texts")] == [1, 1, 1, 1, 2, 2, 3]
    assert sorted(path.name for path in directory.path.glob("*.parquet")) == ["prompts.parquet", "texts.parquet"]
    directory.close()


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    texts = [
        text_of(0, text="\ud83d 33"),
        text_of(1, thoughts="so \udfff"),
        text_of(2, text="\U0001f600"),
        text_of(3, text=None),
    ]
    assert directory.write_texts(1, iter([texts])) == (4, 2)
    directory.join_answers()
    rows = rows_in(directory.path, "texts")
    assert [row["text"] for row in rows] == ["\ufffd 33", "33", "\U0001f600", None]
    assert [row["thoughts"] for row in rows] == [None, "so \ufffd", None, None]
    directory.close()


@pytest.mark.parametrize(("texts", "characters", "sizes"), [(3, 10**6, [3, 3, 1]), (100, 30, [2, 2, 2, 1])])
def test_texts_come_in_messages_of_bounded_size(monkeypatch, texts, characters, sizes):
    """Each text has 12 characters, and their prompt 11, which a message holds once."""
    monkeypatch.setattr(groups, "TEXTS_PER_MESSAGE", texts)
    monkeypatch.setattr(groups, "TEXT_CHARACTERS", characters)
    monkeypatch.setattr(groups, "served_name", str.lower)
    offsets = [7, 0, 3, 5, 8, 9, 2]
    kept = {offset: text_of(10 + offset, "What?", "2" * 12) for offset in offsets}
    group = SimpleNamespace(first=10, _texts=kept, _finished_sheet=lambda: None)
    there = Endpoint("a", 1)
    cluster = SimpleNamespace(
        active_assignments=[GroupAssignment("group", 10, 10, there, there)],
        moderators={there: SimpleNamespace(texts=partial(groups.ParticipantGroup.texts, group))},
    )
    pieces = [*Simulation.texts(SimpleNamespace(cluster=cluster))]
    assert [len(piece) for piece in pieces] == sizes
    found = [text for piece in pieces for text in piece]
    assert [text.participant for text in found] == [10 + offset for offset in sorted(offsets)]
    assert {text.model for text in found} == {"m"}


def kept(cluster, run="runs/latest"):
    """The texts of a run, each with its prompt and its answer."""
    folder = cluster.path / run
    prompts = {row["prompt"]: row for row in rows_in(folder, "prompts")}
    values = {(row["round"], row["participant"]): row["value"] for row in cluster.answers(folder)}
    texts = rows_in(folder, "texts")
    for row in texts:
        row["value"] = values[row["round"], row["participant"]]
        row["user"], row["system"] = prompts[row["prompt"]]["user"], prompts[row["prompt"]]["system"]
    assert {row["prompt"] for row in texts} == prompts.keys()
    assert [*map(itemkey, texts)] == sorted(map(itemkey, texts))
    return texts


def itemkey(row):
    return row["round"], row["participant"]


@pytest.mark.parametrize("dispatch", ["group", "agent"])
def test_every_text_is_kept_with_the_number_that_it_states(cluster, fake, dispatch):
    summary = cluster.play("3", "40", *LLM, "--rounds", "2", "--dispatch", dispatch)
    rows = kept(cluster)
    assert summary["texts"] == {"kept": 80, "replaced": 0}
    assert [itemkey(row) for row in rows] == [(number, index) for number in (1, 2) for index in range(40)]
    assert all(float(row["text"]) == row["value"] and row["thoughts"] is None for row in rows)
    assert Counter(row["text"] for row in rows) == Counter(fake.texts)
    assert {row["model"] for row in rows} == {"participant-model"}
    sent = {(body["messages"][0]["content"], body["messages"][1]["content"]) for body in fake.bodies}
    assert {(row["system"], row["user"]) for row in rows} == sent


def test_a_sample_is_a_panel_with_all_personas(cluster, fake):
    flags = (*LLM, "--rounds", "2", "--personas", "education", "--keep-texts", "9")
    summary = cluster.play("3", "60", *flags)
    first = [itemkey(row) for row in kept(cluster)]
    assert summary["texts"]["kept"] == 18
    assert {index for number, index in first if number == 1} == {index for number, index in first if number == 2}
    cluster.play("3", "60", *flags, "--dispatch", "agent")
    assert [itemkey(row) for row in kept(cluster)] == first


def test_a_run_without_texts_has_no_files_of_texts(cluster, fake):
    for number, flags in enumerate(((*LLM, "--keep-texts", "none"), ("--sleep-time", "0"))):
        summary = cluster.play("3", "20", *flags)
        assert not [*(cluster.path / "runs/latest").glob("texts*"), *(cluster.path / "runs/latest").glob("prompts*")]
        assert summary.get("texts") == ({"kept": 0, "replaced": 0} if number == 0 else None)
        assert "What models wrote" not in (cluster.path / "runs/latest/report.html").read_text()
    refused = cluster.run("run_simulation.sh", "3", "20", "--keep-texts", "all")
    assert refused.returncode == 2 and "--keep-texts all: does nothing with --agent-type random" in refused.stderr


def test_reasoning_is_kept_beside_the_number(cluster, fake):
    fake.thoughts = [
        "Others will say 50, <b>so</b> I take less.\nMy number is 33.",
        "I do not know, <b>so</b> what?",
        "It is, <b>so</b> to say, 4" + "0" * 900,
    ]
    fake.cut_off = {fake.thoughts[2]}
    cluster.play("3", "30", *LLM, "--prompt", "step_by_step")
    rows = kept(cluster)
    assert len(rows) == 30 and {row["thoughts"] for row in rows} == {*fake.thoughts}
    for row in rows:
        assert row["text"] == row["thoughts"] if "33" in row["thoughts"] else float(row["text"]) == row["value"]
    page = (cluster.path / "runs/latest/report.html").read_text()
    assert "What models wrote" in page and "&lt;b&gt;so&lt;/b&gt;" in page and "<b>so</b>" not in page
    shown = re.findall(r'data-key="text" data-round="1" data-participant="(\d+)"', page)
    assert len(shown) == 2
    folded = sum(len(row["thoughts"]) > TEXT_FOLDED for row in rows if str(row["participant"]) in shown)
    assert page.count("<summary>Reasoning (") == folded


def test_reasoning_that_a_server_returns_apart_is_kept(cluster, fake):
    fake.for_ever("thinks apart")
    cluster.play("3", "5", *LLM)
    assert {(row["text"], row["thoughts"], row["value"]) for row in kept(cluster)} == {("37", "low", 37.0)}


def test_the_report_shows_texts_by_persona(cluster, fake):
    cluster.play("3", "60", *LLM, "--rounds", "3", "--personas", "education", "--keep-texts", "12")
    page = (cluster.path / "runs/latest/report.html").read_text()
    parts = re.findall(r'data-topic="education" data-part="([^"]*)">(.*?)</section>', page, re.DOTALL)
    texts = {itemkey(row): row["value"] for row in kept(cluster)}
    game = json.loads((cluster.path / "runs/latest/game.json").read_text())
    assert [name for name, _ in parts] == [each["name"] for each in game["cast"]["personas"]["education"]]
    for _, part in parts:
        shown = re.findall(r'data-round="(\d)" data-participant="(\d+)">.*?<strong>(\d+)</strong>', part, re.DOTALL)
        assert 2 <= len(shown) <= 4 and {number for number, *_ in shown} == {"1", "3"}
        assert all(texts[int(number), int(index)] == float(value) for number, index, value in shown)


def test_texts_of_failed_answers_are_kept(cluster, fake):
    fake.for_ever("half an emoji")
    summary = cluster.play("3", "5", *LLM, "--max-attempts", "1", status=4)
    assert summary["texts"] == {"kept": 5, "replaced": 5}
    assert {(row["text"], row["value"]) for row in kept(cluster)} == {("\ufffd", None)}


def test_texts_of_whole_rounds_survive_a_kill(cluster, fake):
    fake.held = lambda words: "Round 3" in words
    game = cluster.start("run_simulation.sh", "3", "40", *LLM, "--rounds", "4", "--run-dir", "runs/killed")
    until(lambda: any("Round 3" in body["messages"][1]["content"] for body in fake.bodies), 60, "round 3")
    game.kill()
    game.communicate(timeout=120)
    fake.held = None
    folder = cluster.path / "runs/killed"
    before = [pq.read_table(folder / f"texts-0000{number}.parquet").to_pylist() for number in (1, 2)]
    assert [len(rows) for rows in before] == [40, 40]
    assert not [*folder.glob("texts-00003*"), *folder.glob("prompts-00003*")]
    reported = cluster.run("main.py", "--role", "report", "--run-dir", "runs/killed")
    assert reported.returncode == 0 and "What models wrote" in (folder / "report.html").read_text(), reported.stderr
    resumed = cluster.run("run_simulation.sh", "--resume", "runs/killed", "--keep-texts", "5")
    assert resumed.returncode == 0, resumed.stderr
    rows = kept(cluster, "runs/killed")
    names = ("round", "participant", "model", "prompt", "text", "thoughts")
    assert [{name: row[name] for name in names} for row in rows[:80]] == [row for rows in before for row in rows]
    assert Counter(row["round"] for row in rows) == {1: 40, 2: 40, 3: 5, 4: 5}
    assert cluster.summary(folder)["texts"] == {"kept": 90, "replaced": 0}


def test_the_query_in_the_docs_prints_reasoning_beside_numbers(cluster, fake):
    fake.thoughts = ["My number is 33."]
    cluster.play("3", "10", *LLM, "--prompt", "step_by_step")
    query = re.search(r"```python\n(import pyarrow.*?)```", (ROOT / "docs/results.md").read_text(), re.DOTALL)
    assert query is not None
    done = subprocess.run(
        [sys.executable, "-c", query[1]], cwd=cluster.path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(", 33.0: My number is 33.\n") == 10
