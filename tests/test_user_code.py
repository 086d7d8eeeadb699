"""Files of users: loaded as they are now, with what they import from their own folders, and found by class."""

from __future__ import annotations

import sys

import cloudpickle
import pytest

from simulation.cluster.agent_class import load_agent_class, serialize_agent_class
from simulation.errors import SettingsError
from simulation.user_code import files_of, find_class, load_module

MINE = "from participant import Participant\nclass Mine(Participant):\n    async def answer(self, question):\n"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


def answer_of(spec):
    """What a participant of the class would answer, from its file alone."""
    cls = load_agent_class(spec, False)
    with pytest.raises(StopIteration) as stopped:
        cls.answer(None, None).send(None)
    return stopped.value.value


def test_an_edited_file_is_loaded_again_and_an_unchanged_one_is_not(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{MINE}        return 20\n")
    before = load_agent_class(f"{path}:Mine", False)
    assert load_agent_class(f"{path}:Mine", False) is before and answer_of(f"{path}:Mine") == 20
    packed = serialize_agent_class(load_agent_class(f"{path}:Mine", False))
    assert serialize_agent_class(load_agent_class(f"{path}:Mine", False)) == packed
    path.write_text(f"{MINE}        return 70\n")  # of the same size, in the same second
    assert answer_of(f"{path}:Mine") == 70 and serialize_agent_class(load_agent_class(f"{path}:Mine", False)) != packed
    path.write_text("broken(")
    with pytest.raises(SettingsError, match=r"^--agent-class .*mine.py:Mine: .* cannot be imported: SyntaxError: "):
        load_agent_class(f"{path}:Mine", False)
    path.write_text(f"{MINE}        return 20\n")
    assert answer_of(f"{path}:Mine") == 20


def test_files_and_modules_of_the_same_name_do_not_collide(tmp_path):
    """Also as pickled for the servers, which import none of them."""
    specs = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        (folder / "parts").mkdir(parents=True)
        (folder / "mine.py").write_text(f"import helper\n{MINE}        return helper.number() + helper.more.REST\n")
        (folder / "helper.py").write_text(
            f"import parts.more as more\ndef number():\n    return 10 * more.TENS + {number}\n"
        )
        (folder / "parts/more.py").write_text(f"TENS = {number}\nREST = 100\n")
        specs.append(f"{folder}/mine.py:Mine")
    first, second = (load_agent_class(spec, False) for spec in specs)
    assert first.__module__ != second.__module__ and first.__module__.startswith("own_mine_")
    assert [answer_of(spec) for spec in specs] == [111, 122]
    packed = [cloudpickle.dumps(load_agent_class(spec, False)) for spec in specs]
    (tmp_path / "1/parts/more.py").write_text("TENS = 5\nREST = 100\n")
    assert [answer_of(spec) for spec in specs] == [151, 122]
    for name in ("helper", "parts", "parts.more"):
        sys.modules.pop(name, None)
    sys.path[:] = [each for each in sys.path if not each.startswith(str(tmp_path))]
    for content, expected in zip(packed, (111, 122), strict=True):
        with pytest.raises(StopIteration) as stopped:
            cloudpickle.loads(content).answer(None, None).send(None)
        assert stopped.value.value == expected
    assert not [*tmp_path.rglob("__pycache__")]


def test_the_files_that_a_file_imports_from_its_folder_are_known(tmp_path):
    (tmp_path / "package").mkdir()
    texts = {
        "mine.py": f"import json, helper\nfrom package.inner import X\n{MINE}        import late, csv, no_such\n",
        "helper.py": "import numpy\ndef f():\n    import later\n",
        **{"late.py": "1/0\n", "later.py": "", "unused.py": "", "json.py": "1/0\n", "participant.py": "1/0\n"},
        **{"package/__init__.py": "", "package/inner.py": "from .deep import X\n", "package/deep.py": "X = 1\n"},
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    load_module("--agent-class", f"{tmp_path}/mine.py")
    files = {each.name: each for each in files_of(f"{tmp_path}/mine.py")}
    used = {*texts} - {"unused.py", "json.py", "participant.py"}
    assert {*files} == used and next(iter(files)) == "mine.py"
    assert all(each.content == (tmp_path / name).read_bytes() for name, each in files.items())
    assert all(each.path == f"{tmp_path}/{name}" and len(each.sha256) == 64 for name, each in files.items())


class Base:
    """A base that is no participant."""


@pytest.mark.parametrize(
    ("text", "spec", "problem"),
    [
        ("", "mine.py", "has no class derived from Base"),
        ("class A(Base): ...\n", "mine.py", None),
        ("class A(Base): ...\nB = A\nclass C: ...\nfrom collections import *\n", "mine.py", None),
        ("class A(Base): ...\nclass B(A): ...\n", "mine.py", "has 2 classes derived from Base: A, B; name one, as "),
        ("class A(Base): ...\nclass B(A): ...\n", "mine.py:A", None),
        ("class Alpha(Base): ...\n", "mine.py:Alpah", "has no class Alpah derived from Base; did you mean Alpha?"),
        ("class A: ...\n", "mine.py:A", "has no class A derived from Base"),
        ("class A: ...\n", "mine.py:", "has no class derived from Base"),
        ("", "mine.txt:A", "write it as my_file.py:MyBase"),
        ("", "mein.py", r"there is no file .*mein.py; did you mean mine.py\?"),
        ("raise SystemExit(0)\n", "mine.py", "cannot be imported: SystemExit: 0"),
    ],
)
def test_the_class_that_a_file_defines_is_found(tmp_path, text, spec, problem):
    (tmp_path / "mine.py").write_text(f"from {__name__} import Base\n{text}")
    if problem is None:
        assert find_class("--game", f"{tmp_path}/{spec}", Base).__name__ == "A"
        return
    with pytest.raises(SettingsError, match=f"^--game .*{spec}: .*{problem}") as refused:
        find_class("--game", f"{tmp_path}/{spec}", Base)
    assert "\n" not in str(refused.value)
