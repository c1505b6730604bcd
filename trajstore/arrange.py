"""``merge`` and ``split``: stores made of stores, whose steps stay where they are.

Invariant: sources are only read (and pinned, where the result refers to them), and everything that can be refused is refused
before anything is written. The result remembers where each trajectory came from: ``source_store`` is the identity of the
store that it was appended to, ``source_id`` its id there.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from trajstore.edit.combine import Share, combine
from trajstore.edit.lineage import lineage
from trajstore.errors import SelectionError
from trajstore.opening import open
from trajstore.storage.attach import find_existing, taken
from trajstore.storage.commit import History
from trajstore.storage.connect import connect, options_for
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers
from trajstore.store import Store
from trajstore.stored import Array
from trajstore.view import View

Place = str | os.PathLike[str]
Options = Mapping[str, Any] | None
_PARTS_AT_ONCE = 2  # each holds its rows in memory
_OPENED_AT_ONCE = 16  # of stores that answer over a network; others wait for a processor, of which Python uses one


def merge(
    sources: Sequence[Place | Store | View],
    out: Place,
    *,
    order: Literal["concat", "interleave"] = "concat",
    share: Share = "reference",
    allow_unpinned: bool = False,
    storage_options: Options = None,
    bases: Mapping[str, Options] | None = None,
    progress: bool | None = None,
) -> int:
    """Make one store of several, by writing rows about trajectories; no step is read.

    Two metadata fields say where each trajectory came from: ``source_store``, the uuid of its store, and ``source_id``, its
    id there. What has them from an earlier merge keeps them.

    Args:
        sources: URLs, stores or views, of which all trajectories are taken.
        out: Where the result goes; no store with trajectories may be there.
        order: ``"concat"``: one source after the other. ``"interleave"``: ids ascend, and for each id sources take turns.
        share: ``"reference"``: segments stay where they are, and are pinned there, so that vacuum leaves them. ``"link"``:
            hard links on one disk, server-side copies in one bucket, else copies. ``"copy"``: bytes of its own.
        allow_unpinned: Also refer to sources that cannot be written, where nothing keeps vacuum from removing segments.
        storage_options: For sources and result, as far as these are URLs of buckets.
        bases: Where stores may lie that sources refer to in turn; see ``trajstore.open``.
        progress: Show bytes copied on standard error; by default in a terminal, if there are many.

    Returns:
        Trajectories in the result, numbered from 0 there.

    Raises:
        SchemaConflictError: Sources whose columns or fields differ, or that have other fields of the names above.
        StoreExistsError: A store is at ``out``.
        StoreNotFoundError: A source is no store.
        SelectionError: No source, or ``out`` is one of them.
        ReadOnlyError: A source cannot be pinned.
        UntrustedBaseError: A source refers to a store at a place that ``bases`` does not name.

    Examples:
        >>> import numpy as np, trajstore
        >>> for name in "ab":
        ...     with trajstore.open(f"memory://docs/merge/{name}", mode="a") as store:
        ...         _ = store.append({"action": np.arange(3)}, task=name)
        >>> trajstore.merge(["memory://docs/merge/a", "memory://docs/merge/b"], "memory://docs/merge/all")
        2
    """
    if order not in ("concat", "interleave"):
        raise SelectionError(f"order={order!r}, expected 'concat' or 'interleave'")
    if isinstance(sources, str | os.PathLike | Store | View):
        raise SelectionError("sources= is a list of stores, URLs or views; found one of them")
    with _views(sources, storage_options, bases) as views, _targets([out], views, storage_options) as targets:
        ids = np.concatenate([view.ids for view in views]) if views else np.empty(0, np.int64)
        rows = np.argsort(ids, kind="stable") if order == "interleave" else None
        _write(views, targets[0], rows, share, "merge", allow_unpinned, progress)
        return len(ids)


def split(
    source: Place | Store | View,
    outs: Place | Mapping[Place, float | str],
    *,
    first: int | None = None,
    where: str | None = None,
    seed: int = 0,
    share: Share = "reference",
    allow_unpinned: bool = False,
    storage_options: Options = None,
    bases: Mapping[str, Options] | None = None,
    progress: bool | None = None,
) -> dict[str, int]:
    """Make stores of parts of one; no step is read. Lineage is kept as ``merge`` does.

    Args:
        source: URL, store or view.
        outs: One place, for ``first`` or ``where``; or several, each with how many trajectories it gets, from the oldest on
            (``{"early": 1000, "late": 500}``), with a fraction of them, drawn at random (``{"train": 0.9, "test": 0.1}``),
            or with an expression as for ``View.filter`` (``{"long": "length > 100", "picks": "task == 'pick'"}``).
        first: The oldest so many trajectories.
        where: Those for which this holds, as in ``View.filter``.
        seed: Of random parts: the same seed makes the same parts. No trajectory is in two of them; in each, the order stays.
        share: As for ``merge``.
        allow_unpinned: As for ``merge``.
        storage_options: As for ``merge``.
        bases: As for ``merge``.
        progress: As for ``merge``.

    Returns:
        Trajectories in each result.

    Raises:
        SelectionError: Fractions that add up to more than 1, counts to more than there are, or an expression that cannot be
            understood.
        StoreExistsError: A store is at one of the places; then none is made.
        StoreNotFoundError: The source is no store.
        StorageError: A part cannot be written; those that were made before it stay.

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/split/all", mode="a") as store:
        ...     for n in range(1, 11):
        ...         _ = store.append({"action": np.arange(n)})
        >>> trajstore.split("memory://docs/split/all", {"memory://docs/split/a": 0.8, "memory://docs/split/b": 0.2})
        {'memory://docs/split/a': 8, 'memory://docs/split/b': 2}
    """
    with _views([source], storage_options, bases) as views:
        parts = _parts(views[0], outs, first, where, seed)
        with _targets(parts, views, storage_options) as targets:
            _write_parts(list(zip(targets, parts.values(), strict=True)), share, allow_unpinned, progress)
        return {out: len(part) for out, part in parts.items()}


def _parts(
    view: View, outs: Place | Mapping[Place, float | str], first: int | None, where: str | None, seed: int
) -> dict[str, View]:
    """What goes where."""
    if not isinstance(outs, Mapping):
        if (first is None) == (where is None):
            raise SelectionError("one place takes first= or where=, one of the two; several places take a part each")
        part = view.filter(where) if where is not None else _counted(view, [first or 0])[0]
        return {os.fspath(outs): part}
    if first is not None or where is not None:
        raise SelectionError(
            "first= and where= are for one place; give each place a count, a fraction or an expression"
        )
    if not outs:
        raise SelectionError("no place to split to; name one at least")
    given = list(outs.values())
    if all(isinstance(part, str) for part in given):
        parts = [view.filter(str(part)) for part in given]
    elif all(isinstance(part, int | np.integer) and not isinstance(part, bool) for part in given):
        parts = _counted(view, [int(part) for part in given])
    elif all(isinstance(part, int | float | np.number) and not isinstance(part, bool) for part in given):
        parts = _drawn(view, [float(part) for part in given], seed)
    else:
        raise SelectionError(
            f"parts {given}; give each place a count (int), a fraction (float) or an expression (str), all of one kind"
        )
    return {os.fspath(out): part for out, part in zip(outs, parts, strict=True)}


def _counted(view: View, counts: Sequence[int]) -> list[View]:
    """The first so many, then the next."""
    if min(counts) < 1 or sum(counts) > len(view):
        raise SelectionError(
            f"{' + '.join(map(str, counts))} trajectories, expected at least 1 each and at most {len(view)} in all: so many "
            "are there"
        )
    ends = np.cumsum(counts).tolist()
    return [view[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _drawn(view: View, fractions: Sequence[float], seed: int) -> list[View]:
    """Random parts, each in the order of the view."""
    total = sum(fractions)
    if any(fraction > 1 or fraction < 0 for fraction in fractions):
        raise SelectionError(
            f"parts {', '.join(f'{fraction:g}' for fraction in fractions)}; give each place a count, a whole number from 1 "
            "on, or each a fraction from 0 to 1, which add up to at most 1: the two cannot be mixed"
        )
    if not total <= 1 + 1e-9:  # nor not-a-number
        raise SelectionError(f"fractions {list(fractions)}, expected numbers from 0 to 1 that add up to at most 1")
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(view))
    ends = np.round(np.cumsum(fractions) * len(view)).astype(np.int64)
    return [view.take(np.sort(part)) for part in np.split(shuffled, ends)[: len(fractions)]]


@contextlib.contextmanager
def _views(
    sources: Iterable[Place | Store | View], storage_options: Options, bases: Mapping[str, Options] | None
) -> Iterator[list[View]]:
    """All trajectories of each source; stores that are opened for it are closed afterwards."""
    opened: list[Store] = []
    sources = list(sources)
    far = any(isinstance(source, str) and "://" in source for source in sources)
    workers = Workers(_OPENED_AT_ONCE if far else os.cpu_count() or 1, name="trajstore-open")

    def view(source: Place | Store | View) -> View:
        if isinstance(source, View):
            return source
        if isinstance(source, Store):
            if source.mode != "r":
                source.flush()
            return source.trajectories
        if not isinstance(source, str | os.PathLike):
            raise SelectionError(f"a source is a {type(source).__name__}, expected a URL, a store or a view")
        store = open(source, storage_options=options_for(source, storage_options), bases=bases)
        opened.append(store)
        return store.rows_to_copy()

    try:
        yield workers.map(view, sources)
    finally:
        workers.close()
        for store in opened:
            store.close()


@contextlib.contextmanager
def _targets(outs: Iterable[Place], views: Sequence[View], storage_options: Options) -> Iterator[list[Filesystem]]:
    """Where results go.

    Raises:
        SelectionError: One is a source, or two are the same.
        StoreExistsError: One is taken.
    """
    sources = {view.source().filesystem.url.rstrip("/") for view in views}
    with contextlib.ExitStack() as stack:
        targets: dict[str, Filesystem] = {}
        for out in outs:
            target = stack.enter_context(
                contextlib.closing(connect(out, storage_options=options_for(out, storage_options)))
            )
            url = target.url.rstrip("/")
            if url in sources:
                raise SelectionError(
                    f"{os.fspath(out)} is one of the sources; choose another place (to keep only a part of a store, "
                    "delete() the rest)"
                )
            if url in targets:
                raise SelectionError(f"{os.fspath(out)} is named twice; give each part a place of its own")
            found = find_existing(target, History(target))
            if found is not None and found[1].number:
                raise taken(target)
            targets[url] = target
        yield list(targets.values())


def _write_parts(
    parts: Sequence[tuple[Filesystem, View]], share: Share, allow_unpinned: bool, progress: bool | None
) -> None:
    def write(part: tuple[Filesystem, View]) -> None:
        target, view = part
        _write([view], target, None, share, "split", allow_unpinned, progress)

    if share != "reference":  # it takes long, shows a bar for each, and can be interrupted
        for part in parts:
            write(part)
        return
    stopped = threading.Event()

    def write_unless_stopped(part: tuple[Filesystem, View]) -> None:
        if not stopped.is_set():
            with _set_by_errors(stopped):
                write(part)

    with contextlib.closing(Workers(_PARTS_AT_ONCE, name="trajstore-split")) as workers, _set_by_errors(stopped):
        workers.map(write_unless_stopped, parts)


@contextlib.contextmanager
def _set_by_errors(event: threading.Event) -> Iterator[None]:
    try:
        yield
    except BaseException:
        event.set()
        raise


def _write(
    views: Sequence[View],
    target: Filesystem,
    order: Array | None,
    share: Share,
    operation: str,
    allow_unpinned: bool,
    progress: bool | None,
) -> None:
    sources = [view.source() for view in views]
    combine(
        sources,
        target,
        share=share,
        order=order,
        fields=lineage(sources),
        operation=operation,
        pins="where possible" if allow_unpinned else "required",
        progress=progress,
    )
