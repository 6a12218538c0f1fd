"""Threads take turns at a model whose passes change it.

Some passes hang hooks on a model for a while, exchange its attention or leave blocks out. Another thread's pass would
meanwhile run what was changed for this one, or take it for the usual and put it back at its end.
"""

from contextlib import AbstractContextManager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

# By the model, as several subjects may read one; and beside it, as a lock can be neither copied nor pickled: a copy of
# a model has turns of its own. Weakly, for no model is to live on here.
_turns: WeakKeyDictionary[nn.Module, AbstractContextManager] = WeakKeyDictionary()
_adding = Lock()


def in_turn(model: nn.Module) -> AbstractContextManager:
    """Inside the `with` block it is this thread's turn at the model; others that want theirs wait.

    A thread may take its turn within its own. It has to leave it before a backward pass: on GPUs that runs in a thread
    of autograd's, which wants a turn for what a checkpoint runs again.
    """
    with _adding:
        return _turns.setdefault(model, RLock())
