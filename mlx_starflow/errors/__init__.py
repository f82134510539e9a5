"""The exceptions a user should ever read, and what other exceptions say, made fit to be part of it."""


class StarflowError(Exception):
    """A mistake the user can mend. The message is one line that names the mistake and, where possible, the fix."""


class Cancelled(StarflowError):
    """A call was ended by `Progress.cancel`: no mistake, but whoever waits for its result gets none."""


class NotFinite(StarflowError):
    """A network made a NaN or an infinity: better an error than a black picture."""


def printable(text: str) -> str:
    """Text on one line: what a terminal would obey or UTF-8 cannot write, as file names may hold, is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException, *, first: bool = False) -> str:
    """An exception's message on one line: the operating system's words where they are known, or else all of it.

    With `first`, only its first line, for libraries that write paragraphs.
    """
    if strerror := getattr(error, "strerror", None):
        return str(strerror)
    text = str(error).strip()
    return " ".join((text.partition("\n")[0] if first else text).split()) or type(error).__name__
