"""Children that are killed in the middle of an edit, one for each system call that changes the disk.

Run as ``python -m tests.edit.killed ACTION SOURCE OLD FOLDER EVERY``: for every n-th system call there is then ``FOLDER/n``,
a copy of the store ``OLD`` (or nothing, if there is none) on which a child did ACTION and died before that call. Prints how
many calls there are. With ``~count`` in place of EVERY so many children die at times spread over how long ACTION takes.

Actions of a family have a folder of stores in place of a store: all disks in it die at once.

The parent imports everything and opens nothing, so a fork copies no lock that a thread might hold.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import trajstore
from tests.edit.model import Aged
from tests.edit.stores import CountingDisk
from trajstore.edit import columns
from trajstore.edit.combine import combine
from trajstore.edit.compact import compact
from trajstore.opening import open_on
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.local import LocalFilesystem

_ROOT = Path(__file__).parents[2]
_MOST = 400


def _saving(share: str, *, instead: bool) -> Callable[[str, Filesystem], object]:
    def save(source: str, disk: Filesystem) -> None:
        with trajstore.open(source) as store:
            combine([store.trajectories.source()], disk, share=share, instead=instead, operation="save")  # type: ignore[arg-type]

    return save


def _deleting(*, reclaim: bool) -> Callable[[str, Filesystem], object]:
    def delete(source: str, disk: Filesystem) -> None:
        with open_on(disk, "a") as store:
            store.delete([0, 1, 3], reclaim=reclaim)

    return delete


def _derive(disk: Filesystem, name: str, factor: int) -> None:
    """Commit after every segment, in this call only: the parent does the same ``again``."""
    with pytest.MonkeyPatch.context() as patch, open_on(disk, "a") as store:
        patch.setattr(columns, "COMMIT_INTERVAL_S", 0.0)
        store.add_column(name, lambda t: t["reward"] * factor, columns=["reward"], threads=1)


def _deriving(_: str, disk: Filesystem) -> None:
    _derive(disk, "double", 2)


def _compact(source: str, disk: Filesystem) -> None:
    with open_on(disk, "a") as store:
        compact(disk, store._history, store._head, store._workers, segment_bytes=1500, commit_interval_s=1e-9)


ACTIONS: dict[str, Callable[[str, Filesystem], object]] = {
    **{f"save by {share}": _saving(share, instead=False) for share in ("link", "copy", "reference")},
    **{f"replace by {share}": _saving(share, instead=True) for share in ("link", "copy", "reference")},
    "delete": _deleting(reclaim=False),
    "compact": _compact,
    "reclaim": _deleting(reclaim=True),
    "add column": _deriving,
}


def _member(disk: Filesystem, name: str) -> LocalFilesystem:
    """A store of a family: its disk dies with the others."""
    place = os.path.join(disk.url, name)
    return _Member(place, disk) if isinstance(disk, _DyingDisk) else Aged(place)


def _family_compact(_: str, disk: Filesystem) -> None:
    with open_on(_member(disk, "owner"), "a") as store:
        store.compact(segment_bytes=1 << 20)


def _family_vacuum(_: str, disk: Filesystem) -> None:
    with open_on(_member(disk, "owner"), "a") as store:
        store.vacuum("0s", keep_versions=2, keep_for="0s", exclusive=True)


def _family_vacuum_beside(_: str, disk: Filesystem) -> None:
    """While others may write; all that is there is old."""
    with open_on(_member(disk, "owner"), "a") as store:
        store.vacuum(keep_versions=2, keep_for="0s")


def _family_derive(_: str, disk: Filesystem) -> None:
    _derive(_member(disk, "owner"), "value", 3)


def _family_merge(_: str, disk: Filesystem) -> None:
    """Of a store and of one that refers to it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("opening", "arrange"):
            patch.setattr(f"trajstore.{module}.connect", lambda url, **_: _member(disk, os.path.basename(url)))
        places = [os.path.join(disk.url, name) for name in ("owner", "borrower", "out")]
        trajstore.merge(places[:2], places[2], share="reference")


ACTIONS.update(
    {
        "family compact": _family_compact,
        "family vacuum": _family_vacuum,
        "family vacuum beside": _family_vacuum_beside,
        "family add column": _family_derive,
        "family merge": _family_merge,
    }
)


class _DyingDisk(CountingDisk):
    """Its process is killed before the n-th system call that changes the disk."""

    def __init__(self, root: str, at: int) -> None:
        super().__init__(root)
        self._die_at = at

    def _spoiled(self) -> bool:
        super()._spoiled()
        if self.calls > self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # the signal may reach another thread first
        return False

    def _remove_directory(self, path: str) -> None:
        self._spoiled()
        super()._remove_directory(path)

    def overwrite(self, key: str, data: bytes, *, durable: bool = False) -> None:
        self._spoiled()  # between two versions that are emptied
        super().overwrite(key, data, durable=durable)


class _Member(Aged, _DyingDisk):
    """A disk that counts with another one."""

    def __init__(self, root: str, other: _DyingDisk) -> None:
        super().__init__(root, 0)
        self._other = other

    def _spoiled(self) -> bool:
        return self._other._spoiled()


def kill_sometime(action: str, old: str | Path, folder: Path, count: int) -> list[Path]:
    """What each of so many children left that died at some time."""
    _run(action, "", old, folder, f"~{count}")
    return [folder / str(at) for at in range(count)]


def kill_everywhere(
    action: str, source: str | Path, old: str | Path | None, folder: Path, *, every: int = 1
) -> list[Path]:
    """What each child left, by the number of the call before which it died."""
    return [folder / str(at) for at in range(0, _run(action, source, old, folder, str(every)), every)]


def _run(action: str, source: str | Path, old: str | Path | None, folder: Path, every: str) -> int:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    command = [sys.executable, "-m", "tests.edit.killed", action, str(source), str(old or ""), str(folder), every]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    return int(done.stdout)


def _sometime(action: str, old: str, folder: str, count: int) -> None:
    took_s = 0.0
    for at in range(-1, count):
        target = os.path.join(folder, str(at))
        shutil.copytree(old, target)
        began_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            ACTIONS[action]("", LocalFilesystem(target))
            os._exit(0)
        if at < 0:  # how long it takes
            os.waitpid(pid, 0)
            took_s = time.monotonic() - began_s
            continue
        time.sleep(took_s * (at + 0.5) / count)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(count)


def _main(action: str, source: str, old: str, folder: str, every: str) -> None:
    if every.startswith("~"):
        _sometime(action, old, folder, int(every[1:]))
        return
    for at in range(0, _MOST, int(every)):
        target = os.path.join(folder, str(at))
        if old:
            shutil.copytree(old, target)
        pid = os.fork()
        if pid == 0:
            try:
                ACTIONS[action](source, _DyingDisk(target, at))
            except BaseException as error:
                os.write(2, f"{action} at {at}: {error!r}".encode())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:  # it outlived all calls
            print(at)
            return
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"child {at}: status {status}")
    sys.exit(f"{action} did not end within {_MOST} system calls")


def again(action: str, source: str | Path, target: str | Path) -> None:
    """The same on a healthy disk."""
    ACTIONS[action](str(source), LocalFilesystem(str(target)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
