"""Roll calls of the watchdog over a real store, several at once, and their growth with the number of processes."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
from torch.distributed import HashStore, Store, TCPStore

import moelm.distributed.watchdog
from moelm.distributed.ranks import SINGLE_PROCESS, Ranks
from moelm.distributed.watchdog import Watchdog

SIZE = 4


def watchdogs_of(stores: Sequence[Store]) -> list[Watchdog]:
    """The watchdogs of several processes, all in this one, and none of them started."""
    return [Watchdog(Ranks(rank, len(stores), store), timeout_s=60) for rank, store in enumerate(stores)]


def explain_all(watchdogs: list[Watchdog]) -> list[str]:
    """What each of the watchdogs explains, all at once."""
    messages = dict.fromkeys(range(len(watchdogs)), "")

    def explain(number: int) -> None:
        messages[number] = str(watchdogs[number].explain())

    threads = [threading.Thread(target=explain, args=(number,)) for number in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(messages.values())


@pytest.fixture
def watchdogs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watchdog]]:
    """The watchdogs of four processes; the last one is not started, like that of a dead process."""
    monkeypatch.setattr(moelm.distributed.watchdog, "POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(moelm.distributed.watchdog, "WAIT_INTERVAL_S", 0.02)
    monkeypatch.setattr(moelm.distributed.watchdog, "ANSWER_TIMEOUT_S", 1.0)
    store = TCPStore("127.0.0.1", 0, is_master=True)
    watchdogs = watchdogs_of([TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(SIZE)])
    with ExitStack() as stack:
        for watchdog in watchdogs[:-1]:
            stack.enter_context(watchdog)
        yield watchdogs


def test_simultaneous_roll_calls_miss_the_same_rank(watchdogs: list[Watchdog]) -> None:
    messages = explain_all(watchdogs[:-1])
    assert len(messages) == SIZE - 1
    assert all(message.startswith("Rank 3 of 4 does not respond") for message in messages), messages


def test_a_later_roll_call_misses_a_rank_that_answered_an_earlier_one(watchdogs: list[Watchdog]) -> None:
    with watchdogs[-1]:
        assert watchdogs[0].explain() is None
    time.sleep(moelm.distributed.watchdog.ANSWER_TIMEOUT_S)
    assert str(watchdogs[1].explain()).startswith("Rank 3 of 4 does not respond")


@pytest.mark.slow(seconds=5)
def test_none_of_256_living_ranks_is_missed_by_256_roll_calls() -> None:
    watchdogs = watchdogs_of([HashStore()] * 256)
    with ExitStack() as stack:
        for watchdog in watchdogs:
            stack.enter_context(watchdog)
        assert explain_all(watchdogs) == ["None"] * 256


def test_no_rank_is_missed_if_all_respond(watchdogs: list[Watchdog]) -> None:
    with watchdogs[-1]:
        assert watchdogs[0].explain() is None
    assert Watchdog(SINGLE_PROCESS, 60).explain() is None
