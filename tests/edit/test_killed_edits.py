"""``kill -9`` in the middle of an edit: nothing that was there is lost, and the next run of the same edit finishes it.

A family is killed: a store with a tag, and one that refers to its segments.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import trajstore
from tests.edit.killed import again, kill_everywhere, kill_sometime
from tests.edit.model import Row, assert_rows, with_lineage
from tests.edit.stores import filled, segments_of
from trajstore.errors import StoreExistsError, VersionExpiredError

ROWS = [Row(number, number, frozenset()) for number in range(6)]
KEPT = [row for row in ROWS if row.id not in (1, 4)]
VALUES = [row.with_derived("value", 3) for row in KEPT]
# Version n holds the first n, version 7 no longer all of them.
VERSIONS = {**{number: ROWS[:number] for number in range(1, 7)}, 7: KEPT}
TAGGED, PINNED = 3, 5
MARKED = {TAGGED, PINNED}
ACTIONS = ["family compact", "family vacuum", "family vacuum beside", "family add column", "family merge"]
# Killed before every so many system calls; there are 25 to 100.
SOME = [("family vacuum beside", 29), ("family merge", 31)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``owner`` and ``borrower``."""
    folder = tmp_path_factory.mktemp("family")
    filled(folder / "owner", range(len(ROWS)))
    with trajstore.open(folder / "owner", "a") as store:
        store.delete([1, 4])
        store.tag("early", TAGGED)
        with trajstore.open(folder / "owner", version=PINNED) as old:
            trajstore.merge([old.trajectories], folder / "borrower", share="reference")
    return folder


def borrowed(folder: Path) -> list[Row]:
    """What the borrower holds."""
    with trajstore.open(folder / "owner") as store:
        return with_lineage(ROWS[:PINNED], store.uuid)


def verify(url: Path) -> None:
    with trajstore.open(url) as store:
        report = store.verify(deep=True)
        assert report.ok, str(report)


def check(folder: Path) -> None:
    """Nothing that was acknowledged before is lost, whatever was going on."""
    with trajstore.open(folder / "owner") as store:
        standing = store.versions().index.tolist()
        latest = store.version
        assert store.tags()["version"].to_dict() == {"early": TAGGED}
    assert set(standing) >= MARKED
    for number in standing:
        with trajstore.open(folder / "owner", version=number) as store:
            view = store.trajectories
            done = {t.id for t in view if "value" in t.columns}
            rows = [v if v.id in done else row for v, row in zip(VALUES, KEPT, strict=True)]
            assert_rows(view, VERSIONS.get(number, rows))
    for number in set(range(1, latest)) - set(standing):
        with pytest.raises(VersionExpiredError):
            trajstore.open(folder / "owner", version=number)
    with trajstore.open(folder / "owner", version="early") as store:
        assert_rows(store.trajectories, ROWS[:TAGGED])
    with trajstore.open(folder / "borrower") as store:
        assert_rows(store.trajectories, borrowed(folder))
    verify(folder / "owner")
    verify(folder / "borrower")


def finish(action: str, folder: Path) -> None:
    """Do it again, on a disk that lives."""
    try:
        again(action, "", folder)
    except StoreExistsError:
        assert action == "family merge"
        assert shown(folder / "out"), "only if the first merge was done"
    check(folder)
    with trajstore.open(folder / "owner") as store:
        standing = set(store.versions().index)
        match action:
            case "family compact":
                assert len({segment.uuid for segment in store.trajectories._table.segments}) == 1
            case "family add column":
                assert_rows(store.trajectories, VALUES)
            case "family vacuum":
                assert standing == {*MARKED, 6, 7}
            case "family vacuum beside":
                assert MARKED <= standing <= {*MARKED, *range(6, store.version + 1)}
                assert len(standing - MARKED) <= 3, "two of those that it found, and its own"
    if "vacuum" in action:
        named = set()
        for number in standing:
            with trajstore.open(folder / "owner", version=number) as store:
                named |= {segment.uuid for segment in store.trajectories._table.segments}
        left = {path.parent.name for path in folder.glob("owner/segments/*/pages.arrow")}
        assert left == named, "nothing stays behind"
    if action == "family merge":
        expected = [*with_lineage(KEPT, borrowed(folder)[0].lineage[0]), *borrowed(folder)]  # type: ignore[index]
        with trajstore.open(folder / "out") as store:
            assert_rows(store.trajectories, [Row(n, r.number, r.homes, r.lineage) for n, r in enumerate(expected)])
        verify(folder / "out")
        with trajstore.open(folder / "owner", "a") as store:
            store.vacuum("0s", keep_versions=1, keep_for="0s", exclusive=True)
        verify(folder / "out")
        assert not segments_of(folder / "out")


def shown(url: Path) -> bool:
    with trajstore.open(url) as store:
        return store.version == 1


def check_all(action: str, left: list[Path]) -> None:
    for folder in left:
        try:
            check(folder)
            finish(action, folder)
        except BaseException as error:
            error.add_note(f"{action}, killed at {folder.name}")
            raise


@pytest.mark.parametrize(
    ("action", "every"),
    [
        *SOME,
        *(pytest.param(action, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for action in ACTIONS),
    ],
)
def test_killed_before_any_call(action: str, every: int, family: Path, tmp_path: Path) -> None:
    left = kill_everywhere(action, "", family, tmp_path / "killed", every=every)
    assert len(left) > 1
    check_all(action, left)


@pytest.mark.parametrize(
    ("action", "count"),
    [
        ("family merge", 2),
        *(pytest.param(action, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for action in ACTIONS),
    ],
)
def test_killed_at_any_time(action: str, count: int, family: Path, tmp_path: Path) -> None:
    check_all(action, kill_sometime(action, family, tmp_path / "killed", count))
