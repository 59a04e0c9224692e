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
    free, price = budget, None
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while waiting and len(begun) < threads and not stopped():
                price = cost(waiting[0]) if price is None else price
                if (begun or ending) and price > free:
                    break
                item = waiting.popleft()
                begun.append(_Flight(item, price, pool.submit(_attempt, first, item)))
                free, price = free - price, None
            if stopped():
                for flight in begun:
                    flight.outcome.cancel()
                begun.clear()
            if begun:
                flight = begun.popleft()
                value = flight.outcome.result()
                flight.outcome = Future()
                if not isinstance(value, Exception):
                    value = _attempt(middle, value)
                if value is None:
                    free += flight.cost
                    continue
                if isinstance(value, Exception):
                    flight.outcome.set_result(value)
                else:
                    flight.outcome = pool.submit(_attempt, last, value)
                del value  # the pixels: only the last stage has them now
                ending.append(flight)
            elif not ending:
                return
            while ending and (ending[0].outcome.done() or len(ending) > threads or not begun):
                flight = ending.popleft()
                outcome = flight.outcome.result()
                free += flight.cost
                yield flight.item, outcome
                del outcome
                if waiting and not begun:
                    break  # there may be room for another


def _attempt(stage: Callable[[Any], Any], value: Any) -> Any:
    try:
        return stage(value)
    except Exception as error:
        return error
