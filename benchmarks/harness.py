"""Time contenders in turn in one process, and keep what was measured as JSON.

Invariant: a number that is published is a ratio of medians of runs that alternated (A B A B ...), because
machines are noisy and absolute times do not travel. Every result carries the versions and the machine it was
taken on, the bar it was held against, and whether it met it; a miss is written like a win.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

RESULTS_DIR = Path(__file__).resolve().parent / "results"
TABLE_BEGIN = "<!-- benchmarks:begin -->"
TABLE_END = "<!-- benchmarks:end -->"
PACKAGES = ("numpy", "torch", "pyarrow", "zarr", "numcodecs", "fsspec", "google-crc32c", "trajstore")


# --- timing -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of doing the job. Only ``run`` is timed; it receives what ``prepare`` returned."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], object] | None = None
    cleanup: Callable[[Any], object] | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """The runs of one contender, in the order they were made."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()  # of the whole process, all threads: what noise from others touches least

    @property
    def median_s(self) -> float:
        """The middle run."""
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, float | int]:
        """Median, extremes and quartiles in seconds, and the number of runs."""
        ordered = sorted(self.seconds)
        quarter = len(ordered) // 4
        return {
            "median_s": _significant(self.median_s),
            "min_s": _significant(ordered[0]),
            "p25_s": _significant(ordered[quarter]),
            "p75_s": _significant(ordered[-1 - quarter]),
            "max_s": _significant(ordered[-1]),
            "median_cpu_s": _significant(statistics.median(self.cpu_seconds)) if self.cpu_seconds else 0.0,
            "runs": len(ordered),
        }


def alternate(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warmup: int = 1,
    tick: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Run the contenders in turn, ``warmup`` untimed rounds and then ``rounds`` timed ones.

    ``tick`` is called after each round, for a progress bar.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cpu_seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for round_index in range(warmup + rounds):
        for contender in contenders:
            prepared = contender.prepare() if contender.prepare else None
            begin, begin_cpu = time.perf_counter(), time.process_time()
            contender.run(prepared)
            elapsed, elapsed_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            if contender.cleanup:
                contender.cleanup(prepared)
            if round_index >= warmup:
                seconds[contender.name].append(elapsed)
                cpu_seconds[contender.name].append(elapsed_cpu)
        if tick:
            tick()
    return {name: Timing(tuple(values), tuple(cpu_seconds[name])) for name, values in seconds.items()}


def ratio_of_medians(timings: Mapping[str, Timing], numerator: str, denominator: str) -> float:
    """Median time of ``numerator`` over median time of ``denominator``."""
    return timings[numerator].median_s / timings[denominator].median_s


def paired_ratios(timings: Mapping[str, Timing], numerator: str, denominator: str) -> tuple[float, float]:
    """Quartiles of the ratios round by round: how far the ratio of medians can be trusted."""
    pairs = zip(timings[numerator].seconds, timings[denominator].seconds, strict=True)
    ordered = sorted(above / below for above, below in pairs)
    quarter = len(ordered) // 4
    return _significant(ordered[quarter]), _significant(ordered[-1 - quarter])


# --- what is kept -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a measurement is held against."""

    kind: Literal["at most", "at least"]
    value: float

    def met_by(self, measured: float) -> bool:
        """Whether ``measured`` is on the right side."""
        return measured <= self.value if self.kind == "at most" else measured >= self.value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number, what it means, and what it was computed from."""

    name: str
    what: str  # a sentence fragment for the table
    measured: float
    unit: str = "x"  # "x" is a ratio
    bar: Bar | None = None
    timings: Mapping[str, Timing] = dataclasses.field(default_factory=dict)
    spread: tuple[float, float] | None = None  # quartiles of the round-by-round ratios
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the bar was met; None without one."""
        return None if self.bar is None else self.bar.met_by(self.measured)

    def as_dict(self) -> dict[str, Any]:
        """What the result file holds of it."""
        return {
            "name": self.name,
            "what": self.what,
            "measured": _significant(self.measured),
            "unit": self.unit,
            "bar": dataclasses.asdict(self.bar) if self.bar else None,
            "met": self.met,
            "spread": list(self.spread) if self.spread else None,
            "contenders": {name: timing.as_dict() for name, timing in self.timings.items()},
            "details": dict(self.details),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one benchmark hands back: numbers with bars, conclusions in words, and rows of raw cells."""

    measurements: Sequence[Measurement]
    conclusions: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a benchmark is given. ``scratch`` is an empty directory, removed afterwards."""

    scratch: Path
    quick: bool = False
    only: str | None = None  # run only the items whose name contains this
    say: Callable[[str], object] = lambda _text: None  # what is running now, for the progress bar
    tick: Callable[[], object] = lambda: None  # one round is done

    def pick(self, full: int, quick: int) -> int:
        """``full``, or ``quick`` in a quick run: for rounds and sizes."""
        return quick if self.quick else full

    def wants(self, name: str) -> bool:
        """Whether the item ``name`` was asked for."""
        return self.only is None or self.only in name

    def measure(self, contenders: Sequence[Contender], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
        """`alternate`, reporting progress."""
        return alternate(contenders, rounds=rounds, warmup=warmup, tick=self.tick)


@contextlib.contextmanager
def scratch_directory(parent: Path | None = None) -> Iterator[Path]:
    """An empty directory for one benchmark, on the file system of ``parent`` (default: the temporary one)."""
    path = Path(tempfile.mkdtemp(prefix="trajstore-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# --- where it was measured ----------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if found["trajstore"] is None:
        with contextlib.suppress(Exception):
            found["trajstore"] = str(importlib.import_module("trajstore").__version__)
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(scratch: Path) -> dict[str, str | int | float]:
    """The processor, its cores, memory, kernel, and the type of the file system under ``scratch``."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": filesystem_type(scratch),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def filesystem_type(path: Path) -> str:
    """Type of the mount that ``path`` lies on, such as ``ext4``; ``unknown`` where there is no /proc."""
    resolved = str(path.resolve())
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            point, fstype = line.split()[1:3]
            inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, fstype
    return kind


# --- files --------------------------------------------------------------------------------------------------


def write_result(name: str, report: Report, *, scratch: Path, quick: bool, results: Path = RESULTS_DIR) -> Path:
    """Write ``results/<name>.json`` and return its path."""
    document = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "quick": quick,
        "versions": versions(),
        "machine": machine(scratch),
        "measurements": [measurement.as_dict() for measurement in report.measurements],
        "conclusions": list(report.conclusions),
        "rows": [dict(row) for row in report.rows],
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(_dumps(document), encoding="utf-8")
    return path


def _dumps(document: Mapping[str, Any]) -> str:
    """JSON with one row a line, so that a diff of two runs can be read."""
    head = {key: value for key, value in document.items() if key != "rows"}
    text = json.dumps(head, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    return text[:-2] + (f',\n "rows": [\n  {rows}\n ]\n}}\n' if rows else ',\n "rows": []\n}\n')


def read_results(results: Path = RESULTS_DIR) -> list[dict[str, Any]]:
    """Every result file, in order of name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]


# --- tables -------------------------------------------------------------------------------------------------


def format_value(value: float, unit: str) -> str:
    """``2.31x`` for a ratio, ``104 MB`` for a number with a unit."""
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text}x" if unit == "x" else f"{text} {unit}"


def format_bar(bar: Mapping[str, Any] | None, unit: str) -> str:
    """``at most 2.5x``, or nothing for a number that is only stated."""
    return f"{bar['kind']} {format_value(bar['value'], unit)}" if bar else ""


def format_met(met: bool | None) -> str:
    """``yes``, ``**no**``, or nothing where there is no bar."""
    return "" if met is None else "yes" if met else "**no**"


def markdown_table(documents: Sequence[Mapping[str, Any]]) -> str:
    """All measurements as one markdown table, misses beside wins, with the machine below."""
    lines = ["| what | measured | bar | met |", "|---|---|---|---|"]
    notes = []
    for document in documents:
        for entry in document["measurements"]:
            unit = entry["unit"]
            spread = entry.get("spread")
            shown = format_value(entry["measured"], unit)
            if spread:
                shown += f" ({format_value(spread[0], '').strip()} to {format_value(spread[1], '').strip()})"
            bar, met = format_bar(entry["bar"], unit), format_met(entry["met"])
            lines.append(f"| {entry['what']} | {shown} | {bar} | {met} |")
        notes.append(_where(document))
    unique = list(dict.fromkeys(notes))
    return "\n".join([*lines, "", *unique])


def _where(document: Mapping[str, Any]) -> str:
    host, found = document["machine"], document["versions"]
    named = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "pyarrow", "zarr", "numcodecs"))
    quick = " Quick run." if document["quick"] else ""
    return (
        f"Measured {document['date']} on {host['cores']} cores of {host['cpu']}, {host['memory_gib']} GiB, "
        f"{host['filesystem']}; {named}. Medians of runs in turn; in brackets the quartiles of the "
        f"ratios run by run.{quick}"
    )


def write_table(target: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Replace what stands between the two marks in ``target`` with the table.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    text = target.read_text(encoding="utf-8")
    if text.count(TABLE_BEGIN) != 1 or text.count(TABLE_END) != 1 or text.index(TABLE_BEGIN) > text.index(TABLE_END):
        raise ValueError(
            f"{target.name} lacks the marks, once each and in order; add lines {TABLE_BEGIN} and {TABLE_END}"
        )
    head, rest = text.split(TABLE_BEGIN)
    tail = rest.split(TABLE_END)[1]
    target.write_text(f"{head}{TABLE_BEGIN}\n{markdown_table(documents)}\n{TABLE_END}{tail}", encoding="utf-8")


def _significant(value: float) -> float:
    """Four significant digits: more would be noise in every diff."""
    return float(f"{value:.4g}")
