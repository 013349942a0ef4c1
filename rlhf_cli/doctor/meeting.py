"""Whether processes of this machine can add up a number, as those of a launched run have to.

Run as `python -m rlhf_cli.doctor.meeting BACKEND RANK SIZE PORT` it is one of them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from rlhf_cli.doctor.finding import Finding

PATIENCE = 90.0
"""Seconds for the processes to load torch and to meet."""


def meeting(backend: str, size: int, patience: float = PATIENCE) -> Finding:
    """Starts `size` processes that sum their ranks over loopback, as DeepSpeed's launcher has them meet."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "rlhf_cli.doctor.meeting", backend]
    place = [str(size), str(_free_port())]
    began = time.monotonic()
    children = [
        subprocess.Popen(
            [*command, str(rank), *place],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [
            child.communicate(timeout=max(0.0, began + patience - time.monotonic()))
            for child in children
        ]
    except subprocess.TimeoutExpired:
        return _failed(backend, size, f"no answer within {patience:g} s")
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, (_, complaint) in zip(children, said, strict=True):
        if child.returncode != 0:
            return _failed(backend, size, (complaint.strip().splitlines() or ["no reason"])[-1])
    sums, expected = {float(out) for out, _ in said}, float(sum(range(size)))
    if sums != {expected}:
        return _failed(backend, size, f"they found {sorted(sums)} where the sum is {expected:g}")
    return Finding(backend, f"{_they(size)} met and summed in {time.monotonic() - began:.0f} s")


def loopback() -> Finding:
    """Whether a port can be had on this machine, and reached."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=3).close()
    except OSError as error:
        return Finding(
            "loopback",
            f"no port of 127.0.0.1 can be reached ({error})",
            "fault",
            "bring the interface lo up, and let firewalls pass it: launch=deepspeed needs it",
        )
    return Finding("loopback", f"a free port was reached ({port})")


def _failed(backend: str, size: int, reason: str) -> Finding:
    interface = "NCCL_DEBUG=INFO says more" if backend == "nccl" else "try GLOO_SOCKET_IFNAME=lo"
    return Finding(
        backend,
        f"{_they(size)} did not meet: {reason}",
        "fault",
        f"{interface}; until then only launch=inline works",
    )


def _they(size: int) -> str:
    return "one process" if size == 1 else f"{size} processes"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(backend: str, rank: int, size: int, port: int) -> None:
    """One of the processes: prints the sum."""
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    total = torch.tensor(float(rank), device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    print(total.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
