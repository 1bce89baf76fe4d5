"""What the commands share: what a user can mend is one sentence on stderr and an exit status, not a traceback."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable

Main = Callable[[list[str] | None], int]


def whole(least: int = 1) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return number

    return read


def one_sentence(status: int = 1) -> Callable[[Main], Callable[..., int]]:
    """A decorator of a command's `main(argv)`, which returns the exit status.

    ValueError, ImportError and OSError are printed as `error: <message>`, and `status` is returned. With
    IJEPA_FAST_TRACEBACK=1 in the environment they are raised, to find out where they come from.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv)
            except (ValueError, ImportError, OSError) as error:
                if os.environ.get("IJEPA_FAST_TRACEBACK") == "1":
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)
                return status

        return run

    return decorate
