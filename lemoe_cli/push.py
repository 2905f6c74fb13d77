"""`lemoe push`: an adaptor and its card to the Hugging Face hub."""

from pathlib import Path

import click

from lemoe.data.counting import format_count
from lemoe_cli.command import lemoe_command, options_of
from lemoe_cli.options import FILE, check_inputs, json_option, progress_options
from lemoe_cli.results import confirm, print_json

publishing_option = options_of("Publishing")


@lemoe_command(
    "push",
    examples=(
        "lemoe push edits.lemoe my-org/product-facts --private",
        "lemoe push edits.lemoe my-org/product-facts --yes",
    ),
)
@click.argument("adaptor", type=FILE)
@click.argument("repository")
@publishing_option("--private", is_flag=True, help="Make the repository private, if it is new.")
@publishing_option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@progress_options
def push_command(adaptor: Path, repository: str, private: bool, yes: bool, as_json: bool, quiet: bool) -> None:
    """Upload ADAPTOR, with the card beside it, to REPOSITORY (org/name) of the hub, which is made if there is none.

    Everyone who can read the repository can read the edits: prompts, targets and subjects are in the file. Others then
    take it by its name: `--adaptor org/name[@revision]`. You are known to the hub by `hf auth login` or HF_TOKEN.
    """
    check_inputs([adaptor], {"model": None}, quiet=quiet)

    from lemoe.adaptor.checkpoint import AdaptorFile
    from lemoe.adaptor.hub import push_adaptor
    from lemoe_cli.ui import show_stage

    count = len(AdaptorFile(adaptor).state.edits)
    if not yes:
        reader = "those who may read it" if private else "everyone"
        confirm(f"Let {reader} read the texts of {format_count(count, 'edit')} at {repository}?")
    with show_stage(f"uploading to {repository}", quiet=quiet):
        address = push_adaptor(adaptor, repository, private=private)
    if as_json:
        print_json({"schema": 1, "repository": repository, "edits": count, "commit": address})
    else:
        click.echo(address)
