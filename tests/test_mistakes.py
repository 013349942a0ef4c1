"""What a user may get wrong: one sentence, a fitting exit code, and nothing left behind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import hub, launch
from rlhf_cli.config import compose
from rlhf_cli.errors import StageFailed, UserError
from rlhf_cli.plan import check_downloads, plan
from rlhf_cli.store import pretrained
from rlhf_cli.store.files import check_writable
from rlhf_cli.store.run import Run
from tests.conftest import Typed

Rlhf = Callable[..., tuple[int, str]]


@pytest.fixture
def rlhf(typed: Typed) -> Rlhf:
    """Exit code and stderr of a command line in an empty folder."""

    def run(*words: str) -> tuple[int, str]:
        code, _, err = typed(*words)
        return code, err

    return run


def folder(path: Path, *left_out: str) -> Path:
    """A folder with the files of a pretrained model, less those left out."""
    path.mkdir()
    for name in {"config.json", "model.safetensors", "tokenizer.json", "README.md"} - {*left_out}:
        (path / name).write_text(name)
    return path


def keys(model: Path) -> list[str]:
    """Keys of the sft, reward and RL runs that start from a model folder."""
    words = ["model=custom", f"model.name={model}", "data.source=embedded"]
    return [step.key for step in plan(compose(words)).steps]


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that only raises."""

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope"], "No such command 'nope'; `rlhf --help`"),
        (["-m", "algo=ppo"], "No such option: -m; `rlhf --help`"),
        (["show"], "Missing argument 'run'; `rlhf show --help`"),
        (["runs", "--nope"], "No such option: --nope; `rlhf runs --help`"),
        (["plan", "data.source=web"], "data.source=web is not allowed: choose one of embedded"),
        (
            ["plan", "model.regime=big"],
            "model.regime=big is not allowed: choose one of nano, paper",
        ),
        (["plan", "data.subsets=x"], "must be a list, as in data.subsets=[A,B]"),
        (["plan", "++unknown.key=1"], "unknown is not a key of the configuration"),
        (["plan", "paths.runs="], "paths.runs is empty"),
        (["plan", "model.name=x"], "model.name=x has no effect"),
        (["plan", "reward.model.name=x"], "choose model@reward.model=custom"),
        (["plan", "model=custom", "model.name=/nowhere"], "model.name=/nowhere is no folder"),
        (["plan", "model=custom", "model.name=../a/b"], "repository as OWNER/NAME"),
        (
            ["plan", "model=custom", "model.name=a/b"],
            "name a commit of it with model.revision=COMMIT",
        ),
        (["plan", "reward=hf", "reward.source.name=a/b"], "with reward.source.revision=COMMIT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_exit_code_2_and_no_file(
    rlhf: Rlhf, tmp_path: Path, words: list[str], says: str
) -> None:
    code, err = rlhf(*words)
    assert code == 2
    assert err.startswith("error: ") and err.endswith(".\n") and err.count("\n") == 1
    assert says in err and list(tmp_path.iterdir()) == []


def test_an_interrupt_says_in_one_line_how_to_go_on_and_ends_with_130(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "execute", raising(KeyboardInterrupt()))
    code, err = rlhf("train")
    assert (code, err.strip()) == (130, "interrupted: give the same command again to go on.")


def test_a_stage_that_broke_is_one_sentence_and_exit_code_1(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "execute", raising(StageFailed("a worker ended with code 3")))
    assert rlhf("train") == (1, "error: a worker ended with code 3\n")


def test_one_bad_job_of_a_sweep_is_found_before_the_first_of_3_starts(
    rlhf: Rlhf, tmp_path: Path
) -> None:
    code, err = rlhf("train", "-m", "algo.beta=0.1,0.2,-1")
    assert code == 2 and "algo.beta=-1 is not allowed" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", "has no config.json;"),
        ("model.safetensors", "has no weights (*.safetensors, "),
        ("tokenizer.json", "has no tokenizer (tokenizer.json, "),
    ],
)
def test_a_model_folder_that_is_not_whole_is_refused_at_plan_time(
    rlhf: Rlhf, tmp_path: Path, file: str, says: str
) -> None:
    place = folder(tmp_path / "model", file)
    code, err = rlhf("plan", "model=custom", f"model.name={place}", "data.source=embedded")
    assert code == 2 and f"model.name={place} {says}" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["model", "reward.model"])
@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_a_model_that_reads_less_than_a_prompt_and_a_response_is_refused_at_plan_time(
    rlhf: Rlhf, tmp_path: Path, key: str, name: str
) -> None:
    """The longest of 96 and 48 tokens are 144."""
    long, short = folder(tmp_path / "long"), folder(tmp_path / "short")
    (long / "config.json").write_text(json.dumps({name: 144}))
    (short / "config.json").write_text(json.dumps({name: 143}))
    words = ["model=custom", "model@reward.model=custom", "data.source=embedded"]
    places = {"model.name": long, "reward.model.name": long}
    assert rlhf("plan", *words, *(f"{k}={place}" for k, place in places.items()))[0] == 0
    places[f"{key}.name"] = short
    code, err = rlhf("plan", *words, *(f"{k}={place}" for k, place in places.items()))
    assert (code, err) == (
        2,
        f"error: {key}.name={short} reads 143 tokens, fewer than data.max_prompt_tokens=96 +"
        " data.max_response_tokens=48; lower them to 143 together.\n",
    )


def test_a_repository_tells_what_it_reads_before_any_run_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[tuple[str, str | None]]()
    config = tmp_path / "config.json"

    def fetch(name: str, revision: str | None) -> None:
        fetched.append((name, revision))
        config.write_text(json.dumps({"max_position_embeddings": 100}))

    monkeypatch.setattr(hub, "out_of_reach", lambda: False)
    monkeypatch.setattr(hub, "cached_config", lambda *_: config if config.exists() else None)
    monkeypatch.setattr(hub, "fetch_config", fetch)
    words = ["model@reward.model=custom", "reward.model.name=a/b", "reward.model.revision=abc"]
    made = plan(compose([*words, "model.scratch.context=144"]))
    with pytest.raises(UserError) as error:
        check_downloads(made)
    assert str(error.value) == (
        "reward.model.name=a/b reads 100 tokens, fewer than data.max_prompt_tokens=96 +"
        " data.max_response_tokens=48; lower them to 100 together."
    )
    assert fetched == [("a/b", "abc")]


def test_a_repository_that_is_not_there_is_refused_before_any_run_is_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "out_of_reach", lambda: False)
    monkeypatch.setattr(hub, "cached_config", lambda *_: None)
    monkeypatch.setattr(hub, "fetch_config", raising(OSError("404 Client Error.\nURL: ...")))
    words = ["model=custom", "model.name=a/b", "model.revision=abc", "data.source=embedded"]
    with pytest.raises(UserError) as error:
        check_downloads(plan(compose(words)))
    assert str(error.value) == (
        "model.name=a/b cannot be had from the Hugging Face hub (404 Client Error): use model=custom"
        " model.name=DIR for a local checkpoint, model=nano to train from scratch, or HF_HUB_OFFLINE=1"
        " with a filled cache."
    )


ROW = {"prompt": "p", "chosen": " a", "rejected": " b", "id": 1}
GOOD = "".join(json.dumps(ROW | {"prompt": f"p{n}", "id": n}) + "\n" for n in range(40)).encode()
GOES_ON = "; mend or delete the row, or leave such rows out with data.on_bad_row=drop."
TRUNCATED = "Compressed file ended before the end-of-stream marker was reached"
SPOILT = {
    "truncated gzip": (
        "x.jsonl.gz",
        gzip.compress(GOOD)[:-12],
        f"{{}} cannot be read to its end ({TRUNCATED}); replace it with a whole copy.",
    ),
    "invalid JSON": (
        "x.jsonl",
        GOOD + b"{oops\n",
        "rows/x.jsonl:41: it is not valid JSON (Expecting property name enclosed in double quotes)"
        + GOES_ON,
    ),
    "a column of another type": (
        "x.jsonl",
        GOOD + json.dumps(ROW | {"chosen": 5}).encode(),
        f"rows/x.jsonl:41: column chosen holds a number, not text{GOES_ON}",
    ),
    "not UTF-8": (
        "x.jsonl",
        GOOD + b'{"prompt": "\xff"}',
        f"rows/x.jsonl:41: byte 13 is no UTF-8{GOES_ON}",
    ),
    "NUL": (
        "x.jsonl",
        GOOD + json.dumps(ROW | {"prompt": "\0"}).encode(),
        f"rows/x.jsonl:41: column prompt holds a NUL character{GOES_ON}",
    ),
    "zeros where rows were": (
        "x.jsonl",
        GOOD + b"\0" * 512,
        f"rows/x.jsonl:41: it is not valid JSON (Expecting value){GOES_ON}",
    ),
    "empty": ("x.jsonl", b"", "{} holds no usable row; give a file with rows."),
    "10 MB in one line": (
        "x.jsonl",
        GOOD + b'{"prompt": "' + b"p" * 10 * 2**20 + b'"}',
        f"rows/x.jsonl:41: it is longer than 8 MiB{GOES_ON}",
    ),
    "an id twice": (
        "x.jsonl",
        GOOD + json.dumps(ROW | {"id": 0}).encode(),
        "rows/x.jsonl:41: its id is that of rows/x.jsonl:1 (data.columns.id=null reads none)"
        + GOES_ON,
    ),
}


@pytest.mark.parametrize(("name", "data", "says"), SPOILT.values(), ids=SPOILT)
def test_spoilt_data_are_refused_alike_by_check_and_by_train_before_a_run_is_begun(
    rlhf: Rlhf, tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    file = tmp_path / "rows" / name
    file.parent.mkdir()
    file.write_bytes(data)
    expected = 2, f"error: {says.format(file)}\n"
    assert rlhf("data", "check", str(file)) == expected
    words = ["data=custom", f"data.path={file}", "track=off", f"paths.runs={tmp_path}/runs"]
    assert rlhf("train", *words) == expected
    assert not any((tmp_path / "runs").rglob("*"))


def test_moving_a_model_folder_or_editing_its_card_renames_none_of_3_runs(tmp_path: Path) -> None:
    before = keys(folder(tmp_path / "here"))
    moved = (tmp_path / "here").rename(tmp_path / "there")
    (moved / "README.md").write_text("another card")
    assert len(before) == 3 and keys(moved) == before


def test_another_checkpoint_under_the_same_path_renames_all_3_runs(tmp_path: Path) -> None:
    place = folder(tmp_path / "model")
    before = keys(place)
    (place / "model.safetensors").write_text("one more epoch")
    pretrained.contents.cache_clear()  # read once per process, and this is a later one
    assert not {*before} & {*keys(place)}


def test_without_the_hub_a_pretrained_model_fails_before_any_run_is_begun(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "out_of_reach", lambda: True)
    monkeypatch.setattr(hub, "is_cached", lambda name, revision: False)
    code, err = rlhf("train", "model=pythia_1b")
    assert code == 2 and "model.name=EleutherAI/pythia-1b" in err
    for way in ("model=custom model.name=DIR", "model=nano", "HF_HUB_OFFLINE=1"):
        assert way in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_the_cache_or_already_tuned_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "out_of_reach", lambda: True)
    words = ["model=pythia_1b", f"paths.runs={tmp_path}"]
    monkeypatch.setattr(hub, "is_cached", lambda name, revision: True)
    check_downloads(plan(compose(words)))
    monkeypatch.setattr(hub, "is_cached", lambda name, revision: False)
    sft = Run(plan(compose(words)).steps[0].path)
    sft.begin("", {})
    sft.finish()
    check_downloads(plan(compose(words)))
    with pytest.raises(UserError, match=r"^reward\.model\.name=EleutherAI/pythia-410m"):
        check_downloads(plan(compose([*words, "model@reward.model=pythia_410m"])))


def test_a_runs_folder_that_is_a_file_or_cannot_be_created_is_refused(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    code, err = rlhf("train", f"paths.runs={tmp_path}/file")
    assert code == 2 and "in the way" in err and "paths.runs=DIR" in err and err.count("\n") == 1
    monkeypatch.setattr(Path, "mkdir", raising(FileNotFoundError()))
    with pytest.raises(UserError, match=r"paths\.runs=.*x cannot be created"):
        check_writable(tmp_path / "x")


@pytest.mark.parametrize("damaged", ["tokenizer.json", "model.safetensors"])
def test_damaged_model_files_are_one_sentence_that_names_the_folder(
    tmp_path: Path, shared_data: Path, damaged: str
) -> None:
    from transformers import AutoModelForCausalLM

    from rlhf_cli.models.load import load
    from rlhf_cli.models.tokenizer import load_tokenizer

    place = tmp_path / "model"
    place.mkdir()
    for file in (shared_data / "models" / "stories260K-hf").iterdir():
        (place / file.name).write_bytes(b"{" if file.name == damaged else file.read_bytes())
    with pytest.raises(UserError, match=rf"^model\.name={place}: .* cannot be loaded .*\.$"):
        load_tokenizer(place)
        load(AutoModelForCausalLM, place, None, "fp32")
