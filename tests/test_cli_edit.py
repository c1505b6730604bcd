"""Commands that change stores, as a person types them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import trajstore
from tests.support.commands import done, run
from tests.support.s3_server import S3Server
from trajstore.cli.edit import parse_places

# A keyword of Python, which nobody can give on the command line.
PYTHON = re.compile(
    r"\b(share|allow_unpinned|exclusive|grace|keep_versions|keep_for|move|where|first|last|max_bytes|max_steps|version|"
    r"segment_bytes|order|kind|columns|bases|mode|by|x|path)=|\w\(\)"
)


def fill(url, *, lengths=(3, 5, 4), task="pick", seed=0, **options):
    """Append trajectories of these lengths, each a commit of its own."""
    rng = np.random.default_rng(seed)
    with trajstore.open(url, "a", **options) as store:
        for length in lengths:
            columns = {"obs": rng.normal(size=(length + 1, 2)), "action": np.arange(length), "reward": np.ones(length)}
            store.append(columns, terminated=True, task=task)
            store.flush()
    return str(url)


def lengths(url, **options):
    with trajstore.open(url, **options) as store:
        return store.trajectories.lengths.tolist()


@pytest.fixture
def url(tmp_path):
    return fill(tmp_path / "one")


@pytest.fixture
def two(tmp_path):
    return fill(tmp_path / "two", lengths=(2, 6), task="place", seed=1)


# ---- merge and split


@pytest.mark.parametrize(("order", "expected"), [("concat", [3, 5, 4, 2, 6]), ("interleave", [3, 2, 5, 6, 4])])
@pytest.mark.parametrize("share", ["reference", "link", "copy"])
def test_merge(url, two, tmp_path, order, expected, share):
    out = str(tmp_path / "all")
    ran = done("merge", url, two, "-o", out, "--order", order, "--share", share)
    assert ran.said == f"5 trajectories in {out}"
    assert ran.err == ""
    assert lengths(out) == expected
    info = done("info", out, "--json").document
    assert info["refers_to"] == [{"url": place, "pinned": True} for place in (url, two) if share == "reference"]
    pins = done("info", url, "--json").document["pins"]
    assert [pin["borrower_url"] for pin in pins] == [out] * (share == "reference")


def test_merge_as_json(url, two, tmp_path):
    out = str(tmp_path / "all")
    assert done("merge", url, two, "-o", out, "--json").document == {"url": out, "trajectories": 5}


def test_split_at_random_by_count_and_by_expression(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = done("split", url, "-o", "train=0.67", "-o", "test=0.33", "--seed", 1, "--json").document
    assert counts == {"train": 2, "test": 1}
    assert sorted(lengths("train") + lengths("test")) == [3, 4, 5]
    done("split", url, "-o", "early=1", "-o", "late=2")
    assert (lengths("early"), lengths("late")) == ([3], [5, 4])
    done("split", url, "-o", "short=length < 4", "-o", "long=length >=4")
    assert (lengths("short"), lengths("long")) == ([3], [5, 4])
    assert done("split", url, "-o", "lr=0.3/", "--first", 2).said == "2 trajectories in lr=0.3/"
    assert lengths("lr=0.3") == [3, 5]
    done("split", url, "-o", "picks", "--where", "task == 'pick' and length > 3", "--share", "copy")
    assert lengths("picks") == [5, 4]


@pytest.mark.parametrize(
    ("texts", "places"),
    [
        (["a"], "a"),
        (["a=1"], {"a": 1}),
        (["a=1.0"], {"a": 1.0}),
        (["s3://b/x=1/c=0.5"], {"s3://b/x=1/c": 0.5}),
        (["a=length == 3"], {"a": "length == 3"}),
        (["a=length != 3", "b=length <= 3"], {"a": "length != 3", "b": "length <= 3"}),
        (["a=task == 'x=2'"], {"a": "task == 'x=2'"}),
    ],
)
def test_places(texts, places):
    found = parse_places(texts)
    assert found == places
    if isinstance(places, dict):
        assert [type(part) for part in found.values()] == [type(part) for part in places.values()]


def test_a_result_that_refers_elsewhere_says_whom_to_trust(url, tmp_path):
    far = str(tmp_path / "far" / "s")
    ran = done("split", url, "-o", far, "--first", 2, "--json")
    assert ran.document == {far: 2}
    assert (
        f"note: it refers to stores outside its own parent folder ({url}); who opens it has to trust" in ran.complaint
    )
    refused = run("head", far)
    assert refused.code == 1
    assert f"--base {url}" in refused.complaint
    assert "trajectory 0" in done("head", far, "--base", tmp_path).out


def test_relocate(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    os.rename(url, "old/one")
    done("merge", "old/one", "-o", "all")
    os.rename("old", "new")
    assert "new" not in done("versions", "all").out
    assert "is not there" in run("head", "all").complaint
    ran = done("relocate", "all", tmp_path / "old", tmp_path / "new", "--json")
    assert ran.document == {"version": 2}
    assert lengths("all") == [3, 5, 4]
    assert "refers to no store whose URL begins with" in run("relocate", "all", "/nowhere", tmp_path).complaint


# ---- versions


def test_delete_and_retain_say_what_is_left(url):
    assert "1 trajectory deleted, 2 left in version 4" in done("delete", url, "--where", "id in [1]").said
    assert lengths(url) == [3, 4]
    nothing = done("delete", url, "--where", "length > 99")
    assert "nothing to delete: version 4 of" in nothing.said
    assert done("retain", url, "--last", 1, "--json").document == {"deleted": 1, "trajectories": 1, "version": 5}
    assert done("retain", url, "--last", 1, "--json").document == {"deleted": 0, "trajectories": 1, "version": 5}
    assert lengths(url) == [4]


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (["--max-steps", "9"], [5, 4]),
        (["--where", "length < 5"], [3, 4]),
        (["--where", "length < 5", "--last", "1"], [4]),
        (["--max-bytes", "1GiB"], [3, 5, 4]),
        (["--last", "0"], []),
    ],
)
def test_retain(url, limits, left):
    done("retain", url, *limits)
    assert lengths(url) == left


def test_tags_and_restore(url):
    assert "no tags; trajstore tag URL NAME makes one" in done("tag", url).said
    assert done("tag", url, "paper").said == f"paper is version 3 of {url}"
    assert done("tag", url, "first", "--version", "1", "--json").document == {"tag": "first", "version": 1}
    done("delete", url, "--where", "length == 5")
    refused = run("tag", url, "paper")
    assert refused.code == 1
    assert "is at version 3; choose another name, or move it (--move)" in refused.complaint
    done("tag", url, "paper", "--move")
    rows = done("tag", url, "--json").document
    assert {row["tag"]: row["version"] for row in rows} == {"first": 1, "paper": 4}
    assert re.search(r"paper +│ +4 │", done("tag", url).out)
    restored = done("restore", url, "first")
    assert restored.said == f"version 5 of {url} holds what first held: 1 trajectory"
    assert lengths(url) == [3]
    assert done("restore", url, "3", "--json").document == {"version": 6, "trajectories": 3}
    done("tag", url, "paper", "--remove")
    assert "has no tag 'paper'; its tags are 'first'" in run("tag", url, "paper", "--remove").complaint
    assert [row["id"] for row in done("ls", url, "--version", "first", "--json").document] == [0]


def test_compact(tmp_path):
    url = fill(tmp_path / "s", lengths=range(1, 13))
    assert (
        "12 of them are small and would fit into 1, which open and read faster: trajstore compact"
        in done("info", url).said
    )
    before = done("info", url, "--json").document
    ran = done("compact", url)
    assert ran.said == f"12 trajectories of 12 segments are in 1 segment now, in version 13 of {url}"
    assert ran.err == ""
    after = done("info", url, "--json").document
    assert (before["segments"], before["small_segments"], before["compacted_segments"]) == (12, 12, 1)
    assert (after["segments"], after["small_segments"]) == (1, 0)
    assert "small" not in done("info", url).out
    assert lengths(url) == [*range(1, 13)]
    assert "nothing to compact" in done("compact", url).said
    assert done("compact", url, "--json").document["segments_before"] == 0


def test_compact_says_what_lies_in_other_stores(tmp_path):
    source = fill(tmp_path / "s", lengths=range(1, 13))
    done("merge", source, "-o", tmp_path / "all")
    told = done("compact", tmp_path / "all").said
    assert "nothing to compact in" in told
    assert (
        "12 segments lie in other stores; compact those and merge them again, or merge them with --share copy" in told
    )
    done("merge", source, "-o", tmp_path / "own", "--share", "copy")
    assert "12 segments are in 1 segment now" in done("compact", tmp_path / "own").said
    assert "other stores" not in done("compact", tmp_path / "own").said


NOW = ("--grace", "0d", "--keep-for", "0d", "--keep-versions", "1", "--exclusive")


def test_vacuum_is_a_dry_run_unless_really(url):
    done("tag", url, "first", "--version", "1")
    done("delete", url, "--where", "id == 0")
    done("compact", url)
    before = done("versions", url, "--json").document
    for arguments in ((), ("--dry-run",)):
        planned = done("vacuum", url, *NOW, *arguments)
        assert re.search(r"what would go .* versions +│ +3 │", planned.said)
        assert "this was a dry run, nothing was changed; --really does it" in planned.said
    assert done("versions", url, "--json").document == before
    told = done("vacuum", url, *NOW, "--json").document
    really = done("vacuum", url, *NOW, "--really", "--json").document
    assert (told.pop("dry_run"), really.pop("dry_run")) == (True, False)
    assert {**told, "young": 0, "other": 0} == {**really, "young": 0, "other": 0}
    assert really["versions"] == [2, 3, 4]
    assert really["nbytes"] > 0
    assert [row["version"] for row in done("versions", url, "--json").document] == [5, 1]
    assert lengths(url) == [5, 4]
    assert "nothing to give back" in done("vacuum", url, *NOW).said
    assert "version 3 was removed by vacuum" in run("ls", url, "--version", "3").complaint


def test_vacuum_by_default_keeps_the_last_week(url):
    assert (
        f"nothing to give back in {url} 3 versions of {url} stay: the latest 100, those younger than 7d, and"
        in done("vacuum", url, "--really").said
    )


# ---- what errors say


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Stores, and what is none, in one folder."""
    folder = tmp_path_factory.mktemp("places")
    fill(folder / "one")
    fill(folder / "two", task="place")
    with trajstore.open(folder / "odd", "a") as store:
        store.append({"obs": np.zeros((3, 5), np.float32), "action": np.arange(2)}, task=4)
    trajstore.open(folder / "empty", "a").close()
    (folder / "folder").mkdir()
    trajstore.split(folder / "one", folder / "far" / "part", first=1)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("merge one two -o one", "one is one of the sources; choose another place"),
        ("merge one two -o odd", "a store is already at {here}/odd; choose another place"),
        ("merge one odd -o new", "column 'obs' has dtype=float64 in {here}/one, dtype=float32 in {here}/odd"),
        ("merge one odd -o new", "metadata field 'task' has type=string in {here}/one, type=int64 in {here}/odd"),
        ("merge one nowhere -o new", "no trajstore at {here}/nowhere"),
        ("merge one folder -o new", "no trajstore at {here}/folder"),
        ("merge one two -o new --order best", "--order 'best', expected 'concat' or 'interleave'"),
        ("merge one two -o new --share move", "--share 'move', expected 'link', 'copy' or 'reference'"),
        ("merge far/part -o new", "if you trust that place, open it with --base {here}/one"),
        ("split one -o new", "one place takes --first or --where, one of the two"),
        ("split one -o new --first 2 --where length>1", "one place takes --first or --where"),
        ("split one -o a=0.5 -o b=0.5 --first 2", "--first and --where are for one place"),
        ("split one -o a=0.9 -o b=0.9", "fractions [0.9, 0.9], expected numbers from 0 to 1 that add up to at most 1"),
        ("split one -o a=9 -o b=1", "9 + 1 trajectories, expected at least 1 each and at most 3 in all"),
        ("split one -o new --where speed>1", "name 'speed' is not defined; the fields are id, uuid, length"),
        ("split one -o new --where length>1&&length<3", "write and, or, not for &&, || and !"),
        ("delete one --where speed>1", "name 'speed' is not defined; the fields are id, uuid, length"),
        ("delete one --where length>", "filter 'length>'"),
        ("retain one", "retain without a limit; give --last, --max-steps, --max-bytes or --where"),
        ("tag one 12", "is no number"),
        ("tag one a/b", "a name has letters, digits"),
        ("tag one paper --version 77", "{here}/one has no version 77; the latest is 3"),
        ("tag empty paper", "version 0 is the empty store and cannot be tagged"),
        ("restore one 77", "{here}/one has no version 77; the latest is 3"),
        ("restore one old", "{here}/one has no tag 'old'; its tags are none"),
        (
            "vacuum one --grace 1d",
            "--grace of 1 days, expected at least 7: writers count on it; pass --exclusive if no",
        ),
        ("vacuum one --grace soon", "'soon' is no duration; write 30m, 12h, 7d or 2w"),
        ("vacuum one --keep-for ever", "'ever' is no duration"),
        ("vacuum nowhere --really", "no trajstore at {here}/nowhere"),
        ("relocate one a b", "refers to no store whose URL begins with 'a'; it refers to none at all"),
        ("relocate far/part {here} /b", "if you trust that place, open it with --base /b/one"),
        ("compact nowhere", "no trajstore at {here}/nowhere"),
    ],
)
def test_errors_are_one_sentence_about_options(places, monkeypatch, arguments, words):
    monkeypatch.chdir(places)
    ran = run(*(part.format(here=places) for part in arguments.split()))
    assert ran.code == 1
    assert ran.out == ""
    assert ran.complaint.startswith("error: ")
    assert words.format(here=places) in ran.complaint
    assert not PYTHON.search(ran.complaint)
    assert not (places / "new").exists()
    assert not (places / "a").exists()
    assert not (places / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "a", "b"], "Missing option '--out'"),
        (["merge", "-o", "b"], "Missing argument 'SOURCE'"),
        (["split", "a", "-o", "b=0.5", "-o", "c"], "'c' does not say which part; several stores take one each"),
        (["split", "a", "-o", "b=0.5", "-o", "b=0.5"], "'b' is named twice"),
        (
            ["split", "a", "-o", "b=0.5", "--where", "length > 3"],
            "'b=0.5' says which part it gets, and so does --first or",
        ),
        (["split", "a", "-o", "x/b=7", "--first", "3"], "name the folder as 'x/b=7/' if the store is called so"),
        (["split", "a", "-o", "b=task == 'a/b'", "--first", "3"], "says which part it gets"),
        (["tag", "a", "b", "--remove", "--version", "2"], "--remove takes the name away from whichever version has it"),
        (["tag", "a", "b", "--remove", "--move"], "leave out --version and --move"),
        (["delete", "a"], "Missing option '--where'"),
        (["retain", "a", "--max-bytes", "lots"], "'lots' is not a number of bytes; write 500MB"),
        (["retain", "a", "--last", "-1"], "--last"),
        (["tag", "a", "--move"], "which tag? Give its name"),
        (["tag", "a", "--remove"], "which tag? Give its name"),
        (["vacuum", "a", "--keep-versions", "0"], "--keep-versions"),
        (["compact", "a", "--segment-bytes", "0"], "less than one byte"),
        (["restore", "a"], "Missing argument 'VERSION'"),
        (
            ["merge", "a", "-o", "b", "--storage-option", "x=1", "--storage-option", "x.y=2"],
            "which has a value already",
        ),
    ],
)
def test_wrong_usage(arguments, words):
    ran = run(*arguments)
    assert ran.code == 2
    assert words in ran.complaint


def test_a_source_that_cannot_be_pinned(url, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise trajstore.StoragePermissionError("pins: Permission denied")

    monkeypatch.setattr("trajstore.edit.borrow.pin", refuse)
    out = str(tmp_path / "all")
    ran = run("merge", url, "-o", out)
    assert ran.code == 1
    assert "pass --share 'copy' for bytes of its own, or --allow-unpinned if nobody vacuums it" in ran.complaint
    assert not PYTHON.search(ran.complaint)
    ran = done("merge", url, "-o", out, "--allow-unpinned", "--json")
    assert ran.document["trajectories"] == 3
    assert f"warning: {out} refers to {url} without a pin" in ran.complaint
    assert "1 of them keeps nothing for this store: a vacuum there may remove what it needs" in done("info", out).said


# ---- buckets


@pytest.fixture(scope="module")
def s3():
    with S3Server() as server:
        yield server


def test_every_edit_in_a_bucket(s3, tmp_path):
    s3.make_bucket("edits")
    options = s3.storage_options()
    given = [f"--storage-option={key}={json.dumps(value)}" for key, value in options.items()]
    one = fill("s3://edits/runs/one", storage_options=options)
    two = fill("s3://edits/runs/two", lengths=(2, 6), storage_options=options)
    assert done("merge", one, two, "-o", "s3://edits/runs/all", *given).said == "5 trajectories in s3://edits/runs/all"
    done("split", "s3://edits/runs/all", "-o", "s3://edits/runs/long", "--where", "length > 3", *given)
    assert lengths("s3://edits/runs/long", storage_options=options) == [5, 4, 6]
    done("tag", one, "paper", *given)
    done("delete", one, "--where", "length == 5", *given)
    done("compact", one, *given)
    assert done("restore", one, "paper", *given, "--json").document["trajectories"] == 3
    done("retain", one, "--last", "1", *given)
    rows = done("versions", one, "--json", *given).document
    assert [row["operation"] for row in rows] == ["retain", "restore 3", "compact", "delete", *["append"] * 3]
    assert done("diff", one, "paper", "--json", *given).document["removed"] == [0, 1]
    gone = done("vacuum", one, *NOW, "--really", "--json", *given).document["versions"]
    assert gone == [1, 2, 4, 5, 6]  # 3 is tagged, and pinned
    assert "no errors" in done("verify", "s3://edits/runs/all", "--deep", *given).said
    local = str(tmp_path / "copy")
    done("split", "s3://edits/runs/all", "-o", local, "--first", 2, "--share", "copy", *given)
    assert lengths(local) == [3, 5]
    far = str(tmp_path / "far")
    assert "(s3://edits/runs/one)" in done("split", one, "-o", far, "--first", 1, *given).complaint
    assert [row["length"] for row in done("ls", far, "--json", "--base", "s3://edits/runs", *given).document] == [4]
    assert "mean nothing for the local path" in run("ls", far, *given).complaint
