"""What measures a GPU does so on tiny shapes without one, and says what it could not measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import gpu
from rlhf_cli.devices import GPUS
from rlhf_cli.shapes import neox

ROOT = Path(__file__).parents[1]


def called(*command: str, **environment: str) -> str:
    """What a command of the repository prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


def parts(folder: Path, *names: str) -> str:
    """Runs parts on the tiny shape."""
    where = ["--shapes", "tiny", "--device", "cpu", "--folder", str(folder)]
    return called(sys.executable, "-m", "benchmarks.gpu", *names, *where, OMP_NUM_THREADS="1")


def test_bounds_by_hand() -> None:
    """One layer of width 2, 5 tokens to choose from; 3 prompts of 4 tokens, replies of 3."""
    # Products (3 + 1 + 4 + 4) w^2, their biases (3 + 1 + 4 + 1) w, two norms of 2 w, the last, the output.
    weights = 12 * 4 + 9 * 2 + 2 * 4 + 4 + 5 * 2
    # Of each row, keys and values of 5 columns for the second token and of 6 for the third.
    assert gpu.least_read(neox(1, 2, 1, 5), 3, 4, 3) == 2 * (3 * weights + 3 * (2 * 2) * (5 + 6))

    sizes = gpu.SHAPES[
        "tiny"
    ]  # 2 layers of width 32, 512 tokens; 4 prompts of 8, 2 replies of 8 each
    token, pair, head = 24 * 2 * 32**2, 4 * 2 * 32, 2 * 32 * 512
    tokens = 4 * (8 + 2 * 7)
    pairs = 4 * (8 * 9 / 2 + 2 * (8 * 7 + 7 * 8 / 2))
    once = tokens * token + pairs * pair + 4 * 2 * 8 * head
    assert gpu.learned_with(sizes, apart=False) == 3 * once
    assert gpu.learned_with(sizes, apart=True) == 3 * (once + 4 * (8 * token + 8 * 9 / 2 * pair))


def test_words_survive_as_text() -> None:
    """TRL reads texts where the project reads ids: both must score as many tokens."""
    tokenizer, ids = gpu.words_apart(50304), [2, 50303, 17, 4096, 2]
    text = tokenizer.decode(ids)
    assert tokenizer(text + text)["input_ids"] == ids + ids
    assert len(tokenizer) == 50304 and tokenizer.eos_token_id != tokenizer.pad_token_id


def test_shapes_and_sheets() -> None:
    assert gpu.TITLES.keys() == GPUS.keys()
    sizes = [gpu.SHAPES[name] for name in gpu.MEASURED]
    assert [round(each.shape.parameters / 1e6) for each in sizes] == [162, 1415]
    assert {(each.rows, each.prompt, each.reply) for each in sizes} == {(64, 256, 256)}


def test_parts_without_a_gpu(tmp_path: Path) -> None:
    """The project's own parts do what they do on a GPU, and the page says what is missing."""
    page = parts(tmp_path, "prepare", "generation", "step", "page")
    found = json.loads((tmp_path / "gpu.json").read_text())
    steps = found["parts"]["step-tiny"]["samples"]
    assert len(steps) == len(found["parts"]["generation-tiny"]["samples"]) == gpu.ROUNDS
    for each in steps:
        assert 0 < each["parts"]["learning"] < each["seconds"]
        assert 0 < each["parts"]["drawing"] < each["seconds"]
    generated, trl, vllm, product, sheet = found["lines"]
    assert generated["ratio"] > 0 and product["ratio"] > 0
    assert trl["note"] == "trl: it was not run" and vllm["note"] == "trl-vllm: it was not run"
    assert sheet["note"] == "no data sheet of cpu is known"
    assert "3 of 5 rows were not measured" in page


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_trl_without_a_gpu(tmp_path: Path) -> None:
    parts(tmp_path, "prepare")
    parts(tmp_path, "step")
    parts(tmp_path, "trl", "page")
    line = json.loads((tmp_path / "gpu.json").read_text())["lines"][1]
    assert line["against"] == "TRL rloo" and line["ratio"] > 0


def test_script_without_a_gpu(tmp_path: Path) -> None:
    said = called("bash", "benchmarks/gpu.sh", str(tmp_path / "none"), CUDA_VISIBLE_DEVICES="")
    assert said.startswith("No CUDA device was found, so nothing was measured.")
    for shape in gpu.MEASURED:
        assert said.count(f", {shape}, against ") == 5
    assert not (tmp_path / "none").exists()


PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"-m venv"*) echo "venvs are not to be had"; exit 1 ;;
    *"gpu prepare"*)
        mkdir "{folder}/$5"
        echo '{{"device": {{"name": "a GPU"}}}}' >"{folder}/prepare-$5.json" ;;
    *"gpu trl-vllm"*) echo "vllm is not installed" >&2; exit 1 ;;
    *"gpu page"*) exec "{real}" "$@" ;;
    *"gpu"*) exit 3 ;;
esac
"""


def test_script_says_what_failed(tmp_path: Path) -> None:
    """A machine that seems to have a GPU, on which every part but one fails in its way."""
    tools, folder = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    python = PYTHON.format(folder=folder, real=sys.executable)
    for name, text in (("python3", python), ("nvidia-smi", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    said = called("bash", "benchmarks/gpu.sh", str(folder), PATH=path, CUDA_VISIBLE_DEVICES="0")
    assert "no virtual environment could be made (venvs are not to be had)" in said
    assert "prepare-160m done" in said and "generation-1.4b NOT MEASURED" in said
    page = (folder / "gpu.md").read_text()
    assert page.count("trl-vllm: ended with code 1: vllm is not installed") == 2
    assert page.count("| generation: ended with code 3:") == 2
    assert "0 of 0 goals" in page and "10 of 10 rows were not measured" in page
    assert not (folder / "160m").exists()
