"""Directories of RLinf's files: what is written is what plain torch.save and json give, and all of it is read back."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.rare import examples
from tests.support.rlinf_reference import (
    DONE_FIELDS,
    ReferenceBuffer,
    assert_same,
    fields,
    layouts,
    random_trajectory,
    trajectories,
    with_attributes,
)
from tests.support.s3_server import S3Server
from trajstore.errors import (
    ClosedError,
    ColumnShapeError,
    ColumnTypeError,
    CorruptionError,
    MetadataError,
    MissingObjectError,
    SchemaConflictError,
    SelectionError,
    StoreExistsError,
    StoreNotFoundError,
    TrajstoreError,
    UntrustedPickleError,
)
from trajstore.interop.rlinf_files import (
    RlinfDirectory,
    RlinfWriter,
    is_rlinf_directory,
    merge_directories,
    open_directories,
    plan_merge,
    plan_split,
    split_directory,
    write_directory,
)
from trajstore.interop.rlinf_files.trajectory_file import decode, encode

FORMATS = ["pt", "pkl"]


def made(count: int, *, seed: int = 0, extra: int = 0, **options: Any) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [random_trajectory(rng, T=4 + number % 2 * 2, extra=extra, **options) for number in range(count)]


def saved(folder: Path, count: int = 5, *, seed: int = 0, **options: Any) -> ReferenceBuffer:
    """A directory that RLinf might have written."""
    buffer = ReferenceBuffer(seed=77)
    buffer.add(made(count, seed=seed))
    buffer.save(folder, **options)
    return buffer


def assert_holds(directory: RlinfDirectory, expected: list[tuple[int, Any]], **options: Any) -> None:
    found = list(directory.trajectories(allow_pickle=True, **options))
    assert [number for number, _, _ in found] == [number for number, _ in expected]
    for (number, entry, read), (_, trajectory) in zip(found, expected, strict=True):
        assert entry.trajectory_id == number
        assert entry.model_weights_id == trajectory.model_weights_id
        assert entry.max_episode_length == trajectory.max_episode_length
        assert_same(read, fields(trajectory))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3 server on loopback."""
    with S3Server() as server:
        yield server


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Arguments that name a folder: url, and storage_options where they are needed."""
    if request.param == "disk":
        yield lambda name: {"url": tmp_path / name}
    elif request.param == "memory":
        yield lambda name: {"url": f"memory://{tmp_path}/{name}"}
        fsspec.filesystem("memory").store.clear()
    else:
        server: S3Server = request.getfixturevalue("server")
        bucket = f"bucket-{uuid.uuid4().hex}"
        server.make_bucket(bucket)
        yield lambda name: {"url": f"s3://{bucket}/{name}", "storage_options": server.storage_options()}


class TestWrittenAndRead:
    @pytest.mark.parametrize("trajectory_format", FORMATS)
    def test_everywhere(self, place: Callable[[str], dict[str, Any]], trajectory_format: str) -> None:
        expected = list(zip([3, 0, 7], made(3, extra=2), strict=True))
        where = place("runs/a")
        assert not is_rlinf_directory(**where)
        metadata = write_directory(
            **where, trajectories=[(n, fields(t)) for n, t in expected], trajectory_format=trajectory_format, seed=5
        )
        assert is_rlinf_directory(**where)
        with RlinfDirectory(**where) as directory:
            assert directory.metadata == metadata
            assert (metadata.size, metadata.trajectory_counter, metadata.seed) == (3, 8, 5)
            assert len(directory) == 3
            assert directory.ids == [3, 0, 7]
            assert directory.total_samples == metadata.total_samples == 2 * (4 + 6 + 4)
            assert_holds(directory, expected)
            assert_holds(directory, [expected[2], expected[0]], ids=[7, 3])
            assert_holds(directory, [], ids=[])

    @settings(deadline=None, max_examples=examples(60), suppress_health_check=list(HealthCheck))
    @given(data=st.data(), trajectory_format=st.sampled_from(FORMATS))
    def test_any_trajectory(self, data: st.DataObject, trajectory_format: str) -> None:
        layout = data.draw(layouts())
        expected = list(enumerate(data.draw(trajectories(layout))))
        url = "memory://rlinf-any"
        write_directory(url, [(n, fields(t)) for n, t in expected], trajectory_format=trajectory_format, overwrite=True)
        with RlinfDirectory(url) as directory:
            assert_holds(directory, expected)
        fsspec.filesystem("memory").rm("/rlinf-any", recursive=True)

    @pytest.mark.parametrize("trajectory_format", FORMATS)
    def test_the_files_are_those_of_plain_torch_and_json(self, tmp_path: Path, trajectory_format: str) -> None:
        reference = saved(tmp_path / "theirs", trajectory_format=trajectory_format)
        pairs = [(n, fields(t)) for n, t in reference.trajectories]
        write_directory(tmp_path / "ours", pairs, trajectory_format=trajectory_format, seed=77)
        names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
        assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
        for name in names:
            ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
            if name.endswith(".pt"):  # byte for byte, but for the name that torch gives the archive: that of its file
                plain = io.BytesIO()
                torch.save(torch.load(theirs, weights_only=True), plain)
                assert ours.read_bytes() == plain.getvalue()
                assert_same(torch.load(ours, weights_only=True), torch.load(theirs, weights_only=True))
            else:
                assert ours.read_bytes() == theirs.read_bytes()

    def test_rlinf_could_load_them(self, tmp_path: Path) -> None:
        expected = list(enumerate(made(4, extra=1)))
        write_directory(tmp_path, [(n, fields(t)) for n, t in expected], seed=3, trajectory_counter=9)
        loaded = ReferenceBuffer()
        loaded.load(tmp_path)
        assert (loaded.counter, loaded.seed, len(loaded)) == (9, 3, 4)
        for (_, found), (_, trajectory) in zip(loaded.trajectories, expected, strict=True):
            assert_same(fields(found), fields(trajectory))

    def test_dropped_first_rows_of_dones_survive(self, tmp_path: Path) -> None:
        trajectory = made(1, extra=2)[0]
        write_directory(tmp_path, [(0, fields(trajectory))])
        with RlinfDirectory(tmp_path) as directory:
            _, _, read = next(directory.trajectories())
        for name in DONE_FIELDS:
            assert read[name].shape == (6, 2)
            assert_same(read[name], getattr(trajectory, name))

    def test_a_view_takes_no_more_space_than_its_own_and_shares_none(self, tmp_path: Path) -> None:
        large = torch.zeros(1000, 1000)
        row = large[:4, :2]
        trajectory = {"rewards": row, "actions": row, "curr_obs": {"x": row.t().reshape(4, 2), "y": large[3:7, 5:7]}}
        assert len(encode(trajectory, "pt")) < 5000
        read = decode(bytes(encode(trajectory, "pt")), "pt", where="it", allow_pickle=False)
        assert_same(read, trajectory)
        read["rewards"].fill_(1)
        assert read["actions"].sum() == 0

    def test_further_fields_and_names_with_slashes(self, tmp_path: Path) -> None:
        trajectory = with_attributes(
            made(1)[0], task="pick", attempt=3, nothing=None, more={"a": {"b": [1, "x"]}, "t": True}
        )
        trajectory.curr_obs = {"observation/image": torch.zeros(4, 2, 3), "a.b": torch.ones(4, 2)}
        write_directory(tmp_path, [(0, fields(trajectory))])
        with RlinfDirectory(tmp_path) as directory:
            assert_holds(directory, [(0, trajectory)])

    def test_more_files_than_are_read_together(self, tmp_path: Path) -> None:
        expected = [(n, random_trajectory(np.random.default_rng(n), T=1, B=1)) for n in range(70)]
        write_directory(tmp_path, ((n, fields(t)) for n, t in expected))
        with RlinfDirectory(tmp_path) as directory:
            assert_holds(directory, expected)

    def test_with_progress(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        expected = list(enumerate(made(3)))
        write_directory(tmp_path / "a", [(n, fields(t)) for n, t in expected], total=3, progress=True)
        with RlinfDirectory(tmp_path / "a") as directory:
            assert_holds(directory, expected, progress=True)
        split_directory(tmp_path / "a", tmp_path / "b", 2, progress=True)
        written = capfd.readouterr()
        assert written.out == ""
        for what in ("writing", "reading", "copying", "3/3", "2/2"):
            assert what in written.err


class TestOtherFormsOfADirectory:
    @pytest.mark.parametrize("trajectory_format", FORMATS)
    @pytest.mark.parametrize("misspelt", [False, True])
    @pytest.mark.parametrize("update_count", [None, 12])
    def test_older_keys_misspelt_index_longer_names(
        self, tmp_path: Path, trajectory_format: str, misspelt: bool, update_count: int | None
    ) -> None:
        reference = saved(
            tmp_path, trajectory_format=trajectory_format, older=True, misspelt=misspelt, update_count=update_count
        )
        assert is_rlinf_directory(tmp_path)
        with RlinfDirectory(tmp_path) as directory:
            assert directory.metadata.trajectory_format == trajectory_format
            assert directory.metadata.seed == 77
            assert_holds(directory, reference.trajectories)

    def test_the_trajectories_of_the_first_generation_may_be_elsewhere(self, tmp_path: Path) -> None:
        reference = saved(tmp_path / "storage", older=True)
        (tmp_path / "checkpoint").mkdir()
        for name in ("metadata.json", "trajectory_index.json"):
            shutil.copy(tmp_path / "storage" / name, tmp_path / "checkpoint" / name)
        with RlinfDirectory(tmp_path / "checkpoint") as directory:
            assert_holds(directory, reference.trajectories)

    def test_no_seed_and_no_format(self, tmp_path: Path) -> None:
        reference = saved(tmp_path)
        document = json.loads((tmp_path / "metadata.json").read_text())
        del document["seed"], document["trajectory_format"]
        (tmp_path / "metadata.json").write_text(json.dumps(document))
        with RlinfDirectory(tmp_path) as directory:
            assert directory.metadata.seed is None
            assert_holds(directory, reference.trajectories)

    def test_the_exact_name_wins_over_longer_ones(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, 2)
        (tmp_path / "trajectory_0_weights_5.pt").write_bytes(b"of another save")
        (tmp_path / "trajectory_0_other.pt").write_bytes(b"of another save")
        with RlinfDirectory(tmp_path) as directory:
            assert_holds(directory, reference.trajectories)

    def test_several_files_that_could_be_it(self, tmp_path: Path) -> None:
        saved(tmp_path, 2, update_count=1)
        shutil.copy(tmp_path / "trajectory_0_weights_1.pt", tmp_path / "trajectory_0_weights_2.pt")
        with pytest.raises(CorruptionError, match=r"2 files that could be it: trajectory_0_weights_1\.pt"):
            RlinfDirectory(tmp_path)

    def test_number_ten_is_not_one(self, tmp_path: Path) -> None:
        reference = saved(tmp_path, 11, update_count=1)
        with RlinfDirectory(tmp_path) as directory:
            assert_holds(directory, reference.trajectories)


class TestWhatIsWrong:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"metadata\.json is not there"):
            RlinfDirectory(tmp_path / "none")
        saved(tmp_path)
        (tmp_path / "trajectory_index.json").unlink()
        with pytest.raises(StoreNotFoundError, match=r"trajectory_index\.json is not there"):
            RlinfDirectory(tmp_path)
        assert not is_rlinf_directory(tmp_path)
        with pytest.raises(StoreNotFoundError, match="nor a folder rank_"):
            open_directories(tmp_path / "none")

    def test_an_index_that_names_files_that_are_not_there(self, tmp_path: Path) -> None:
        saved(tmp_path)
        for number in (1, 3):
            (tmp_path / f"trajectory_{number}_weights.pt").unlink()
        with pytest.raises(MissingObjectError, match=r"2 of 5 .* trajectory_1_weights\.pt, trajectory_3_weights\.pt"):
            RlinfDirectory(tmp_path)

    def test_a_file_that_goes_while_it_is_read(self, tmp_path: Path) -> None:
        saved(tmp_path)
        with RlinfDirectory(tmp_path) as directory:
            (tmp_path / "trajectory_2_weights.pt").unlink()
            with pytest.raises(MissingObjectError, match=r"trajectory_2_weights\.pt"):
                list(directory.trajectories())

    @pytest.mark.parametrize(
        ("name", "change", "match"),
        [
            ("metadata.json", "{", "metadata.json .* is not JSON"),
            ("metadata.json", "[]", "holds a list"),
            ("metadata.json", {"trajectory_format": "npz"}, "'npz'"),
            ("metadata.json", {"size": "many"}, "size is 'many'"),
            ("metadata.json", {"trajectory_counter": -1}, "trajectory_counter is -1"),
            ("metadata.json", {"seed": 1.5}, "seed is 1.5"),
            ("trajectory_index.json", "", "trajectory_index.json .* is not JSON"),
            ("trajectory_index.json", {"trajectory_index": []}, "expected 'trajectory_index'"),
            ("trajectory_index.json", {"trajectory_id_list": [0, 9]}, "no entry for trajectory 9"),
            ("trajectory_index.json", {"trajectory_id_list": [0, 0]}, "a trajectory twice"),
            ("trajectory_index.json", {"trajectory_id_list": ["a"]}, "'a'"),
        ],
    )
    def test_documents(self, tmp_path: Path, name: str, change: Any, match: str) -> None:
        saved(tmp_path)
        path = tmp_path / name
        path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(CorruptionError, match=match):
            RlinfDirectory(tmp_path)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"shape": [4]}, "shape"),
            ({"shape": None}, "shape"),
            ({"num_samples": 9}, r"num_samples 9 is not T \* B"),
            ({"max_episode_length": "x"}, "max_episode_length"),
        ],
    )
    def test_entries(self, tmp_path: Path, change: dict[str, Any], match: str) -> None:
        saved(tmp_path)
        path = tmp_path / "trajectory_index.json"
        document = json.loads(path.read_text())
        document["trajectory_index"]["2"].update(change)
        path.write_text(json.dumps(document))
        with pytest.raises(CorruptionError, match=f"trajectory 2.*{match}"):
            RlinfDirectory(tmp_path)

    @pytest.mark.parametrize("damage", [b"", b"hello world", b"PK\x03\x04", None])
    def test_a_corrupt_trajectory(self, tmp_path: Path, damage: bytes | None) -> None:
        saved(tmp_path)
        path = tmp_path / "trajectory_3_weights.pt"
        path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
        with RlinfDirectory(tmp_path) as directory:
            read = directory.trajectories()
            assert [next(read)[0] for _ in range(3)] == [0, 1, 2]
            with pytest.raises(TrajstoreError, match=r"trajectory_3_weights\.pt in .* restore it from a copy"):
                next(read)

    def test_any_flipped_byte_is_found_or_changes_nothing(self) -> None:
        expected = {"rewards": torch.arange(12.0).reshape(4, 3), "task": "pick", "n": 3}
        data = bytes(encode(expected, "pt"))
        found = 0
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            try:
                read = decode(bytes(damaged), "pt", where="file.pt", allow_pickle=False)
            except TrajstoreError as error:
                found += "file.pt" in str(error)
            else:
                assert_same(read, expected)
        assert found > 200

    def test_archives_without_checksums_are_read(self) -> None:
        torch.serialization.set_crc32_options(False)
        try:
            data = bytes(encode({"rewards": torch.ones(2, 2)}, "pt"))
        finally:
            torch.serialization.set_crc32_options(True)
        assert_same(decode(data, "pt", where="it", allow_pickle=False), {"rewards": torch.ones(2, 2)})

    def test_files_of_another_save(self, tmp_path: Path) -> None:
        saved(tmp_path)
        other = fields(random_trajectory(np.random.default_rng(0), T=9))
        (tmp_path / "trajectory_1_weights.pt").write_bytes(encode(other, "pt"))
        with RlinfDirectory(tmp_path) as directory, pytest.raises(CorruptionError, match=r"\[9, 2\].*\[6, 2\]"):
            list(directory.trajectories())

    def test_pickles_are_refused_before_anything_is_read(self, tmp_path: Path) -> None:
        saved(tmp_path, trajectory_format="pkl")
        touched = tmp_path / "touched"
        path = tmp_path / "trajectory_0_weights.pkl"
        path.write_bytes(pickle.dumps(Touch(str(touched))))
        with RlinfDirectory(tmp_path) as directory:
            with pytest.raises(UntrustedPickleError, match=r"trajectory_0_weights\.pkl.*allow_pickle=True"):
                directory.trajectories()
            with pytest.raises(PermissionError):
                directory.trajectories(ids=[4])
            assert not touched.exists()
            assert len(list(directory.trajectories(ids=[1, 2], allow_pickle=True))) == 2

    def test_a_pt_file_is_never_unpickled(self, tmp_path: Path) -> None:
        saved(tmp_path)
        touched = tmp_path / "touched"
        torch.save({"rewards": torch.ones(4, 2), "it": Touch(str(touched))}, tmp_path / "trajectory_0_weights.pt")
        with (
            RlinfDirectory(tmp_path) as directory,
            pytest.raises(UntrustedPickleError, match=r"trajectory_0_weights\.pt"),
        ):
            list(directory.trajectories(allow_pickle=True))
        assert not touched.exists()

    def test_a_damaged_pickle(self, tmp_path: Path) -> None:
        saved(tmp_path, trajectory_format="pkl")
        (tmp_path / "trajectory_0_weights.pkl").write_bytes(b"\x80\x04garbage")
        with RlinfDirectory(tmp_path) as directory, pytest.raises(CorruptionError, match=r"trajectory_0_weights\.pkl"):
            list(directory.trajectories(allow_pickle=True))

    @pytest.mark.parametrize("content", [[1, 2], {"rewards": np.ones((4, 2))}, {"x": {1: torch.ones(1)}}])
    def test_things_that_no_trajectory_has(self, content: Any) -> None:
        with pytest.raises(ColumnTypeError, match=r"it\.pkl"):
            decode(pickle.dumps(content), "pkl", where="it.pkl", allow_pickle=True)

    def test_ids_that_are_not_there(self, tmp_path: Path) -> None:
        saved(tmp_path)
        with RlinfDirectory(tmp_path) as directory, pytest.raises(SelectionError, match=r"no trajectory 5.*\[0, 4\]"):
            directory.trajectories(ids=[0, 5])


class Touch:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


class TestWriting:
    def test_a_place_that_is_taken(self, tmp_path: Path) -> None:
        saved(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(StoreExistsError, match="overwrite=True"):
            RlinfWriter(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        (tmp_path / "trajectory_notes.txt").touch()
        for count in (5, 3):
            expected = list(enumerate(made(count, seed=9)))
            write_directory(tmp_path, [(n, fields(t)) for n, t in expected], overwrite=True)
            with RlinfDirectory(tmp_path) as directory:
                assert_holds(directory, expected)
            assert len(list(tmp_path.glob("trajectory_*.pt"))) == count, "those of another buffer are gone"
        assert (tmp_path / "trajectory_notes.txt").exists()

    def test_a_block_that_fails_leaves_no_index(self, tmp_path: Path) -> None:
        with contextlib.suppress(KeyError), RlinfWriter(tmp_path) as writer:
            writer.add(0, fields(made(1)[0]))
            raise KeyError
        assert list(tmp_path.glob("*.json")) == []
        assert not is_rlinf_directory(tmp_path)
        with pytest.raises(ColumnShapeError):
            write_directory(tmp_path, [(0, fields(made(1)[0])), (1, {"actions": torch.ones(2, 2)})])
        assert not is_rlinf_directory(tmp_path)

    def test_the_index_comes_after_all_trajectories(self, tmp_path: Path) -> None:
        with RlinfWriter(tmp_path) as writer:
            for number in range(40):
                writer.add(number, {"rewards": torch.ones(2, 2)})
                assert not list(tmp_path.glob("*.json"))
        assert len(list(tmp_path.glob("*.pt"))) == 40
        with pytest.raises(ClosedError):
            writer.add(40, {"rewards": torch.ones(2, 2)})
        with pytest.raises(ClosedError):
            writer.finish()

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        assert write_directory(tmp_path, []).trajectory_counter == 0
        with RlinfDirectory(tmp_path) as directory:
            assert_holds(directory, [])

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"rewards": None}, ColumnShapeError, "neither prev_logprobs nor rewards"),
            ({"rewards": torch.ones(4)}, ColumnShapeError, r"\[4\]"),
            ({"rewards": torch.ones(0, 4)}, ColumnShapeError, r"\[0, 4\]"),
            ({"rewards": [[1.0]]}, ColumnTypeError, "list"),
            ({"model_weights_id": "../../x"}, MetadataError, "slashes"),
            ({"max_episode_length": 1.5}, MetadataError, "float"),
            ({"actions": np.ones((4, 2))}, ColumnTypeError, "actions.*ndarray"),
            ({"curr_obs": {"a": {"b": object()}}}, ColumnTypeError, "curr_obs/a/b.*object"),
        ],
    )
    def test_what_rlinf_could_not_read(
        self, tmp_path: Path, change: dict[str, Any], error: type[TrajstoreError], match: str
    ) -> None:
        with RlinfWriter(tmp_path) as writer:
            with pytest.raises(error, match=match):
                writer.add(0, {"rewards": torch.ones(4, 2), **change})
            writer.add(1, {"rewards": torch.ones(4, 2)})
            with pytest.raises(SelectionError, match="trajectory 1 was written before"):
                writer.add(1, {"rewards": torch.ones(4, 2)})
        with RlinfDirectory(tmp_path) as directory:
            assert directory.ids == [1]

    def test_formats_are_two(self, tmp_path: Path) -> None:
        with pytest.raises(SelectionError, match="'npz'"):
            RlinfWriter(tmp_path, trajectory_format="npz")


class TestMergeAndSplit:
    @settings(max_examples=examples(200), deadline=None)
    @given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), min_size=1, max_size=5))
    def test_the_plan_walks_ids_and_then_ranks(self, ids: list[list[int]]) -> None:
        expected = [
            (rank, number) for number in range(13) for rank, numbers in enumerate(ids) for n in numbers if n == number
        ]
        assert plan_merge(ids) == expected

    @pytest.mark.parametrize("trajectory_format", FORMATS)
    def test_ranks(self, place: Callable[[str], dict[str, Any]], tmp_path: Path, trajectory_format: str) -> None:
        ranks = {}
        for name, ids in {"rank_0": [0, 1, 2], "rank_10": [0, 2, 3], "rank_2": [2, 0]}.items():
            ranks[name] = dict(zip(ids, made(3, seed=len(ranks)), strict=False))
            pairs = [(n, fields(t)) for n, t in ranks[name].items()]
            write_directory(
                **place(f"runs/{name}"), trajectories=pairs, trajectory_format=trajectory_format, seed=len(ranks)
            )
        # By name: rank_10 comes before rank_2.
        expected = [
            ranks[name][number]
            for number in range(4)
            for name in ("rank_0", "rank_10", "rank_2")
            if number in ranks[name]
        ]
        source, target = place("runs"), place("merged")
        metadata = merge_directories(
            source["url"],
            target["url"],
            storage_options=source.get("storage_options"),
            save_storage_options=target.get("storage_options"),
        )
        assert (metadata.size, metadata.trajectory_counter, metadata.seed) == (8, 8, 1)
        with RlinfDirectory(**target) as directory:
            assert_holds(directory, list(enumerate(expected)))

    @pytest.mark.parametrize("link", [False, True])
    def test_files_are_shared_only_where_it_was_said(self, tmp_path: Path, link: bool) -> None:
        reference = saved(tmp_path / "rank_0", 3)
        merge_directories(tmp_path, tmp_path / "merged", link=link)
        split_directory(tmp_path / "rank_0", tmp_path / "split", 2, link=link)
        for result, count in (("merged", 3), ("split", 2)):
            with RlinfDirectory(tmp_path / result) as directory:
                assert_holds(directory, reference.trajectories[:count])
            for path in (tmp_path / result).glob("*.pt"):
                assert path.samefile(tmp_path / "rank_0" / path.name) == link

    def test_one_directory_is_numbered_anew(self, tmp_path: Path) -> None:
        pairs = list(zip([5, 3, 9], made(3), strict=True))
        write_directory(tmp_path / "a", [(n, fields(t)) for n, t in pairs])
        merge_directories(tmp_path / "a", tmp_path / "b")
        with RlinfDirectory(tmp_path / "b") as directory:
            assert_holds(directory, [(0, pairs[1][1]), (1, pairs[0][1]), (2, pairs[2][1])])

    def test_ranks_of_two_formats(self, tmp_path: Path) -> None:
        saved(tmp_path / "rank_0")
        saved(tmp_path / "rank_1", trajectory_format="pkl")
        with pytest.raises(SchemaConflictError, match=r"rank_0.*rank_1"):
            merge_directories(tmp_path, tmp_path / "merged")

    def test_split_keeps_the_first_of_the_list(self, place: Callable[[str], dict[str, Any]]) -> None:
        pairs = list(zip([5, 3, 9, 0], made(4), strict=True))
        source, target = place("all"), place("few")
        write_directory(**source, trajectories=[(n, fields(t)) for n, t in pairs], seed=11)
        options = {
            "storage_options": source.get("storage_options"),
            "save_storage_options": target.get("storage_options"),
        }
        metadata = split_directory(source["url"], target["url"], 3, **options)
        assert (metadata.size, metadata.trajectory_counter, metadata.seed) == (3, 3, 11)
        with RlinfDirectory(**target) as directory:
            assert_holds(directory, [(0, pairs[0][1]), (1, pairs[1][1]), (2, pairs[2][1])])
        with RlinfDirectory(**source) as directory:  # nothing was moved
            assert_holds(directory, pairs)
        for count in (5, 0, -1):
            with pytest.raises(SelectionError, match="has 4 trajectories"):
                split_directory(
                    source["url"], place("other")["url"], count, storage_options=source.get("storage_options")
                )

    def test_plan_of_a_split(self) -> None:
        assert plan_split([4, 1, 2], 3) == [4, 1, 2]
        with pytest.raises(SelectionError):
            plan_split([], 1)
