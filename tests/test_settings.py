"""Every setting is checked before anything starts, in one line that names flag, value and range."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MODELS, NO_UTF8, ROOT, one_line

import main
from simulation import cli, files
from simulation.errors import SettingsError, meant_by, nearest
from simulation.files import files_in, shown
from simulation.hosts.pid_files import ProcessId
from simulation.results.run_directory import RunDirectory
from simulation.rpc.lean_import import add_extra_folders
from simulation.settings import ROLES, SETTINGS, SimulationConfig, flag_of

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
    ("--offset -0.5", "--offset -1/2: must be from 0 to 1,000,000,000,"),
    ("--max-tokens 0", "must be from 1"),
    ("--reply-timeout 0", "must be from 0.1"),
    ("--vllm-base-port 65535 --model-per-host 2", "would end at port 65536, beyond port 65535"),
    ("--max-attempts 2", "--max-attempts 2: does nothing with --agent-type random"),
    ("--prompts-file /nope.yaml", "--prompts-file /nope.yaml: does nothing with --agent-type random"),
    ("--allow-remote-model", "--allow-remote-model: does nothing with --agent-type random"),
    ("--agent-class examples/level_k.py:LevelK --reply-timeout 5", "--reply-timeout 5.0: does nothing with"),
    ("--experiment configs/experiments/ratios.yaml --agent-type random --prompt basic", "--prompt basic: does nothing"),
    ("--role vllm", "MODEL_PATH"),
    ("--role main -- --max-model-len 5", "only flags for vLLM may follow --"),
    ("--role boss", "must be one of main, participant, ask, report"),
    ("--role ask", "give --run-dir"),
    ("--role ask --run-dir x --text=", "give --run-dir"),
    ("--role ask --run-dir x --text Why", "give --run-dir, --text, and --participant or --winner"),
    ("--role report", "give --run-dir"),
    ("--hosts a a", "none twice"),
    ("--hosts Node1 b nODE1", "none twice"),
    ("--min-servers 11", "there are 10 participant servers"),
    ("--heartbeat-timeout 0", "must be from 0.5"),
    ("--role report --resume runs/latest", "goes with --role main"),
    ("--hosts node1 localhost", "localhost is another machine on each of them"),
    ("--max-valu 5", "unrecognized arguments: --max-valu 5 (did you mean --max-value? --help lists all flags)"),
    ("--participant_num=5", "unrecognized arguments: --participant_num=5 (did you mean --participant-num?"),
    ("-hosts a b", "did you mean --hosts?"),
    ("--SEED 7", "did you mean --seed?"),
    ("-h5", "unrecognized arguments: -h5 (--help lists all flags)"),
    ("—seed 7", "unrecognized arguments: —seed 7 (did you mean --seed?"),
    ("–max-value=5", "did you mean --max-value?"),
    ("--role report −run-dir x", "did you mean --run-dir?"),
    ("--gpus 2", "unrecognized arguments: --gpus 2 (--help lists all flags)"),
    ("--role vllm --gpus=2", "unrecognized arguments: --gpus=2 ("),
    ("--winner 3", "--winner: goes with --role ask, not with --role main"),
    ("--keep-agent", "did you mean --keep-agents?"),
    ("--role ask --participants 3", "did you mean --participant?"),
    ("--role participant --statu", "did you mean --status?"),
    ("--model-pth x", "did you mean --model-path?"),
    ("--dispatch agnet", "must be one of group, agent; did you mean agent?"),
    ("--structured-output response", "none; did you mean response_format?"),
    ("--personas educaton", "did you mean education?"),
    ("--personas education --teams educaton", "did you mean education? It has education"),
    ("--experiment configs/experiments/ratio.yaml", "No such file or directory; did you mean ratios.yaml?"),
    ("--agent-type llm --model-configs {models} --prompts-file configs/prompt.yaml", "did you mean prompts.yaml?"),
    ("--model-configs configs/models.json --agent-type llm", "cannot be read: No such file or directory; did you mean"),
    ("--seed", "expected one argument"),
    ("stray", "unrecognized arguments: stray (folders of runs go with --role report)"),
    ("--run-dir report stray", "unrecognized arguments: stray"),
    ("--role=report --run-dir x --colour red", "unrecognized arguments: --colour (--help"),
    ("--agent-class mine.txt", "my_file.py:MyParticipant"),
    ("--agent-class nowhere.py:Mine", "there is no file"),
    ("--agent-class examples/level_l.py:LevelK", "there is no file examples/level_l.py; did you mean level_k.py?"),
    ("--agent-class examples/level_k.py:levelk", "derived from Participant; did you mean LevelK?"),
    ("--role report --run-dir nowhere", "summary.json"),
]


def words_in(flags: str, path: object = "") -> list[str]:
    """Return the words of a command line, in which {} is a path and {models} the models as shipped."""
    return [word.format(path, models=MODELS) for word in flags.split()]


def main_py(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(("arguments", "expected"), BAD)
def test_bad_settings_are_one_line_and_status_2(command, capsys, arguments, expected):
    status = main.main(words_in(arguments))
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and expected in one_line(err)


@pytest.mark.parametrize(("arguments", "expected"), [BAD[0], BAD[-3], BAD[-1]])
def test_bad_settings_are_one_line_and_status_2_of_the_process(arguments, expected):
    done = main_py(*words_in(arguments))
    assert done.returncode == 2 and done.stdout == "" and expected in one_line(done.stderr)


def flags_of(role: str) -> list[str]:
    """Return the flags that the help page of a role shows."""
    return [flag_of(name) for name, flag in cli.FLAGS.items() if role in flag.roles and flag.about]


@pytest.mark.parametrize("role", ROLES)
def test_a_mistyped_flag_of_any_role_gets_a_suggestion(role):
    flags = flags_of(role)
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
    ("--role vllm --hosts a b", "--hosts: goes with --role main or participant or verify, not with --role vllm"),
    ("--text Why", "--text: goes with --role ask, not with --role main"),
    ("--model-path x", "--model-path: goes with --role vllm, not with --role main"),
    ("--role vllm --make-key", "--make-key: goes with --role participant, not with --role vllm"),
    ("--role report --status", "--status: goes with --role participant or vllm, not with --role report"),
    ("--stop", "--stop: goes with --role participant or vllm, not with --role main"),
    ("--role participant --stop --base-port 1234", "--base-port: does not go with --stop"),
    ("--role participant --make-key --host-name a", "--host-name: does not go with --make-key"),
    ("--role vllm --stop --dry-run", "--dry-run: does not go with --stop"),
    ("--role vllm --status -- --max-model-len 5", "only flags for vLLM may follow --"),
    ("--role participant --owned --stop", "--owned: does not go with --stop"),
    ("--role ask --run-dir x --text Why --winner --participant 0", "--winner: does not go with --participant 0"),
    ("--experiment x --resume y", "--experiment: does not go with --resume"),
    ("--role boss --status", "must be one of main, participant"),
]


@pytest.mark.parametrize(("arguments", "expected"), UNUSED)
def test_a_flag_that_the_role_does_not_use_is_refused(arguments, expected, capsys):
    assert main.main(arguments.split()) == 2
    assert expected in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["-why so low?", "-how come?", "- 5 or 6?", "--really, why?", "—and now?"])
def test_a_text_of_several_words_may_begin_with_a_dash(text):
    given, folders = cli.parse_flags(["--role", "ask", "--text", text, "--winner"], "ask")
    assert given == {"role": "ask", "text": text, "winner": True} and folders == []


@pytest.mark.parametrize("role", ["participant", "vllm", "report", "main"])
@pytest.mark.parametrize("pair", list(itertools.combinations(cli.ACTIONS, 2)))
def test_each_pair_of_actions_is_refused(role, pair, capsys):
    assert main.main(["--role", role, *map(flag_of, pair)]) == 2
    assert one_line(capsys.readouterr().err)


def test_two_roles_are_refused(capsys):
    assert main.main(["--role", "participant", "--server-per-host", "2", "--role=main", "--dry-run"]) == 2
    assert "--role participant and --role main: do not go together" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("role", ROLES)
def test_help_lists_every_flag_of_a_role_with_its_default(role, capsys, monkeypatch):
    for columns in (70, 100, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main.main(["--role", role, "--no-such-flag", "--help"]) == 0
        told = capsys.readouterr().out
        assert max(map(len, told.splitlines()[1:])) <= min(columns, 100)
    blocks = re.split(r"\n(?=  -|\n)", told)
    texts = {re.search(r"--[a-z-]+", each)[0]: " ".join(each.split()) for each in blocks if each.startswith("  -")}
    assert sorted(texts) == sorted(flags_of(role))
    settings = {flag_of(name): setting for name, setting in SETTINGS.items()}
    for flag, text in texts.items():
        assert text.count("(default: ") == 1 and text.endswith(")"), text
        assert "None" not in text and not re.search(r"\.0\b|e\+|[0-9]{6}", text.partition(" ")[2]), text
        if flag in settings and settings[flag].default is not None and not settings[flag].without:
            assert "(default: )" not in text
    for title in ("what to do:", *(["the game:", "the cluster:", "the results:"] if role == "main" else [])):
        assert title in told.splitlines()


def test_help_shows_readable_defaults_and_bounds():
    for name, end in {
        "decimals": "; from 0 to 6 (default: 0)",
        "offset": " (default: that of the game)",
        "max_value": "; from 1 to 1,000,000,000 (default: 100)",
        "lease": "; from 2 to 86400 (default: 60)",
        "connect_timeout": "; from 0.1 to 3600 (default: 5)",
        "max_in_flight": "; from 1 to 1,000,000 (default: enough for 512 answers)",
        "winner": " (default: off)",
        "model_configs": " (default: configs/model_configs.json)",
        "hosts": " (default: localhost)",
    }.items():
        assert SETTINGS[name].help.endswith(end), name
    done = main_py("--help")
    assert done.returncode == 0 and done.stderr == "" and "--seed N " in done.stdout
    assert "--role --help: must be one of main" in one_line(main_py("--role", "--help").stderr)


# --- Paths that people give -------------------------------------------------------------------------------------------


ONE_PATH = [
    name
    for name, each in SETTINGS.items()
    if each.path and name not in ("game", "compare_with", "players", "extra_pythonpath")
]
OUT_OF_REACH = {
    "closed to us": errno.EACCES,
    "leads in circles": errno.ELOOP,
    "too long": errno.ENAMETOOLONG,
    "stale handle": errno.ESTALE,
}
GIVEN_AS = [
    "--cluster-key-dir {}",
    "--role participant --cluster-key-dir {}",
    "--role participant --make-key --cluster-key-dir {}",
    "--role participant --model-configs {}",
    "--agent-type llm --model-configs {}",
    "--agent-type llm --model-configs {models} --prompts-file {}",
    "--personas education --personas-file {}",
    "--experiment {}",
    "--agent-class {}:Mine",
    "--resume {}",
    "--run-dir {}",
    "--role report {}",
    "--role report {} {}/other",
    "--role ask --participant 0 --text x --run-dir {}",
    "--role vllm --model-path {}",
]


@pytest.fixture(params=OUT_OF_REACH)
def out_of_reach(request, tmp_path, monkeypatch):
    """A path below a folder that the system does not let us see into."""
    path, number = tmp_path / "above/mine.py", OUT_OF_REACH[request.param]
    if number == errno.ELOOP:
        path.parent.symlink_to("above")
    elif number == errno.ENAMETOOLONG:
        path = tmp_path / ("a" * 300) / "mine.py"
    else:  # as root and on this disk, everything is in reach

        def closed(function):
            def called(name, *rest, **options):
                if isinstance(name, str | os.PathLike) and Path(name).is_relative_to(path.parent):
                    raise OSError(number, os.strerror(number), str(name))
                return function(name, *rest, **options)

            return called

        for name in ("stat", "lstat", "open", "mkdir", "listdir", "scandir", "readlink"):
            monkeypatch.setattr(os, name, closed(getattr(os, name)))
        monkeypatch.setattr(io, "open", closed(io.open))
    return path, os.strerror(number)


@pytest.mark.parametrize("flags", GIVEN_AS)
def test_an_inaccessible_path_is_one_line_and_status_2(command, out_of_reach, flags):
    path, trouble = out_of_reach
    status, err = command(*words_in(flags, path))
    assert status == 2 and trouble in one_line(err), err


@pytest.mark.parametrize("flags", GIVEN_AS)
@pytest.mark.parametrize("start", ["~", "~{user}", "$HOME", "${{HOME}}"])
def test_a_home_folder_is_expanded_in_every_path(command, tmp_path, monkeypatch, flags, start):
    user = pwd.getpwuid(os.getuid())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pwd, "getpwnam", lambda _: SimpleNamespace(pw_dir=str(tmp_path / "home")))
    (tmp_path / "home").write_text("a file, in which nothing can be")
    status, err = command(*words_in(flags, f"{start.format(user=user.pw_name)}/mine.py"))
    assert status in (2, 3) and "home/mine.py" in one_line(err), err  # 3: the run has kept no agents
    assert not list(tmp_path.glob("[~$]*")) and not list(ROOT.glob("[~$]*"))


def test_only_the_environment_of_the_checkout_is_repaired(monkeypatch, tmp_path):
    for prefix, fixed_on_resume in ((tmp_path / "another", True), (tmp_path / ".venv", False)):
        prefix.mkdir()
        (prefix / "installed-run").touch()
        monkeypatch.setattr(sys, "prefix", str(prefix))
        monkeypatch.setattr(cli, "CODE", tmp_path)
        assert f"{prefix} has no module x: " in cli.describe_damage(ModuleNotFoundError(name="x"))
        assert (prefix / "installed-run").exists() is fixed_on_resume


@pytest.mark.parametrize(
    ("module", "status", "said"),
    [
        ("grpc._channel", 2, "--install-only repairs"),
        ("simulation.runs.console", 1, "a defect of the program: ImportError"),
    ],
)
def test_a_missing_library_is_damage_and_a_missing_module_of_the_program_a_defect(
    monkeypatch, capsys, module, status, said
):
    def fail(*_):
        raise ImportError(f"cannot import name 'x' from {module!r}", name=module)

    monkeypatch.setattr(main, "play", fail)
    assert main.main(["--dry-run"]) == status and said in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["{}/closed/lib", "{}/file"])
def test_an_unreadable_extra_folder_is_refused_before_anything_starts(monkeypatch, tmp_path, text):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot read the folder .*: "):
        add_extra_folders(text.format(tmp_path))


def test_unreadable_pid_files_are_an_error(monkeypatch, tmp_path):
    (tmp_path / "1.pid").mkdir()  # reading it fails, also as root
    assert files_in(tmp_path, ".pid") == [tmp_path / "1.pid"] and files_in(tmp_path / "none", ".pid") == []
    with pytest.raises(SettingsError, match="cannot read "):
        ProcessId.read(tmp_path / "1.pid")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SettingsError, match="cannot read "):
        files_in(tmp_path / "loop", ".pid")


@pytest.mark.parametrize(
    ("text", "trouble"),
    [("", "is empty"), ("~no-such-user/x", "no home folder is known for ~no-such-user"), ("a\0b", "must be a path")],
)
def test_an_invalid_path_is_refused(text, trouble):
    for name in ONE_PATH:
        with pytest.raises(SettingsError, match=trouble):
            SimulationConfig(**{name: text})


def test_a_removed_working_directory_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert SimulationConfig(run_dir="/somewhere").run_dir == "/somewhere"
    assert shown("/somewhere") == "/somewhere"
    with pytest.raises(SettingsError, match="--run-dir x: the working directory cannot be found"):
        SimulationConfig(run_dir="x")


@pytest.mark.parametrize(
    ("given", "written", "read"),
    [
        ("{root}/my/x", "my/x", "{other}/my/x"),
        ("{link}/my/x", "my/x", "{other}/my/x"),  # by another name of the checkout
        ("{root}/../x", "{root}/../x", "{root}/../x"),
        ("/elsewhere/x", "/elsewhere/x", "/elsewhere/x"),
        ("{root}-2/x", "{root}-2/x", "{root}-2/x"),
    ],
)
def test_paths_inside_the_checkout_move_with_it(tmp_path, monkeypatch, given, written, read):
    places = {"root": tmp_path / "root", "link": tmp_path / "link", "other": tmp_path / "other"}
    places["root"].mkdir()
    places["link"].symlink_to("root")
    monkeypatch.setattr(files, "HOME", places["root"])
    names = [name for name in ONE_PATH if name != "experiment"]  # which excludes --resume
    folders = "{0}:{0}/lib".format(given.format(**places))
    said = SimulationConfig(**dict.fromkeys(names, given.format(**places)), extra_pythonpath=folders).to_json()
    assert {said[name] for name in names} == {written.format(**places)}
    monkeypatch.setattr(files, "HOME", places["other"])
    again = SimulationConfig.from_json(json.loads(json.dumps(said)))
    assert {getattr(again, name) for name in names} == {read.format(**places)}
    assert again.extra_pythonpath == "{0}:{0}/lib".format(read.format(**places))


def test_default_paths_of_an_earlier_version_belong_to_this_checkout():
    """It wrote all paths as absolute ones, of which some may have been given by hand."""
    said = SimulationConfig(agent_class="/old/a b/my/x.py:X", cluster_key_dir="/shared/.cluster").to_json()
    said |= {name: f"/old/a b/{said[name]}" for name in ("prompts_file", "personas_file", "model_configs")}
    again = SimulationConfig.from_json(said)
    assert again == SimulationConfig(agent_class=f"{ROOT}/my/x.py:X", cluster_key_dir="/shared/.cluster")


def test_resuming_a_run_does_not_create_its_key(command, tmp_path):
    run = shutil.copytree(ROOT / "tests/data/old_runs/random", tmp_path / "run")
    text = (run / "summary.json").read_text().replace("/srv/simulation/.cluster", str(tmp_path / "gone/keys"))
    (run / "summary.json").write_text(text)
    from main import main

    assert main(["--resume", str(run), "--rounds", "4"]) == 2
    assert not (tmp_path / "gone").exists()
    RunDirectory(run, resumed=True).close()  # the refused command holds no lock


# --- Texts in UTF-8 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("\ufeff", "\r\n")], ids=["LF", "byte order mark and CRLF"])
def test_files_and_arguments_are_in_utf8_whatever_the_locale(tmp_path, start, end):
    entry = {"config_name": "model_1", "model_type": "openai_chat", "model_name": "模型", "client_args": {}}
    entry["client_args"] = {"base_url": "http://localhost:8010/v1"}
    files = {
        "模.json": json.dumps([entry], ensure_ascii=False, indent=1),
        "prompts.yaml": "提示:\n  system: 你\n  instruction: 数字\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes((start + text.replace("\n", end)).encode())
    flags = ["--model-configs", tmp_path / "模.json", "--prompts-file", tmp_path / "prompts.yaml", "--prompt", "提示"]
    command = [sys.executable, ROOT / "main.py", "--dry-run", "--agent-type", "llm", *flags]
    done = subprocess.run(
        command, env={**os.environ, **NO_UTF8}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "; prompt \\u63d0\\u793a" in done.stdout and "model_1 is \\u6a21\\u578b at" in done.stdout


def test_an_argument_garbled_by_the_locale_is_restored(monkeypatch):
    import main

    monkeypatch.setattr(main.os, "fsencode", lambda text: text.encode("latin-1"))
    for malformed, meant in (("模型".encode().decode("latin-1"), "模型"), ("caf\xe9", "caf\xe9"), ("plain", "plain")):
        given, _ = cli.parse_flags(["--prompt", malformed, "--hosts", "a", malformed], "main")
        assert (given["prompt"], given["hosts"]) == (meant, ("a", meant))
