"""The one error that is meant for the user. A module of its own, so that importing it is cheap."""


class CscError(Exception):
    """Something the user can act on. The message names the place, the reason and what to do."""
