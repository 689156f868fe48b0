"""Numbers, durations, texts and tables as the report and the model card print them."""

import math
import re
from collections.abc import Sequence

MISSING = "–"
_MARKUP = re.compile(r"[\\`*\[\]|~$<&]|(?<!\w)_|_(?!\w)")  # what Markdown would not print as it is


def number(value: float | None, *, digits: int = 3) -> str:
    """Write a number with `digits` significant digits, thousands separated, no exponent between 0.001 and 10^12."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > digits + 2:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(decimals, 0)}f}"


def with_deviation(value: float | None, deviation: float | None) -> str:
    """Write value ± deviation, the deviation with two digits; the value alone where there is none."""
    return number(value) if not deviation else f"{number(value)} ± {number(deviation, digits=2)}"


def percentage(value: float | None) -> str:
    """Write a fraction as a percentage."""
    return MISSING if value is None else f"{100 * value:.0f}%" if value in (0, 1) else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """Write seconds as people say them: 8.31 s, 5 min 12 s, 2 h 05 min."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Write a table; columns after the first are right-aligned if they are `numbers`, and left out where all is missing."""
    kept = [column for column in range(len(header)) if column == 0 or any(row[column] != MISSING for row in rows)]
    lines = [[header[column] for column in kept], ["---:" if numbers and column else "---" for column in kept]]
    lines += [[row[column] for column in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str, *, limit: int = 700) -> str:
    """Write any text into a table's cell: nothing in it is markup, line ends are kept, and a long text is shortened."""
    text = text.strip()
    if not text:
        return "*(empty)*"
    if len(text) > limit:
        text = text[:limit].rstrip() + " …"
    return "<br>".join(_MARKUP.sub(r"\\\g<0>", line) for line in text.splitlines())
