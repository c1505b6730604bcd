"""A program that uses a bucket ends without a word about clients, sessions or tasks left behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.rare import also_slow

PROGRAM = """\
import json, sys
import numpy as np
import trajstore

url, options, ending = json.loads(sys.argv[1])
store = trajstore.open(url, "a", storage_options=options)
store.append({"obs": np.zeros((9, 4), np.float32), "action": np.arange(8)}, task="pick")
if ending == "closed":
    store.close()
elif ending == "flushed":
    store.flush()
reader = trajstore.open(url, storage_options=options)
len(reader.trajectories), [t.read() for t in reader.trajectories]
if ending == "closed":
    reader.close()
if ending == "failed":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("ending", also_slow(["closed", "flushed", "forgotten", "failed"], ["closed", "forgotten"]))
def test_a_program_ends_silently_and_what_it_appended_is_there(bucket, options, open_store, ending):
    arguments = json.dumps([f"s3://{bucket}/runs/demo", options, ending])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == (3 if ending == "failed" else 0)
    with open_store() as store:
        assert store.trajectories[0]["action"][:].tolist() == list(range(8))
