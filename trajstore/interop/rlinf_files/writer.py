"""Write a directory of RLinf's files.

Invariant: the index and the metadata are written last, once all trajectories are durable, so what can be loaded is whole. A
writer whose block ends with an error leaves no index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from trajstore.errors import ClosedError, SelectionError, StoreExistsError
from trajstore.interop.rlinf_files.directory import TrajectoryFile, Url
from trajstore.interop.rlinf_files.documents import (
    FORMATS,
    INDEX_KEY,
    INDEX_KEYS,
    METADATA_KEY,
    Entry,
    Metadata,
    entry_of,
    index_to_bytes,
)
from trajstore.interop.rlinf_files.trajectory_file import encode
from trajstore.progress import counted
from trajstore.storage.connect import connect
from trajstore.storage.filesystem import Buffer, ObjectInfo

# Files that are written, and on a disk synced, together.
_TOGETHER_BYTES = 64 * 1024 * 1024
_TOGETHER_FILES = 32
_TRAJECTORY = re.compile(r"trajectory_\d+_.*\.(pt|pkl)")


class RlinfWriter:
    """Writes trajectories into a directory that RLinf can load. A context manager: its end writes index and metadata.

    Args:
        url: Of the directory: a path, or a URL that trajstore opens.
        trajectory_format: ``"pt"`` or ``"pkl"``.
        seed: Of the buffer, for ``metadata.json``.
        trajectory_counter: The id that the next trajectory of the buffer gets; by default the largest id + 1.
        overwrite: Take the place of what was saved there before. Its index goes first, so that nobody takes a mixture of
            the two for a buffer: killed in between, there is none. Its other trajectories go before the new index comes:
            RLinf looks for files by their number.
        storage_options: For the filesystem of a URL.

    Raises:
        StoreExistsError: A buffer is saved there, and ``overwrite`` was not said.
    """

    def __init__(
        self,
        url: Url,
        *,
        trajectory_format: str = "pt",
        seed: int | None = None,
        trajectory_counter: int | None = None,
        overwrite: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if trajectory_format not in FORMATS:
            raise SelectionError(f"trajectory_format={trajectory_format!r}, expected 'pt' or 'pkl'")
        self._format = trajectory_format
        self._seed = seed
        self._counter = trajectory_counter
        self._entries: dict[int, Entry] = {}
        self._pending: dict[str, Buffer] = {}
        self._closed = False
        self._filesystem = connect(url, storage_options=storage_options)
        try:
            self._former = {info.key for info in self._filesystem.list_objects("") if "/" not in info.key}
        except BaseException:
            self._filesystem.close()
            raise
        if not overwrite and self._former & {METADATA_KEY, *INDEX_KEYS}:
            self._filesystem.close()
            raise StoreExistsError(
                f"a buffer is already saved at {self._filesystem.description}; pass overwrite=True to replace it, or choose "
                "another place"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None:
            self.finish()
        else:
            self.abandon()

    def add(self, trajectory_id: int, fields: Mapping[str, Any]) -> Entry:
        """Write a trajectory.

        Args:
            trajectory_id: Its number.
            fields: Field -> tensor ``[T, B, ...]``, dict, number or text; None is left out.

        Raises:
            SchemaError: RLinf could not read it: neither ``prev_logprobs`` nor ``rewards``, or values of other types.
            SelectionError: The number was used.
        """
        entry = entry_of(trajectory_id, fields)
        self._put(entry, encode(fields, self._format))
        return entry

    def add_file(self, entry: Entry, file: TrajectoryFile, *, link: bool = False) -> None:
        """Write a trajectory whose file is there, byte for byte; it is of this writer's format.

        Args:
            entry: What the index is to say.
            file: Where it is.
            link: Let both share the bytes, by a hard link, if they are on one disk.

        Raises:
            SelectionError: The number was used.
            MissingObjectError: It has gone since the directory was listed.
        """
        self._note(entry)
        key = f"{entry.file_stem()}.{self._format}"
        if key in self._former:
            self._filesystem.remove([key])
        info = ObjectInfo(file.key, file.nbytes)
        self._filesystem.copy_from(file.filesystem, [info], link=link, names={file.key: key})

    def finish(self) -> Metadata:
        """Write the index and the metadata."""
        self._check_open()
        self._forget_former()
        entries = list(self._entries.values())
        metadata = Metadata(
            trajectory_format=self._format,
            size=len(entries),
            total_samples=sum(entry.num_samples for entry in entries),
            trajectory_counter=max(self._entries, default=-1) + 1 if self._counter is None else self._counter,
            seed=self._seed,
        )
        try:
            self._write_pending()
            self._remove_others()
            # Of two files the second may be lost: an index alone is not taken for a buffer.
            for key, data in ((INDEX_KEY, index_to_bytes(entries)), (METADATA_KEY, metadata.to_bytes())):
                self._pending[key] = data
                self._write_pending()
        finally:
            self.abandon()
        return metadata

    def abandon(self) -> None:
        """Write nothing more. May be called twice."""
        self._closed = True
        self._pending.clear()
        self._filesystem.close()

    def _note(self, entry: Entry) -> None:
        self._check_open()
        self._forget_former()
        if entry.trajectory_id in self._entries:
            raise SelectionError(f"trajectory {entry.trajectory_id} was written before; give each its own number")
        self._entries[entry.trajectory_id] = entry

    def _forget_former(self) -> None:
        documents = self._former & {METADATA_KEY, *INDEX_KEYS}
        if documents:
            self._filesystem.remove(sorted(documents))
            self._former -= documents

    def _remove_others(self) -> None:
        """Trajectories of the buffer that was saved there before."""
        written = {f"{entry.file_stem()}.{self._format}" for entry in self._entries.values()}
        self._filesystem.remove(sorted(key for key in self._former - written if _TRAJECTORY.fullmatch(key)))

    def _put(self, entry: Entry, data: Buffer) -> None:
        self._note(entry)
        self._pending[f"{entry.file_stem()}.{self._format}"] = data
        if (
            len(self._pending) >= _TOGETHER_FILES
            or sum(memoryview(d).nbytes for d in self._pending.values()) >= _TOGETHER_BYTES
        ):
            self._write_pending()

    def _write_pending(self) -> None:
        for key in self._former & set(self._pending):
            self._filesystem.overwrite(key, bytes(self._pending.pop(key)), durable=True)
        if self._pending:
            self._filesystem.store({key: [data] for key, data in self._pending.items()})
        self._pending.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this writer has finished; make another")


def write_directory(
    url: Url,
    trajectories: Iterable[tuple[int, Mapping[str, Any]]],
    *,
    trajectory_format: str = "pt",
    seed: int | None = None,
    trajectory_counter: int | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    total: int | None = None,
    progress: bool = False,
) -> Metadata:
    """Write a directory that RLinf can load.

    Args:
        url: See ``RlinfWriter``, also for what is not described here.
        trajectories: Id and fields of each, in the order of the list.
        trajectory_format: See there.
        seed: See there.
        trajectory_counter: See there.
        overwrite: See there.
        storage_options: See there.
        total: How many there are, for the bar.
        progress: Show a bar on standard error.

    Raises:
        StoreExistsError: A buffer is saved there, and ``overwrite`` was not said.
        SchemaError: RLinf could not read one of them; no index is written then.
    """
    writer = RlinfWriter(
        url,
        trajectory_format=trajectory_format,
        seed=seed,
        trajectory_counter=trajectory_counter,
        overwrite=overwrite,
        storage_options=storage_options,
    )
    try:
        for trajectory_id, fields in counted(trajectories, total=total, what="writing", shown=progress):
            writer.add(trajectory_id, fields)
        return writer.finish()
    finally:
        writer.abandon()
