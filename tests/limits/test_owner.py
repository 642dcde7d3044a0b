"""The store that a server's workers share: exact over processes, and safe from those that die."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxserve.limits.bucket import Bucket
from jaxserve.limits.owner import OwnedStore, Owner
from jaxserve.limits.store import MemoryStore, StoreFailure, Take
from tests.limits.test_redis import TIMEOUT_S, check_total, run_processes

LIMIT = Bucket(name="tenant:a", scope="tenant", kind="tokens", rate=0.001, burst=100)


def take(id: str, units: float) -> Take:
    """A reservation."""
    return Take(id=id, buckets=(LIMIT,), units=(units,), fingerprint=id.encode())


@contextmanager
def served(path: Path, memory: MemoryStore) -> Iterator[None]:
    """The owner, in a thread of its own."""
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        owner = Owner(path, memory)
        await owner.start()
        started.set()
        await stop.wait()
        await owner.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(TIMEOUT_S)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_eight_processes_let_in_what_one_would(tmp_path):
    with served(tmp_path / "limits", MemoryStore()):
        start_s = time.monotonic()
        counts = run_processes("owner", str(tmp_path / "limits"))
        check_total(counts, time.monotonic() - start_s)


CLIENT = """
import asyncio, sys
from pathlib import Path
from jaxserve.limits.owner import OwnedStore
from tests.limits.test_owner import take

async def main():
    store = OwnedStore(Path(sys.argv[1]))
    assert (await store.take(take("dies", 60.0))).granted
    await store.renew({"dies": [25.0]})
    print("holds it", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_a_killed_worker_blocks_nobody_and_gives_back_what_it_did_not_use(tmp_path):
    memory = MemoryStore(lease_s=3600)
    path = tmp_path / "limits"

    async def level() -> float:
        store = OwnedStore(path)
        answer = await store.take(take("probe", 0.0))
        await store.settle("probe", [0.0])
        await store.close()
        return answer.levels[0]

    with served(path, memory):
        worker = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout.readline() == "holds it\n"
        assert asyncio.run(level()) == pytest.approx(40, abs=0.1)
        worker.kill()
        worker.communicate()
        deadline_s = time.monotonic() + TIMEOUT_S
        while asyncio.run(level()) < 74.9:
            assert time.monotonic() < deadline_s
        assert asyncio.run(level()) == pytest.approx(75, abs=0.1)
        assert memory.num_reservations == 0


def test_many_questions_at_once_get_their_own_answers(tmp_path):
    path = tmp_path / "limits"

    async def ask() -> None:
        store = OwnedStore(path)
        answers = await asyncio.gather(*(store.take(take(f"{n}", 10.0)) for n in range(20)))
        assert [answer.granted for answer in answers] == [True] * 10 + [False] * 10
        assert [round(answer.levels[0]) for answer in answers[:10]] == [*range(90, -1, -10)]
        cancelled = asyncio.ensure_future(store.settle("0", [0.0]))
        await asyncio.sleep(0)
        cancelled.cancel()
        assert (await store.take(take("0", 10.0))).granted  # answers have not slipped
        await store.close()

    with served(path, MemoryStore()):
        asyncio.run(ask())


def test_an_owner_that_is_gone_is_a_failure(tmp_path):
    async def ask() -> None:
        with pytest.raises(StoreFailure, match="gone"):
            await OwnedStore(tmp_path / "nothing").take(take("x", 1.0))
        owner = Owner(tmp_path / "limits")
        await owner.start()
        store = OwnedStore(owner.path)
        assert (await store.take(take("x", 1.0))).granted
        await owner.close()
        for _ in range(2):
            with pytest.raises(StoreFailure):
                await store.take(take("y", 1.0))
        await store.close()

    asyncio.run(ask())
