"""Networks and servers that fail: W&B, the hub, and endpoints that score or judge; all on loopback."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import TypeAdapter

from rlhf_cli import hub, remote, track, worker
from rlhf_cli.errors import UserError
from rlhf_cli.judges.llm import Judge
from rlhf_cli.recipes import Chat, Http, Track
from rlhf_cli.rewards.http import endpoint
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from rlhf_cli.track import Mirror, open_mirror
from tests.conftest import Typed
from tests.data_samples import COMMIT, talk
from tests.servers import Biases, Reset, absent, biases, failing, served, silent
from tests.test_chain import TINY, rlhf
from tests.test_stopping import TIMED, wait_for

Fault = Callable[..., None]
KEY = "planted-" + "0123456789abcdef" * 3
OFF = "W&B is off for the rest of this run; metrics.jsonl is complete"
SFT = ["train", "stage=sft", *TINY, "sft.epochs=1"]
DOWN: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "nobody listens": absent, "it never answers": silent, "it answers 500": failing,
}  # fmt: skip


def whole(folder: Path, stage: str) -> Run:
    """The one run of a stage, which must be done and have a row for each of its steps but no two."""
    (path,) = (folder / "runs" / stage).iterdir()
    run, steps = Run(path), [row["step"] for row in read(path / "metrics.jsonl")]
    assert run.status() == "done" and steps == sorted({*steps}) and len(steps) > 1
    return run


def everything(folder: Path) -> bytes:
    """All that is in all files of a folder, and their names."""
    parts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return b"\n".join([*parts, *(str(path).encode() for path in folder.rglob("*"))])


# --- W&B


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets W&B go online, to a server of ours."""

    def use(address: str) -> None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", address)

    return use


@pytest.mark.faults
def test_a_run_without_its_wandb_server_ends_well_with_one_line(
    tmp_path: Path, credentials: Callable[[str], None], fault: Fault
) -> None:
    with silent() as address:
        credentials(address)
        done = rlhf(tmp_path, *SFT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(OFF) == 1 and "Traceback" not in done.stderr
    assert whole(tmp_path, "sft").manifest()["segment"] == 1
    assert KEY.encode() not in everything(tmp_path) + (done.stdout + done.stderr).encode()
    fault("W&B: its server never answers", "the run goes on; at its end it says so in one line")


@pytest.mark.faults
@pytest.mark.parametrize("key", [None, KEY])
def test_wandb_asks_nothing_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, fault: Fault
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    ours, theirs = pty.openpty()
    with absent() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        child = subprocess.Popen(
            [sys.executable, "-m", "rlhf_cli", *SFT],
            cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        said = b"".join(iter(lambda: _read(ours), b"")).decode()
        assert child.wait(60) == 0, said
    os.close(ours)
    assert "API key" not in said and "Enter" not in said and "wandb:" not in said
    assert said.count(OFF) == (1 if key else 0)
    whole(tmp_path, "sft")
    if key is None:
        fault("W&B: no credentials, at a terminal", "nothing is asked; the mirror is kept offline")
    else:
        fault("W&B: nobody listens at its address", "nothing is asked; one line, the run goes on")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.faults
def test_a_wandb_service_that_hangs_in_mid_run_costs_the_mirror_alone(
    tmp_path: Path, fault: Fault
) -> None:
    words = ["train", "stage=sft", *TINY, "sft.epochs=20", "track.mode=offline"]
    child = subprocess.Popen(
        [sys.executable, "-m", "rlhf_cli", *words], cwd=tmp_path, text=True,
        env={**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for(lambda: [*tmp_path.glob("runs/sft/*/wandb/offline-run-*/run-*.wandb")])
        (service,) = services(child.pid)
        service.suspend()
        _, said = child.communicate(timeout=200)
    finally:
        child.kill()
    assert child.returncode == 0, said
    assert said.count(OFF) == 1 and "Traceback" not in said
    assert len(read(whole(tmp_path, "sft").metrics_path)) > 20
    assert not service.is_running()
    fault("W&B: its service hangs in mid-run", "the run goes on; at its end it says so in one line")


def services(pid: int | None = None) -> list[psutil.Process]:
    """W&B's services below a process."""
    return [each for each in psutil.Process(pid).children() if each.name() == track.SERVICE]


def at_the_end_of_patience(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finishes it with less patience than a beginning needs."""
    with monkeypatch.context() as patch:
        patch.setattr(track, "PATIENCE", 2.0)
        patch.setattr(track, "GRACE", 1.0)
        mirror.finish(0)


@pytest.fixture
def tracking(
    credentials: Callable[[str], None],
) -> Iterator[tuple[Callable[[Path], Mirror], Biases]]:
    """Opens a mirror of a run that is online; and the server."""

    def opened(path: Path) -> Mirror:
        asked = Track(kind="wandb", mode="auto", project="p", group=None)
        names = {"name": "n", "key": "0123456789", "group": "g", "job_type": "sft"}
        return open_mirror(asked, path, **names, tags=[], config={})  # type: ignore[arg-type]

    with biases() as (address, server):
        credentials(address)
        yield opened, server
        track._end_service()


def test_a_run_that_goes_on_is_the_same_run_of_the_wandb_server(
    tmp_path: Path, tracking: tuple[Callable[[Path], Mirror], Biases]
) -> None:
    opened, server = tracking
    for step in (1, 2):
        mirror = opened(tmp_path)
        mirror.log({"step": step, "episodes": 8 * step})
        mirror.finish(0)
    assert {*server.runs} == {"0123456789"}
    assert [row["step"] for row in server.rows] == [1, 2]


def test_a_wandb_server_that_goes_away_in_mid_run_is_given_up_at_the_end(
    tmp_path: Path,
    tracking: tuple[Callable[[Path], Mirror], Biases],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    opened, server = tracking
    mirror = opened(tmp_path)
    wait_for(lambda: server.runs, 20)
    server.gone.set()
    for step in range(100):
        mirror.log({"step": step, "episodes": step})
    at_the_end_of_patience(mirror, monkeypatch)
    assert [record.name for record in caplog.records if OFF in record.getMessage()] == [
        "rlhf_cli.track"
    ]
    fault("W&B: its server goes away in mid-run", "the end waits 25 s at most, then says so")


@pytest.mark.parametrize("sign", [signal.SIGSTOP, signal.SIGKILL])
def test_rows_are_handed_over_at_once_whatever_the_service_does_and_the_next_run_has_a_new_one(
    tmp_path: Path,
    tracking: tuple[Callable[[Path], Mirror], Biases],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    sign: signal.Signals,
    fault: Fault,
) -> None:
    opened, server = tracking
    mirror = opened(tmp_path / "first")
    wait_for(lambda: server.runs, 20)
    (service,) = services()
    service.send_signal(sign)

    def log() -> None:
        for step in range(5000):  # more than the socket to the service takes
            mirror.log({"step": step, **{f"value{n}": float(n) for n in range(40)}})

    logging = threading.Thread(target=log, daemon=True)
    logging.start()
    logging.join(30)
    assert not logging.is_alive()
    at_the_end_of_patience(mirror, monkeypatch)
    assert not service.is_running()
    assert sum(OFF in record.getMessage() for record in caplog.records) == 1
    second = opened(tmp_path / "second")
    second.log({"step": 7, "episodes": 7})
    second.finish(0)
    assert sum(OFF in record.getMessage() for record in caplog.records) == 1
    assert server.rows[-1]["step"] == 7
    if sign is signal.SIGKILL:
        fault("W&B: its service is killed", "one line; the next run of the process has a new one")


def test_rows_that_nobody_takes_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(track, "BACKLOG", 3)
    stuck = threading.Event()
    mirror = Mirror(stuck.wait)
    for step in range(10):
        mirror.log({"step": step})
    stuck.set()
    mirror.finish(0)
    (said,) = (r.getMessage() for r in caplog.records if r.name == "rlhf_cli.track")
    assert said == f"{OFF} (it is 3 rows behind)"


# --- the hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, for this process and those it starts."""
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    return tmp_path / "hf" / "hub"


def warm(cache: Path, kind: str, repository: str, files: Mapping[str, bytes]) -> None:
    """What a download of these files leaves."""
    place = cache / f"{kind}s--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


MODEL = ["model=custom", "model.name=some/model", f"model.revision={COMMIT}"]
ROWS = ["data=hh", "data.source=hub", f"data.revision={COMMIT}"]
INSTEAD = {
    "model": f"model.name=some/model is no local folder, the cache of the Hugging Face hub does not have it"
    f" at revision {COMMIT}, and the hub cannot be reached at {{}}: use model=custom model.name=DIR for a"
    " local checkpoint, model=nano to train from scratch, or HF_HUB_OFFLINE=1 with a filled cache.",
    "data": f"data.source=hub, but Anthropic/hh-rlhf is not in the cache at commit {COMMIT} and {{}} does not"
    " answer: use data.source=path data.path=DIR for local files, data.source=embedded with model=nano for"
    " the built-in corpus, or HF_HUB_OFFLINE=1 with a filled cache.",
}


@pytest.mark.parametrize("how", DOWN)
@pytest.mark.parametrize(
    ("what", "words"), [("model", [*MODEL, "data.source=embedded"]), ("data", ROWS)]
)
def test_without_the_hub_a_run_is_refused_before_anything_is_built(
    typed: Typed,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    what: str,
    words: list[str],
    fault: Fault,
) -> None:
    with DOWN[how]() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        code, _, err = typed("train", *words, "track=off")
    assert (code, err) == (2, f"error: {INSTEAD[what].format(address)}\n")
    assert not [*tmp_path.glob("runs/*/*")]
    kind = {"model": "a model", "data": "a data set"}[what]
    fault(f"Hugging Face hub: {how}, {kind} is wanted", "one sentence before anything is built")


@pytest.mark.faults
def test_without_the_hub_model_and_data_come_from_the_cache(
    tmp_path: Path,
    cache: Path,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    model = shared_data / "models" / "stories260K-hf"
    warm(cache, "model", "some/model", {file.name: file.read_bytes() for file in model.iterdir()})
    warm(cache, "dataset", "Anthropic/hh-rlhf", dialogues())
    sizes = ["data.max_prompt_tokens=96", "data.max_response_tokens=24", "eval.prompts=4"]
    with silent() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        words = ["stage=sft", *MODEL, *ROWS, *sizes, "model.regime=nano", "sft.epochs=1"]
        done = rlhf(tmp_path, "train", *words, "sft.batch=8", "track=off", timeout=120)
    assert done.returncode == 0, done.stderr
    assert whole(tmp_path, "sft").manifest()["model"] == "custom"
    fault("Hugging Face hub: it never answers, all is in its cache", "the run reads the cache")


def dialogues() -> dict[str, bytes]:
    """Rows of HH as the hub has them."""
    return {
        f"helpful-base/{split}.jsonl": "".join(
            json.dumps(talk(f"What is {split} {n}?", "A number.", "No.")) + "\n" for n in range(32)
        ).encode()
        for split in ("train", "test")
    }


def test_rows_of_another_commit_in_the_cache_are_not_taken_for_those_asked_for(
    tmp_path: Path, cache: Path, root: Path, fault: Fault
) -> None:
    """In a process of its own: the libraries read where their cache is when they are imported."""
    warm(cache, "dataset", "Anthropic/hh-rlhf", dialogues())
    code = (
        "import sys; from rlhf_cli.data.rows import read_hub\n"
        "print(len([*read_hub('Anthropic/hh-rlhf', sys.argv[1], 'train', [], 'helpful-base')]))"
    )
    with absent() as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "PYTHONPATH": str(root)}
        found = [
            subprocess.run(
                [sys.executable, "-c", code, commit], env=environment, cwd=tmp_path,
                capture_output=True, text=True,
            )
            for commit in (COMMIT, COMMIT[::-1])
        ]  # fmt: skip
    assert found[0].stdout == "32\n", found[0].stderr
    assert f"is not in the cache at commit {COMMIT[::-1]}" in found[1].stderr
    fault(
        "Hugging Face hub: nobody listens, its cache has another commit",
        "one sentence: rows of another commit are never read",
    )


# --- endpoints that score or judge


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    taken: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", taken.append)
    return taken


def scores(url: str, tmp_path: Path, **changes: Any) -> object:
    """Two scores from a server."""
    values = {"kind": "http", "url": url, "key_env": None, "batch": 8, "timeout": 5.0, "retries": 2}
    return endpoint(TypeAdapter(Http).validate_python(values | changes))(["p", "q"], [" r", " s"])


def verdicts(url: str, tmp_path: Path, **changes: Any) -> object:
    """A judge's opinion of one pair."""
    values: dict[str, Any] = {
        "kind": "llm", "prompts": None, "model": "m", "url": url, "key_env": None, "prompt": "hh-1",
        "max_tokens": 5, "parallel": 1, "per_minute": None, "timeout": 5.0, "retries": 2,
        "price_in": None, "price_out": None, "cache": str(tmp_path),
    }  # fmt: skip
    judge = Judge(TypeAdapter(Chat).validate_python(values | changes))
    return judge.verdicts([judge.question("p", "a", "b")], lambda: None)


ASKED = {
    "reward=http": (scores, "reward.source.url", {"scores": [1.0, 2.0]}, [1.0, 2.0]),
    "judge=llm": (
        verdicts,
        "judge.url",
        {"choices": [{"message": {"content": "Verdict: A"}}]},
        [1.0],
    ),
}
either = pytest.mark.parametrize("kind", ASKED)


def broken_off() -> Iterator[bytes]:
    yield b'{"scores": ['
    raise Reset


PASSING: dict[str, Any] = {
    "a reset before the answer": None,
    "a reset in the middle of the answer": broken_off,
    "429 with Retry-After": (429, b"slow down", {"Retry-After": "7"}),
    "500": (500, b"oops"),
}


@either
@pytest.mark.parametrize("how", PASSING)
def test_a_stumble_is_outlived_and_a_fault_that_stays_is_one_sentence(
    tmp_path: Path, naps: list[float], kind: str, how: str, fault: Fault
) -> None:
    ask, key, right, expected = ASKED[kind]
    broken = [True, True, False]

    def answer(body: Mapping[str, Any], number: int) -> Any:
        if not broken[min(number, len(broken)) - 1]:
            return 200, right
        if PASSING[how] is None:
            raise Reset
        return (200, broken_off()) if PASSING[how] is broken_off else PASSING[how]

    with served(answer, "") as (url, got):
        assert ask(url, tmp_path / "one") == expected
        assert len(got) == 3
        waited = [7.0, 7.0] if "Retry" in how else [1.0, 2.0]
        assert naps == pytest.approx(waited, abs=0.5)
        got.clear()
        broken[:] = [True]
        with pytest.raises(UserError) as error:
            ask(url, tmp_path / "two")
    assert len(got) == 3
    said = str(error.value)
    assert said.startswith(f"{key}={url} did not answer in 3 attempts of 5 s (")
    assert said.endswith(
        "); see to the server and give the same command again, which goes on from what is done."
    )
    fault(
        f"{kind}: {how}",
        "asked again after 1, 2, 4, ... s or as it says; one sentence if it stays so",
    )


@either
def test_an_answer_that_trickles_is_not_waited_for_longer_than_allowed(
    tmp_path: Path, kind: str, fault: Fault
) -> None:
    ask, key, _, _ = ASKED[kind]

    def trickle() -> Iterator[bytes]:
        for _ in range(100):  # each byte well within the time
            time.sleep(0.05)
            yield b" "

    with served(lambda *_: (200, trickle()), "") as (url, _got), pytest.raises(UserError) as error:
        ask(url, tmp_path, timeout=0.5, retries=0)
    assert str(error.value).startswith(
        f"{key}={url} did not answer in 1 attempts of 0.5 s (its answer does not end); "
    )
    fault(f"{kind}: an answer that trickles for ever", "counts as no answer after its time")


@either
def test_an_endless_answer_is_read_to_16_mib_and_no_further(
    tmp_path: Path, kind: str, fault: Fault
) -> None:
    ask, key, _, _ = ASKED[kind]
    sent: list[int] = []

    def flood() -> Iterator[bytes]:
        for _ in range(1024):  # 1 GiB
            sent.append(2**20)
            yield b"1" * 2**20

    with served(lambda *_: (200, flood()), "") as (url, got), pytest.raises(UserError) as error:
        ask(url, tmp_path, timeout=60)
    assert str(error.value) == (
        f"{key}={url} answers with more than 16 MiB; see whether it is the server that was meant."
    )
    assert len(got) == 1 and len(sent) < 64  # what sockets hold
    fault(f"{kind}: an answer of 1 GiB", "16 MiB are read, then one sentence")


@either
@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"<html>", "'<html>'"),
        (b"\xff\xfe", "'\ufffd\ufffd'"),
        (b'{"scores": 5', "'{\"scores\": 5'"),
        (b'["scores"]', "'[\"scores\"]'"),
        (b"[" * 100_000, repr("[" * 80)),
        (b"null", "'null'"),
    ],
    ids=["html", "not text", "half of it", "a list", "100,000 brackets", "null"],
)
def test_garbage_is_one_sentence_and_not_asked_for_again(
    tmp_path: Path, kind: str, body: bytes, shown: str, fault: Fault, request: Any
) -> None:
    ask, key, _, _ = ASKED[kind]
    with served(lambda *_: (200, body), "") as (url, got), pytest.raises(UserError) as error:
        ask(url, tmp_path)
    assert len(got) == 1
    said = str(error.value)
    assert said.startswith(f"{key}={url} must answer ")
    assert said.endswith(f", but answered {shown}.")
    fault(f"{kind}: garbage ({request.node.callspec.id.split('-')[0]})", "one sentence shows it")


def test_numbers_that_are_none_are_missing_scores_and_too_few_are_refused(
    tmp_path: Path, fault: Fault
) -> None:
    for odd in (b"NaN", b"1e999", b"-Infinity", b"9" * 4000, b"null"):
        body = b'{"scores": [1, %s]}' % odd
        with served(lambda *_, body=body: (200, body), "") as (url, _):
            one, other = scores(url, tmp_path)  # type: ignore[misc]
            assert one == 1.0 and other != other
    with (
        served(lambda *_: (200, {"scores": [1.0]}), "") as (url, _),
        pytest.raises(UserError) as error,
    ):
        scores(url, tmp_path)
    assert str(error.value) == (
        f"reward.source.url={url} must give a list of 2 scores, one per response, but gave 1."
    )
    fault(
        "reward=http: NaN, infinities, null", "missing scores, for which reward.missing says what"
    )
    fault("reward=http: too few scores", "one sentence")


@either
@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_that_an_endpoint_repeats_is_shown_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float], kind: str, status: int
) -> None:
    ask, *_ = ASKED[kind]
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    body = f"no good: Bearer {KEY}".encode()
    with served(lambda *_: (status, body), "") as (url, got), pytest.raises(UserError) as error:
        ask(url, tmp_path, key_env="ENDPOINT_KEY")
    assert got[0]["key"] == f"Bearer {KEY}"
    assert KEY not in str(error.value) and "Bearer ***" in str(error.value)


# --- a run whose reward server dies


def test_what_one_of_several_processes_is_refused_reaches_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks a server about its own share of the responses."""
    Run(tmp_path).log.mkdir()
    (tmp_path / "config.yaml").write_text("- not a configuration")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(worker.DRIVER, raising=False)
    assert worker.main([str(tmp_path)]) == 2
    assert str(tmp_path) in (Run(tmp_path).log / worker.SAID[UserError]).read_text()


SCORED = [
    *TINY, "eval.points=4", "checkpoint.every=2", "track=off", "reward=http", "data.max_response_tokens=12",
    "reward.source.key_env=ENDPOINT_KEY", "reward.source.timeout=5",
]  # fmt: skip


class Scores:
    """Scores by length, as long as it is well."""

    def __init__(self) -> None:
        self.ill: Callable[[Mapping[str, Any], int], bool] = lambda body, number: False
        self.since = 0

    def __call__(self, body: Mapping[str, Any], number: int) -> tuple[int, Any]:
        if self.ill(body, number - self.since):
            raise Reset
        return 200, {"scores": [len(response) / 10 for response in body["responses"]]}


@contextmanager
def scoring() -> Iterator[tuple[str, list[dict[str, Any]], Scores]]:
    scorer = Scores()
    with served(scorer) as (url, got):
        yield f"reward.source.url={url}", got, scorer


def same(run: Run, twin: Run) -> None:
    """Weights, samples and all metrics but the timed ones."""
    weights = "checkpoints/final/model.safetensors"
    assert run.manifest()["outputs"][weights] == twin.manifest()["outputs"][weights]
    ours, theirs = (
        [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in read(r.metrics_path)]
        for r in (run, twin)
    )
    assert ours == theirs
    for file in twin.samples.iterdir():
        assert (run.samples / file.name).read_bytes() == file.read_bytes()


@pytest.mark.faults
def test_a_reward_server_that_comes_back_in_time_or_later_leaves_no_trace_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("ENDPOINT_KEY", KEY)
    twin, stumbled, stopped = (tmp_path / name for name in ("twin", "stumbled", "stopped"))
    with scoring() as (url, got, scorer):
        for folder in (twin, stumbled, stopped):
            folder.mkdir()
        words = ["train", *SCORED, url]
        done = rlhf(twin, *words)
        assert done.returncode == 0, done.stderr
        needed = len(got)
        for folder in (stumbled, stopped):
            shutil.copytree(twin / "runs" / "sft", folder / "runs" / "sft")

        scorer.since, scorer.ill = len(got), lambda body, number: number in (2, 3, needed)
        done = rlhf(stumbled, *words)
        assert done.returncode == 0, done.stderr
        same(whole(stumbled, "rl"), whole(twin, "rl"))
        fault(
            "reward=http: the server is away for seconds in mid-run",
            "asked again; equal to the twin",
        )

        scorer.since, scorer.ill = len(got), lambda body, number: number > needed // 2
        done = rlhf(stopped, *words, "reward.source.retries=1")
        assert done.returncode == 2, done.stderr
        (path,) = (stopped / "runs" / "rl").iterdir()
        assert "did not answer in 2 attempts of 5 s (" in done.stderr.splitlines()[-1]
        assert Run(path).status() == "failed"
        assert [each for each in (path / "checkpoints").iterdir() if each.name.isdecimal()]
        scorer.ill = lambda body, number: False
        done = rlhf(stopped, *words, "reward.source.retries=1")
        assert done.returncode == 0, done.stderr
        run = whole(stopped, "rl")
        assert run.manifest()["segment"] == 2
    assert KEY.encode() not in everything(tmp_path)
    fault(
        "reward=http: the server dies in mid-run and is back later",
        "one sentence, exit code 2; the same command goes on from the last checkpoint, equal to the twin",
        lost="checkpoint.every steps at most",
    )
