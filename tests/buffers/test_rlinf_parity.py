"""Batches of ``TrajectoryReplayBuffer`` are those of the plain reference, bit for bit, whatever happened before."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.rare import also_slow, examples
from tests.support.rlinf_reference import (
    SIMPLE,
    PlainTrajectory,
    ReferenceBuffer,
    assert_same,
    fields,
    layouts,
    random_trajectory,
    trajectories,
    with_attributes,
)
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer
from trajstore.errors import SelectionError

FEW = settings(max_examples=examples(20), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FORMATS = ["store", "pt", "pkl"]
# Keywords of both generations; what they keep differs, what they sample does not.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "first": {"storage_dir": "{}/run", "storage_format": "pt", "save_trajectories": True},
    "first, temporary": {"storage_dir": "", "storage_format": "pkl"},
    "first, in memory": {"save_trajectories": False},
    "second": {"auto_save": True, "auto_save_path": "{}/run", "trajectory_format": "pt"},
    "second, not saved": {"auto_save": False, "auto_save_path": ""},
    "without cache": {"auto_save": True, "auto_save_path": "{}/run", "enable_cache": False, "cache_size": 1},
    "small cache": {"storage_dir": "{}/run", "cache_bytes": 1 << 18, "cache_size": 2},
}
SIZES = (1, 7, 50, 10_000)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A fresh one, for each example of hypothesis."""
    with tempfile.TemporaryDirectory(prefix="parity") as path:
        yield Path(path)


def buffer_of(kind: str, place: Path, **options: Any) -> TrajectoryReplayBuffer:
    options = {**{k: v.format(place) if isinstance(v, str) else v for k, v in KINDS[kind].items()}, **options}
    return TrajectoryReplayBuffer(allow_pickle=True, **options)


def assert_parity(buffer: TrajectoryReplayBuffer, reference: ReferenceBuffer, *, counts: bool = True) -> None:
    """What they hold, and the batches that come next."""
    if counts:
        assert len(buffer) == buffer.size == len(reference)
        assert buffer.total_samples == reference.total_samples
        stats = buffer.get_stats()
        assert set(stats) == {"num_trajectories", "total_samples", "cache_size"}
        assert (stats["num_trajectories"], stats["total_samples"]) == (len(reference), reference.total_samples)
        assert 0 <= stats["cache_size"] <= len(reference)
        for size in (0, len(reference), len(reference) + 1):
            assert buffer.is_ready(size) is asyncio.run(buffer.is_ready_async(size)) is reference.is_ready(size)
    if not len(reference):
        for sample in (buffer.sample, buffer.sample_chunks):
            with pytest.raises(RuntimeError):
                sample(1)
        return
    for size, sample in zip(SIZES, itertools.cycle([buffer.sample, buffer.sample_chunks]), strict=False):
        assert_same(sample(num_chunks=size), reference.sample(size))


class TestSampling:
    @settings(FEW, max_examples=examples(40))
    @given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), window=st.sampled_from([0, 1, 2, 3, 100]))
    def test_batches(self, data: st.DataObject, kind: str, window: int) -> None:
        layout = data.draw(layouts())
        seed = data.draw(st.integers(0, 2**31))
        reference = ReferenceBuffer(seed=seed, sample_window_size=window)
        with folder() as place, buffer_of(kind, place, seed=seed, sample_window_size=window) as buffer:
            assert_parity(buffer, reference)
            for _ in range(data.draw(st.integers(1, 3))):
                added: list[Any] = data.draw(trajectories(layout))
                if data.draw(st.booleans()):  # one that says nothing of T and B
                    added.insert(0, with_attributes(added[0], rewards=None, prev_logprobs=None))
                buffer.add_trajectories(added)
                reference.add(added)
                assert_parity(buffer, reference)

    def test_one_step_after_more(self) -> None:
        """Nothing of it can repeat, though of those before it did."""
        layout = dataclasses.replace(SIMPLE, next_obs="repeats")
        made = [random_trajectory(np.random.default_rng(T), layout, T=T, B=B) for T, B in ((5, 2), (1, 2), (1, 1))]
        for added in (made, made[::-1]):
            reference = ReferenceBuffer()
            reference.add(added)
            with TrajectoryReplayBuffer() as buffer:
                buffer.add_trajectories(added)
                assert_parity(buffer, reference)

    def test_what_is_added_may_be_changed_afterwards_if_it_is_copied(self) -> None:
        trajectory = random_trajectory(np.random.default_rng(0))
        reference = ReferenceBuffer()
        reference.add([random_trajectory(np.random.default_rng(0))])
        with TrajectoryReplayBuffer(copy_on_add=True) as buffer:
            buffer.add_trajectories([trajectory])
            for value in fields(trajectory).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
            assert_parity(buffer, reference)

    def test_a_change_before_it_was_filed_is_an_error_and_never_other_data(self) -> None:
        kept = [random_trajectory(np.random.default_rng(seed)) for seed in range(3)]
        changed = random_trajectory(np.random.default_rng(3))
        reference = ReferenceBuffer()
        reference.add(kept)
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(kept)
            gate = threading.Event()
            buffer._holding._resources.filing.submit(gate.wait, 60)
            buffer.add_trajectories([changed])
            changed.actions.zero_()
            gate.set()
            with pytest.raises(SelectionError, match=r"'actions' .* was changed in place .* copy_on_add"):
                buffer.sample(1)
            assert len(buffer) == 3
            assert_parity(buffer, reference)
            buffer.add_trajectories([random_trajectory(np.random.default_rng(4))])
            reference.add([random_trajectory(np.random.default_rng(4))])
            assert_parity(buffer, reference)

    def test_any_class_will_do(self) -> None:
        plain = random_trajectory(np.random.default_rng(0), extra=3)
        ours = Trajectory(**fields(plain))

        class Other:
            def __init__(self) -> None:
                vars(self).update(fields(plain))

        reference = ReferenceBuffer()
        reference.add([plain, plain, plain])
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories([plain, ours, Other()])
            assert_parity(buffer, reference)

    def test_further_tensors_are_in_batches(self) -> None:
        made = [
            with_attributes(random_trajectory(np.random.default_rng(n)), advantages=torch.rand(6, 2), task=f"task {n}")
            for n in range(3)
        ]
        reference = ReferenceBuffer()
        reference.add(made)
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(made)
            assert_parity(buffer, reference)

    @pytest.mark.parametrize("checkpoint_format", FORMATS)
    def test_names_and_values_that_rlinf_policies_use(self, tmp_path: Path, checkpoint_format: str) -> None:
        made = []
        for number in range(3):
            trajectory = random_trajectory(np.random.default_rng(number))
            images = trajectory.curr_obs["main_images"]
            trajectory.forward_inputs |= {"observation/image": images, "observation/state": torch.rand(6, 2, 3)}
            trajectory.curr_obs |= {"wrist_images": None, "task_descriptions": ["pick", "place"]}
            trajectory.prev_values = torch.rand(7, 2, 1)  # with the value of the state after the last step
            made.append(trajectory)
        reference = ReferenceBuffer(seed=4)
        reference.add(made)
        with TrajectoryReplayBuffer(seed=4, trajectory_format=checkpoint_format, allow_pickle=True) as buffer:
            buffer.add_trajectories(made)
            assert_parity(buffer, reference)
            buffer.save_checkpoint(tmp_path)
            buffer.load_checkpoint(tmp_path)
            reference.generator.manual_seed(4)
            assert_parity(buffer, reference)
            if checkpoint_format == "pt":
                loaded = ReferenceBuffer()
                loaded.load(tmp_path)
                for (_, found), (_, expected) in zip(loaded.trajectories, reference.trajectories, strict=True):
                    assert_same(fields(found), fields(expected))

    def test_the_generator_goes_on_and_a_second_buffer_draws_the_same(self) -> None:
        made = [random_trajectory(np.random.default_rng(n)) for n in range(3)]
        with TrajectoryReplayBuffer(seed=5) as one, TrajectoryReplayBuffer(seed=5) as other:
            for buffer in (one, other):
                buffer.add_trajectories(made)
            kept = [one.sample(8) for _ in range(5)]
            torch.manual_seed(0)  # not the global one
            for batch in kept:
                assert_same(other.sample(8), batch)

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_no_samples(self, wrong: int) -> None:
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories([random_trajectory(np.random.default_rng(0))])
            with pytest.raises(ValueError, match="num_chunks"):
                buffer.sample(wrong)

    def test_cleared(self) -> None:
        made = [random_trajectory(np.random.default_rng(n)) for n in range(3)]
        reference = ReferenceBuffer()
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(made)
            buffer.clear()
            assert_parity(buffer, reference)
            buffer.add_trajectories(made[:1])
            reference.add(made[:1])
            assert_parity(buffer, reference)
            buffer.clear_cache()
            assert_parity(buffer, reference)


class TestCheckpoints:
    @FEW
    @given(
        data=st.data(),
        kind=st.sampled_from(sorted(set(KINDS) - {"first, in memory"})),
        checkpoint_format=st.sampled_from(FORMATS),
        window=st.sampled_from([0, 2, 100]),
    )
    def test_before_and_after(self, data: st.DataObject, kind: str, checkpoint_format: str, window: int) -> None:
        layout, seed = data.draw(layouts()), data.draw(st.integers(0, 2**31))
        added, later = data.draw(trajectories(layout)), data.draw(trajectories(layout))
        reference = ReferenceBuffer(seed=seed, sample_window_size=window)
        # A buffer that is not saved may keep only its window.
        counts = window in (0, 100) or kind not in ("none", "second, not saved")
        name = "storage_format" if "storage_format" in KINDS[kind] else "trajectory_format"
        with folder() as place, contextlib.ExitStack() as stack:
            options = {"seed": seed, "sample_window_size": window, name: checkpoint_format}
            buffer = stack.enter_context(buffer_of(kind, place, **options))
            buffer.add_trajectories(added)
            reference.add(added)
            assert_parity(buffer, reference)
            buffer.save_checkpoint(str(place / "checkpoint"))
            assert (place / "checkpoint" / "metadata.json").exists() == (checkpoint_format != "store")
            assert_parity(buffer, reference)  # saving changes nothing
            buffer.close()
            shutil.rmtree(place / "run", ignore_errors=True)  # it is whole without the run

            buffer = stack.enter_context(buffer_of(kind, place, **{**options, "seed": 0}))
            buffer.load_checkpoint(str(place / "checkpoint"))
            reference.generator.manual_seed(seed)
            assert buffer.seed == seed
            assert_parity(buffer, reference, counts=counts)
            buffer.add_trajectories(later)
            reference.add(later)
            assert_parity(buffer, reference, counts=counts)

    @FEW
    @given(data=st.data(), checkpoint_format=st.sampled_from(["pt", "pkl"]))
    def test_files_go_both_ways(self, data: st.DataObject, checkpoint_format: str) -> None:
        layout = data.draw(layouts())
        added, later = data.draw(trajectories(layout)), data.draw(trajectories(layout))
        with folder() as place, contextlib.ExitStack() as stack:
            theirs = ReferenceBuffer(seed=9)
            theirs.add(added)
            theirs.save(place / "theirs", checkpoint_format)
            options = {"trajectory_format": checkpoint_format, "allow_pickle": True}
            buffer = stack.enter_context(TrajectoryReplayBuffer(**options))
            buffer.load_checkpoint(place / "theirs")
            theirs.load(place / "theirs")
            assert_parity(buffer, theirs)
            buffer.add_trajectories(later)
            theirs.add(later)
            buffer.save_checkpoint(place / "ours")
            loaded = ReferenceBuffer()
            loaded.load(place / "ours")
            assert (loaded.counter, loaded.seed) == (theirs.counter, theirs.seed)
            assert [number for number, _ in loaded.trajectories] == [number for number, _ in theirs.trajectories]
            for (_, found), (_, expected) in zip(loaded.trajectories, theirs.trajectories, strict=True):
                assert_same(fields(found), fields(expected))  # also what no batch holds, such as first rows of dones
            theirs.save(place / "again", checkpoint_format)
            for name in ("metadata.json", "trajectory_index.json"):
                assert (place / "ours" / name).read_bytes() == (place / "again" / name).read_bytes()

    @pytest.mark.parametrize("older", [False, True])
    @pytest.mark.parametrize("misspelt", [False, True])
    @pytest.mark.parametrize("update_count", [None, 3])
    def test_other_forms_of_their_files(
        self, tmp_path: Path, older: bool, misspelt: bool, update_count: int | None
    ) -> None:
        reference = ReferenceBuffer(seed=9)
        reference.add(random_trajectory(np.random.default_rng(n), extra=2) for n in range(3))
        reference.save(tmp_path, older=older, misspelt=misspelt, update_count=update_count)
        reference.generator.manual_seed(9)
        with TrajectoryReplayBuffer() as buffer:
            buffer.load_checkpoint(str(tmp_path))
            assert_parity(buffer, reference)

    def test_the_counter_of_the_metadata_counts(self, tmp_path: Path) -> None:
        reference = ReferenceBuffer(seed=9)
        made = [random_trajectory(np.random.default_rng(n)) for n in range(4)]
        reference.add(made)
        reference.save(tmp_path / "a")
        document = json.loads((tmp_path / "a" / "metadata.json").read_text())
        (tmp_path / "a" / "metadata.json").write_text(json.dumps({**document, "trajectory_counter": 50}))
        for distributed, expected in ((False, 50), (True, 2)):  # the share of the first of two ranks ends with id 1
            out = tmp_path / f"out {distributed}"
            with TrajectoryReplayBuffer(trajectory_format="pt") as buffer:
                buffer.load_checkpoint(tmp_path / "a", is_distributed=distributed, local_rank=0, world_size=2)
                buffer.add_trajectories(made[:1])
                buffer.save_checkpoint(out)
            assert json.loads((out / "trajectory_index.json").read_text())["trajectory_id_list"][-1] == expected

    @pytest.mark.parametrize(
        ("ranks", "checkpoint_format"),
        also_slow(
            itertools.product(range(1, 8), FORMATS), [(ranks, FORMATS[ranks % len(FORMATS)]) for ranks in (1, 2, 7)]
        ),
    )
    def test_every_rank(self, tmp_path: Path, ranks: int, checkpoint_format: str) -> None:
        made = [random_trajectory(np.random.default_rng(n), T=3 + n % 2, B=1 + n % 3, extra=1) for n in range(5)]
        reference = ReferenceBuffer(seed=21)
        reference.add(made)
        reference.save(tmp_path / "theirs")
        with TrajectoryReplayBuffer(seed=21, trajectory_format=checkpoint_format) as buffer:
            buffer.add_trajectories(made)
            buffer.save_checkpoint(tmp_path / "ours")
        names = [("local_rank", "world_size"), ("load_rank", "load_split_num")][ranks % 2]
        held = 0
        for rank in range(ranks):
            mine = ReferenceBuffer()
            mine.load(tmp_path / "theirs", rank=rank, world_size=ranks)
            with TrajectoryReplayBuffer(allow_pickle=True, trajectory_format="pt") as buffer:
                share = dict(zip(names, (rank, ranks), strict=True))
                with pytest.warns(UserWarning, match="gets none") if rank >= len(made) else contextlib.nullcontext():
                    buffer.load_checkpoint(load_path=tmp_path / "ours", is_distributed=True, **share)
                assert_parity(buffer, mine)
                held += len(buffer)
                buffer.add_trajectories(made[:1])
                mine.add(made[:1])
                assert_parity(buffer, mine)
                buffer.save_checkpoint(tmp_path / f"rank{rank}")
            document = json.loads((tmp_path / f"rank{rank}" / "trajectory_index.json").read_text())
            assert document["trajectory_id_list"] == [number for number, _ in mine.trajectories]
        assert held == len(made)

    def test_positional_arguments_of_the_second_generation(self, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories([random_trajectory(np.random.default_rng(n)) for n in range(3)])
            buffer.save_checkpoint(tmp_path)
            buffer.load_checkpoint(str(tmp_path), True, 1, 2)
            assert len(buffer) == 1

    @pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0), (0, -1)])
    def test_ranks_that_are_none(self, tmp_path: Path, rank: int, ranks: int) -> None:
        reference = ReferenceBuffer()
        reference.add([random_trajectory(np.random.default_rng(0))])
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories([t for _, t in reference.trajectories])
            buffer.save_checkpoint(tmp_path)
            match = f"rank {rank} of {ranks}" if ranks > 0 else f"world_size={ranks}"
            with pytest.raises(ValueError, match=match):
                buffer.load_checkpoint(tmp_path, is_distributed=True, local_rank=rank, world_size=ranks)
            assert_parity(buffer, reference)


class TestBadInput:
    """A clear error each, and the buffer is as it was."""

    @pytest.fixture
    def buffer(self) -> Iterator[TrajectoryReplayBuffer]:
        with TrajectoryReplayBuffer(trajectory_format="pt") as buffer:
            buffer.add_trajectories([random_trajectory(np.random.default_rng(n), extra=1) for n in range(2)])
            yield buffer

    @pytest.fixture
    def reference(self) -> ReferenceBuffer:
        reference = ReferenceBuffer()
        reference.add(random_trajectory(np.random.default_rng(n), extra=1) for n in range(2))
        return reference

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"actions": torch.zeros(6, 3, 3)}, "actions"),  # another B
            ({"actions": torch.zeros(5, 2, 3)}, "actions"),  # too few steps
            ({"actions": torch.zeros(6, 2, 4)}, "actions"),  # another shape than before
            ({"actions": torch.zeros(6, 2, 3, dtype=torch.float64)}, "actions"),
            ({"actions": torch.zeros(6, 2, 3, device="meta")}, "device"),
            ({"actions": None}, "actions"),
            ({"values": torch.zeros(6, 2)}, "values"),
            ({"curr_obs": {"states": torch.zeros(6, 2, 5)}}, "curr_obs/main_images"),
            ({"dones": torch.zeros(10, 2, dtype=torch.bool)}, "dones"),  # 6 steps are not 4 epochs
            ({"rewards": [1.0]}, "rewards"),
            ({"prev_logprobs": torch.zeros(6)}, "prev_logprobs"),
            ({"forward_inputs": {"tokens": object(), "deep": {"er": 1}}}, "forward_inputs/tokens"),
        ],
    )
    def test_trajectories(
        self, buffer: TrajectoryReplayBuffer, reference: ReferenceBuffer, change: dict[str, Any], match: str
    ) -> None:
        good = random_trajectory(np.random.default_rng(5), extra=1)
        with pytest.raises(ValueError, match=match):
            buffer.add_trajectories([good, with_attributes(good, **change)])
        assert_parity(buffer, reference)

    def test_a_mapping_is_no_trajectory(self, buffer: TrajectoryReplayBuffer, reference: ReferenceBuffer) -> None:
        with pytest.raises(TypeError, match=r"Trajectory\(\*\*fields\)"):
            buffer.add_trajectories([fields(random_trajectory(np.random.default_rng(5)))])
        assert_parity(buffer, reference)

    @pytest.mark.parametrize("fault", ["nothing", "missing", "corrupt", "index", "pickle", "mismatch"])
    def test_checkpoints(
        self, buffer: TrajectoryReplayBuffer, reference: ReferenceBuffer, tmp_path: Path, fault: str
    ) -> None:
        theirs = ReferenceBuffer()
        theirs.add(random_trajectory(np.random.default_rng(n), T=3) for n in range(3))
        expected: type[Exception]
        if fault == "nothing":
            expected, match = FileNotFoundError, "folder"
        else:
            theirs.save(tmp_path / "folder", "pkl" if fault == "pickle" else "pt")
            path = tmp_path / "folder" / "trajectory_1_weights.pt"
            expected, match = ValueError, r"trajectory_1_weights"
            if fault == "missing":
                expected = FileNotFoundError
                path.unlink()
            elif fault == "corrupt":
                path.write_bytes(path.read_bytes()[:-50])
            elif fault == "index":
                (tmp_path / "folder" / "trajectory_index.json").write_text("{")
                match = r"trajectory_index\.json"
            elif fault == "pickle":
                expected, match = PermissionError, "allow_pickle=True"
            else:
                other = fields(random_trajectory(np.random.default_rng(1), T=3))
                torch.save({k: v for k, v in other.items() if k != "actions"}, path)
        with pytest.raises(expected, match=match):
            buffer.load_checkpoint(tmp_path / "folder")
        assert_parity(buffer, reference)

    def test_keywords_that_contradict(self) -> None:
        for wrong in (
            {"save_trajectories": False, "enable_cache": False},
            {"storage_dir": "a", "auto_save": True, "auto_save_path": "b"},
            {"storage_format": "pt", "trajectory_format": "pkl"},
            {"trajectory_format": "npz"},
            {"auto_save_path": "b"},
            {"sample_window_size": -1},
            {"cache_size": -1},
        ):
            with pytest.raises(ValueError, match="="):
                TrajectoryReplayBuffer(**wrong)

    def test_no_checkpoints_without_saving(self, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer(save_trajectories=False) as buffer:
            buffer.add_trajectories([random_trajectory(np.random.default_rng(0))])
            with pytest.raises(ValueError, match="save_trajectories"):
                buffer.save_checkpoint(tmp_path)


def test_the_plain_class_has_the_fields_of_ours() -> None:
    """The two were written independently."""
    assert vars(PlainTrajectory()) == vars(Trajectory())
    assert set(SIMPLE.tensors) < set(vars(Trajectory()))
