"""The Python interface: each script below is a process of its own, as a user's is, with a home folder of its own."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, copy_checkout, until
from fake_model import FakeModel
from loguru import logger

import simulation
from simulation.errors import SettingsError

SMALL = "server_per_host=1, moderator_per_host=1, sleep_time=0"


class Python:
    """Scripts that import the program from a checkout, and their home folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / "home"
        path.mkdir(exist_ok=True)

    def start(self, text: str, name: str = "script.py") -> subprocess.Popen[str]:
        (self.path / name).write_text("import json, simulation\n" + textwrap.dedent(text))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "SIMULATION_HOME": str(self.home)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, str(self.path / name)]
        return subprocess.Popen(command, cwd=self.path, env=env, text=True, start_new_session=True, **streams)

    def run(self, text: str, stderr: str | None = "", name: str = "script.py"):
        """Run a script to its end, check what it writes to standard error, and return the JSON in its last line."""
        process = self.start(text, name)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert stderr is None or err == stderr
        assert self.servers() == []
        return json.loads(out.splitlines()[-1])

    def servers(self) -> list[psutil.Process]:
        """The launchers of these scripts' agent servers that have not ended."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd", "status"]):
            started = "--owned" in (process.info["cmdline"] or []) and process.info["cwd"] == str(self.home)
            if started and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return [each for each in found if each.ppid() not in {process.pid for process in found}]


@pytest.fixture(autouse=True)
def log_of_other_tests():
    """The interface keeps the log of the process silent, and other tests in this process read it."""
    yield
    logger.enable("simulation")
    logger.enable("agentscope")


@pytest.fixture
def python(tmp_path):
    own = Python(tmp_path / "a b")
    yield own
    left = own.servers()
    for process in left:
        process.kill()
    assert left == []


def test_a_run_as_tables(python):
    """Nothing is printed; the tables are what the files hold."""
    seen = python.run(f"""
        import signal
        run = simulation.play(participant_num=500, rounds=2, ratio=2 / 3, seed=7, {SMALL})
        again = simulation.read(run.path)
        print(json.dumps({{
            "rounds": run.rounds[["round", "answered", "average", "winning_number", "winners"]].to_dict("list"),
            "answers": [len(run.answers), run.answers.value[run.answers["round"] == 1].mean()],
            "summary": run.summary, "status": run.status, "path": str(run.path), "repr": repr(run),
            "same": again.rounds.equals(run.rounds) and again.answers.equals(run.answers),
            "report": [run.report._repr_html_().startswith("<iframe srcdoc="), run.report.path.exists()],
            "main": "main" in __import__("sys").modules,
            "handler": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        }}))
    """)
    summary = seen["summary"]
    assert summary == json.loads((Path(seen["path"]) / "summary.json").read_text())
    assert seen["status"] == "complete" and summary["config"]["ratio"] == "2/3" and summary["config"]["seed"] == 7
    assert seen["rounds"]["average"] == [entry["average"] for entry in summary["rounds"]]
    assert seen["rounds"]["winners"] == [entry["winners"]["count"] for entry in summary["rounds"]]
    assert seen["rounds"]["answered"] == [500, 500]
    assert seen["answers"] == [1000, pytest.approx(summary["rounds"][0]["average"], abs=0.001)]
    assert seen["same"] and seen["report"] == [True, True] and seen["handler"] and not seen["main"]
    assert seen["repr"] == f"<Run {summary['run_id']}: complete, 500 participants, rounds played: 2>"
    assert Path(seen["path"]).parent == python.home / "runs"
    assert not [*(python.home / "run").glob("python-*")]


def test_classes_and_games_travel_by_value(python):
    """A class of the script, a module beside it, a game; a class that has changed is played as it is now."""
    (python.path / "beside.py").write_text(
        "import simulation\nfrom further import BASE\n\n\nclass Beside(simulation.Participant):\n"
        "    async def answer(self, question):\n        return BASE + self.index % 2\n"
    )
    (python.path / "further.py").write_text("BASE = 30\n")
    (python.path / "tools.py").write_text("def double(number):\n    return 2 * number\n")
    seen = python.run("""
        import functools, tools
        from beside import Beside

        class Mine(simulation.Participant):
            level: int = 1
            async def answer(self, question):
                return 10 * self.level

        class Helped(Mine):
            @functools.cached_property
            def number(self):
                return tools.double(4)

            async def answer(self, question):
                return self.number

        class Sum(simulation.Game):
            places: int = simulation.setting(3, "places", 1, 10)
            low, high = 0, 1
            def rules(self):
                return simulation.Rules(f"0 or 1, {self.places} places.", goal="the highest payoff")
            def outcome(self, tally):
                return {"ones": int(tally.counts[tally.units == 1].sum())}
            def payoffs(self, units, outcome):
                return tools.double(units)
            def analyses(self, tallies, outcomes, pairs):
                return {"share": 0.5, "steps": 3}

        servers = simulation.servers(1, moderator_per_host=1).enter()
        few = dict(participant_num=20)
        first = simulation.play(participant=Mine, **few)

        class Mine(simulation.Participant):
            async def answer(self, question):
                return 77

        runs = [
            first,
            simulation.play(participant=Mine, **few),
            simulation.play(resume=first, rounds=2),
            simulation.play(participant=Beside, **few),
            simulation.play(players={Mine: "1/4", "random": 3 / 4}, sleep_time=0, **few),
            simulation.play(game=Sum, set={"places": 5}, sleep_time=0, **few),
            simulation.play(participant=Helped, **few),
            simulation.play(players={first: 1}, **few),
        ]
        servers.stop()
        print(json.dumps([[each.summary, str(each.path)] for each in runs]))
    """)
    averages = [[entry["average"] for entry in summary["rounds"]] for summary, _ in seen]
    assert averages[0] == [10] and averages[1] == [77] and averages[2] == [10, 10] and averages[3] == [30.5]
    assert averages[6:] == [[8], [10]] and len({path for _, path in seen}) == 7  # one was resumed
    for summary, path in seen[:4]:
        names = [each["name"] for each in summary["sources"]]
        assert len(names) == 2 and {Path(name).suffix for name in names} == {".pkl", ".txt"}
        assert all((Path(path) / "source" / name).exists() for name in names)
    source = next((Path(seen[1][1]) / "source").glob("*.txt")).read_text()
    assert "return 77" in source
    answered = (Path(seen[4][1]) / "summary.json").read_text()
    assert json.loads(answered)["rounds"][0]["max"] >= 77
    game = seen[5][0]
    assert game["rounds"][0]["outcome"]["ones"] > 0 and game["config"]["set"] == {"places": 5}
    assert game["rounds"][0]["analysis"] == {"share": 0.5, "steps": 3}
    assert "Analyses of the game" in (Path(seen[5][1]) / "report.html").read_text()


def test_a_class_that_is_defined_again_in_the_same_words_is_the_same(python):
    seen = python.run("""
        def define():
            class Mine(simulation.Participant):
                std: float = 1.0
                async def answer(self, question):
                    return 50
            return Mine

        servers = simulation.servers(1, moderator_per_host=1).enter()
        few = dict(participant_num=20)
        first = simulation.play(participant=define(), **few)
        resumed = simulation.play(resume=first, participant=define(), rounds=2)
        study = simulation.play(participant=define(), set={"std": [1, 10]}, **few)
        columns = [study.summary["set.std"].tolist(), study.rounds["std"].tolist(), study.answers.columns.is_unique]
        servers.stop()
        print(json.dumps([len(resumed.rounds), columns]))
    """)
    assert seen == [2, [[1.0, 10.0], [0.0, 0.0], True]]
    assert len([*(python.home / "run/python").glob("*.pkl")]) == 1


def test_a_study_of_lists_and_repeats(python):
    for number in (1, 2):
        (python.path / f"mine_{number}.py").write_text(
            "from participant import Participant\n\n\nclass Mine(Participant):\n"
            f"    async def answer(self, question):\n        return {number}\n"
        )
    seen = python.run("""
        class Mine(simulation.Participant):
            level: int = 1
            async def answer(self, question):
                return 10 * self.level

        servers = simulation.servers(1, moderator_per_host=1).enter()
        few = dict(participant_num=20)
        study = simulation.play(participant=Mine, set={"level": [1, 2]}, repeats=2, rounds=2, **few)
        sizes = simulation.play(participant_num=[10, 20], sleep_time=0)
        files = simulation.play(agent_class=["mine_1.py", "mine_2.py"], **few)
        more = simulation.play(resume=study, repeats=3)
        servers.stop()
        print(json.dumps({
            "summary": study.summary[["run", "level", "status", "average"]].to_dict("list"),
            "rounds": [list(study.rounds.columns[:3]), len(study.rounds)],
            "answers": study.answers.groupby("level").value.mean().to_dict(),
            "seeds": study.summary.seed.nunique(), "report": study.report.path.exists(),
            "sizes": sizes.summary.answered.tolist(), "repr": repr(study), "more": [len(more), more[5].status],
            "files": files.summary.average.tolist(),
            "old": simulation.read(study).summary.equals(more.summary),
        }))
    """)
    assert seen["summary"]["average"] == [10, 20, 10, 20] and {*seen["summary"]["status"]} == {"complete"}
    assert seen["summary"]["level"] == [1, 2, 1, 2] and seen["seeds"] == 2 and seen["report"]
    assert seen["rounds"] == [["run", "level", "seed"], 8] and seen["answers"] == {"1": 10, "2": 20}
    assert seen["sizes"] == [10, 20] and "4 of 4 runs, which differ in level" in seen["repr"]
    assert seen["more"] == [6, "complete"] and seen["old"] and seen["files"] == [1, 2]


def test_a_language_model(python):
    """With servers of several games, and with those of a single one."""
    with contextlib.closing(FakeModel()) as fake:
        seen = python.run(f"""
            class Terse(simulation.LLMParticipant):
                pass

            few = dict(participant_num=20, vllm_base_port={fake.port}, model_per_host=1)
            with simulation.servers(1, vllm_base_port={fake.port}, model_per_host=1):
                runs = [simulation.play(participant=Terse, **few), simulation.play(agent_type="llm", **few)]
            players = {{"llm": 0.25, "random": "3/4"}}
            runs.append(simulation.play(players=players, sleep_time=0, server_per_host=1, **few))
            plan = simulation.plan(agent_type="llm", **few)
            texts = [len(run.texts) for run in runs]
            print(json.dumps([[run.status for run in runs], texts, runs[0].answers.value.tolist(), plan]))
        """)
    status, texts, values, plan = seen
    assert status == ["complete"] * 3 and texts == [20, 20, 5] and len(values) == 20 and None not in values
    assert f"http://localhost:{fake.port}" in plan or f"http://127.0.0.1:{fake.port}" in plan


@pytest.mark.slow
def test_the_page_of_the_interface_plays(python):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    done = python.run("\n".join([*blocks, "print(json.dumps([run.status, len(study)]))"]))
    assert done == ["complete", 12]


def test_servers_for_several_games_and_questions(python):
    seen = python.run("""
        class Mine(simulation.Participant):
            async def answer(self, question):
                return self.index if question.round else 90

        with simulation.servers(2, moderator_per_host=1) as servers:
            ports = servers.settings["base_port"]
            runs = [simulation.play(participant=Mine, participant_num=20, keep_agents=True) for _ in range(2)]
            said = [runs[1].ask(17, "Why?"), runs[1].ask(None, "Why?")]
            try:
                simulation.play(server_per_host=3)
            except simulation.SettingsError as error:
                refused = str(error)
            try:
                runs[0].ask(17, "Why?")
            except simulation.ClusterError as error:
                gone = str(error)
        alone = simulation.play(participant=Mine, participant_num=20, keep_agents=True, server_per_host=1)
        said.append(alone.ask(3, "Why?"))
        alone.close()
        try:
            alone.ask(3, "Why?")
        except simulation.ClusterError as error:
            closed = str(error)
        used = [run.summary["config"]["base_port"] == ports for run in runs]
        print(json.dumps([said, refused, gone, closed, used]))
    """)
    said, refused, gone, closed, used = seen
    assert said == ["90", "90", "90"] and used == [True, True]
    assert refused == "server_per_host 3: the servers of this block have 2"
    assert "is no longer on localhost:" in gone and "localhost:" in closed


def test_a_thread_a_running_loop_and_after_an_error(python):
    seen = python.run("""
        import asyncio, threading
        few = dict(participant_num=20, server_per_host=1, moderator_per_host=1, sleep_time=0)
        errors = []
        for wrong in (
            {"participant_num": 0}, {"participants": 5}, {"ratio": 0.12345678912}, {"rounds": []}, {"rounds": "x"},
            {"participant": "my_file.py"}, {"agent_class": "my_file.py"}, {"hosts": "nowhere.invalid"},
            {"heartbeat_timeout": [1, 2]}, {"hook": 5}, {"hook": int},
            {"ratio": float("nan")}, {"hosts": 5}, {"set": "a=1"},
            {"set": {"a": None}}, {"participant": int}, {"players": {"random": 1}, "agent_class": "my_file.py"},
        ):
            try:
                simulation.play(**few | wrong)
            except simulation.SimulationError as error:
                errors.append(f"{type(error).__name__}: {error}")
        status = []

        def play():
            status.append(simulation.play(**few).status)

        thread = threading.Thread(target=play)
        thread.start()
        thread.join()

        async def notebook():
            play()

        asyncio.run(notebook())
        play()
        print(json.dumps([errors, status]))
    """)
    errors, status = seen
    assert errors[11:] == [
        "SettingsError: ratio nan: must be a finite number",
        "SettingsError: hosts (5,): must be names of hosts",
        "SettingsError: set 'a=1': must be a mapping, as {'noise': 5}",
        "SettingsError: set None: must be a number, a truth value or a text",
        "SettingsError: participant <class 'int'>: "
        "must be a class derived from simulation.Participant; agent_class takes a file",
        "SettingsError: players: does not go with agent_class; one of them says who plays",
    ]
    assert errors[9:11] == [
        "SettingsError: hook 5: must be a Hook, or a class derived from Hook",
        "SettingsError: hook int: must be derived from simulation.Hook",
    ]
    assert status == ["complete"] * 3
    assert errors[:4] == [
        "SettingsError: participant_num 0: must be from 1 to 1,000,000,000",
        "SettingsError: participants: is no setting; did you mean participant?",
        "SettingsError: ratio 0.12345678912: is not exact; write it as a text, such as '2/3' or '0.51'",
        "SettingsError: rounds: has an empty list; give at least one value",
    ]
    assert errors[4] == "SettingsError: rounds 'x': must be int, not str"
    assert "must be a class" in errors[5] and "there is no file my_file.py" in errors[6]
    assert errors[7].startswith("ClusterError: nowhere.invalid") and "give one value, not a list" in errors[8]


def test_failures_name_the_line_and_hooks_that_fail_are_told(python):
    seen = python.run("""
        class Wrong(simulation.Participant):
            async def answer(self, question):
                return self.nothing if question.round == 2 else 5

        class Raises(simulation.Hook):
            def round_finished(self, summary, folder):
                raise ValueError("no disk")

        few = dict(participant_num=20, server_per_host=1, moderator_per_host=1)
        run = simulation.play(participant=Wrong, rounds=2, hook=Raises(), **few)
        print(json.dumps([run.rounds.failed.tolist(), run.summary["rounds"][1]["failures"], run.warnings, repr(run)]))
    """)
    failed, causes, warnings, text = seen
    assert failed == [0, 20] and text.endswith("partial, 20 participants, rounds played: 2, failed answers: 20>")
    assert causes == {"AttributeError: 'Wrong' object has no attribute 'nothing' (script.py, line 5)": 20}
    assert warnings == ["hook: Raises.round_finished fails: ValueError: no disk (script.py, line 9)"] * 2


def test_an_interrupt_ends_the_game_and_returns_what_there_is(python):
    process = python.start("""
        class Slow(simulation.Participant):
            async def answer(self, question):
                if question.round == 2 and self.index % 2:
                    await self.think(3600)
                return 5

        class Tell(simulation.Hook):
            def round_finished(self, summary, folder):
                print("round", len(summary["rounds"]), flush=True)

        run = simulation.play(participant=Slow, participant_num=20, rounds=3, server_per_host=1, hook=Tell)
        print(json.dumps(run.summary), flush=True)
        print(simulation.play(resume=run, rounds=3, hook=Tell) and "resumed", flush=True)
    """)
    assert process.stdout.readline() == "round 1\n"
    progress = python.home / "runs/latest"
    until((progress / "control.json").exists, 60, "the run can be reached")
    done = until(lambda: _answers_of(progress), 60, "half of round 2 is answered")
    assert done == 10
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "round 2\n"
    summary = json.loads(process.stdout.readline())
    assert summary["status"] == "interrupted"
    assert [(entry["answered"], entry["failed"]) for entry in summary["rounds"]] == [(20, 0), (10, 10)]
    until(lambda: _answers_of(progress) == 10, 60, "half of round 2 is answered again")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "resumed" and err == "" and process.returncode == 0


def _answers_of(run: Path) -> int:
    """The answers so far of round 2, once there are 10; otherwise 0."""
    command = [sys.executable, ROOT / "main.py", "--role", "control", "--run-dir", run, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    state = json.loads(done.stdout)["run"] if done.returncode == 0 else None
    current = state and state["round"]
    return current["done"] if current and current["number"] == 2 and current["done"] == 10 else 0


def test_an_interrupt_while_the_servers_stop_loses_nothing(python):
    seen = python.run(f"""
        import os, signal
        import simulation.hosts.local_cluster as local_cluster

        def stop(*arguments, usual=local_cluster._stop_owned):
            os.kill(os.getpid(), signal.SIGINT)
            usual(*arguments)

        local_cluster._stop_owned = stop
        print(json.dumps(simulation.play(participant_num=5, {SMALL}).status))
    """)
    assert seen == "complete"


def test_processes_do_not_disturb_each_other(python, checkout):
    """Two scripts of one home folder and a shell play at once, and stop_all_server.sh leaves the scripts' servers."""
    python.home = checkout.path
    text = """
        class Waits(simulation.Participant):
            async def answer(self, question):
                while not __import__("os").path.exists("go"):
                    await self.think(0.05)
                return 5

        print("started", flush=True)
        run = simulation.play(participant=Waits, participant_num=20, server_per_host=2, moderator_per_host=1)
        print(json.dumps(run.status))
    """.replace('"go"', repr(str(python.path / "go")))
    scripts = [python.start(text, f"script_{number}.py") for number in range(2)]
    until(lambda: len(python.servers()) == 2, 60, "both have servers")
    assert checkout.play("2", "20", "--sleep-time", "0")["status"] == "complete"
    stopped = checkout.run("stop_all_server.sh")
    assert stopped.stdout == "no agent servers were running\n", stopped
    records = [*(checkout.path / "run").glob("python-*")]
    assert len(records) == 2 and len(python.servers()) == 2
    (python.path / "go").touch()
    for script in scripts:
        out, err = script.communicate(timeout=120)
        assert (out, err) == ('started\n"complete"\n', ""), (out, err)
    assert not [*(checkout.path / "run").glob("python-[0-9]*")]


def test_servers_end_with_a_process_that_is_killed(python):
    process = python.start(
        "servers = simulation.servers(1)\nprint('started', flush=True)\nimport time; time.sleep(600)"
    )
    assert process.stdout.readline() == "started\n"
    assert len(python.servers()) == 1
    process.kill()
    process.communicate()
    until(lambda: not python.servers(), 60, "the servers have ended")
    assert len([*(python.home / "run").glob("python-[0-9]*")]) == 1
    assert python.run(f"print(json.dumps(simulation.play(participant_num=5, {SMALL}).status))") == "complete"
    assert not [*(python.home / "run").glob("python-[0-9]*")]


def test_what_is_asked_for_is_shown(python):
    process = python.start(f"""
        simulation.play(participant_num=20, quiet=False, seed=1, {SMALL})
        print(simulation.plan(participant_num=20, rounds=3))
        print("---")
        simulation.play(participant_num=20, progress=True, {SMALL})
    """)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("Moderator: The average value is ") and "rounds: 3" in out and out.endswith("---\n")
    assert "init 20 random participant agents..." in err and "answers in: " in err


def test_the_import_is_lazy_and_its_names_exist():
    program = (
        "import sys, simulation; before = {*sys.modules}; print(sorted({*before} & {'numpy', 'pandas', 'loguru'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    for name in simulation.NAMES:
        assert getattr(simulation, name).__name__.startswith(name), name
    assert {*simulation.NAMES} <= {*dir(simulation)}
    with pytest.raises(AttributeError, match="no attribute 'plays'"):
        simulation.plays  # noqa: B018


def test_the_signature_is_that_of_the_settings():
    from simulation.settings import SETTINGS

    for function in (simulation.play, simulation.plan):
        parameters = inspect.signature(function).parameters
        of_main = {name for name, each in SETTINGS.items() if "main" in each.roles} - {"role", "dry_run", "json"}
        assert {*parameters} == of_main | {"participant", "progress"}
        for name in of_main - {"quiet", "set", "game", "hook", "players"}:
            assert parameters[name].default == SETTINGS[name].default
            assert f"{name}: {SETTINGS[name].help}" in function.__doc__


@pytest.mark.parametrize("folder", sorted((ROOT / "tests/data/old_runs").iterdir()), ids=lambda path: path.name)
def test_runs_of_earlier_versions_are_tables(folder):
    read = simulation.read(folder)
    for run in read.runs if isinstance(read, simulation.Study) else [read]:
        rounds = run.summary["rounds"]
        assert run.rounds["round"].tolist() == [entry["round"] for entry in rounds]
        assert run.answers.value.notna().sum() == sum(entry["answered"] for entry in rounds)
        assert len(run.answers) == sum(entry["asked"] for entry in rounds)
    with pytest.raises(SettingsError, match="is not written yet, or was removed"):
        _ = read.report


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs_in_a_clean_environment(tmp_path):
    """With the installed package, in an empty folder; then with an editable install of the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    copy_checkout(source)
    (source / ".venv").unlink()
    (source / ".venv-vllm").unlink()
    venv, work = tmp_path / "venv", tmp_path / "my work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = str(venv / "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    needed = ["-c", str(source / "constraints.txt"), str(source), "nbclient", "ipykernel"]
    done = subprocess.run([*pip, *needed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.copy2(source / "examples/python.ipynb", work)
    shutil.copy2(source / "examples/level_k.py", work)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SIMULATION_HOME")}
    program = (
        "import nbformat, sys\nfrom nbclient import NotebookClient\n"
        "book = nbformat.read('python.ipynb', 4)\nNotebookClient(book, timeout=300, kernel_name='python3').execute()\n"
        "outputs = [out for cell in book.cells for out in cell.get('outputs', [])]\n"
        "assert not [out for out in outputs if out.output_type == 'stream' and out.name == 'stderr'], outputs\n"
        "print(sum('text/html' in out.get('data', {}) for out in outputs))\n"
    )
    done = subprocess.run([python, "-c", program], cwd=work, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 3  # tables, and the report
    assert (work / "runs/latest/summary.json").exists() and (work / ".cluster").exists()
    summary = json.loads((work / "runs/latest/summary.json").read_text())
    assert summary["config"]["prompts_file"] == "configs/prompts.yaml"
    help_page = subprocess.run(
        [python, "-m", "simulation", "--help"], cwd=work, capture_output=True, text=True, check=False
    )
    assert help_page.returncode == 0 and "--participant-num" in help_page.stdout
    done = subprocess.run([*pip, "--no-deps", "-e", str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    program = f"import simulation\nprint(simulation.play(participant_num=5, {SMALL}).path)"
    done = subprocess.run([python, "-c", program], cwd=work, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and Path(done.stdout.strip()).parent == source / "runs", done.stderr
