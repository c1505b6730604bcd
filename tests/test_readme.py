"""What the README shows runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_examples_run(block, tmp_path):
    subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, check=True, timeout=120)


def test_every_command_is_one_that_the_command_line_has():
    from trajstore.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    shown = set(re.findall(r"^(?:.*bin/)?trajstore (\w+)", README, re.MULTILINE))
    assert shown
    assert shown <= known


def test_paths_in_the_map_exist():
    for name in re.findall(r"`((?:trajstore|schemas|benchmarks|tests)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
