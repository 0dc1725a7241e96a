"""Roll calls of the watchdog over a real store, several at once."""

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
def watchdogs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watchdog]]:
    """The watchdogs of four processes; the last one is not started, like that of a dead process."""
    monkeypatch.setattr(moelm.distributed.watchdog, "POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(moelm.distributed.watchdog, "ANSWER_TIMEOUT_S", 2.0)
    store = TCPStore("127.0.0.1", 0, is_master=True)
    clients = [TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(SIZE)]
    watchdogs = [Watchdog(Ranks(rank, SIZE, client), timeout_s=60) for rank, client in enumerate(clients)]
    with ExitStack() as stack:
        for watchdog in watchdogs[:-1]:
            stack.enter_context(watchdog)
        yield watchdogs


def test_simultaneous_roll_calls_miss_the_same_rank(watchdogs: list[Watchdog]) -> None:
    messages: dict[int, str] = {}

    def explain(rank: int) -> None:
        messages[rank] = str(watchdogs[rank].explain())

    threads = [threading.Thread(target=explain, args=(rank,)) for rank in range(SIZE - 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages) == SIZE - 1
    assert all(message.startswith("Rank 3 of 4 does not respond") for message in messages.values()), messages


def test_no_rank_is_missed_if_all_respond(watchdogs: list[Watchdog]) -> None:
    with watchdogs[-1]:
        assert watchdogs[0].explain() is None
    assert Watchdog(SINGLE_PROCESS, 60).explain() is None
