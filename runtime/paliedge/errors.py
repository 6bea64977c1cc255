"""Every error a user can cause: what was expected, what was found, what to do.

Knows nothing of the command line; `exit_code` is where the two meet.
"""

# Tests: tests/cli/test_predict.py.
from __future__ import annotations

from typing import ClassVar


class PaliEdgeError(Exception):
    """Base of all errors that paliedge raises on purpose.

    Attributes:
        expected: what would have been right.
        found: what was there instead.
        action: what the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *, expected: str, found: str, action: str) -> None:
        self.expected = expected
        self.found = found
        self.action = action
        super().__init__(f"expected {expected}; found {found}. {action}")


class UsageError(PaliEdgeError):
    """An argument that cannot be served: a value out of range, a prompt that does not fit."""

    exit_code = 2


class ClosedError(PaliEdgeError):
    """A question to a model that was closed."""

    def __init__(self) -> None:
        super().__init__(expected="an open model", found="one that was closed", action="Load the bundle again.")


class CheckpointError(PaliEdgeError):
    """A checkpoint that cannot be exported: missing, gated, incomplete or of another shape."""


class PrecisionError(PaliEdgeError):
    """An export whose graphs do not reproduce the reference; it is not published."""


class BundleError(PaliEdgeError):
    """A bundle that is missing, incomplete or not what its manifest says."""

    exit_code = 3


class EngineMismatchError(PaliEdgeError):
    """A bundle without a graph or engine for this machine."""

    exit_code = 4


class ResourceError(PaliEdgeError):
    """A bundle or a build that is too large for this machine."""

    exit_code = 4


class BuildError(PaliEdgeError):
    """An engine that could not be built."""


class DeviceError(PaliEdgeError):
    """A GPU that is not there, or fails."""


class ImageError(PaliEdgeError):
    """An image that cannot or must not be read."""

    exit_code = 5


class OutputError(PaliEdgeError):
    """A result that cannot be written."""


class MissingExtraError(PaliEdgeError):
    """A feature whose optional packages are not installed."""
