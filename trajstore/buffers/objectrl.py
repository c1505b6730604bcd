"""ObjectRL's ``ReplayBuffer``: transitions as TensorDicts, in and out.

    from trajstore.buffers.objectrl import ReplayBuffer  # instead of objectrl.replay_buffers.experience_memory

Invariant: the file ``path + ".metadata"`` is replaced in one step, after the experience that it names is durable in the
store ``path + ".store"`` and before older experience is deleted there: whatever happens during ``save``, one whole state
can be loaded.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trajstore.buffers.ring import Ring, check_not_empty
from trajstore.buffers.ring_store import RingStore
from trajstore.buffers.stored_ring import StoredRing
from trajstore.errors import (
    ClosedError,
    ColumnShapeError,
    ColumnTypeError,
    CorruptionError,
    MissingObjectError,
    SelectionError,
)
from trajstore.names import nest
from trajstore.storage.connect import options_for
from trajstore.storage.single_file import read_file, replace_file

if TYPE_CHECKING:
    from tensordict import TensorDict

_DISK = "disk:"
_METADATA = ".metadata"
_METADATA_KEYS = ("buffer_size", "data_size", "pointer")


class ReplayBuffer:
    """The newest ``buffer_size`` transitions.

    With ``url`` they live in a store, otherwise in memory. Close a buffer in a store, or use it as a context manager; one
    that nobody closes is closed when it is collected, or at the interpreter's end. After ``close`` its attributes can still
    be read; everything else raises ``ClosedError``.

    Args:
        device: Where batches are put.
        storing_device: Where transitions are kept; ``"disk:URL"`` is the same as ``url=URL``.
        buffer_size: Transitions.
        print_gc_warning: ObjectRL takes it and never looks at it; it warns whenever it has to run the garbage collector to
            get room. That never happens here, so True only warns that there is nothing to print.
        url: Keep transitions in a store at this URL, or go on with those that are there; whatever ``trajstore.open`` takes.
            They are durable after ``flush``. One buffer at a time may write there: ``StoredRing`` says what happens
            otherwise.
        storage_options: For ``url``, and for what ``save`` and ``load`` are given, where these are URLs.

    Raises:
        ImportError: The package tensordict is missing; says what to install.
        SelectionError: A size below 1, a place that is a file or no place at all, or a store that holds something else.
        CommitError: From any method, once it is found that another buffer writes to the same store; nothing is lost.

    Examples:
        >>> from tensordict import TensorDict
        >>> buffer = ReplayBuffer(device=torch.device("cpu"), storing_device=torch.device("cpu"), buffer_size=1000)
        >>> buffer.add(TensorDict({"obs": torch.zeros(3), "reward": torch.tensor(1.0)}))
        >>> buffer.add_batch(TensorDict({"obs": torch.ones(4, 3), "reward": torch.arange(4.0)}, batch_size=[4]))
        >>> len(buffer), buffer.sample_batch(64)["obs"].shape, buffer.sample_by_index([0, 4])["reward"]
        (5, torch.Size([64, 3]), tensor([1., 3.]))
    """

    def __init__(
        self,
        device: torch.device | str,
        storing_device: torch.device | str = "cpu",
        buffer_size: int = 100_000,
        print_gc_warning: bool = False,
        *,
        url: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from tensordict import TensorDict
        except ImportError as error:
            raise ImportError(
                "the buffers of ObjectRL give TensorDicts and need the package tensordict: pip install "
                "'trajstore[tensordict]'"
            ) from error
        if print_gc_warning:
            warnings.warn(
                "print_gc_warning=True has no effect: this buffer never runs the garbage collector; leave it out",
                stacklevel=2,
            )
        self._make: Callable[..., TensorDict] = TensorDict
        self._storage_options = storage_options
        self.device = torch.device(device)
        place = _place(storing_device, url)
        self.storing_device: torch.device | str
        self._ring: Ring | StoredRing
        if place is None:
            self.storing_device = torch.device(storing_device)
            self._ring = Ring(buffer_size, device=self.storing_device)
        else:
            self.storing_device = f"{_DISK}{place}"
            self._ring = StoredRing(place, buffer_size, device=self.device, storage_options=storage_options)
        self._closed = False
        self._moves = self._ring.device != torch.empty(0, device=self.device).device
        self._epochs: Iterator[TensorDict] | None = None
        self._numbers: tuple[int, int] | None = None  # data_size and pointer of a file that came without experience

    @property
    def buffer_size(self) -> int:
        """Transitions that there is room for."""
        return self._ring.capacity

    @property
    def data_size(self) -> int:
        """Transitions that it holds; after ``load`` of a file without them, and until the first ``add``, what that says."""
        return self._numbers[0] if self._numbers else self._ring.size

    @property
    def pointer(self) -> int:
        """Where the next transition goes."""
        return self._numbers[1] if self._numbers else self._ring.pointer

    @property
    def size(self) -> int:
        """Transitions that it holds."""
        return self._ring.size

    def __len__(self) -> int:
        return self._ring.size

    def __repr__(self) -> str:
        return (
            f"ReplayBuffer(buffer_size={self.buffer_size}, size={self.size}, device={str(self.device)!r}, "
            f"storing_device={str(self.storing_device)!r})"
        )

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, buffer_size: int | None = None) -> None:
        """Forget all transitions; those that come next may have other fields.

        Args:
            buffer_size: From now on.

        Raises:
            CommitError: Another buffer wrote to the store, and nothing was deleted.
        """
        self._check_open()
        if isinstance(self._ring, StoredRing):
            self._ring.clear(buffer_size)
        else:
            capacity = self._ring.capacity if buffer_size is None else buffer_size
            self._ring = Ring(capacity, device=self._ring.device)
        self._epochs = self._numbers = None

    def add(self, experience: TensorDict | Mapping[str, Any]) -> None:
        """Add one transition.

        Args:
            experience: Without a batch dimension; nested TensorDicts are fine, and so are mappings of tensors. The first one
                says what columns there are.

        Raises:
            SchemaError: It is not like the others; one of its subclasses names the field. The buffer is as it was.
        """
        self._check_open()
        batch_size = getattr(experience, "batch_size", None)
        if batch_size:
            raise ColumnShapeError(
                f"a transition of batch size {list(batch_size)}, expected none; call add_batch, or take one element of it"
            )
        self._ring.add_one(_fields(experience))
        self._numbers = None

    def add_batch(self, experience: TensorDict | Mapping[str, Any]) -> None:
        """Add transitions, in order; of more than ``buffer_size`` the last ones.

        Args:
            experience: ``[n, ...]``.

        Raises:
            SchemaError: As for ``add``.
        """
        self._check_open()
        batch_size = getattr(experience, "batch_size", None)
        if batch_size is not None and not len(batch_size):
            raise ColumnShapeError("a batch without a batch size, expected [n]; call add for a single transition")
        self._ring.add(_fields(experience), keep_last=True)
        self._numbers = None

    def sample_batch(self, batch_size: int) -> TensorDict:
        """``[batch_size]`` transitions drawn uniformly, with replacement, by torch's global generator.

        Raises:
            EmptyBufferError: There are none.
        """
        self._check_open()
        ring = self._ring
        return self._batch(ring.gather(ring.sample_indices(batch_size), check=False), batch_size)

    def sample_random(self, batch_size: int) -> TensorDict:
        """The same as ``sample_batch``."""
        return self.sample_batch(batch_size)

    def sample_by_index(self, indices: Sequence[int] | torch.Tensor | range) -> TensorDict:
        """``[n]`` transitions by where they lie.

        Args:
            indices: ``0 .. size - 1``, in any order.

        Raises:
            IndexRangeError: One outside.
            EmptyBufferError: There are no transitions.
        """
        positions = self._positions(indices)
        return self._batch(self._ring.gather(positions), len(positions))

    def sample_by_index_fields(
        self, indices: Sequence[int] | torch.Tensor | range, fields: Sequence[str | tuple[str, ...]]
    ) -> TensorDict:
        """Some fields of ``sample_by_index``.

        Args:
            indices: As there.
            fields: Names; a nested one as ``("obs", "image")`` or ``"obs/image"``, and ``"obs"`` for all under it.

        Raises:
            UnknownColumnError: No such field.
        """
        if isinstance(fields, str):
            raise SelectionError(f"fields={fields!r} is a string, expected a list of names: [{fields!r}]")
        positions = self._positions(indices)
        paths = ["/".join(field) if isinstance(field, tuple) else field for field in fields]
        names = list(dict.fromkeys(column.path for path in paths for column in self._ring.schema.select(path)))
        return self._batch(self._ring.gather(positions, names=names), len(positions))

    def sample_all(self) -> TensorDict:
        """All transitions, in storage order."""
        return self.sample_by_index(range(self.size))

    def create_epoch_iterator(self, batch_size: int, n_epochs: int = 1) -> Iterator[TensorDict]:
        """Batches of all transitions in storage order, ``n_epochs`` times; the last batch of each may be short.

        ``get_next_batch`` takes from this iterator from now on.

        Raises:
            EmptyBufferError: There are no transitions.
        """
        self._check_open()
        _at_least_one("batch_size", batch_size)
        check_not_empty(self.size)
        starts = range(0, self.size, batch_size)
        size = self.size
        self._epochs = (
            self.sample_by_index(range(start, min(start + batch_size, size)))
            for start in itertools.chain.from_iterable(itertools.repeat(starts, n_epochs))
        )
        return self._epochs

    def get_next_batch(self, batch_size: int) -> TensorDict:
        """The next batch of the epoch iterator, or a random one if none was made since the last ``reset`` or ``load``.

        Args:
            batch_size: Of a random one; those of the iterator have the size that it was made with.

        Raises:
            StopIteration: The epochs are over; make another iterator, or call ``get_steps_and_iterator(0, ...)`` for random
                batches.
            EmptyBufferError: There are no transitions.
        """
        self._check_open()
        return self.sample_batch(batch_size) if self._epochs is None else next(self._epochs)

    def calculate_num_batches(self, batch_size: int) -> int:
        """Batches of one epoch, the short one included."""
        self._check_open()
        _at_least_one("batch_size", batch_size)
        return -(-self.size // batch_size)

    def get_steps_and_iterator(self, n_epochs: int, max_iter: int, batch_size: int) -> int:
        """Prepare ``get_next_batch``.

        Args:
            n_epochs: Passes over the transitions; 0 (or less) for random batches.
            max_iter: Steps, where ``n_epochs`` is 0.
            batch_size: Of a pass.

        Returns:
            How often to call ``get_next_batch``.

        Raises:
            EmptyBufferError: There are no transitions to pass over.
        """
        self._check_open()
        if n_epochs <= 0:
            self._epochs = None
            return max_iter
        self.create_epoch_iterator(batch_size, n_epochs)
        return n_epochs * self.calculate_num_batches(batch_size)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save everything: the numbers in ``path + ".metadata"``, the transitions as a store in ``path + ".store"``.

        A crash on the way leaves what was saved before.

        Args:
            path: Local, or a URL.

        Raises:
            SchemaConflictError: Transitions with other fields were saved there before; they are left as they are.
        """
        self._check_open()
        base = os.fspath(path)
        options = options_for(base, self._storage_options)
        numbers: dict[str, int] = {
            "buffer_size": self.buffer_size,
            "data_size": self.data_size,
            "pointer": self.pointer,
            "experience": 0,
        }
        if not len(self._ring.schema):
            if self._numbers:
                del numbers["experience"]  # they still come from a file of ObjectRL's own
            replace_file(f"{base}{_METADATA}", _pickled(numbers), storage_options=options)
            return
        with RingStore(f"{base}.store", "a", storage_options=options) as store:
            numbers["experience"] = self._ring.write_to(store)
            replace_file(f"{base}{_METADATA}", _pickled(numbers), storage_options=options)
            store.prune(numbers["experience"])

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore what ``save`` saved, in place of what is here.

        A file of ObjectRL's own has no transitions: an empty buffer takes its numbers, and one with transitions, of the same
        ``buffer_size``, stays as it is.

        Args:
            path: As given to ``save``: without ``.metadata``.

        Raises:
            MissingObjectError: No such file.
            CorruptionError: It is damaged.
            SchemaConflictError: Its transitions have other fields than those of this buffer, which lives in a store; if they
                may go, ``reset`` it first.
            SelectionError: It has no transitions, another ``buffer_size``, and this buffer is not empty. In each case the
                buffer is as it was.
        """
        self._check_open()
        base = os.fspath(path)
        name = f"{base}{_METADATA}"
        options = options_for(base, self._storage_options)
        try:
            data = read_file(name, storage_options=options)
        except MissingObjectError as error:
            if not base.endswith(_METADATA):
                raise
            raise MissingObjectError(
                f"{name} is not there; give the path without {_METADATA}, as to save: {base.removesuffix(_METADATA)!r}"
            ) from error
        numbers = _unpickled(data, name)
        capacity, size, pointer = (numbers[key] for key in _METADATA_KEYS)
        experience = numbers.get("experience")
        if experience is None:
            self._take_numbers(name, capacity, size, pointer)
        elif not experience:
            self.reset(capacity)
        else:
            with RingStore(f"{base}.store", storage_options=options) as store:
                if isinstance(self._ring, StoredRing):
                    self._ring.read_from(store, experience)
                else:
                    ring = Ring(capacity, device=self._ring.device)
                    ring.read_from(store, experience)
                    self._ring = ring
            self._numbers = None
        self._epochs = None

    def flush(self) -> None:
        """Make all transitions durable, where they live in a store."""
        self._check_open()
        if isinstance(self._ring, StoredRing):
            self._ring.flush()

    def close(self) -> None:
        """``flush``, and let go of the store, whatever ``flush`` raises. May be called twice."""
        self._closed = True
        if isinstance(self._ring, StoredRing):
            self._ring.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this buffer ({self.storing_device}) is closed; make another one")

    def _take_numbers(self, name: str, capacity: int, size: int, pointer: int) -> None:
        if self.size:
            if capacity != self.buffer_size:
                raise SelectionError(
                    f"{name} is of a buffer_size of {capacity}, without its experience; this buffer of {self.buffer_size} "
                    f"holds {self.size} transitions: call reset({capacity}) first, if they may go"
                )
            return
        self.reset(capacity)
        self._numbers = (size, pointer) if size else None

    def _positions(self, indices: Sequence[int] | torch.Tensor | range) -> torch.Tensor:
        """``(n,)`` int64 on the ring's device."""
        self._check_open()
        check_not_empty(self.size)
        home = self._ring.device if isinstance(self._ring, Ring) else torch.device("cpu")
        if isinstance(indices, range):
            return torch.arange(indices.start, indices.stop, indices.step, device=home) if len(indices) else _none(home)
        positions = torch.as_tensor(indices)
        if not positions.numel():
            return _none(home)
        if positions.dtype is torch.bool or positions.is_floating_point() or positions.is_complex():
            raise ColumnTypeError(f"indices of {positions.dtype}; expected whole numbers")
        return positions.reshape(-1).to(home, torch.int64)

    def _batch(self, rows: dict[str, torch.Tensor], n: int) -> TensorDict:
        tree = nest(rows)
        if self._moves:
            # Only towards an accelerator: a copy from one that nobody waits for would be read half done.
            return self._make(tree, batch_size=[n]).to(self.device, non_blocking=self.device.type != "cpu")
        return self._make(tree, batch_size=[n], device=self.device)


def _place(storing_device: torch.device | str, url: str | os.PathLike[str] | None) -> str | None:
    """Where the store is to be; None for a buffer in memory."""
    told = [] if url is None else [(f"url={os.fspath(url)!r}", os.fspath(url))]
    if isinstance(storing_device, str) and storing_device.startswith(_DISK):
        told.append((f"storing_device={storing_device!r}", storing_device.removeprefix(_DISK)))
    if not told:
        return None
    if len(told) > 1:
        raise SelectionError(f"{told[1][0]} and {told[0][0]} both say where; give one")
    argument, place = told[0]
    if not place.strip():
        raise SelectionError(f"{argument} names no place; give a folder or a URL, such as {_DISK}runs/experience")
    path = os.path.expanduser(place.removeprefix("file://"))
    if "://" not in path and os.path.exists(path) and not os.path.isdir(path):
        raise SelectionError(f"{argument}: a file is there, expected a folder with a store or a name that is free")
    return place


def _fields(experience: TensorDict | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(experience, Mapping):
        raise ColumnTypeError(f"a {type(experience).__name__}, expected a TensorDict, or a mapping of tensors")
    return dict(experience.items())


def _none(device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)


def _at_least_one(name: str, number: int) -> None:
    if number < 1:
        raise SelectionError(f"{name}={number}, expected at least 1")


def _pickled(numbers: dict[str, int]) -> bytes:
    file = io.BytesIO()
    torch.save(numbers, file)
    return file.getvalue()


def _unpickled(data: bytes, name: str) -> dict[str, int]:
    try:
        numbers = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CorruptionError(f"{name} cannot be read ({error}); load another checkpoint") from error
    missing = [key for key in _METADATA_KEYS if not isinstance(numbers, dict) or not isinstance(numbers.get(key), int)]
    if missing:
        raise CorruptionError(f"{name} has no whole number {missing[0]!r}; it is no file of a replay buffer")
    found: dict[str, int] = numbers
    return found
