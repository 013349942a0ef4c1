"""The one error a user is meant to see.

A `UserError` is a mistake in the input (a key, a path, a row, a machine that lacks something), not in
the program: the command line prints its sentence, exits with code 2 and shows no traceback. Everything
else is a defect and is left to propagate.
"""

from __future__ import annotations


class UserError(Exception):
    """One sentence for the user: the key, the value, what is allowed, the fix."""


class StageFailed(Exception):
    """A stage's workers ended without finishing it; the message names the log. Exit code 1."""


class Stopped(Exception):
    """A run that was asked to stop and has kept all it needs to go on; the message says so. Exit code 75."""


class OutOfMemory(Exception):
    """A micro-batch did not fit; the message says what was asked for. The launcher makes it smaller."""


GO_ON = 75
"""EX_TEMPFAIL of sysexits.h: the exit code by which a scheduler may know that the same command goes on."""
