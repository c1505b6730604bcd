"""The command line, as a person types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import trajstore
from trajstore import cli, console
from trajstore.cli.common import parse_bytes

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
    assert "not shown: obs/image (uint8[32, 32, 3])" in text
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
    for words in ("while pages were read", "from the page cache", "windows/s", "steps/s", "B/s", "first batch after"):
        assert words in text
    assert re.search(r"page cache: \d+\.\d\d% of [\d,]+ rows were there; [\d,]+ pages read", text)


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
        (["sample", "{url}", "--order", "best"], "order='best', expected one of 'random'"),
        (["sample", "{url}", "-c", "nothing"], "no column 'nothing'"),
        (["sample", "{url}", "--cache-bytes", "1kB"], "pass cache_bytes >= "),
        (["sample", "{url}", "--device", "cuda:99"], "CUDA devices here"),
        (["sample", "{url}", "--device", "quantum"], "device='quantum'"),
        (["record", "CartPole-v7", "--out", "memory://cli"], "CartPole"),
    ],
)
def test_errors_are_one_sentence(run, url, arguments, message):
    text = run(*(a.format(url=url) for a in arguments), code=1)
    assert message in text
    assert "Traceback" not in text


def test_wrong_usage_is_shown(run):
    assert "KEY=VALUE" in run("info", "x", "--storage-option", "nonsense", code=2)
    assert "is not a number of bytes" in run("sample", "x", "--cache-bytes", "much", code=2)
    assert "Invalid value" in run("record", "CartPole-v1", "--out", "x", "--episodes", "0", code=2)


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
    with subprocess.Popen(
        [*COMMAND, "record", "CartPole-v1", "--episodes", "1000000", "--out", url],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
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
