"""What the README and the pages in docs/ show runs as it stands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
# The blocks of a section run one after the other.
SECTIONS = {part.splitlines()[0]: BLOCK.findall(part) for part in README.split("\n## ")[1:] if BLOCK.search(part)}

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))

# Of these pages, what stands in bash runs too, in turn with the rest.
WITH_COMMANDS = {"editing.md"}
COMMANDS = """
import json, shlex, subprocess, sys
from tests.support.commands import done

page = {"__name__": "__main__"}
for kind, text in json.loads(sys.argv[1]):
    if kind == "python":
        exec(text, page)
        continue
    for words in (shlex.split(line, comments=True) for line in text.splitlines()):
        if words[:1] == ["trajstore"]:
            done(*words[1:])
        else:
            subprocess.run(words, check=True)
"""


@pytest.mark.parametrize("section", SECTIONS)
def test_examples_run(section, tmp_path, monkeypatch):
    code = "\n".join(SECTIONS[section])
    if "multiprocessing" in code:  # its processes import the one that starts them
        run_alone(code, tmp_path)
    else:
        run(code, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", sorted({*PAGES} - WITH_COMMANDS))
def test_examples_of_a_page_run(page, tmp_path, monkeypatch):
    found = BLOCK.findall((ROOT / "docs" / page).read_text())
    assert found
    run("\n".join(found), tmp_path, monkeypatch)  # the blocks of a page run one after the other


@pytest.mark.parametrize("page", sorted(WITH_COMMANDS))
def test_examples_and_commands_of_a_page_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "bash"}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_alone(COMMANDS, tmp_path, json.dumps(blocks))


def run(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(code, "<what is shown>", "exec"), {"__name__": "__main__"})


def run_alone(code, folder, *arguments):
    subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], cwd=folder, check=True, timeout=120)


def test_every_command_is_one_that_the_command_line_has():
    from trajstore.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    shown = set(re.findall(r"^(?:.*bin/)?trajstore (\w+)", README, re.MULTILINE))
    assert shown
    assert shown <= known


def test_paths_in_the_map_exist():
    for name in re.findall(r"`((?:trajstore|schemas|benchmarks|tests|docs)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
