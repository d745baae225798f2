"""The errors a user can cause. Everything else that is raised is a bug of ours.

raise VeneerError("rank of q_proj: found 0, expected 1 to 576", hint="set lora.r to 8 or 16")
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_TERMINATED = 143  # SIGTERM
SHOWN = 20  # problems in one message; the others are counted


class VeneerError(ValueError):
    """Bad input or configuration: what, found, expected, how to mend it; all problems at once.

    Args:
        problems: one problem, or all of them, one sentence each; the message shows the first SHOWN.
        hint: how to mend it; printed last.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: str | Sequence[str], *, hint: str | None = None) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.hint = hint
        text = self.problems[0]
        if len(self.problems) > 1:
            text = f"{len(self.problems):,} problems:\n" + "\n".join(f"  - {p}" for p in self.problems[:SHOWN])
            if len(self.problems) > SHOWN:
                text += f"\n  and {len(self.problems) - SHOWN:,} more"
        super().__init__(printable(text + (f"\n{hint}" if hint else "")))


def printable(text: str) -> str:
    """Names come from files of others: what a terminal would act on is shown as its code."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class RefusedError(VeneerError):
    """Nothing is wrong with the input, but the result would not be exact, or would not fit into memory (exit code 3)."""

    exit_code = EXIT_REFUSED
