"""Edits of one handle that run in several threads.

Invariant: while an edit has stored objects that no version names yet, nothing of the same handle removes what no version
names and no clock protects: an exclusive vacuum, or a deletion that reclaims.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from trajstore.errors import EditUnderWayError


class Turns:
    """Who may store, and who may remove."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._storing: list[str] = []  # what is under way
        self._removing = False

    @contextlib.contextmanager
    def storing(self, what: str) -> Iterator[None]:
        """Several may store at a time. Waits for who removes.

        Args:
            what: For messages to who would remove meanwhile.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self._removing)
            self._storing.append(what)
        try:
            yield
        finally:
            with self._condition:
                self._storing.remove(what)

    @contextlib.contextmanager
    def removing(self, what: str) -> Iterator[None]:
        """One at a time removes. Waits for others that do, which is short, and not for who stores, which may be long.

        Args:
            what: For the message.

        Raises:
            EditUnderWayError: Somebody stores.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self._removing)
            if self._storing:
                raise EditUnderWayError(
                    f"{what} would remove what {self._storing[0]}, under way in another thread of this handle, has stored "
                    "and not yet committed; do it again when that is done, or vacuum without exclusive=True"
                )
            self._removing = True
        try:
            yield
        finally:
            with self._condition:
                self._removing = False
                self._condition.notify_all()
