"""Batches of requests under a latency budget: what waits while a worker is busy goes together, by length.

Nobody waits for company: a free worker takes the oldest request and those of its kind and length that wait behind it, as
many as the time that such requests took lately lets into the budget (Crankshaw et al., "Clipper", NSDI 2017, size batches
likewise). Workers are threads that share one model, for the engine runs outside Python's lock.
"""

import asyncio
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

Work = Callable[[list[Any], list[int]], list[Any]]

MOST_TOGETHER = 64
UNKNOWN_COST = 0.005
"""Seconds that a request is thought to take before one of its kind was measured."""


class Busy(Exception):
    """The queue is full, or would answer after the deadline; `seconds` until it is worth trying again."""

    def __init__(self, seconds: float) -> None:
        super().__init__("busy")
        self.seconds = max(1, math.ceil(seconds))


class Late(Exception):
    """The deadline passed before the request was begun."""


@dataclass(eq=False)
class _Job:
    request: Any
    wanted: int
    deadline: float
    cost: float
    done: "asyncio.Future[Any]"


@dataclass(eq=False)
class _Kind:
    """Requests that may go together: one function of one model, lengths up to the same power of two."""

    work: Work
    waiting: "deque[_Job]" = field(default_factory=deque)
    cost: float = UNKNOWN_COST


class Batcher:
    """Run requests in batches on `workers` threads; all methods belong to the event loop's thread.

    `budget` is the time that a batch may take, in seconds; `most_waiting` bounds the queue. `observe` is told the size and
    the seconds of each batch.
    """

    def __init__(
        self, workers: int, budget: float, most_waiting: int, observe: Callable[[int, float], None] | None = None
    ) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        self._workers, self._free = workers, workers
        self._budget, self._most_waiting = budget, most_waiting
        self._observe = observe or (lambda size, seconds: None)
        self._kinds: dict[tuple[Work, int], _Kind] = {}
        self._kept: tuple[Work, ...] | None = None
        self.waiting = 0
        self._ahead = 0.0
        # turns of requests that wait for room outside of the queue
        self._read: deque[asyncio.Future[None]] = deque()
        self._unread: deque[asyncio.Future[None]] = deque()

    async def admit(self, deadline: float) -> None:
        """Wait until the queue has room for a request that was not read yet, for half of the time to `deadline`.

        It costs nothing to wait and something to refuse: a client that is refused at once asks again at once, and the
        interpreter is busy with refusals instead of answers. `deadline` is in the loop's time.

        Raises:
            Busy: there is no room yet, or what waits already takes until after the deadline.
        """
        await self._room(deadline)

    async def _room(self, deadline: float, cost: float = 0.0, count: int = 0) -> None:
        """Wait for room for `count` requests that were read and take `cost` seconds, or for one that was not read.

        Those that were read come first, and while one of them waits no other is read.
        """
        loop = asyncio.get_running_loop()
        until = (loop.time() + deadline) / 2
        while True:
            wait = (self._ahead + cost) / self._workers
            late = self._ahead and loop.time() + wait > deadline
            if self.waiting + max(1, count) <= self._most_waiting and not late and (count or not self._read):
                self._wake(1)  # there may be room for one more
                return
            if count > self._most_waiting or loop.time() >= until:
                raise Busy(wait)
            turn, outside = loop.create_future(), self._read if count else self._unread
            outside.append(turn)
            try:
                async with asyncio.timeout_at(until):
                    await turn
            except BaseException as fault:
                if turn.done() and not turn.cancelled():
                    self._wake(1)  # the turn that it cannot take any more
                elif turn in outside:
                    outside.remove(turn)
                if isinstance(fault, TimeoutError):
                    raise Busy(wait) from None
                raise

    def _wake(self, count: int) -> None:
        """Let so many of those outside look again, those that were read first."""
        for outside in (self._read, self._unread):
            while count and outside:
                if not (turn := outside.popleft()).done():
                    turn.set_result(None)
                    count -= 1

    async def run(
        self, work: Work, requests: Sequence[Any], wanted: Sequence[int], lengths: Sequence[int], deadline: float
    ) -> list[Any]:
        """Return what `work` makes of the requests, all of them or none; `deadline` is in the loop's time.

        Raises:
            Busy: the queue has no room for them, or they would be late.
            Late: the deadline passed before the last of them was begun.
        """
        loop = asyncio.get_running_loop()
        await self._room(deadline, sum(self._kind(work, length).cost for length in lengths), len(requests))
        # taken only now: while it waited for room, a kind that nothing waited for may have been let go
        kinds = [self._kind(work, length) for length in lengths]
        jobs = []
        for kind, request, count in zip(kinds, requests, wanted, strict=True):
            jobs.append(_Job(request, count, deadline, kind.cost, loop.create_future()))
            kind.waiting.append(jobs[-1])
            self.waiting += 1
            self._ahead += kind.cost
        self._dispatch()
        try:
            return [await jobs[0].done] if len(jobs) == 1 else await asyncio.gather(*(job.done for job in jobs))
        except BaseException:
            for job in jobs:
                job.done.cancel()
            raise

    def keep(self, *works: Work) -> None:
        """Let go of all other functions, and so of their models, once nothing waits for them."""
        self._kept = works
        self._prune()

    def close(self) -> None:
        """End the workers after the batches that they are at."""
        self._pool.shutdown()

    def _prune(self) -> None:
        if self._kept is not None:
            for key in [key for key, kind in self._kinds.items() if key[0] not in self._kept and not kind.waiting]:
                del self._kinds[key]

    def _kind(self, work: Work, length: int) -> _Kind:
        bucket = max(16, 1 << max(0, length - 1).bit_length())
        key = (work, bucket)
        if key not in self._kinds:
            self._kinds[key] = _Kind(work)
        return self._kinds[key]

    def _dispatch(self) -> None:
        while self._free and (batch := self._next()):
            kind, jobs = batch
            self._free -= 1
            task = asyncio.get_running_loop().run_in_executor(self._pool, _timed, kind.work, jobs)
            task.add_done_callback(functools.partial(self._finish, kind, jobs))

    def _next(self) -> tuple[_Kind, list[_Job]] | None:
        """Take the oldest request and its like; answer those on the way that are too late."""
        now = asyncio.get_running_loop().time()
        while heads := [kind for kind in self._kinds.values() if kind.waiting]:
            kind = min(heads, key=lambda kind: kind.waiting[0].deadline)
            most = min(MOST_TOGETHER, max(1, int(self._budget / kind.cost)))
            jobs: list[_Job] = []
            while kind.waiting and len(jobs) < most:
                job = kind.waiting.popleft()
                self.waiting -= 1
                self._ahead = max(0.0, self._ahead - job.cost) if self.waiting else 0.0
                if job.done.done():
                    continue
                if job.deadline < now:
                    job.done.set_exception(Late())
                    continue
                jobs.append(job)
            if jobs:
                return kind, jobs
        return None

    def _finish(self, kind: _Kind, jobs: list[_Job], done: "asyncio.Future[tuple[list[Any], float]]") -> None:
        self._free += 1
        answers, seconds = done.result()
        # an average that forgets: processors slow down, and requests of one length differ
        kind.cost += 0.2 * (seconds / len(jobs) - kind.cost)
        self._observe(len(jobs), seconds)
        self._wake(len(jobs))
        for job, answer in zip(jobs, answers, strict=True):
            if job.done.done():
                continue
            if isinstance(answer, Exception):
                job.done.set_exception(answer)
            else:
                job.done.set_result(answer)
        self._dispatch()
        self._prune()


def _timed(work: Work, jobs: list[_Job]) -> tuple[list[Any], float]:
    """Run a batch; one that fails is run again request by request, so that a fault stays with its own request."""
    start = perf_counter()
    answers = _run(work, jobs)
    if isinstance(answers[0], Exception) and len(jobs) > 1:
        answers = [_run(work, [job])[0] for job in jobs]
    return answers, perf_counter() - start


def _run(work: Work, jobs: list[_Job]) -> list[Any]:
    try:
        return work([job.request for job in jobs], [job.wanted for job in jobs])
    except Exception as fault:
        return [fault] * len(jobs)
