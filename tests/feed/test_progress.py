"""``progress=True``: what is drawn, and that the terminal is given back however a loop ends."""

from __future__ import annotations

import gc
import io
import itertools

import numpy as np
import pytest
from rich.console import Console

import trajstore
from tests.support.recordings import recording_of, view_of
from trajstore import Column
from trajstore.feed import loader as loader_module
from trajstore.feed.progress import LoaderProgress

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture(scope="module")
def view():
    columns = [Column(path="action", dtype="float32")]
    with view_of(recording_of(np.random.default_rng(3), columns, [7, 2, 30, 12])) as view:  # 51 steps
        yield view


@pytest.fixture
def terminal(monkeypatch):
    """Bars are drawn here, as in a terminal."""
    drawn = io.StringIO()

    def made(done, total):
        return LoaderProgress(
            done, total, console=Console(file=drawn, force_terminal=True, color_system=None, width=100)
        )

    monkeypatch.setattr(loader_module, "LoaderProgress", made)
    return drawn


def ended(drawn):
    """Whether every bar that was begun has ended."""
    text = drawn.getvalue()
    return text.count(HIDE) == text.count(SHOW) > 0


def fail_within(loader):
    for _ in loader:
        raise ZeroDivisionError


def test_a_pass(view, terminal):
    with view.loader(10, order="shuffle", epochs=2, progress=True) as loader:
        batches = list(loader)
        assert ended(terminal)
        assert "12/12 batches" in terminal.getvalue()
        again = list(loader)
    assert len(batches) == len(again) == 12
    assert terminal.getvalue().count(SHOW) == 2


def test_it_shows_where_a_resumed_loader_is(view, terminal):
    with view.loader(10, order="sequential") as loader:
        list(itertools.islice(loader, 4))
        state = loader.state_dict()
    with view.loader(10, order="sequential", progress=True) as loader:
        loader.load_state_dict(state)
        assert len(list(loader)) == 2
    assert "4/6 batches" in terminal.getvalue()
    assert "6/6 batches" in terminal.getvalue()


def test_an_endless_order_is_counted(view, terminal):
    with view.loader(10, progress=True) as loader:
        for _ in zip(range(7), loader, strict=False):
            pass
        assert ended(terminal)
    assert "7 batches" in terminal.getvalue()


def test_break_and_exceptions_end_it(view, terminal):
    with view.loader(10, order="shuffle", progress=True) as loader:
        for _ in loader:
            break
        assert ended(terminal)
        with pytest.raises(ZeroDivisionError):
            fail_within(loader)
        gc.collect()
        assert ended(terminal)
        assert len(list(loader)) == 4  # it goes on where it was


def test_closing_the_loader_ends_it(view, terminal):
    loader = view.loader(10, order="shuffle", progress=True)
    source = iter(loader)
    next(source)
    assert not ended(terminal)
    loader.close()
    assert ended(terminal)
    with pytest.raises(trajstore.ClosedError):
        next(source)


def test_the_next_pass_ends_the_bar_of_one_that_was_left(view, terminal):
    with view.loader(10, order="shuffle", progress=True) as loader:
        kept = iter(loader)
        next(kept)
        assert len(list(loader)) == 5
        assert ended(terminal)


@pytest.mark.parametrize(("rank", "shown"), [(0, True), (1, False)])
def test_of_several_ranks_the_first_shows_it(view, terminal, rank, shown):
    with view.loader(10, order="shuffle", progress=True, rank=rank, world_size=2) as loader:
        list(loader)
    assert bool(terminal.getvalue()) == shown


def test_it_is_off_unless_asked_for(view, terminal):
    with view.loader(10, order="shuffle") as loader:
        list(loader)
    assert not terminal.getvalue()


def test_without_a_terminal_one_line_is_left(view, capsys):
    with view.loader(10, order="shuffle", progress=True) as loader:
        list(loader)
    printed, drawn = capsys.readouterr()
    assert not printed
    assert len(drawn.splitlines()) == 1
    assert "6/6 batches" in drawn
