"""The command line. It parses, calls, and prints; what it prints comes from the library."""

from __future__ import annotations

from typing import Annotated

import typer

import trajstore
from trajstore.cli import check, edit, look, make, rlinf
from trajstore.console import out, run

app = typer.Typer(
    name="trajstore",
    help="Look into, record, combine and edit stores of reinforcement-learning trajectories.\n\n"
    "A store is a local path, or any URL of a bucket that fsspec knows: s3://bucket/run.",
    epilog="Exit status: 0 if all went well; 1 if something went wrong, which standard error then says in one sentence, and "
    "if verify finds errors; 2 if the command was not understood; 130 after Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
PANELS = {
    "Look": (
        look.info,
        look.ls,
        look.head,
        look.sample,
        check.stats,
        check.plot,
        check.versions,
        check.diff,
        check.verify,
    ),
    "Make": (make.record, make.demo),
    "Combine": (edit.merge, edit.split, edit.relocate),
    "Edit": (edit.delete, edit.retain, edit.tag, edit.restore, edit.compact, edit.vacuum),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(rlinf.app, name="rlinf", rich_help_panel="Combine")


@app.callback(invoke_without_command=True)
def _global(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(f"trajstore {trajstore.__version__}", highlight=False)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        out.print(ctx.get_help())


def main() -> None:
    """Entry point."""
    run(lambda: app(prog_name="trajstore"))
