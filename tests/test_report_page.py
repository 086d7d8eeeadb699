"""The report as a page, and several runs compared: real runs, read in a real browser that is offline."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CONTRAST, ROOT, one_line
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from games.average import Average
from games.lowest_unique import LowestUnique
from games.minority import Minority
from games.public_goods import PublicGoods
from simulation.errors import ResultsError, SettingsError
from simulation.game.population import ModelShare, Persona, Population
from simulation.game.tally import RoundResult, Tally, score
from simulation.results.answers_parquet import SCHEMA
from simulation.results.charts import (
    COLOURS,
    averages_of,
    draw_answers,
    draw_averages,
    draw_lines,
    draw_stacks,
    page_chart,
    parts_chart,
    selection,
    series_style,
    short,
)
from simulation.results.comparison import _picture, comparison_lines, csv_text, treatments_of, write_comparison
from simulation.results.comparison import page_content as comparison_content
from simulation.results.console_report import run_lines
from simulation.results.reader import SavedRun, read_run
from simulation.results.report_page import draw_all, page_content, problems, seconds, write_page
from simulation.results.run_files import game_to_json, round_entry
from simulation.results.tables import columns_of, decimals_of, number_text
from simulation.rpc.endpoints import ranges

SIZES = {"phone": (375, 812), "desk": (1280, 900)}
HOSTILE = "<script>document.title = 'taken'</script> & \"$x$\" <img src=x onerror=alert(1)>"
FAILING = f"""
from participant import Participant
class Failing(Participant):
    async def answer(self, question):
        if self.index % 10 == 3:
            raise ValueError({HOSTILE!r})
        return self.index % 101 / question.round
"""
SEVEN = ("--sleep-time", "0", "--seed", "7")


@pytest.fixture(scope="module")
def played(cluster) -> dict[str, Any]:
    """A game of three rounds, with failures whose cause is hostile."""
    (cluster.path / "failing.py").write_text(FAILING)
    arguments = ("--agent-class", "failing.py:Failing", "--rounds", "3", "--ratio", "2/3", "--run-dir", "runs/three")
    return cluster.play("3", "300", *SEVEN, *arguments, status=4)


@pytest.fixture
def run(cluster, played) -> Path:
    return cluster.path / "runs/three"


@pytest.fixture(scope="module")
def told_apart(cluster, played, tmp_path_factory) -> SavedRun:
    """The same game, as if it had been played with personas and models."""
    folder = tmp_path_factory.mktemp("told") / "apart"
    shutil.copytree(cluster.path / "runs/three", folder)
    half = Fraction(1, 2)
    personas = {
        "education": (Persona("none <b>", half), Persona("$much$ 多", half)),
        "job": tuple(Persona(f"{HOSTILE} {place}", Fraction(1, 30)) for place in range(30)),
    }
    population = Population(
        7, 300, personas, (ModelShare("model_1", half, "small"), ModelShare("model_2", half, "large"))
    )
    (folder / "game.json").write_text(json.dumps(game_to_json(Average(7, 100, 0, 0.0, population=population))))
    times = [{"round": each, "model_s": 0.5, "client_s": 0.2, "rpc_s": 0.1, "slowest_s": 0.05} for each in (1, 2, 3)]
    summary = json.loads((folder / "summary.json").read_text())
    summary["cluster"] |= {"times": times, "lost": ["node2:12331"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    made = read_run(folder)
    draw_all(made)
    return made


def show(page, file: Path, size: str = "desk") -> None:
    """Open a page as a person does who has no network; nothing but the file itself may be asked for."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    page.goto(file.resolve().as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [page.url]


def figure(page, number: int, key: str) -> str:
    return page.locator(f'td[data-round="{number}"][data-key="{key}"]').get_attribute("data-value")


def test_all_figures_are_those_of_the_summary(page, run, played):
    show(page, run / "report.html")
    for entry in played["rounds"]:
        number = entry["round"]
        for key in ("average", "winning_number", "median", "std", "min", "max", "seconds"):
            assert float(figure(page, number, key)) == entry[key]
        for key in ("asked", "answered", "failed", "reassigned"):
            assert int(figure(page, number, key)) == entry[key]
        assert int(figure(page, number, "winners")) == entry["winners"]["count"]
        cell = page.locator(f'td[data-round="{number}"][data-key="average"]')
        assert cell.inner_text() == f"{entry['average']:.2f}"
    for key, value in played["seconds"].items():
        assert float(page.locator(f'dd[data-key="{key}"]').get_attribute("data-value")) == value
    assert int(page.locator('td[data-key="failures"]').get_attribute("data-value")) == 90
    folded = page.locator("details.last")
    assert not folded.locator("#time").is_visible()
    page.locator("nav").get_by_text("Servers and time").click()
    assert "3 for participants, 4 moderators" in folded.inner_text()
    words = page.locator("body").inner_text()
    for expected in (
        *("300 participants of Failing: the number closest to 2/3 of the average wins", "whole numbers from 0 to 100"),
        *(
            "3 of 3 rounds played on 20",
            ", program ",
            "30 of 300 participants gave no usable answer in each of 3 rounds.",
        ),
        *("localhost", played["run_id"], ", ".join(played["rounds"][0]["winners"]["participants"])),
    ):
        assert expected in words


def test_charts_have_text_alternatives(page, run, played):
    show(page, run / "report.html")
    pictures = page.locator("figure svg[role=img]")
    # each round, the average and the spread by round, the steps of reasoning, the times
    assert pictures.count() == 3 + 2 + 2 == page.locator("svg").count()
    for place, entry in enumerate(played["rounds"], start=2):
        label = pictures.nth(place).get_attribute("aria-label")
        assert label.startswith(f"Round {entry['round']}: 270 answers from 0 to ")
        assert f"average {entry['average']:.2f}, winning number {entry['winning_number']:.2f}" in label
    assert "equilibrium: 0" in pictures.nth(0).get_attribute("aria-label")
    assert pictures.nth(1).get_attribute("aria-label").startswith("Spread by round. 1: ")
    assert pictures.nth(5).get_attribute("aria-label").startswith("Steps of reasoning by round")
    assert pictures.nth(6).get_attribute("aria-label").startswith("Seconds by round: thinking ")
    assert page.locator("figure").count() == page.locator("figure > figcaption").count()
    assert page.locator("th").count() == page.locator("th[scope]").count() > 20
    ids = page.eval_on_selector_all("[id]", "all => all.map(each => each.id)")
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#(\w+)', (run / "report.html").read_text())
    assert set(used) <= set(ids)


def saved_by(page, link) -> Path:
    with page.expect_download() as download:
        link.click()
    path = Path(download.value.path())
    return path.rename(path.with_name(download.value.suggested_filename))


def test_each_chart_is_saved_as_data_and_as_a_picture(page, run, played, told_apart):
    show(page, run / "report.html")
    page.emulate_media(color_scheme="dark")
    links = page.locator("a[download]")
    names = links.evaluate_all("all => all.map(each => each.download)")
    charts = ("averages", "spread", "round-1", "round-2", "round-3", "steps", "seconds")
    assert names == [f"{name}.{ending}" for name in charts for ending in ("csv", "png")]
    head, *rows = csv.reader(saved_by(page, links.nth(0)).read_text().splitlines())
    assert head == ["round", "average", "winning number"]
    assert [[float(each) for each in row] for row in rows] == [
        [entry["round"], entry["average"], entry["winning_number"]] for entry in played["rounds"]
    ]
    head, *rows = csv.reader(saved_by(page, page.locator("a[download='round-2.csv']")).read_text().splitlines())
    assert head == ["from", "to", "participants"] and len(rows) == 101 and rows[7][:2] == ["7", "7"]
    assert sum(int(count) for _, _, count in rows) == played["rounds"][1]["answered"]
    pixels = imread(saved_by(page, page.locator("a[download='averages.png']")))
    assert pixels.shape[1] == int(3 * 345.6) and tuple(pixels[0, 0, :3]) == (1, 1, 1)
    colours = {tuple(round(255 * each) for each in pixel[:3]) for row in pixels for pixel in row}
    assert tuple(bytes.fromhex(COLOURS["average"][1:])) in colours  # the colours of light mode
    show(page, told_apart.path / "report.html")
    head, *rows = csv.reader(
        saved_by(page, page.locator("a[download='answers-by-education.csv']")).read_text().splitlines()
    )
    assert head == ["education", "from", "to", "participants"] and {row[0] for row in rows} == {"none <b>", "$much$ 多"}
    assert sum(int(row[3]) for row in rows) == 270


def test_axes_have_titles(saved, told_apart):
    chart = page_chart("x", 2.6, draw_answers, saved.game, saved.results[0])
    assert ">number (0 to 100)<" in chart and ">participants<" in chart
    for draw, titles in ((draw_averages, ("round", "number (0 to 100)")), (draw_stacks, ("round", "seconds"))):
        times = {"thinking": {1: 0.5}}, "seconds"
        axes = Figure().subplots()
        draw(axes, *([told_apart] if draw is draw_averages else times))
        assert (axes.get_xlabel(), axes.get_ylabel()) == titles
    assert ">number (0 to 100)<" in parts_chart("x", told_apart.game, told_apart.tallies_by_part["model"][0])


def test_the_statistic_that_decides_is_marked(saved):
    game = Average(7, 100, 2, 0.0, statistic="median")
    results = [score(game, result.round, result.tally) for result in saved.results]
    axes = Figure().subplots()
    draw_answers(axes, game, results[0])
    median = float(results[0].tally.median() / 100)
    assert [axes.lines[0].get_xdata()[0], axes.lines[0].get_label()] == [median, f"median {median:.2f}"]
    rounds = [round_entry(each, 100) for each in results]
    run = replace(saved, game=game, results=results, summary=saved.summary | {"rounds": rounds})
    assert [*averages_of(run)] == ["median", "winning number"] and averages_of(run)["median"][1] == median
    content = page_content(run)
    assert content["result"].startswith(f"The median was {median:.2f} in round 1 and ")
    assert [name for _, name, _ in content["columns"]][:5] == [
        *("median", "winning_number", "answered", "failed", "average"),
    ]


def test_the_first_screen_names_the_main_problem(page, saved, tmp_path):
    def made(*failed, **summary):
        rounds = []
        for entry, count in zip(saved.summary["rounds"], failed, strict=True):
            causes = {"no number": count - 1, "out of range": 1} if count > 1 else {"no number": count} if count else {}
            rounds.append(entry | {"failed": count, "failures": causes, "answered": entry["asked"] - count})
        return replace(saved, summary=saved.summary | {"rounds": rounds, **summary})

    asked = saved.config.participant_num
    assert problems(made(0, 0, 0)) == []
    (text,) = problems(made(0, 1, 0))
    assert text == f"1 of {asked} participants gave no usable answer in round 2. Cause: no number (1)."
    (text,) = problems(made(3, 0, 8))
    text_in_all = f"Up to 8 of {asked} participants gave no usable answer, in 2 rounds. Main cause: no number (9)."
    assert text == text_in_all
    for run, many in ((made(0, 1, 0), False), (made(asked // 2, 0, 0), True)):
        write_page(tmp_path / "report.html", page_content(run))
        show(page, tmp_path / "report.html", "phone")
        assert page.locator("header .alert").count() == many and page.locator("header .status.bad").count() == (
            not many
        )
        assert (page.locator("main h2").first.inner_text() == "Failures") is many
        links = page.locator("nav a")
        assert links.first.inner_text() == ("Failures" if many else "Rounds")
        for link in links.all():
            assert page.locator(link.get_attribute("href")).count() == 1
        assert page.locator("header").bounding_box()["height"] < SIZES["phone"][1]
    for status, verb in (("interrupted", "was interrupted"), ("failed", "failed"), ("partial", "ended")):
        run = made(0, 0, 0, status=status)
        run = replace(run, config=replace(run.config, rounds=9))
        assert problems(run) == [f"The run {verb} after 3 of 9 rounds."]


def test_the_page_states_experiment_files_and_the_command_to_repeat_it(page, run, played, tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    content = {"sweep_id": "x", "experiment": "x.yaml", "about": f"Who {HOSTILE}", "runs": [{"folder": "01"}]}
    (folder / "sweep.json").write_text(json.dumps(content))
    made = read_run(Path(shutil.copytree(run, folder / "01")))
    write_page(made.path / "report.html", page_content(made))
    show(page, made.path / "report.html")
    assert page.locator("header p").first.inner_text() == " ".join(f"Run 1 of 1 of x.yaml: Who {HOSTILE}".split())
    files = [each.get_attribute("href") for each in page.locator(".files a").all()]
    assert files.pop() == "../comparison.html"
    assert {"summary.json", "answers.parquet", "source/experiment.yaml", "failed_answers.jsonl"} < {*files}
    assert all((made.path / each).exists() for each in files) and "answers.csv" not in files
    command = "./run_simulation.sh --experiment runs/three/source/experiment.yaml"
    assert page.locator("code").inner_text() == command
    assert played["started"][:10] in page.locator("header").inner_text()
    assert played["waited"] >= played["seconds"]["total"]
    assert seconds(played["waited"]) in page.locator(".tiles").first.inner_text()


def test_text_of_users_is_escaped(page, run, played):
    show(page, run / "report.html")
    (cause,) = played["rounds"][0]["failures"]
    assert cause == f"ValueError: {HOSTILE} (failing.py, line 6)"
    assert page.locator("th", has_text="onerror").inner_text() == cause
    assert page.title() == "300 participants of Failing: the number closest to 2/3 of the average wins"
    assert page.locator("img, link[rel=stylesheet]").count() == 0 and page.locator("script").count() == 1


@pytest.fixture(scope="module")
def huge(cluster, tmp_path_factory) -> SavedRun:
    """A game with numbers and names that take much room, whose winning number is far beyond the range."""
    (cluster.path / "long.py").write_text(FAILING.replace("Failing", "F" * 90))
    arguments = ("--agent-class", f"long.py:{'F' * 90}", "--max-value", "1000000000", "--ratio", "3", "--rounds", "2")
    cluster.play("3", "100", *SEVEN, *arguments, "--run-dir", "runs/huge", status=4)
    folder = shutil.copytree(cluster.path / "runs/huge", tmp_path_factory.mktemp("huge") / "run")
    personas = {"S" * 80: tuple(Persona(f"{place} {'p' * 80}", Fraction(1, 600)) for place in range(600))}
    game = Average(7, 10**9, 0, 0.0, population=Population(7, 100, personas))
    (folder / "game.json").write_text(json.dumps(game_to_json(game)))
    for entry in (summary := json.loads((folder / "summary.json").read_text()))["rounds"]:
        assert entry["winning_number"] == 3 * entry["average"]
    summary["config"]["seed"] = 7
    (folder / "summary.json").write_text(json.dumps(summary))
    made = read_run(folder)
    draw_all(made)
    return made


def test_of_many_personas_the_largest_are_shown(page, huge):
    show(page, huge.path / "report.html")
    (section,) = page.locator("section[data-topic]").all()
    assert section.locator("tr[data-part]").count() == 500
    assert "Listed are the 500 largest of 600." in section.inner_text()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("huge", "phone"),
        ("told_apart", "desk"),
        pytest.param("huge", "desk", marks=pytest.mark.slow),
        pytest.param("told_apart", "phone", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_wider_than_the_screen(page, request, name, size):
    show(page, request.getfixturevalue(name).path / "report.html", size)
    page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
    width = SIZES[size][0]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for box in page.locator("figure, .scroll, dl, h1, h2").all():
        edges = box.bounding_box()
        assert edges["x"] >= 0 and edges["x"] + edges["width"] <= width
    tables = page.locator(".scroll")
    assert tables.count() == page.locator("table").count()
    if size == "phone":  # a wide table is moved in its own box, not clipped
        wide = page.get_by_role("region", name="Figures by round")
        assert wide.evaluate("box => box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX") == "auto"
        heights = page.eval_on_selector_all(
            "svg text",
            "all => all.filter(one => one.textContent.trim()).map(one => one.getBoundingClientRect().height)",
        )
        assert min(heights) >= 9


def test_dark_and_light_schemes_are_both_readable(page, told_apart):
    show(page, told_apart.path / "report.html")
    papers = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for words in (
            "h1",
            ".lede",
            ".tiles dt",
            ".bad",
            "figcaption",
            "td",
            "thead th",
            "summary",
            "footer",
            "svg text",
        ):
            assert page.locator(words).first.evaluate(CONTRAST) >= 4.5, (scheme, words)
        for name in ("bars", "average", "winning", "equilibrium", *(f"series-{place}" for place in range(1, 9))):
            sample = f"<figure><svg><text id='sample' style='fill: var(--{name})'>x</text></svg></figure>"
            page.evaluate("html => document.querySelector('main').insertAdjacentHTML('beforeend', html)", sample)
            assert page.locator("#sample").evaluate(CONTRAST) >= 3, (scheme, name)
            page.evaluate("document.querySelector('#sample').closest('figure').remove()")
    assert len(papers) == 2


def test_participants_are_distinguished_by_persona_and_model(page, told_apart):
    show(page, told_apart.path / "report.html")
    for topic, rounds in told_apart.tallies_by_part.items():
        section = page.locator(f'section[data-topic="{topic}"]')
        rows = section.locator("tr[data-part]")
        assert rows.count() == len(rounds[-1])
        for row, (name, tally) in zip(rows.all(), rounds[-1].items(), strict=True):
            assert row.locator("th").inner_text() == " ".join(name.split())
            assert int(row.locator('[data-key="asked"]').inner_text()) == tally.asked
            assert int(row.locator('[data-key="failed"]').inner_text()) == tally.failed
            shown = row.locator('[data-key="average"]').inner_text()
            assert shown == ("–" if tally.average() is None else f"{float(tally.average()):.2f}")
        assert section.locator("svg[role=img]").count() == 2
        assert section.locator("details tbody tr").count() == 3 * len(rounds[-1])
    assert set(told_apart.tallies_by_part) == {"education", "job", "model"}
    assert sum(tally.asked for tally in told_apart.tallies_by_part["job"][0].values()) == 300
    words = page.locator("body").inner_text()
    for expected in (
        "the 24 largest of 30",
        "the 8 largest of 30",
        "education (2), job (30)",
        "small (1/2), large (1/2)",
    ):
        assert expected in words


def test_times_by_activity_and_lost_servers_are_shown(page, told_apart):
    show(page, told_apart.path / "report.html")
    assert float(figure(page, 2, "slowest_s")) == 0.05 and float(figure(page, 3, "model_s")) == 0.5
    page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
    time = page.locator("#time").inner_text()
    assert "thinking" in time and "waiting for the slowest server" in time and "waiting for the model" not in time
    assert page.locator("#lost.bad").inner_text() == "node2:12331"


def test_a_copied_folder_gives_the_same_report(cluster, run, played, tmp_path):
    copy = tmp_path / "else where"
    shutil.copytree(run, copy)
    made = ("report.html", "analysis.json", "histogram.png", "rounds.png")
    wanted = [(copy / name).read_bytes() for name in made]
    for name in made:
        (copy / name).unlink()
    again = cluster.run("main.py", "--role", "report", str(copy))
    assert again.returncode == 0, again.stderr
    assert [(copy / name).read_bytes() for name in made] == wanted
    assert again.stdout == cluster.run("main.py", "--role", "report", "--run-dir", str(run)).stdout
    lines = again.stdout.splitlines()
    assert lines[0].startswith("Moderator: The average value is ")
    assert lines[-1] == f"run {played['run_id']} is partial: 3 of 3 rounds"


def test_the_terminal_shows_parts_of_the_population(cluster, told_apart):
    done = cluster.run("main.py", "--role", "report", str(told_apart.path))
    assert re.search(
        r"^model +asked +answered +average +spread\nsmall +150 +\d+ +\d+\.\d{3} +\d+\.\d{3}$", done.stdout, re.M
    )
    assert done.stdout.splitlines()[-1].endswith("is partial: 3 of 3 rounds")


def test_several_runs_are_compared(page, cluster, run, played):
    sweep = cluster.path / "runs/sweep"
    for ratio in ("1/2", "3/2"):
        name = ratio.replace("/", "-")
        cluster.play("3", "200", *SEVEN, "--ratio", ratio, "--rounds", "2", "--run-dir", f"runs/sweep/{name}")
    (sweep / "sweep.json").write_text("{}")
    (sweep / "not-played").mkdir()
    done = cluster.run("main.py", "--role", "report", "runs/sweep")
    assert done.returncode == 0, done.stderr
    head, half, more = done.stdout.splitlines()[:3]
    assert head.split()[:3] == ["run", "ratio", "first"] and "seed" not in head
    summary = cluster.summary(sweep / "1-2")
    first, last = summary["rounds"]
    averages = [f"{first['average']:.2f}", f"{last['average']:.2f}", f"{last['winning_number']:.2f}"]
    assert half.split() == ["1-2", "1/2", *averages, "2", "400", "0", "complete", "0", half.split()[-1]]
    assert " 0 and 100 " in more
    assert (sweep / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for size in SIZES:
        show(page, sweep / "comparison.html", size)
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert page.locator("figure svg[role=img]").count() == 2 + 2
    row = page.locator(f'tr[data-run="{summary["run_id"]}"]')
    cell = row.locator('[data-key="last average"]')
    assert (cell.inner_text(), cell.get_attribute("data-value")) == (averages[1], str(last["average"]))
    assert page.locator("header + main dd").all_inner_texts()[:2] == ["200 in each run", "800 of 800"]
    links = page.locator("dl a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert links == ["comparison.csv", "comparison.png", "sweep.json"]
    assert "ratio 1/2" in page.locator("figcaption").first.inner_text()
    row.get_by_role("link", name="1-2", exact=True).click()
    assert page.locator("h1").inner_text() == "200 random participants: the number closest to 1/2 of the average wins"

    three = cluster.run("main.py", "--role", "report", "runs/three", "runs/sweep", "--run-dir", "runs/side by side")
    assert three.returncode == 0, three.stderr
    assert len(three.stdout.splitlines()) == 5 and "players" in three.stdout
    assert {path.name for path in (cluster.path / "runs/side by side").iterdir()} == {
        "comparison.csv",
        "comparison.png",
        "comparison.html",
    }
    beside = cluster.run("main.py", "--role", "report", "runs/three", "runs/sweep/1-2", "runs/sweep/../three")
    assert beside.returncode == 0 and (cluster.path / "runs/comparison.html").exists()
    assert len(beside.stdout.splitlines()) == 4  # the same run is not compared with itself


def test_a_run_that_cannot_be_reported_is_one_line(cluster, run, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "game.json").write_text("{")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "sweep.json").write_text("{}")
    cut = shutil.copytree(run, tmp_path / "cut")
    pq.write_table(pq.read_table(cut / "answers.parquet").slice(0, 899), cut / "answers.parquet")
    other_columns = shutil.copytree(run, tmp_path / "other columns")
    pq.write_table(pa.table({"x": [1]}), other_columns / "answers.parquet")
    foreign = shutil.copytree(run, tmp_path / "foreign")  # far away participants once led the dealing to no end
    answers = pq.read_table(foreign / "answers.parquet")
    far = pa.array([10**15] * len(answers), pa.int64())
    pq.write_table(answers.set_column(1, answers.field(1), far), foreign / "answers.parquet")
    gone = shutil.copytree(run, tmp_path / "gone")
    (gone / "answers.parquet").unlink()
    for folders, expected in (
        (["nowhere"], "summary.json"),
        ([str(cut)], "say different things of round 3"),
        ([str(other_columns)], "has other columns than round, participant, value, failure"),
        ([str(foreign)], "a participant is not from 0 to 299"),
        ([str(gone)], "its answers.parquet is missing"),
        ([str(damaged)], "game.json is damaged"),
        ([str(run), str(damaged)], "game.json is damaged"),
        ([str(empty)], "no run was played"),
        ([str(run), "--run-dir", str(tmp_path / "new")], "is for a comparison of several runs"),
    ):
        done = cluster.run("main.py", "--role", "report", *folders)
        assert done.returncode == 2 and done.stdout == ""
        assert expected in one_line(done.stderr)
    other = shutil.copytree(run, tmp_path / "other")
    done = cluster.run("main.py", "--role", "report", str(run), str(other), "--run-dir", "main.py/x")
    assert done.returncode == 5 and "cannot write to main.py/x" in one_line(done.stderr)
    done = cluster.run("main.py", "--role", "main", "runs/three")
    assert done.returncode == 2 and "go with --role report" in one_line(done.stderr)


def _without(key: str, of: dict) -> dict:
    return {name: value for name, value in of.items() if name != key}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda said: [],
        lambda said: said | {"status": "well"},
        lambda said: _without("rounds", said),
        lambda said: _without("seconds", said),
        lambda said: said | {"rounds": 5},
        lambda said: said | {"rounds": said["rounds"][:1] * 2},
        lambda said: said | {"seconds": said["seconds"] | {"total": math.nan}},
        lambda said: said | {"seconds": said["seconds"] | {"total": -1.0}},
        lambda said: said | {"rounds": [{}]},
        lambda said: said | {"cluster": _without("times", said["cluster"])},
        lambda said: said | {"rounds": [said["rounds"][0] | {"average": "50"}]},
        lambda said: said | {"rounds": [said["rounds"][0] | {"winners": {"count": 1, "participants": ["X1"]}}]},
    ],
)
def test_a_damaged_summary_is_named(run, tmp_path, spoil):
    folder = shutil.copytree(run, tmp_path / "spoilt")
    said = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(spoil(said)))
    with pytest.raises(SettingsError, match=r"its summary\.json is damaged"):
        read_run(folder)


def test_a_run_without_finished_rounds_has_a_report(page, run, tmp_path):
    folder = tmp_path / "begun"
    shutil.copytree(run, folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "interrupted", "rounds": []}))
    draw_all(read_run(folder))
    show(page, folder / "report.html")
    assert "No round was finished" in page.locator("main").inner_text()


def test_an_interrupted_round_does_not_count_as_played(page, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "cut")
    answers = pq.read_table(folder / "answers.parquet").to_pylist()
    cut = [row | {"value": None, "failure": "interrupted"} if row["round"] == 3 else row for row in answers]
    pq.write_table(pa.Table.from_pylist(cut, SCHEMA), folder / "answers.parquet")
    summary = json.loads((folder / "summary.json").read_text())
    nothing = dict.fromkeys(("average", "median", "std", "min", "max", "winning_number"))
    nobody = {
        "answered": 0,
        "failed": 300,
        "failures": {"interrupted": 300},
        "ended": "interrupted",
        "winners": {"count": 0, "participants": []},
    }
    summary["rounds"][-1] |= nothing | nobody
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    draw_all(read_run(folder))
    show(page, folder / "report.html")
    headlines = page.locator("header .alert").all_inner_texts()
    assert headlines[0] == "The run was interrupted in round 3 of 3: 0 of 300 participants had answered."
    assert headlines[1].startswith("30 of 300 participants gave no usable answer in each of 2 rounds. Cause: ")
    assert "2 of 3 rounds played" in page.locator("header").inner_text()
    assert page.locator("figcaption", has_text="round 3 was interrupted").count() == 2
    assert (
        "interrupted: 0 of 300 answers"
        in page.locator("figure", has=page.get_by_text("Round 3", exact=True)).inner_text()
    )
    assert page.locator("th", has_text="3 interrupted").count() == 2
    tiles = page.locator(".tiles").first.inner_text()
    assert f"{summary['rounds'][1]['average']:.2f}" in tiles and "average of round 2" in tiles
    assert run_lines(read_run(folder))[-1].endswith("is interrupted: 2 of 3 rounds")


def test_a_round_without_answers(page, cluster):
    (cluster.path / "mute.py").write_text(FAILING.replace("if self.index % 10 == 3", "if True"))
    arguments = ("--agent-class", "mute.py:Failing", "--rounds", "2", "--keep-going", "--run-dir", "runs/mute")
    cluster.play("3", "50", *SEVEN, *arguments, status=4)
    show(page, cluster.path / "runs/mute/report.html")
    assert figure(page, 1, "average") == "" and int(figure(page, 2, "failed")) == 50
    assert "2 of 2 rounds played" in page.locator("header").inner_text()
    headline = page.locator("header .alert").inner_text()
    assert headline.startswith("50 of 50 participants gave no usable answer in each of 2 rounds. Cause: ValueError: ")
    assert page.locator("main h2").first.inner_text() == "Failures"
    both = cluster.run("main.py", "--role", "report", "runs/mute", "runs/mute/../three", "--run-dir", "runs/both")
    assert both.returncode == 0, both.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--rounds", "2"), ("--rounds", "100", "--decimals", "6", "--max-value", "1000000")])
def test_a_large_run_has_a_small_report(page, cluster, more):
    participants = "1000000" if more[1] == "2" else "20000"
    cluster.play("3", participants, *SEVEN, *more, timeout=170)
    file = cluster.path / "runs/latest/report.html"
    assert file.stat().st_size < 2_000_000
    show(page, file, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.locator("figure svg").count() == int(more[1]) + 3  # average, spread and times by round
    open_ones = page.locator("#answers ~ .grid figure").count()
    assert open_ones == min(int(more[1]), 12)


def test_numbers_in_words():
    numbers = (None, 0, 1502, 502.0, 24.5, Fraction(155333, 3000), 12345.6, 0.00012345, -0.25)
    assert [number_text(number) for number in numbers] == [
        *("–", "0", "1,502", "502", "24.5", "51.778", "12,345.6", "0.000123", "-0.25"),
    ]
    assert [number_text(number, 4, padded=True) for number in (7, 7.0, 0.00012)] == ["7", "7.0000", "0.0001"]
    assert number_text(1200.4, 0) == "1,200"
    columns = {(49.56112, 33.1): 2, (50.0, None, 0): 0, (1234.5,): 0, (0.4567,): 3, (49.56, 0.0123): 3, (5.5, 1e-6): 3}
    assert {numbers: decimals_of(numbers, 3) for numbers in columns} == columns
    assert decimals_of([49.56112, 0.0000123], 9) == 4 and decimals_of([0.0001234], 9) == 7
    assert [short(number) for number in (0, 950, 1200, 12_000, 1.5e6, 2e9)] == [
        "0",
        "950",
        "1,200",
        "12k",
        "1.5M",
        "2G",
    ]
    assert [seconds(number) for number in (0.5, 59.999, 61, 119.7, 3599.9, 3700)] == [
        *("0.50 s", "1 min 0 s", "1 min 1 s", "2 min 0 s", "1 h 0 min", "1 h 1 min"),
    ]
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10" and ranges([]) == ""
    assert selection(3, 6) == [0, 1, 2] and selection(100, 3) == [0, 50, 99] and selection(0, 3) == []


def test_a_number_far_out_of_range_is_stated_and_not_drawn(told_apart):
    rounds = [entry | {"outcome": {"winning_number": 150.0}} for entry in told_apart.summary["rounds"]]
    far = replace(told_apart, summary=told_apart.summary | {"rounds": rounds})
    axes = Figure().subplots()
    draw_answers(axes, far.game, replace(far.results[0], outcome={"winning_number": 150.0}))
    assert axes.get_xlim()[1] <= 101
    assert "winning number 150" in [line.get_label() for line in axes.lines]
    axes = Figure().subplots()
    draw_averages(axes, far)
    (winning,) = (line for line in axes.lines if line.get_label() == "winning number")
    assert np.isnan(winning.get_ydata()).all() and axes.get_ylim()[1] < 120


def test_of_many_runs_some_are_drawn_and_all_are_listed(told_apart, tmp_path):
    folders = [tmp_path / f"{number:02}" for number in range(60)]
    configs = [replace(told_apart.config, ratio=f"1/{number + 1}") for number in range(60)]
    runs = [replace(told_apart, path=path, config=each) for path, each in zip(folders, configs, strict=True)]
    content = comparison_content(tmp_path, runs)
    labels = [each.label for each in content["drawn"]]
    assert len(content["columns"][0].texts) == 60 and len(labels) == 24
    write_page(tmp_path / "comparison.html", content)
    unfolded, folded = (tmp_path / "comparison.html").read_text().split("<summary>12 more</summary>")
    assert "24 of 60 shown" in unfolded
    assert (unfolded.count("<figure>"), folded.count("<figure>")) == (2 + 12, 12)
    assert content["columns"][0].texts == [folder.name for folder in folders]
    assert labels[0] == "ratio 1" and labels[-1] == "ratio 1/60"
    assert len({series_style(index) for index in range(24)}) == 24


def test_repeats_are_one_line_with_a_band(page, told_apart, tmp_path):
    def made(number, ratio, seed, average, **summary):
        figures = [{"average": average + number} for number in (1, 2, 3)]
        entries = zip(told_apart.summary["rounds"], figures, strict=True)
        rounds = [entry | each | {"outcome": entry["outcome"] | each} for entry, each in entries]
        config = replace(told_apart.config, ratio=ratio, seed=seed, hosts=("a", "b"), prompt="x")
        data = told_apart.summary | {"run_id": f"r{number}", "rounds": rounds, **summary}
        return replace(told_apart, path=tmp_path / f"{number}", config=config, summary=data)

    runs = [
        made(3 * at + seed, ratio, seed, 20.0 * at + seed) for at, ratio in enumerate(("1/2", "1")) for seed in range(3)
    ]
    runs.append(made(9, "1/3", 1, 3.0))
    cut = runs[0].summary["rounds"]
    cut[2] = cut[2] | {"ended": "interrupted"}
    half, whole, third = treatments_of(runs)
    assert [each.label for each in (half, whole, third)] == ["ratio 1/2", "ratio 1", "ratio 1/3"]
    estimates = whole.estimates("average")
    assert estimates[3][:3] == (3, 24.0, 1.0) and estimates[3].high == pytest.approx(24 + 4.302653 / 3**0.5)
    assert half.estimates("average")[3].runs == 2  # a cut round does not count
    assert third.estimates("average")[3].mean == 6.0 and math.isnan(third.estimates("average")[3].low)
    pooled = whole.last_round()
    assert pooled.tally.answered == 3 * told_apart.results[-1].tally.answered
    write_comparison(tmp_path, runs)
    for size in SIZES:
        show(page, tmp_path / "comparison.html", size)
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert page.locator("h1").inner_text() == "3 treatments, 7 runs compared"
    assert page.locator("figure svg").count() == 2 + 3
    chart = page.locator("figure").first.inner_html()
    colours = set(re.findall(r"--series-\d", chart))
    assert colours == {"--series-1", "--series-2", "--series-3"}
    assert "fill-opacity: 0.2" in chart
    row = page.locator("tbody tr").first
    assert row.locator("th").inner_text() == "ratio 1/2" and row.locator('[data-key="runs"]').inner_text() == "2 of 3"
    table = page.get_by_role("region", name="The treatments")

    def in_order_of(heading):
        table.get_by_role("button", name=heading, exact=True).press("Enter")
        return table.locator("tbody th").all_inner_texts()

    assert in_order_of("Average") == ["ratio 1/2", "ratio 1/3", "ratio 1"]
    assert in_order_of("Average") == ["ratio 1", "ratio 1/3", "ratio 1/2"]
    assert table.locator("th[aria-sort]").evaluate_all("all => all.map(each => [each.innerText, each.ariaSort])") == [
        ["Average", "descending"]
    ]
    assert in_order_of("Treatment") == ["ratio 1/2", "ratio 1", "ratio 1/3"]  # as before
    assert page.locator("[aria-sort] button").count() == 1
    assert not page.locator("tr[data-run=r0]").is_visible()
    write_comparison(tmp_path, runs, all_runs=True)
    show(page, tmp_path / "comparison.html")
    assert page.locator("tr[data-run=r0]").is_visible()
    assert page.locator("figure").first.inner_html().count("<path") == chart.count("<path") + 6


def test_a_repeat_with_more_rounds_stays_in_its_treatment(told_apart, tmp_path):
    def made(number, seed, rounds, played=3):
        config = replace(told_apart.config, seed=seed, rounds=rounds)
        summary = told_apart.summary | {"rounds": told_apart.summary["rounds"][:played]}
        return replace(told_apart, path=tmp_path / f"{number}", config=config, summary=summary)

    (one,) = treatments_of([made(1, 1, 1, 1), made(2, 2, 3), made(3, 3, 1, 1)])
    assert one.last == 1  # what one of three has played goes on, is drawn, and is no result of all
    (half,) = treatments_of([made(1, 1, 1, 1), made(2, 2, 3)])
    assert half.last == 3 and half.label == "2 runs"
    by_rounds = treatments_of(
        [made(n, seed, rounds) for n, (seed, rounds) in enumerate([(1, 2), (2, 2), (1, 3), (2, 3)])]
    )
    assert [each.label for each in by_rounds] == ["rounds 2", "rounds 3"]  # the experiment compares them


def test_a_parameter_with_the_name_of_a_column_has_another_heading(saved, tmp_path):
    runs = [
        replace(saved, path=tmp_path / f"{at}", config=replace(saved.config, set=(f"failed={at}",))) for at in (1, 2)
    ]
    columns = {each.heading: each.texts for each in comparison_content(tmp_path, runs)["columns"]}
    assert columns["set failed"] == ["1", "2"] and columns["failed"] == ["0", "0"]


def test_a_column_has_equal_decimals_for_four_significant_digits():
    def texts(*cells):
        return columns_of([{"x": each} for each in cells])[0].texts

    assert texts(18.70049, 24.5) == ["18.70", "24.50"] and texts(0.5, None) == ["0.5000", "-"]
    assert texts(52000.4, 1.0) == ["52,000.4", "1.0"] and texts(12, 7) == ["12", "7"]
    assert texts(520.357, 0.51) == ["520.36", "0.51"] and texts(0.0) == ["0"]
    assert texts(("{} to {}", -3.0, 5.25), 9.5) == ["-3.000 to 5.250", "9.500"]
    assert texts(("{} ({} of {})", 8.5, 2, 3), "all") == ["8.500 (2 of 3)", "all"]


@pytest.fixture
def saved(tmp_path) -> SavedRun:
    """A run of three rounds, played by an earlier version."""
    return read_run(Path(shutil.copytree(ROOT / "tests/data/old_runs/random", tmp_path / "saved")))


OUTCOMES = [
    (Minority, {"share_of_1": 0.25, "winning_number": 1}, "share of players who chose 1"),
    (LowestUnique, {"unique_numbers": 12, "winning_number": 7}, "count of numbers given once"),
    (PublicGoods, {"average": 4.0, "average_payoff": 12.5}, "average contribution"),
]


@pytest.mark.parametrize(("game", "outcome", "words"), OUTCOMES)
def test_the_figures_of_every_game_are_compared(saved, tmp_path, game, outcome, words):
    def made(number):
        rounds = [
            entry | {"outcome": {name: value + number for name, value in outcome.items()}}
            for entry in saved.summary["rounds"]
        ]
        config, data = replace(saved.config, seed=number), saved.summary | {"run_id": f"r{number}", "rounds": rounds}
        return replace(saved, path=tmp_path / f"{number}", config=config, summary=data, game=game())

    values = [*outcome.values()]
    other = "average payoff" if game is PublicGoods else "winning number"
    head, alone = comparison_lines([made(0)])
    assert re.split(" {2,}", head)[:3] == ["run", f"first {words}", f"last {words}"]
    assert ("winning number" in head) is ("winning_number" in outcome) and other in head
    assert [float(each) for each in alone.split()[1:4]] == [values[0], values[0], values[1]]
    pair = [made(0), made(1)]
    head, row = comparison_lines(pair)
    more = [] if game is Minority else [other, f"{other}: 95 % interval"]
    assert [each.strip() for each in re.split(" {2,}", head)][: 4 + len(more)] == [
        *("treatment", words, "95 % interval", "std"),
        *more,
    ]
    means = [float(each) for each in row.split()[2::5][: 1 + bool(more)]]
    assert means == [value + 0.5 for value in values[: 1 + bool(more)]]
    columns = {each.heading: each for each in comparison_content(tmp_path, pair)["treatment_columns"]}
    assert columns[words].values == [values[0] + 0.5] and columns["std"].texts == ["0.7071"]
    head, *data = csv_text(pair).splitlines()
    assert {f"outcome_{name}" for name in outcome} < {*head.split(",")} and len(data) == 6
    other = replace(saved, path=tmp_path / "x", config=replace(saved.config, game="average"))
    mixed = [replace(made(0), config=replace(saved.config, game="another")), other]
    head, *rows = comparison_lines(mixed)  # the games have different words for their averages
    assert "first average" in head and "average contribution" not in head
    assert ("upper bound" in head) is (game().high != 100)
    assert game().high == 100 or [row.split()[2] for row in rows] == [f"{game().high}", "100"]


def test_a_comparison_of_unlike_runs_has_a_handful_of_columns(saved, tmp_path):
    names = ("participant_num", "max_tokens", "decimals", "max_attempts", "samples_per_request", "sleep_time", "rounds")
    runs = [
        replace(saved, path=tmp_path / f"{at}", config=replace(saved.config, **dict.fromkeys(names, at + 1)))
        for at in range(4)
    ]
    runs[0] = replace(runs[0], config=replace(runs[0].config, set=("noise=1",)))
    head, *rows, note = comparison_lines(runs)
    assert note == "only in comparison.csv: noise" and len(rows) == 4
    shown = {"participants", "max tokens", "decimals", "max attempts", "samples per request", "sleep time"}
    assert {*re.split(" {2,}", head)[1:7]} == shown and re.split(" {2,}", head)[7] == "first average"
    assert {*names, "noise"} < {*csv_text(runs).splitlines()[0].split(",")}
    content = comparison_content(tmp_path, runs)
    assert content["omitted"] == note and len(content["treatment_columns"]) < 16
    write_page(tmp_path / "comparison.html", content)
    assert note[1:] in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize("count", [1, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 4, 7)), 24])
@pytest.mark.parametrize("label", ["a rather long label of a treatment in words", "a_class_with_a_long_name" * 3])
def test_nothing_in_the_picture_of_a_comparison_is_cut(saved, label, count):
    (one,) = treatments_of([saved])
    figure = _picture([replace(one, label=f"{label} {number}") for number in range(count)], all_runs=False)
    figure.draw_without_rendering()
    texts = [each for each in figure.findobj(Text) if label[:20] in each.get_text() or "round" in each.get_text()]
    assert len(texts) == count + min(count, 6) + 3  # the legend, the titles of histograms, two titles and an axis
    for each in texts:
        box = each.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, each.get_text()
    legend, *_ = [each.get_window_extent() for each in figure.subfigs[0].legends]
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_lines_at_the_same_position_are_all_visible():
    axes = Figure().add_subplot()
    same = {1: 30.0, 2: 20.0, 3: 10.0}
    draw_lines(axes, 3, {"a": same, "b": {1: 5.0, 2: 5.0, 3: 5.0}, "c": same, "d": same})
    first, alone, second, third = axes.lines
    dashes = [line._unscaled_dash_pattern for line in (first, second, third)]
    assert len({offset for offset, _ in dashes}) == 3 and len({tuple(lengths) for _, lengths in dashes}) == 1
    (_, (drawn, gap)) = dashes[0]
    assert gap == 2 * drawn and [offset for offset, _ in dashes] == [0, drawn, 2 * drawn]
    assert [line.get_markevery() for line in (first, second, third)] == [(0, 3), (1, 3), (2, 3)]
    assert alone.get_linestyle() == "-" and alone.get_markevery() is None


def test_axes_of_whole_numbers_have_no_ticks_between_them(saved):
    def ticks(axis, limits):
        return [each for each in axis.get_ticklocs() if limits[0] <= each <= limits[1]]

    for game, decimals in ((Minority(), 0), (Average(max_value=3), 0), (Average(max_value=1, decimals=1), 1)):
        tally = Tally(3, np.array([0, 1]), np.array([1, 2]))
        axes = Figure().subplots()
        draw_answers(axes, game, RoundResult(1, tally))
        answers, counts = ticks(axes.xaxis, (game.low, game.high)), ticks(axes.yaxis, axes.get_ylim())
        assert all(each == round(each) for each in counts) and len(answers) > 1
        assert all(each == round(each) for each in answers) is (decimals == 0)
    axes = Figure().subplots()
    draw_lines(axes, 2, {"average": {1: 0.2, 2: 0.4}})
    assert ticks(axes.xaxis, axes.get_xlim()) == [1, 2] and len(ticks(axes.yaxis, axes.get_ylim())) > 1
    axes = Figure().subplots()
    draw_stacks(axes, {"thinking": {1: 0.5}}, "seconds")
    assert ticks(axes.xaxis, axes.get_xlim()) == [1]


def test_of_many_winning_answers_the_rest_is_counted(page, saved, tmp_path):
    results = [replace(saved.results[0], winning_units=tuple(range(13))), *saved.results[1:]]
    write_page(tmp_path / "report.html", page_content(replace(saved, results=results)))
    show(page, tmp_path / "report.html")
    row = page.locator("section", has=page.locator("#winners")).locator("tbody tr").first
    assert "0.00, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09 and 3 more" in row.inner_text()


def test_labels_have_two_settings_in_words(told_apart, tmp_path):
    def made(number, **settings):
        return replace(told_apart, path=tmp_path / f"{number}", config=replace(told_apart.config, **settings))

    kinds = [
        {"participant_num": count, "personas": who, "decimals": places}
        for count in (50, 99, 100)
        for who in (None, "a")
        for places in (0, 1)
    ]
    labels = [each.label for each in treatments_of([made(n, **kind) for n, kind in enumerate(kinds)])]
    assert labels[:3] == [
        "participants 50, decimals 0 (1)",
        "participants 50, decimals 1 (2)",
        "participants 50, decimals 0 (3)",
    ]
    apart = [made(0, personas=None), made(1, personas="a")]
    assert [each.label for each in treatments_of(apart)] == ["no personas", "personas a"]
    random, mixed = made(0, agent_class=None), made(1, players="random=1/2,/a/x.py:C=1/2")
    labels = [each.label for each in treatments_of([random, mixed, made(2, agent_class="/a/x.py:C")])]
    assert labels == ["players random", "players random=1/2,C=1/2", "players C"]
    classes = [made(0, agent_class="/a/x.py:C"), made(1, agent_class="/b/x.py:C")]
    assert [each.label for each in treatments_of(classes)] == ["players C (1)", "players C (2)"]


def test_a_chart_has_the_colours_of_the_pages_and_is_the_same_every_time():
    assert len(set(COLOURS.values())) == len(COLOURS) and COLOURS["average"] == "#c8460b"

    def chart():
        def draw(axes):
            axes.plot([1, 2], [3, 4], marker="o", color="average")

        return page_chart('a "label" <b>', 2.0, draw)

    assert chart() == chart()
    assert 'aria-label="a &#34;label&#34; &lt;b&gt;"' in chart() and "stroke: var(--average)" in chart()
    assert "#" not in chart().replace("&#34;", "")  # no colour but by its variable


def test_settings_of_other_programs_change_no_chart(cluster, run, tmp_path):
    drawn = (run / "rounds.png").read_bytes()
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\nbackend: qtagg\n")
    command = [cluster.path / ".venv/bin/python", cluster.path / "main.py", "--role", "report", "--run-dir", run]
    env = os.environ | {"MPLBACKEND": "module://none.of_these", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run / "rounds.png").read_bytes() == drawn


def test_the_page_is_the_same_from_memory(told_apart, tmp_path):
    write_page(tmp_path / "report.html", page_content(told_apart, told_apart.analysis()))
    assert (tmp_path / "report.html").read_bytes() == (told_apart.path / "report.html").read_bytes()


def test_a_line_has_a_gap_at_a_round_without_a_figure():
    axes = Figure().add_subplot()
    draw_lines(axes, 3, {"average": {1: 30.0, 3: 10.0}})
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 30], [2, math.nan], [3, 10]])


def test_what_cannot_be_drawn_is_reported(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    saved = read_run(folder)
    (folder / "histogram.png").unlink()
    (folder / "histogram.png").mkdir()
    with pytest.raises(ResultsError, match=r"cannot write .*histogram\.png"):
        draw_all(saved)
    (folder / "answers.parquet").unlink()
    with pytest.raises(SettingsError, match=r"answers\.parquet is missing"):
        draw_all(read_run(folder))


def test_a_run_that_has_converged_counts_with_its_last_round_in_comparisons(saved):
    short = saved.summary | {"rounds": saved.summary["rounds"][:2], "converged_after": 2}
    short = replace(saved, summary=short, results=saved.results[:2])
    (treatment,) = treatments_of([short, saved])
    averages = [short.by_round("average")[2], saved.by_round("average")[3]]
    assert treatment.last == 3 and treatment.estimates("average")[3].runs == 2
    assert treatment.estimates("average")[3].mean == pytest.approx(sum(averages) / 2)
    last = treatment.last_round()
    assert last.round == 3 and last.tally == short.results[1].tally + saved.results[2].tally
    assert short.status_in_words == "complete, converged after round 2"


def test_the_data_of_a_comparison_have_the_analyses(saved):
    rows = [*csv.DictReader(csv_text([saved]).splitlines())]
    analyses = [result.analysis for result in saved.results]
    assert [float(row["analysis_steps_above"]) for row in rows] == [each["steps"]["above"] for each in analyses]
    assert [row["analysis_fall_mean"] for row in rows] == ["", *(str(each["fall"]["mean"]) for each in analyses[1:])]


def test_the_first_screen_says_who_played_and_how_they_reasoned(page, told_apart):
    show(page, told_apart.path / "report.html")
    text = page.locator("header").inner_text()
    counts = told_apart.tallies_by_part["education"][0]
    assert f"education: {', '.join(f'{each.asked} {name}' for name, each in counts.items())}." in text
