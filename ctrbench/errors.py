# SPDX-License-Identifier: Apache-2.0
"""Errors that are meant for the user: one clear line that says what to do, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CtrbenchError(ValueError):
    """Bad input or an unusable environment. The command line prints it and exits with status 2."""


class ConfigError(CtrbenchError):
    """One or more problems of a configuration, one line each.

    Args:
        problems: complete lines, as `file: section.key: what is wrong, got X (did you mean 'y'?)`.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(CtrbenchError):
    """Raw or stored data that cannot be used; names the file, the column and the remedy."""


class TrainingError(CtrbenchError):
    """A run that cannot go on, such as one whose loss is no longer finite."""


class ModelCodeError(TrainingError):
    """An error that a model folder's own code raised, with its place."""


class InterruptedRunError(Exception):
    """A run was asked to stop; the message says where it will go on."""


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """` (did you mean 'x'?)` for the nearest of `known`, or an empty string."""
    names = {str(k).lower(): str(k) for k in known}  # adamw is AdamW, not Adam
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    return f" (did you mean '{names[near[0]]}'?)" if near else ""
