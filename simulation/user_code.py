"""Users' Python files: loads a file, finds a class in it, and returns the contents of the files that were loaded.

A file is executed again whenever it, or a module that it imports from its own folder, has changed. These modules are
pickled by value, as the file is, so that servers need no copy of them and never use an old one.

The Python interface saves the class of a notebook or of a module in a .pkl file, which is used like a .py file.
"""

import ast
import copyreg
import functools
import importlib.util
import inspect
import io
import linecache
import os
import pickle
import re
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from simulation.errors import OWN, SettingsError, listed, meant_by, near_file, one_line
from simulation.files import CLASS_FILES, append_to_path, content_of, full_path, is_there, real, shown

Context = AbstractContextManager[object]
NO_CONTEXT = nullcontext()
PACKAGES = {"site-packages", "dist-packages"}  # names of the folders of installed packages
PROGRAM = ("games", "main", "moderator", "participant", "simulation")  # modules that are not the user's in any folder


@dataclass(frozen=True)
class UserFile:
    """A file of the user's, as it was when the program read it."""

    name: str  # the file's path relative to the folder of the file that the user named
    path: str  # absolute
    content: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()


_loaded: dict[str, tuple[ModuleType, tuple[UserFile, ...]]] = {}  # by the absolute path of the file that a user named
_imported: dict[str, ModuleType] = {}  # by name: modules that users' files have imported from their own folders
_folders: set[str] = set()  # folders that were appended to the import path
_reloads = ContextVar("_reloads", default=True)  # whether files that have changed are loaded again


def find_class(flag: str, spec: str, base: type, context: Context = NO_CONTEXT) -> type:
    """Return the class that `spec` names: `FILE.py:CLASS`, or `FILE.py` if that file defines one subclass of `base`.

    The file is executed within `context`. Raises SettingsError if the file or the class is unusable.
    """
    start, file = f"{flag} {shown(spec)}", file_of(shown(spec))
    name = shown(spec)[len(file) + 1 :]
    if not file.endswith(CLASS_FILES):
        raise SettingsError(f"{start}: write it as my_file.py:My{base.__name__}")
    module = load_module(start, file, context)
    own = {name: each for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__}
    usable = {name: each for name, each in own.items() if isinstance(each, type) and issubclass(each, base)}
    names = [each.__name__ for each in dict.fromkeys(usable.values())]
    found = getattr(module, name, None) if name or len(names) != 1 else next(iter(usable.values()))
    if isinstance(found, type) and issubclass(found, base):
        return found
    problem, advice = f"no class{' ' * bool(name)}{name}", ""
    if name and (meant := meant_by(name, own.keys() - {name})):
        advice = f"; {meant}"
    elif names and not name:
        problem, advice = f"{len(names)} classes", f": {listed(names)}; name one, as {file}:{names[0]}"
    raise SettingsError(f"{start}: {file} has {problem} derived from {base.__name__}{advice}")


def file_of(spec: str) -> str:
    """Return the file in a spec `FILE.py:CLASS` or `FILE.py`."""
    return spec if spec.endswith(CLASS_FILES) else spec.rpartition(":")[0]


def files_of(file: str) -> tuple[UserFile, ...]:
    """Return what was loaded for a user's file: itself, and the modules that it imports from its own folder."""
    return _loaded[full_path("", file)][1]


@contextmanager
def loaded_files() -> Iterator[None]:
    """Use files as they were when they were loaded, even if they have changed since."""
    before = _reloads.set(False)
    try:
        yield
    finally:
        _reloads.reset(before)


def load_module(start: str, file: str, context: Context = NO_CONTEXT) -> ModuleType:
    """Return the module of a user's file. Execute it within `context`, unless it is loaded and has not changed.

    Raises SettingsError, which begins with `start`, such as a flag.
    """
    path = Path(full_path(start, file))
    if not is_there(path, start):
        raise SettingsError(f"{start}: there is no file {file}{near_file(path)}")
    try:
        module, loaded = _loaded.get(str(path), (None, ()))
        if module is not None and (not _reloads.get() or all(content_of(each.path) == each.content for each in loaded)):
            return module
        content = path.read_bytes()
        module = ModuleType(f"{OWN}{path.stem}_{sha256(bytes(path)).hexdigest()[:12]}")
        module.__file__ = str(path)  # absolute: servers run in another folder
        with context, _import_folder(path.parent):
            if path.suffix == ".pkl":
                cls = _Unpickler(io.BytesIO(content)).load()
                vars(module)[cls.__name__] = cls
                files = [UserFile(each.name, str(each), each.read_bytes()) for each in (path, _source_of(path))]
                _loaded[str(path)] = module, tuple(files)
                return module
            sys.modules[module.__name__] = module
            # not `exec_module`: it may run old bytecode if two versions of equal size are saved in one second
            exec(compile(content, path, "exec", dont_inherit=True), vars(module))
        _imported.update((name, each) for name, each in sys.modules.items() if _is_file_in(path.parent, name))
        for each in (module, *_imported.values()):
            cloudpickle.register_pickle_by_value(each)
        files = [UserFile(path.name, str(path), content)]
        files += [_user_file(str(each.__file__), path.parent) for each in _imported.values()]
        files += [_user_file(each, path.parent) for file in [*files] for each in _late(file.content, path.parent)]
        _loaded[str(path)] = module, tuple({each.path: each for each in files}.values())
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        raise SettingsError(f"{start}: {file} cannot be imported: {one_line(error)}") from None
    return module


def _user_file(path: str, folder: Path) -> UserFile:
    return UserFile(str(Path(path).relative_to(folder)), path, Path(path).read_bytes())


@contextmanager
def _import_folder(folder: Path) -> Iterator[None]:
    """Let imports find modules in `folder`, after all others, and none in the folders of other users' files."""
    for name in _imported:  # another file may mean another module by this name, and this one may have changed
        sys.modules.pop(name, None)
    _imported.clear()
    append_to_path(str(folder))
    before, bytecode = [*sys.path], sys.dont_write_bytecode
    sys.path[:] = [each for each in before if each == str(folder) or each not in _folders]
    sys.dont_write_bytecode = True  # as for `exec_module`
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = before, bytecode
        _folders.add(str(folder))


def _is_file_in(folder: Path, name: str) -> bool:
    """Return whether the imported module `name` is a file in `folder`, found there by its name."""
    file = getattr(sys.modules[name], "__file__", None)
    stem = folder / name.replace(".", "/")
    return file in (f"{stem}.py", f"{stem}/__init__.py") and name.partition(".")[0] not in PROGRAM


def _late(content: bytes, folder: Path) -> Iterator[str]:
    """Yield the modules in `folder` that a file imports only when a function of it is called."""
    for node in ast.walk(ast.parse(content)):
        module = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in [each.name for each in node.names] if isinstance(node, ast.Import) else module:
            path = folder / f"{name}.py"
            spec = importlib.util.find_spec(name) if name not in sys.modules and is_there(path) else None
            if spec is not None and spec.origin == str(path):  # and no module of another folder
                yield str(path)


# --- Classes of notebooks and modules --------------------------------------------------------------------------------


def save_class(cls: type, folder: Path) -> str:
    """Pickle a class by value into `folder`, with all that it uses of the user's modules. Return `FILE.pkl:CLASS`.

    A file beside it has the text of the cell or file that defines the class. Raises SettingsError if this fails.
    """
    for module in filter(_is_users, [*sys.modules.values()]):
        cloudpickle.register_pickle_by_value(module)  # for ever: the class will be pickled again, for the servers
    try:
        content = cloudpickle.dumps(cls)
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        raise SettingsError(f"{cls.__name__} cannot be pickled: {one_line(error)}") from None
    source = _text_of(cls).encode(errors="replace")
    # A class that is defined again, in the same words, differs only in an id that cloudpickle draws
    digest = sha256(re.sub(rb"\x8c [0-9a-f]{32}", b"", content) + source).hexdigest()[:16]
    name = re.sub(r"\W", "_", cls.__name__)
    path = folder / f"{name}-{digest}.pkl"
    folder.mkdir(parents=True, exist_ok=True)
    for file, written in ((_source_of(path), source), (path, content)) if not is_there(path) else ():
        draft = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.new")  # another may write the same
        draft.write_bytes(written)
        draft.replace(file)
    return f"{path}:{cls.__name__}"


def _text_of(cls: type) -> str:
    """Return the text of the cell or file that defines a class: that of its first method, or of its module."""
    unwrapped = [inspect.unwrap(each) for each in vars(cls).values() if inspect.isfunction(each)]
    own = [each for each in unwrapped if each.__module__ == cls.__module__]
    module_file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    file = own[0].__code__.co_filename if own else module_file
    return "".join(linecache.getlines(file or "")) or f"# the source of {cls.__name__} is not known\n"


def _cached_property(function: Any, name: str) -> Any:
    """Return a cached_property, of which some versions of Python hold a lock that cannot be pickled."""
    made = functools.cached_property(function)
    made.__set_name__(object, name)
    return made


copyreg.pickle(functools.cached_property, lambda each: (_cached_property, (each.func, each.attrname)))


def _source_of(path: Path) -> Path:
    return path.with_suffix(".txt")


def _is_users(module: Any) -> bool:
    """Return whether a module is neither the program's, nor Python's, nor that of an installed package.

    `__main__` is not among them, because cloudpickle always pickles it by value.
    """
    name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None)
    if not file or name == "__main__" or name.partition(".")[0] in PROGRAM or not file.endswith(".py"):
        return False
    path = real(file)
    return not PACKAGES & {*path.parts} and not path.is_relative_to(real(sysconfig.get_path("stdlib")))


class _Unpickler(pickle.Unpickler):
    """Loads classes as new ones. cloudpickle would change the class of the same origin in this process instead."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module.startswith("cloudpickle") and name in ("_make_skeleton_class", "_make_skeleton_enum"):
            return lambda *arguments: found(*arguments[:-2], None, arguments[-1])  # without the id of the origin
        return found
