"""The terminal: what commands print to, how they count, and how errors look there.

Invariant: what is printed of an error names options of the command line, not arguments of Python.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from trajstore.errors import TrajstoreError

out = Console()
err = Console(stderr=True)

# Advice that has another form on the command line, or none.
_PHRASES = (
    (re.compile(r"bases=\{'([^']*)': None\} \(or its storage options instead of None\)"), r"--base \1"),
    (re.compile(r"or make one with mode='a'"), "or make one: trajstore record, or trajstore rlinf import"),
    (re.compile(r"open it with mode='a', or choose another place"), "choose another place"),
    (re.compile(r", choose another place, or open with mode='r'"), ", or choose another place"),
    (re.compile(r"pass single_writer=True"), "in Python pass single_writer=True"),
    (re.compile(r"\bstore\.versions\(\) lists"), "trajstore versions lists"),
    (re.compile(r"\(store\.relocate\)"), "(trajstore relocate)"),
    (re.compile(r"use view\.save\(lineage=False\)"), "in Python use view.save(lineage=False)"),
    (
        re.compile(r"\ba picture of an empty view; choose a view with trajectories in it \(see view\.filter\)"),
        "there are no trajectories to draw; choose another --where or --version",
    ),
    (
        re.compile(r"\bthe view holds no trajectories\b(.*); choose a wider view"),
        r"there are no trajectories\1; choose another --where or --version",
    ),
    (re.compile(r"\bseveral places take a part each"), "several stores take a part each: -o train=0.9 -o test=0.1"),
    (re.compile(r"\bretain\(\) without"), "retain without"),
    (re.compile(r"\b(delete|vacuum|relocate)\(\)"), r"trajstore \1"),
    (re.compile(r"\bkind='frames' shows"), "trajstore plot URL frames shows"),
    (re.compile(r"\bkind="), "KIND "),
    (re.compile(r"\bgrace of (?=[\d.]+ days)"), "--grace of "),
    (re.compile(r"\bgrace=0\b"), "--grace 0d"),
)
# Keywords of Python and their options. Those that are also words of English are keywords only with "=" behind them.
_OPTIONS = {
    "allow_pickle": "--allow-pickle",
    "allow_unpinned": "--allow-unpinned",
    "bases": "--base",
    "by": "--by",
    "cache_bytes": "--cache-bytes",
    "codec": "--codec",
    "columns": "--column",
    "copy": "--copy",
    "device": "--device",
    "exclusive": "--exclusive",
    "first": "--first",
    "frames": "--frames",
    "grace": "--grace",
    "keep_for": "--keep-for",
    "keep_versions": "--keep-versions",
    "last": "--last",
    "max_bytes": "--max-bytes",
    "max_steps": "--max-steps",
    "move": "--move",
    "n_step": "--n-step",
    "order": "--order",
    "overwrite": "--overwrite",
    "pad": "--pad",
    "path": "--out",
    "rows": "--rows",
    "save_path": "--save-path",
    "segment_bytes": "--segment-bytes",
    "share": "--share",
    "show": "--show",
    "source_path": "--source-path",
    "split_count": "--split-count",
    "storage_options": "--storage-option",
    "trajectory": "--trajectory",
    "trajectory_format": "--format",
    "version": "--version",
    "where": "--where",
    "window": "--window",
    "x": "--x",
}
_NOT_BEFORE, _NOT_BEHIND = r"(?<![\w/'\".-])", r"(?![\w/'\"-])"
_ASSIGNED = re.compile(rf"{_NOT_BEFORE}({'|'.join(_OPTIONS)})=(True\b)?(?=([^\s,;)])?)")
_BARE = re.compile(rf"{_NOT_BEFORE}({'|'.join(name for name in _OPTIONS if '_' in name)}){_NOT_BEHIND}")


def run(command: Callable[[], None]) -> None:
    """Run a command; errors that trajstore raises on purpose are printed as one sentence, and end with status 1."""
    try:
        with _warnings_shown():
            command()
    except (TrajstoreError, ImportError) as error:
        err.print(f"[bold red]error:[/bold red] {escape(for_commands(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:  # a picture's folder that is not there, a full disk
        if error.strerror is None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        err.print(f"[bold red]error:[/bold red] {escape(place + error.strerror)}", highlight=False, soft_wrap=True)
        sys.exit(1)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """What the library warns of is printed like errors."""
    logger, handler = logging.getLogger("trajstore"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Warnings(logging.Handler):
    """Prints warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """One of them."""
        text = escape(for_commands(record.getMessage()))
        err.print(f"[yellow]warning:[/yellow] {text}", highlight=False, soft_wrap=True)


def for_commands(message: str) -> str:
    """What a message says to programmers, for people at a command line.

    >>> for_commands("a.pkl is a pickle; pass allow_pickle=True if you trust it")
    'a.pkl is a pickle; pass --allow-pickle if you trust it'
    >>> for_commands("cache_bytes=1000 is below one batch; pass cache_bytes >= 8388608")
    '--cache-bytes 1000 is below one batch; pass --cache-bytes >= 8388608'
    >>> for_commands("grace of 1 days, expected at least 7; pass exclusive=True")
    '--grace of 1 days, expected at least 7; pass --exclusive'
    """
    for pattern, words in _PHRASES:
        message = pattern.sub(words, message)
    message = _ASSIGNED.sub(lambda found: _OPTIONS[found[1]] + " " * bool(found[3] and not found[2]), message)
    return _BARE.sub(lambda found: _OPTIONS[found[1]], message)


def bold(text: str) -> str:
    r"""Markup of a path or URL, which may have brackets.

    >>> print(bold("runs/[a]"))
    [bold]runs/\[a][/bold]
    """
    return f"[bold]{escape(text)}[/bold]"


def quantity(n: int, noun: str) -> str:
    """A number of things.

    >>> quantity(1, "segment"), quantity(0, "batch"), quantity(1234, "trajectory")
    ('1 segment', '0 batches', '1,234 trajectories')
    """
    if n == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{n:,} {noun[:-1]}ies"
    return f"{n:,} {noun}{'es' if noun.endswith('ch') else 's'}"
