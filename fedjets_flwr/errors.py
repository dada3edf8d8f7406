"""The one exception that is meant for a person."""


class FedjetsError(Exception):
    """A problem that the user can mend; its text is one line that names the cause and the mend."""
