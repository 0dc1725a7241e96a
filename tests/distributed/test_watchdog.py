"""Roll calls over a real store, several at once."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from torch.distributed import TCPStore

import moelm.distributed.watchdog
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.distributed.watchdog import Watchdog

SIZE = 4


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watchdog]]:
    """Four processes' watches, the last one's not begun: that process is gone."""
    monkeypatch.setattr(moelm.distributed.watchdog, "POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(moelm.distributed.watchdog, "ANSWER_TIMEOUT_S", 2.0)
    store = TCPStore("127.0.0.1", 0, is_master=True)
    clients = [TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(SIZE)]
    made = [Watchdog(Ranks(rank, SIZE, client), timeout_s=60) for rank, client in enumerate(clients)]
    with ExitStack() as stack:
        for watchdog in made[:-1]:
            stack.enter_context(watchdog)
        yield made


def test_all_who_ask_at_once_miss_the_same_one(watches: list[Watchdog]) -> None:
    told: dict[int, str] = {}

    def ask(rank: int) -> None:
        told[rank] = str(watches[rank].explain())

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(SIZE - 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == SIZE - 1
    assert all(sentence.startswith("Rank 3 of 4 does not respond") for sentence in told.values()), told


def test_nobody_is_missed_where_all_answer(watches: list[Watchdog]) -> None:
    with watches[-1]:
        assert watches[0].explain() is None
    assert Watchdog(SINGLE_PROCESS, 60).explain() is None
