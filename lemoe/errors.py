"""The one family of errors that a user can cause. The command line turns each into one clear message."""


class LemoeError(Exception):
    """Something the user can mend: the message names the place, what was expected and what to do."""


class InputError(LemoeError):
    """An edits file, a plan or a setting that does not say what it should."""

    @classmethod
    def listing(cls, heading: str, problems: list[str], shown: int = 20) -> "InputError":
        """All problems at once, the first `shown` of them spelled out."""
        lines = [heading, *(f"  {problem}" for problem in problems[:shown])]
        if len(problems) > shown:
            lines.append(f"  ... and {len(problems) - shown} more")
        return cls("\n".join(lines))


class ModelError(LemoeError):
    """A base model that cannot be found, loaded or edited."""


class AdaptorError(LemoeError):
    """An adaptor file that is unreadable, invalid, or made for another base model."""


class OutputError(LemoeError):
    """A place that cannot be written, or that holds something which must not be overwritten."""
