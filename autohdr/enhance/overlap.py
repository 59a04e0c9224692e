"""Three stages for each of many items: the first and the last in threads, the middle one where it is called from."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass
class _Flight:
    """An item that has begun, with what the last stage that it was given to makes of it."""

    item: Any
    cost: int
    outcome: Future


def overlap(
    items: Iterable[Any],
    first: Callable[[Any], Any],
    middle: Callable[[Any], Any],
    last: Callable[[Any], Any],
    *,
    threads: int,
    cost: Callable[[Any], int],
    budget: int,
    stopped: Callable[[], Any],
) -> Generator[tuple[Any, Any]]:
    """Yields (item, last(middle(first(item)))) in the items' order, or (item, the Exception that a stage raised).

    At most 2 · threads + 1 items have begun and not ended, fewer where they would cost more than the budget; one always may.
    Once stopped() is true none begins, and those before the middle stage are given up, as is one for which it returns None.
    """
    waiting, begun, ending = deque(items), deque[_Flight](), deque[_Flight]()
    flying, free, price = 0, budget, None
    with ThreadPoolExecutor(threads) as pool:

        def begin() -> None:
            nonlocal flying, free, price
            while waiting and len(begun) < threads and not stopped():
                price = cost(waiting[0]) if price is None else price
                if flying and price > free:
                    return
                item = waiting.popleft()
                begun.append(_Flight(item, price, pool.submit(_attempt, first, item)))
                flying, free, price = flying + 1, free - price, None

        def end(flight: _Flight) -> tuple[Any, Any]:
            nonlocal flying, free
            outcome = flight.outcome.result()
            flying, free = flying - 1, free + flight.cost
            return flight.item, outcome

        while True:
            begin()
            if stopped():
                for flight in begun:
                    flight.outcome.cancel()
                begun.clear()
            if begun:
                flight = begun.popleft()
                value = flight.outcome.result()
                begin()  # the threads have something to do during the middle stage
                if not isinstance(value, Exception):
                    value = _attempt(middle, value)
                if value is None:
                    end(flight)
                    continue
                if isinstance(value, Exception):
                    flight.outcome = Future()
                    flight.outcome.set_result(value)
                else:
                    flight.outcome = pool.submit(_attempt, last, value)
                del value  # the pixels: only the last stage has them now
                ending.append(flight)
            elif ending:
                yield end(ending.popleft())
            else:
                return
            while ending and (len(ending) > threads or ending[0].outcome.done()):
                yield end(ending.popleft())


def _attempt(stage: Callable[[Any], Any], value: Any) -> Any:
    try:
        return stage(value)
    except Exception as error:
        return error
