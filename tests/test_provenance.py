"""What a run folder keeps of a run: versions, users' files, and all that plays the same game again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, one_line

import main
from simulation.llm.model_configs import read_models, settings_hash
from simulation.provenance import experiment_text, with_copies
from simulation.rpc.messages import CODE_VERSION
from simulation.runs.experiment import Experiment
from simulation.settings import SimulationConfig

MINE = """
import helper
from participant import Participant
from simulation.game.rules import draw

class Mine(Participant):
    async def answer(self, question):
        import late
        return helper.shift(draw(self.game, question.round, self.index) / 20, late.ADDED)
"""
HELPER = "def shift(number, added):\n    return number + added + {more}\n"
PERSONAS = "jobs:\n- {name: baker, share: 1/2}\n- {name: smith, share: 1/2}\n"


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "my own, 1"  # with a comma, as in mixtures
    folder.mkdir()
    for name, text in {"mine.py": MINE, "helper.py": HELPER.format(more=1), "late.py": "ADDED = 10\n"}.items():
        (folder / name).write_text(text)
    (folder / "experiment.yaml").write_text(PERSONAS)  # a name that the folder of the copies uses, too
    return folder


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_is_repeated_from_its_folder_alone(cluster, mine, tmp_path):
    started = datetime.now().astimezone()
    flags = ("--agent-class", f"{mine}/mine.py", "--personas", "jobs", "--personas-file", f"{mine}/experiment.yaml")
    flags = (*flags, "--teams", "jobs", "--rounds", "2", "--ratio", "2/3", "--decimals", "1", "--max-value", "70")
    (mine / "people.yaml").write_text("{source: my course, max_value: 70, numbers: [1, 2, 3]}")
    flags = (*flags, "--compare-with", f"{mine}/people.yaml")
    summary = cluster.play("3", "12", *flags)
    run = cluster.path / "runs/latest"
    names = {
        "mine.py": "mine.py",
        "helper.py": "helper.py",
        "late.py": "late.py",
        "2/experiment.yaml": "experiment.yaml",
        "people.yaml": "people.yaml",
    }
    assert {each["name"]: (each["file"], each["sha256"]) for each in summary["sources"]} == {
        name: (f"{mine}/{file}", sha256_of(mine / file)) for name, file in names.items()
    }
    kept = {str(path.relative_to(run / "source")): path for path in (run / "source").rglob("*") if path.is_file()}
    assert {*kept} == {*names, "experiment.yaml"}
    assert all(kept[name].read_bytes() == (mine / file).read_bytes() for name, file in names.items())
    assert summary["config"]["agent_class"] == f"{mine}/mine.py" and summary["model_settings"] is None
    assert timedelta(seconds=-1) < datetime.fromisoformat(summary["started"]) - started < timedelta(seconds=60)
    assert summary["program"] == {"version": "0.1.0", "code": CODE_VERSION, "git": None}  # the checkout is a copy
    assert {"agentscope", "numpy", "pyarrow"} < {*summary["packages"]} and "vllm" not in summary["packages"]
    assert summary["packages"]["numpy"] == version("numpy") and re.fullmatch(r"3\.1\d\.\d+\S*", summary["python"])
    assert "resumed" not in summary
    settings = yaml.safe_load(kept["experiment.yaml"].read_text())
    assert settings["agent_class"] == "mine.py" and settings["personas_file"] == "2/experiment.yaml"
    assert settings["seed"] == summary["config"]["seed"] and "prompts_file" not in settings

    answers, elsewhere = cluster.answers(), tmp_path / "elsewhere"
    people = json.loads((run / "human.json").read_text())["people"]
    assert people == [{"name": "people", "source": "my course", "max_value": 70, "numbers": [1, 2, 3]}]
    assert "Source: my course" in (run / "report.html").read_text()
    for name, shown in (("none", 0), (f"{mine}/people.yaml", 1)):
        done = cluster.run("main.py", "--role", "report", "--compare-with", name, "runs/latest")
        assert done.returncode == 0 and (run / "report.html").read_text().count("<h2>Beside people") == shown, (
            done.stderr
        )
    shutil.copytree(run / "source", elsewhere)
    shutil.rmtree(mine)
    shutil.rmtree(run.resolve())
    done = cluster.run(
        "run_simulation.sh", "--experiment", str(elsewhere / "experiment.yaml"), "--server-per-host", "3"
    )
    assert done.returncode == 0, done.stderr
    assert cluster.answers() == answers and answers[0]["value"] != answers[1]["value"]
    assert json.loads((run / "human.json").read_text())["people"] == people  # without a flag: from the copy
    again = cluster.summary()
    rounds = [[{**each, "seconds": 0} for each in one["rounds"]] for one in (summary, again)]
    assert rounds[0] == rounds[1]
    assert [each["sha256"] for each in again["sources"]] == [each["sha256"] for each in summary["sources"]]


SHORT = "from participant import Participant\nclass Mine(Participant):\n    async def answer(self, question):\n"


def changes_in(log: str, path: Path, before: str) -> list[str]:
    """The lines of the log that say that this file has changed, with both hashes."""
    return [line for line in log.splitlines() if str(path) in line and before in line and sha256_of(path) in line]


def test_a_resumed_run_plays_what_it_was_started_with(cluster, mine, tmp_path):
    (mine / "mine.py").write_text(f"import helper\n{SHORT}        return 20 + helper.shift(0, 0)\n")
    cluster.play("3", "4", "--agent-class", f"{mine}/mine.py:Mine")
    before = sha256_of(mine / "helper.py")
    unchanged = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert unchanged.returncode == 0 and "WARNING" not in unchanged.stderr
    (mine / "helper.py").write_text(HELPER.format(more=50))  # alone: the file that imports it is the same
    played = cluster.summary()
    assert "resumed" not in played
    (cluster.path / "runs/latest/summary.json").write_text(json.dumps(played | {"python": "3.11.0"}))
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3")
    assert done.returncode == 0 and len(changes_in(done.stderr, mine / "helper.py", before)) == 1, done.stderr
    assert cluster.values() == [21] * 12
    (other,) = cluster.summary()["resumed"]
    assert other["round"] == 3 and other["python"] == played["python"] and other["program"] == played["program"]
    assert cluster.summary()["python"] == "3.11.0" and cluster.summary()["started"] == played["started"]
    shutil.rmtree(mine)
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "4")
    assert done.returncode == 0 and cluster.values() == [21] * 16
    summary = cluster.summary()
    assert summary["config"]["agent_class"] == f"{mine}/mine.py:Mine"
    run = cluster.path / "runs/latest"
    assert yaml.safe_load((run / "source/experiment.yaml").read_text())["rounds"] == 4

    copy, text = run / "source/helper.py", (run / "summary.json").read_text()
    copy.write_text("1/0\n")
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "5")
    assert done.returncode == 2 and {before, sha256_of(copy)} <= {*re.findall(r"[0-9a-f]{64}", one_line(done.stderr))}
    copy.unlink()
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "5")
    assert done.returncode == 2 and f"source/helper.py, with the SHA-256 {before}: No such" in one_line(done.stderr)
    assert (run / "summary.json").read_text() == text


@pytest.mark.slow
def test_a_resumed_experiment_plays_what_it_was_started_with(cluster, tmp_path):
    files = [tmp_path / name / "mine.py" for name in ("one", "two")]
    for file, number in zip(files, (10, 20), strict=True):
        file.parent.mkdir()
        file.write_text(f"{SHORT}        return {number}\n")
    (tmp_path / "sweep.yaml").write_text(
        "agent_class: [one/mine.py:Mine, two/mine.py]\nparticipant_num: 4\nprompts_file: none.yaml\n"
    )
    done = cluster.run("run_simulation.sh", "--experiment", f"{tmp_path}/sweep.yaml", "--server-per-host", "3")
    assert done.returncode == 2 and "prompts_file" in one_line(done.stderr)  # nothing would read it
    text = (tmp_path / "sweep.yaml").read_text().replace("prompts_file: none.yaml\n", "")
    (tmp_path / "sweep.yaml").write_text(text)
    done = cluster.run("run_simulation.sh", "--experiment", f"{tmp_path}/sweep.yaml", "--server-per-host", "3")
    assert done.returncode == 0, done.stderr
    sweep = cluster.path / "runs/latest"
    assert (sweep / "source/mine.py").read_text() == files[0].read_text()
    assert (sweep / "source/2/mine.py").read_text() == files[1].read_text()
    first, second = (sweep / each["folder"] for each in json.loads((sweep / "sweep.json").read_text())["runs"])
    assert (second / "source/mine.py").read_text() == files[1].read_text()
    shutil.copytree(sweep / "source", tmp_path / "elsewhere/source")
    shutil.copy(sweep / "experiment.yaml", tmp_path / "elsewhere")
    shutil.rmtree(second)  # as if it had not been started
    hashes = [*map(sha256_of, files)]
    for file in files:
        file.write_text(f"{SHORT}        return 90\n")
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert [len(changes_in(done.stderr, *each)) for each in zip(files, hashes, strict=True)] == [1, 1], done.stderr
    assert {row["value"] for row in cluster.answers(first)} == {10}
    assert {row["value"] for row in cluster.answers(second)} == {20}
    summary = json.loads((second / "summary.json").read_text())
    assert summary["sources"] == [{"name": "mine.py", "file": str(files[1]), "sha256": hashes[1]}]
    assert (second / "source/mine.py").read_text() == f"{SHORT}        return 20\n"
    (sweep / "source/2/mine.py").write_text("")
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "3")
    assert done.returncode == 2 and hashes[1] in one_line(done.stderr)
    done = cluster.run(
        "run_simulation.sh", "--experiment", f"{tmp_path}/elsewhere/experiment.yaml", "--server-per-host", "3"
    )
    assert done.returncode == 0, done.stderr
    values = [
        [row["value"] for row in cluster.answers(run)] for run in sorted((cluster.path / "runs/latest").glob("0*"))
    ]
    assert values == [[10] * 4, [20] * 4]


def test_the_experiment_of_a_sweep_gives_the_same_runs(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "set: {statistic: [mean, median], offset: 1/2}\nratio: [1/2, 2/3]\nseed: 5\nrounds: 3\ndecimals: [1]\n"
        "players: ['random', 'random=1/2,mine.py:Mine=1/2']\npersonas: [null, education]\n"
        "participant_num: 7\nrepeats: 3\n"
    )
    (tmp_path / "mine.py").write_text(f"{SHORT}        return 3\n")
    sweep = Experiment(str(tmp_path / "sweep.yaml"), {}).sweep
    kept = tmp_path / "kept"
    kept.mkdir()
    configs = [*sweep.configs.values()][: sweep.combinations]
    text = experiment_text("a sweep", configs, {f"{tmp_path}/mine.py": "mine.py"}, sweep.varies, sweep.repeats)
    (kept / "experiment.yaml").write_text(text)
    again = Experiment(str(kept / "experiment.yaml"), {}).sweep
    assert len(again.configs) == 48 and again.varies == sweep.varies and again.repeats == 3
    assert [*again.configs] == [*sweep.configs]
    moved = {
        name: with_copies(each, {f"{tmp_path}/mine.py": f"{kept}/mine.py"}) for name, each in sweep.configs.items()
    }
    assert again.configs == moved


def test_an_edited_class_changes_no_run_that_was_started_before(cluster, tmp_path):
    """Neither groups that are created again after a lost server nor later runs of an experiment."""
    path = tmp_path / "mine.py"
    edit = f"open({str(path)!r}, 'w').write('1/0')"
    path.write_text(f"import os\n{SHORT}        {edit} if self.index == 0 else None\n        return 20\n")
    (tmp_path / "sweep.yaml").write_text("agent_class: mine.py\nparticipant_num: 4\nratio: [1, 1/2]\n")
    done = cluster.run("run_simulation.sh", "--experiment", f"{tmp_path}/sweep.yaml", "--server-per-host", "3")
    assert done.returncode == 0, done.stderr
    assert path.read_text() == "1/0"
    sweep = cluster.path / "runs/latest"
    runs = [sweep / each["folder"] for each in json.loads((sweep / "sweep.json").read_text())["runs"]]
    assert [{row["value"] for row in cluster.answers(run)} for run in runs] == [{20}, {20}]
    sources = [json.loads((run / "summary.json").read_text())["sources"][0] for run in runs]
    assert sources[0]["sha256"] == sources[1]["sha256"] == sha256_of(sweep / "source/mine.py")


CUSTOM = """
from simulation.game import Game, Rules, setting

class Fixed(Game):
    wanted: int = setting(7, "the number that wins", 0, 100)

    def rules(self):
        return Rules("choose a number.", f"the number {self.wanted + MORE}")

    def outcome(self, tally):
        return {"winning_number": self.wanted + MORE}

    def payoffs(self, units, outcome):
        return -abs(units - self.wanted - MORE)
"""


def test_games_and_mixtures_are_kept_as_a_class_is(cluster, tmp_path):
    """The copies count the rounds before a resume again, too."""
    path = tmp_path / "fixed.py"
    path.write_text(f"MORE = 1\n{CUSTOM}")
    own = [tmp_path / "one/mine.py", tmp_path / "two, 2/mine.py"]
    for file in own:
        file.parent.mkdir()
        file.write_text(f"{SHORT}        return {len(str(file)) % 7}\n")
    flags = ("--game", f"{path}:Fixed", "--set", "wanted=20", "--sleep-time", "0", "--max-value", "70")
    players = f"random=1/2,{own[0]}=1/4,{own[1]}:Mine=1/4"
    summary = cluster.play("3", "40", *flags, "--players", players)
    hashed, answers = sha256_of(path), cluster.answers()
    names = {"fixed.py": path, "mine.py": own[0], "2/mine.py": own[1]}
    assert {each["name"]: each["file"] for each in summary["sources"]} == {name: str(names[name]) for name in names}
    path.write_text(f"MORE = 2\n{CUSTOM}")
    own[1].write_text(f"{SHORT}        return 70\n")
    done = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--rounds", "2")
    assert done.returncode == 0 and len(changes_in(done.stderr, path, hashed)) == 1, done.stderr
    resumed = cluster.summary()
    assert resumed["rounds"][0] == summary["rounds"][0]
    assert [each["winning_number"] for each in resumed["rounds"]] == [21, 21]
    elsewhere = Path(shutil.copytree(cluster.path / "runs/latest/source", tmp_path / "elsewhere"))
    shutil.rmtree(own[0].parent)
    path.unlink()
    done = cluster.run(
        "run_simulation.sh", "--experiment", str(elsewhere / "experiment.yaml"), "--server-per-host", "3"
    )
    assert done.returncode == 0, done.stderr
    again = cluster.summary()
    assert [each["winners"] for each in again["rounds"]] == [each["winners"] for each in resumed["rounds"]]
    assert [row for row in cluster.answers() if row["round"] == 1] == answers
    values = [
        [row["value"] for row in cluster.answers() if row["round"] == number and row["kind"] != "random"]
        for number in (1, 2)
    ]
    assert values[0] == values[1] and len({*values[0]}) == 2


OLD_RUNS = ROOT / "tests/data/old_runs"


def test_a_report_shows_versions_and_runs_no_code_of_the_run_folder(command, capsys, tmp_path):
    run = Path(shutil.copytree(OLD_RUNS / "level_k", tmp_path / "run"))
    status, _ = command("--role", "report", "--run-dir", run)
    assert status == 0 and "Started" not in (run / "report.html").read_text()
    (run / "source").mkdir()
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    for name in ("level_k.py", "sitecustomize.py", "json.py"):
        (run / "source" / name).write_text(code)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"started": "2026-11-26T20:00:01+01:00", "python": "3.11.9", "packages": {"numpy": "2.0.0"}}
    summary["program"] = {"version": "0.1.0", "code": "0123456789ab", "git": "a" * 40}
    file = "examples/level_k.py"
    summary["sources"] = [{"name": "level_k.py", "file": file, "sha256": sha256_of(run / "source/level_k.py")}]
    (run / "summary.json").write_text(json.dumps(summary))
    status = main.main(["--role", "report", "--run-dir", str(run)])
    out = capsys.readouterr().out
    line = "started 2026-11-26 20:00:01+01:00, program 0.1.0, code 0123456789ab, commit aaaaaaaaaa, Python 3.11.9"
    assert status == 0 and out.count(line) == 1
    page = (run / "report.html").read_text()
    assert line.removeprefix("started ") in page
    assert not (tmp_path / "executed").exists()


def test_changed_settings_of_models_are_refused_on_resume(command, tmp_path):
    run = Path(shutil.copytree(OLD_RUNS / "language_model", tmp_path / "run"))
    entry = {"config_name": "m", "model_type": "openai_chat", "model_name": "participant-model", "api_key": "secret"}
    models = tmp_path / "models.json"

    def resumed(**changes):
        host = changes.pop("host", "localhost")
        client = {"client_args": {"base_url": f"http://{host}:8123/v1", "timeout": 3}}
        models.write_text(json.dumps([entry | client | {"config_name": "model_1"} | changes]))
        return command("--resume", run, "--rounds", "3", "--dry-run", "--model-configs", models)

    assert resumed()[0] == 0  # the run of an older version, which kept no hash
    config = SimulationConfig(agent_type="llm", model_configs=str(models))
    known = settings_hash([*read_models(config).values()], named=False)
    summary = json.loads((run / "summary.json").read_text()) | {"model_settings": known, "sources": []}
    (run / "summary.json").write_text(json.dumps(summary))
    assert resumed(host="127.0.0.1", api_key="other") == (0, "")
    status, text = resumed(generate_args={"temperature": 0.5})
    hashes = re.findall(r"[0-9a-f]{64}", one_line(text))
    assert status == 2 and len({*hashes}) == 2 and known in hashes


def test_a_second_run_in_the_same_process_plays_the_edited_class(cluster, command, tmp_path):
    """As in a notebook. A refused or planned resume leaves the folder unlocked."""
    path, run = tmp_path / "mine.py", tmp_path / "run"
    flags = ("--cluster-key-dir", cluster.path / ".cluster", "--base-port", cluster.base_port, "--server-per-host", "3")
    for number in (20, 70):
        path.write_text(f"{SHORT}        return {number}\n")
        folder = f"{run}-{number}"
        status, err = command(*flags, "--participant-num", "4", "--agent-class", path, "--run-dir", folder)
        assert status == 0 and {row["value"] for row in cluster.answers(Path(folder))} == {number}, err
    folder = f"{run}-20"  # whose class is now another one
    for more, expected in (("--dry-run", 0), ("--max-value=7", 2), ("--rounds=2", 0)):
        status, err = command(*flags[:2], "--resume", folder, more)
        assert status == expected, err
    assert [row["value"] for row in cluster.answers(Path(folder))] == [20] * 8
