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
