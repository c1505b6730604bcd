"""The command line in this process: an interpreter that imports torch takes seconds to start."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

from trajstore import cli, console


@dataclass(frozen=True)
class Ran:
    """What a command did.

    Attributes:
        code: Its exit status.
        out: What it printed.
        err: What it complained of.
    """

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON that it printed, and nothing else."""
        return json.loads(self.out, parse_constant=_refuse)

    @property
    def said(self) -> str:
        """What it printed, without line breaks."""
        return " ".join(self.out.split())

    @property
    def complaint(self) -> str:
        """What it complained of, without line breaks and frames."""
        return " ".join(self.err.replace("│", " ").split())


def run(*arguments: object, width: int = 160) -> Ran:
    """Run ``trajstore`` with these arguments in a terminal of so many columns."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["trajstore", *map(str, arguments)]),
        mock.patch.object(console.out, "_width", width),
        mock.patch.object(console.err, "_width", width),
        mock.patch.dict("os.environ", {"COLUMNS": str(width)}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            return Ran(int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("the command line ended without a status")


def done(*arguments: object, width: int = 160) -> Ran:
    """The same, of a command that must succeed."""
    ran = run(*arguments, width=width)
    assert ran.code == 0, ran.out + ran.err
    return ran


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
