"""All that is looked at, in the order in which it is told."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_cli.doctor import chain, machine, meeting, services
from rlhf_cli.doctor.finding import Finding
from rlhf_cli.errors import UserError
from rlhf_cli.plan import plan
from rlhf_cli.words import collect


def examine(words: Sequence[str]) -> Iterator[Finding]:
    """Every finding about the machine and, if words for `rlhf train` are given, about what they need.

    Raises UserError for words that mean nothing.
    """
    jobs = collect(words)
    if not jobs:
        return
    paths = jobs[0].paths
    yield from machine.packages()
    yield machine.install()
    yield machine.accelerator()
    yield machine.processor()
    yield machine.memory()
    gpus = machine.devices()
    yield from machine.limits(gpus)
    yield machine.compilers()
    yield machine.clock(time.time())
    yield machine.host()
    yield meeting.loopback()
    yield meeting.meeting("gloo", 2)
    if gpus:
        yield meeting.meeting("nccl", min(gpus, 2))
    yield from machine.storage("runs", "paths.runs", Path(paths.runs))
    yield from machine.storage("cache", "paths.cache", Path(paths.cache))
    yield services.hugging_face()
    yield services.weights_and_biases(jobs[0].track)
    for job in jobs if words else []:
        try:
            yield from chain.chain(plan(job))
        except UserError as error:
            yield Finding("plan", "refused", "fault", str(error))
