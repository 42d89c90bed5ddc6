"""A watched folder as the file system shows it: whether it is there, which files of the wanted names are in it."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from structlog.typing import FilteringBoundLogger

_REPORTED_MAX = 1_000  # names and subfolders that are remembered so that each is logged once

# Names under which tools keep what is not finished: left alone, whatever the glob says.
IGNORED = (
    ".*", "*~", "~$*", "#*#", "*.part", "*.partial", "*.filepart", "*.tmp", "*.temp",
    "*.crdownload", "*.download", "*.swp", "*.swo", "*.swx",
)  # fmt: skip
_is_ignored = re.compile("|".join(map(fnmatch.translate, IGNORED)), re.IGNORECASE).match


class Names:
    """Which files a watch is about, by name alone. Paths are relative to the watched folder."""

    def __init__(self, glob: str = "*", *, recursive: bool = False, marker: str | None = None) -> None:
        self._glob = glob
        by_path = "/" in glob or "**" in glob
        self._pattern = PurePosixPath(glob).parts if by_path else None
        self._recursive = recursive
        self._marker = marker

    def data_of(self, path: str) -> str | None:
        """Return the file that `path` is the marker of, None if it is no marker."""
        return path.removesuffix(self._marker) if self._marker and path.endswith(self._marker) else None

    def wants(self, relative: str) -> bool:
        """Tell whether a file of this name can count."""
        parts = relative.split("/")
        if any(map(_is_ignored, parts)) or self.data_of(relative) is not None:
            return False
        if len(parts) > 1 and not self._recursive:
            return False
        if self._pattern is None:
            return fnmatch.fnmatchcase(parts[-1], self._glob)
        return full_match(parts, self._pattern)


def full_match(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Match components, `**` being any number of them (`PurePath.full_match`, which Python has from 3.13 on)."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(full_match(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and full_match(path[1:], pattern[1:])


class Folder:
    """A watched folder and the files in it that count by their names. What is odd about them is logged once."""

    def __init__(self, root: str, names: Names, log: FilteringBoundLogger, *, recursive: bool, polling: bool) -> None:
        self.root = root
        self._prefix = as_prefix(root)
        self._names = names
        self._log = log
        self._recursive = recursive
        self._polling = polling  # is only logged
        self._state = ""  # what was logged last
        self._unreadable: set[str] = set()
        self._odd_names: set[str] = set()

    def look(self) -> tuple[int, int] | None:
        """Return what tells this folder from another one of its name, None if it is not there or not readable."""
        try:
            with os.scandir(self.root):  # also refuses what is not a folder and what cannot be read
                status = Path(self.root).stat()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if self._state != reason:
                self._state = reason
                self._log.warning("file_folder_unavailable", reason=reason)
            return None
        if self._state != "watched":
            self._state = "watched"
            self._log.info("file_folder_watched", polling=self._polling)
        return status.st_dev, status.st_ino

    def relative(self, path: str) -> str:
        """Return the name of a file as seen from the folder."""
        return path[len(self._prefix) :]

    def wants(self, path: str) -> bool:
        """Tell whether a file of this path can count."""
        return self._names.wants(self.relative(path)) and self._is_text(path)

    def walk(self, readable: Callable[[], None]) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the wanted files. A subfolder that cannot be read is left out; `readable` is called once it can be."""
        folders = [self.root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if _is_ignored(entry.name):
                            continue
                        try:
                            if entry.is_dir(follow_symlinks=False):
                                if self._recursive:
                                    folders.append(entry.path)
                            elif self.wants(entry.path):
                                yield entry.path, entry.stat()
                        except OSError:  # gone, or a link to nothing or to itself
                            continue
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if folder not in self._unreadable and len(self._unreadable) < _REPORTED_MAX:
                    self._unreadable.add(folder)
                    self._log.warning("file_subfolder_unreadable", subfolder=folder, reason=error.strerror)
                continue
            if folder in self._unreadable:
                self._unreadable.remove(folder)
                self._log.info("file_subfolder_readable", subfolder=folder)
                readable()

    def forget_gone(self) -> None:
        """Report anew what was reported of files and folders that are not there any more."""
        self._unreadable = {name for name in self._unreadable if not is_gone(name)}
        self._odd_names = {name for name in self._odd_names if not is_gone(name)}

    def _is_text(self, path: str) -> bool:
        try:
            path.encode()
        except UnicodeEncodeError:
            if path not in self._odd_names and len(self._odd_names) < _REPORTED_MAX:
                self._odd_names.add(path)
                self._log.warning("file_name_not_utf8", name=repr(os.fsencode(path)))
            return False
        return True


def as_prefix(folder: str) -> str:
    """Return what the paths of all files in the folder begin with."""
    return folder.rstrip("/") + "/"


def is_gone(path: str) -> bool:
    """Tell whether the path does not exist; what cannot be reached for another reason is not gone."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
