#!/usr/bin/env python3
"""Runs a command in a small virtual machine that has two RDMA devices (soft-RoCE).

    tools/rxe_vm/run.py build/cpu-release/bin/verbs_tests
    tools/rxe_vm/run.py --time-limit 60 ibv_devinfo -v

The machine is qemu without KVM, a Debian kernel (the kernels of clouds and containers often lack
rdma_rxe and modules altogether) and an initramfs with the dozen modules it needs. Its root is this
host's own, read only, so that the command runs as built here; what it writes is lost. The devices
rxe0 and rxe1 are joined by a veth pair (see guest.sh). The command gets the environment variables
MSCCLPP_* and GTEST_* and the working folder of the caller; its output and exit code come back.

Kernel and initramfs are kept in build/rxe_vm. Needs no root. Where it cannot run it says why and
ends with 77, or, when the environment has CI=true, with 1. 124: the time limit passed.
Standard library only.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build" / "rxe_vm"
# Meta packages of generic kernels, the preferred one first. Not the -cloud- ones: no rdma_rxe there.
KERNELS = ("linux-image-6.12-amd64", "linux-image-amd64")
PROGRAMS = {
    "apt-get": "apt",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "ip": "iproute2",
    "modprobe": "kmod",
    "qemu-system-x86_64": "qemu-system-x86",
    "rdma": "iproute2",
    "xz": "xz-utils",
}
# crc32_generic: rxe asks for the algorithm by name, which finds a module only if that is loaded.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "veth", "sch_netem", "crc32_generic")
MODULES += ("rdma_rxe",)
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|c)")  # the firmware clears the screen
SKIPPED, TIMED_OUT = 77, 124
# Programs of administrators are not in everybody's PATH.
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"


class CannotRun(Exception):
    """Something of this machine's is missing."""


def say(text):
    print(f"[rxe_vm] {text}", flush=True)


def call(*command, folder=None, text=""):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "PATH": PATH, "LC_ALL": "C"},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CannotRun(f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-600:]}")
    return done.stdout


def check_programs():
    if platform.machine() != "x86_64":
        raise CannotRun(f"this machine is {platform.machine()}; the virtual one is made for x86_64")
    missing = {p: package for p, package in PROGRAMS.items() if not shutil.which(p, path=PATH)}
    if missing:
        raise CannotRun(
            f"not installed: {', '.join(missing)}: apt-get install "
            + " ".join(sorted(set(missing.values())))
        )


def kernel_package():
    """The package behind the first meta package that apt knows; its name has the ABI number."""
    for refresh in (False, True):
        if refresh:
            if os.geteuid() != 0:
                break
            say("apt knows no kernel package: apt-get update")
            call("apt-get", "update", "-q")
        for meta in KERNELS:
            with contextlib.suppress(CannotRun):
                for line in call("apt-cache", "depends", meta).splitlines():
                    kind, _, name = line.strip().partition(": ")
                    if kind == "Depends" and name.startswith("linux-image-"):
                        return name
    raise CannotRun(f"apt knows none of {', '.join(KERNELS)}: apt-get update, or not a Debian 12")


def download(package, folder):
    size = next(
        (line for line in call("apt-cache", "show", package).splitlines() if "Size: " in line[:6]),
        "Size: 0",
    )
    say(f"fetching {package} ({int(size.split()[1]) / 1e6:.0f} MB)")
    try:
        call("apt-get", "download", "-q", package, folder=folder)
    except CannotRun:
        if os.geteuid() != 0:
            raise
        call("apt-get", "update", "-q")  # the list was older than the archive
        call("apt-get", "download", "-q", package, folder=folder)
    return next(folder.glob(f"{package}_*.deb"))


def make_initramfs(tree, version, image):
    root = tree / "initramfs"
    modules = root / "lib" / "modules" / version
    for folder in ("bin", "dev", "proc", "sbin", "sys"):
        (root / folder).mkdir(parents=True)
    modules.mkdir(parents=True)
    shutil.copy(shutil.which("busybox", path=PATH), root / "bin" / "busybox")
    (root / "sbin" / "modprobe").symlink_to("../bin/busybox")  # the kernel itself calls it
    for name in MODULES:
        listed = call("modprobe", "-d", tree, "-S", version, "--show-depends", name)
        for line in listed.splitlines():
            if not line.startswith("insmod "):
                continue  # built in
            source = pathlib.Path(line.split()[1])
            target = modules / source.name.removesuffix(".xz")
            if source.suffix == ".xz":
                with open(target, "wb") as out:
                    subprocess.run(["xz", "-dc", source], stdout=out, check=True)
            else:
                shutil.copy(source, target)
    for name in ("modules.builtin", "modules.order"):
        shutil.copy(tree / "lib" / "modules" / version / name, modules)
    call("depmod", "-b", root, version)
    init = (HERE / "init.sh").read_text().replace("@MODULES@", " ".join(MODULES))
    (root / "init").write_text(init)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
    with open(image, "wb") as out:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0"],
            cwd=root,
            input=names.encode(),
            stdout=out,
            check=True,
        )


def prepare():
    """Kernel and initramfs in the cache; returns the folder that has them."""
    recipe = (HERE / "run.py").read_bytes() + (HERE / "init.sh").read_bytes()
    ready = CACHE / hashlib.sha256(recipe).hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ready.exists():
            return ready
        debs = CACHE / "packages"
        debs.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="unpack-") as work:
            tree = pathlib.Path(work)
            # A package that is there serves until the folder is deleted: no network needed.
            package = next(debs.glob("*.deb"), None) or download(kernel_package(), debs)
            say(f"unpacking {package.name}")
            call("dpkg-deb", "-x", package, tree)
            version = next((tree / "lib" / "modules").iterdir()).name
            call("depmod", "-b", tree, version)
            say(f"making the initramfs for Linux {version}")
            made = tree / "made"
            made.mkdir()
            make_initramfs(tree, version, made / "initrd.img")
            shutil.copy(tree / "boot" / f"vmlinuz-{version}", made / "vmlinuz")
            made.rename(ready)  # last: an interrupted preparation is done again
    return ready


def share_option(name, path, readonly):
    options = f"local,id={name},path={path},security_model=none"
    options += ",readonly=on,multidevs=remap" if readonly else ""
    return ["-fsdev", options, "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]


def qemu_command(ready, share, memory):
    kernel_line = "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr rdinit=/init"
    return [
        shutil.which("qemu-system-x86_64", path=PATH),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", "2", "-m", str(memory), "-serial", "stdio"),
        *("-kernel", str(ready / "vmlinuz"), "-initrd", str(ready / "initrd.img")),
        *("-append", kernel_line),
        *share_option("hostroot", "/", True),
        *share_option("share", share, False),
    ]


def write_command(share, command):
    passed = {k: v for k, v in os.environ.items() if k.startswith(("MSCCLPP_", "GTEST_"))}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in passed.items()]
    lines += [f"cd {shlex.quote(os.getcwd())}", f"exec {shlex.join(command)}"]
    (share / "command.sh").write_text("\n".join(lines) + "\n")
    shutil.copy(HERE / "guest.sh", share)


def boot(ready, command, limit, memory):
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as folder:
        share = pathlib.Path(folder)
        write_command(share, command)
        say(f"booting (at most {limit} s): {shlex.join(command)}")
        start = time.monotonic()
        machine = subprocess.Popen(
            qemu_command(ready, share, memory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), machine.kill()))
        timer.start()
        try:
            for line in machine.stdout:
                print(ESCAPES.sub("", line).rstrip("\r\n"), flush=True)
        finally:
            timer.cancel()
            machine.kill()
            machine.wait()
        seconds = time.monotonic() - start
        if late.is_set():
            say(f"stopped: not done after {limit} s")
            return TIMED_OUT
        code = share / "exit_code"
        if not code.exists():
            say(f"the machine ended after {seconds:.0f} s without running the command to its end")
            return 1
        say(f"exit code {code.read_text().strip()} after {seconds:.0f} s")
        return int(code.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--time-limit", type=int, default=540, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB", help="registered is pinned")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command was given")
    try:
        check_programs()
        ready = prepare()
    except CannotRun as reason:
        say(f"cannot run here: {reason}")
        if os.environ.get("CI") == "true":
            say("with CI=true that is a failure")
            return 1
        return SKIPPED
    return boot(ready, options.command, options.time_limit, options.memory)


if __name__ == "__main__":
    sys.exit(main())
