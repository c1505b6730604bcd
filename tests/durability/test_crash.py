"""``kill -9`` in every step of a commit: what was flushed is there, nothing is torn, nothing needs repair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.crash import ANY_TIME, STEPS

ROOT = Path(__file__).parents[2]
RUNNERS = 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills_per_step", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_children_killed_in_every_step_of_the_commit_lose_nothing_acknowledged(
    kills_per_step: int, tmp_path: Path
) -> None:
    """Each child has acknowledged a flush before it dies; each later child checks the whole store before it appends.

    pytest and its plugins hold threads, so the children's parent is a process of its own, one per core.
    """
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # not even the allocator's
    }
    steps = [*STEPS, ANY_TIME]
    runners = []
    for number in range(RUNNERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        mine = steps[number::RUNNERS]
        command = [sys.executable, "-m", "tests.support.crash", str(folder), str(number), str(kills_per_step), *mine]
        runners.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        outputs = [runner.communicate() for runner in runners]
    finally:
        for runner in runners:
            runner.kill()
            runner.wait()
    for runner, (_, error) in zip(runners, outputs, strict=True):
        assert runner.returncode == 0, error.decode()
    reports = [json.loads(output) for output, _ in outputs]
    assert [failure for report in reports for failure in report["failures"]] == []

    kills = sum((Counter(report["kills"]) for report in reports), Counter())
    assert {step for step, count in kills.items() if count >= kills_per_step} == set(steps), kills
    assert [report["threads"] for report in reports] == [1] * RUNNERS, "the parents hold no threads"
    acknowledged = sum(report["acknowledged"] for report in reports)
    shown = sum(report["shown"] for report in reports)
    assert kills.total() * 2 <= acknowledged <= shown, "every child acknowledged a flush of two trajectories"
