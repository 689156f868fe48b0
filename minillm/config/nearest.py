"""The name that was probably meant by one that does not exist."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` misspells, is a part of, or has the initials of (lr: learning_rate); else None.

    Of several that are equally near it is the first.
    """
    names = list(names)
    matcher = difflib.SequenceMatcher(b=name.lower())

    def likeness(one: str) -> float:
        matcher.set_seq1(one)
        return matcher.ratio()

    close = max(names, key=likeness, default=None)
    if close is not None and likeness(close) >= 0.6:
        return close
    parts = [one for one in names if len(name) > 3 and name.lower() in one]
    initials = [one for one in names if "_" in one and "".join(word[:1] for word in one.split("_")) == name.lower()]
    return min([*parts, *initials], key=len, default=None)
