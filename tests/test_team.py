"""Threads that stay together: each piece of work is done once, by however many come, and none is waited for in vain."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed")

from skipjack.kernels.cpu import openmp
from skipjack.kernels.cpu.lanes import kernel, put_whole, whole
from skipjack.kernels.cpu.team import (
    added,
    assembled,
    dealt,
    dismissed,
    help_out,
    joined_first,
    taken,
    worker,
)

pytestmark = pytest.mark.skipif(not openmp.team(), reason="PyTorch has no OpenMP library that can be called here")
PIECES = 300


@worker
def some(block):
    """Marks pieces until none is left: counts [1 + pieces], the first of which is that of pieces taken."""
    counts, pieces = block[0], block[1]
    piece = taken(counts)
    while piece < pieces:
        added(counts + 8 * (1 + piece), 1)
        piece = taken(counts)


@worker
def deal(block):
    """The first deals out block[0] works, of block[2] pieces each, whose rows of counts lie at block[1]."""
    works, counts, pieces, crew = block[0], block[1], block[2], block[4]
    if joined_first(crew):
        own = np.empty(2, np.int64)
        for i in range(works):
            own[0], own[1] = counts + 8 * i * (1 + pieces), pieces
            dealt(crew, block[3], own.ctypes.data, 2)
            # Whatever comes after a work finds it done.
            put_whole(counts + 8 * i * (1 + pieces), -1 - whole(counts + 8 * (i + 1) * (1 + pieces) - 8))
        own[0] = 0
        dismissed(crew)
    else:
        help_out(crew)


@kernel("void(int64, int64, int64, int64)")
def run(block, deals, threads, team):
    crew = assembled(team)
    put_whole(block + 32, crew.ctypes.data)
    dealt(team, deals, block, threads)
    crew[0] = 0


def works(count: int, threads: int) -> np.ndarray:
    counts = np.zeros((count, 1 + PIECES), np.int64)
    block = np.array([count, counts.ctypes.data, PIECES, some.address, 0], np.int64)
    run(block.ctypes.data, deal.address, threads, openmp.team())
    return counts


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_every_piece_of_every_work_is_done_once(threads: int) -> None:
    """More threads than processors too, and with others that keep these busy."""
    for busy in (0, 3):
        with Others(busy):
            counts = works(400, threads)
        assert (counts[:, 1:] == 1).all()
        assert (counts[:, 0] == -2).all(), "the last piece was done when the next work came"


def test_crews_of_several_threads_do_not_meet() -> None:
    with ThreadPoolExecutor(4) as pool:
        for counts in pool.map(lambda _: works(100, 2), range(16)):
            assert (counts[:, 1:] == 1).all()


class Others:
    """Threads that compute without Python's lock until the end of the block."""

    def __init__(self, count: int) -> None:
        self._on = np.ones(1, np.int64)
        self._threads = [threading.Thread(target=_spin, args=(self._on.ctypes.data,)) for _ in range(count)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._on[0] = 0
        for thread in self._threads:
            thread.join()


@kernel("void(int64)")
def _spin(on):
    while added(on, 0):
        pass
