"""The errors that a user can cause. The command line turns each into one clear message."""


class LemoeError(Exception):
    """An error that the user can fix: the message names the file, line or tensor, what was expected and what to do.

    Example:
        >>> import lemoe
        >>> try:
        ...     lemoe.read_edits("missing.jsonl")
        ... except lemoe.LemoeError as error:
        ...     print(error)
        missing.jsonl: cannot be read: No such file or directory
    """


class InputError(LemoeError):
    """Invalid input: an edits file, a plan or a setting."""

    @classmethod
    def from_problems(cls, heading: str, problems: list[str], shown: int = 20) -> "InputError":
        """One error for all problems, of which the first `shown` are listed."""
        lines = [heading, *(f"  {problem}" for problem in problems[:shown])]
        if len(problems) > shown:
            lines.append(f"  ... and {len(problems) - shown} more")
        return cls("\n".join(lines))


class ModelError(LemoeError):
    """A base model that cannot be found, loaded or edited."""


class AdaptorError(LemoeError):
    """An adaptor file that is unreadable, invalid, or made for another base model."""


class OutputError(LemoeError):
    """A file or folder that cannot be written, or that exists and must not be overwritten."""
