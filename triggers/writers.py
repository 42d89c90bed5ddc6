"""Who has a file open for writing: the kernel knows, and a read lease asks it.

A lease (`fcntl(2)`, F_SETLEASE) is granted only if nobody has. We take one and give it back at once (3 microseconds).
While it is held, an open for writing waits for those microseconds; one with O_NONBLOCK fails with EWOULDBLOCK. Only the
file's owner or CAP_LEASE may ask.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from enum import Enum, auto
from pathlib import Path


class Writer(Enum):
    """Whether some process has a file open for writing."""

    NONE = auto()
    SOME = auto()
    UNKNOWN = auto()


def writer_of(path: str, seen: os.stat_result) -> Writer:
    """Tell whether a process, this one included, has the file open (or mapped) for writing.

    SOME as well if the file is not any more what `seen` says. UNKNOWN where the kernel does not tell: not Linux, not
    our file, a file system without leases, a server that decides. Leaves no lease behind.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:  # on SMB a writer may keep readers out
        busy = (errno.ENOENT, errno.EAGAIN, errno.EBUSY, errno.ETXTBSY)
        return Writer.SOME if error.errno in busy else Writer.UNKNOWN
    try:
        answer = _lease(fd, seen)
        # After the lease: a writer that ended between the caller's stat and now has left a longer file.
        # On NFS, opening is what brings attributes up to date that were cached.
        now = os.fstat(fd)
        same = (now.st_size, now.st_mtime_ns, now.st_ino) == (seen.st_size, seen.st_mtime_ns, seen.st_ino)
        return answer if same else Writer.SOME
    finally:
        os.close(fd)


if sys.platform == "linux":

    def _lease(fd: int, seen: os.stat_result) -> Writer:
        try:
            # Who opens for writing now makes the kernel send us a signal. SIGIO, the default, would end the process;
            # SIGURG is ignored by default, from any thread, with no handler.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            return Writer.UNKNOWN if _leases_are_remote(seen.st_dev) else Writer.SOME
        except OSError:
            return Writer.UNKNOWN
        # Not left to close(): a fork in between has made a second holder of this lease.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return Writer.NONE

    def _leases_are_remote(device: int) -> bool:
        """NFS 4 and SMB say EAGAIN wherever the server has delegated nothing, writer or not."""
        try:
            mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
        except OSError:
            return False
        return device in remote_devices(mounts)

else:

    def _lease(fd: int, seen: os.stat_result) -> Writer:
        return Writer.UNKNOWN


def remote_devices(mountinfo: str) -> set[int]:
    """Return the devices of the NFS and SMB mounts in the text of /proc/self/mountinfo."""
    devices = set()
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.startswith(("nfs", "cifs", "smb")):
            major, minor = mount.split()[2].split(":")
            devices.add(os.makedev(int(major), int(minor)))
    return devices
