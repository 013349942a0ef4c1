"""The machine itself: packages, processors, memory, disks, limits, the clock."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from rlhf_cli.doctor.finding import Finding, sized
from rlhf_cli.errors import UserError
from rlhf_cli.store.files import LEAST_FREE, atomic_write, nearest, to_disk
from rlhf_cli.store.provenance import provenance

NAMED = ("torch", "transformers", "deepspeed", "hydra-core", "wandb")
"""Packages with a line of their own."""
COMPILERS = ("c++", "ninja", "nvcc")
PATIENCE = 5.0
"""Seconds for what may hang: a lock on a file server, the name of a host."""
SKEW = 10.0
"""Seconds that the clock of a file server may differ by."""
LEAST_FILES, LEAST_SHARED, LEAST_LOCKED = 1024, 2**30, 2**26
"""Open files; bytes of /dev/shm and of locked memory that NCCL is content with between several GPUs."""


def packages() -> Iterator[Finding]:
    """Python and every package against the ranges that this one was installed with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        python, needed = metadata("rlhf-cli")["Requires-Python"], requires("rlhf-cli") or []
    except PackageNotFoundError:
        yield Finding("packages", "rlhf-cli is not installed", "note", "pip install . in its clone")
        return
    mine = platform.python_version()
    fits = SpecifierSet(python).contains(mine)
    fix = "" if fits else f"make an environment with Python {python}"
    yield Finding("python", f"{mine} ({python})", "ok" if fits else "fault", fix)
    parsed = [Requirement(each) for each in needed]
    wanted = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    ranges = {each.name: each.specifier for each in wanted}
    installed = {name: _version(name) for name in ranges}
    yield from compared(ranges, installed)


def compared(
    ranges: Mapping[str, object], installed: Mapping[str, str | None]
) -> Iterator[Finding]:
    """A line for each of `NAMED` and each that does not fit, and one for all the others."""
    from packaging.specifiers import SpecifierSet

    others = 0
    for name, allowed in ranges.items():
        found = installed[name]
        if found is None or not SpecifierSet(str(allowed)).contains(found, prereleases=True):
            yield Finding(
                name,
                f"{found or 'missing'}; {allowed or 'any version'} is needed",
                "fault",
                f"pip install '{name}{allowed}'",
            )
        elif name in NAMED:
            yield Finding(name, f"{found} ({allowed or 'any version'})")
        else:
            others += 1
    yield Finding("other packages", f"{others} within their ranges")


def install() -> Finding:
    """Which code this is."""
    found = provenance()
    if found["commit"] is None:
        return Finding("code", f"rlhf-cli {_version('rlhf-cli')}, no clone under git")
    commit = f"commit {found['commit'][:10]}"
    if found["patch"] is None:
        return Finding("code", commit)
    return Finding(
        "code",
        f"{commit} and changes that are not committed ({found['patch']})",
        "note",
        "commit them before runs that are to be published",
    )


def accelerator() -> Finding:
    """The GPUs that torch can use."""
    import torch

    driver = _nvidia("driver_version")
    if not torch.cuda.is_available():
        if not driver:
            return Finding("GPU", "none; runs use the CPU")
        return Finding(
            "GPU",
            f"there is one (driver {driver[0]}) that torch {torch.__version__} cannot use",
            "note",
            "install a torch that is built for CUDA and this driver: pytorch.org/get-started",
        )
    memory = [torch.cuda.mem_get_info(place) for place in range(torch.cuda.device_count())]
    names = {torch.cuda.get_device_name(place) for place in range(len(memory))}
    told = f"{len(memory)} x {', '.join(sorted(names))}, {sized(min(all for _, all in memory))}"
    told += f", driver {driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}"
    if any(free < 0.9 * all for free, all in memory):
        least = min(free for free, _ in memory)
        return Finding(
            "GPU",
            f"{told}; {sized(least)} free",
            "note",
            "others use it: end them (nvidia-smi lists them), or choose with CUDA_VISIBLE_DEVICES",
        )
    return Finding("GPU", told)


def devices() -> int:
    """How many GPUs torch can use."""
    import torch

    return torch.cuda.device_count()


def processor() -> Finding:
    """Cores, and how many threads torch takes."""
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "not set")
    told = f"{cores} of {os.cpu_count()} cores, {threads} threads (OMP_NUM_THREADS {asked})"
    if threads > cores:
        return Finding("CPU", told, "note", f"more threads than cores: OMP_NUM_THREADS={cores}")
    return Finding("CPU", told)


def memory() -> Finding:
    """Of the machine, not of its GPUs."""
    import psutil

    found = psutil.virtual_memory()
    return Finding("memory", f"{sized(found.available)} available of {sized(found.total)}")


def storage(what: str, key: str, folder: Path) -> Iterator[Finding]:
    """Whether files last in a folder, or where it would be made; nothing is left there.

    key: what chooses it.
    """
    at = nearest(folder.expanduser())
    choose = f"mend that, or choose another folder with {key}=DIR"
    try:
        with TemporaryDirectory(prefix=".rlhf-doctor-", dir=at) as scratch:
            trial = Path(scratch) / "trial"
            atomic_write(trial, "can this folder be written?\n")
            to_disk(Path(scratch))
            with FileLock(Path(scratch) / "lock", timeout=PATIENCE):
                pass
            written = trial.stat().st_mtime
    except (OSError, Timeout, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        yield Finding(what, f"{folder}: {reason}", "fault", choose)
        return
    free = shutil.disk_usage(at).free
    if free < LEAST_FREE:
        told = f"{folder}: {free // 2**20} MB free"
        yield Finding(what, told, "fault", f"make room, or choose another folder with {key}=DIR")
    else:
        yield Finding(what, f"{folder}: {sized(free)} free; writes, syncs and locks")
    if abs(ahead := written - time.time()) > SKEW:
        told = f"its disk's clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
        yield Finding(what, told, "note", "ages will look wrong: have both machines set by NTP")


def clock(now: float) -> Finding:
    """Whether the time, in seconds since the epoch, can be true."""
    told = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC"
    if now < Path(__file__).stat().st_mtime:
        fix = "set it (NTP): certificates are refused, and runs are sorted wrongly"
        return Finding("clock", f"{told}, before this program was installed", "fault", fix)
    return Finding("clock", told)


def host() -> Finding:
    """Whether the machine's own name leads anywhere; asked in a thread, for it may take minutes."""
    name = socket.gethostname()
    address: list[str] = []

    def ask() -> None:
        try:
            address.append(socket.gethostbyname(name))
        except OSError:
            return

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    if address:
        return Finding("host name", f"{name} is {address[0]}")
    fix = "add it to /etc/hosts: gloo and NCCL look it up"
    return Finding("host name", f"{name} has no address", "note", fix)


def limits(gpus: int) -> Iterator[Finding]:
    """Open files, locked memory, shared memory; the last two matter where several GPUs talk."""
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    few = 0 <= files < LEAST_FILES
    fix = f"ulimit -n {LEAST_FILES}" if few else ""
    yield Finding("open files", f"{_count(files)} at once", "note" if few else "ok", fix)
    shared = Path("/dev/shm")
    sizes = {"locked memory": (locked, LEAST_LOCKED, "ulimit -l unlimited")}
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        sizes["/dev/shm"] = (size, LEAST_SHARED, "in a container: docker run --shm-size=8g")
    for what, (size, least, fix) in sizes.items():
        little = gpus > 1 and 0 <= size < least
        told = "unlimited" if size < 0 else sized(size)
        yield Finding(what, told, "note" if little else "ok", fix if little else "")


def compilers() -> Finding:
    """For DeepSpeed's own kernels, of which no run here uses any."""
    found = [name for name in COMPILERS if shutil.which(name)]
    return Finding("compilers", f"{', '.join(found) or 'none'}; no run here needs one")


def _nvidia(what: str) -> Sequence[str]:
    """What nvidia-smi says of each GPU; nothing where it is not there or fails."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _count(number: int) -> str:
    return "any number" if number < 0 else f"{number:,}"
