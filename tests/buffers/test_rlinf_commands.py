"""``trajstore rlinf`` and ``python -m trajstore.buffers.rlinf`` as a person types them: stores, files, disks, buckets."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trajstore
from tests.buffers.test_rlinf_parity import assert_parity
from tests.s3.conftest import bucket, options, s3  # noqa: F401 - fixtures
from tests.support.rare import also_slow
from tests.support.rlinf_reference import SIMPLE, ReferenceBuffer, random_trajectory
from tests.support.s3_server import KEY, SECRET
from trajstore import cli, console
from trajstore.buffers.rlinf import TrajectoryReplayBuffer, import_directories, merge_or_split
from trajstore.cli.common import parse_options
from trajstore.errors import MissingObjectError, SchemaConflictError, SelectionError, StoreExistsError

FORMS = ["store", "pt"]


def made(count: int, *, first: int = 0, next_obs: str = "repeats") -> list[Any]:
    layout = dataclasses.replace(SIMPLE, next_obs=next_obs)
    return [random_trajectory(np.random.default_rng(n), layout, extra=n % 2) for n in range(first, first + count)]


def saved(path: str | Path, trajectories: list[Any], form: str, **given: Any) -> None:
    with TrajectoryReplayBuffer(seed=5, trajectory_format=form, **given) as buffer:
        buffer.add_trajectories(trajectories)
        buffer.save_checkpoint(path)


def assert_holds(path: str | Path, trajectories: list[Any], **given: Any) -> None:
    reference = ReferenceBuffer(seed=5)
    reference.add(trajectories)
    with TrajectoryReplayBuffer(**given) as buffer:
        buffer.load_checkpoint(path)
        assert_parity(buffer, reference)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of the last change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def but_for_pins(found: dict[str, tuple[bytes, int]]) -> dict[str, tuple[bytes, int]]:
    """Without the notes of stores that refer to these."""
    return {path: about for path, about in found.items() if Path(path).parent.name != "pins"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in this process; what it prints, or what it complains of."""
    monkeypatch.setattr(console.out, "_width", 160)

    def run(*arguments: str | Path, code: int = 0, module: bool = False) -> str:
        name = "trajstore.buffers.rlinf" if module else "trajstore"
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module(name, run_name="__main__") if module else cli.main()
        printed, complained = capsys.readouterr()
        assert (exit_.value.code or 0) == code, printed + complained
        return printed if code == 0 else " ".join(complained.split())

    return run


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Callable[[str], str], list[str]]]:
    """The URL of a name, and arguments that its storage needs."""
    if request.param == "disk":
        yield lambda name: str(tmp_path / name), []
        return
    server, bucket_name = request.getfixturevalue("s3"), request.getfixturevalue("bucket")
    pairs = [f"endpoint_url={server.url}", f"key={KEY}", f"secret={SECRET}", "client_kwargs.region_name=us-east-1"]
    yield lambda name: f"s3://{bucket_name}/{name}", [text for pair in pairs for text in ("--storage-option", pair)]


def given_by(arguments: list[str]) -> dict[str, Any]:
    return {"storage_options": parse_options(arguments[1::2])} if arguments else {}


def in_the_store(url: str | Path, **given: Any) -> str:
    with trajstore.open(url, **given) as store:
        return f" ({len(store.trajectories)} trajectories in the store)"


class TestMergeOrSplit:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("copy", [False, True])
    def test_merge_moves_nothing(self, run: Callable[..., str], tmp_path: Path, form: str, copy: bool) -> None:
        parts = [made(3), made(2, first=10), made(4, first=20)]
        for rank, part in enumerate(parts):
            saved(tmp_path / "ranks" / f"rank_{rank}", part, form)
        before = contents(tmp_path / "ranks")
        merged, flags = tmp_path / "merged", ["--copy"] if copy else []
        text = run("rlinf", "merge-or-split", "--source-path", tmp_path / "ranks", "--save-path", merged, *flags)
        assert f"9 rollouts{in_the_store(merged) if form == 'store' else ''} in" in text
        assert but_for_pins(contents(tmp_path / "ranks")) == before
        expected = [part[n] for n in range(4) for part in parts if n < len(part)]
        assert_holds(merged, expected)
        if form == "store":
            with trajstore.open(merged) as store:
                ids = store.trajectories.to_pandas()["trajectory_id"].unique().tolist()
            assert ids == list(range(9))
            assert (merged / "segments").exists() == copy
        else:
            links = {path.stat().st_nlink for path in merged.glob("trajectory_*.pt")}
            assert links == ({1} if copy else {2})
        shutil.rmtree(tmp_path / "ranks")
        if form == "store" and not copy:
            with pytest.raises(OSError, match="rank_0"):
                assert_holds(merged, expected)
        else:
            assert_holds(merged, expected)

    def test_ranks_whose_observations_repeat_and_do_not(self, run: Callable[..., str], tmp_path: Path) -> None:
        parts = [made(2), made(2, first=10, next_obs="anew")]
        for rank, part in enumerate(parts):
            saved(tmp_path / "ranks" / f"rank_{rank}", part, "store")
        merged = tmp_path / "merged"
        run("rlinf", "merge-or-split", "--source-path", tmp_path / "ranks", "--save-path", merged)
        shutil.rmtree(tmp_path / "ranks")
        assert_holds(merged, [parts[0][0], parts[1][0], parts[0][1], parts[1][1]])

    def test_the_bar_of_stores_that_are_rewritten(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        for rank, next_obs in enumerate(("repeats", "anew")):
            saved(tmp_path / "ranks" / f"rank_{rank}", made(2, first=10 * rank, next_obs=next_obs), "store")
        merge_or_split(tmp_path / "ranks", tmp_path / "merged", progress=True)
        assert "4/4" in capfd.readouterr().err

    def test_ranks_whose_fields_differ(self, tmp_path: Path) -> None:
        ranks, first, second = tmp_path / "ranks", made(2), made(2, first=10)
        for trajectory in second:
            trajectory.extra = torch.ones(trajectory.rewards.shape[:2])
            trajectory.rewards = trajectory.rewards.double()
        saved(ranks / "rank_0", first, "store")
        saved(ranks / "rank_1", second, "store")
        saved(ranks / "rank_2", [], "store")
        with pytest.raises(SchemaConflictError) as refused:
            merge_or_split(ranks, tmp_path / "merged")
        zero, one = ranks / "rank_0", ranks / "rank_1"
        assert f"'extra' is lacking in {zero}, float32 [] in {one}" in str(refused.value)
        assert f"'rewards' is float32 [] in {zero}, float64 [] in {one}" in str(refused.value)
        assert not (tmp_path / "merged").exists()
        shutil.rmtree(one)
        assert merge_or_split(ranks, tmp_path / "merged") == 2  # what holds nothing has no other fields
        assert_holds(tmp_path / "merged", first)

    @pytest.mark.parametrize(
        ("forms", "lost", "named"),
        [
            (("store", "store"), "rank_1/trajstore.json", r"rank_1 \(no whole buffer\)"),
            (("pt", "pt"), "rank_1/metadata.json", r"rank_1 \(no whole buffer\)"),
            (("pt", "pt"), "rank_1/trajectory_index.json", "rank_1.*trajectory_index.json is not there"),
            (("pt", "pt"), "rank_1", r"rank_1 \(no whole buffer\)"),
            (("store", "pt"), None, r"rank_1 \(RLinf's files\)"),
            (("pt", "store"), None, r"rank_0 \(RLinf's files\)"),
        ],
    )
    def test_no_rank_is_left_out(self, tmp_path: Path, forms: tuple[str, str], lost: str | None, named: str) -> None:
        ranks, merged = tmp_path / "ranks", tmp_path / "merged"
        for rank, form in enumerate(forms):
            saved(ranks / f"rank_{rank}", made(2), form)
        if lost == "rank_1":
            shutil.rmtree(ranks / lost)
            (ranks / lost).mkdir()
        elif lost is not None:
            (ranks / lost).unlink()
        with pytest.raises(FileNotFoundError, match=named):
            merge_or_split(ranks, merged)
        if "pt" in forms:
            with pytest.raises((FileNotFoundError, StoreExistsError), match="rank_"):
                import_directories(ranks, tmp_path / "imported")
        assert not merged.exists()
        assert not (tmp_path / "imported").exists()

    def test_no_rank_in_a_bucket_is_left_out(self) -> None:
        ranks = f"memory://{uuid.uuid4().hex}"
        for rank in range(3):
            saved(f"{ranks}/rank_{rank}", made(1), "store" if rank else "pt")
        with pytest.raises(MissingObjectError, match=r"1 of the 3 .* rank_0 \(RLinf's files\)"):
            merge_or_split(ranks, f"{ranks}_merged")

    @pytest.mark.parametrize("form", FORMS)
    def test_a_result_among_the_sources_is_refused(self, tmp_path: Path, form: str) -> None:
        ranks = tmp_path / "ranks"
        for rank in range(2):
            saved(ranks / f"rank_{rank}", made(2), form)
        before = contents(tmp_path)
        for out in (ranks, ranks / "rank_9", ranks / "rank_0" / "part"):
            with pytest.raises(SelectionError, match="would take the result for a source; choose a place beside it"):
                merge_or_split(ranks, out)
        with pytest.raises(SelectionError, match="choose a place beside it"):
            merge_or_split(ranks / "rank_0", ranks / "rank_0" / "part", split_count=1)
        assert contents(tmp_path) == before
        assert merge_or_split(ranks, ranks / "merged") == 4
        assert merge_or_split(ranks, tmp_path / "again") == 4

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("there", FORMS)
    def test_nothing_is_replaced(self, tmp_path: Path, form: str, there: str) -> None:
        saved(tmp_path / "source", made(2), form)
        saved(tmp_path / "there", made(1), there)
        before = contents(tmp_path)
        with pytest.raises(StoreExistsError, match=r"there.* nothing is replaced; choose another save_path"):
            merge_or_split(tmp_path / "source", tmp_path / "there")
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("copy", [False, True])
    def test_split_moves_nothing(self, run: Callable[..., str], tmp_path: Path, form: str, copy: bool) -> None:
        trajectories = made(5)
        saved(tmp_path / "buffer", trajectories, form)
        before = contents(tmp_path / "buffer")
        paths = ["--source-path", tmp_path / "buffer", "--save-path", tmp_path / "split"]
        flags = ["--copy"] if copy else []
        assert "3 rollouts" in run("rlinf", "merge-or-split", *paths, "--split-count", "3", *flags)
        assert but_for_pins(contents(tmp_path / "buffer")) == before
        assert_holds(tmp_path / "split", trajectories[:3])
        if form == "store":
            assert (tmp_path / "split" / "segments").exists() == copy
        if copy:
            shutil.rmtree(tmp_path / "buffer")
            assert_holds(tmp_path / "split", trajectories[:3])

    @pytest.mark.parametrize("form", also_slow(FORMS, ["store"]))
    def test_anywhere(
        self, run: Callable[..., str], place: tuple[Callable[[str], str], list[str]], tmp_path: Path, form: str
    ) -> None:
        url, arguments = place
        parts = [made(2), made(2, first=10)]
        for rank, part in enumerate(parts):
            saved(url(f"ranks/rank_{rank}"), part, form, **given_by(arguments))
        expected = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
        for name, flags in (("merged", []), ("copied", ["--copy"])):
            paths = ["--source-path", url("ranks"), "--save-path", url(name)]
            run("rlinf", "merge-or-split", *paths, *flags, *arguments)
            assert_holds(url(name), expected, **given_by(arguments))
        paths = ["--source-path", url("merged"), "--save-path", str(tmp_path / "split"), "--split-count", "3", "--copy"]
        run("rlinf", "merge-or-split", *paths, *arguments)
        assert_holds(tmp_path / "split", expected[:3])

    @pytest.mark.parametrize("form", FORMS)
    def test_what_cannot_be(self, run: Callable[..., str], tmp_path: Path, form: str) -> None:
        for rank in range(2):
            saved(tmp_path / "ranks" / f"rank_{rank}", made(2), form)

        def complaint(source: str, target: str, *flags: str) -> str:
            paths = ["--source-path", tmp_path / source, "--save-path", tmp_path / target]
            text = run("rlinf", "merge-or-split", *paths, *flags, code=1)
            assert text.startswith("error: ")
            return text

        assert "2" in complaint("ranks/rank_0", "out", "--split-count", "3")
        assert re.search("split|rank", complaint("ranks", "out", "--split-count", "1"))
        assert "nothing" in complaint("nothing", "out")
        before = contents(tmp_path)
        assert "rank_1" in complaint("ranks/rank_0", "ranks/rank_1")
        assert contents(tmp_path) == before
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.*"))

    def test_the_help_says_that_nothing_is_moved(self, run: Callable[..., str]) -> None:
        text = " ".join(run("rlinf", "merge-or-split", "--help").replace("│", " ").split())
        assert "nothing is ever moved" in text
        assert "refers to the source, which must stay" in text


class TestImportAndExport:
    @pytest.mark.parametrize("form", also_slow(["pt", "pkl"], ["pt"]))
    def test_there_and_back(
        self, run: Callable[..., str], place: tuple[Callable[[str], str], list[str]], tmp_path: Path, form: str
    ) -> None:
        url, arguments = place
        trajectories = made(4)
        reference = ReferenceBuffer(seed=5)
        reference.add(trajectories)
        reference.save(tmp_path / "theirs", form)
        trust = ["--allow-pickle"] if form == "pkl" else []
        text = run("rlinf", "import", tmp_path / "theirs", url("store"), *trust, *arguments)
        told = in_the_store(url("store"), **given_by(arguments))
        assert f"4 rollouts{told} in" in text
        assert_holds(url("store"), trajectories, **given_by(arguments))
        for target in (url("files"), str(tmp_path / "local")):
            text = run("rlinf", "export", url("store"), target, "--format", form, *arguments)
            assert f"4 rollouts{told}, 48 samples" in text
            assert_holds(target, trajectories, allow_pickle=True, **given_by(arguments))
        run("rlinf", "import", url("files"), tmp_path / "again", *trust, *arguments)
        assert_holds(tmp_path / "again", trajectories)
        loaded = ReferenceBuffer()
        loaded.load(tmp_path / "local")
        assert (loaded.seed, loaded.counter, loaded.total_samples) == (5, 4, 48)

    def test_ranks_become_one_store(self, run: Callable[..., str], tmp_path: Path) -> None:
        for rank in range(2):
            saved(tmp_path / "ranks" / f"rank_{rank}", made(2, first=10 * rank), "pt")
        run("rlinf", "import", tmp_path / "ranks", tmp_path / "store")
        zero, ten, one, eleven = *made(1), *made(1, first=10), *made(1, first=1), *made(1, first=11)
        assert_holds(tmp_path / "store", [zero, ten, one, eleven])

    def test_what_cannot_be(self, run: Callable[..., str], tmp_path: Path) -> None:
        saved(tmp_path / "files", made(2), "pkl")
        assert "--allow-pickle" in run("rlinf", "import", tmp_path / "files", tmp_path / "store", code=1)
        assert "nothing" in run("rlinf", "import", tmp_path / "nothing", tmp_path / "store", code=1)
        saved(tmp_path / "full", made(1), "store")
        again = ("rlinf", "import", tmp_path / "files", tmp_path / "full", "--allow-pickle")
        assert "full" in run(*again, code=1)
        assert_holds(tmp_path / "full", made(1))
        assert "pt" in run("rlinf", "export", tmp_path / "full", tmp_path / "out", "--format", "npz", code=1)
        before = contents(tmp_path / "files")
        assert "files" in run("rlinf", "export", tmp_path / "full", tmp_path / "files", code=1)
        assert contents(tmp_path / "files") == before
        run("rlinf", "export", tmp_path / "full", tmp_path / "files", "--overwrite")
        assert_holds(tmp_path / "files", made(1))
        with trajstore.open(tmp_path / "other", "x") as store:
            store.append({"a": [1, 2]})
        assert "trajectory_id" in run("rlinf", "export", tmp_path / "other", tmp_path / "out2", code=1)

    def test_a_store_that_refers_elsewhere_is_exported(self, run: Callable[..., str], tmp_path: Path) -> None:
        saved(tmp_path / "ranks" / "rank_0", made(2), "store")
        merge_or_split(tmp_path / "ranks", tmp_path / "elsewhere" / "merged")
        export = ("rlinf", "export", tmp_path / "elsewhere" / "merged", tmp_path / "files")
        assert "--base" in run(*export, code=1)
        run(*export, "--base", tmp_path / "ranks")
        assert_holds(tmp_path / "files", made(2))

    def test_a_store_that_is_refused_halfway_is_not_left_behind(self, run: Callable[..., str], tmp_path: Path) -> None:
        saved(tmp_path / "files", made(3), "pt")
        path = tmp_path / "files" / "trajectory_1_weights.pt"
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])
        assert "trajectory_1_weights" in run("rlinf", "import", tmp_path / "files", tmp_path / "store", code=1)
        path.write_bytes(whole)
        run("rlinf", "import", tmp_path / "files", tmp_path / "store")
        assert_holds(tmp_path / "store", made(3))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # when doctests have imported it here
class TestSampleModule:
    @pytest.mark.parametrize("form", ["store", "pt", "pkl"])
    def test_keys_and_shapes(self, run: Callable[..., str], tmp_path: Path, form: str) -> None:
        saved(tmp_path / "c", made(4), form)
        before = contents(tmp_path / "c")
        trust = ["--allow-pickle"] if form == "pkl" else []
        chosen = ["--num-chunks", "40", "--cache-size", "2", "--sample-window-size", "0", "--no-cache"]
        text = run("--load-path", tmp_path / "c", *chosen, *trust, module=True)
        assert "4 trajectories, 48 samples" in text
        for line in (r"curr_obs/main_images .*\[40, 4, 4, 3\] .*uint8", r"rewards .*\[40\] .*float32"):
            assert re.search(line, text), text
        text = run("--load-path", tmp_path / "c", "--sample-window-size", "1", *trust, module=True)
        assert re.search(r"rewards .*\[12\]", text)  # 1024 are asked for, 12 are there
        assert contents(tmp_path / "c") == before

    def test_a_bucket(
        self,
        run: Callable[..., str],
        s3: Any,  # noqa: F811
        bucket: str,  # noqa: F811
        options: dict[str, Any],  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        saved(f"s3://{bucket}/c", made(2), "store", storage_options=options)
        for name, value in {
            "AWS_ENDPOINT_URL": s3.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setitem(os.environ, name, value)
        assert "2 trajectories" in run("--load-path", f"s3://{bucket}/c", module=True)

    def test_what_cannot_be(self, run: Callable[..., str], tmp_path: Path) -> None:
        assert "nothing" in run("--load-path", tmp_path / "nothing", module=True, code=1)
        saved(tmp_path / "c", made(1), "pkl")
        assert "--allow-pickle" in run("--load-path", tmp_path / "c", module=True, code=1)
        saved(tmp_path / "empty", [], "store")
        assert "empty buffer" in run("--load-path", tmp_path / "empty", module=True, code=1)
