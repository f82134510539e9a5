"""The one exception a user should ever read."""


class StarflowError(Exception):
    """A mistake the user can mend. The message is one line that names the mistake and, where possible, the fix."""
