"""A user's mistake, and how it is said."""

from __future__ import annotations


class UsageError(Exception):
    """A user's mistake: one sentence that names the option, its value and the way out. Scripts exit 2 on it."""


def require(condition: bool, option: str, value: object, way_out: str) -> None:
    """Raise UsageError("--option value: way out") unless `condition` holds."""
    if not condition:
        name = option.replace("_", "-")
        raise UsageError(f"--{name} {value}: {way_out}.")
