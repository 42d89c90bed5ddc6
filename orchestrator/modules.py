"""The files and modules of a user's project: which there are, and how they are imported.

A process has one project: what it has imported stays. Files are the project's if they lie in its directory, not in a
hidden one, a virtual environment or a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import TaskNotFoundError
from orchestrator.schema import nearest
from orchestrator.tracing import Task, WorkflowFunction

_SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "venv", "site-packages"})
_IMPORTS_US = re.compile(r"^\s*(?:from\s+|import\s+(?:[^#\n]*,\s*)?)orchestrator\b", re.MULTILINE)
_IS_TEST = re.compile(r"(test_.*|.*_test|conftest|setup)\.py\Z")


def code_files(root: Path) -> Iterator[Path]:
    """Yield the project's `.py` files, sorted; not those in hidden directories, virtual environments and caches."""
    for folder, folders, files in os.walk(root):
        inside = Path(folder)
        folders[:] = sorted(name for name in folders if not _is_skipped(inside / name))
        yield from (inside / name for name in sorted(files) if name.endswith(".py"))


def definition_files(root: Path) -> Iterator[Path]:
    """Yield the files that may define workflows: YAML in `workflows/`; Python there and in `root` that imports us."""
    for folder, folders, files in os.walk(root / "workflows"):
        inside = Path(folder)
        folders[:] = sorted(name for name in folders if not _is_skipped(inside / name))
        yield from (
            inside / name
            for name in sorted(files)
            if name.lower().endswith((".yaml", ".yml")) or _is_ours(inside / name)
        )
    yield from (path for path in sorted(root.glob("*.py")) if _is_ours(path))


def _is_skipped(folder: Path) -> bool:
    is_environment = (folder / "pyvenv.cfg").exists()
    return folder.name.startswith(".") or folder.name in _SKIPPED_FOLDERS or is_environment


def _is_ours(path: Path) -> bool:
    # Unrelated scripts must not be executed, so a look at the text comes before the import.
    if not path.name.endswith(".py") or _IS_TEST.match(path.name):
        return False
    try:
        return bool(_IMPORTS_US.search(path.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return False


def code_hash(root: Path) -> str:
    """Return 12 hex digits that depend on the name and content of each of the project's `.py` files."""
    hasher = hashlib.sha256()
    for path in code_files(root):
        with contextlib.suppress(FileNotFoundError):  # deleted a moment ago
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            hasher.update(f"{path.relative_to(root).as_posix()}\0{content}\0".encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()[:12]


class ImportFailedError(Exception):
    """A module of the project could not be imported; where, if that is inside the project."""

    def __init__(self, reason: str, file: str | None = None, line: int | None = None) -> None:
        self.reason, self.file, self.line = reason, file, line
        super().__init__(reason)


def resolve_task(root: Path, reference: str) -> Callable[..., Any]:
    """Return the plain function that `module:function` names; imports its module. Raises TaskNotFoundError."""
    name_of_module, colon, path = reference.partition(":")
    if not colon or not name_of_module or not path:
        raise TaskNotFoundError(reference, "must be `module:function`")
    try:
        module = import_module(root.resolve(), name_of_module)
    except ImportFailedError as exc:
        raise TaskNotFoundError(reference, exc.reason, file=exc.file, line=exc.line) from exc
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            if name == "<locals>":
                raise TaskNotFoundError(reference, "is defined in a function; a task must stand at a module's level")
            names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise TaskNotFoundError(reference, f"no {name!r} in {name_of_module!r}; {nearest(name, names)}")
        found = getattr(found, name)
    if isinstance(found, WorkflowFunction):
        raise TaskNotFoundError(reference, f"is a workflow; write `workflow: {found.name}`")
    if not callable(found):
        raise TaskNotFoundError(reference, f"is not a function, but {type(found).__name__}")
    function: Callable[..., Any] = found.function if isinstance(found, Task) else found
    if inspect.iscoroutinefunction(function):
        raise TaskNotFoundError(reference, "is an `async def` function; tasks are plain functions")
    return function


def python_command(code: str, *arguments: str) -> list[str]:
    """Return the command that runs `code` (which may use `sys`) in a new Python that finds this package.

    The package's folder comes last on the path, and the current one not at all: the files of a user must not stand in
    for the standard library's while our own modules are imported.
    """
    boot = f"import sys; sys.path.append(sys.argv.pop(1)); {code}"
    return [sys.executable, "-P", "-c", boot, str(Path(__file__).resolve().parents[1]), *arguments]


def import_module(root: Path, name: str) -> types.ModuleType:
    """Import a module of the project. Raises ImportFailedError, also if it lies elsewhere or stops the process."""
    # A file that is edited twice within a second may keep its time and size; Python would run its old bytecode.
    sys.dont_write_bytecode = True
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if name not in sys.modules:
        importlib.invalidate_caches()
        package = name.partition(".")[0]
        folder = root / package
        if package not in sys.modules and folder.is_dir() and not (folder / "__init__.py").exists():
            # A folder without __init__.py would yield to an installed package of the same name.
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(name)
    except (Exception, SystemExit) as exc:
        raise _import_failure(root, name, exc) from exc
    file = getattr(module, "__file__", None)
    if file is None or not is_inside(root, file):
        where = file or ("a folder without __init__.py" if hasattr(module, "__path__") else "built in")
        raise ImportFailedError(
            f"{name!r} is not a module of this project but {where}; a task is a function of the project"
        )
    return module


def module_name(path: Path) -> str:
    """Return the name by which a file is imported, given its path relative to the project."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_inside(root: Path, file: str) -> bool:
    """Tell whether a file is one of the project's."""
    path = Path(file)
    return path.is_relative_to(root) and not any(
        _is_skipped(folder) for folder in path.parents if folder != root and folder.is_relative_to(root)
    )


def relative(root: Path, file: str) -> str:
    """Return the path of a file as it is shown: relative to the project if it is inside."""
    path = Path(file)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else file


def _import_failure(root: Path, name: str, exc: BaseException) -> ImportFailedError:
    last = " ".join(f"{type(exc).__name__}: {exc}".split())
    if isinstance(exc, ModuleNotFoundError) and exc.name == name:
        modules = [module_name(path.relative_to(root)) for path in code_files(root)]
        return ImportFailedError(f"no module {name!r} in this project; {nearest(name, modules)}")
    file, line = None, None
    if isinstance(exc, SyntaxError) and exc.filename:
        file, line, last = exc.filename, exc.lineno, f"{type(exc).__name__}: {exc.msg}"
    else:
        trace = exc.__traceback__
        while trace is not None:  # the innermost line of the project's own code
            if is_inside(root, trace.tb_frame.f_code.co_filename):
                file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
            trace = trace.tb_next
    shown = relative(root, file) if file else None
    return ImportFailedError(f"{name!r} does not import: {last}", shown, line)
