"""Commands that look at a store as a whole, as a person types them."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import trajstore
from tests.edit.stores import filled
from tests.support.commands import done, run
from tests.support.rare import also_slow
from trajstore import cli, console
from trajstore.format import layout
from trajstore.schema import Column


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Versions 1 to 6, with columns of every kind that stats and plots look at."""
    url = str(tmp_path_factory.mktemp("check") / "store")
    rng = np.random.default_rng(0)
    with trajstore.open(url, "a") as store:
        for number in range(4):
            steps = 4 + number
            store.append(
                {
                    "obs": {
                        "image": rng.integers(0, 255, (steps + 1, 16, 16, 3), np.uint8),
                        "state": rng.normal(size=(steps + 1, 11)) * 1e3,
                    },
                    "action": rng.normal(size=(steps, 3)),
                    "reward": rng.normal(size=steps),
                },
                terminated=number % 2 == 0,
                task=["pick", "place"][number % 2],
            )
            store.flush()
        store.tag("paper", 2)
        store.tag("a-name-that-is-rather-long", 2)
        store.delete([0])
        store.add_column("return", lambda t: t["reward"][::-1].cumsum()[::-1], columns=["reward"])
    return url


def view(url):
    return trajstore.open(url).trajectories


# ---- tables


@pytest.mark.parametrize("width", also_slow([70, 80, 100, 120], [70, 100]))
@pytest.mark.parametrize("command", ["versions", "stats", "tag", "info", "diff", "verify"])
def test_tables_fit_and_cut_no_word(url, width, command):
    text = done(command, url, *["1"] * (command == "diff"), width=width).out
    lines = [line.rstrip() for line in text.splitlines() if url not in line]
    assert max(map(len, lines)) <= width
    assert "\u2026" not in text
    if command == "versions":
        assert {"version", "when", "operation", "trajectories"} <= {*re.findall(r"\w+", text)}
        left = re.search(r"more columns?: (.*?); --json shows all", " ".join(text.split()))
        shown = {"tags", "steps", "segments", "manifests"} - {*(left[1].split(", ") if left else ())}
        assert shown <= {*re.findall(r"\w+", text.split("more column")[0])}
        assert width < 120 or not left
    if command == "stats":
        assert {"column", "mean", "std"} <= {*re.findall(r"[\w.]+", text)}
        assert "obs/state[10]" in text
        whole = done(command, url, width=300).out  # with room for everything
        assert {*re.findall(r"[\w.,/\[\]-]+", text.split("more column")[0][:-2])} <= {
            *re.findall(r"[\w.,/\[\]-]+", whole)
        }


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """Columns and tags whose names differ only behind the 40th character, and numbers with exponents."""
    url = str(tmp_path_factory.mktemp("check") / "long")
    rng = np.random.default_rng(0)
    with trajstore.open(url, "a") as store:
        columns = {
            "robot/left_arm_joint_velocities_filtered_and_smoothed": rng.normal(size=(11, 2)) * 1e-7,
            "reward": np.full(10, -123456.789),
        }
        store.append(columns)
        store.flush()
        for name in LONG_TAGS:
            store.tag(name)
    return url


LONG_TAGS = ("x" * 60 + "one", "x" * 60 + "two")


def first_column(text):
    """What stands in the first column of the table, joined."""
    rows = [line.strip("│").split("│")[0] if "│" in line else line.split("  ")[0] for line in text.splitlines()]
    return "".join(row.strip() for row in rows)


@pytest.mark.parametrize("width", also_slow([30, 40, 60, 80, 200], [30, 80]))
@pytest.mark.parametrize("command", ["stats", "tag", "versions", "info", "sample"])
def test_no_number_is_cut_and_no_name_is_lost(long_names, width, command):
    options = ["--batches", "3"] * (command == "sample")
    text = done(command, long_names, *options, width=width).out
    assert max(len(line.rstrip()) for line in text.splitlines() if long_names not in line) <= width
    assert "\u2026" not in text
    table = re.sub(r"\d+ more columns?: .*?;", "", text, flags=re.DOTALL)
    whole = done(command, long_names, *options, width=500).out
    if command != "sample":  # in which the speeds differ
        numbers = re.compile(r"(?<![\w.-])-?\d[\d.,]*(?:e[+-]\d+)?(?![\w.-])")
        assert {*numbers.findall(table)} <= {*numbers.findall(whole)}
    if command == "stats":
        assert re.search(r"reward .*-1\.235e\+05", table)
        for entry in range(2):
            assert f"robot/left_arm_joint_velocities_filtered_and_smoothed[{entry}]" in first_column(table)
    if command == "tag":
        assert all(name in first_column(table) for name in LONG_TAGS)
    if command == "info":
        assert "robot/left_arm_joint_velocities_filtered_and_smoothed" in first_column(text.split("where the bytes")[1])
    if width < 200 and command == "stats":
        left = re.search(r"more columns?: (.*?); --json shows all", " ".join(text.split()))[1].split(", ")
        assert not {*left} & {*table.splitlines()[0].split()}


def test_versions(url):
    rows = done("versions", url, "--json").document
    assert [row["version"] for row in rows] == [6, 5, 4, 3, 2, 1]
    assert rows[4]["tags"] == "a-name-that-is-rather-long, paper"
    assert [row["trajectories"] for row in rows] == [3, 3, 4, 3, 2, 1]
    assert [row["version"] for row in done("versions", url, "-n", "2", "--json").document] == [6, 5]
    assert re.search(r"4 │ \d{4}-\d\d-\d\d \d\d:\d\d │ append ", done("versions", url).out)


def test_diff(url):
    changed = done("diff", url, "paper", "--json").document
    assert changed == {
        "added": [2, 3],
        "removed": [0],
        "added_columns": ["return"],
        "removed_columns": [],
        "added_fields": [],
        "removed_fields": [],
    }
    text = done("diff", url, "paper").said
    assert re.search(r"trajectories │ 2: 2, 3 +│ 1: 0", text)
    assert re.search(r"columns │ return │", text)
    assert "no difference" in done("diff", url, "6", "6").said


def test_stats(url):
    document = done("stats", url, "-c", "action", "--where", "task == 'place'", "--json").document
    chosen = view(url).filter("task == 'place'")
    expected = np.concatenate([one["action"][:] for one in chosen])
    (action,) = document["columns"]
    np.testing.assert_allclose(action["mean"], expected.mean(0))
    np.testing.assert_allclose(action["max"], expected.max(0))
    assert (document["trajectories"], document["steps"]) == (2, len(expected))
    text = done("stats", url).out
    assert "3 trajectories, 18 steps, version 6" in text
    assert re.search(rf"action\[2\] +│ +18 │ +{view(url).statistics(['action'])['action'].mean[2]:.4g} ", text)


def test_json_has_no_nan(tmp_path):
    with trajstore.open(tmp_path / "s", "a") as store:
        store.append({"obs": np.full((3, 2), np.nan)})
    document = done("stats", tmp_path / "s", "--json").document
    assert document["columns"][0]["mean"] == [None, None]
    assert re.search(r"nan count", done("stats", tmp_path / "s").out)


def test_info_says_how_the_store_stands(url, tmp_path):
    borrower = str(tmp_path / "borrower")
    done("split", url, "-o", borrower, "--first", "2")
    info = done("info", url, "--json").document
    assert info["versions"] == 6
    assert info["tags"] == {"a-name-that-is-rather-long": 2, "paper": 2}
    assert [pin["borrower_url"] for pin in info["pins"]] == [borrower]
    assert (info["refers_to"], info["segments"], info["small_segments"], info["compacted_segments"]) == ([], 3, 3, 1)
    text = done("info", url).said
    assert "6 versions can be opened; tags: a-name-that-is-rather-long (2), paper (2)" in text
    assert f"keeps versions for stores that refer to it: {borrower}" in text
    assert "trajstore compact" not in text  # so few do no harm
    assert f"refers to segments of 1 other store: {url}" in done("info", borrower, "--base", Path(url).parent).said
    with trajstore.open(url, "a") as store:
        (pin,) = store.pins().index
        store.unpin(pin)


@pytest.mark.parametrize("kind", ["overview", "returns", "lengths", "trajectory", "frames"])
def test_plot(url, tmp_path, kind):
    path = tmp_path / "picture.png"
    assert done("plot", url, kind, "-o", path).said == f"drawn to {path}"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_has_a_name_for_the_picture(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done("plot", url, "--by", "task", "--where", "length > 4")
    assert os.listdir() == ["overview.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plot", "nothing"], "KIND 'nothing', expected 'overview'"),
        (["plot", "--by", "size"], "--by 'size' is not a field of the trajectories"),
        (["plot", "--x", "size"], "--x 'size', expected 'id', 'created_at' or 'steps'"),
        (
            ["plot", "-t", "3"],
            "--trajectory means nothing to KIND 'overview', only to trajectory and frames; leave it out",
        ),
        (["plot", "returns", "--frames", "8"], "--frames means nothing to KIND 'returns', only to overview and frames"),
        (["plot", "returns", "--rows", "3"], "--rows means nothing to KIND 'returns', only to frames"),
        (["plot", "lengths", "--x", "id"], "--x means nothing to KIND 'lengths', only to overview and returns"),
        (["plot", "lengths", "--by", "task"], "--by means nothing to KIND 'lengths'"),
        (
            ["plot", "trajectory", "-t", "1", "-t", "2"],
            "draws one trajectory, and --trajectory [1, 2] are 2; draw them one",
        ),
        (["plot", "-o", "a.gif"], "--out 'a.gif' ends in none of .png, .pdf, .svg"),
        (["plot", "-o", "a.doc"], "--out 'a.doc' ends in none of"),
        (["plot", "-o", "no/such/folder.png"], "no/such/folder.png: No such file or directory"),
        (["plot", "trajectory", "-t", "99"], "no trajectory 99; its ids are from 1 to 3"),
        (["plot", "frames", "-c", "action"], "expected one column of images"),
        (["plot", "--where", "length > 99"], "there are no trajectories to draw; choose another --where or --version"),
        (
            ["stats", "--where", "length > 99"],
            "there are no trajectories, so there is nothing to measure; choose another",
        ),
        (["stats", "-c", "size"], "no column 'size'"),
        (["stats", "--version", "old"], "has no tag 'old'; its tags are 'a-name-that-is-rather-long', 'paper'"),
        (["diff", "77"], "has no version 77; the latest is 6"),
        (["diff", "1", "old"], "has no tag 'old'"),
    ],
)
def test_errors_are_one_sentence_about_options(url, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    ran = run(arguments[0], url, *arguments[1:])
    assert (ran.code, ran.out) == (1, "")
    assert ran.complaint.startswith("error: ")
    assert words in ran.complaint
    assert not re.search(r"\b(kind|by|x|path|columns|where|trajectory)=", ran.complaint)


# ---- verify


def damaged(tmp_path):
    """A store of two segments, of which one has a page whose bytes changed."""
    url = tmp_path / "damaged"
    rng = np.random.default_rng(0)
    with trajstore.open(url, "a", codec="none") as store:
        for _ in range(2):
            store.append({"obs": rng.normal(size=(500, 3))})
            store.flush()
    largest = max(
        (path for path in url.glob("segments/*/**/*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[40] ^= 1
    largest.write_bytes(data)
    return url, largest


def test_verify_of_a_store_that_is_fine(url):
    ran = done("verify", url)
    assert ran.said.endswith("no errors (pages were not read)")
    assert "pages read" in done("verify", url, "--deep").said
    document = done("verify", url, "--json").document
    assert document["ok"]
    assert document["counts"]["versions"] == 6
    assert document["repaired"] is None


def test_verify_ends_with_1_if_there_are_errors_until_they_are_repaired(tmp_path):
    url, _ = damaged(tmp_path)
    assert done("verify", url).said.endswith("no errors (pages were not read)")
    found = run("verify", url, "--deep", width=80)
    assert found.code == 1
    assert found.err == ""
    assert "1 error" in found.said
    document = run("verify", url, "--deep", "--json").document
    assert not document["ok"]
    assert [one["kind"] for one in document["findings"] if one["severity"] == "error"] == ["page"]
    repaired = run("verify", url, "--deep", "--repair", "--json")
    assert repaired.code == 0
    assert (repaired.document["repaired"]["version"], repaired.document["repaired"]["ok"]) == (3, True)
    assert len(view(url)) == 1
    after = run("verify", url, "--deep", "--repair")
    assert after.code == 0
    assert "holds what can be read" not in after.said


def test_what_cannot_be_repaired_is_said(tmp_path):
    url, _ = damaged(tmp_path)
    for manifest in url.glob("manifests/*"):
        manifest.unlink()
    ran = run("verify", url, "--repair")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert "error" in ran.out + ran.err


def test_findings_name_options(tmp_path):
    source = tmp_path / "a" / "source"
    with trajstore.open(source, "a") as store:
        store.append({"action": np.arange(3)})
    trajstore.merge([source], tmp_path / "b" / "borrower")
    ran = run("verify", tmp_path / "b" / "borrower")
    assert ran.code == 1
    assert "--base" in ran.said
    assert "bases=" not in ran.said
    assert done("verify", tmp_path / "b" / "borrower", "--base", tmp_path / "a").code == 0
    os.rename(source, tmp_path / "a" / "moved")
    told = run("verify", tmp_path / "b" / "borrower", "--base", tmp_path / "a").out
    assert "trajstore relocate" in re.sub(r"[\s│]+", " ", told)


# ---- the rest of the command line


def test_help_says_what_the_exit_status_means():
    text = done("--help", width=100).out
    assert "Exit status: 0 if all went well; 1" in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "command",
    [command.__name__ for commands in cli.PANELS.values() for command in commands],
)
def test_help_teaches_with_an_example(command, width):
    ran = done(command, "--help", width=width)
    assert re.search(rf"Example: trajstore {command} ", ran.said)
    text = ran.out.split("╭")[0]
    assert max(map(len, ran.out.splitlines())) <= width
    short = [line for line in text.splitlines() if 0 < len(line.strip()) < 8 and not line.strip().endswith(".")]
    assert not short  # no paragraph is broken in the middle


def complete(*words):
    """What a shell would offer for the last word."""
    environment = {
        **os.environ,
        "_TRAJSTORE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("trajstore", *words)),
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv[0] = 'trajstore'; from trajstore.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return ran.stdout.split()


@pytest.mark.slow
def test_completion():
    assert sorted(complete("ver")) == ["verify", "versions"]
    assert complete("merge", "--share", "l") == ["link"]
    assert complete("plot", "runs/demo", "f") == ["frames"]


def test_completion_scripts(monkeypatch):
    monkeypatch.setenv("_TRAJSTORE_COMPLETE", "source_bash")
    ran = done()
    assert "_TRAJSTORE_COMPLETE=complete_bash" in ran.out


def test_warnings_of_the_library_are_shown(capsys):
    def command():
        logging.getLogger("trajstore.edit").warning(
            "open %s with bases={'/a': None} (or its storage options instead of None)", 1
        )

    console.run(command)
    shown = " ".join(capsys.readouterr().err.split())
    assert shown == "warning: open 1 with --base /a"


def test_errors_of_the_system_are_one_sentence(capsys):
    def command():
        raise OSError(28, "No space left on device", "/data/x")

    with pytest.raises(SystemExit) as end:
        console.run(command)
    assert end.value.code == 1
    assert "error: /data/x: No space left on device" in capsys.readouterr().err


def test_verify_repairs_a_store_whose_latest_version_is_damaged(url, tmp_path):
    copy = shutil.copytree(url, tmp_path / "store")
    (copy / layout.snapshot_key(6)).write_bytes(b"garbage")
    assert "version 5 is the last that can be read: open it with --version 5" in run("ls", copy).complaint
    assert done("ls", copy, "--version", 5).out
    found = run("verify", copy)
    assert found.code == 1
    assert "snapshot" in found.out
    repaired = run("verify", copy, "--repair")
    assert repaired.code == 0
    assert "version 7 holds what can be read, 3 of 3 trajectories: no errors are left" in repaired.said
    assert "damaged" not in done("versions", copy).out
    with trajstore.open(copy) as store:
        assert (store.version, store.num_trajectories) == (7, 3)


def test_info_says_what_is_out_of_reach(tmp_path):
    for name in "ab":
        filled(tmp_path / name, [1, 2])
    trajstore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    shutil.rmtree(tmp_path / "a")
    told = done("info", str(tmp_path / "all")).said
    assert (
        f"2 segments cannot be read, and not counted below: {tmp_path / 'all'} refers to segments of the store" in told
    )
    assert "say where it is now (trajstore relocate)" in told
    found = json.loads(done("info", str(tmp_path / "all"), "--json").out)
    assert found["segments_out_of_reach"] == 2
    assert len(found["problems"]) == 1


def test_stats_say_which_columns_are_left_out_and_show_them_when_asked(tmp_path):
    url = str(tmp_path / "store")
    columns = [Column(path="reward", dtype="float64"), Column(path="torque", dtype="float64", presence="optional")]
    with trajstore.open(url, "a", schema=columns) as store:
        store.append({"reward": np.ones(4)})
        store.append({"reward": np.ones(3), "torque": np.full(3, 7.0)})
        store.flush()
        store.append({"reward": np.ones(2)})
    ran = done("stats", url)
    assert "3 trajectories, 9 steps" in ran.said
    assert "not in every trajectory, and left out: torque (-c torque shows those that have it)" in ran.said
    ran = done("stats", url, "-c", "torque")
    assert "1 trajectory of 3, 3 steps" in ran.said
    assert "left out" not in ran.said
    assert "not in every trajectory" not in done("stats", url, "--where", "id == 1").said
