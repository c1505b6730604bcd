"""The command line. It parses, calls, and prints; what it prints comes from the library."""

from __future__ import annotations

from typing import Annotated

import typer

import trajstore
from trajstore.cli import look, make, rlinf
from trajstore.console import out, run

app = typer.Typer(
    name="trajstore",
    help="Look into, record and try out stores of reinforcement-learning trajectories.\n\n"
    "A store is a local path, or any URL that fsspec knows: s3://bucket/run, memory://name.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (look.info, look.ls, look.head, look.sample, make.record, make.demo):
    app.command()(command)
app.add_typer(rlinf.app, name="rlinf")


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
    run(app)
