"""`lemoe serve`: an OpenAI-compatible server for a base model with adaptors."""

from pathlib import Path
from typing import Any

import click

from lemoe.errors import InputError
from lemoe_cli.choices import find_adaptor
from lemoe_cli.command import lemoe_command, options_of
from lemoe_cli.options import (
    adaptor_option,
    check_cache,
    check_inputs,
    expert_cache_option,
    mismatch_option,
    model_options,
    open_base,
    progress_options,
)

serving_option = options_of("Serving")


class NamedAdaptor(click.ParamType[tuple[str | None, Path]]):
    """An adaptor's file or folder, with the name under which it is served in front of it."""

    name = "[NAME=]PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str | None, Path]:
        name, separator, path = str(value).partition("=")
        if separator and not Path(value).exists():
            return name, find_adaptor(path)
        return None, find_adaptor(str(value))


@lemoe_command(
    "serve",
    examples=(
        "lemoe serve -m llama -a edits.lemoe",
        "lemoe serve -m llama -a facts=edits.lemoe -a prices=prices.lemoe --allow-updates",
    ),
)
@model_options
@adaptor_option(
    "--adaptor", "-a", "adaptors", type=NamedAdaptor(), multiple=True, help="Adaptor to serve; more than one may be."
)
@serving_option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@serving_option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@serving_option("--threads", type=click.IntRange(1), help="Answers written at the same time.  [default: 4]")
@serving_option("--api-key", envvar="LEMOE_API_KEY", help="What clients must send; read from LEMOE_API_KEY as well.")
@serving_option("--allow-updates", is_flag=True, help="Let clients load and unload adaptors of this machine.")
@expert_cache_option
@mismatch_option
@progress_options
def serve_command(
    adaptors: tuple[tuple[str | None, Path], ...],
    host: str,
    port: int,
    threads: int | None,
    api_key: str | None,
    allow_updates: bool,
    allow_base_mismatch: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve a model with edits through OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, /health.

    Requests choose by their `model`: an adaptor's name, or the base model's for answers without edits; the first
    adaptor where they name none.
    """
    named = name_adaptors(adaptors)
    check_cache(adaptors[0][1] if adaptors else None, options)
    check_inputs(list(named.values()), options, quiet=quiet)
    try:
        import uvicorn

        from lemoe.serving.app import build_app
        from lemoe.serving.server import DEFAULT_THREADS, Server
    except ModuleNotFoundError as error:
        raise InputError(f"lemoe serve needs {error.name}: pip install 'lemoe[serve]'") from None
    from lemoe.serving.adaptors import ServedAdaptors

    base = open_base(options, quiet=quiet)
    served = ServedAdaptors(base, expert_cache=options["expert_cache"], allow_base_mismatch=allow_base_mismatch)
    for name, path in named.items():
        served.load(name, path)
    if not quiet:
        click.echo(f"serving {', '.join(served.names)}", err=True)
    app = build_app(Server(served, threads or DEFAULT_THREADS), api_key=api_key, allow_updates=allow_updates)
    uvicorn.run(app, host=host, port=port, log_level="warning" if quiet else "info")


def name_adaptors(adaptors: tuple[tuple[str | None, Path], ...]) -> dict[str, Path]:
    """Each adaptor by its name: the given one, or that of its file or of the folder of a run.

    Raises:
        InputError: if two have the same.
    """
    named: dict[str, Path] = {}
    for given, path in adaptors:
        own = path.resolve().parent if path.name == "adaptor.safetensors" else path
        name = given or own.name.removesuffix(".safetensors").removesuffix(".lemoe")
        if name in named:
            raise InputError(f"two adaptors would be called {name!r}; write --adaptor NAME={path}")
        named[name] = path
    return named
