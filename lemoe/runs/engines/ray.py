"""Rounds trained by Ray actors, on this machine or on a cluster (the extra `ray`).

Each worker loads the base once. Ray restarts workers that die, and trains their rounds again.
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
from lemoe.runs.progress import NullProgress, ProgressCallback
from lemoe.settings import Settings

MAX_TASK_RETRIES = 3  # times that one round may lose its worker
ANSWER_SECONDS = 10  # seconds in which a cluster must answer

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError:
    raise InputError("training by Ray needs it: pip install 'lemoe[ray]'") from None


@dataclass(frozen=True)
class RayEngine:
    """Trains on workers of a Ray cluster, several rounds at once.

    Results depend on the number of threads, so each worker has as many as this process.

    Attributes:
        load: loads the base on a worker, called with its `device`.
        address: of the cluster; None starts one on this machine, for this run.
        workers: how many, at most one per round; None takes as many as the cluster has room for.
    """

    load: Callable[..., BaseModel]
    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.address:
            _check_address(self.address)

    def train(
        self,
        base: BaseModel,
        rounds: Sequence[Round],
        settings: Settings,
        before: AdaptorState | None,
        progress: ProgressCallback,
    ) -> Iterator[tuple[Round, AdaptorState]]:
        """See `Engine`.

        Raises:
            InputError: if the cluster cannot be reached, or has no room for the workers.
            ModelError: if a worker has another base than this process.
            LemoeError: if a round lost its worker too often.
        """
        if not rounds:
            return
        layer = before.base.layer if before else settings.resolve_layer(len(base.layers), base.source.layers)
        work = _Work(
            self.load,
            base.device.type,
            torch.get_num_threads(),
            base.source,
            base.fingerprint(layer, settings.layer_path),
            settings,
            before.select_rounds([0]) if before else None,  # rounds need its base and layer alone
        )
        with _connect_ray(self.address, (self.workers or _local_capacity(work.threads)) * work.threads):
            count = min(_check_worker_count(self.workers, _cluster_capacity(work)), len(rounds))
            progress.note(f"ray: {count} workers, {work.threads} threads each")
            yield from _distribute_rounds(rounds, [_start_worker(work) for _ in range(count)])


@dataclass(frozen=True)
class _Work:
    """What every worker needs, whatever round it trains."""

    load: Callable[..., BaseModel]
    device: str
    threads: int
    source: ModelSource
    fingerprint: Fingerprint
    settings: Settings
    before: AdaptorState | None


class RoundWorker:
    """The actor that runs in a worker's process."""

    def __init__(self, work: _Work):
        self._work = work

    def train(self, edits: Sequence[Edit]) -> AdaptorState:
        """Train one round on `edits`."""
        torch.set_num_threads(self._work.threads)
        return train_within_memory(self._base, edits, self._work.settings, self._work.before, NullProgress())

    @cached_property
    def _base(self) -> BaseModel:
        work = self._work
        base = work.load(device=work.device)
        base.source = work.source  # names and presets are those of the machine that asks
        fingerprint = base.fingerprint(work.fingerprint.layer, work.settings.layer_path)
        if differences := work.fingerprint.describe_differences(fingerprint):
            raise ModelError("\n  ".join(["a worker has another base model:", *differences]))
        return base


def _start_worker(work: _Work) -> Any:
    """The handle of a new worker; Ray may still be starting its process."""
    actor = ray.remote(RoundWorker).options(
        num_cpus=work.threads, num_gpus=_gpus_per_worker(work), max_restarts=-1, max_task_retries=MAX_TASK_RETRIES
    )
    return actor.remote(work)


def _distribute_rounds(rounds: Sequence[Round], workers: Sequence[Any]) -> Iterator[tuple[Round, AdaptorState]]:
    """Give each round to the next idle worker; a worker that is not needed any more is released."""
    waiting, idle = deque(rounds), list(workers)
    del workers  # Ray ends an actor when its last handle goes
    running: dict[Any, tuple[Round, Any]] = {}
    while waiting or running:
        while waiting and idle:
            worker, round_ = idle.pop(), waiting.popleft()
            running[worker.train.remote(round_.edits)] = (round_, worker)
        done = _wait_for_first(running)
        round_, worker = running.pop(done)
        idle = [worker] if waiting else []
        del worker
        yield round_, _fetch_state(done, round_)


def _wait_for_first(calls: Iterable[Any]) -> Any:
    try:
        (done, *_), _ = ray.wait(list(calls))
    except SystemError as error:  # Ray wraps what a signal handler raises
        raise error.__cause__ or error from None
    return done


def _fetch_state(call: Any, round_: Round) -> AdaptorState:
    try:
        state: AdaptorState = ray.get(call)
    except RayActorError as error:
        reason = " ".join(str(error).split())[:300]
        raise LemoeError(f"round {round_.number} lost its worker {MAX_TASK_RETRIES + 1} times: {reason}") from None
    except RayTaskError as error:
        raise error.cause from None
    return state


@contextmanager
def _connect_ray(address: str | None, cpus: int) -> Iterator[None]:
    """While open, Ray is connected; a connection that existed before is used and left open."""
    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    resources = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **resources)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"`address` {address or 'left out'}: Ray cannot be reached or started: {reason}") from None
    signal.signal(signal.SIGTERM, handler)  # Ray replaces the handler by its own
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse early an address that does not answer; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # a name such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"`address` {address}: no Ray cluster answers there: {error}") from None


def _gpus_per_worker(work: _Work) -> int:
    return 1 if work.device == "cuda" else 0


def _local_capacity(threads: int) -> int:
    return max(1, (os.cpu_count() or 1) // threads)


def _cluster_capacity(work: _Work) -> int:
    """How many workers the cluster has room for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if _gpus_per_worker(work):
        return sum(int(min(has.get("CPU", 0) // work.threads, has.get("GPU", 0))) for has in nodes)
    return sum(int(has.get("CPU", 0) // work.threads) for has in nodes)


def _check_worker_count(workers: int | None, room: int) -> int:
    if room < (workers or 1):
        raise InputError(f"`workers` {workers or 1}: the cluster has room for {room} with as many threads as here")
    return workers or room
