"""Roll calls over a real store, several at once."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from torch.distributed import TCPStore

import moelm.distributed.watch
from moelm.distributed.watch import Watch
from moelm.distributed.world import ALONE, World

SIZE = 4


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watch]]:
    """Four processes' watches, the last one's not begun: that process is gone."""
    monkeypatch.setattr(moelm.distributed.watch, "PERIOD_S", 0.05)
    monkeypatch.setattr(moelm.distributed.watch, "PATIENCE_S", 2.0)
    store = TCPStore("127.0.0.1", 0, is_master=True)
    clients = [TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(SIZE)]
    made = [Watch(World(rank, SIZE, client), timeout_s=60) for rank, client in enumerate(clients)]
    with ExitStack() as stack:
        for watch in made[:-1]:
            stack.enter_context(watch)
        yield made


def test_all_who_ask_at_once_miss_the_same_one(watches: list[Watch]) -> None:
    told: dict[int, str] = {}

    def ask(rank: int) -> None:
        told[rank] = str(watches[rank].explain())

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(SIZE - 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == SIZE - 1
    assert all(sentence.startswith("Rank 3 of 4 does not answer") for sentence in told.values()), told


def test_nobody_is_missed_where_all_answer(watches: list[Watch]) -> None:
    with watches[-1]:
        assert watches[0].explain() is None
    assert Watch(ALONE, 60).explain() is None
