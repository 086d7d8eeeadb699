"""Experiments: files that people write, what is wrong with them, and the runs of all combinations."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import signal
import threading
from dataclasses import replace
from fractions import Fraction

import numpy
import psutil
import pytest
import scipy.stats
from conftest import MODELS, ROOT, drafts_in, one_line, until
from hypothesis import assume, given
from hypothesis import strategies as st
from waiting import Gates

from simulation.errors import SettingsError
from simulation.llm.model_configs import read_models
from simulation.runs.experiment import MOST_RUNS, Experiment, Sweep, repeat_seeds
from simulation.runs.scenario import read_population, read_prompt
from simulation.settings import SimulationConfig

GREEDY = """
from participant import Participant
class Greedy(Participant):
    async def answer(self, question):
        if self.index == 3 and question.max_value == 20:
            raise ValueError("I pass")
        return question.max_value
"""


@pytest.fixture
def refused(tmp_path, capsys):
    """Call the command line with a file, and return its error: status 2, one line, nothing made and nothing started."""
    handler = signal.getsignal(signal.SIGINT)
    from loguru import logger

    import main

    def run(file, text, *arguments):
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        runs, children = {*(ROOT / "runs").glob("*")}, psutil.Process().children()
        status = main.main(["--model-configs", str(MODELS), *map(str, arguments)])
        assert status == 2 and {*(ROOT / "runs").glob("*")} == runs and psutil.Process().children() == children
        out, err = capsys.readouterr()
        assert out == ""
        return one_line(err).removeprefix("error: ").replace(str(tmp_path / file), file)

    yield run
    logger.remove()
    signal.signal(signal.SIGINT, handler)


SEEDS_OF_7 = [7, 2252048671, 1297677266]
LLM = "agent_type: llm\n"
ENTRY = {"model_type": "openai_chat", "model_name": "m", "client_args": {"base_url": "http://localhost:8010/v1"}}
BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '1'] * 20)}]\n" for n in range(9))
BAD = {
    "tab": ("rounds: 2\nratio:\n\t- 1\n", "x.yaml, line 3: has a tab outside quotes"),
    "nearest name": ("rounds: 2\n\nratoi: 1\n", "x.yaml, line 3: ratoi is not known here; did you mean ratio?"),
    "no name near": ("zzz: 1\n", "line 1: zzz is not known here; known are about, agent_type, agent_class"),
    "cluster": ("hosts: [a, b]\n", "hosts is not a setting of the game; give it on the command line as --hosts"),
    "cluster's flag": ("server-per-host: 3\n", "give it on the command line as --server-per-host"),
    "ratio 0": ("rounds: 2\nratio: 0\n", "x.yaml, line 2: ratio 0: must be from 1/1000000 to 10, as a fraction"),
    "one of a list": ("ratio:\n- 1/2\n- 11\n", "x.yaml, line 3: ratio 11: must be from 1/1000000 to 10"),
    "offset": ("offset: -1\n", "line 1: offset -1: must be from 0 to 1,000,000,000"),
    "enormous": ("ratio: 1e999999999\n", "ratio 1e999999999: must be a number such as 2/3 or 0.51"),
    "enormous seed": (f"seed: {'9' * 300}\n", "line 1: seed 999"),
    "no digits": ("participant_num: 1e6\n", "participant_num '1e6': must be a whole number, in digits such as 1000"),
    "choice": ("agent_type: robot\n", "line 1: agent_type robot: must be one of random, llm"),
    "twice": ("ratio: 1\nrounds: 1\nratio: 1\n", "x.yaml, line 3: ratio is already set in line 1"),
    "same value": ("ratio: [1/2, 1,\n 0.5]\n", "x.yaml, line 2: ratio 1/2 is in the list twice"),
    "list in list": ("ratio: [1, [2]]\n", "ratio must be a value or a list of values, not a list inside a list"),
    "mapping": ("ratio: {a: 1}\n", "ratio must be a value or a list of values, not a mapping"),
    "empty list": ("ratio: []\n", "line 1: ratio has an empty list"),
    "no value": ("rounds: 2\nratio:\n", "x.yaml, line 2: ratio has no value"),
    "no value in a list": ("rounds:\n- 1\n-\n", "x.yaml, line 3: rounds has no value"),
    "null": ("rounds: null\n", "line 1: rounds must be a value or a list of values, not null"),
    "list of repeats": ("ratio: 1\nrepeats: [2, 3]\n", "x.yaml, line 2: repeats must be one number, not a list"),
    "no repeat": ("repeats: 0\n", "x.yaml, line 1: repeats 0: must be from 1 to 1000"),
    "repeated combinations": ("ratio: [1, 1/2, 1/3]\nrepeats: 400\n", "x.yaml, line 1: has 3 combinations, each "
        "played 400 times; the maximum is 1,000"),
    "about": ("about: [1]\n", "line 1: about must be text"),
    "no mapping": ("- ratio: 1\n", "x.yaml, line 1: must be a mapping"),
    "empty": ("# nothing yet\n", "x.yaml: is empty"),
    "no YAML": ("ratio: 1\nrounds: 2: 3\n", "x.yaml, line 2: is not YAML: mapping values are not allowed here"),
    "two documents": ("ratio: 1\n---\nratio: 2\n", "line 2: is not YAML: but found another document"),
    "tab before a value": ("rounds: 2\nratio:\t1\n", "x.yaml, line 2: has a tab outside quotes, where "
        "YAML allows only spaces"),
    "tab after a value": ("ratio: 1\t# half\n", "x.yaml, line 1: has a tab outside quotes"),
    "merged text": ("<<: x\nratio: 1\n", "x.yaml, line 1: << must be a mapping or a list of mappings"),
    "merged key": ("about: x\n<<:\n  ratoi: 1\n", "x.yaml, line 3: ratoi is not known here; did you mean ratio?"),
    "merged with itself": ("<<: &a\n  <<: *a\n", "found unconstructable recursive node"),
    "no UTF-8": (b"about: x\nabout: \xff\n", "x.yaml, line 2: is not UTF-8 text"),
    "no colon": ("about: x\nrounds", "x.yaml, line 2: is not YAML: could not find expected ':'"),
    "no colon further up": ("seed: 1\nrounds\n\n\nratio: 1\n", "x.yaml, line 2: is not YAML: could not find expected"),
    "no end of a quote": ('about: x\nratio: "1\nrounds: 2\n\n', "x.yaml, line 2: is not YAML: found unexpected end of"),
    "tag": ("about: !!python/object/apply:os.system [ls]\n", "line 1: has the unknown tag"),
    "alias of itself": ("ratio: &a [*a]\n", "line 1: is not YAML: found unconstructable recursive node"),
    "mapping that merges itself": ("models: &a {<<: *a}\n", "line 1: is not YAML: found unconstructable"),
    "half a character": ('about: "\\ud800"\n', "line 1: contains half of a surrogate pair"),
    "model twice": ("models:\n  model_1: 1/2\n  model_1: 1/2\n", "x.yaml, line 3: model_1 is already set in line 2"),
    "no character": ('about: "\\UFFFFFFFF"\n', "x.yaml: is not YAML"),
    "aliases of aliases": (BOMB, "x.yaml, line 1: a0 is not known here"),
    "nested": ("about: " + "[" * 1000, "x.yaml: is nested too deeply"),
    "combinations": (f"seed: [{', '.join(map(str, range(40)))}]\nrounds: [{', '.join(map(str, range(1, 41)))}]\n",
        "x.yaml, line 1: has 1,600 combinations; the maximum is 1,000"),
    "prompt": (LLM + "prompt:\n- basic\n- basix\n", "x.yaml, line 4: prompt basix: configs/prompts.yaml has no such "
        "prompt; did you mean basic? It has basic"),
    "prompt of nobody": ("prompt: rational\n", "line 1: prompt rational: does nothing with --agent-type random"),
    "attempts of nobody": ("rounds: 2\nmax_attempts: [2, 3]\n", "x.yaml, line 2: max_attempts 2: does nothing with"),
    "models of nobody": ("models: {model_1: 1}\n", "models model_1=1: does nothing with --agent-type random"),
    "personas": ("personas: [null, educatoin]\n", "x.yaml, line 1: personas educatoin: configs/personas.yaml has no "
        "such set of personas; did you mean education?"),
    "set twice": ("personas: education+education\n", "personas education+education: names a set twice"),
    "blanks beside a set": ("personas: education + educatoin\n", "educatoin: configs/personas.yaml has no such set"),
    "no set": ("personas: education+\n", "personas education+: an empty name: configs/personas.yaml has no such set"),
    "model": (LLM + "models: {model_1: 1/2, modle_1: 1/2}\n", "line 2: models model_1=1/2,modle_1=1/2: modle_1: "
        "tests/data/model_configs.json has no such model; did you mean model_1?"),
    "shares of models": (LLM + "models:\n- model_1: 2/3\n", "line 3: models model_1=2/3: the shares add up to 2/3"),
    "share of a list": (LLM + "models: [{model_1: [1]}]\n", "line 2: models: a share must be a number"),
    "persona of nobody": (LLM + "prompt:\n- basic\n- in_character\n", "line 4: prompt in_character: tells participants "
        "of their persona; give --personas, too"),
    "team of nobody": (LLM + "prompt: team\n", "prompt team: tells participants of their team; give --teams, too"),
    "no shares": (LLM + "models: model_1\n", "must be shares of models, as model_1=2/3,model_2=1/3"),
    "class": ("agent_class: mine.py:Mine\n", "x.yaml, line 1: agent_class "),
    "unknown kind": ("rounds: 2\nplayers: {lmm: 1/2, random: 1/2}\n", "x.yaml, line 2: players lmm=1/2,random=1/2: "
        "'lmm' is no kind of player; did you mean llm?"),
    "shares of players": ("players:\n- llm\n- {llm: 1/2}\n", "line 3: players llm=1/2: the shares add up to 1/2"),
    "share of players": ("players: {llm: 2, random: 1/2}\n", "line 1: players llm=2,random=1/2: the share of llm, 2:"),
    "kind twice": ("players: llm=1/2,llm=1/2\n", "line 1: players llm=1/2,llm=1/2: names llm twice"),
    "no share": ("players: llm,random\n", "line 1: players llm,random: 'llm,random' is no kind of player"),
    "players and a type": ("agent_type: random\nplayers: llm\n", "line 2: players: does not go with --agent-type"),
    "players and a class": ("players: llm\nagent_class: mine.py\n", "line 1: players: does not go with --agent-class"),
    "class of players": ("players: {no.py:Mine: 1}\n", "no.py:Mine: there is no file"),
    "no class of players": (f"rounds: 1\nplayers: {{{ROOT}/examples/level_k.py:LevelJ: 1}}\n", "line 2: players "
        "examples/level_k.py:LevelJ: examples/level_k.py has no class LevelJ derived from Participant; did you mean"),
    "model of players": ("players:\n- random\n- {llm:model_9: 1}\n", "line 3: players llm:model_9=1: model_9: tests/"),
    "unused models": ("models: {model_1: 1}\nplayers: llm:model_1\n", "line 1: models model_1=1: does nothing with "
        "--players llm:model_1=1"),
    "players without a model": ("players: random\nprompt: rational\n", "line 2: prompt rational: does nothing with "
        "--players random=1"),
    "teams of one kind": ("players: random\nteams: kind\n", "line 2: teams kind: this game has no such grouping"),
    "no run": ("rounds: 2\nplayers: {surrogate:no/run: 1}\n", "x.yaml, line 2: players surrogate:"),
    "budget": (LLM + "participant_num: 10\nrounds: [1, 2]\nmax_tokens: 9\n", "line 4: max_tokens 9: a run "
        "(rounds 1) may cost "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_error_in_an_experiment_is_one_line_with_its_position(refused, tmp_path, name):
    text, message = BAD[name]
    error = refused("x.yaml", text, "--experiment", tmp_path / "x.yaml")
    assert message in error and error.count("x.yaml, line") <= 1


BAD_PERSONAS = {
    "sum": ("education:\n- {name: a, share: 1/2}\n- {name: b, share: 0.49}\n",
        "p.yaml, line 1: the shares of education add up to 99/100; they must add up to exactly 1"),
    "twice": ("a:\n- {name: x, share: 1/2}\n- share: 1/2\n  name: x\n", "p.yaml, line 4: a has a persona x already"),
    "share 0": ("a:\n- name: x\n  share: 0\n", "p.yaml, line 3: share 0: must be from 1/1000000000 to 1"),
    "no share": ("a:\n- name: x\n", "p.yaml, line 2: share is missing"),
    "unknown": ("a:\n- name: x\n  shar: 1\n", "p.yaml, line 3: shar is not known here; did you mean share?"),
    "no list": ("a: {x: 1}\n", "p.yaml, line 1: a must be a list"),
    "no mapping": ("a:\n- b\n", "p.yaml, line 2: a must be a mapping"),
    "no name": ("a:\n- {name: '', share: 1}\n", "p.yaml, line 2: name must not be empty"),
    "model": ("model:\n- {name: x, share: 1}\n", "p.yaml, line 1: a set cannot be called 'model'"),
    "kind": ("kind:\n- {name: x, share: 1}\n", "p.yaml, line 1: a set cannot be called 'kind': + separates sets, and"),
    "column": ("a:\n- {name: x, share: 1}\nvalue:\n- {name: x, share: 1}\n", "line 3: a set cannot be called 'value'"),
    "plus": ("b+c:\n- {name: x, share: 1}\n", "p.yaml, line 1: a set cannot be called 'b+c'"),
    "nobody": ("a: []\n", "p.yaml, line 1: the shares of a add up to 0"),
}  # fmt: skip
BAD_PROMPTS = {
    "placeholder": ("basic:\n  system: from {min} to {max_valu}\n  instruction: x\n",
        "p.yaml, line 2: {min} is not known here; known are {number}, {max_value}, {rules}, {target}, {persona}"),
    "near": ("basic:\n  system: x\n  instruction: to {max_valu}\n",
        "p.yaml, line 3: {max_valu} is not known here; did you mean {max_value}?"),
    "form": ("basic: {system: '{number:>9}', instruction: x}\n", "p.yaml, line 1: {number:>9} is not known here"),
    "brace": ("basic:\n  system: x }\n  instruction: x\n", "p.yaml, line 2: a single brace; write {{"),
    "missing": ("basic:\n  system: x\n", "p.yaml, line 1: instruction is missing"),
    "empty": ("basic: {system: ' ', instruction: x}\n", "p.yaml, line 1: system must not be empty"),
    "tokens": ("basic:\n  system: x\n  instruction: x\n  reasoning_tokens: 0\n",
        "p.yaml, line 4: reasoning_tokens 0: must be from 1 to 100,000"),
    "other": ("other: {system: x, instruction: x}\n", "--prompt basic: p.yaml has no such prompt; it has other"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PERSONAS)
def test_an_error_in_personas_is_one_line_with_its_position(refused, tmp_path, name):
    text, message = BAD_PERSONAS[name]
    said = refused("p.yaml", text, "--personas", "education", "--personas-file", tmp_path / "p.yaml")
    assert message in said and said.startswith("p.yaml, line ")


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_an_error_in_prompts_is_one_line_with_its_position(refused, tmp_path, name):
    text, message = BAD_PROMPTS[name]
    assert refused("p.yaml", text, "--agent-type", "llm", "--prompts-file", tmp_path / "p.yaml").startswith(message)


def test_errors_name_flags_as_flags(refused, tmp_path):
    file = ("x.yaml", LLM + "prompt: [basic, none]\n", "--experiment", tmp_path / "x.yaml")
    assert refused(*file, "--prompt", "basci").startswith("--prompt basci: configs/prompts.yaml has no such prompt")
    assert refused(*file, "--prompt", "basic", "--max-tokens", "9").startswith("--max-tokens 9: a run may cost")
    assert refused(*file, "--resume", "runs/latest").startswith("--experiment: does not go with --resume")
    assert refused(*file[:2], "--experiment", tmp_path / "y.yaml").endswith(
        "y.yaml: cannot be read: No such file or directory; did you mean x.yaml?"
    )
    assert refused(*file[:2], "--personas", "none", "--personas-file", tmp_path).endswith(
        "cannot be read: Is a directory"
    )


# --- What a good file says -------------------------------------------------------------------------------------------


def read(tmp_path, text, **flags):
    (tmp_path / "x.yaml").write_text(text)
    return Experiment(str(tmp_path / "x.yaml"), flags).sweep


def test_all_combinations_are_in_the_order_of_the_file(tmp_path):
    text = "about: It has two.\nratio: [1/2, 0.51]\nrounds: 3\npersonas: [null, education]\n"
    sweep = read(tmp_path, text, seed=7, server_per_host=2)
    assert sweep.about == "It has two."
    configs = sweep.configs.values()
    assert [sweep.label_of(each) for each in configs] == [
        *("ratio 1/2, personas none", "ratio 1/2, personas education"),
        *("ratio 51/100, personas none", "ratio 51/100, personas education"),
    ]
    assert {(each.rounds, each.seed, each.server_per_host) for each in configs} == {(3, 7, 2)}


READ = """%YAML 1.1
---
# a tab\tin a comment: and a colon
about: "a\ttab in quotes"  #\tand after them
ratio: [!!float 1/2, '2/3']
<<: [&fast {rounds: 1, seed: 7}, {rounds: 2, max_value: 10}]
...
"""


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_all_forms_of_yaml_are_read(tmp_path, start, end):
    (tmp_path / "x.yaml").write_bytes((start + READ.replace("\n", end)).encode())
    sweep = Experiment(str(tmp_path / "x.yaml"), {}).sweep
    assert sweep.about == "a\ttab in quotes"
    configs = sweep.configs.values()
    assert [each.ratio for each in configs] == ["1/2", "2/3"]
    assert {(each.rounds, each.seed, each.max_value) for each in configs} == {(1, 7, 10)}


def test_a_flag_overrides_the_file(tmp_path):
    sweep = read(tmp_path, "ratio: [1/2, 2/3]\nrounds: [1, 2]\n", ratio="1")
    assert sweep.varies == ("rounds",) and [each.rounds for each in sweep.configs.values()] == [1, 2]
    assert {each.ratio for each in sweep.configs.values()} == {"1"}


def test_a_mixture_may_be_a_mapping(tmp_path):
    text = "models:\n- model_1: 2/3\n  model_2: 1/3\n- model_1=0.5,model_2=0.5\n"
    models = [each.models for each in read(tmp_path, text).configs.values()]
    assert models == ["model_1=2/3,model_2=1/3", "model_1=0.5,model_2=0.5"]


def test_a_class_path_is_relative_to_the_experiment(tmp_path):
    sweep = read(tmp_path, "agent_class: mine.py:Mine\n")
    assert [each.agent_class for each in sweep.configs.values()] == [f"{tmp_path}/mine.py:Mine"]
    assert sweep.varies == ()


@given(
    st.dictionaries(
        st.sampled_from(["max_value", "participant_num", "rounds", "seed", "max_attempts"]),
        st.lists(st.integers(1, 100), min_size=1, max_size=4, unique=True),
        min_size=1,
    )
)
def test_combinations_are_unique(tmp_path_factory, said):
    assume(math.prod(map(len, said.values())) <= MOST_RUNS)
    text = "".join(f"{name}: {values}\n" for name, values in said.items())
    configs = read(tmp_path_factory.getbasetemp(), text).configs.values()
    found = [tuple(getattr(each, name) for name in said) for each in configs]
    assert found == list(itertools.product(*said.values())) and len(found) == math.prod(map(len, said.values()))


@given(st.integers(0, 2**64 - 1), st.integers(1, 40), st.integers(1, 40))
def test_seeds_of_repeats_differ_and_more_repeats_change_none(seed, few, more):
    seeds = repeat_seeds(seed, few + more)
    assert seeds[0] == seed and len(seeds) == len(set(seeds)) == few + more and seeds[:few] == repeat_seeds(seed, few)
    assert all(0 <= each < 2**32 for each in seeds[1:])


def test_seeds_of_repeats_stay_the_same():
    assert repeat_seeds(7, 3) == SEEDS_OF_7 and len(set(repeat_seeds(7, MOST_RUNS))) == MOST_RUNS


def test_repeats_are_added_to_all_combinations_and_rename_nothing(tmp_path):
    sweep = read(tmp_path, "ratio: [1/2, 2/3]\nrepeats: 2\nseed: 7\n")
    named = [f"0{n}-ratio={r},repeat={k}" for n, (k, r) in enumerate(itertools.product((1, 2, 3), ("1-2", "2-3")), 1)]
    assert [*sweep.configs] == named[:4] and sweep.varies == ("ratio",)
    assert {each.repeats for each in sweep.configs.values()} == {1}  # each run alone is one run
    more = Sweep.from_json(json.loads(json.dumps(sweep.to_json()))).with_repeats(3)
    assert [*more.configs] == named and more.repeats == 3 and more.with_repeats(3) == more
    assert [each.seed for each in more.configs.values()] == [seed for seed in SEEDS_OF_7 for _ in range(2)]
    assert more.configs == read(tmp_path, "ratio: [1/2, 2/3]\nrepeats: 3\nseed: 7\n").configs
    ones = read(tmp_path, "ratio: [1/2, 2/3]\nrepeats: 9\n", repeats=1)  # a flag overrides the file
    assert [*ones.configs] == ["01-ratio=1-2", "02-ratio=2-3"]
    assert [*ones.with_repeats(2).configs][2:] == ["03-ratio=1-2,repeat=2", "04-ratio=2-3,repeat=2"]
    assert [*read(tmp_path, "repeats: 100\n").configs][98:] == ["099-repeat=99", "100-repeat=100"]


def test_an_old_sweep_gets_repeats():
    old = Sweep.from_json(json.loads((ROOT / "tests/data/old_runs/sweep/sweep.json").read_text()))
    more = old.with_repeats(2)
    assert old.repeats == 1 and [*more.configs][:4] == [*old.configs] and len(more.configs) == 8
    assert len({(each.ratio, each.seed) for each in more.configs.values()}) == 8


@pytest.mark.parametrize("repeats", [0, 2, -1, "1", True, None, 1.0])
def test_a_sweep_with_a_wrong_number_of_repeats_is_damaged(repeats):
    said = Sweep("s", "x.yaml", None, ("ratio",), {"01-a": SimulationConfig(seed=1)}).to_json()
    with pytest.raises(ValueError, match="repeats"):
        Sweep.from_json({**said, "repeats": repeats})


def test_prompts_personas_and_models_are_read_exactly(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "free: {system: 'From {{0}} to {max_value}.', instruction: Go., reasoning_tokens: 9}"
    )
    (tmp_path / "q.yaml").write_text(
        "a: [{name: x, share: 1/3}, {name: y, share: 2/3, text: 'Why?'}]\nb: [{name: z, share: 1}]"
    )
    asking = SimulationConfig(agent_type="llm", model_per_host=2, model_configs=str(MODELS))
    config = replace(
        asking,
        prompt="free",
        prompts_file=str(tmp_path / "p.yaml"),
        personas=" b + a",
        personas_file=str(tmp_path / "q.yaml"),
    )
    prompt = read_prompt(config)
    assert (prompt.name, prompt.system, prompt.reasoning_tokens) == ("free", "From {{0}} to {max_value}.", 9)
    population = read_population(config, read_models(config))
    assert [*population.persona_sets] == ["b", "a"] and population.round_robin_models == ("participant-model",) * 2
    assert [(each.share, each.text) for each in population.persona_sets["a"]] == [
        (Fraction(1, 3), ""),
        (Fraction(2, 3), "Why?"),
    ]
    mixed = replace(asking, models="model_2=1/3, model_1=2/3")
    shares = read_population(mixed, read_models(mixed)).models
    assert [(each.name, each.share) for each in shares] == [("model_2", Fraction(1, 3)), ("model_1", Fraction(2, 3))]
    assert read_prompt(SimulationConfig()) is None
    with pytest.raises(SettingsError, match="--models model_1=1/2,model_1=1/2: names model_1 twice"):
        read_population(replace(asking, models="model_1=1/2,model_1=1/2"), read_models(mixed))


# --- Playing ---------------------------------------------------------------------------------------------------------

FOUR = "about: Halves\nratio: [1/2, 2/3]\nmax_value: [50, 100]\nparticipant_num: 90\nsleep_time: 0\nrounds: 2\n"
FOLDERS = [f"0{n}-ratio={r},max_value={m}" for n, (r, m) in enumerate(itertools.product(("1-2", "2-3"), (50, 100)), 1)]


def write(checkout, text):
    (checkout.path / "x.yaml").write_text(text)
    return ("run_simulation.sh", "--experiment", "x.yaml", "--server-per-host", "3")


def answers_in(checkout, sweep):
    return {path.name: checkout.answers(path) for path in sorted(sweep.glob("[0-9]*"))}


def test_all_combinations_are_played_on_the_same_servers(cluster):
    play = write(cluster, FOUR)
    planned = cluster.run(*play, "--dry-run")
    assert planned.returncode == 0 and cluster.runs() == set()
    assert planned.stdout.startswith("experiment x.yaml: Halves\nrun 1 of 4: ratio 1/2, max_value 50\n  hosts: 1")
    assert planned.stdout.endswith("in all: 4 runs, 8 rounds\n")
    done = cluster.run(*play, env={"MAX_VALUE": "7", "AGENT_TYPE": "llm"})  # the file says what the game is
    assert done.returncode == 0, done.stderr
    (name,) = cluster.runs() - {"latest"}
    sweep = cluster.path / "runs" / name
    said = json.loads((sweep / "sweep.json").read_text())
    assert (said["sweep_id"], said["experiment"], said["about"]) == (name, "x.yaml", "Halves")
    assert said["varies"] == ["ratio", "max_value"]
    assert [run["folder"] for run in said["runs"]] == FOLDERS == sorted(path.name for path in sweep.glob("[0-9]*"))
    assert said["runs"][2]["settings"] == {"ratio": "2/3", "max_value": 50}
    summaries = [cluster.summary(sweep / folder) for folder in FOLDERS]
    assert all(each["status"] == "complete" and len(each["rounds"]) == 2 for each in summaries)
    assert len({each["config"]["seed"] for each in summaries}) == 1 and len({each["run_id"] for each in summaries}) == 4
    assert [each["config"]["max_value"] for each in summaries] == [50, 100, 50, 100]
    for each, ratio in zip(summaries, (1 / 2, 1 / 2, 2 / 3, 2 / 3), strict=True):
        assert each["rounds"][0]["winning_number"] == pytest.approx(ratio * each["rounds"][0]["average"])
    assert (cluster.path / "runs/latest").resolve() == sweep
    for number, each in enumerate(summaries, start=1):
        position = {"sweep_id": name, "experiment": "x.yaml", "run": number, "runs": 4}
        assert each["part_of"] == position | {"about": "Halves"}
    assert "run 3 of 4: ratio 2/3, max_value 50" in done.stderr and "starting" not in done.stderr
    head, *table = done.stdout.splitlines()[-5:]
    assert "winning number" in head and all("complete" in row for row in table)
    other = cluster.run("run_simulation.sh", "--resume", f"runs/{name}", "--ratio", "1")
    assert other.returncode == 2 and "--ratio 1: the runs of" in one_line(other.stderr)
    again = cluster.run("run_simulation.sh", "--resume", f"runs/{name}")
    assert again.returncode == 0 and "asking" not in again.stderr, again.stderr
    assert again.stdout.splitlines() == [head, *table]


REPEATED = "ratio: [1/2, 2/3]\nparticipant_num: 60\nsleep_time: 0\nrounds: 2\nrepeats: 2\nseed: 7\n"


def test_repeats_are_played_compared_and_extended(cluster):
    play = (*write(cluster, REPEATED), "--run-dir", "runs/repeated")
    planned = cluster.run(*play, "--dry-run").stdout
    assert planned.count("hosts: 1") == 2 and planned.endswith(
        "run 3 of 4: ratio 1/2, repeat 2\nrun 4 of 4: ratio 2/3, repeat 2\nin all: 4 runs, 8 rounds\n"
    )
    done = cluster.run(*play)
    assert done.returncode == 0, done.stderr
    folder = cluster.path / "runs/repeated"
    names = [f"0{n}-ratio={r},repeat={k}" for n, (k, r) in enumerate(itertools.product((1, 2, 3), ("1-2", "2-3")), 1)]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names[:4]
    summaries = [cluster.summary(folder / name) for name in names[:4]]
    assert [each["config"]["seed"] for each in summaries] == [7, 7, SEEDS_OF_7[1], SEEDS_OF_7[1]]
    answers = answers_in(cluster, folder)  # random participants ignore the ratio: runs of one repeat are paired
    assert answers[names[0]] == answers[names[1]] != answers[names[2]] == answers[names[3]]
    head, *rows = done.stdout.splitlines()[-3:]
    assert head.split()[:2] == ["treatment", "average"] and [row[:9] for row in rows] == ["ratio 1/2", "ratio 2/3"]
    lasts = [each["rounds"][-1] for each in summaries]
    for row, pair in zip(rows, (lasts[::2], lasts[1::2]), strict=True):
        cells = row.split()[2:]
        for key, found in (("average", cells[:5]), ("winning_number", cells[5:9])):
            numbers = [entry[key] for entry in pair]
            low, high = scipy.stats.t.interval(0.95, 1, numpy.mean(numbers), scipy.stats.sem(numbers))
            expected = [numpy.mean(numbers), low, high, numpy.std(numbers, ddof=1)]
            shown = [float(found[at]) for at in ((0, 1, 3, 4) if key == "average" else (0, 1, 3))]
            assert shown == pytest.approx(expected[: len(shown)], abs=6e-3)
    with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
        data = [*csv.DictReader(file)]
    assert [row["run"] for row in data] == [name for name in names[:4] for _ in range(2)]
    assert [*data[0]][:8] == ["run", "run_id", "repeat", "status", "ratio", "seed", "round", "asked"]
    assert (data[5]["run_id"], data[5]["repeat"]) == (summaries[2]["run_id"], "2")
    for key in ("average", "median", "std", "winning_number", "seconds"):
        assert float(data[5][key]) == summaries[2]["rounds"][1][key]
    assert data[5]["winners"] == str(summaries[2]["rounds"][1]["winners"]["count"]) and data[5]["ratio"] == "1/2"

    resume = ("run_simulation.sh", "--resume", "runs/repeated")
    for more, error in (
        (["--repeats", "1"], "--repeats 1: the experiment in runs/repeated has 2; give at least as many"),
        (["--repeats", "501"], "--repeats 501: would make 1,002 runs in runs/repeated; the maximum is 1,000"),
        (["--repeats", "3", "--seed", "8"], "was started with 7; this setting cannot be changed on resume"),
    ):
        refused = cluster.run(*resume, *more)
        assert refused.returncode == 2 and error in one_line(refused.stderr)
    refused = cluster.run("run_simulation.sh", "--resume", f"runs/repeated/{names[0]}", "--repeats", "3")
    assert refused.returncode == 2 and "is the folder of a single run" in one_line(refused.stderr)
    before = [(folder / name / "summary.json").read_bytes() for name in names[:4]]
    done = cluster.run(*resume, "--repeats", "3", "--seed", "7")
    assert done.returncode == 0 and done.stderr.count(": asking") == 4, done.stderr
    assert [(folder / name / "summary.json").read_bytes() for name in names[:4]] == before
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names
    assert "run 5 of 6: ratio 1/2, repeat 3" in done.stderr
    assert cluster.summary(folder / names[5])["config"]["seed"] == SEEDS_OF_7[2]
    again = cluster.run(*resume, "--json", "--quiet")
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert json.loads(again.stdout) == [cluster.summary(folder / name) for name in names]
    every = cluster.run("main.py", "--role", "report", "runs/repeated", "--all-runs").stdout.splitlines()
    assert [line.split()[0] for line in every[3:10]] == ["run", *names] and every[:3] == done.stdout.splitlines()[-3:]


def test_a_command_without_a_file_is_repeated(cluster):
    play = ("run_simulation.sh", "3", "40", "--sleep-time", "0", "--max-value", "9")
    done = cluster.run(*play, "--seed", "7", "--repeats", "3")
    assert done.returncode == 0, done.stderr
    sweep = (cluster.path / "runs/latest").resolve()
    answers = answers_in(cluster, sweep)
    assert [*answers] == ["01-repeat=1", "02-repeat=2", "03-repeat=3"]
    assert done.stdout.splitlines()[-1].startswith("3 runs")
    alone = cluster.run(*play, "--seed", str(SEEDS_OF_7[2]), "--run-dir", "runs/alone")
    assert alone.returncode == 0 and cluster.answers(cluster.path / "runs/alone") == answers["03-repeat=3"]
    reported = cluster.run("main.py", "--role", "report", "runs/alone", str(sweep / "01-repeat=1"))
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.splitlines()[1].startswith("2 runs")  # runs that differ in the seed alone are repeats


def test_a_single_combination_is_an_ordinary_run(cluster):
    before = cluster.runs()
    done = cluster.run(*write(cluster, FOUR), "--ratio", "1", "--max-value", "9", "--seed", "7")
    assert done.returncode == 0, done.stderr
    (name,) = cluster.runs() - before - {"latest"}
    assert cluster.summary()["run_id"] == name and not (cluster.path / "runs" / name / "sweep.json").exists()
    assert "part_of" not in cluster.summary()
    cluster.play("3", "90", "--rounds", "2", "--sleep-time", "0", "--max-value", "9", "--seed", "7")
    assert cluster.answers() == cluster.answers(cluster.path / "runs" / name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_an_interrupted_sweep_resumes_with_the_same_results(cluster, number):
    gates = Gates(cluster.path, "question.max_value == 50", "question.max_value == 100 and question.round == 2")
    gates.open(0), gates.open(1)
    play = (*write(cluster, FOUR), "--seed", "7", *gates.flags)
    whole, cut = (cluster.path / f"runs/{name} {number}" for name in ("whole", "cut"))
    assert cluster.run(*play, "--run-dir", str(whole)).returncode == 0
    gates.shut(0), gates.shut(1)
    log = cluster.path / "stderr"
    with log.open("w") as stderr:
        game = cluster.start(*play, "--run-dir", str(cut), stderr=stderr)
    until(lambda: "round 1: asking" in log.read_text(), 60, "it has begun")
    second = cluster.run("run_simulation.sh", "--resume", str(cut))
    assert second.returncode == 2 and "is being written by another run" in one_line(second.stderr)
    gates.open(0)
    until(lambda: "round 2: asking" in log.read_text().partition("run 2 of 4")[2], 60, "round 2 of run 2")
    game.send_signal(number)
    game.communicate(timeout=120)
    gates.open(1)
    if number == signal.SIGINT:
        assert game.returncode == 130, log.read_text()
        hint = f"3 of 4 runs have rounds left; to go on with them: ./run_simulation.sh --resume 'runs/{cut.name}'\n"
        assert hint in log.read_text()
    assert not (cut / FOLDERS[2]).exists() and cluster.summary(cut / FOLDERS[1])["status"] == "interrupted"
    assert (cluster.path / "runs/latest").resolve() == cut
    asked = cluster.run("main.py", "--role", "ask", "--winner", "--run-dir", "runs/latest", "--text", "Why?")
    assert asked.returncode == 2 and "name one of them, such as runs/latest/02-" in one_line(asked.stderr)
    reported = cluster.run("main.py", "--role", "report", "runs/latest")
    assert reported.returncode == 0, reported.stderr
    told = f"3 of 4 runs of x.yaml have rounds left; to go on with them: ./run_simulation.sh --resume 'runs/{cut.name}'"
    assert told in reported.stdout.splitlines()
    alone = cluster.run("run_simulation.sh", "--resume", str(cut / FOLDERS[1]), "--dry-run")
    assert alone.returncode == 0 and "run 2 of 4 of x.yaml" in alone.stderr
    assert f"to go on with all of them: ./run_simulation.sh --resume 'runs/{cut.name}'\n" in alone.stderr
    first = (cut / FOLDERS[0] / "summary.json").read_bytes()
    (cut / FOLDERS[0] / ".report.html.new").touch()  # as of a process that was killed after the run's end
    refused = cluster.run("run_simulation.sh", "--resume", str(cut), "--ratio", "1")
    assert refused.returncode == 2 and f"--ratio 1: the runs of runs/{cut.name} differ in it" in one_line(
        refused.stderr
    )
    refused = cluster.run("run_simulation.sh", "--resume", str(cut), "--seed", "8")
    assert refused.returncode == 2 and "started with 7; this setting cannot be changed on resume" in one_line(
        refused.stderr
    )
    resumed = cluster.run("run_simulation.sh", "--resume", "runs/latest", "--server-per-host", "3", "--sleep-time", "0")
    assert resumed.returncode == 0, resumed.stderr
    assert "has played 1 of 2 rounds" in resumed.stderr and resumed.stderr.count(": asking") == 5
    assert (cut / FOLDERS[0] / "summary.json").read_bytes() == first and drafts_in(cut) == []
    assert answers_in(cluster, cut) == answers_in(cluster, whole)
    assert len(resumed.stdout.splitlines()[-4:]) == 4 and list(answers_in(cluster, cut)) == FOLDERS


@pytest.mark.slow
def test_a_sweep_starts_servers_once_and_plays_on_after_a_partial_run(checkout):
    (checkout.path / "sub").mkdir()
    (checkout.path / "sub/mine.py").write_text(GREEDY)
    (checkout.path / "sub/x.yaml").write_text(
        "agent_class: mine.py:Greedy\nmax_value: [10, 20, 30]\nparticipant_num: 20\n"
    )
    done = checkout.run(
        "run_simulation.sh", "--experiment", "sub/x.yaml", "--server-per-host", "2", "--run-dir", "runs/s"
    )
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("starting 2 for participants") == done.stderr.count("stopped the 6 agent servers") == 1
    states = [checkout.summary(path)["status"] for path in sorted((checkout.path / "runs/s").glob("0*"))]
    assert states == ["complete", "partial", "complete"] and checkout.processes() == []
    again = checkout.run("run_simulation.sh", "--resume", "runs/s")
    assert (
        again.returncode == 4
        and "starting" not in again.stderr
        and "which was played before and is partial" in again.stderr
    )
    longer = checkout.run("run_simulation.sh", "--resume", "runs/s", "--rounds", "2")
    assert longer.returncode == 4 and longer.stderr.count("round 2: asking") == 3, longer.stderr
    assert "starting 2 for participants" in longer.stderr


def test_runs_of_language_models_are_repeated(cluster, fake):
    text = "agent_type: llm\nmodels: {model_1: 1}\nparticipant_num: 20\nrepeats: 2\n"
    done = cluster.run(*write(cluster, text), "--run-dir", "runs/twice")
    assert done.returncode == 0, done.stderr
    found = [cluster.summary(cluster.path / f"runs/twice/0{n}-repeat={n}") for n in (1, 2)]
    assert [each["rounds"][0]["answered"] for each in found] == [20, 20] and all(
        each["llm"]["requests"] for each in found
    )
    assert found[0]["config"]["seed"] != found[1]["config"]["seed"]


ASKING = "agent_type: llm\nmodels: {model_1: 1}\nratio: [1/2, 2/3]\nrounds: 2\nparticipant_num: 60\nprompt: mine\n"
MINE = "mine:\n  system: About {target}.\n  instruction: Just the number.\n"


def test_a_sweep_of_language_models_resumes(cluster, fake):
    killed = threading.Event()
    fake.held = lambda _: "About 2/3" in fake.bodies[-1]["messages"][0]["content"] and not killed.is_set()
    (cluster.path / "p.yaml").write_text(MINE)
    play = (*write(cluster, ASKING), "--prompts-file", "p.yaml", "--run-dir", "runs/asking")
    log = cluster.path / "stderr"
    with log.open("w") as stderr:
        game = cluster.start(*play, stderr=stderr)
    until(lambda: any("2/3" in body["messages"][0]["content"] for body in fake.bodies), 60, "run 2")
    game.kill()
    game.communicate(timeout=120)
    killed.set()
    (cluster.path / "p.yaml").unlink()  # begun runs know what they are played with
    first = cluster.path / "runs/asking/01-ratio=1-2"
    before = (first / "summary.json").read_bytes()
    resume = ("run_simulation.sh", "--resume", "runs/asking")
    planned = cluster.run(*resume, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "run 1 of 2: ratio 1/2, which was played before and is complete\nrun 2 of 2" in planned.stdout
    assert "prompt mine" in planned.stdout and "in all: 1 runs, " in planned.stdout
    done = cluster.run(*resume)
    assert done.returncode == 0, done.stderr
    assert (first / "summary.json").read_bytes() == before
    assert [row.split()[0] for row in done.stdout.splitlines()[-2:]] == ["01-ratio=1-2", "02-ratio=2-3"]
    assert {body["messages"][0]["content"] for body in fake.bodies} == {
        *("About 1/2 of the average.", "About 2/3 of the average."),
    }
    # one that was lengthened alone is finished all the same, and takes runs/latest not away from the experiment
    assert cluster.run("run_simulation.sh", "--resume", str(first), "--rounds", "3").returncode == 0
    assert cluster.summary(first)["part_of"]["run"] == 1 and (cluster.path / "runs/latest").resolve() == first.parent
    assert cluster.run(*resume).returncode == 0


@pytest.mark.parametrize("folder", ["..", ".", "", "../x", "01-a/b", "/tmp", "02-b"])
def test_a_sweep_with_foreign_or_repeated_folders_is_damaged(folder):
    config = SimulationConfig(seed=1).to_json()
    said = {"sweep_id": "s", "experiment": "x.yaml", "about": None, "varies": ["ratio"], "config": config}
    said["runs"] = [{"folder": each, "settings": {"ratio": "1/2"}} for each in ("01-a", "02-b", folder)]
    with pytest.raises(ValueError, match="folders elsewhere"):
        Sweep.from_json(said)
    with pytest.raises(ValueError, match="not a setting of the game"):
        Sweep.from_json({**said, "runs": said["runs"][:2], "varies": ["base_port"]})


def test_all_runs_of_a_sweep_share_a_budget_flag(cluster):
    play = write(cluster, "agent_type: llm\nrounds: 1\nratio: [1/2, 2/3, 3/4]\n")
    told = re.findall(r"at most about ([\d,]+) tokens", cluster.run(*play, "--dry-run").stdout)
    tokens = int(told[-1].replace(",", ""))  # after each run's own
    refused = cluster.run(*play, "--max-tokens", str(tokens - 1), "--dry-run")
    assert refused.returncode == 2 and "these 3 runs may together cost" in one_line(refused.stderr)
    assert cluster.run(*play, "--max-tokens", str(tokens), "--dry-run").returncode == 0


def test_an_aborted_run_keeps_its_results(checkout):
    checkout.play("2", "50", "--rounds", "2", "--sleep-time", "0")
    run = (checkout.path / "runs/latest").resolve()
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = checkout.run("run_simulation.sh", "--resume", str(run), "--rounds", "3", "--hosts", "127.0.0.9")
    assert done.returncode == 3, done.stderr
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    done = checkout.run("run_simulation.sh", "--resume", str(run), "--rounds", "3", "--prompts-file", "other.yaml")
    assert done.returncode == 2 and "cannot be changed on resume" in one_line(done.stderr)


def test_round_robin_models_missing_from_the_file_are_refused_before_anything_starts(checkout):
    (checkout.path / "m.json").write_text(json.dumps([ENTRY | {"config_name": "a"}, ENTRY | {"config_name": "b"}]))
    play = ("run_simulation.sh", "2", "50", "--agent-type", "llm", "--model-configs", "m.json")
    done = checkout.run(*play)
    assert done.returncode == 2 and checkout.processes() == []
    assert "m.json has no model_1: it has a, b; name yours with --models" in one_line(done.stderr)


def test_a_sweep_without_a_ready_cluster_leaves_no_files(checkout):
    play = write(checkout, FOUR)
    done = checkout.run(*play, "--hosts", "127.0.0.1", "--connect-timeout", "0.5")
    assert done.returncode == 3, done.stderr
    assert checkout.runs() == set()
    (checkout.path / "runs/x").mkdir(parents=True)
    (checkout.path / "runs/x/sweep.json").write_text("{}")
    damaged = checkout.run("run_simulation.sh", "--resume", "runs/x")
    assert damaged.returncode == 2 and "its sweep.json is damaged" in one_line(damaged.stderr)


# --- The files that come with the program ----------------------------------------------------------------------------

PAPER = (ROOT / "docs/paper.md").read_text()
FILES = sorted(set(re.findall(r"--experiment configs/experiments/(\w+\.yaml)", PAPER)))


def test_every_experiment_of_the_paper_has_its_file():
    rows = [line for line in PAPER.partition("## All experiments")[2].splitlines() if line.startswith("| Sec.")]
    named = [re.findall(r"`(\w+\.yaml)`", row) for row in rows]
    assert len(rows) > 12 and all(named)
    assert {name for names in named for name in names} | {"two_thirds.yaml"} == set(FILES)
    assert all((ROOT / "configs/experiments" / name).is_file() for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_of_the_paper_can_be_played(cluster, name):
    flags = ("--model-configs", "configs/models_temperature.json") if name == "temperature.yaml" else ()
    done = cluster.run(
        *("run_simulation.sh", "--experiment", f"configs/experiments/{name}", "--dry-run", *flags),
        env={"MODEL_PER_HOST": "6"} if not flags else {"MODEL_PER_HOST": "4"},
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in PAPER.splitlines() if line.startswith("| Sec.") and f"`{name}`" in line]
    runs = max(done.stdout.count("\nrun "), 1)
    assert all(f"`{name}` | {runs} |" in row for row in rows), runs
