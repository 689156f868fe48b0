"""The name that was probably meant by one that does not exist."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` misspells, is a part of, or has the initials of (lr: learning_rate); else None."""
    names = list(names)
    close = difflib.get_close_matches(name.lower(), names, 1, 0.6)
    if close:
        return close[0]
    parts = [one for one in names if len(name) > 3 and name.lower() in one]
    initials = [one for one in names if "_" in one and "".join(word[:1] for word in one.split("_")) == name.lower()]
    return min([*parts, *initials], key=len, default=None)
