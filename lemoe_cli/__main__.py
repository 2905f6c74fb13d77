"""The command, for `python -m lemoe`."""

from lemoe_cli.main import cli

cli(prog_name="lemoe")
