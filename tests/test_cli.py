"""The command line, as a person types it."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import trajstore
from tests.support.interrupts import interruptible
from trajstore import cli, console
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer
from trajstore.cli.common import parse_bases, parse_bytes

COMMAND = [sys.executable, "-c", "from trajstore.cli import main; main()"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: an interpreter that imports torch takes seconds to start."""
    monkeypatch.setattr(console.out, "_width", 160)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["trajstore", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed, complained = capsys.readouterr()
        assert exit_.value.code == code, printed + complained
        return printed if code == 0 else complained

    return run


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("cli") / "store")
    with trajstore.open(url, "a") as store:
        for number in range(30):
            store.append(
                {
                    "obs": {"image": np.zeros((number + 2, 32, 32, 3), np.uint8), "state": np.ones((number + 2, 3))},
                    "action": np.arange(number + 1),
                    "reward": np.full(number + 1, 0.5),
                },
                terminated=number % 2 == 0,
                task=["pick", "place"][number % 2],
            )
    return url


def test_help_names_every_command_and_each_explains_itself(run):
    text = run("--help")
    for name in ("info", "ls", "head", "sample", "record", "demo"):
        assert re.search(rf"\b{name}\b", text)
        assert "--help" in run(name, "--help")
    assert run("--version").strip() == f"trajstore {trajstore.__version__}"


def test_info(run, url):
    text = run("info", url)
    assert "30 trajectories, 465 steps" in text
    assert re.search(r"obs/image.*uint8\[32, 32, 3\].*length \+ 1", text)
    assert "steps.arrow (action, reward)" in text
    document = json.loads(run("info", url, "--json"))
    assert (document["trajectories"], document["steps"], document["version"]) == (30, 465, 1)
    by_columns = {tuple(o["columns"]): o for o in document["objects"]}
    assert by_columns["obs/image",]["logical_bytes"] == 495 * 32 * 32 * 3
    assert "nothing is committed yet" in run("info", url, "--version", "0")


def test_ls(run, url):
    rows = json.loads(run("ls", url, "--json", "--where", "length > 20 and task == 'place'", "-n", "3"))
    assert [row["id"] for row in rows] == [25, 27, 29]
    assert rows[0]["reward_sum"] == 13.0
    assert "20 of 30 trajectories" in run("ls", url)


def test_head(run, url):
    text = run("head", url, "-t", "4", "-n", "2")
    assert "trajectory 4: 5 steps, terminated, return 2.5, task=pick" in text
    assert "1 more column: obs/image (uint8[32, 32, 3]); -c NAME shows one" in text
    rows = json.loads(run("head", url, "-t", "4", "-n", "2", "-c", "action", "-c", "obs/state", "--json"))
    assert rows == [
        {"trajectory": 4, "step": s, "action": s, "obs/state[0]": 1.0, "obs/state[1]": 1.0, "obs/state[2]": 1.0}
        for s in (0, 1)
    ]


def test_sample_describes_a_batch_its_speed_and_the_cache(run, url):
    text = run("sample", url, "--window", "4", "--batch", "32", "--seconds", "0.5")
    assert "30 trajectories, 465 steps, version 1" in text
    assert re.search(r"obs/image .* uint8 .* \[32, 4, 32, 32, 3\]", text)
    assert re.search(r"action .* int64 .* \[32, 4\]", text)
    for words in (
        "while pages were read",
        "from the page cache",
        "windows/s",
        "steps/s",
        "bytes/s",
        "first batch after",
    ):
        assert words in text
    assert re.search(r"page cache: \d+\.\d\d% of [\d,]+ rows were there; [\d,]+ pages? read", text)


def test_sample_as_json_counts_what_it_took(run, url):
    arguments = ("--window", "4", "-b", "32", "--batches", "20", "-c", "obs/state", "-c", "reward")
    document = json.loads(run("sample", url, "--json", *arguments, "--where", "length > 10", "--cache-bytes", "16MiB"))
    assert document["trajectories"] == 20
    assert document["batch"] == {
        "obs/state": {"dtype": "float64", "shape": [32, 4, 3]},
        "reward": {"dtype": "float64", "shape": [32, 4]},
    }
    parts = [document["cold"], document["hot"]]
    assert document["batch_bytes"] == 32 * 4 * (3 + 1) * 8
    assert sum(part["batches"] for part in parts) == 20
    assert sum(part["windows"] for part in parts) == 20 * 32
    for part in parts:
        assert part["steps_per_s"] == 4 * part["windows_per_s"]
        assert part["bytes_per_s"] == pytest.approx(part["windows_per_s"] * document["batch_bytes"] / 32)
    assert document["cache"]["capacity_bytes"] <= 16 << 20
    assert document["cache"]["pages_read"] > 0
    assert 0 < document["first_batch_s"] <= document["cold"]["seconds"]


@pytest.mark.parametrize("order", ["random", "shuffle", "sequential", "prioritized"])
def test_sample_in_every_order(run, url, order):
    arguments = ("--order", order, "--batches", "40", "-b", "16", "--prefetch", "0", "--pad", "zero", "--window", "3")
    document = json.loads(run("sample", url, "--json", *arguments))
    windows = document["cold"]["windows"] + document["hot"]["windows"]
    whole = 40 * 16 if order in ("random", "prioritized") else 465 + 40 % 30 * 16  # 30 batches in a pass
    assert windows == whole
    assert "is_pad" in document["batch"]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1000", 1000), ("500MB", 500_000_000), ("8 GiB", 8 << 30), ("1.5k", 1500), ("2Kib", 2048)]
)
def test_bytes_as_people_write_them(text, nbytes):
    assert parse_bytes(text) == nbytes


# ---- what there is no room for


WIDE = {f"field_{n:02d}": "some text of this field" for n in range(12)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Many metadata fields, one a document for programs, and vectors that do not fit beside the rest."""
    url = str(tmp_path_factory.mktemp("cli") / "wide")
    with trajstore.open(url, "a") as store:
        for number in range(3):
            store.append(
                {
                    "obs": np.arange(3 * 12.0).reshape(3, 12) / 7,
                    "action": np.full((3, 2), 0.25),
                    "reward": np.ones(3),
                    **{f"a_rather_long_name_{n}": np.zeros(3) for n in range(6)},
                },
                rest=json.dumps({"rows": list(range(40 + number))}),
                a_number=number,
                **{name: f"{text} {number}" for name, text in WIDE.items()},
            )
    return url


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", [["ls"], ["ls", "-n", "1"], ["head"], ["info"], ["sample", "--batches", "3"]])
def test_tables_fit_and_name_what_they_leave_out(run, wide, monkeypatch, width, command):
    monkeypatch.setattr(console.out, "_width", width)
    text = run(*command[:1], wide, *command[1:])
    assert max(map(len, text.splitlines())) <= width
    assert '"rows"' not in text
    whole = " ".join(text.split())
    if command[0] in ("ls", "head"):
        assert "\u2026" not in text  # no cell or header is cut
        assert re.search(r"\d+ more columns: .*; -c NAME shows one", whole)
    if command == ["ls"]:
        header = text.splitlines()[1]
        names = re.findall(r"\w+", header)
        left = re.search(r"more columns: (.*?);", whole).group(1).split(", ")
        same = re.findall(r"(\w+)=", whole)
        assert names[:2] == ["id", "a_number"]
        every = {"length", "reward_sum", "created_at", "rest", "a_number", *WIDE}
        assert {*names[1:], *left, *same} >= every
        assert not {*names} & {*left}
    if command[0] == "head":
        assert "neither terminated nor truncated, return 3, " in whole
        assert "rest=..." in whole
        assert "[0, 0.1429, ...]" in whole


def test_columns_that_are_asked_for_are_shown_whole(run, wide, monkeypatch):
    monkeypatch.setattr(console.out, "_width", 80)
    text = run("ls", wide, "-c", "field_11", "-c", "rest", "-n", "1")
    assert "more column" not in text
    assert "42" not in text
    assert "41]}" in text.replace(" ", "")
    entries = run("head", wide, "-c", "obs", "-n", "1")
    assert all(f"{value:.4g}" in re.sub(r"[\s│]", "", entries) for value in np.arange(12) / 7)
    assert "no column 'what' in the table of trajectories; there are uuid, length" in run(
        "ls", wide, "-c", "what", code=1
    )
    rows = json.loads(run("ls", wide, "-c", "a_number", "--json"))
    assert rows == [{"id": n, "a_number": n} for n in range(3)]


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (2, 6)])
def test_one_is_singular(run, tmp_path, count, steps):
    with trajstore.open(tmp_path / "s", "a") as store:
        for _ in range(count):
            store.append({"reward": np.zeros(steps // count)})
    s, ies = ("", "y") if count == 1 else ("s", "ies")
    for command in ("info", "sample"):
        assert f"{count} trajector{ies}, {steps} step{s}" in run(
            command, str(tmp_path / "s"), *["--batches=2"][: command == "sample"]
        )
    assert re.search(r"1 segment of .*, 1 manifest of ", run("info", str(tmp_path / "s")))
    assert f"trajectory 0: {steps // count} step{'s' * (steps // count > 1)}, " in run("head", str(tmp_path / "s"))


# ---- what errors say


PYTHON = re.compile(r"\b(bases|overwrite|allow_pickle|trajectory_format|cache_bytes|mode|order|pad|n_step|window)=")


def rollout(steps=3, envs=2):
    return Trajectory(
        max_episode_length=steps,
        model_weights_id="w",
        actions=torch.zeros(steps, envs, 2),
        rewards=torch.ones(steps, envs),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What ``places`` begins with."""
    folder = tmp_path_factory.mktemp("made")
    for name, form in (
        ("pickles", "pkl"),
        ("files", "pt"),
        ("ranks/rank_0", "pt"),
        ("ranks/rank_1", "pt"),
        ("buffer", "store"),
    ):
        with TrajectoryReplayBuffer(seed=1, trajectory_format=form) as buffer:
            buffer.add_trajectories([rollout(), rollout()])
            buffer.save_checkpoint(folder / name)
    for name in ("runs/a/s", "runs/b"):
        with trajstore.open(folder / name, "a") as store:
            store.append({"action": np.arange(3)})
    return folder


@pytest.fixture
def places(made, tmp_path, monkeypatch):
    """Stores and files of RLinf in the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with trajstore.open("runs/a/s") as store:
        store.trajectories.save("elsewhere/s", share="reference")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["head", "elsewhere/s"], "if you trust that place, open it with --base {here}/runs/a/s"),
        (
            ["rlinf", "import", "pickles", "new"],
            "pass --allow-pickle if you trust it, or have its writer save .pt files",
        ),
        (["rlinf", "export", "buffer", "files"], "pass --overwrite to replace it, or choose another place"),
        (["rlinf", "export", "buffer", "new", "--format", "npz"], "--format 'npz', expected 'pt' or 'pkl'"),
        (
            ["rlinf", "merge-or-split", "--source-path", "files", "--save-path", "new", "--split-count", "9"],
            "--split-count 9: ",
        ),
        (
            ["rlinf", "merge-or-split", "--source-path", "files", "--save-path", "pickles"],
            "and nothing is replaced; choose another --save-path",
        ),
        (["sample", "runs/b", "--window", "9"], "--pad 'edge' or 'zero'"),
        (["sample", "runs/b", "--pad", "much"], "--pad 'much', expected"),
        (["sample", "runs/b", "--order", "best"], "--order 'best', expected"),
        (["sample", "runs/b", "--n-step", "0"], "--n-step 0, expected at least 1"),
        (["sample", "runs/b", "--n-step", "2"], "--n-step sums the column 'reward'"),
        (["sample", "runs/b", "--cache-bytes", "10"], "pass --cache-bytes >= "),
        (["info", "runs/b", "--storage-option", "a=1"], "--storage-option ['a'] mean nothing for the local path"),
        (["record", "CartPole-v1", "--out", "new", "--codec", "best"], "--codec 'best', expected"),
        (["info", "nowhere"], "or make one: trajstore record, or trajstore rlinf import"),
    ],
)
def test_errors_name_options(run, places, arguments, words):
    text = " ".join(run(*arguments, code=1).split())
    assert words.format(here=places) in text
    assert not PYTHON.search(text)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "a store is already at s; open it with mode='a', or choose another place",
            "a store is already at s; choose another place",
        ),
        (
            "check the permissions of the folder, choose another place, or open with mode='r'",
            "check the permissions of the folder, or choose another place",
        ),
        ("or pass single_writer=True if nobody", "or in Python pass single_writer=True if nobody"),
        ("s3://a: denied; check storage_options", "s3://a: denied; check --storage-option"),
        ("columns 'a' and 'b' are in order; the window has 3", "columns 'a' and 'b' are in order; the window has 3"),
        ("no trajstore at /x/storage_options/cache_bytes.d", "no trajstore at /x/storage_options/cache_bytes.d"),
    ],
)
def test_messages_in_the_words_of_the_command_line(message, said):
    assert console.for_commands(message) == said


@pytest.mark.parametrize(
    "trusted", ["runs", "runs/", "./runs/a", "elsewhere/../runs", "{here}/runs", "file://{here}/runs"]
)
def test_bases_may_be_relative(run, places, trusted, monkeypatch):
    trusted = trusted.format(here=places)
    assert "trajectory 0: 3 steps" in run("head", "elsewhere/s", "--base", trusted)
    assert "--base" in run("head", "elsewhere/s", "--base", "elsewhere", code=1)
    with trajstore.open("elsewhere/s", bases={trusted: None}) as store:
        assert store.trajectories[0]["action"][:].tolist() == [0, 1, 2]
        pickled = pickle.dumps(store.trajectories)
    assert parse_bases([trusted, "s3://b/x"], ["key=1"]).keys() == {
        str(places / os.path.normpath(trusted.removeprefix("file://"))),
        "s3://b/x",
    }
    with trajstore.open("elsewhere/s", bases={"run": None}) as store, pytest.raises(trajstore.UntrustedBaseError):
        store.trajectories[0]["action"][:]
    monkeypatch.chdir("/")  # where another process may stand
    assert pickle.loads(pickled)[0]["action"][:].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("files", "these are RLinf's files; make a store of them: trajstore rlinf import {here}/files STORE"),
        (
            "ranks",
            "its folders (rank_0, rank_1) hold RLinf's files; make a store of them: "
            "trajstore rlinf import {here}/ranks STORE",
        ),
        ("runs", "there are stores in its folders (b); open one of them, {here}/runs/b say"),
        ("", "there are stores in its folders (buffer); open one of them"),
        ("runs/a/s/segments", "(trajstore.json is not there); check the path"),
    ],
)
def test_a_place_without_a_store_says_what_is_there(run, places, place, words):
    where = str(places / place).rstrip("/")
    assert words.format(here=places) in " ".join(run("ls", where, code=1).split())
    with pytest.raises(trajstore.StoreNotFoundError) as caught:
        trajstore.open(where)
    assert words.format(here=places) in str(caught.value)


def test_ranks_that_are_stores(places):
    for rank in range(6):
        with trajstore.open(f"stores/rank_{rank}", "a") as store:
            store.append({"action": np.arange(3)})
    with pytest.raises(
        trajstore.StoreNotFoundError, match=r"\(rank_0, rank_1, rank_2, rank_3, \.\.\.\).*merge-or-split --source"
    ):
        trajstore.open("stores")
    assert not os.path.exists("stores/trajstore.json")


def test_merge_begins_where_one_stands(run, places, monkeypatch):
    monkeypatch.chdir(places / "ranks")
    assert "[default: .]" in " ".join(run("rlinf", "merge-or-split", "--help").replace("│", " ").split())
    assert "4 rollouts in ../merged" in " ".join(run("rlinf", "merge-or-split", "--save-path", "../merged").split())
    text = " ".join(run("rlinf", "import", ".", "../one").split())
    assert text.startswith("4 rollouts (8 trajectories in the store) in ../one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "error: no trajstore at"),
        (["ls", "{url}", "--where", "lenght > 3"], "the fields are id, uuid, length"),
        (["head", "{url}", "-t", "99"], "has no trajectory 99"),
        (["head", "{url}", "-c", "nothing"], "no column 'nothing'"),
        (["info", "{url}", "--version", "7"], "has no version 7; the latest is 1"),
        (["info", "s3:/bad/../url"], "error: no trajstore at"),
        (["info", "nope://x"], "Protocol not known"),
        (["sample", "{url}", "--window", "99"], "no trajectory has 99 steps"),
        (["sample", "{url}", "--order", "best"], "--order 'best', expected one of 'random'"),
        (["sample", "{url}", "-c", "nothing"], "no column 'nothing'"),
        (["sample", "{url}", "--cache-bytes", "1kB"], "pass --cache-bytes >= "),
        (["sample", "{url}", "--device", "cuda:99"], "CUDA devices here"),
        (["sample", "{url}", "--device", "quantum"], "--device 'quantum'"),
        (["record", "CartPole-v1", "--out", "memory://cli"], "memory://cli would be in the memory of this command"),
    ],
)
def test_errors_are_one_sentence(run, url, arguments, message):
    text = run(*(a.format(url=url) for a in arguments), code=1)
    assert message in text
    assert "Traceback" not in text


def test_wrong_usage_is_shown(run):
    assert "KEY=VALUE" in run("info", "x", "--storage-option", "nonsense", code=2)
    assert "is not a number of bytes" in run("sample", "x", "--cache-bytes", "much", code=2)
    assert "less than one byte" in run("sample", "x", "--cache-bytes", "0", code=2)
    assert "Invalid value" in run("record", "CartPole-v1", "--out", "x", "--episodes", "0", code=2)


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["CartPole-v7"], "no environment 'CartPole-v7' is registered: did you mean", 1),
        (["CartPole-v1", "--env-option", "foo=3"], "could not be made with foo=3: TypeError: ", 1),
        (["FrozenLake-v1", "--env-option", "map_name=7x7"], "could not be made with map_name='7x7': KeyError: ", 1),
        (["CartPole-v1", "--num-envs", "2", "--env-option", "foo=3"], "could not be made with foo=3", 1),
        (["CartPole-v1", "--codec", "best"], "--codec 'best', expected", 1),
        (["CartPole-v1", "--seed", "-1"], "Invalid value for '--seed'", 2),
    ],
)
def test_a_record_that_fails_says_why_and_leaves_no_store(run, tmp_path, arguments, words, code):
    url = tmp_path / "new"
    complaint = " ".join(run("record", *arguments, "--out", str(url), code=code).replace("│", " ").split())
    assert words in complaint
    assert "Traceback" not in complaint
    assert not url.exists()


def test_a_record_that_fails_leaves_the_store_that_was_there(run, url):
    before = trajstore.open(url).version
    run("record", "CartPole-v7", "--out", url, code=1)
    assert "column 'obs'" in run("record", "CartPole-v1", "-n", "1", "--out", url, code=1)
    assert trajstore.open(url).version == before


@pytest.mark.parametrize(
    "arguments",
    [
        "record CartPole-v1 -o {gone}",
        "demo {gone}",
        "merge runs/b -o {gone}",
        "split runs/b -o {gone} --first 1",
        "split runs/b -o new=0.5 -o {gone}=0.5",
        "delete {gone} --where length>1",
        "retain {gone} --last 1",
        "tag {gone} paper",
        "restore {gone} 1",
        "compact {gone}",
        "vacuum {gone}",
        "relocate {gone} a b",
        "verify {gone} --repair",
        "rlinf import files {gone}",
        "rlinf export buffer {gone}",
        "rlinf merge-or-split --source-path ranks --save-path {gone}",
    ],
)
def test_nothing_is_made_in_the_memory_of_a_command(run, places, arguments):
    complaint = run(*arguments.format(gone="memory://gone").split(), code=1)
    assert "memory://gone would be in the memory of this command, and gone when it ends; choose a path" in complaint
    assert not os.path.exists("new")
    assert not len(trajstore.open("runs/b").pins())


def test_help_advertises_no_store_in_memory(run):
    assert "memory://" not in run("--help")


def test_record_then_look(run, tmp_path):
    url = str(tmp_path / "cartpole")
    assert "5 episodes" in run("record", "CartPole-v1", "--episodes", "5", "--num-envs", "2", "--out", url)
    assert "version 2" in run("record", "CartPole-v1", "--episodes", "1", "--seed", "9", "--out", url)
    with trajstore.open(url) as store:
        assert len(store.trajectories) == 6
        assert store.trajectories[5].metadata["seed"] == 9
        assert store.schema["obs"].extra == 1


def test_ctrl_c_keeps_every_finished_episode(tmp_path):
    url = str(tmp_path / "cartpole")
    with interruptible():
        command = [*COMMAND, "record", "CartPole-v1", "--episodes", "1000000", "--out", url]
        started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with started as process:
        while not os.path.exists(f"{url}/trajstore.json"):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = int(re.search(r"interrupted: the (\d+) finished episodes", errors.replace("\n", " ")).group(1))
    with trajstore.open(url) as store:
        assert len(store.trajectories) == said > 5
        assert all(t.terminated or t.truncated for t in store.trajectories)
        assert all(t["reward"][:].sum() == t.length for t in store.trajectories)
