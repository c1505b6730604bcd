"""Every error that trajstore raises on purpose: one tree, each leaf also the builtin that people catch.

    TrajstoreError
    ├── SchemaError (ValueError)              a column, its name, its type, or how columns fit together
    │   ├── ColumnNameError
    │   ├── ColumnTypeError (TypeError)       wrong dtype, or a dtype that cannot be stored
    │   ├── ColumnShapeError
    │   ├── MissingColumnError (KeyError)
    │   ├── UnknownColumnError (KeyError)
    │   ├── LengthError                       lengths that differ, zero steps
    │   ├── MetadataError                     a metadata field: its name or its type
    │   └── SchemaConflictError               two writers, or a store and its caller, disagree on the schema
    ├── SelectionError (ValueError)           a filter, window, or sample that selects nothing or cannot be understood
    │   ├── IndexRangeError (IndexError)
    │   ├── EmptyBufferError (RuntimeError)   sampling from a replay buffer that holds nothing
    │   └── BufferFullError                   more rows than a rollout buffer was made for
    ├── CacheTooSmallError (ValueError)       a page cache that cannot hold one window
    ├── StoreNotFoundError (FileNotFoundError)
    ├── StoreExistsError (FileExistsError)
    ├── FormatVersionError (NotImplementedError)  written by a newer trajstore
    ├── VersionNotFoundError (LookupError)
    │   └── VersionExpiredError               it existed; vacuum emptied it
    ├── TagNameError (ValueError)             a text that cannot be the name of a tag
    ├── TagExistsError (FileExistsError)      a tag of this name, for another version
    ├── CorruptionError (ValueError)          an object's bytes are not what was written
    ├── StorageError (OSError)                the disk or bucket failed; the cause is chained
    │   ├── MissingObjectError (FileNotFoundError)
    │   ├── StoragePermissionError (PermissionError)
    │   ├── StorageTimeoutError (TimeoutError)
    │   └── UnsupportedStorageError           cannot create an object atomically
    ├── UntrustedBaseError (PermissionError)  segments of another store, outside the trusted prefixes
    ├── UntrustedPickleError (PermissionError)  a pickle, which could run any code, without allow_pickle
    ├── CommitError (RuntimeError)            appended trajectories could not be committed
    │   ├── CommitOutcomeUnknownError         the storage never said whether it landed
    │   ├── CommitTooOldError                 its objects are so old that a vacuum may have removed them
    │   └── ManifestsChangedError             an edit was made from a version that others have rewritten since
    ├── EditUnderWayError (RuntimeError)      bytes cannot be reclaimed while an edit is under way in another thread
    ├── ReadOnlyError (PermissionError)
    ├── ClosedError (ValueError)
    ├── ForkedError (RuntimeError)            a handle used in a forked child
    ├── RecordingError (RuntimeError)         an environment that does not do what its recorder must rely on
    └── EnvironmentNotFoundError (LookupError)  a recorder was asked for an environment that is not registered

Each message says what was found, what was expected and what to do next.
"""

from __future__ import annotations


class TrajstoreError(Exception):
    """Base of every error that trajstore raises on purpose."""

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, OSError its number: messages here are sentences, and come last.
        return str(self.args[-1]) if self.args else ""


class SchemaError(TrajstoreError, ValueError):
    """A column, its name, its type, or how columns fit together."""


class ColumnNameError(SchemaError):
    """A column path that cannot be an object key on every storage."""


class ColumnTypeError(SchemaError, TypeError):
    """Values of a dtype that the column does not take, or that cannot be stored at all."""


class ColumnShapeError(SchemaError):
    """Values whose per-step shape is not the column's."""


class MissingColumnError(SchemaError, KeyError):
    """A required column is absent."""


class UnknownColumnError(SchemaError, KeyError):
    """A column that the schema does not name."""


class LengthError(SchemaError):
    """Columns of one trajectory with lengths that do not agree, or with zero steps."""


class MetadataError(SchemaError):
    """A metadata field whose name is reserved or whose value does not fit its type."""


class SchemaConflictError(SchemaError):
    """Two schemas that cannot both hold in one store."""


class SelectionError(TrajstoreError, ValueError):
    """A filter, window or sample that selects nothing or cannot be understood."""


class IndexRangeError(SelectionError, IndexError):
    """A trajectory or step number outside what there is."""


class EmptyBufferError(SelectionError, RuntimeError):
    """Sampling from a replay buffer that holds nothing."""


class BufferFullError(SelectionError):
    """More rows than a rollout buffer was made for."""


class CacheTooSmallError(TrajstoreError, ValueError):
    """A page cache that cannot hold the pages of one window."""


class StoreNotFoundError(TrajstoreError, FileNotFoundError):
    """There is no store at this URL."""


class StoreExistsError(TrajstoreError, FileExistsError):
    """A store that must be new is already there."""


class FormatVersionError(TrajstoreError, NotImplementedError):
    """The store was written by a newer trajstore."""


class VersionNotFoundError(TrajstoreError, LookupError):
    """The store has no such version."""


class VersionExpiredError(VersionNotFoundError):
    """The version existed; vacuum has emptied it since."""


class TagNameError(TrajstoreError, ValueError):
    """A text that cannot be the name of a tag."""


class TagExistsError(TrajstoreError, FileExistsError):
    """A tag of this name is there, for another version."""


class CorruptionError(TrajstoreError, ValueError):
    """An object's bytes are not those that were written."""


class StorageError(TrajstoreError, OSError):
    """The disk or the bucket failed; the cause is chained."""


class MissingObjectError(StorageError, FileNotFoundError):
    """An object that the store refers to is not there."""


class StoragePermissionError(StorageError, PermissionError):
    """The storage refused access: permissions, a read-only mount, or credentials."""


class StorageTimeoutError(StorageError, TimeoutError):
    """The storage did not answer within the time allowed."""


class UnsupportedStorageError(StorageError):
    """The storage cannot create an object atomically, so commits could overwrite each other."""


class UntrustedBaseError(TrajstoreError, PermissionError):
    """The store refers to segments of another store outside the trusted prefixes."""


class UntrustedPickleError(TrajstoreError, PermissionError):
    """A file that only unpickling can read, which could run any code, without ``allow_pickle=True``."""


class CommitError(TrajstoreError, RuntimeError):
    """Appended trajectories could not be committed; they are not in the store."""


class CommitOutcomeUnknownError(CommitError):
    """The storage never said whether the commit landed; it may or may not be in the store."""


class CommitTooOldError(CommitError):
    """What was to be committed was stored so long ago that a vacuum may have removed it."""


class ManifestsChangedError(CommitError):
    """An edit was made from a version whose manifests others have rewritten since."""


class EditUnderWayError(TrajstoreError, RuntimeError):
    """Bytes cannot be reclaimed while an edit is under way in another thread of the same handle."""


class ReadOnlyError(TrajstoreError, PermissionError):
    """A write through a handle that was opened for reading."""


class ClosedError(TrajstoreError, ValueError):
    """A store, episode or loader was used after it was closed."""


class ForkedError(TrajstoreError, RuntimeError):
    """A handle that was opened in the parent was used in a forked child."""


class RecordingError(TrajstoreError, RuntimeError):
    """An environment was used, or behaves, in a way that its recorder cannot turn into episodes."""


class EnvironmentNotFoundError(TrajstoreError, LookupError):
    """No environment is registered under this id."""
