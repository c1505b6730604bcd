"""What the commands share: arguments that several of them take, and how text becomes values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import trajstore
from trajstore.console import err
from trajstore.errors import UnsupportedStorageError
from trajstore.read.bases import absolute_prefixes

Url = Annotated[str, typer.Argument(help="Where the store is: a path, or s3://bucket/path.", metavar="URL")]
Version = Annotated[
    Optional[str],  # noqa: UP045 - typer reads annotations at run time
    typer.Option(help="Show this version, or tag, instead of the latest."),
]
Where = Annotated[
    Optional[str],  # noqa: UP045 - typer reads annotations at run time
    typer.Option(help="Only trajectories for which this holds, e.g. \"length > 100 and task == 'pick'\"."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
StorageOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--storage-option",
        help="For the storage client, VALUE as JSON or text; may be repeated. For instance anon=true.",
        metavar="KEY=VALUE",
    ),
]


Base = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--base",
        help="Where other stores may lie that this one refers to, besides its own parent folder: a path, or the "
        "beginning of a URL; may be repeated.",
    ),
]


def parse_bases(prefixes: list[str] | None, pairs: list[str] | None) -> dict[str, dict[str, Any] | None]:
    """Trusted prefixes with their storage options, which are those of the command for buckets; paths become absolute."""
    return {
        prefix: parse_options(pairs) if "://" in prefix else None
        for prefix in absolute_prefixes(dict.fromkeys(prefixes or []))
    }


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; dots in a key nest: ``client_kwargs.region_name=eu-west-1``."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, leaf = key.split(".")
        node = options
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise typer.BadParameter(f"{pair!r} puts something under {part!r}, which has a value already")
        node[leaf] = value
    return options


def open_store(url: str, pairs: list[str] | None, prefixes: list[str] | None, **knobs: Any) -> trajstore.Store:
    """``trajstore.open``, with the storage options and bases of the command line.

    Args:
        url: Where the store is.
        pairs: Of ``--storage-option``. If the store is local, they are for the buckets that it refers to.
        prefixes: Of ``--base``.
        **knobs: Other arguments.
    """
    bases = parse_bases(prefixes, pairs)
    for_bases = "://" not in url and any(options is not None for options in bases.values())
    return trajstore.open(url, storage_options={} if for_bases else parse_options(pairs), bases=bases, **knobs)


def check_lasting(*urls: str) -> None:
    """Before a command makes or changes stores: they have to be there when it has ended.

    Raises:
        UnsupportedStorageError: One would be in the memory of this process.
    """
    for url in urls:
        if url.startswith("memory://"):
            raise UnsupportedStorageError(
                f"{url} would be in the memory of this command, and gone when it ends; choose a path, or s3://bucket/path"
            )


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it: ``500MB``, ``8 GiB``, ``1000000``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a number of bytes; write 500MB, 8GiB or 1000000")
    number, unit, binary = found.groups()
    nbytes = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if nbytes < 1:
        raise typer.BadParameter(f"{text!r} is less than one byte; write 500MB, 8GiB or 1000000")
    return nbytes


def print_json(document: Any) -> None:
    """Print a document; numbers that JSON lacks become null, other things text."""
    print(json.dumps(_without_nan(document), indent=2, default=str))


def _without_nan(value: Any) -> Any:
    """The same without NaN and infinities, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def offer(*texts: str) -> Callable[[str], list[str]]:
    """What the shell completes an argument to.

    >>> offer("link", "copy", "reference")("l")
    ['link']
    """
    return lambda incomplete: [text for text in texts if text.startswith(incomplete)]


def progress_bar(unit: str) -> Progress:
    """A bar on standard error, which is gone once it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
