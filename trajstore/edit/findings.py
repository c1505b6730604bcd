"""What ``verify`` found, as a value: each fact once, with what was found, what was expected and what to do.

Invariant: a finding that is an error means that some standing version is not what was written, or soon may not be; damage
that only versions before a repair need is a warning, since the repair has said so.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}

# Kinds of errors that a segment's trajectories do not survive. An object that could not be asked for is none of them, nor is
# one that only other readers need.
LOSSES = frozenset({"segment-missing", "object-missing", "object-size", "page-index", "page"})
# Nor do they survive that the store is gone in which they lie: not one that is merely not trusted, or cannot be asked now.
MISSING_STORE = "base-missing"


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        severity: An error, a warning, or only a note.
        kind: What kind of fact, as a short identifier.
        where: The object's key, and the column and page if it has such.
        message: What was found, what was expected, what to do.
        version: The last version that it concerns, if it concerns some only.
        segment: The segment that is damaged, or layer.
    """

    severity: Severity
    kind: str
    where: str
    message: str
    version: int | None = None
    segment: str | None = None

    def __str__(self) -> str:
        return f"{self.severity} [{self.kind}] {self.where}: {self.message}"


@dataclass(frozen=True)
class Counts:
    """What was looked at.

    Attributes:
        versions: That can be opened.
        emptied: Versions that vacuum has emptied.
        manifests: Of these versions, each once.
        segments: That trajectories of these versions need, each once; layers and those in other stores are counted too.
        objects: Of these segments.
        pages: In these objects.
        pages_read: Of these, how many were read, held against their checksums and decoded.
        nbytes: Of these objects.
        nbytes_read: Of the pages that were read.
    """

    versions: int = 0
    emptied: int = 0
    manifests: int = 0
    segments: int = 0
    objects: int = 0
    pages: int = 0
    pages_read: int = 0
    nbytes: int = 0
    nbytes_read: int = 0


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        url: Of the store.
        version: The latest; 0 for a store without versions.
        deep: Whether pages were read.
        findings: Errors first, then warnings, then notes; in the order of versions, manifests, segments, marks.
        counts: What was looked at.

    Examples:
        >>> report = Report("runs/demo", 3, False, (), Counts(versions=3, manifests=3, segments=3, objects=9, nbytes=4096))
        >>> print(report)
        runs/demo: 3 versions, 3 manifests, 3 segments, 9 objects, 4,096 bytes: no errors (pages were not read)
    """

    url: str
    version: int
    deep: bool
    findings: tuple[Finding, ...]
    counts: Counts

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What must not be."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings and notes."""
        return not self.errors

    @property
    def exit_code(self) -> int:
        """Of a command: 0 without errors, whatever the warnings and notes, else 1."""
        return 0 if self.ok else 1

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "url": self.url,
            "version": self.version,
            "deep": self.deep,
            "ok": self.ok,
            "counts": asdict(self.counts),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def lines(self) -> list[str]:
        """A line per finding, and one that says what was looked at."""
        counts = self.counts
        looked = [
            f"{getattr(counts, name):,} {name if getattr(counts, name) != 1 else name[:-1]}"
            for name in ("versions", "manifests", "segments", "objects")
        ]
        looked.append(f"{counts.nbytes:,} bytes")
        if self.deep:
            looked.append(f"{counts.pages_read:,} of {counts.pages:,} pages read")
        numbers = Counter(f.severity for f in self.findings)
        verdict = [f"{numbers[s]} {s}{'s' if numbers[s] != 1 else ''}" for s in _ORDER if numbers[s]]
        if not numbers["error"]:
            verdict.insert(0, "no errors")
        unread = "" if self.deep else " (pages were not read)"
        return [*map(str, self.findings), f"{self.url}: {', '.join(looked)}: {', '.join(verdict)}{unread}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Findings:
    """Collects findings; used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Finding, None] = {}  # in order, each once

    def add(
        self,
        severity: Severity,
        kind: str,
        where: str,
        message: str,
        *,
        version: int | None = None,
        segment: str | None = None,
    ) -> None:
        """Note one."""
        with self._lock:
            self._found.setdefault(Finding(severity, kind, where, message, version, segment))

    def versions_with_errors(self) -> list[int]:
        """The last version that each error concerns, where it concerns some only."""
        return sorted({f.version for f in self._found if f.severity == "error" and f.version is not None})

    def settled(self, *, emptied: frozenset[int], repaired: int) -> tuple[Finding, ...]:
        """All of them, errors first.

        Args:
            emptied: Versions that vacuum emptied meanwhile: what only they lack is not missed.
            repaired: The last version that a repair made; 0 if there is none.
        """
        kept = []
        for finding in self._found:
            if finding.version is not None and finding.version in emptied:
                continue
            if finding.severity == "error" and finding.version is not None and finding.version < repaired:
                message = f"{finding.message}; only versions before the repair in version {repaired} need it"
                finding = replace(finding, severity="warning", message=message)
            kept.append(finding)
        return tuple(sorted(kept, key=lambda f: _ORDER[f.severity]))
