"""The memory of a GPU that is not there: live allocations, and what is left of freed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Kind = Literal["device", "pinned"]
User = Literal["copy", "kernel"]

GARBAGE = 0xFF
"""What new memory holds: NaN as a float of any width, -1 as an integer."""
_GUARD, _GUARD_BYTES = 0xA5, 64
_POISON = 0xDB
_PAGE = 4096
_FIRST_DEVICE_ADDRESS = 0x7_0000_0000
_DEVICE_ALIGNMENT = 512


class Violation(AssertionError):
    """A rule that real CUDA or TensorRT punishes with wrong results or a crash, or not at all on this one day."""


class Rules:
    """Remembers every violation, for those whose exception somebody swallows."""

    def __init__(self) -> None:
        self.violations: list[str] = []

    def broken(self, text: str) -> Violation:
        self.violations.append(text)
        return Violation(text)


@dataclass(eq=False)
class Allocation:
    """A piece of memory between guards.

    Attributes:
        address: what the allocating call returned; for pinned memory the host's real address.
        device_address: where kernels find it.
        content: its bytes.
    """

    kind: Kind
    address: int
    device_address: int
    content: Bytes
    guards: tuple[Bytes, Bytes]

    @property
    def num_bytes(self) -> int:
        return self.content.size


class Memory:
    """All allocations of a process. Device addresses are never used twice."""

    def __init__(self, rules: Rules, *, integrated: bool) -> None:
        self.live: list[Allocation] = []
        self._freed: list[Allocation] = []
        self._rules = rules
        self._integrated = integrated
        self._next = _FIRST_DEVICE_ADDRESS

    def allocate(self, kind: Kind, num_bytes: int) -> Allocation:
        block: Bytes = np.full(num_bytes + 2 * (_PAGE + _GUARD_BYTES), _GUARD, np.uint8)
        start = -(block.ctypes.data + _GUARD_BYTES) % _PAGE + _GUARD_BYTES
        content = block[start : start + num_bytes]
        content[:] = GARBAGE
        device_address = self._next
        self._next += -(-(num_bytes + _GUARD_BYTES) // _DEVICE_ALIGNMENT) * _DEVICE_ALIGNMENT
        address = device_address
        if kind == "pinned":
            address = content.ctypes.data
            device_address = address if self._integrated else device_address
        guards = (block[start - _GUARD_BYTES : start], block[start + num_bytes : start + num_bytes + _GUARD_BYTES])
        made = Allocation(kind, address, device_address, content, guards)
        self.live.append(made)
        return made

    def free(self, kind: Kind, address: int) -> None:
        found = self.find(kind, address)
        if any((guard != _GUARD).any() for guard in found.guards):
            raise self._rules.broken(f"bytes beside the {kind} memory at {address:#x} were written")
        self.live.remove(found)
        found.content[:] = _POISON
        self._freed.append(found)

    def find(self, kind: Kind, address: int) -> Allocation:
        """The live allocation that begins at `address`."""
        for allocation in self.live:
            if (allocation.kind, allocation.address) == (kind, address):
                return allocation
        freed = any((gone.kind, gone.address) == (kind, address) for gone in self._freed)
        raise self._rules.broken(f"{address:#x} is no {kind} memory" + (", it was freed before" if freed else ""))

    def view(self, address: int, num_bytes: int, user: User) -> Bytes:
        """The bytes at an address, which must lie in one live allocation that the user can reach."""
        for allocation in self.live:
            for start in self._starts(allocation, user):
                if start <= address <= start + allocation.content.size - num_bytes:
                    return allocation.content[address - start : address - start + num_bytes]
        why = "it is neither device nor pinned memory"
        for allocation in (*self._freed, *self.live):
            if any(start <= address < start + allocation.num_bytes for start in self._starts(allocation, user)):
                why = "its memory was freed" if allocation in self._freed else "it reaches beyond its memory"
        raise self._rules.broken(f"a {user} of {num_bytes} bytes at {address:#x}: {why}")

    def check(self) -> None:
        """Nobody wrote beside living memory or into freed memory."""
        for allocation in self.live:
            if any((guard != _GUARD).any() for guard in allocation.guards):
                raise self._rules.broken(f"bytes beside the memory at {allocation.address:#x} were written")
        for allocation in self._freed:
            if (allocation.content != _POISON).any():
                raise self._rules.broken(f"{allocation.kind} memory at {allocation.address:#x} was written once freed")

    def _starts(self, allocation: Allocation, user: User) -> tuple[int, ...]:
        """Where a user may say that the allocation begins: copies take the host's address too."""
        if user == "copy" and allocation.kind == "pinned":
            return (allocation.device_address, allocation.address)
        return (allocation.device_address,)
