"""Pictures: what they draw is what was appended, what they leave out they say, and nothing global is touched."""

import subprocess
import sys

import numpy as np
import pytest

import trajstore

pytest.importorskip("matplotlib")

import matplotlib.image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trajstore.interop.images import image_column, looks_like_images, to_pictures

LENGTHS = (5, 12, 3, 40)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    return [
        {
            "obs": {
                "image": rng.integers(0, 256, (length + 1, 16, 12, 3), np.uint8),
                "state": rng.normal(size=(length + 1, 9)),
            },
            "action": rng.normal(size=(length, 2)),
            "button": rng.integers(0, 4, length),
            "reward": rng.normal(size=length),
            "note": ["a"] * length,
        }
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def view(model):
    with trajstore.open("memory://plot-tests", "a") as store:
        for number, columns in enumerate(model):
            store.append(
                columns,
                terminated=number % 2 == 0,
                truncated=number == 1,
                task=["pick", "place"][number // 2],
                lr=0.1 * number,
            )
        store.flush()
        yield store.trajectories


def words(figure):
    """Everything that is written in a figure."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def written(figure):
    return "\n".join(words(figure))


def test_overview_says_what_there_is(view):
    figure = view.plot()
    assert isinstance(figure, Figure)
    text = written(figure)
    assert "4 trajectories, 60 steps, version 1" in text
    assert "obs/image of trajectory 3" in text or "the highest return" in text
    assert "length (steps)" in text
    assert "return (sum of rewards)" in text
    assert "obs/image uint8[16, 12, 3]" in text


@pytest.mark.parametrize("x", ["id", "created_at", "steps"])
def test_returns_are_the_sums_of_rewards(view, model, x):
    axes = view.plot("returns", x=x).axes[0]
    drawn = np.concatenate([dots.get_offsets() for dots in axes.collections])
    np.testing.assert_allclose(drawn[:, 1], [one["reward"].sum() for one in model])
    if x != "created_at":
        assert drawn[:, 0].tolist() == ([0, 1, 2, 3] if x == "id" else np.cumsum(LENGTHS).tolist())


def test_running_mean_equals_a_loop():
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=80)
    with trajstore.open("memory://plot-mean", "a") as store:
        for reward in rewards:
            store.append({"reward": np.array([reward])})
        store.flush()
        (line,) = store.trajectories.plot("returns").axes[0].lines
    window = 80 // 5
    expected = [rewards[max(0, n - window + 1) : n + 1].mean() if n >= 4 else np.nan for n in range(80)]
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert line.get_label() == f"mean of the last {window}"


def test_colours_by_a_field(view):
    assert {"task", "pick", "place"} <= set(words(view.plot("returns", by="task")))
    figure = view.plot("overview", by="lr")
    assert "lr" in words(figure)
    with pytest.raises(trajstore.SelectionError, match=r"by='tsk' is not a field.*task"):
        view.plot("returns", by="tsk")


def test_many_values_of_a_field_become_ranges_or_others():
    with trajstore.open("memory://plot-groups", "a") as store:
        for number in range(40):
            named = {} if number == 7 else {"name": f"n{number % 8}", "noise": number / 40}
            store.append({"reward": np.ones(2)}, metadata=named)
        view = store.trajectories  # not yet committed: numbered on
        drawn = view.plot("returns", by="name").axes[0]
        names = drawn.get_legend_handles_labels()[1]
        assert len(names) == 7
        assert names[5:] == ["3 others", "none"]
        assert sum(len(dots.get_offsets()) for dots in drawn.collections) == 40
        ranges = view.plot("returns", by="noise").axes[0].get_legend_handles_labels()[1]
        assert len(ranges) == 5
        assert " to " in ranges[0]


def test_lengths_are_counted_by_how_they_ended(view):
    axes = view.plot("lengths").axes[0]
    names = [name for name in axes.get_legend_handles_labels()[1] if not name.startswith("median")]
    counts = {name: sum(bar.get_height() for bar in bars) for name, bars in zip(names, axes.containers, strict=True)}
    assert counts == {"terminated": 2, "truncated": 1, "neither terminated\nnor truncated": 1}
    assert f"median {np.median(LENGTHS):.4g}" in words(axes.figure)


def test_trajectory_draws_rewards_actions_and_their_sum(view, model):
    figure = view.plot("trajectory", trajectory=1)
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == ["reward", "return so far", "action"]
    np.testing.assert_array_equal(panels["reward"].lines[0].get_ydata(), model[1]["reward"])
    np.testing.assert_allclose(panels["return so far"].lines[0].get_ydata(), np.cumsum(model[1]["reward"]))
    for entry in range(2):
        np.testing.assert_array_equal(panels["action"].lines[entry].get_ydata(), model[1]["action"][:, entry])
    assert panels["action"].lines[-1].get_xdata()[0] == LENGTHS[1]  # where it ended
    text = words(figure)
    assert "truncated" in text
    assert any("task=pick" in word for word in text)
    assert "terminated" in words(view.plot("trajectory"))
    assert "neither terminated nor truncated" in words(view.plot("trajectory", trajectory=3))


def test_trajectory_draws_the_columns_that_are_named(view, model):
    figure = view.plot("trajectory", trajectory=3, columns=["button", "obs/state"])
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    np.testing.assert_array_equal(panels["button"].lines[0].get_ydata(), model[3]["button"])
    heat = panels["obs/state"].images[0]
    np.testing.assert_allclose(heat.get_array(), model[3]["obs"]["state"].T)
    with pytest.raises(trajstore.SelectionError, match=r"obs/image.*kind='frames' shows images"):
        view.plot("trajectory", columns="obs/image")
    with pytest.raises(trajstore.SelectionError, match="'note' is string"):
        view.plot("trajectory", columns=["note"])


def test_frames_are_those_that_were_appended(view, model):
    figure = view.plot("frames", trajectory=[3, 0], frames=4)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    expected = [(3, 0), (3, 13), (3, 27), (3, 40), (0, 0), (0, 2), (0, 3), (0, 5)]
    assert len(shown) == len(expected)
    for frame, (number, step) in zip(shown, expected, strict=True):
        np.testing.assert_allclose(frame * 255, model[number]["obs"]["image"][step], atol=1e-4)
    text = written(figure)
    assert "step 13" in text
    assert "final (40)" in text
    assert "trajectory 3\n40 steps" in text
    assert len([axes for axes in view.plot("frames", rows=2, frames=100).axes if axes.images]) == 6 + 41


def test_frames_of_every_layout():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (3, 20, 24), np.uint8)
    for layout, expected, note in [
        (grey, grey / 255, ""),
        (grey[..., None], grey / 255, ""),
        (grey[:, None], grey / 255, ""),
        (grey.astype(np.float32), grey / 255, ""),
        (grey / 255, grey / 255, ""),
        (grey / 127.5 - 1, grey / 255, ""),
        (grey > 99, grey > 99, ""),
        (np.stack([grey // 2, grey, grey // 3], 1), np.stack([grey // 2, grey, grey // 3], -1) / 255, ""),
        (np.stack([grey // 2, grey, grey // 3, grey], 1), grey / 255, "last of 4 stacked frames"),
        (np.stack([*[grey // 2] * 3, np.full_like(grey, 255)], -1), np.stack([grey // 2] * 3, -1) / 255, ""),
    ]:
        pictures = to_pictures(list(layout))
        np.testing.assert_allclose(np.stack(pictures.frames), expected, atol=1e-6)
        assert pictures.note == note
    depth = grey.astype(np.uint16) * 100
    pictures = to_pictures(list(depth))
    assert pictures.note == f"black {depth.min():.4g}, white {depth.max():.4g}"
    assert (np.min(pictures.frames), np.max(pictures.frames)) == (0, 1)


def test_which_columns_look_like_images():
    def column(path, dtype, shape, **rest):
        return trajstore.Column(path=path, dtype=dtype, shape=shape, **rest)

    images = [
        column("float", "float32", (3, 84, 84)),
        column("grey", "uint8", (84, 84)),
        column("rgb", "uint8", (64, 48, 3)),
        column("stack", "uint8", (4, 84, 84)),
    ]
    others = [
        column("matrix", "float32", (3, 3)),
        column("state", "float32", (7,)),
        column("voxels", "uint8", (32, 32, 32)),
        column("masks", "uint8", (16, 16), ragged=True),
        column("waves", "complex64", (16, 16)),
    ]
    assert all(looks_like_images(one) for one in images)
    assert not any(looks_like_images(one) for one in others)
    assert image_column([*others, *images]).path == "grey"
    assert image_column(others) is None


def test_large_views_are_thinned_and_say_so():
    n = 9000
    with trajstore.open("memory://plot-large", "a") as store:
        store.append_many({"reward": np.arange(2 * n, dtype=np.float64)}, [2] * n)
        store.append({"reward": np.random.default_rng(0).normal(size=30_000)})
        store.flush()
        figure = store.trajectories.first(n).plot("returns")
        assert len(figure.axes[0].collections[0].get_offsets()) == n / 3
        assert "dots: every 3rd trajectory" in written(figure)
        long = store.trajectories.plot("trajectory", trajectory=n)
        assert "range and mean of 60 steps each" in written(long)
        assert len(long.axes[0].lines[0].get_ydata()) == 500


def test_without_rewards_the_picture_says_so():
    with trajstore.open("memory://plot-bare", "a") as store:
        store.append({"action": np.arange(5)})
        store.flush()
        view = store.trajectories
        assert "No returns" in written(view.plot("returns"))
        assert "no returns" in written(view.plot())
        with pytest.raises(trajstore.SelectionError, match=r"no column .*looks like images.*action int64"):
            view.plot("frames")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "pie"}, "kind='pie', expected 'overview'"),
        ({"kind": "trajectory", "trajectory": 99}, "no trajectory 99; its ids are from 0 to 3"),
        ({"kind": "frames", "rows": 0}, "rows=0"),
        ({"kind": "frames", "frames": 0}, "frames=0"),
        ({"kind": "frames", "columns": "action"}, "expected one column of images"),
        ({"kind": "returns", "x": "tiem"}, "x='tiem'"),
        ({"path": "picture.doc"}, "picture.doc.*png"),
        ({"path": "picture.gif"}, r"ends in none of \.png, \.pdf, \.svg"),
        ({"trajectory": 3}, "trajectory= means nothing to kind='overview', only to trajectory and frames"),
        ({"columns": ["action"]}, "columns= means nothing to kind='overview'"),
        ({"kind": "returns", "rows": 2}, "rows= means nothing to kind='returns', only to frames"),
        ({"kind": "returns", "frames": 2}, "frames= means nothing to kind='returns', only to overview and frames"),
        ({"kind": "lengths", "x": "steps"}, "x= means nothing to kind='lengths', only to overview and returns"),
        ({"kind": "lengths", "by": "task"}, "by= means nothing to kind='lengths'"),
        ({"kind": "trajectory", "frames": 3}, "frames= means nothing to kind='trajectory'"),
        ({"kind": "trajectory", "trajectory": [0, 1]}, r"draws one trajectory, and trajectory=\[0, 1\] are 2"),
        ({"path": "picture"}, "ends in none of"),
        ({"show": True}, "opens no windows"),
    ],
)
def test_what_cannot_be_drawn_is_refused(view, arguments, message, monkeypatch):
    monkeypatch.setattr("matplotlib.get_backend", lambda **_: "agg")
    with pytest.raises(trajstore.SelectionError, match=message):
        view.plot(**arguments)


def test_an_empty_view_is_refused(view):
    with pytest.raises(trajstore.SelectionError, match="picture of an empty view"):
        view.filter("length > 1000").plot()


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_saved_by_suffix(view, tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    view.plot("overview", by="task", path=path)
    start = path.read_bytes()[:400]
    assert {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<svg"}[suffix] in start
    if suffix == "png":
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] == 1200
        assert (pixels[..., :3].min(axis=2) < 0.5).any()


@pytest.mark.slow
def test_pyplot_is_not_imported_and_a_missing_matplotlib_says_what_to_install():
    code = (
        "import sys, numpy as np, trajstore\n"
        "with trajstore.open('memory://x', 'a') as store:\n"
        "    store.append({'reward': np.ones(3)})\n"
        "    sys.modules['matplotlib'] = None\n"
        "    try: store.trajectories.plot()\n"
        "    except ImportError as error: assert \"pip install 'trajstore[plot]'\" in str(error), error\n"
        "    else: raise SystemExit(1)\n"
        "    del sys.modules['matplotlib']\n"
        "    picture = store.trajectories.plot()\n"
        "assert picture._repr_png_()[1:4] == b'PNG'  # what a notebook asks for\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def overlapping(texts, figure):
    """Pairs of texts that run into each other, and texts that leave the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    pairs = [(a, b) for n, (a, one) in enumerate(boxes) for b, other in boxes[n + 1 :] if one.overlaps(other)]
    return pairs + [a for a, box in boxes if not (figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1)]


@pytest.mark.parametrize("frames", [1, 8, 14, 20, 45])
def test_the_labels_of_frames_do_not_run_into_each_other(frames):
    with trajstore.open(f"memory://plot-labels-{frames}", "a") as store:
        store.append({"obs": np.zeros((1538, 16, 16), np.uint8), "reward": np.ones(1537)})
        figure = store.trajectories.plot("frames", frames=frames)
    titles = [axes.title for axes in figure.axes]
    assert not overlapping(titles, figure)
    assert "1537" in titles[-1].get_text() or frames == 1
    assert ("numbers are steps" in figure.get_suptitle()) == (not titles[0].get_text().startswith("step"))


def test_labels_below_large_returns_do_not_run_into_each_other():
    rng = np.random.default_rng(0)
    with trajstore.open("memory://plot-large-returns", "a") as store:
        for number in range(60):
            store.append(
                {"reward": rng.normal(size=7) * 2000 + 6000}, task=f"put {number % 3} cubes into the bowl there"
            )
        figure = store.trajectories.plot("overview", by="task")
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        shown = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        assert len(shown) > 2
        assert not overlapping(shown, figure)


def test_long_names_in_a_legend_stay_apart():
    names = [f"put the red cube that lies on the left into bowl number {n}" for n in range(3)]
    alike = [f"{'a' * 60}{n}{'b' * 60}" for n in range(2)]
    with trajstore.open("memory://plot-long-names", "a") as store:
        for number, name in enumerate(names):
            store.append({"reward": np.ones(2)}, task=name, other=alike[number % 2], third="x" * 200 + str(number))
        view = store.trajectories

        def legend(field):
            return view.plot("returns", by=field).axes[0].get_legend_handles_labels()[1]

        assert {name.replace("\n", " ") for name in legend("task")} == {*names}
        assert {name.replace("\n", "") for name in legend("other")} == {*alike}
        assert all("\u2026" in name and len(name) < 80 for name in legend("third"))


def test_ranges_begin_and_end_with_what_is_there():
    with trajstore.open("memory://plot-ranges", "a") as store:
        for number in range(41):
            store.append({"reward": np.ones(2)}, lr=number / 40)
        names = store.trajectories.plot("returns", by="lr").axes[0].get_legend_handles_labels()[1]
    assert (names[0].split(" to ")[0], names[-1].split(" to ")[1]) == ("0", "1")


def test_few_short_trajectories_have_axes_of_what_can_be():
    with trajstore.open("memory://plot-short", "a") as store:
        for total in (4, 5, 4):
            store.append({"reward": np.full(2, total / 2)})
        overview = store.trajectories.plot()
        steps = store.trajectories.plot("trajectory").axes[-1].get_xticks()
    lengths, returns = overview.axes[1:3]
    assert lengths.get_xlim()[0] > 0
    assert 2 < returns.get_xlim()[0] < returns.get_xlim()[1] < 7
    assert (steps == np.round(steps)).all()


def test_rewards_that_are_not_finite_are_told():
    with trajstore.open("memory://plot-nan", "a") as store:
        store.append({"reward": np.array([1, np.nan, 2, 3.0])})
        view = store.trajectories
        drawn = written(view.plot("trajectory"))
        assert "NaN or infinite in 1 of 4 rows" in drawn
        assert "NaN or infinite in 3 of 4 rows" in drawn  # the return so far
        assert "no finite return" in drawn
        assert "the sums of 'reward' are not finite" in written(view.plot("returns"))
