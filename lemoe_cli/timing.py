"""How long each phase of a command takes, said on stderr with `--verbose`."""

import time
from typing import Any

import click

_CLOCK = "lemoe.clock"  # in click's context


class PhaseClock:
    """Says how long each phase took when the next one begins."""

    def __init__(self) -> None:
        self._began = self._started = time.perf_counter()
        self._phase = "reading and checking"

    def start_phase(self, name: str) -> None:
        """End the phase that runs, and begin another."""
        self._say(self._phase, self._began)
        self._phase, self._began = name, time.perf_counter()

    def stop(self) -> None:
        """End the last phase, and say how long all took."""
        self._say(self._phase, self._began)
        self._say("all", self._started)

    def _say(self, phase: str, began: float) -> None:
        from lemoe_cli.ui import duration_text, strip_control

        took = duration_text(time.perf_counter() - began)
        click.echo(strip_control(f"time: {took} {phase}"), err=True)


def start_clock(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """The callback of `--verbose`."""
    if value and not ctx.resilient_parsing:
        clock = PhaseClock()
        ctx.meta[_CLOCK] = clock
        ctx.call_on_close(clock.stop)


def start_phase(name: str) -> None:
    """Note that a phase of the command begins."""
    ctx = click.get_current_context(silent=True)
    clock: Any = ctx.meta.get(_CLOCK) if ctx else None
    if clock is not None:
        clock.start_phase(name)
