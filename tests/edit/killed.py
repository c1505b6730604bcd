"""Children that are killed in the middle of an edit, one for each system call that changes the disk.

Run as ``python -m tests.edit.killed ACTION SOURCE OLD FOLDER EVERY``: for every n-th system call there is then ``FOLDER/n``,
a copy of the store ``OLD`` (or nothing, if there is none) on which a child did ACTION and died before that call. Prints how
many calls there are.

The parent imports everything and opens nothing, so a fork copies no lock that a thread might hold.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import trajstore
from tests.edit.stores import CountingDisk
from trajstore.edit.combine import combine
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


ACTIONS: dict[str, Callable[[str, Filesystem], object]] = {
    **{f"save by {share}": _saving(share, instead=False) for share in ("link", "copy", "reference")},
    **{f"replace by {share}": _saving(share, instead=True) for share in ("link", "copy", "reference")},
    "delete": _deleting(reclaim=False),
    "reclaim": _deleting(reclaim=True),
}


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


def kill_everywhere(
    action: str, source: str | Path, old: str | Path | None, folder: Path, *, every: int = 1
) -> list[Path]:
    """What each child left, by the number of the call before which it died."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    command = [sys.executable, "-m", "tests.edit.killed", action, str(source), str(old or ""), str(folder), str(every)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    return [folder / str(at) for at in range(0, int(done.stdout), every)]


def _main(action: str, source: str, old: str, folder: str, every: str) -> None:
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
