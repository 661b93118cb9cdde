"""Compiled kernels on disk, in the user's own cache directory.

An entry is one file, `<key>.<digest><suffix>`: the key is a hash of everything that went into the compilation, the
digest a hash of the content. It is written aside and renamed into place, so that a reader sees a whole entry or none,
and its digest is checked whenever it is read, so that a damaged one is compiled again. The directory must belong to
the user and be writable by nobody else: what lies in it is loaded and run.

There are no locks: nobody waits for a process that was stopped while it compiled, and a fork inherits nothing. Those
who compile the same kernel at once do so each for itself; compilations are reproducible, so all of them rename the same
content to the same name.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path

import platformdirs

from .errors import CacheError

_DIGEST_LENGTH = 32
_ASIDE = ".writing-"
_ABANDONED_SECONDS = 3600


def location():
    """Where the cache directory is, existing or not: `RAWKERN_CACHE_DIR`, or else the platform's own place."""
    chosen = os.environ.get("RAWKERN_CACHE_DIR")
    path = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("rawkern")
    return path.absolute()  # a loader would look for a bare file name among the system's libraries


def directory():
    """The cache directory, created with private permissions.

    Raises CacheError where it cannot be created, belongs to another user or is writable by others.
    """
    path = location()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise CacheError(f"cannot use the cache directory {path}: {error}; set RAWKERN_CACHE_DIR") from error
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise CacheError(f"the cache directory {path} belongs to another user; set RAWKERN_CACHE_DIR to one of yours")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"the cache directory {path} is writable by others; run chmod 700 on it")
    return path


def key_of(*parts):
    """A hash of the parts (strings), each delimited."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:40]


def find_or_build(key, suffix, build):
    """The path of the entry `key`; where there is none that is whole, of the file that `build()` returns as bytes."""
    folder = directory()
    for path in sorted(folder.glob(f"{key}.*{suffix}")):
        if _is_whole(path):
            return path
    # A damaged entry stays until the new one takes its place: removing it here could remove what another process
    # has put there in the meantime.
    content = build()
    path = folder / f"{key}.{_digest(content)}{suffix}"
    try:
        _write(path, content)
    except OSError as error:
        raise CacheError(f"cannot write to the cache directory {folder}: {error}; set RAWKERN_CACHE_DIR") from error
    return path


def size():
    """Number of entries and their bytes."""
    files = []
    for path in location().iterdir() if location().is_dir() else ():
        with contextlib.suppress(OSError):  # another process may have removed it
            if path.suffix in (".so", ".cubin"):
                files.append(path.stat().st_size)
    return len(files), sum(files)


def _write(path, content):
    _remove_abandoned(path.parent)
    handle, aside = tempfile.mkstemp(prefix=_ASIDE, dir=path.parent)  # created with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _remove_abandoned(folder):
    """Removes what processes that were killed while writing have left behind."""
    for path in folder.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:_DIGEST_LENGTH]


def _is_whole(path):
    """Whether the entry is a regular file of this user (no link to one) with the content its name promises."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
                return False
            return path.name.split(".")[1] == _digest(file.read())
    except OSError:
        return False
