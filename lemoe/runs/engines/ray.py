"""Rounds trained by Ray actors, on this machine or on a cluster (the extra `ray`).

Each worker loads the base once. Ray starts workers that die anew, and gives their rounds out again.
"""

import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lemoe.adaptor.state import AdaptorState
from lemoe.base.fingerprint import Fingerprint
from lemoe.base.loading import BaseModel
from lemoe.base.sources import ModelSource
from lemoe.data.edits import Edit, Round
from lemoe.errors import InputError, LemoeError, ModelError
from lemoe.runs.engines.local import train_within_memory
from lemoe.runs.progress import Listener, Silent
from lemoe.settings import Settings

RETRIES = 3  # times that one round may lose its worker
ANSWER = 10  # seconds in which a cluster must answer

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError:
    raise InputError("--engine ray needs Ray: pip install 'lemoe[ray]'") from None


@dataclass(frozen=True)
class RayEngine:
    """Trains on workers of a Ray cluster, several rounds at once.

    Results depend on the number of threads, so that each worker has as many as this process.

    Attributes:
        load: loads the base on a worker, called with its `device`.
        address: of the cluster; None starts one on this machine, for this run.
        workers: how many there are, at most one a round; None takes as many as there is room for.
    """

    load: Callable[..., BaseModel]
    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.address:
            _check_answers(self.address)

    def train(
        self,
        base: BaseModel,
        rounds: Sequence[Round],
        settings: Settings,
        before: AdaptorState | None,
        listener: Listener,
    ) -> Iterator[tuple[Round, AdaptorState]]:
        """See `Engine`.

        Raises:
            InputError: if the cluster cannot be reached, or has no room for the workers.
            ModelError: if a worker has another base than this process.
            LemoeError: if a round lost its worker too often.
        """
        if not rounds:
            return
        layer = before.base.layer if before else settings.layer_of(len(base.layers), base.source.layers)
        work = _Work(
            self.load,
            base.device.type,
            torch.get_num_threads(),
            base.source,
            base.fingerprint(layer, settings.layer_path),
            settings,
            before.only([0]) if before else None,  # of which rounds take the base and the layer alone
        )
        with _connected(self.address, (self.workers or _room_here(work.threads)) * work.threads):
            count = min(_checked(self.workers, _room(work)), len(rounds))
            listener.note(f"ray: {count} workers, {work.threads} threads each")
            yield from _shared_out(rounds, [_started(work) for _ in range(count)])


@dataclass(frozen=True)
class _Work:
    """What all rounds have in common."""

    load: Callable[..., BaseModel]
    device: str
    threads: int
    source: ModelSource
    fingerprint: Fingerprint
    settings: Settings
    before: AdaptorState | None


class RoundWorker:
    """What runs in a worker's process."""

    def __init__(self, work: _Work):
        self._work = work

    def train(self, edits: Sequence[Edit]) -> AdaptorState:
        """One round's state."""
        torch.set_num_threads(self._work.threads)
        return train_within_memory(self._base, edits, self._work.settings, self._work.before, Silent())

    @cached_property
    def _base(self) -> BaseModel:
        work = self._work
        base = work.load(device=work.device)
        base.source = work.source  # names and presets are those of the machine that asks
        there = base.fingerprint(work.fingerprint.layer, work.settings.layer_path)
        if differences := work.fingerprint.differences(there):
            raise ModelError("\n  ".join(["a worker has another base model:", *differences]))
        return base


def _started(work: _Work) -> Any:
    """A worker, or at least a claim to one."""
    kind = ray.remote(RoundWorker).options(
        num_cpus=work.threads, num_gpus=_gpus(work), max_restarts=-1, max_task_retries=RETRIES
    )
    return kind.remote(work)


def _shared_out(rounds: Sequence[Round], workers: Sequence[Any]) -> Iterator[tuple[Round, AdaptorState]]:
    """Each round goes to the next worker that has nothing to do; one that is not needed any more is let go."""
    waiting, idle = deque(rounds), list(workers)
    del workers
    at_work: dict[Any, tuple[Round, Any]] = {}
    while waiting or at_work:
        while waiting and idle:
            worker, round_ = idle.pop(), waiting.popleft()
            at_work[worker.train.remote(round_.edits)] = (round_, worker)
        done = _first_done(at_work)
        round_, worker = at_work.pop(done)
        idle = [worker] if waiting else []
        del worker
        yield round_, _result(done, round_)


def _first_done(calls: Iterable[Any]) -> Any:
    try:
        (done, *_), _ = ray.wait(list(calls))
    except SystemError as error:  # as which Ray passes on what a signal's handler raises
        raise error.__cause__ or error from None
    return done


def _result(call: Any, round_: Round) -> AdaptorState:
    try:
        state: AdaptorState = ray.get(call)
    except RayActorError as error:
        reason = " ".join(str(error).split())[:300]
        raise LemoeError(f"round {round_.number} lost its worker {RETRIES + 1} times: {reason}") from None
    except RayTaskError as error:
        raise error.cause from None
    return state


@contextmanager
def _connected(address: str | None, cpus: int) -> Iterator[None]:
    """While open, Ray is at work; one that was so before stays so."""
    if ray.is_initialized():
        yield
        return
    terminated = signal.getsignal(signal.SIGTERM)
    here = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--address {address or 'left out'}: Ray cannot be reached or started: {reason}") from None
    signal.signal(signal.SIGTERM, terminated)  # which Ray has put its own in place of
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse early an address at which nothing answers; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # a name such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there: {error}") from None


def _gpus(work: _Work) -> int:
    return 1 if work.device == "cuda" else 0


def _room_here(threads: int) -> int:
    return max(1, (os.cpu_count() or 1) // threads)


def _room(work: _Work) -> int:
    """How many workers the cluster holds at once."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if _gpus(work):
        return sum(int(min(has.get("CPU", 0) // work.threads, has.get("GPU", 0))) for has in there)
    return sum(int(has.get("CPU", 0) // work.threads) for has in there)


def _checked(workers: int | None, room: int) -> int:
    if room < (workers or 1):
        raise InputError(f"--workers {workers or 1}: the cluster has room for {room} with as many threads as here")
    return workers or room
