"""Two parties at one storage, one call at a time: in every order, or in some that are drawn."""

from __future__ import annotations

import contextlib
import itertools
import threading

import numpy as np

from trajstore.errors import TrajstoreError


class Stepped:
    """Runs one party in a thread, one storage call at a time."""

    def __init__(self, body):
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.done = False
        self.error = None
        self._thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self._thread.start()
        assert self._stopped.acquire(timeout=30)

    def before(self, name, key):
        self._stopped.release()
        assert self._go.acquire(timeout=30)

    def _run(self, body):
        self._stopped.release()
        self._go.acquire()
        try:
            body(self.before)
        except Exception as error:
            self.error = error
        self.done = True
        self._stopped.release()

    def step(self):
        """Up to its next call, or its end."""
        self._go.release()
        assert self._stopped.acquire(timeout=30)

    def finish(self):
        while not self.done:
            self.step()


def interleavings(first_calls, second_calls):
    """For each of the first's steps, how many of the second's come before it: every way to mix them."""
    return itertools.combinations_with_replacement(range(second_calls + 1), first_calls)


def enumerate_all(make, first, second, check):
    """Every interleaving of the calls of two parties on a fresh store each; how many there were."""
    # How many calls each makes alone; whoever has more to do beside the other does the rest at the end.
    counts = []
    for party in (first, second):
        calls = []
        world = make()
        with contextlib.suppress(TrajstoreError):
            party(world, lambda name, key, calls=calls: calls.append(key))
        counts.append(len(calls))
    count = 0
    for places in interleavings(*counts):
        world = make()
        one = Stepped(lambda before, world=world: first(world, before))
        two = Stepped(lambda before, world=world: second(world, before))
        one.step()  # up to the first call of each
        two.step()
        taken = 0
        for place in places:
            while taken < place and not two.done:
                two.step()
                taken += 1
            if not one.done:
                one.step()
        one.finish()
        two.finish()
        check(world, one, two)
        count += 1
    return count


def draw_some(make, first, second, check, *, count):
    """So many interleavings, drawn at random."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        world = make()
        parties = [Stepped(lambda before, world=world, party=party: party(world, before)) for party in (first, second)]
        bias = rng.random()
        while not all(party.done for party in parties):
            chosen = int(rng.random() < bias)
            party = parties[1 - chosen] if parties[chosen].done else parties[chosen]
            for _ in range(rng.integers(1, 5)):
                if not party.done:
                    party.step()
        check(world, *parties)
