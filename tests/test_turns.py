"""Turns at a model: one thread at a time, a thread within its own, copies apart, and no model is kept."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

from at_once import at_once
from torch import nn

from consistency_lens.turns import in_turn


def others_wait(model: nn.Module) -> bool:
    """Whether another thread would have to wait for its turn at the model."""

    def takes_it() -> bool:
        lock = in_turn(model)
        taken = lock.acquire(blocking=False)
        if taken:
            lock.release()
        return taken

    with ThreadPoolExecutor(1) as other:
        return not other.submit(takes_it).result()


def test_one_thread_at_a_time():
    model, inside, met = nn.Linear(1, 1), [], []

    def stay():
        with in_turn(model):
            inside.append(None)
            met.append(len(inside))
            inside.pop()

    at_once(stay, stay, times=200)
    assert met == [1] * 400


def test_others_wait_for_the_end_of_the_outermost():
    model = nn.Linear(1, 1)
    with in_turn(model):
        with in_turn(model):
            pass
        assert others_wait(model)
    assert not others_wait(model)


def test_a_copy_has_turns_of_its_own():
    model = nn.Linear(1, 1)
    with in_turn(model):
        assert not others_wait(copy.deepcopy(model))


def test_no_model_is_kept():
    model = nn.Linear(1, 1)
    with in_turn(model):
        gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
