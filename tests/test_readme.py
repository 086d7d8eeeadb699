"""README: every command in it is run, and its participant of ten lines plays; the tables that name files and tests.

The commands with a language model are run by test_vllm.py, whose tests share the vLLM server that they start.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from own_files import own_files

README = (ROOT / "README.md").read_text()
RUN_ELSEWHERE = {
    "git clone": "by whoever reads this",
    "./run_tests.sh": "it is what runs this test",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands_in(block: str) -> list[str]:
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def write_python(checkout):
    """Write the participant and the game of README to their files, and return the content of both."""
    files = {"my_file.py" if "MyParticipant" in block else "market.py": block for block in blocks("python")}
    assert len(files) == 2 and len(files["market.py"].splitlines()) <= 25
    for name, content in files.items():
        (checkout.path / name).write_text(content)
    return files


def run_all(checkout, commands):
    """Run commands, and return what each printed."""
    printed = {}
    for command in commands:
        if command.startswith(tuple(RUN_ELSEWHERE)):
            continue
        words = shlex.split(command.partition("  #")[0])
        env = {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            env[name] = value
        if words[0] == ".venv/bin/python":
            words.pop(0)
        if words[:2] == ["-m", "pip"]:  # of the tests' own environment, which has it
            done = subprocess.run(
                [checkout.path / ".venv/bin/python", *words], capture_output=True, text=True, check=False
            )
        else:
            done = checkout.run(*words, env=env, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout
    return printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs(checkout):
    """Also where the checkout holds a file for each module of Python and of the libraries."""
    libraries = {path.stem for path in Path(pytest.__file__).parents[1].iterdir()}
    for name in {*sys.stdlib_module_names, *filter(str.isidentifier, libraries), "sitecustomize", "usercustomize"}:
        (checkout.path / f"{name}.py").write_text("raise SystemExit('imported in place of a module of Python')\n")
    write_python(checkout)
    checkout.cold = True
    commands = [command for block in blocks("shell") if "vllm" not in block for command in commands_in(block)]
    assert len(commands) >= 8
    run_all(checkout, commands)


def test_the_participant_of_ten_lines_plays(checkout):
    source = write_python(checkout)["my_file.py"]
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    summary = checkout.play("2", "50", "--rounds", "3", "--ratio", "2/3", "--agent-class", "my_file.py:MyParticipant")
    averages = [entry["average"] for entry in summary["rounds"]]
    assert averages[1] < averages[0] and averages[2] < averages[1]
    (checkout.path / "example.yaml").write_text(blocks("yaml")[0])
    planned = checkout.run("run_simulation.sh", "--experiment", "example.yaml", "--dry-run")
    assert planned.returncode == 0 and "in all: 12 runs" in planned.stdout, planned.stderr


def test_architecture_names_every_folder_and_readme_every_page():
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w./]+)`", row)}
    names = [name for name in own_files() if re.fullmatch(r"[^/]+\.py|simulation/.+\.py", name)]
    needed = {f"{Path(name).parent}/" if name.startswith("simulation/") else name for name in names}
    assert len(needed) > 10
    assert needed <= named, needed - named
    for path in re.findall(r"`((?:agents|cluster|game|hosts|llm|results|rpc|runs)/\w+\.py)`", text):
        assert (ROOT / "simulation" / path).exists(), path
    pages = [name for name in own_files() if re.fullmatch(r"docs/.+\.md", name)]
    linked = README + "".join((ROOT / name).read_text().replace("](", "](docs/") for name in pages)
    assert len(pages) > 5 and not [name for name in pages if f"]({name})" not in linked]


def test_every_test_named_in_faults_exists():
    table = (ROOT / "docs/faults.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", table)
    assert len(named) > 15
    for file, test in named:
        assert not test or f"def {test}(" in (ROOT / "tests" / file).read_text(), test


def test_the_averages_of_the_demo_model_are_those_of_its_runs():
    """Of the tables in docs/paper.md; the averages by level of education are not in summary.json."""
    table, section = (ROOT / "docs/paper.md").read_text().split("## With the demo model")
    rows = re.findall(r"^\| `(\w+)\.yaml` \| .*? \| (\d+) \| (.*?) \|$", section, re.MULTILINE)
    found = []
    for path in sorted((ROOT / "docs/runs").rglob("summary.json")):
        summary = json.loads(path.read_text())
        (played,) = summary["rounds"]
        width = 1.96 * played["std"] / math.sqrt(played["answered"])
        found.append((path.relative_to(ROOT / "docs/runs").parts[0], played["answered"], played["average"], width))
        assert (summary["status"], played["failed"]) == ("complete", 0) and summary["seconds"]["total"] < 600
    texts = [(name, str(count), f"{average:.1f} ± {width:.1f}") for name, count, average, width in found]
    assert sorted(rows) == sorted(texts) and len(rows) == 12
    for name in ("ratios", "prompts", "temperature"):
        (row,) = (line for line in table.splitlines() if f"`{name}.yaml`" in line and line.startswith("|"))
        averages = row.split("|")[-2].strip().split(", ")
        assert averages == [text for each, _, text in rows if each == name]
