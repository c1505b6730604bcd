"""Read a directory of RLinf's files, on a disk or in a bucket.

Invariant: an opened directory is complete: every trajectory that its index lists has its file. Files are read in the order
of the list, a bounded number of bytes ahead.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from trajstore.errors import CorruptionError, MissingObjectError, StoreNotFoundError
from trajstore.format.layout import STORE_DOCUMENT
from trajstore.interop.rlinf_files.documents import (
    FORMATS,
    INDEX_KEYS,
    METADATA_KEY,
    Entry,
    check_ids,
    leading_shape,
    parse_index,
    parse_metadata,
)
from trajstore.interop.rlinf_files.trajectory_file import check_pickle, decode
from trajstore.progress import counted
from trajstore.storage.connect import connect
from trajstore.storage.filesystem import Filesystem

_READ_AHEAD_BYTES = 64 * 1024 * 1024
_READ_AHEAD_FILES = 32
_SHOWN = 3
_KINDS = {STORE_DOCUMENT: "a store", METADATA_KEY: "RLinf's files"}  # of a buffer that a rank saved, by its document

Url = str | os.PathLike[str]
Fields = dict[str, Any]


@dataclass(frozen=True)
class TrajectoryFile:
    """Where a trajectory is.

    Attributes:
        entry: What the index says of it.
        filesystem: Its folder.
        key: Its name there.
        nbytes: Its size.
        trajectory_format: ``"pt"`` or ``"pkl"``, by the name.
    """

    entry: Entry
    filesystem: Filesystem
    key: str
    nbytes: int
    trajectory_format: str

    @property
    def where(self) -> str:
        """Names it in errors."""
        return f"{self.key} in {self.filesystem.description}"


class RlinfDirectory:
    """What a buffer of RLinf saved. A context manager.

    Args:
        url: Of the directory: a path, or a URL that trajstore opens.
        storage_options: For the filesystem of a URL.

    Attributes:
        metadata: What ``metadata.json`` says.
        entries: What the index says, in the order of its list.
        files: Where the trajectories are, in the same order.

    Raises:
        StoreNotFoundError: There is no ``metadata.json``, or no index.
        CorruptionError: One of the two cannot be understood.
        MissingObjectError: A trajectory of the index has no file.
    """

    def __init__(self, url: Url, *, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
        self._filesystems = [connect(url, storage_options=storage_options)]
        try:
            filesystem = self._filesystems[0]
            metadata, index_key, index = _documents_that_must_be_there(filesystem)
            self.metadata = parse_metadata(metadata, where=f"{METADATA_KEY} in {filesystem.description}")
            self.entries = tuple(parse_index(index, where=f"{index_key} in {filesystem.description}"))
            self.files = tuple(self._find())
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Trajectories."""
        return len(self.entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ids(self) -> list[int]:
        """``trajectory_id_list``."""
        return [entry.trajectory_id for entry in self.entries]

    @property
    def total_samples(self) -> int:
        """T * B of all trajectories."""
        return sum(entry.num_samples for entry in self.entries)

    def trajectories(
        self, ids: Iterable[int] | None = None, *, allow_pickle: bool = False, progress: bool = False
    ) -> Iterator[tuple[int, Entry, Fields]]:
        """Read trajectories.

        Args:
            ids: Which, in this order; by default all.
            allow_pickle: Whether ``.pkl`` files may be unpickled, which can run any code.
            progress: Show a bar on standard error.

        Returns:
            For each: its id, what the index says of it, and its fields, with tensors on the CPU.

        Raises:
            SelectionError: An id that is not in the index.
            UntrustedPickleError: One is a pickle; before anything is read.
            CorruptionError: A file is damaged, or its shape is not that of the index; when it is its turn.
        """
        return self._read(self.select(ids), allow_pickle, progress)

    def select(self, ids: Iterable[int] | None = None) -> list[TrajectoryFile]:
        """The files of these trajectories, in this order; by default all.

        Raises:
            SelectionError: An id that is not in the index.
        """
        if ids is None:
            return list(self.files)
        wanted = list(ids)
        check_ids(self.ids, wanted, where=self._filesystems[0].description)
        by_id = {file.entry.trajectory_id: file for file in self.files}
        return [by_id[number] for number in wanted]

    def close(self) -> None:
        """Let go of connections. May be called twice."""
        for filesystem in self._filesystems:
            filesystem.close()

    def _read(
        self, files: Sequence[TrajectoryFile], allow_pickle: bool, progress: bool
    ) -> Iterator[tuple[int, Entry, Fields]]:
        for file in files:
            if file.trajectory_format == "pkl":
                check_pickle(file.where, allow_pickle=allow_pickle)

        def read() -> Iterator[tuple[int, Entry, Fields]]:
            for file, data in read_files(files):
                yield file.entry.trajectory_id, file.entry, _fields(file, data, allow_pickle)

        return counted(read(), total=len(files), what="reading", shown=progress)

    def _find(self) -> Iterator[TrajectoryFile]:
        """The file of each entry; a buffer of the first generation may have kept them in another folder of the same disk."""
        folders = [_Listing.of(self._filesystems[0])]
        elsewhere = self.metadata.storage_dir
        if elsewhere is not None and "://" not in self.url and os.path.isdir(elsewhere):
            self._filesystems.append(connect(elsewhere))
        found: list[TrajectoryFile] = []
        missing: list[str] = []
        for entry in self.entries:
            file = folders[0].find(entry, self.metadata.trajectory_format)
            if file is None and len(self._filesystems) > 1:
                if len(folders) == 1:
                    folders.append(_Listing.of(self._filesystems[1]))
                file = folders[1].find(entry, self.metadata.trajectory_format)
            if file is None:
                missing.append(f"{entry.file_stem()}.{self.metadata.trajectory_format}")
            else:
                found.append(file)
        if missing:
            places = " or ".join(filesystem.description for filesystem in self._filesystems)
            raise MissingObjectError(
                f"{len(missing)} of {len(self.entries)} trajectories of the index have no file in {places}: "
                f"{', '.join(missing[:_SHOWN])}{', ...' if len(missing) > _SHOWN else ''}; restore them from a copy"
            )
        return iter(found)


def open_directories(url: Url, *, storage_options: Mapping[str, Any] | None = None) -> list[RlinfDirectory]:
    """The directory at a place, or those of all its ``rank_*`` folders in the order of their names.

    Raises:
        StoreNotFoundError: There is neither.
        MissingObjectError: Some of the folders hold RLinf's files, and others do not.
        CorruptionError: See ``RlinfDirectory``.
        MissingObjectError: See ``RlinfDirectory``.
    """
    if is_rlinf_directory(url, storage_options=storage_options):
        return [RlinfDirectory(url, storage_options=storage_options)]
    filesystem = connect(url, storage_options=storage_options)
    try:
        names = all_ranks_with(METADATA_KEY, rank_folders(filesystem), where=filesystem.description)
    finally:
        filesystem.close()
    if not names:
        raise StoreNotFoundError(
            f"no buffer of RLinf's at {filesystem.description}: neither {METADATA_KEY} nor a folder rank_* that has one; "
            "check the path"
        )
    opened: list[RlinfDirectory] = []
    try:
        for name in names:
            place = f"{os.fspath(url).rstrip('/')}/{name}"
            opened.append(RlinfDirectory(place, storage_options=storage_options))
    except BaseException:
        for directory in opened:
            directory.close()
        raise
    return opened


def rank_folders(filesystem: Filesystem) -> dict[str, frozenset[str]]:
    """The folders ``rank_*`` of a place, and which documents of a buffer, of a store or of RLinf's files, lie in each.

    Only what lies directly in the place is listed: a path that was mistyped may be of anything.
    """
    folders = [name for name in filesystem.list_folders() if name.startswith("rank_")]
    keys = [f"{folder}/{document}" for folder in folders for document in _KINDS]
    there = {key for key, data in zip(keys, filesystem.read_many(keys), strict=True) if data is not None}
    return {name: frozenset(document for document in _KINDS if f"{name}/{document}" in there) for name in folders}


def all_ranks_with(document: str, folders: Mapping[str, Collection[str]], *, where: str) -> list[str]:
    """Folders of ranks, in the order of their names, each of which holds a document; none if none does. Pure: no I/O.

    Args:
        document: Its name.
        folders: See ``rank_folders``.
        where: Names the place in errors.

    Raises:
        MissingObjectError: Some hold it, and others do not: what these ranks saved would be left out.

    Examples:
        >>> folders = {"rank_1": ["metadata.json"], "rank_0": ["metadata.json"]}
        >>> all_ranks_with("metadata.json", folders, where="it"), all_ranks_with("trajstore.json", folders, where="it")
        (['rank_0', 'rank_1'], [])
    """
    lacking = sorted(name for name, inside in folders.items() if document not in inside)
    if not lacking or len(lacking) == len(folders):
        return [] if lacking else sorted(folders)
    told = [f"{name} ({_kind(folders[name])})" for name in lacking[:_SHOWN]] + ["..."] * (len(lacking) > _SHOWN)
    raise MissingObjectError(
        f"{len(lacking)} of the {len(folders)} folders rank_* in {where} lack the {document} that the others have: "
        f"{', '.join(told)}; restore what these ranks saved, save it in the format of the others, or move folders that are "
        "no buffers elsewhere"
    )


def _kind(documents: Collection[str]) -> str:
    return next((kind for document, kind in _KINDS.items() if document in documents), "no whole buffer")


def is_rlinf_directory(url: Url, *, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether ``metadata.json`` and an index are there."""
    filesystem = connect(url, storage_options=storage_options)
    try:
        metadata, _, index = _documents(filesystem)
    finally:
        filesystem.close()
    return metadata is not None and index is not None


def read_files(files: Sequence[TrajectoryFile]) -> Iterator[tuple[TrajectoryFile, bytes]]:
    """The bytes of files, a few read together.

    Raises:
        MissingObjectError: One has gone since the directory was listed.
    """
    start = 0
    while start < len(files):
        stop, nbytes = start, 0
        while (
            stop < len(files) and stop - start < _READ_AHEAD_FILES and files[stop].filesystem is files[start].filesystem
        ):
            nbytes += files[stop].nbytes
            if nbytes > _READ_AHEAD_BYTES and stop > start:
                break
            stop += 1
        together = files[start:stop]
        found = files[start].filesystem.read_many([file.key for file in together])
        for number, file in enumerate(together):
            data, found[number] = found[number], None  # its memory goes with its turn
            if data is None:
                raise MissingObjectError(f"{file.where} is not there any more; restore it from a copy")
            yield file, data
        start = stop


def _fields(file: TrajectoryFile, data: bytes, allow_pickle: bool) -> Fields:
    fields = decode(data, file.trajectory_format, where=file.where, allow_pickle=allow_pickle)
    shape = leading_shape(fields)
    if shape is None or shape[:2] != file.entry.shape[:2]:
        found = "neither prev_logprobs nor rewards" if shape is None else f"[T, B] = {list(shape[:2])}"
        raise CorruptionError(
            f"{file.where} has {found}, its index says {list(file.entry.shape[:2])}: they are not of one save; restore both "
            "from a copy"
        )
    return fields


def _documents_that_must_be_there(filesystem: Filesystem) -> tuple[bytes, str, bytes]:
    metadata, index_key, index = _documents(filesystem)
    if metadata is None or index is None:
        missing = METADATA_KEY if metadata is None else INDEX_KEYS[0]
        raise StoreNotFoundError(
            f"no buffer of RLinf's at {filesystem.description}: {missing} is not there; check the path, or name one of its "
            "rank_* folders"
        )
    return metadata, index_key, index


def _documents(filesystem: Filesystem) -> tuple[bytes | None, str, bytes | None]:
    """``metadata.json``; the name of the index that is there, and the index."""
    metadata, *indices = filesystem.read_many([METADATA_KEY, *INDEX_KEYS])
    for key, data in zip(INDEX_KEYS, indices, strict=True):
        if data is not None:
            return metadata, key, data
    return metadata, INDEX_KEYS[0], None


@dataclass(frozen=True)
class _Listing:
    """Trajectory files of a folder.

    Attributes:
        filesystem: The folder.
        nbytes: Name -> size.
        by_id: The id in a name, as text -> names that have it.
    """

    filesystem: Filesystem
    nbytes: Mapping[str, int]
    by_id: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, filesystem: Filesystem) -> _Listing:
        nbytes: dict[str, int] = {}
        by_id: dict[str, list[str]] = {}
        for info in filesystem.list_objects(""):
            parts = info.key.split("_", 2)
            if "/" in info.key or parts[0] != "trajectory" or len(parts) < 3 or info.key.rsplit(".")[-1] not in FORMATS:
                continue
            nbytes[info.key] = info.nbytes
            by_id.setdefault(parts[1], []).append(info.key)
        return cls(filesystem, nbytes, by_id)

    def find(self, entry: Entry, trajectory_format: str) -> TrajectoryFile | None:
        """The file of a trajectory: by its name, else by a longer one, else the only one of its id."""
        ending = f".{trajectory_format}"
        key = entry.file_stem() + ending
        if key not in self.nbytes:
            candidates = list(self.by_id.get(str(entry.trajectory_id), ()))
            candidates = [name for name in candidates if name.startswith(entry.file_stem())] or candidates
            candidates = [name for name in candidates if name.endswith(ending)] or candidates
            if not candidates:
                return None
            if len(candidates) > 1:
                raise CorruptionError(
                    f"{self.filesystem.description} has no {key}, but {len(candidates)} files that could be it: "
                    f"{', '.join(sorted(candidates)[:_SHOWN])}; remove those that are of other saves"
                )
            key = candidates[0]
        return TrajectoryFile(entry, self.filesystem, key, self.nbytes[key], key.rsplit(".")[-1])
