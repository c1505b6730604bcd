"""Every code block of the pages of RLinf, ObjectRL and ApexRL runs with only the import changed.

``pages/`` has the blocks as they are in the pages. What these leave undefined is given: actor, environment, trajectories;
``cuda`` is the device at hand, ``/path/to`` a temporary folder, and a script of theirs the command that replaces it.
"""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch

from trajstore import cli
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer

PAGES = Path(__file__).parent / "pages"
RLINF = ["rlinf_storage_dir", "rlinf_auto_save", "rlinf_auto_save_zh"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# All that changes in somebody's training code.
IMPORTS = {
    "rlinf.data.replay_buffer": "trajstore.buffers.rlinf",
    "objectrl.replay_buffers.experience_memory": "trajstore.buffers.objectrl",
    "apexrl.buffer.rollout_buffer": "trajstore.buffers.apexrl",
    "apexrl.buffer.replay_buffer": "trajstore.buffers.apexrl",
    "apexrl.buffer.distillation_buffer": "trajstore.buffers.apexrl",
}
PROGRAMS = {
    "python rlinf/data/replay_buffer.py": "python -m trajstore.buffers.rlinf",
    "python toolkits/replay_buffer/merge_or_split_replay_buffer.py": "trajstore rlinf merge-or-split",
}
T, B = 20, 4


# --- reading and running blocks -----------------------------------------------------------------------------


def blocks(page, language="python"):
    """The blocks of a page, in its order."""
    text = (PAGES / f"{page}.rst").read_text(encoding="utf-8")
    _, *parts = re.split(r"^\.\. code-block:: (\w+)$", text, flags=re.MULTILINE)
    return [
        dedent(body).strip() + "\n" for found, body in zip(parts[::2], parts[1::2], strict=True) if found == language
    ]


def block(page, containing):
    """The one block that contains a text."""
    (found,) = [code for code in blocks(page) if containing in code]
    return found


def adapted(code, folder="/path/to"):
    """The code with the import changed, and the device and the folder that are here."""
    for theirs, ours in IMPORTS.items():
        code = code.replace(f"from {theirs} import", f"from {ours} import")
    return code.replace('"cuda"', f'"{DEVICE}"').replace("/path/to", str(folder))


def run(code, names, *, times=None):
    """Run a block; ``times`` says how often a statement is repeated that contains a text, as a training loop would."""
    for statement in ast.parse(code).body:
        source = ast.unparse(statement)
        repeats = next((count for text, count in (times or {}).items() if text in source), 1)
        program = compile(ast.Module([statement], []), source, "exec")
        for _ in range(repeats):
            exec(program, names)
    return names


def leaves(batch):
    for value in batch.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def test_every_block_is_one_that_a_test_here_runs():
    counts = {page.stem: (len(blocks(page.stem)), len(blocks(page.stem, "bash"))) for page in PAGES.glob("*.rst")}
    assert counts == {
        "rlinf_storage_dir": (5, 0),
        "rlinf_auto_save": (5, 3),
        "rlinf_auto_save_zh": (5, 3),
        "objectrl": (11, 0),
        "apexrl": (5, 0),
    }


# --- RLinf --------------------------------------------------------------------------------------------------


def trajectories(count, first=0):
    """Trajectories whose rewards say which they are."""
    generator = torch.Generator().manual_seed(first)

    def obs(steps):
        images = torch.randint(0, 256, (steps, B, 8, 8, 3), dtype=torch.uint8, generator=generator)
        return {"main_images": images, "states": torch.randn(steps, B, 7, generator=generator)}

    made = []
    for number in range(first, first + count):
        seen = obs(T + 1)
        made.append(
            Trajectory(
                max_episode_length=T,
                model_weights_id="w3",
                actions=torch.randn(T, B, 6, generator=generator),
                rewards=torch.full((T, B, 1), float(number)),
                dones=torch.zeros(T + 1, B, 1, dtype=torch.bool),
                prev_logprobs=torch.randn(T, B, 6, generator=generator),
                curr_obs={name: tensor[:-1] for name, tensor in seen.items()},
                next_obs={name: tensor[1:] for name, tensor in seen.items()},
            )
        )
    return made


@pytest.mark.parametrize("page", RLINF)
def test_rlinf_page(page, tmp_path):
    created, added, sampled, saved, cleaned = (adapted(code, tmp_path) for code in blocks(page))
    names = {"trajectories": trajectories(10)}
    run(created, names)
    buffer = names["buffer"]
    run(added, names)
    assert (len(buffer), buffer.size, buffer.total_samples) == (10, 10, 10 * T * B)

    run(sampled, names)
    batch = names["batch"]
    assert {len(leaf) for leaf in leaves(batch)} == {256}
    assert batch["curr_obs"]["main_images"].shape == (256, 8, 8, 3)
    drawn = torch.randint(0, 10 * T * B, (256,), generator=torch.Generator().manual_seed(1234))
    assert torch.equal(batch["rewards"][:, 0], (drawn // (T * B)).float())

    run(saved, names)
    assert buffer.size == 3  # ten of four ranks: 3, 3, 2, 2
    assert set(buffer.sample(num_chunks=256)["rewards"].unique().tolist()) == {0.0, 1.0, 2.0}
    run(cleaned, names)
    assert buffer.size == 0


@pytest.mark.parametrize("page", RLINF)
def test_rlinf_checkpoint_of_a_page_loads_into_another_buffer(page, tmp_path):
    created, added, _, saved, _ = (adapted(code, tmp_path) for code in blocks(page))
    names = run(created + added, {"trajectories": trajectories(6)})
    run(saved.splitlines()[0], names)  # without the load
    names["buffer"].close()
    again = TrajectoryReplayBuffer(seed=1)
    again.load_checkpoint(str(tmp_path / "ckpt"))
    assert again.get_stats()["num_trajectories"] == 6
    again.close()


def commands(page, folder):
    """The arguments of every command line of a page, as they are typed here."""
    typed = []
    for code in blocks(page, "bash"):
        lines = [line for line in code.splitlines() if not line.startswith("#")]
        line = "\n".join(lines).replace("\\\n", " ").replace("/path/to", str(folder))
        for theirs, ours in PROGRAMS.items():
            line = line.replace(theirs, ours)
        typed.append(shlex.split(line))
    return typed


@pytest.fixture
def type_(monkeypatch, capsys):
    """Run a command line in this process and return what it prints."""

    def type_(*arguments):
        capsys.readouterr()
        code = 0
        try:
            if arguments[:2] == ("python", "-m"):
                monkeypatch.setattr(sys, "argv", list(arguments[2:]))
                runpy.run_module(arguments[2], run_name="__main__")
            else:
                monkeypatch.setattr(sys, "argv", list(arguments))
                cli.main()
        except SystemExit as exit_:
            code = exit_.code
        out, error = capsys.readouterr()
        assert code in (0, None), out + error
        return out

    return type_


def checkpoint(path, made, **options):
    buffer = TrajectoryReplayBuffer(seed=1234, **options)
    buffer.add_trajectories(made)
    buffer.save_checkpoint(str(path))
    buffer.close()


def numbers_in(path):
    """Which trajectories a checkpoint holds, in order: what a window has that is one trajectory longer."""
    buffer = TrajectoryReplayBuffer()
    buffer.load_checkpoint(str(path))
    found = []
    for window in range(1, len(buffer) + 1):
        buffer.sample_window_size = window
        (number,) = set(buffer.sample(num_chunks=window * T * B)["rewards"].unique().tolist()) - set(found)
        found.insert(0, number)
    buffer.close()
    return found


def test_rlinf_command_lines_are_the_same_in_both_languages(tmp_path):
    assert commands("rlinf_auto_save", tmp_path) == commands("rlinf_auto_save_zh", tmp_path)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # when doctests have imported it here
@pytest.mark.parametrize("options", [{}, {"trajectory_format": "pt"}], ids=["store", "pt"])
def test_rlinf_sample_command(options, tmp_path, type_):
    checkpoint(tmp_path / "buffer", trajectories(20), **options)
    sample, _, _ = commands("rlinf_auto_save", tmp_path)
    printed = type_(*sample)
    for key, shape in (("rewards", [1024, 1]), ("main_images", [1024, 8, 8, 3]), ("states", [1024, 7])):
        shown = "|".join(re.escape(form) for form in (str(shape), str(tuple(shape))))
        assert re.search(rf"{key}.*({shown})", printed), printed


@pytest.mark.parametrize("options", [{}, {"trajectory_format": "pt"}], ids=["store", "pt"])
def test_rlinf_merge_command(options, tmp_path, type_):
    for rank in range(2):
        checkpoint(tmp_path / "buffer" / f"rank_{rank}", trajectories(3, first=10 * rank), **options)
    _, merge, _ = commands("rlinf_auto_save", tmp_path)
    type_(*merge)
    assert numbers_in(tmp_path / "merged") == [0, 10, 1, 11, 2, 12]


@pytest.mark.parametrize("options", [{}, {"trajectory_format": "pt"}], ids=["store", "pt"])
def test_rlinf_split_command(options, tmp_path, type_):
    checkpoint(tmp_path / "buffer", trajectories(35), **options)
    _, _, split = commands("rlinf_auto_save", tmp_path)
    type_(*split)
    assert numbers_in(tmp_path / "split") == list(range(30))


# --- ObjectRL -----------------------------------------------------------------------------------------------


def test_objectrl_page(tmp_path, monkeypatch, capsys):
    tensordict = pytest.importorskip("tensordict")
    monkeypatch.chdir(tmp_path)

    def transitions(*batch):
        return tensordict.TensorDict(
            {
                "obs": torch.randn(*batch, 17),
                "action": torch.randn(*batch, 6),
                "reward": torch.randn(batch),
                "next_obs": torch.randn(*batch, 17),
                "terminated": torch.zeros(batch, dtype=torch.bool),
            },
            batch_size=batch,
        )

    trained = []
    names = {
        "torch": torch,
        "single_experience": transitions(),
        "batch_experience": transitions(9_499),
        "train_step": lambda batch: trained.append(len(batch)),
    }
    pieces = [adapted(code) for code in blocks("objectrl")]
    created, added, sampled, indexed, fields, everything, iterated, epochs, iterations, saved, printed = pieces
    run(created + added, names)
    buffer = names["buffer"]
    run(sampled, names)
    assert names["batch"].batch_size == (64,)
    assert names["batch"].device == torch.device(DEVICE)
    run(indexed, names)
    assert torch.equal(names["batch"]["obs"][0].cpu(), names["single_experience"]["obs"])
    run(fields, names)
    assert sorted(names["obs_act"].keys()) == ["action", "obs"]
    run(everything, names)
    assert torch.equal(names["all_data"]["obs"][1:].cpu(), names["batch_experience"]["obs"])

    run(iterated, names)
    assert trained == ([64] * 148 + [28]) * 5  # 9,500 transitions
    run(epochs, names)
    assert names["n_steps"] == 10 * 149
    assert torch.equal(buffer.get_next_batch(64)["obs"], names["all_data"]["obs"][:64])
    run(iterations, names)
    assert names["n_steps"] == 1
    assert buffer.get_next_batch(64).batch_size == (64,)

    run(saved, names)
    run(printed, names)
    assert capsys.readouterr().out.split() == ["9500", "9500"]
    assert torch.equal(buffer.sample_all()["obs"], names["all_data"]["obs"])


# --- ApexRL -------------------------------------------------------------------------------------------------


class Environments:
    """4,096 points that are pushed around; an episode ends now and then."""

    def __init__(self):
        self.obs = torch.randn(4096, 48, device=DEVICE)

    def step(self, actions):
        self.obs = 0.9 * self.obs + torch.nn.functional.pad(actions, (0, 36))
        dones = torch.rand(4096, device=DEVICE) < 0.05
        self.obs[dones] = 0.0
        return self.obs.clone(), -self.obs.norm(dim=1), dones, {}


def test_apexrl_rollout_page():
    torch.manual_seed(0)
    env = Environments()
    policy = torch.randn(48, 12, device=DEVICE) / 10

    def act(obs):
        return obs @ policy, torch.randn(len(obs), device=DEVICE)

    names = {
        "obs": env.obs.clone(),
        "env": env,
        "actor": SimpleNamespace(act=act),
        "critic": SimpleNamespace(get_value=lambda obs: -obs.norm(dim=1)),
    }
    run(adapted(block("apexrl", "from apexrl.buffer.rollout_buffer")), names)
    buffer, found = names["buffer"], names["data"]
    assert found["observations"].shape == (24 * 4096, 48)
    assert found["actions"].shape == (24 * 4096, 12)

    layout = block("apexrl", "# Shape: (24, 4096, 48)")
    for name, shape in re.findall(r"self\.(\w+) +# Shape: (\(.*\))", layout):
        assert tuple(getattr(buffer, name).shape) == ast.literal_eval(shape), name
    run(layout, {"self": buffer})

    # The page has the algorithm itself: what it computes from the same rollout.
    reference = run(adapted(block("apexrl", "def compute_returns_and_advantages")), {"torch": torch})
    taken = {name: getattr(buffer, name) for name in ("rewards", "values", "dones")}
    theirs = SimpleNamespace(num_steps=24, num_envs=4096, device=DEVICE, **taken)
    reference["compute_returns_and_advantages"](theirs, names["last_values"], gamma=0.99, gae_lambda=0.95)
    torch.testing.assert_close(buffer.advantages, theirs.advantages, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(buffer.returns, theirs.returns, rtol=1e-4, atol=1e-4)


def test_apexrl_replay_page():
    generator = torch.Generator().manual_seed(0)
    names = {
        "obs": torch.randn(4, generator=generator),
        "action": torch.randn(2, generator=generator),
        "reward": 1.5,
        "next_obs": torch.randn(4, generator=generator),
        "done": False,
    }
    run(adapted(block("apexrl", "from apexrl.buffer.replay_buffer")), names, times={"buffer.add": 256})
    batch = names["batch"]
    assert len(names["buffer"]) == 256
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "observations": (256, 4),
        "actions": (256, 2),
        "rewards": (256,),
        "next_observations": (256, 4),
        "dones": (256,),
    }
    assert torch.equal(batch["actions"].cpu(), names["action"].expand(256, 2))
    assert (batch["rewards"] == 1.5).all()


def test_apexrl_distillation_page():
    given = torch.randn(48), torch.randn(12)
    names = {"obs": given[0], "action": given[1]}
    run(adapted(block("apexrl", "from apexrl.buffer.distillation_buffer")), names, times={"buffer.add": 256})
    assert torch.equal(names["obs"].cpu(), given[0].expand(256, 48))
    assert torch.equal(names["expert_actions"].cpu(), given[1].expand(256, 12))
