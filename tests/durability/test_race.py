"""Eight processes that append to one local store at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

import trajstore
from tests.support.race import assert_exactly_once, race

PROCESSES = 8
COMMITS = 50


@pytest.mark.timeout(300)
def test_eight_processes_lose_races_and_no_append(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    trajstore.open(url, "x").close()
    reports = race(url, writers=PROCESSES, commits=COMMITS)
    assert len(reports) == PROCESSES
    with trajstore.open(url) as store:
        assert_exactly_once(store, reports, commits=COMMITS)
        ids = [trajectory_id for report in reports for _, trajectory_id in report.landed]
        assert sorted(ids) == store.trajectories.ids.tolist() == list(range(PROCESSES * COMMITS))
    lost = sum(report.races_lost for report in reports)
    assert lost >= 20, f"{lost} races were lost in {PROCESSES * COMMITS} commits: too few to say anything"
