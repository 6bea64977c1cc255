"""A Debian root in a folder, for another processor or with another Python, entered without touching the system.

debootstrap's packages are unpacked and none is configured, so that nothing of a foreign processor has to run. Entering
takes namespaces of its own; binfmt_misc is mounted in them (Linux 6.7 on) or was registered by root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.locks import Machine, pip, read_lock
from tests.paths import ROOT

BUILD = ROOT / "build" / "system"
_QEMU_ARM64 = shutil.which("qemu-aarch64-static")
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_ELF_ARM64 = (
    r":arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:{qemu}:PF"
)
_REGISTER = """
if [ -n "$register" ] && [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
    mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
    printf '%s' "$register" > /proc/sys/fs/binfmt_misc/register
fi
"""
_ENTER = """
root=$1 register=$2
shift 2
"""
_MOUNT = """
mount --rbind "$root" "$root"
mount -t proc proc "$root/proc"
if [ -e "$root/../cpuinfo" ]; then mount --bind "$root/../cpuinfo" "$root/proc/cpuinfo"; fi
for each in null zero random urandom full tty; do
    [ -e "$root/dev/$each" ] || : > "$root/dev/$each"
    mount --bind "/dev/$each" "$root/dev/$each"
done
mkdir -p "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs none "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 none "$root/dev/pts"
ln -sfn pts/ptmx "$root/dev/ptmx"
exec chroot "$root" "$@"
"""
_SCRIPT = _ENTER + _REGISTER + _MOUNT


@dataclass(frozen=True)
class Root:
    """A Debian in `folder`/root.

    Attributes:
        folder: of its own; beside the root may lie a `cpuinfo` that it shows.
        suite: Debian's name of the release.
        architecture: Debian's name of the processor.
        machine: what wheels are chosen by.
    """

    folder: Path
    suite: str
    architecture: str
    machine: Machine

    @property
    def path(self) -> Path:
        return self.folder / "root"

    @property
    def _foreign(self) -> bool:
        return self.architecture == "arm64"

    def make(self) -> None:
        """Unpack Python and what it rests on; what is there already is kept."""
        if (self.folder / "ready").exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        options = ["--foreign", f"--arch={self.architecture}", "--variant=minbase", "--include=python3,make"]
        _run(["debootstrap", *options, self.suite, str(self.path)], 900)
        for package in sorted(self.path.glob("var/cache/apt/archives/*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(self.path)], 120)
            package.unlink()
        for name in ("opt", "out", "src", "root", "tmp", "sys/devices/system/cpu"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        (self.path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
        (self.path / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
        (self.path / "etc/hosts").write_text("127.0.0.1 localhost\n")
        for name in ("possible", "present", "online"):  # ONNX Runtime asks
            (self.path / "sys/devices/system/cpu" / name).write_text("0-1\n")
        (self.folder / "ready").touch()

    def install(self, wheel: Path, locks: Sequence[str], more: Collection[str] = ()) -> None:
        """The project's wheel and what locks hold for this machine; `more` are packages of the lock `test`."""
        site = self.path / "opt/site"
        shutil.rmtree(site, ignore_errors=True)
        environment = self.machine.environment()
        entries = {one for name in locks for one in read_lock(name) if one.applies(environment)}
        entries |= {one for one in read_lock("test") if one.name in more and one.applies(environment)}
        lock = self.folder / "lock.txt"
        lock.write_text("".join(sorted(f"{one.name}=={one.version}{one.hashes}\n" for one in entries)))
        into = ("install", "--no-deps", f"--target={site}", *self.machine.pip_options())
        pip(*into, "--require-hashes", "-r", lock)
        pip("install", "--no-deps", f"--target={site}", "--no-index", wheel)
        command = "#!/usr/bin/python3\nimport sys\nfrom paliedge.cli import main\nsys.exit(main())\n"
        paliedge = self.path / "usr/bin/paliedge"
        paliedge.write_text(command)
        paliedge.chmod(0o755)
        python = self.path / "usr/bin/python"  # an environment has this name; Debian's root has not
        if not python.exists():
            python.symlink_to("python3")

    def copy_project(self) -> None:
        """What git has of the working tree, to /src."""
        shutil.rmtree(self.path / "src", ignore_errors=True)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                target = self.path / "src" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)

    def run(
        self, *command: str, limit_s: int = 600, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, in /src, with nothing of this machine's environment."""
        inside = {"HOME": "/root", "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        inside |= {"PYTHONPATH": "/opt/site:/src"} | variables
        register = _ELF_ARM64.format(qemu=_QEMU_ARM64) if self._foreign and not registered() else ""
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--user", "--map-root-user"]
        set_ = [f"{name}={value}" for name, value in inside.items()]
        at = ["/usr/bin/env", "-i", "-C", "/src", *set_]
        done = subprocess.run(
            [*enter, "bash", "-euc", _SCRIPT, "enter", str(self.path), register, *at, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done


def registered() -> bool:
    """Whether root has told the kernel to run ARM's programs by qemu, for everybody."""
    return (_BINFMT / "qemu-aarch64").exists()


def require(*tools: str) -> None:
    """Fail in one line where Debian's packages are missing."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        pytest.fail(f"{', '.join(missing)} not found: run `make test-system`, which installs Debian's packages")


def require_arm64() -> None:
    """Fail in one line where ARM's programs cannot be run."""
    require("qemu-aarch64-static", "debootstrap", "unshare")
    mount = "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc"
    probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    if not registered() and subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.fail("no binfmt_misc for ARM: Linux 6.7 or later, or Debian's binfmt-support; AARCH64=0 leaves this out")
    if os.getuid():
        pytest.fail("debootstrap wants root; AARCH64=0 leaves this out")


def build_wheel(folder: Path) -> Path:
    """The project's wheel, by what the environment has."""
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={folder}", str(ROOT)], 120)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _run(command: list[str], limit_s: int) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
