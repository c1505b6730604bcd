"""The data that is measured: recorded frames, camera-like frames, robot states, noise, small integers.

Invariant: every function is a pure function of its arguments (seeded, no clock, no network), so two runs and
two machines compress the same bytes. Recorded frames need ``ale-py``.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile

import numpy as np

SIDE = 64  # pixels, the side of a small frame


@functools.lru_cache(maxsize=4)
def atari_native(steps: int, game: str = "Breakout", seed: int = 0) -> np.ndarray:
    """Frames of a random policy, as ``ale-py`` renders them: ``(steps, 210, 160, 3)`` uint8."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    env = gymnasium.make(f"ALE/{game}-v5")
    env.action_space.seed(seed)
    frames = np.empty((steps, 210, 160, 3), np.uint8)
    env.reset(seed=seed)
    for step in range(steps):
        frame, _reward, terminated, truncated, _info = env.step(env.action_space.sample())
        frames[step] = frame
        if terminated or truncated:
            env.reset()
    env.close()
    return frames


@functools.lru_cache(maxsize=4)
def atari_rewards(steps: int, game: str = "Breakout", seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards (float64), ends (bool) and actions (int64) of the same kind of rollout, each ``(steps,)``."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    env = gymnasium.make(f"ALE/{game}-v5", obs_type="ram")
    env.action_space.seed(seed)
    rewards, ends, actions = np.empty(steps, np.float64), np.empty(steps, np.bool_), np.empty(steps, np.int64)
    env.reset(seed=seed)
    for step in range(steps):
        action = env.action_space.sample()
        _ram, reward, terminated, truncated, _info = env.step(action)
        rewards[step], ends[step], actions[step] = float(reward), terminated or truncated, action
        if ends[step]:
            env.reset()
    env.close()
    return rewards, ends, actions


@functools.lru_cache(maxsize=4)
def atari_small(steps: int, game: str = "Breakout", seed: int = 0) -> np.ndarray:
    """The same frames, the whole screen by nearest neighbour: ``(steps, 64, 64, 3)`` uint8."""
    native = atari_native(steps, game, seed)
    rows = np.arange(SIDE) * native.shape[1] // SIDE
    columns = np.arange(SIDE) * native.shape[2] // SIDE
    return np.ascontiguousarray(native[:, rows][:, :, columns])


@functools.lru_cache(maxsize=4)
def camera(steps: int, height: int = SIDE, width: int = SIDE, seed: int = 0, noise: float = 0.3) -> np.ndarray:
    """A panning view of a textured scene, a moving object, sensor noise: ``(steps, height, width, 3)`` uint8.

    The scene has a natural image's spectrum (amplitude falling as 1/f); the noise is Gaussian, its standard
    deviation ``noise`` grey levels plus a shot term growing with the root of the brightness. The
    default is what a camera's own denoising leaves; 3.0 is a raw sensor.
    """
    rng = np.random.default_rng(seed)
    scene_height, scene_width = height * 2, width * 2
    fy, fx = np.fft.fftfreq(scene_height)[:, None], np.fft.rfftfreq(scene_width)[None, :]
    amplitude = 1.0 / np.maximum(np.hypot(fy, fx), 1.0 / scene_height)
    planes = []
    for _channel in range(3):
        phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
        planes.append(np.fft.irfft2(amplitude * phase, s=(scene_height, scene_width)))
    # Channels of a photograph are strongly alike: mix a common luminance into each.
    luminance = sum(planes) / len(planes)
    scene = np.stack([0.8 * luminance + 0.2 * plane for plane in planes], axis=-1)
    scene = 118.0 + 48.0 * scene / scene.std()
    side = max(4, height // 6)
    frames = np.empty((steps, height, width, 3), np.uint8)
    for step in range(steps):
        top = int((0.5 + 0.5 * np.sin(step / 97.0)) * height)
        left = int((0.5 + 0.5 * np.cos(step / 61.0)) * width)
        view = scene[top : top + height, left : left + width].copy()
        row, column = (step * 2) % (height - side), (step * 3) % (width - side)
        view[row : row + side, column : column + side] = (200.0, 60.0, 40.0)
        sigma = noise * (0.7 + 0.03 * np.sqrt(np.clip(view, 0.0, 255.0)))
        view += rng.standard_normal(view.shape, dtype=np.float32) * sigma
        frames[step] = np.clip(np.rint(view), 0, 255)
    return frames


@functools.lru_cache(maxsize=4)
def robot_states(steps: int, joints: int = 17, seed: int = 0) -> np.ndarray:
    """Positions (as encoders count) and speeds of damped joints: ``(steps, joints)`` float32."""
    rng = np.random.default_rng(seed)
    half = joints // 2
    stiffness, damping = rng.uniform(1.0, 8.0, half), rng.uniform(0.3, 1.0, half)
    position, speed, torque = np.zeros(half), np.zeros(half), np.zeros(half)
    states = np.empty((steps, joints), np.float32)
    dt = 0.02
    for step in range(steps):
        torque += 0.05 * (rng.standard_normal(half) * 4.0 - torque)
        speed = speed + dt * (torque - stiffness * position - damping * speed)
        position = position + dt * speed
        states[step, :half] = np.rint(position * 16384) / 16384
        states[step, half : 2 * half] = speed
        states[step, 2 * half :] = step * dt % 20.0
    return states


@functools.lru_cache(maxsize=4)
def mujoco_states(steps: int, seed: int = 0) -> np.ndarray:
    """Observations of HalfCheetah-v5 under a random policy: ``(steps, 17)`` float32."""
    import gymnasium

    with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):  # mujoco leaves a log file
        env = gymnasium.make("HalfCheetah-v5")
    env.action_space.seed(seed)
    states = np.empty((steps, 17), np.float32)
    env.reset(seed=seed)
    for step in range(steps):
        states[step], _reward, terminated, truncated, _info = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    env.close()
    return states


@functools.lru_cache(maxsize=4)
def white_noise(rows: int, width: int = 17, seed: int = 0) -> np.ndarray:
    """Floats that no codec can shrink by much: ``(rows, width)`` float32, standard normal."""
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)


@functools.lru_cache(maxsize=4)
def small_integers(rows: int, width: int = 2, high: int = 6, seed: int = 0) -> np.ndarray:
    """Discrete actions as most code holds them: ``(rows, width)`` int64 in ``[0, high)``."""
    return np.random.default_rng(seed).integers(0, high, (rows, width), dtype=np.int64)


@functools.lru_cache(maxsize=4)
def tokens(rows: int, width: int = 16, vocabulary: int = 32_000, seed: int = 0) -> np.ndarray:
    """Token ids with a falling frequency: ``(rows, width)`` int32."""
    draws = np.random.default_rng(seed).zipf(1.3, (rows, width))
    return np.minimum(draws, vocabulary - 1).astype(np.int32)


@functools.lru_cache(maxsize=4)
def masks(rows: int, width: int = 32, seed: int = 0) -> np.ndarray:
    """Action masks that change now and then: ``(rows, width)`` bool."""
    flips = np.random.default_rng(seed).random((rows, width)) < 0.02
    return np.asarray(np.logical_xor.accumulate(flips, axis=0))


def has_mujoco() -> bool:
    """Whether continuous-control rollouts can be recorded here."""
    try:
        import mujoco  # noqa: F401  # only asked whether it is there
    except ImportError:
        return False
    return True
