"""How a target is asked: threads, a deadline, a circuit breaker and a hedge of its own.

One that is slow or gone costs the others nothing. A ranking changes nothing, so a target that is slower than it mostly is
may be asked for it a second time; the first valid answer counts.
"""

import asyncio
import bisect
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from serve.targets import Call, Gone, Stop
from serve.trace import Trace

T = TypeVar("T")
"""What a target answers, e.g. `serve.targets.Heard`."""

WINDOW = 256
"""Times of a target that its delay is learned from: the latest ones."""

LEAST_TIMES = 32
"""Times that must be known before a target is asked twice."""

LEAST_DELAY = 0.005
"""Seconds below which a delay tells nothing of the target, but of this process and its machine."""

CALM = 10.0
"""Seconds without a hedge after a target said that it is busy."""


class Breaker:
    """Ask no more after `most` faults in a row, for a time that doubles with each further one from 0.5 to `longest` seconds.

    When it is over, one call tries; the others still get no answer until it succeeds (Nygard, "Release It!", 2007).
    """

    def __init__(
        self, most: int = 5, clock: Callable[[], float] = time.monotonic, longest: float = 30.0
    ) -> None:  # fmt: skip
        self._most, self._clock, self._longest = most, clock, longest
        self._faults, self._until, self._trying = 0, 0.0, False

    @property
    def open(self) -> bool:
        """Whether the next call would get no answer."""
        return self._faults >= self._most and (self._trying or self._clock() < self._until)

    @property
    def closed(self) -> bool:
        """Whether calls pass without being a try."""
        return self._faults < self._most

    def begin(self) -> bool:
        """Let a call pass; say whether it is the one that tries.

        Raises:
            Gone: the breaker is open.
        """
        if self.open:
            raise Gone("open", fault=False)
        tries = self._faults >= self._most
        self._trying |= tries
        return tries

    def end(self, *, fault: bool | None, tried: bool = False) -> None:
        """Note how a call ended that was let pass, and whether it `tried`; None says nothing of the target."""
        if tried:
            self._trying = False
        elif fault and self._faults >= self._most:
            return  # begun before it opened: one pause of the target is not as many faults as calls were on their way
        if fault is None:
            return
        self._faults = self._faults + 1 if fault else 0
        if self._faults >= self._most:
            self._until = self._clock() + min(self._longest, 0.5 * 2.0 ** (self._faults - self._most))


class Hedge:
    """When a target is asked a second time (Dean and Barroso, "The Tail at Scale", CACM 2013).

    The delay is the `quantile` of the target's latest times. Each question earns `share` of a hedge and each hedge costs a
    whole one, so that of n questions at most share * n are asked twice, however slow the target is; `kept` of them can be
    saved for a slow moment. The bucket is that of gRPC's retry throttling (proposal A6), begun empty.
    """

    def __init__(
        self, share: float = 0.05, quantile: float = 0.95, kept: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._share, self._quantile, self._kept, self._clock = share, quantile, kept, clock
        self._earned, self._calm_until = 0.0, -math.inf
        self._times: deque[float] = deque()
        self._ordered: list[float] = []

    @property
    def delay(self) -> float:
        """Seconds after which a question is asked again; infinite until enough times are known."""
        if len(self._times) < LEAST_TIMES:
            return math.inf
        return max(LEAST_DELAY, self._ordered[math.ceil(self._quantile * len(self._times)) - 1])

    def earn(self) -> None:
        """Count a question."""
        self._earned = min(self._kept, self._earned + self._share)

    def spend(self) -> bool:
        """Say whether a question may be asked again now, and count it if so."""
        # a share such as 0.05, added twenty times, is a little less than 1
        if self._earned < 1 - 1e-9 or self._clock() < self._calm_until:
            return False
        self._earned -= 1
        return True

    def learn(self, seconds: float) -> None:
        """Note how long a question took: to its first answer, or to its deadline.

        Where the second call won, the first would have taken longer than that; it is above the delay all the same, so the
        quantile stays where it is.
        """
        if len(self._times) == WINDOW:
            self._ordered.pop(bisect.bisect_left(self._ordered, self._times.popleft()))
        self._times.append(seconds)
        bisect.insort(self._ordered, seconds)

    def calm(self) -> None:
        """Ask nothing twice for a while: the target has more to do than it can."""
        self._calm_until = self._clock() + CALM


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of a question: the answer or None, "spoke" or why there is none, and, where it was asked twice, whether
    the second call "won" or "lost"."""

    heard: T | None
    state: str
    hedge: Literal["won", "lost"] | None = None


class Target(Generic[T]):
    """One target by name; `seconds` is its deadline, if shorter than the request's, `usual` what a request gives it mostly.

    A client may give less than both. That this is too little is no fault of the target, and none of the other clients'.
    """

    def __init__(
        self, name: str, send: Callable[[Call], T], seconds: float, threads: int = 16, hedge: Hedge | None = None,
        breaker: Breaker | None = None, usual: float = math.inf,
    ) -> None:  # fmt: skip
        self.name, self.breaker, self.hedge = name, breaker or Breaker(), hedge or Hedge()
        self._send, self._seconds, self._fair = send, seconds, min(seconds, usual)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        # of their own: where slow calls hold all threads, a second call must not wait behind them
        self._again = ThreadPoolExecutor(max(1, threads // 4), thread_name_prefix=f"{name}-again")

    async def ask(
        self, document: dict[str, Any], seconds: float, request_id: str, trace: Trace | None = None
    ) -> Outcome[T]:
        """Return what became of a question within the deadline."""
        try:
            tries = self.breaker.begin()
        except Gone as gone:
            return Outcome(None, gone.why)
        self.hedge.earn()
        hurried = seconds < self._fair
        seconds = min(seconds, self._seconds)
        calls = [_Running(self._pool, self._send, Call(document, seconds, request_id, trace))]
        start = time.monotonic()
        fault: bool | None = True
        try:
            async with asyncio.timeout(seconds):
                winner = await self._race(calls, hurried)
            heard = winner.future.result()
            fault = False
            self.hedge.learn(time.monotonic() - start)
            return Outcome(heard, "spoke", _told(calls, winner))
        except TimeoutError:
            if hurried:
                fault = None
            else:
                self.hedge.learn(seconds)
            return Outcome(None, "late", _told(calls))
        except Gone as gone:
            fault = None if hurried and gone.why in ("late", "busy") else gone.fault
            return Outcome(None, gone.why, _told(calls))
        except asyncio.CancelledError:
            fault = None  # nobody waits any more, which is not the target's doing
            raise
        finally:
            self.breaker.end(fault=fault, tried=tries)
            for call in calls:
                call.let_go()

    async def _race(self, calls: list["_Running[T]"], hurried: bool) -> "_Running[T]":
        """Return the call that was answered first, the question's first one where none was; add the second to `calls`."""
        first, delay = calls[0], self.hedge.delay
        left = first.call.seconds - delay
        if left > 0:
            await asyncio.wait([first.future], timeout=delay)
            if not first.future.done() and self.breaker.closed and self.hedge.spend():
                again = dataclasses.replace(first.call, seconds=left, again=True, stop=Stop(), asked=time.monotonic())
                calls.append(_Running(self._again, self._send, again))
        waiting = {call.future: call for call in calls}
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                call = waiting.pop(future)
                if (why := future.exception()) is None:
                    return call
                if isinstance(why, Gone) and why.why == "busy" and not hurried:
                    self.hedge.calm()
        return first

    def close(self) -> None:
        """Let its threads end."""
        for pool in (self._pool, self._again):
            pool.shutdown(wait=False, cancel_futures=True)


class _Running(Generic[T]):
    """A call in a thread."""

    def __init__(self, pool: ThreadPoolExecutor, send: Callable[[Call], T], call: Call) -> None:
        self.call = call
        self.future = asyncio.get_running_loop().run_in_executor(pool, send, call)

    def let_go(self) -> None:
        """End it where it still runs; what it would say is not heard."""
        if self.future.cancel():
            self.call.stop()
        elif not self.future.cancelled():
            self.future.exception()  # asyncio complains of a fault that nobody has looked at


def _told(calls: list[_Running[T]], winner: _Running[T] | None = None) -> Literal["won", "lost"] | None:
    if len(calls) == 1:
        return None
    return "won" if winner is calls[1] else "lost"
