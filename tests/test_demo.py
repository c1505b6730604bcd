"""The demo on a small scale: it records, learns, prints what it measured, and leaves good stores behind."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import trajstore
from trajstore import demo

pytest.importorskip("gymnasium")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    file: Any = console.file
    return str(file.getvalue())


def test_demo_records_learns_and_reports(tmp_path: Any, console: Console) -> None:
    url = str(tmp_path / "demo")
    result = demo.run_demo(url, seconds=2.0, seed=0, episodes=80, console=console)
    assert len(result.losses) >= 20
    tenth = len(result.losses) // 10
    assert np.mean(result.losses[-tenth:]) < np.mean(result.losses[:tenth])
    assert abs(result.losses[0] - np.log(2)) < 0.1  # an untrained choice between two actions
    assert result.trained_return > 2 * result.random_return
    assert result.random_return < result.recorded_return
    text = printed(console)
    for expected in (
        "8 of 80 trajectories",
        "reward_sum",
        "loss ",
        f"{np.mean(result.losses[-tenth // 2 :]):.1f}",
        "obs",
        "cache hits",
        "windows/s",
    ):
        assert expected in text
    for command in ("info", "sample"):
        assert f"trajstore {command} {url}/cartpole" in text

    with trajstore.open(result.stores[0]) as store:
        frame = store.trajectories.to_pandas()
        assert len(frame) == 80
        assert frame["reward_sum"].mean() == pytest.approx(result.recorded_return)
        assert frame["noise"].between(0.3, 1.0).all()
        assert (frame["length"] == frame["reward_sum"]).all()
    for url in result.stores[1:]:
        with trajstore.open(url) as store:
            assert len(store.trajectories) in (4, 30)


def test_demo_without_a_url_names_the_directory_that_it_keeps(
    tmp_path: Any, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)  # CartPole only
    result = demo.run_demo(None, seconds=0.0, seed=1, episodes=12, console=console)
    assert [os.path.basename(url) for url in result.stores] == ["cartpole"]
    assert result.stores[0].startswith(str(tmp_path))
    assert os.path.isdir(result.stores[0])
    assert result.stores[0] in printed(console)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 7.0], "▁█"), ([3.0, 3.0], "▁▁"), ([2.0, 1.0, 0.0], "█▅▁"), ([1.0] * 100, "▁" * 40)],
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert demo._sparkline(values) == expected


@pytest.mark.slow
def test_demo_without_gymnasium_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['gymnasium'] = None\n"
        "from rich.console import Console; from trajstore.demo import run_demo\n"
        "run_demo(None, console=Console())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'trajstore[gym]'" in result.stderr
