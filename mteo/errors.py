"""The one exception of the pack."""


class MTEOError(ValueError):
    """One clear sentence for the user: what is wrong, by name, and what to do."""
