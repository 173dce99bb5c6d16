"""The one exception that means "the user can fix this", and how scripts end on it."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(ValueError):
    """A mistake that the user can fix: one clear sentence that says what to do."""


def exit_on_user_error(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap a script's main so that a `UserError`, or a full disk, prints one line on stderr and exits with code 2."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print("error: the disk is full; free some space and run the same command again.", file=sys.stderr)
            raise SystemExit(2) from error

    return wrapped
