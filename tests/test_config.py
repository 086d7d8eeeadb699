"""Every setting is checked before anything starts, in one line that names flag, value and range."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, one_line

import main
from simulation.config import ROLES, SimulationConfig, flag_of
from simulation.errors import meant_by, nearest

BAD = [
    ("--max-value -1", "must be from 1 to 1,000,000,000"),
    ("--max-value 0", "must be from 1"),
    ("--max-value ten", "whole number"),
    ("--participant-num 0", "must be from 1"),
    ("--participant-num 1e6", "in digits such as 1000"),
    ("--server-per-host -5", "must be from 1"),
    ("--sleep-time -1", "must be from 0"),
    ("--sleep-time nan", "must be from 0"),
    ("--sleep-time soon", "must be a number"),
    ("--base-port 70000", "must be from 1 to 65535"),
    ("--base-port 65530", "would end at port 65543"),
    ("--seed -1", "must be from 0"),
    ("--ratio -1/2", "--ratio -1/2: must be from 1/1000000 to 10"),
    ("--offset -5", "--offset -5: must be from 0"),
    ("--rounds 0", "must be from 1"),
    ("--decimals 7", "must be from 0 to 6"),
    ("--dispatch both", "must be one of group, agent"),
    ("--agent-type robot", "must be one of random, llm"),
    ("--agent-type llm --model-configs nowhere.json", "nowhere.json"),
    ("--structured-output json", "must be one of structured_outputs, response_format, none"),
    ("--samples-per-request 0", "must be from 1"),
    ("--max-in-flight 0", "must be from 1 to 1,000,000"),
    ("--price-per-million-tokens -1", "must be from 0 to 1,000,000,000"),
    ("--lease 1", "must be from 2 to 86400"),
    ("--offset -0.5", "--offset -0.5: must be from 0 to 1,000,000,000,"),
    ("--max-tokens 0", "must be from 1"),
    ("--reply-timeout 0", "must be from 0.1"),
    ("--vllm-base-port 65535 --model-per-host 2", "would end beyond port 65535"),
    ("--role vllm", "MODEL_PATH"),
    ("--role main -- --max-model-len 5", "only flags for vLLM may follow --"),
    ("--role boss", "must be one of main, participant, ask, report"),
    ("--role ask", "give --run-dir"),
    ("--role ask --run-dir x --text=", "give --run-dir"),
    ("--role ask --run-dir x --text Why", "give --run-dir, --text, and --participant or --winner"),
    ("--role report", "give --run-dir"),
    ("--hosts a a", "none twice"),
    ("--min-servers 11", "there are 10 participant servers"),
    ("--heartbeat-timeout 0", "must be from 0.5"),
    ("--role report --resume runs/latest", "goes with --role main"),
    ("--hosts node1 localhost", "localhost is another machine on each of them"),
    ("--max-valu 5", "unrecognized arguments: --max-valu 5 (did you mean --max-value? --help lists all flags)"),
    ("--participant_num=5", "unrecognized arguments: --participant_num=5 (did you mean --participant-num?"),
    ("-hosts a b", "did you mean --hosts?"),
    ("--SEED 7", "did you mean --seed?"),
    ("--keep", "did you mean --keep-agents?"),
    ("--role ask --participants 3", "did you mean --participant?"),
    ("--role participant --statu", "did you mean --status?"),
    ("--model-pth x", "did you mean --model-path?"),
    ("--dispatch agnet", "must be one of group, agent; did you mean agent?"),
    ("--structured-output response", "none; did you mean response_format?"),
    ("--personas educaton", "did you mean education?"),
    ("--personas education --teams educaton", "it has education; did you mean education?"),
    ("--experiment configs/experiments/ratio.yaml", "No such file or directory; did you mean ratios.yaml?"),
    ("--prompts-file configs/prompt.yaml --agent-type llm", "did you mean prompts.yaml?"),
    ("--model-configs configs/models.json --agent-type llm", "cannot be read: No such file or directory; did you mean"),
    ("--seed", "expected one argument"),
    ("stray", "unrecognized arguments: stray (folders of runs go with --role report)"),
    ("--run-dir report stray", "unrecognized arguments: stray"),
    ("--role=report --run-dir x --colour red", "unrecognized arguments: --colour (--help"),
    ("--agent-class mine.py", "my_file.py:MyParticipant"),
    ("--agent-class nowhere.py:Mine", "there is no file"),
    ("--agent-class examples/level_l.py:LevelK", "there is no file examples/level_l.py; did you mean level_k.py?"),
    ("--agent-class examples/level_k.py:levelk", "derived from Participant; did you mean LevelK?"),
    ("--role report --run-dir nowhere", "summary.json"),
]


def main_py(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(("arguments", "expected"), BAD)
def test_bad_settings_are_one_line_and_status_2(arguments, expected):
    done = main_py(*arguments.split())
    message = one_line(done.stderr)
    assert done.returncode == 2 and done.stdout == ""
    assert expected in message


@pytest.mark.parametrize("role", ROLES)
def test_a_mistyped_flag_of_any_role_is_recognised(role):
    flags = main.flags_of(role)
    for flag in set(flags) - {"--help"}:
        middle = len(flag) // 2
        for mistyped in (
            flag.replace("-", "_"),
            flag[1:],
            flag.upper(),
            flag[:middle] + flag[middle + 1 :],
            flag + "x",
        ):
            assert meant_by(mistyped, flags) == f"did you mean {flag}?", mistyped
    assert meant_by("--zzz", flags) == "" and nearest("zzz", ["a", "b"]) == "known are a, b"


UNUSED = [
    ("--role participant --dry-run", "--dry-run: goes with --role main or vllm, not with --role participant"),
    ("--role participant --status --participant-num 3", "--participant-num: goes with --role main, not with"),
    ("--role report --rounds 3 --run-dir x", "--rounds: goes with --role main, not with --role report"),
    ("--role ask --seed 1 --run-dir x --text Why", "--seed: goes with --role main, not with --role ask"),
    ("--role vllm --hosts a b", "--hosts: goes with --role main, not with --role vllm"),
    ("--text Why", "--text: goes with --role ask, not with --role main"),
    ("--model-path x", "--model-path: goes with --role vllm, not with --role main"),
    ("--role vllm --make-key", "--make-key: goes with --role participant, not with --role vllm"),
    ("--role report --status", "--status: goes with --role participant or vllm, not with --role report"),
    ("--stop", "--stop: goes with --role participant or vllm, not with --role main"),
    ("--role participant --stop --base-port 1234", "--base-port: does not go with --stop"),
    ("--role participant --make-key --host-name a", "--host-name: does not go with --make-key"),
    ("--role vllm --stop --dry-run", "--dry-run: does not go with --stop"),
    ("--role vllm --status -- --max-model-len 5", "only flags for vLLM may follow --"),
    ("--role participant --owned", "--owned: goes with --launch"),
    ("--role report --draw x", "x: does not go with --draw"),
    ("--role ask --run-dir x --text Why --winner --participant 0", "--winner: does not go with --participant 0"),
    ("--experiment x --resume y", "--experiment: does not go with --resume"),
    ("--role boss --status", "must be one of main, participant"),
]


@pytest.mark.parametrize(("arguments", "expected"), UNUSED)
def test_what_the_role_does_not_use_is_refused(arguments, expected, capsys):
    assert main.main(arguments.split()) == 2
    assert expected in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("role", ["participant", "vllm", "report", "main"])
@pytest.mark.parametrize("pair", list(itertools.combinations(main.ACTIONS, 2)))
def test_each_pair_of_actions_is_refused(role, pair, capsys):
    assert main.main(["--role", role, *map(flag_of, pair)]) == 2
    assert one_line(capsys.readouterr().err)


@pytest.mark.parametrize("role", ROLES)
def test_help_lists_every_flag_of_a_role_with_what_holds_without_it(role, capsys, monkeypatch):
    for columns in (70, 100, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main.main(["--role", role, "--no-such-flag", "--help"]) == 0
        told = capsys.readouterr().out
        assert max(map(len, told.splitlines()[1:])) <= min(columns, 100)
    blocks = re.split(r"\n(?=  -|\n)", told)
    texts = {re.search(r"--[a-z-]+", each)[0]: " ".join(each.split()) for each in blocks if each.startswith("  -")}
    assert sorted(texts) == sorted(main.flags_of(role))
    settings = {flag_of(item.name): item for item in fields(SimulationConfig)}
    for flag, text in texts.items():
        assert text.count("(default: ") == 1 and text.endswith(")"), text
        assert "None" not in text and not re.search(r"\.0\b|e\+|[0-9]{6}", text.partition(" ")[2]), text
        if flag in settings and settings[flag].default is not None and not settings[flag].metadata["without"]:
            assert "(default: )" not in text
    for title in ("what to do:", *(["the game:", "the cluster:", "the results:"] if role == "main" else [])):
        assert title in told.splitlines()


def test_help_shows_defaults_and_bounds_as_people_write_them():
    settings = {item.name: item for item in fields(SimulationConfig)}
    for name, end in {
        "decimals": "; from 0 to 6 (default: 0)",
        "offset": " (default: 0)",
        "max_value": "; from 1 to 1,000,000,000 (default: 100)",
        "lease": "; from 2 to 86400 (default: 60)",
        "connect_timeout": "; from 0.1 to 3600 (default: 5)",
        "max_in_flight": "; from 1 to 1,000,000 (default: enough for 512 answers)",
        "winner": " (default: off)",
        "model_configs": " (default: configs/model_configs.json)",
        "hosts": " (default: localhost)",
    }.items():
        assert main.help_of(settings[name]).endswith(end), name
    done = main_py("--help")
    assert done.returncode == 0 and done.stderr == "" and "--seed N " in done.stdout
    assert "--role --help: must be one of main" in one_line(main_py("--role", "--help").stderr)
