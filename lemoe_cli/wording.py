"""The library's messages in the words of the command line: arguments become options."""

import re

# The library names its arguments in backticks; these are what a command calls them.
OPTIONS = {
    "adaptor": "--adaptor",
    "address": "--address",
    "compare": "`lemoe compare`",
    "decode": "--decode",
    "device": "--device",
    "device_map": "--device-map",
    "drop": "--drop",
    "dtype": "--dtype",
    "engine": "--engine",
    "fluency": "--fluency",
    "folder": "--output",
    "force": "--force",
    "layer": "--layer",
    "layer_path": "--layer-path",
    "learning_rate": "--learning-rate",
    "least": "--min",
    "model": "--model",
    "most": "--max",
    "overwrite": "--force",
    "plan_file": "--plan",
    "resume": "--resume",
    "revision": "--revision",
    "round_range": "--rounds",
    "start": "--from",
    "texts": "--texts",
    "workers": "--workers",
}

_ARGUMENT = re.compile(r"`([a-z_]+)`")


def name_options(message: str) -> str:
    """A message of the library with the options of the command line in place of arguments."""
    return _ARGUMENT.sub(lambda found: OPTIONS.get(found[1], found[0]), message)
