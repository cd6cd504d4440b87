"""A provider that cannot take part."""


class Skipped(Exception):
    """The reason is the message."""
