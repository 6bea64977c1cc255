"""A detection opens no socket and leaves nothing behind but the note of what was verified.

ONNX Runtime's wheels of late keep a device id and look for a server, in C++ that no Python sees. So the
system itself is asked to end the process at its first socket, and the folders are looked at afterwards.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.paths import ROOT

SYSCALL_SOCKET = {"x86_64": 41, "aarch64": 198}
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
KILL_PROCESS, ALLOW = 0x80000000, 0x7FFF0000
FIRST_WITH_TELEMETRY = (1, 29)

DETECTION = """
import paliedge
from paliedge.cli.demo import DEMO_SCENES
model = paliedge.PaliGemma.load()
print(model.detect(sorted(DEMO_SCENES.glob("*.png"))[0], ["red circle", "blue square"]).finish_reason)
"""
BARE_SESSION = """
import onnxruntime
from paliedge.model import SHIPPED_BUNDLE
onnxruntime.InferenceSession(next(SHIPPED_BUNDLE.glob("vision_encoder*.onnx")))
print("loaded")
"""
FORBID = "from tests.test_no_network import forbid_sockets; forbid_sockets()\n"


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("value", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def forbid_sockets() -> None:
    """From now on Linux ends this process where any of its code, Python or not, asks for a socket: a seccomp filter."""
    steps = (
        (LOAD, 0, 0, 0),  # the number of the system call
        (JUMP_IF_EQUAL, 0, 1, SYSCALL_SOCKET[platform.machine()]),
        (RETURN, 0, 0, KILL_PROCESS),
        (RETURN, 0, 0, ALLOW),
    )
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    program = _Program(len(steps), instructions)
    set_no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((set_no_new_privileges, 1, 0, 0, 0), (set_seccomp, mode_filter, ctypes.byref(program))):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "this system does not let a process give up its sockets")


def run_python(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of a user who was never here; CI's variables, which turn telemetry off, are left out."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("environment", [{}, {"ORT_DISABLE_TELEMETRY": "1"}], ids=["as it is", "told"])
def test_a_detection_opens_no_socket_and_leaves_one_note(environment: dict[str, str], tmp_path: Path) -> None:
    result = run_python(FORBID + DETECTION, tmp_path, **environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "stop\n", "")
    assert files_in(tmp_path) == ["cache/paliedge/verified.json"]


def test_the_command_line_leaves_one_note(tmp_path: Path) -> None:
    code = "from paliedge.cli import main; main(['detect', 'runtime/paliedge/scenes', 'red circle'])"
    result = run_python(FORBID + code, tmp_path)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) > 1
    assert files_in(tmp_path) == ["cache/paliedge/verified.json"]


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('example.invalid', 80)",
        "import ctypes; ctypes.CDLL(None).socket(2, 1, 0)",
        "import socket, threading; t = threading.Thread(target=socket.socket); t.start(); t.join()",
    ],
    ids=["Python", "name", "C", "thread"],
)
def test_a_socket_is_seen(code: str, tmp_path: Path) -> None:
    """The tests above can fail."""
    assert run_python(code.replace("'example.invalid'", "'localhost'"), tmp_path).returncode == 0
    assert run_python(FORBID + code, tmp_path).returncode == -signal.SIGSYS


def test_what_onnx_runtime_leaves_behind_is_seen(tmp_path: Path) -> None:
    """On its own it writes at once, since 1.29, and opens a socket seconds later: the files are what tells."""
    result = run_python(BARE_SESSION, tmp_path)
    assert (result.returncode, result.stdout) == (0, "loaded\n")
    release = tuple(int(part) for part in version("onnxruntime").split(".")[:2])
    left = any("Microsoft" in name for name in files_in(tmp_path))
    assert left == (release >= FIRST_WITH_TELEMETRY), files_in(tmp_path)


@pytest.mark.parametrize(("before", "after"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")], ids=["unset", "0"])
def test_telemetry_is_off_unless_the_user_says_otherwise(before: dict[str, str], after: str, tmp_path: Path) -> None:
    code = "import os, paliedge.backends.ort; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    result = run_python(code, tmp_path, **before)
    assert (result.returncode, result.stdout) == (0, f"{after}\n")
