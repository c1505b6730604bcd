"""``python -m benchmarks [NAME ...] [--quick]`` runs benchmarks; ``... table`` shows the results."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import harness

BENCHMARKS = {
    "buffers": "the calls of RLinf, ObjectRL and ApexRL against what those projects do",
    "codecs": "which codec and page size suit frames, floats and small integers; Arrow record batches",
    "editing": "merge, split, compact and drop against pyarrow, files of RLinf's kind and Minari",
    "priority": "prioritized replay: the sum tree against cpprb and TorchRL",
    "sampling": "windows and transitions, hot and cold, local and S3, against memcpy, TorchRL, cpprb and bare reads",
    "store": "append, flush, read, open and commit against memcpy, write + fsync, pyarrow and zarr-python",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a bar was missed, 2 if the command was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}, or 'table'; none lists")
    parser.add_argument("--quick", action="store_true", help="small data and few rounds; the results are not kept")
    parser.add_argument("--scratch", type=Path, help="write test data under this directory (default: temporary)")
    parser.add_argument("--results", type=Path, help="where result files are (default: benchmarks/results)")
    parser.add_argument("--only", metavar="TEXT", help="only the items whose name contains TEXT; results not kept")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with 'table': put the table between FILE's marks")
    options = parser.parse_args(argv)
    console = Console()
    results = options.results or harness.RESULTS_DIR

    if options.names == ["table"]:
        documents = harness.read_results(results)
        if options.write:
            try:
                harness.write_table(options.write, documents)
            except (OSError, ValueError) as error:
                console.print(f"[red]{error}")
                return 2
        else:
            print(harness.markdown_table(documents))
        return 0
    if not options.names:
        for name, about in BENCHMARKS.items():
            console.print(f"[bold]{name:10}[/] {about}")
        return 0
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        console.print(f"[red]no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
        return 2

    keep = (not options.quick and not options.only) or options.results is not None
    missed = 0
    for name in options.names:
        report = _run_one(name, options, console, results if keep else None)
        _show(name, report, console)
        missed += sum(measurement.met is False for measurement in report.measurements)
    if not keep:
        console.print("[dim]not kept: run without --quick and --only, or name --results")
    return 1 if missed else 0


def _run_one(name: str, options: argparse.Namespace, console: Console, results: Path | None) -> harness.Report:
    module = importlib.import_module(f"benchmarks.{name}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        harness.scratch_directory(options.scratch) as scratch,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task(name, total=None)

        def say(text: str) -> None:
            progress.update(task, description=f"{name}: {text}")

        context = harness.Context(
            scratch=scratch,
            quick=options.quick,
            only=options.only,
            say=say,
            tick=lambda: progress.advance(task),
        )
        report: harness.Report = module.run(context)
        if results is not None:
            path = harness.write_result(name, report, scratch=scratch, quick=options.quick, results=results)
            console.print(f"[dim]wrote {path.name}")
    return report


def _show(name: str, report: harness.Report, console: Console) -> None:
    table = Table(title=name, title_justify="left")
    for heading in ("what", "measured", "spread", "bar", "met"):
        table.add_column(heading, overflow="fold")
    for measurement in report.measurements:
        entry = measurement.as_dict()
        unit, spread = entry["unit"], entry["spread"]
        table.add_row(
            entry["what"],
            harness.format_value(entry["measured"], unit),
            f"{spread[0]:.3g} .. {spread[1]:.3g}" if spread else "",
            harness.format_bar(entry["bar"], unit),
            {True: "[green]yes", False: "[red]NO", None: ""}[measurement.met],
        )
    console.print(table)
    for conclusion in report.conclusions:
        console.print(f"- {conclusion}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
