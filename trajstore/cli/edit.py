"""Commands that change stores: each makes a new version, or a new store, and says which."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Optional

import typer

import trajstore
from trajstore import report_history as report
from trajstore.cli.common import (
    AsJson,
    Base,
    StorageOption,
    Url,
    Where,
    check_lasting,
    offer,
    open_store,
    parse_bases,
    parse_bytes,
    parse_options,
    print_json,
)
from trajstore.console import bold, err, out, quantity
from trajstore.read.bases import refers_to

Share = Annotated[
    str,
    typer.Option(
        help="reference: segments stay where they are, and are pinned there. link: hard links on one disk, copies by the "
        "server in one bucket, else copies. copy: bytes of its own.",
        autocompletion=offer("reference", "link", "copy"),
    ),
]
AllowUnpinned = Annotated[
    bool,
    typer.Option(
        "--allow-unpinned",
        help="Refer to stores that cannot be written, so that nothing keeps their vacuum from removing segments.",
    ),
]


def editable(url: str, storage_option: list[str] | None, base: list[str] | None = None) -> trajstore.Store:
    """The store that a command changes; it must be there."""
    check_lasting(url)
    open_store(url, storage_option, base).close()  # mode "a" would make one
    return open_store(url, storage_option, base, mode="a")


def merge(
    sources: Annotated[list[str], typer.Argument(help="Stores: paths or URLs.", metavar="SOURCE")],
    target: Annotated[str, typer.Option("--out", "-o", help="The store to make.")],
    order: Annotated[
        str,
        typer.Option(
            help="concat: one source after the other. interleave: by id, sources in turn.",
            autocompletion=offer("concat", "interleave"),
        ),
    ] = "concat",
    share: Share = "reference",
    allow_unpinned: AllowUnpinned = False,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Make one store of several. No step is read: only rows about trajectories are written.

    Where each trajectory came from is noted in the metadata fields
    source_store and source_id. With --share reference the sources must stay
    where they are; they are pinned, so that their vacuum leaves what the result
    needs. With --share link or copy the result stands alone.

    Example: trajstore merge runs/rank_0 runs/rank_1 -o runs/all --order interleave
    """
    check_lasting(target)
    count = trajstore.merge(
        sources,
        target,
        order=order,  # type: ignore[arg-type]
        share=share,  # type: ignore[arg-type]
        allow_unpinned=allow_unpinned,
        storage_options=parse_options(storage_option),
        bases=parse_bases(base, storage_option),
    )
    if as_json:
        print_json({"url": target, "trajectories": count})
    else:
        _tell({target: count})
    _tell_elsewhere([target], storage_option)


def split(
    url: Url,
    targets: Annotated[
        list[str],
        typer.Option(
            "--out",
            "-o",
            help="STORE, with --first or --where; or several, each STORE=FRACTION, STORE=COUNT or STORE=EXPRESSION. "
            "With a point it is a fraction: 1.0 are all, 1 is one.",
            metavar="STORE[=PART]",
        ),
    ],
    first: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The oldest so many, into one store.", min=1, metavar="N"),
    ] = None,
    where: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Those for which this holds, into one store, e.g. \"length > 100 and task == 'pick'\"."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of fractions, which are drawn at random.", min=0)] = 0,
    share: Share = "reference",
    allow_unpinned: AllowUnpinned = False,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Make stores of parts of one: at random, by number, or by an expression. No step is read.

    Fractions are drawn at random and counts taken from the oldest on; no
    trajectory gets into two of them.

    Example: trajstore split runs/all -o runs/train=0.9 -o runs/test=0.1 --seed 1

    Example: trajstore split runs/all -o runs/picks --where "task == 'pick'"
    """
    one_place = (first is not None or where is not None) and len(targets) == 1
    places = _one_place(targets[0]) if one_place else parse_places(targets)
    check_lasting(*([places] if isinstance(places, str) else map(str, places)))
    counts = trajstore.split(
        url,
        places,
        first=first,
        where=where,
        seed=seed,
        share=share,  # type: ignore[arg-type]
        allow_unpinned=allow_unpinned,
        storage_options=parse_options(storage_option),
        bases=parse_bases(base, storage_option),
    )
    if as_json:
        print_json(counts)
    else:
        _tell(counts)
    _tell_elsewhere(counts, storage_option)


def delete(
    url: Url,
    where: Annotated[str, typer.Option(help='Which trajectories, e.g. "length < 10" or "id in [3, 5]".')],
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Make a version without some trajectories. Earlier versions keep them; their bytes go with vacuum.

    Example: trajstore delete runs/demo --where "reward_sum < 0"
    """
    with editable(url, storage_option, base) as store:
        ids = store.trajectories.filter(where).ids
        if len(ids):
            store.delete(ids)
        _tell_deleted(store, url, len(ids), as_json)


def retain(
    url: Url,
    last: Annotated[Optional[int], typer.Option(help="At most so many trajectories.", min=0, metavar="N")] = None,  # noqa: UP045
    max_steps: Annotated[Optional[int], typer.Option(help="At most so many steps in all.", min=0, metavar="N")] = None,  # noqa: UP045
    max_bytes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="At most so many stored bytes in all, about: 500MB, 8GiB."),
    ] = None,
    where: Where = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Keep the newest trajectories within all limits, delete the others: the window of a replay buffer.

    With --where, those for which it does not hold go too, and limits count
    among the rest. Earlier versions keep what is deleted; its bytes go with
    vacuum.

    Example: trajstore retain runs/demo --last 1000 --max-bytes 10GiB
    """
    nbytes = None if max_bytes is None else parse_bytes(max_bytes)
    with editable(url, storage_option, base) as store:
        gone = store.retain(last=last, max_steps=max_steps, max_bytes=nbytes, where=where)
        _tell_deleted(store, url, gone, as_json)


def tag(
    url: Url,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Letters, digits, '.', '_' and '-'. Without: list the tags.", metavar="NAME"),
    ] = None,
    version: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which version, or another tag. Default: the latest."),
    ] = None,
    move: Annotated[bool, typer.Option("--move", help="Take the name from another version.")] = False,
    remove: Annotated[bool, typer.Option("--remove", "-d", help="Take the name away.")] = False,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
) -> None:
    """Give a version a name, or list names. A tagged version can be opened by its name, and vacuum keeps it.

    Example: trajstore tag runs/demo paper

    Then: trajstore ls runs/demo --version paper
    """
    if name is None:
        if remove or move or version is not None:
            raise typer.BadParameter("which tag? Give its name: trajstore tag URL NAME")
        with open_store(url, storage_option, None) as store:
            if as_json:
                print_json(report.frame_json(store.tags()))
            else:
                report.print_frame(out, store.tags(), empty="no tags; trajstore tag URL NAME makes one")
        return
    if remove and (move or version is not None):
        raise typer.BadParameter(
            "--remove takes the name away from whichever version has it; leave out --version and --move"
        )
    with editable(url, storage_option) as store:
        if remove:
            store.untag(name)
            _say({"tag": name, "version": None}, f"{name} is no tag of {bold(url)} any more", as_json)
            return
        number = store.tag(name, version, move=move)
        _say({"tag": name, "version": number}, f"{name} is version {number} of {bold(url)}", as_json)


def restore(
    url: Url,
    version: Annotated[
        str, typer.Argument(help="A version, or a tag; trajstore versions lists them.", metavar="VERSION")
    ],
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Make a new version that holds what an old one held. Nothing is lost: the versions between stay.

    Example: trajstore restore runs/demo 12
    """
    with editable(url, storage_option, base) as store:
        number = store.restore(version)
        told = f"version {number} of {bold(url)} holds what {version} held: "
        count = store.num_trajectories
        _say({"version": number, "trajectories": count}, told + quantity(count, "trajectory"), as_json)


def compact(
    url: Url,
    segment_bytes: Annotated[str, typer.Option(help="Of a large segment, before compression.")] = "256MiB",
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Write the trajectories of small segments into large ones, which open and read faster.

    Appends may go on meanwhile. What was replaced stays for earlier versions,
    until vacuum.

    Example: trajstore compact runs/demo
    """
    nbytes = parse_bytes(segment_bytes)
    with editable(url, storage_option, base) as store:
        done = store.compact(segment_bytes=nbytes)
        told = f"nothing to compact in {bold(url)}{_told_borrowed(store)}"
        if done.segments_before:
            told = (
                f"{quantity(done.trajectories, 'trajectory')} of {quantity(done.segments_before, 'segment')} are in "
                f"{quantity(done.segments_after, 'segment')} now, in version {done.version} of {bold(url)}"
            )
        _say(dataclasses.asdict(done), told, as_json)


def vacuum(
    url: Url,
    grace: Annotated[
        str, typer.Option(help="Objects younger than this stay, since a commit may be under way: 36h, 7d.")
    ] = "7d",
    keep_versions: Annotated[int, typer.Option(help="The latest so many versions stay.", min=1, metavar="N")] = 100,
    keep_for: Annotated[str, typer.Option(help="Versions younger than this stay: 12h, 7d, 2w.")] = "7d",
    exclusive: Annotated[
        bool,
        typer.Option(
            "--exclusive", help="Nobody else has the store open for writing: needed for a grace below 7 days."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run/--really", help="Only show what would go; --really does it.")
    ] = True,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Give back the bytes that no kept version needs. A dry run, unless --really is given.

    A version stays if it is among the latest --keep-versions, or younger than
    --keep-for, or has a tag, or another store refers to it. Others can no
    longer be opened afterwards.

    Example: trajstore vacuum runs/demo --keep-versions 10 --keep-for 1d --really
    """
    with editable(url, storage_option, base) as store:
        done = store.vacuum(grace, keep_versions=keep_versions, keep_for=keep_for, exclusive=exclusive, dry_run=dry_run)
        if as_json:
            print_json(report.vacuumed_json(done))
        else:
            rule = f"the latest {keep_versions}, those younger than {keep_for}, and those that are tagged or pinned"
            report.print_vacuumed(out, done, url=url, rule=rule)


def relocate(
    url: Url,
    old: Annotated[
        str, typer.Argument(help="How the URLs of the stores began that it refers to; info shows them.", metavar="OLD")
    ],
    new: Annotated[str, typer.Argument(help="How they begin now.", metavar="NEW")],
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Tell a store where the stores are now that it refers to, after they were moved.

    If the new place is not beside the store, name it with --base as well.

    Example: trajstore relocate runs/all /data/old /data/new --base /data/new
    """
    with editable(url, storage_option, base) as store:
        version = store.relocate(old, new)
        _say({"version": version}, f"version {version} of {bold(url)} looks for them in {new}", as_json)


def parse_places(texts: list[str]) -> str | dict[str | os.PathLike[str], int | float | str]:
    """One ``STORE``; or one or several of ``STORE=FRACTION``, ``STORE=COUNT`` or ``STORE=EXPRESSION``.

    >>> parse_places(["a"]), parse_places(["a=0.9", "lr=3/b=0.1"]), parse_places(["a=7"])
    ('a', {'a': 0.9, 'lr=3/b': 0.1}, {'a': 7})
    >>> parse_places(["a=length == 3", "b=length > 3"])
    {'a': 'length == 3', 'b': 'length > 3'}
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    places: dict[str | os.PathLike[str], int | float | str] = {}
    for text in texts:
        place, _, part = text.rpartition("=")
        number = None if place.endswith(("=", "!", "<", ">")) else _number(part)
        if number is None:
            place, _, part = text.partition("=")
        if not place or not part.strip():
            raise typer.BadParameter(
                f"{text!r} does not say which part; several stores take one each: -o train=0.9 -o test=0.1, "
                "-o early=1000 -o late=500, or -o picks=\"task == 'pick'\""
            )
        if place in places:
            raise typer.BadParameter(f"{place!r} is named twice; give each part a store of its own")
        places[place] = part if number is None else number
    return places


def _one_place(text: str) -> str:
    """A ``STORE``, where another option says which part it gets.

    >>> _one_place("runs/lr=0.3/picks"), _one_place("lr=0.3/")
    ('runs/lr=0.3/picks', 'lr=0.3/')
    """
    name = text.rpartition("/")[2]
    if "=" in name or (name and re.search(r"=.*[=<>]", text)):
        raise typer.BadParameter(
            f"{text!r} says which part it gets, and so does --first or --where; leave out one of the two, or name the "
            f"folder as '{text}/' if the store is called so"
        )
    return text


def _number(text: str) -> int | float | None:
    try:
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        return None


def _say(document: Mapping[str, Any], text: str, as_json: bool) -> None:
    """What was done, as a sentence or for programs."""
    if as_json:
        print_json(document)
    else:
        out.print(text, highlight=False)


def _tell(counts: Mapping[str, int]) -> None:
    for place, count in counts.items():
        out.print(f"{quantity(count, 'trajectory')} in {bold(place)}", highlight=False)


def _told_borrowed(store: trajstore.Store) -> str:
    """What compact leaves alone, since other stores have it."""
    segments = {entry.key for entry in store.trajectories.source().selection.table.segments if not entry.is_own}
    if not segments:
        return ""
    lie = "lies" if len(segments) == 1 else "lie"
    return (
        f": {quantity(len(segments), 'segment')} {lie} in other stores; compact those and merge them again, or merge them "
        "with --share copy and compact the result"
    )


def _tell_deleted(store: trajstore.Store, url: str, gone: int, as_json: bool) -> None:
    left = store.num_trajectories
    told = f"{quantity(gone, 'trajectory')} deleted, {left:,} left in version {store.version} of {bold(url)}"
    if not gone:
        told = f"nothing to delete: version {store.version} of {bold(url)} keeps its {quantity(left, 'trajectory')}"
    _say({"deleted": gone, "trajectories": left, "version": store.version}, told, as_json)


def _tell_elsewhere(urls: Iterable[str], storage_option: list[str] | None) -> None:
    """What readers of new stores have to trust, on standard error."""
    options = parse_options(storage_option)
    places = list(dict.fromkeys(place for url in urls for place in refers_to(url, storage_options=options)))
    few = ", ".join(places[:3]) + ", ..." * (len(places) > 3)
    if places:
        err.print(
            f"note: it refers to stores outside its own parent folder ({few}); who opens it has to trust them "
            "with --base, in Python bases=; with --share link or copy it would stand alone",
            highlight=False,
            soft_wrap=True,
        )
