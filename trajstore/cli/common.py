"""What the commands share: arguments that several of them take, and how text becomes values."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trajstore.console import err
from trajstore.read.bases import absolute

Url = Annotated[str, typer.Argument(help="Where the store is: a path, or s3://bucket/path.", metavar="URL")]
Version = Annotated[Optional[int], typer.Option(help="Show this version instead of the latest.")]  # noqa: UP045
Where = Annotated[
    Optional[str],  # noqa: UP045 - typer reads annotations at run time
    typer.Option(help="Only trajectories for which this holds, e.g. \"length > 100 and task == 'pick'\"."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
StorageOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--storage-option",
        help="KEY=VALUE for the storage client, VALUE as JSON or text; may be repeated. "
        "For instance endpoint_url=http://127.0.0.1:9000.",
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
        prefix: parse_options(pairs) if "://" in prefix else None for prefix in absolute(dict.fromkeys(prefixes or []))
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
        node[leaf] = value
    return options


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
    """Print a document; what JSON lacks becomes text."""
    print(json.dumps(document, indent=2, default=str))


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
