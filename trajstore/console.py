"""The terminal: what commands print to, and how errors look there."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from trajstore.errors import TrajstoreError

out = Console()
err = Console(stderr=True)


def run(command: Callable[[], None]) -> None:
    """Run a command; errors that trajstore raises on purpose are printed as one sentence, and end with status 1."""
    try:
        command()
    except (TrajstoreError, ImportError) as error:
        err.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
