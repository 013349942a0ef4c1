"""Kills, stops and pauses a sweep at random moments, again and again, and compares it with its twin.

    python scripts/chaos.py --minutes 30 [--seed 1] [--folder DIR] [--write]

A sweep of small runs is made once undisturbed: the twins. Then the same command is given in a fresh folder,
struck, and given again, until it ends by itself; then in another fresh folder, until the minutes are over;
what is under way then is finished undisturbed. Sweeps in one process take turns with sweeps in two. Every run
must equal its twin (weights, metrics, samples), and nothing may be left behind. FOLDER/chaos.json and
FOLDER/chaos.md say what was found, and with --write docs/results/chaos.md does too. The first difference ends
it with code 1, and the folder keeps what there is to look at.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Column, Table

from rlhf_cli.engine.checkpoint import whole
from rlhf_cli.store.files import sha256
from rlhf_cli.store.metrics import read
from rlhf_cli.store.provenance import provenance
from rlhf_cli.store.run import Run, all_runs

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "chaos.md"
MARK = "RLHF_CHAOS"
"""Variable of the environment by which the processes of a start are known, whoever their parent is."""
PATIENCE, GONE = 180.0, 20.0
"""Seconds a command has to leave after it was struck, and its processes after it has left."""
TIMED = ("wall", "segment", "perf/", "budget/seconds")
"""Columns of the metrics that may differ between twins."""
TARGETS = (None, None, None, "*/*/checkpoints/.*.partial", "*/*/.*.tmp", "*/*/checkpoints/final")
"""What a strike waits for: nothing, a checkpoint or a manifest being written, the end of a run."""

IN_VAIN = 60.0
"""Seconds after which it waits no longer."""

SMALL = (
    "model.scratch.layers=1", "model.scratch.width=32", "model.scratch.heads=2",
    "model.scratch.vocab=400", "data.embedded.prompts=600", "data.embedded.demos=512",
    "data.embedded.pairs=256", "data.embedded.heldout=24", "data.max_prompt_tokens=160",
    "data.max_response_tokens=24", "eval.prompts=12", "eval.points=3", "reward.calibration=16",
    "reward.unended=null", "algo.update.episodes=1920", "algo.update.batch=32",
    "algo.update.minibatches=2", "algo.update.epochs=1", "checkpoint.every=4", "track=off",
)  # fmt: skip
"""120 optimiser steps of each algorithm, two to a rollout."""
MOST_LOST = 4
"""Steps: `checkpoint.every`, which whole rollouts divide."""
ALGORITHMS = ("ppo", "p3o_v2", "copg_replay", "rloo", "dpo", "aihf")
REPLAY = "defaults:\n  - copg\n  - _self_\n\nreplay: 3\n"
"""conf/algo/copg_replay.yaml of the sweep's folder: a value that the other algorithms do not have."""


@dataclass(frozen=True)
class Sweep:
    """A command that is given again and again."""

    name: str
    words: tuple[str, ...]


def sweeps(algorithms: Sequence[str] = ALGORITHMS, words: Sequence[str] = SMALL) -> list[Sweep]:
    """The same runs in one process and in two."""
    every = ("-m", f"algo={','.join(algorithms)}", *words, "--config-dir", "conf")
    two = ("launch=deepspeed", "launch.processes=2")
    return [Sweep("one process", every), Sweep("two processes", (*every, *two))]


# --- strikes


@dataclass(frozen=True)
class Strike:
    """One way to disturb a command: what is done to which of its processes."""

    do: Callable[[list[psutil.Process], random.Random], None]
    """Told the command itself, or the victims that `among` finds, and a source of chance."""
    codes: frozenset[int] = frozenset()
    """Exit codes that the command may have after it; none if it is to go on."""
    among: Callable[[psutil.Process], list[psutil.Process]] = lambda command: [command]


def _family(command: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [command, *command.children(recursive=True)]
    return []


def _workers(command: psutil.Process) -> list[psutil.Process]:
    return [each for each in _family(command) if _words(each)[-3:-1] == ["-m", "rlhf_cli.worker"]]


def _launchers(command: psutil.Process) -> list[psutil.Process]:
    return [each for each in _family(command) if "--module" in _words(each)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _send(*signals: signal.Signals) -> Callable[[list[psutil.Process], random.Random], None]:
    def do(victims: list[psutil.Process], chance: random.Random) -> None:
        victim = chance.choice(victims)
        for number, each in enumerate(signals):
            time.sleep(chance.uniform(0, 0.5) if number else 0)
            victim.send_signal(each)

    return do


def _kill_all(victims: list[psutil.Process], chance: random.Random) -> None:
    for each in victims:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def _pause(victims: list[psutil.Process], chance: random.Random) -> None:
    victim = chance.choice(victims)
    victim.suspend()
    time.sleep(chance.uniform(1, 5))
    victim.resume()


def _stops(asked: signal.Signals) -> frozenset[int]:
    """75 once it listens; before, and between two runs, a signal ends it as it ends any program."""
    return frozenset({75, -asked} | ({130} if asked is signal.SIGINT else set()))


KILLED = frozenset({-signal.SIGKILL})
STRIKES = {
    "SIGKILL to the command": Strike(_send(signal.SIGKILL), KILLED),
    "SIGKILL to all of its processes": Strike(_kill_all, KILLED, _family),
    "SIGKILL to one worker": Strike(_send(signal.SIGKILL), among=_workers),
    "SIGKILL to a launcher of workers": Strike(_send(signal.SIGKILL), among=_launchers),
    "SIGTERM": Strike(_send(signal.SIGTERM), _stops(signal.SIGTERM)),
    "SIGTERM twice": Strike(_send(signal.SIGTERM, signal.SIGTERM), _stops(signal.SIGTERM)),
    "SIGINT": Strike(_send(signal.SIGINT), _stops(signal.SIGINT)),
    "SIGUSR1": Strike(_send(signal.SIGUSR1), _stops(signal.SIGUSR1)),
    "SIGSTOP, seconds later SIGCONT": Strike(_pause, among=_family),
}


# --- what is looked at


def differences(twins: Path, ours: Path) -> Iterator[str]:
    """Everything in which the runs of a store are not those of their undisturbed twins, in sentences."""
    names = [{run.path.relative_to(store) for run in all_runs(store)} for store in (twins, ours)]
    for name in sorted(names[0] ^ names[1]):
        yield f"{name} is there once only"
    for name in sorted(names[0] & names[1]):
        yield from (f"{name}: {what}" for what in unlike(Run(twins / name), Run(ours / name)))


def unlike(twin: Run, run: Run) -> Iterator[str]:
    """In what a run is unlike its undisturbed twin, in words; nothing if it equals it."""
    if run.status() != "done":
        yield f"is {run.status()}, not done"
        return
    rows, expected = _rows(run), _rows(twin)
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        yield "steps of the metrics are missing or there twice"
    elif others := [row["step"] for row, like in zip(rows, expected, strict=True) if row != like]:
        yield f"other metrics from step {others[0]:.0f} on"
    files, like = _files(run), _files(twin)
    yield from (
        f"{name} differs"
        for name in sorted(files.keys() | like.keys())
        if files.get(name) != like.get(name)
    )


def _files(run: Run) -> dict[str, str]:
    """Digests of what the run has produced, but for the model card, which names the state of the code.

    The metrics are compared by what is in them.
    """
    listed = run.manifest()["outputs"].items()
    apart = (run.metrics_path.name, "samples/", "checkpoints/final/README.md")
    samples = {f"samples/{path.name}": sha256(path) for path in run.samples.iterdir()}
    return {name: digest for name, digest in listed if not name.startswith(apart)} | samples


def _rows(run: Run) -> list[dict[str, str | float]]:
    """The metrics; a number that is none equals another, as text."""
    return [
        {k: repr(v) if v != v else v for k, v in row.items() if not k.startswith(TIMED)}
        for row in read(run.metrics_path)
    ]


def leavings(folder: Path) -> Iterator[str]:
    """Everything that a finished sweep should not leave: unfinished files, checkpoints, locks."""
    for path in sorted(folder.rglob(".*")):
        if path.name != ".locks":
            yield f"{path.relative_to(folder)} was left behind"
    for run in all_runs(folder / "runs"):
        if left := whole(run.checkpoints):
            yield f"{run.path.name} has still {len(left)} checkpoints to resume from"
    for lock in sorted(folder.rglob("*.lock")):
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            yield f"{lock.relative_to(folder)} is still held"


def marked(mark: str) -> list[psutil.Process]:
    """Every process that has inherited a mark that begins so."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(mark):
                found.append(process)
    return found


def left_alive(mark: str, seconds: float = GONE) -> list[str]:
    """Processes of a start that are still there some seconds after it has ended; they are killed."""
    until = time.monotonic() + seconds
    while (alive := marked(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    said = [f"process {each.pid} ({' '.join(_words(each)[1:4])}) was left alive" for each in alive]
    _kill_all(alive, random.Random())
    return said


def lost_steps(run: Run) -> int:
    """Steps that the newest segment has told of and no checkpoint holds: they will be taken again."""
    segment = run.manifest()["segment"]
    reached = [int(row["step"]) for row in read(run.metrics_path) if row["segment"] == segment]
    held = max((int(path.name) for path in whole(run.checkpoints)), default=0)
    return max(0, max(reached, default=0) - held)


# --- the soak


@dataclass
class Soak:
    """What has been done so far and what came of it."""

    folder: Path
    console: Console
    chance: random.Random
    until: float = 0.0
    """From then on nothing is disturbed any more, on the monotonic clock."""
    began: float = field(default_factory=time.monotonic)
    starts: int = 0
    runs: int = 0
    completed: Counter[str] = field(default_factory=Counter)
    """Sweeps, by name."""
    strikes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Kind of strike -> the steps each of its kind cost."""
    places: Counter[str] = field(default_factory=Counter)
    codes: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[str] = field(default_factory=list)

    def soak(self, kinds: Sequence[Sweep], minutes: float) -> None:
        """Disturb sweeps of each kind in turn, for so many minutes; making the twins does not count."""
        # A shell's background job ignores it, and so would everything begun here.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        means: dict[Sweep, float] = {}
        left = 60 * minutes
        try:
            for number, sweep in enumerate(cycle(kinds)):
                if sweep not in means:
                    self.say(f"undisturbed, {sweep.name}")
                    means[sweep] = self._twins(sweep)
                began = time.monotonic()
                self.until = began + left
                self._disturbed(sweep, number, means[sweep])
                left -= time.monotonic() - began
                if self.problems or left <= 0:
                    break
        finally:
            _kill_all(marked(self._mark()), self.chance)

    def _mark(self, start: object = "") -> str:
        return f"{os.getpid()} {self.folder} {start}"

    def say(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        self.console.print(f"{minutes:3}:{seconds:02}  {line}", markup=False, soft_wrap=True)

    def _twins(self, sweep: Sweep) -> float:
        """Make them; returns the seconds that a run took on average."""
        began, folder = time.monotonic(), self._prepared(f"twins, {sweep.name}")
        child, mark = self._begin(sweep, folder)
        if code := child.wait():
            raise SystemExit(f"the undisturbed sweep ended with code {code}; see {folder}/said.txt")
        self.problems += [*left_alive(mark), *leavings(folder)]
        return (time.monotonic() - began) / len(all_runs(folder / "runs"))

    def _prepared(self, name: str) -> Path:
        folder = self.folder / name
        algo = folder / "conf" / "algo"
        algo.mkdir(parents=True)
        (algo / "copg_replay.yaml").write_text(REPLAY)
        return folder

    def _begin(self, sweep: Sweep, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
        """Give the command, with a cache and a mark of its own."""
        self.starts += 1
        mark = self._mark(self.starts)
        gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "RLHF_RUNS", "RLHF_DEADLINE")
        environment = {name: value for name, value in os.environ.items() if name not in gone}
        environment |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"RLHF_CACHE": str(folder / "cache"), MARK: mark}
        with (folder / "said.txt").open("ab") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "rlhf_cli", "train", *sweep.words],
                cwd=folder, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        return child, mark

    def _disturbed(self, sweep: Sweep, number: int, mean: float) -> None:
        """One sweep, given again until it ends by itself, and compared."""
        folder = self._prepared(f"sweep {number}, {sweep.name}")
        self.say(f"sweep {number}, {sweep.name}: a strike every {mean:.0f} s on average")
        while not self.problems:
            child, mark = self._begin(sweep, folder)
            code, expected = self._watch(child, folder, mean)
            alive = left_alive(mark)
            self.problems += [f"{folder.name}: {each}" for each in alive]
            if code == 0:
                break
            if code not in expected:
                said = (folder / "said.txt").read_text(errors="replace")[-2000:]
                self.problems.append(f"{folder.name}: the command ended with code {code}:\n{said}")
        else:
            return
        twins = self.folder / f"twins, {sweep.name}" / "runs"
        found = [*differences(twins, folder / "runs"), *leavings(folder)]
        self.problems += [f"{folder.name}: {each}" for each in found]
        built = all_runs(folder / "runs")
        self.runs += len(built)
        self.completed[sweep.name] += 1
        segments = sum(run.manifest()["segment"] for run in built)
        self.say(f"{len(built)} runs of {segments} segments compared: {len(found)} differences")
        if not found:
            shutil.rmtree(folder)

    def _watch(
        self, child: subprocess.Popen[bytes], folder: Path, mean: float
    ) -> tuple[int, frozenset[int]]:
        """Strike until the command has ended: its exit code, and those that would be in order."""
        before, command = _segments(folder), psutil.Process(child.pid)
        expected: frozenset[int] = frozenset()
        while (code := self._undisturbed(child, mean)) is None:
            self._aim(folder, child)
            kind, victims = self._chosen(command)
            strike = STRIKES[kind]
            if (code := child.poll()) is not None:
                break
            with suppress(psutil.NoSuchProcess):
                strike.do(victims, self.chance)
            run = _building(folder, before)  # not asked before: the moment would have passed
            place, done = _place(run), _done(folder)
            if strike.codes:
                code = self._left(child, kind)
                expected |= strike.codes
            elif "SIGKILL" in kind:
                expected |= {1}  # it says so, goes on with the rest of the sweep and ends with 1
            self._note(kind, place, code, run)
            if strike.codes and _done(folder) > done + 1:
                self.problems.append(
                    f"{kind} ({place}) was not heeded: more runs were begun after it"
                )
            if code is not None:
                break
        return code, expected

    def _chosen(self, command: psutil.Process) -> tuple[str, list[psutil.Process]]:
        """A kind of strike for which there are victims, and these."""
        while True:
            kind = self.chance.choice(list(STRIKES))
            if victims := STRIKES[kind].among(command):
                return kind, victims

    def _left(self, child: subprocess.Popen[bytes], kind: str) -> int:
        """The exit code of a command that was told to go."""
        try:
            return child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.problems.append(f"{kind}: the command did not end within {PATIENCE:.0f} s")
            child.kill()
            return child.wait()

    def _undisturbed(self, child: subprocess.Popen[bytes], mean: float) -> int | None:
        """The exit code, or None when it is time to strike."""
        wait = self.chance.expovariate(1 / mean)
        calm = time.monotonic() + wait > self.until
        try:
            return child.wait(None if calm else wait)
        except subprocess.TimeoutExpired:
            return None

    def _aim(self, folder: Path, child: subprocess.Popen[bytes]) -> None:
        """Wait for one of the moments that are short and matter most."""
        runs, target = folder / "runs", self.chance.choice(TARGETS)
        if target is None:
            return
        until, old = time.monotonic() + IN_VAIN, set(runs.glob(target))
        while time.monotonic() < until and child.poll() is None and not {*runs.glob(target)} - old:
            time.sleep(0.001)

    def _note(self, kind: str, place: str, code: int | None, run: Run | None) -> None:
        """Count a strike and the steps it cost the run that was being built."""
        hurt = run is not None and "SIGSTOP" not in kind and run.status() != "done"
        lost = lost_steps(run) if run is not None and hurt else 0
        self.strikes[kind].append(lost)
        self.places[place] += 1
        if code is not None:
            self.codes[kind][code] += 1
        came = "goes on" if code is None else f"code {code}"
        at = place if run is None else f"{place}, {run.stage} {run.label}"
        self.say(f"{kind} ({at}): {came}, {lost} steps lost")
        if lost > MOST_LOST:
            self.problems.append(f"{kind} ({at}) cost {lost} steps")

    def summary(self) -> dict[str, Any]:
        """All of it in numbers."""
        return {
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "sweeps": dict(self.completed),
            "starts": self.starts,
            "runs": self.runs,
            "strikes": {
                kind: {
                    "times": len(lost),
                    "codes": {str(code): n for code, n in sorted(self.codes[kind].items())},
                    "lost_mean": fmean(lost),
                    "lost_most": max(lost),
                }
                for kind, lost in sorted(self.strikes.items())
            },
            "places": dict(self.places),
            "problems": self.problems,
        }


def _segments(folder: Path) -> set[tuple[str, int]]:
    return {(run.key, run.manifest()["segment"]) for run in all_runs(folder / "runs")}


def _done(folder: Path) -> int:
    return sum(run.manifest()["status"] == "done" for run in all_runs(folder / "runs"))


def _building(folder: Path, before: set[tuple[str, int]]) -> Run | None:
    """The run that this start of the command is building; None between two, and before the first."""
    for run in all_runs(folder / "runs"):
        manifest = run.manifest()
        if manifest["status"] == "running" and (run.key, manifest["segment"]) not in before:
            return run
    return None


def _place(run: Run | None) -> str:
    """What a strike hits."""
    if run is None:
        return "start-up, or between two runs"
    if any(run.checkpoints.glob(".*.partial")):
        return "a checkpoint being written"
    return "the end of a run" if run.final.exists() else run.stage


# --- what is said of it


def table(summary: Mapping[str, Any]) -> Table:
    """The strikes, for a terminal."""
    shown = Table("strike", *(Column(name, justify="right") for name in HEAD[1:]))
    for row in _strike_rows(summary):
        shown.add_row(*row)
    return shown


HEAD = ("strike", "times", "exit codes", "steps lost, mean", "most")


def _strike_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for kind, of in summary["strikes"].items():
        codes = ", ".join(f"{code}: {times}" for code, times in of["codes"].items()) or "goes on"
        yield kind, str(of["times"]), codes, f"{of['lost_mean']:.2f}", str(of["lost_most"])


def sentence(summary: Mapping[str, Any]) -> str:
    """The whole in a few words."""
    ended = ", ".join(f"{count} in {name}" for name, count in summary["sweeps"].items()) or "none"
    strikes = sum(of["times"] for of in summary["strikes"].values())
    return (
        f"{summary['minutes']} minutes, {summary['starts']} starts, {strikes} strikes; sweeps ended: {ended};"
        f" {summary['runs']} runs compared with their undisturbed twins,"
        f" {len(summary['problems'])} differences."
    )


def page(summary: Mapping[str, Any]) -> str:
    """docs/results/chaos.md."""
    rows = ["| " + " | ".join(row) + " |" for row in (HEAD, ("---",) * 5, *_strike_rows(summary))]
    places = [f"| {place} | {times} |" for place, times in sorted(summary["places"].items())]
    problems = [f"- {problem}" for problem in summary["problems"]] or ["None."]
    lines = [
        "# A sweep that is killed again and again",
        INTRODUCTION,
        sentence(summary),
        "\n".join(rows),
        CODES,
        "\n".join(["| struck | times |", "|---|---|", *places]),
        "## Differences",
        "\n".join(problems),
        f"Made by `{summary['command']}` at commit {summary['commit']}.",
    ]
    return "\n\n".join(lines) + "\n"


INTRODUCTION = f"""\
A sweep of {len(ALGORITHMS)} algorithms ({", ".join(ALGORITHMS)}) with their
SFT policy and reward model, small enough for seconds a run, is given as one command, struck at random
moments, and given again until it ends by itself. Then every run is compared with one that nobody disturbed:
the digests of all files in `checkpoints/final` but the card, every row of the metrics but for the timed
columns, every sample byte by byte. No process, held lock, temporary file or checkpoint to resume from may be
left. With `checkpoint.every={MOST_LOST}` a strike may cost {MOST_LOST} optimiser steps, which are taken
again, and no more."""
CODES = """\
After an exit code stands how often it came. 75: stopped between two steps; 1: a worker was killed, and the
rest of the sweep was still made; -9: killed; -15, -10 and -2 or 130: SIGTERM, SIGUSR1 and SIGINT while
nothing listened, at start-up or between two runs."""


def main(words: Sequence[str]) -> int:
    """Soak, say what was found and write it down; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, required=True, help="of disturbance")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the moments and the kinds of strikes"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the runs are made; it must not exist yet"
    )
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    said = parser.parse_args(words)
    folder = said.folder or Path(tempfile.mkdtemp(prefix="rlhf-chaos-")) / "soak"
    folder.mkdir(parents=True)
    console = Console()
    soak = Soak(folder.absolute(), console, random.Random(said.seed))
    try:
        soak.soak(sweeps(), said.minutes)
    except KeyboardInterrupt:
        soak.problems.append("interrupted before the end")
    origin, command = provenance(), " ".join(["python scripts/chaos.py", *words])
    commit = f"{origin['commit']}{', with changes' if origin['patch'] else ''}"
    summary = {**soak.summary(), "command": command, "commit": commit}
    (folder / "chaos.json").write_text(json.dumps(summary, indent=2) + "\n")
    for path in (folder / "chaos.md", *([PAGE] if said.write else [])):
        path.write_text(page(summary), encoding="utf-8")
    console.print(table(summary))
    console.print(sentence(summary))
    console.print("\n".join(summary["problems"]), markup=False)
    console.print(f"more in {folder}", markup=False)
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
