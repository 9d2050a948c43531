"""Sees every collective of this process: who waits in which one, and how long each took.

`install` replaces the functions of torch.distributed, once a process, by ones that tell the
`Ledger` (for the watchdog) and the listeners (for the meter). A call costs some microseconds more;
a collective among processes costs hundreds. FSDP2 and DTensor look the functions up where they
are replaced, so their calls are seen too. A collective that torch.compile has put into a graph of
its own is not.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import distributed_c10d

from trainwright.comm.calls import FUNCTIONAL, READERS, Call, Described, describe, make_call

HISTORY = 8  # calls remembered for each group, for comparison with what other ranks called

Counter = tuple[str, str, int]  # group's key; "", "to" or "from"; the peer, -1 for a collective


class Listener(Protocol):
    """Is told of calls and of how long they took."""

    def began(self, call: Call) -> None:
        """This rank has called `call`."""

    def took(self, call: Call, seconds: float) -> None:
        """`call` has ended; for an asynchronous one this may come from another thread."""

    def took_on_device(self, call: Call, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """`call` lies on a CUDA stream between these events."""


class Ledger:
    """Where the threads of this process are, collective by collective.

    Written without a lock: each entry is of one thread, and Python's dictionaries are consistent.
    """

    def __init__(self) -> None:
        self.inside: dict[int, Call] = {}  # thread → the call that it waits for just now
        self.talkers: set[int] = set()  # threads that have called a collective
        self.counts: dict[Counter, int] = {}
        self.history: dict[str, deque[Call]] = {}  # group's key → its last collectives
        self.raised: dict[int, tuple[Call, BaseException]] = {}  # thread → what ended with an error
        self.recorders: list[Callable[[Call], None]] = []  # are told of every call before it
        self.moves = 0  # grows with every beginning and end of a call

    def number(self, described: Described) -> Call:
        """The call with its number among this rank's on the group, which it raises by one."""
        way = {"send": "to", "receive": "from"}.get(described.collective, "")
        peer = described.peer if way and described.peer is not None else -1
        counter = (described.facts.key, way, peer)
        sequence = self.counts[counter] = self.counts.get(counter, 0) + 1
        call = make_call(described, sequence)
        if not way:
            self.history.setdefault(call.facts.key, deque(maxlen=HISTORY)).append(call)
        for record in self.recorders:
            record(call)
        return call

    def enter(self, call: Call) -> int:
        """This thread waits for `call` from now on; the thread."""
        thread = threading.get_ident()
        self.talkers.add(thread)
        self.inside[thread] = call
        self.moves += 1
        return thread

    def leave(self, thread: int) -> None:
        """The thread waits no longer."""
        self.inside.pop(thread, None)
        self.moves += 1

    def failed_call(self, error: BaseException | None) -> Call | None:
        """The collective that `error`, or what caused it, came out of."""
        while error is not None:
            for call, raised in list(self.raised.values()):
                if raised is error:
                    return call
            error = error.__cause__ or error.__context__
        return None


LEDGER = Ledger()

_listeners: list[Listener] = []
_inner = threading.local()  # collectives called by collectives are not counted again
_pending: weakref.WeakKeyDictionary[dist.Work, tuple[Call, Any]] = weakref.WeakKeyDictionary()
_functional_calls: dict[int, Call] = {}  # thread → its last one, waited for later
_originals: dict[tuple[Any, str], Callable[..., Any]] = {}


def listen(listener: Listener) -> None:
    """Tell `listener` of all calls from now on."""
    install()
    _listeners.append(listener)


def stop_listening(listener: Listener) -> None:
    """Tell `listener` no more."""
    _listeners.remove(listener)


def install() -> None:
    """Replace the collectives of torch.distributed; a second call does nothing."""
    if _originals:
        return
    for name in READERS:
        short = name.removeprefix(FUNCTIONAL)
        places = [functional] if name != short else [distributed_c10d, dist]
        original = getattr(places[0], short, None)
        if original is None:  # older torch has not all of them
            continue
        _replace(places, short, _seen(name, original))
    _replace([functional], "wait_tensor", _seen_tensor_wait(functional.wait_tensor))
    _replace([dist.Work], "wait", _seen_wait(dist.Work.wait))


def _replace(places: Sequence[Any], name: str, seen: Callable[..., Any]) -> None:
    # A compiled function calls this one as it is, instead of tracing through the bookkeeping.
    seen = torch.compiler.disable(seen)
    for place in places:
        _originals[place, name] = getattr(place, name)
        setattr(place, name, seen)


def seen(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: our own way of doing the collective `name`, seen as that one is."""
    return lambda function: torch.compiler.disable(_seen(name, function))


def _seen(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, with the ledger and the listeners told."""
    is_functional = name.startswith(FUNCTIONAL)

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inner, "busy", False):
            return original(*args, **kwargs)
        described = describe(name, args, kwargs)
        if described is None:
            return original(*args, **kwargs)
        call = LEDGER.number(described)
        for listener in _listeners:
            listener.began(call)
        clock = _Clock(described.on_cuda)
        result = _inside(call, original, args, kwargs)
        if is_functional:
            _functional_calls[threading.get_ident()] = call
        if isinstance(result, dist.Work):
            _follow(result, call, clock)
        else:
            clock.stop(call)
        return result

    return collective


def _inside(call: Call, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call `original`, in the ledger as waiting for `call`."""
    thread = LEDGER.enter(call)
    _inner.busy = True
    try:
        return original(*args, **kwargs)
    except BaseException as error:
        LEDGER.raised[thread] = (call, error)
        raise
    finally:
        _inner.busy = False
        LEDGER.leave(thread)


class _Clock:
    """Time since a call began: of the host, or of the CUDA stream that it was put on."""

    def __init__(self, on_cuda: bool) -> None:
        self.event: torch.cuda.Event | None = None
        if on_cuda and _listeners:
            self.event = _record_event()
        self.began = time.perf_counter()

    def stop(self, call: Call) -> None:
        """Tell the listeners that `call` has ended now, or will where the stream stands now."""
        end = None if self.event is None else _record_event()
        for listener in _listeners:
            if self.event is None or end is None:
                listener.took(call, time.perf_counter() - self.began)
            else:
                listener.took_on_device(call, self.event, end)


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _follow(work: dist.Work, call: Call, clock: _Clock) -> None:
    """See that the time of an asynchronous call is told, when it ends or is waited for."""
    if clock.event is None and call.peer is None and _listeners:
        try:
            future = work.get_future()
        except RuntimeError:  # not every backend has them
            pass
        else:
            future.then(lambda _: clock.stop(call))
            _pending[work] = (call, None)
            return
    _pending[work] = (call, clock)


def _seen_wait(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Work.wait`, with the ledger told what is waited for."""

    @functools.wraps(original)
    def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        known = None if getattr(_inner, "busy", False) else _pending.pop(work, None)
        if known is None:
            return original(work, *args, **kwargs)
        call, clock = known
        if clock is not None and clock.event is None:
            # When a message arrived is not known, only how long this rank had to wait for it.
            clock.began = time.perf_counter()
        result = _inside(call, original, (work, *args), kwargs)
        if clock is not None:
            clock.stop(call)
        return result

    return wait


def _seen_tensor_wait(original: Callable[..., Any]) -> Callable[..., Any]:
    """The wait of a functional collective, which names no call: the thread's last one is meant."""

    @functools.wraps(original)
    def wait_tensor(tensor: torch.Tensor) -> torch.Tensor:
        busy = getattr(_inner, "busy", False)
        call = None if busy else _functional_calls.pop(threading.get_ident(), None)
        if call is None:
            return original(tensor)
        began = time.perf_counter()
        result = _inside(call, original, (tensor,), {})
        for listener in _listeners:
            listener.took(call, time.perf_counter() - began)
        return result

    return wait_tensor
