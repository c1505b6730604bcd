"""Transitions that tell which they are, and ObjectRL's buffer held against a list of them."""

import pytest
import torch
from tensordict import TensorDict

from tests.buffers.test_ring import ListRing
from trajstore.errors import EmptyBufferError

FIELDS = ("state", "next_state", "action", "reward", "terminated", "step", ("info", "note"))


def transition(number):
    return TensorDict(
        {
            "state": torch.tensor([number, number + 0.5]),
            "next_state": torch.tensor([number + 1, number + 1.5]),  # also the store's name for a state one step on
            "action": torch.tensor([number % 7]),
            "reward": torch.tensor(float(-number)),
            "terminated": torch.tensor(number % 3 == 0),
            "step": torch.tensor(number + 1000),  # also one of the store's virtual columns
            "info": {"note": torch.tensor(number % 100, dtype=torch.bfloat16)},
        }
    )


def transitions(numbers):
    return torch.stack([transition(number) for number in numbers])


def assert_are(batch, numbers):
    wanted = transitions(numbers)
    assert isinstance(batch, TensorDict)
    assert batch.batch_size == torch.Size([len(numbers)])
    assert batch.device == torch.device("cpu")
    assert set(batch.keys(True, True)) == set(FIELDS)
    for field in FIELDS:
        assert batch[field].dtype is wanted[field].dtype
        assert torch.equal(batch[field], wanted[field])


def assert_holds(buffer, model):
    held = model.held()
    assert len(buffer) == buffer.size == buffer.data_size == len(held)
    assert (buffer.buffer_size, buffer.pointer) == (len(model.rows), model.pointer)
    if held:
        assert_are(buffer.sample_all(), held)
    else:
        with pytest.raises(EmptyBufferError):
            buffer.sample_all()


def filled(buffer, n):
    buffer.add_batch(transitions(range(n)))
    model = ListRing(buffer.buffer_size)
    for number in range(n):
        model.add(number)
    return model
