"""The `lemoe` command: thin subcommands over the library; everything a terminal shows lives here."""
