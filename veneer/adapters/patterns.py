"""Which names a user's words mean. A regular expression gets a few seconds, not for ever.

Python's `re` takes time exponential in a name's length for patterns such as (a+)+b, and cannot be interrupted from
another thread: what is not plainly harmless is matched in a process of its own, about 30 ms, and that one is stopped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from veneer.errors import VeneerError

SECONDS = 3.0  # for one pattern on all names of a model
LENGTH = 100_000  # characters of a pattern
Value = TypeVar("Value")

# Words, escaped dots, and up to three runs of anything: no worse than the cube of a name's length.
_HARMLESS = re.compile(r"(?:[\w\-]|\\[.\-dw]|\.(?![*+?{]))*")
_ENDS = (r"(?:.*\.)?(?:", ")")
_RUN = re.compile(r"\.[*+]|\\d\+")
_CHILD = (
    "import json, re, sys; pattern, names = json.load(sys.stdin); match = re.compile(pattern).fullmatch; "
    "print(json.dumps([bool(match(name)) for name in names]))"
)


def is_suffix(name: str, suffix: str) -> bool:
    """Whether `suffix` is the name or its last dotted parts."""
    return name == suffix or name.endswith(f".{suffix}")


def is_regex(pattern: str) -> bool:
    try:
        return len(pattern) <= LENGTH and bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


def ends_in(key: str) -> str:
    """The regex for names that end in what the regex `key` matches, as PEFT reads the keys of its patterns."""
    return f"{_ENDS[0]}{key}{_ENDS[1]}"


def matching(pattern: str, names: Sequence[str], what: str = "regex") -> list[bool]:
    """Which of the names the regex matches whole.

    Args:
        what: the setting it is, for errors.

    Raises:
        VeneerError: it is no regex, or takes more than SECONDS.
    """
    return list(_matching(pattern, tuple(names), what))


@lru_cache(maxsize=256)
def _matching(pattern: str, names: tuple[str, ...], what: str) -> tuple[bool, ...]:
    try:
        if len(pattern) > LENGTH:
            raise VeneerError(f"{what}: found {len(pattern):,} characters, expected a regex of at most {LENGTH:,}")
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise VeneerError(f"{what}: {pattern!r} is not a valid regex: {error}") from None
    inner = pattern.removeprefix(_ENDS[0]).removesuffix(_ENDS[1]) if pattern.startswith(_ENDS[0]) else pattern
    plain, runs = _RUN.subn("", inner)
    if runs + (inner != pattern) <= 3 and _HARMLESS.fullmatch(plain):
        return tuple(bool(compiled.fullmatch(name)) for name in names)
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise VeneerError(
            f"{what}: {pattern!r} gave no answer in {SECONDS:g} s",
            hint="repeats inside repeats, such as (a+)+, can take for ever: say it more simply, or list the names",
        ) from None
    return tuple(json.loads(child.stdout))


def by_pattern(
    pattern: Mapping[str, Value] | None, names: Sequence[str], default: Value, what: str = "regex"
) -> list[Value]:
    """The value of each name by PEFT's rule: the first key that is a suffix of it, or a regex for its end, decides.

    Raises:
        VeneerError: as `matching`.
    """
    values = [default] * len(names)
    for key, value in reversed(list((pattern or {}).items())):  # an earlier key overrides
        for at, hit in enumerate(matching(ends_in(key), names, what)):
            if hit:
                values[at] = value
    return values
