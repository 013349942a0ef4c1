"""Words to verbs: train, plan, frontier, compare, report, runs, show, credit, sample, algos, data.

Everything heavy is imported inside a verb, so that `rlhf --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast, get_args

import typer

from rlhf_cli import __version__, neighbours
from rlhf_cli.errors import GO_ON, StageFailed, Stopped, UserError
from rlhf_cli.printable import as_json, file_name, told, visible
from rlhf_cli.secret import masked

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_cli.config import Recipe
    from rlhf_cli.plan import Plan
    from rlhf_cli.store.run import Run
    from rlhf_cli.tools.data_check import Checked
    from rlhf_cli.words import Line

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(rich_markup_mode=None)
app.add_typer(data_app, name="data", help="Look at data before anything is trained on them.")
sweep_app = typer.Typer(rich_markup_mode=None)
app.add_typer(sweep_app, name="sweep", help="List sweeps (train -m), or look after one.")
LOADING = (10_000, 50, 100)
"""Thresholds of the garbage collector until a run begins, which sets Python's own again."""
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for words it cannot read; it has no public name in every version."""
HYDRA = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Every word after the verb is Hydra's to read."""

Runs = Annotated[Path, typer.Option("--runs", envvar="RLHF_RUNS", help="Where runs are kept.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Out = Annotated[str, typer.Option(help="Files to write, without ending.")]
RunWords = Annotated[
    Optional[list[str]],  # noqa: UP045 - older typer cannot read `list[str] | None`
    typer.Argument(help="Runs by directory, name or key; all of a group if none is given."),
]
DataWords = Annotated[
    Optional[list[str]],  # noqa: UP045 - older typer cannot read `list[str] | None`
    typer.Argument(
        metavar="WORD",
        help="A file or a folder of your own first, if any; then what `rlhf train` would be told.",
    ),
]

SweepName = Annotated[str, typer.Argument(help="A sweep by name or key, or the beginning of one.")]

EXAMPLES = """
\b
Examples:
  rlhf {verb} algo=p3o_v2 data=hh
  rlhf {verb} algo=ppo algo.beta=0.1 seed=2 stage=rl
  rlhf {verb} -m algo=p3o_v2,ppo seed=1,2          a sweep, one run after the other
  rlhf {verb} -m algo=p3o_v2,ppo launch.slots=2    two at once
  rlhf {verb} model=pythia_1b launch=deepspeed launch.processes=8
  rlhf {verb} data=hh data.source=path data.path=DIR
  rlhf {verb} algo=mine --config-dir DIR           with DIR/algo/mine.yaml
  rlhf {verb} --cfg job                            every key and its value
"""

CHECK_EXAMPLES = """
\b
Examples:
  rlhf data check prefs.jsonl                      data of your own: a file, or a folder
  rlhf data check prefs.jsonl data.columns.response=completion
  rlhf data check chat.parquet model=custom model.name=DIR
  rlhf data check chat.parquet data.template=transcript
  rlhf data check data=hh data.source=path data.path=DIR --all
"""

WINRATE_EXAMPLES = """
\b
Examples:
  rlhf winrate p3o_v2-hh ppo-hh sft                every pair, by the proxy reward
  rlhf winrate p3o_v2-hh ppo-hh judge=gold judge.prompts=100
  rlhf winrate A B judge=gold judge.tolerance=0.25 --out tables/gold
  rlhf winrate A B judge=llm judge.model=NAME judge.url=http://localhost:8000/v1 judge.prompt=hh-1
\b
A language model also reads, with what is set unless you say otherwise:
  judge.key_env=null     the variable of the environment that holds its key
  judge.parallel=4       requests at once          judge.per_minute=null  and in a minute
  judge.timeout=60       seconds                   judge.retries=5        of a failed request
  judge.max_tokens=200   of an answer              judge.cache=DIR        of the answers
  judge.price_in=null    judge.price_out=null      of a million tokens, for the estimate
"""

INSPECT_EXAMPLES = """
\b
Examples:
  rlhf data inspect data=hh                        with the tokenizer that its model would have
  rlhf data inspect data=tldr --png figures        and a picture of the lengths
  rlhf data inspect prefs.jsonl model=pythia_1b data.max_prompt_tokens=256
"""


DOCTOR_EXAMPLES = """
\b
Examples:
  rlhf doctor                                      the machine
  rlhf doctor algo=ppo model=pythia_1b data=hh     and whether this chain fits on it
"""

FIGURE_EXAMPLES = """
\b
Examples:
  rlhf figure                                      every figure, and how many of its runs there are
  rlhf figure p3o_hh --run                         make the runs that are missing, then draw
  rlhf figure p3o_hh                               draw again, from the runs alone
  rlhf figure all --run --slots 2                  every figure, in one campaign
  rlhf plan figure=p3o_hh scale=paper              what the paper's own sizes would take
"""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    A user's mistake is one sentence on stderr and exit code 2, a stage that broke one sentence and
    exit code 1, an interrupt exit code 130.
    """
    words = sys.argv[1:] if words is None else list(words)
    neighbours.first()
    # Libraries make a million objects that stay; to look for garbage among them takes long.
    thresholds = gc.get_threshold()
    gc.set_threshold(*LOADING)
    # A user's own algorithm is found where the command is typed, as with `python -m`.
    sys.path.append(os.getcwd())
    read = [word for word in words if word != "--debug"] or ["--help"]
    try:
        code = app(read, prog_name="rlhf", standalone_mode=False)
    except (UserError, StageFailed, UsageError) as error:
        if "--debug" in words:
            raise
        print(f"error: {told(_sentence(error))}", file=sys.stderr)
        code = 1 if isinstance(error, StageFailed) else 2
    except Stopped as stopped:
        print(f"stopped: {told(str(stopped))}", file=sys.stderr)
        code = GO_ON
    finally:
        gc.set_threshold(*thresholds)
    raise SystemExit(code)


def _say(line: str) -> None:
    """A line about runs and files, whatever they are called."""
    print(visible(line))


def _say_files(files: Mapping[str, Path]) -> None:
    """What was written, by kind; a picture is called a figure."""
    for kind, path in files.items():
        _say(f"{'figure' if kind == 'png' else kind}: {path}")


def _sentence(error: Exception) -> str:
    """What went wrong; typer's own complaints do not say where to look."""
    if not isinstance(error, UsageError):
        return str(error)
    context = getattr(error, "ctx", None)
    said = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    return (
        f"{said}; `{context.command_path if context else 'rlhf'} --help` has the words there are."
    )


@app.callback(invoke_without_command=True)
def _rlhf(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")
    ] = False,
) -> None:
    """RLHF experiments from one command: SFT, reward model, RL, and the KL-reward frontier."""
    if version:
        print(f"rlhf-cli {__version__}")
        raise typer.Exit


@app.command(context_settings=HYDRA, epilog=EXAMPLES.format(verb="train"))
def train(context: typer.Context) -> None:
    """Build what is missing of a chain, or of a sweep with -m."""
    from rlhf_cli.words import read

    command = masked(shlex.join(["rlhf", "train", *context.args]))
    line = read(context.args)
    if any(word.startswith("launch.slots=") for word in line.words):
        from rlhf_cli import campaign

        campaign.load_ahead()
    jobs = _planned(line)
    if not jobs:
        return
    if len(jobs) == 1 and line.plain:
        _carry_out(jobs[0][1], command)
        return
    from rlhf_cli.sweeps import carry_out

    console = _console()
    with _interruptible():
        outcome = carry_out.run(jobs, line, command, console)
    raise typer.Exit(carry_out.end(outcome, command, console))


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="Directory, name or key, or the beginning of one.")],
    runs: Runs = Path("runs"),
) -> None:
    """Go on with a run that was stopped, by its own configuration: as its command would."""
    from rlhf_cli.plan import describe
    from rlhf_cli.resume import plan_of
    from rlhf_cli.store.run import find

    found = find(runs, run)
    if found.status() == "done":
        _say(f"finished: {found.path}")
        return
    plan = plan_of(found)
    _console().print(describe(plan))
    _carry_out(plan, found.manifest()["command"])


@app.command(context_settings=HYDRA, epilog=EXAMPLES.format(verb="plan"))
def plan(context: typer.Context) -> None:
    """Show what train would do, or what a figure needs (figure=NAME), and spend nothing."""
    named = [word for word in context.args if word.startswith("figure=")]
    if not named:
        from rlhf_cli.words import read

        _planned(read(context.args))
        return
    from rlhf_cli import gallery
    from rlhf_cli.plan import describe

    others = [word for word in context.args if word not in named]
    shown = gallery.exhibits([named[-1].removeprefix("figure="), *others])
    _console().print(describe(*(job.plan for each in shown for job in each.jobs)))
    print("\ncommands:")
    for line in dict.fromkeys(line for each in shown for line in gallery.sweeps(each)):
        _say(f"  {line}")


@app.command(context_settings=HYDRA, epilog=DOCTOR_EXAMPLES)
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Look for what would stop a run: packages, GPUs, disks, processes that meet, the hub, W&B.

    Exit code 1 if there is a fault.
    """
    from dataclasses import asdict

    from rich.console import Console

    from rlhf_cli.doctor.examination import examine
    from rlhf_cli.doctor.finding import picture

    with Console(stderr=True).status("looking"):
        findings = list(examine(context.args))
    if as_json:
        _print_json([asdict(each) for each in findings])
    elif findings:
        _console().print(picture(findings))
    if any(each.verdict == "fault" for each in findings):
        raise typer.Exit(1)


@app.command()
def frontier(
    run: RunWords = None,
    group: Annotated[
        str, typer.Option(help="Draw the runs of this group; the newest run's by default.")
    ] = "",
    fit: Annotated[
        str, typer.Option(help="Line of the rewards: straight or monotone.")
    ] = "straight",
    out: Out = "",
    runs: Runs = Path("runs"),
) -> None:
    """Draw KL against reward, with a line per algorithm."""
    from rlhf_cli.figures import frontier as figure

    if fit not in get_args(figure.Fit):
        raise UserError(f"--fit={fit} is not allowed: choose straight or monotone.")
    chosen, group = _chosen(runs, run, group)
    base = Path(out or f"figures/{file_name(group) or 'frontier'}")
    files = figure.frontier(chosen, base, _command(), cast(figure.Fit, fit))
    for each in chosen:
        _say(f"run: {each.path}")
    _say_files(files)
    print("next: rlhf train -m algo=p3o_v2,p3o_v1,ppo,dpo_online seed=1,2, then rlhf frontier")


@app.command(epilog=FIGURE_EXAMPLES)
def figure(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[NAME [WORD]...]", help="Figure (or all), scale=, KEY=VALUE."),
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Make the runs that are missing.")] = False,
    slots: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Runs at once: as many as there are cores by default."),
    ] = None,
    hours: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Begin no run that would take longer; say what that leaves out."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the files.")] = Path("figures"),
) -> None:
    """Draw a figure of a paper and say whether its claim holds; without a name, list them."""
    from rlhf_cli import campaign, gallery

    if run:
        campaign.load_ahead()
    shown = gallery.exhibits(words or [gallery.EVERY])
    if not words:
        _console().print(gallery.table(shown))
        print("next: rlhf figure NAME, rlhf plan figure=NAME scale=paper")
        return
    failures = []
    if run:
        wanted = gallery.commands(gallery.together(shown))
        with _interruptible():
            failures = campaign.run(wanted, slots or campaign.cores(), _console(), hours)
        shown = gallery.exhibits(words)
    for each in shown:
        if each.missing:
            continue
        if run:
            gallery.prepare(each)
        files, verdict = gallery.draw(each, out)
        _say(f"{each.spec.name}: {verdict}")
        _say_files(files)
    if failures:
        print(f"error: {len(failures)} runs failed:", file=sys.stderr)
        print("\n".join(f"  {one.path}: {told(one.reason)}" for one in failures), file=sys.stderr)
        raise typer.Exit(1)
    if incomplete := [each for each in shown if each.missing]:
        if run and hours is not None:
            _say(gallery.left_out(incomplete))
            return
        for line in dict.fromkeys(line for each in incomplete for line in gallery.sweeps(each)):
            print(line)
        raise gallery.refusal(incomplete)


@app.command("eval")
def evaluate(
    policy: Annotated[str, typer.Argument(help="A finished run, or a Hugging Face folder.")],
    like: Annotated[
        str,
        typer.Option(help="RL run whose prompts, reference and judges hold; itself by default."),
    ] = "",
    draws: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Measure a policy again, or one of elsewhere, as the runs of a comparison were measured."""
    from rlhf_cli import listing
    from rlhf_cli.remeasure import remeasure

    found = remeasure(runs, policy, like, draws, _command())
    shown = listing.details(found.run)
    if as_json:
        _print_json(shown)
        return
    _console().print(listing.page(shown))
    _say(f"measured like: {found.like.path}")
    _say(f"next: rlhf winrate {found.run.key} sft, rlhf show {found.run.key}")
    _say(f"run: {found.run.path}")


@app.command()
def compare(
    run: RunWords = None,
    group: Annotated[
        str, typer.Option(help="Compare the runs of this group; the newest run's by default.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Compare unequal runs too, and note what is unequal.")
    ] = False,
    kl: Annotated[
        str,
        typer.Option(help="Compare at these KLs too (1,2,5), against the curve of the first run."),
    ] = "",
    out: Out = "",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Set curves side by side at equal budgets: KL, rewards, what was spent and tried."""
    from rlhf_cli.evals import comparison, grid
    from rlhf_cli.listing import grid_table

    chosen, _ = _chosen(runs, run, group)
    compared = comparison.compare(chosen, force, _kls(kl))
    files = comparison.write(compared, Path(out), _command()) if out else {}
    if as_json:
        _print_json({name: grid.plain(found) for name, found in compared.grids.items()})
        return
    console = _console()
    for found in compared.grids.values():
        console.print(grid_table(found))
        console.print()
    _say_files(files)
    print("next: rlhf frontier, rlhf compare --out tables/NAME")


@app.command()
def report(
    run: RunWords = None,
    group: Annotated[
        str, typer.Option(help="Report on the runs of this group; the newest run's by default.")
    ] = "",
    kl: Annotated[
        str, typer.Option(help="Compare at these KLs (1,2,5); by default the usual ones reached.")
    ] = "",
    out: Annotated[Path, typer.Option(help="The page, or a folder for it.")] = Path("report.html"),
    runs: Runs = Path("runs"),
) -> None:
    """Write all about a set of runs into one page for a browser, which fetches nothing."""
    from rlhf_cli.report import page

    chosen, _ = _chosen(runs, run, group)
    file = page.write(chosen, out, _kls(kl), _command())
    _say(f"page: {file}")
    print("next: open the page, rlhf compare --out tables/NAME, rlhf winrate --help")


@app.command(epilog=WINRATE_EXAMPLES)
def winrate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [KEY=VALUE...]",
            help="Runs by directory, name or key, or sft; then who judges: reward, gold or llm.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many calls a judge would take.")
    ] = False,
    out: Out = "",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Count whose responses are better, for every pair of policies: by reward, gold or a judge."""
    from rich.console import Console

    from rlhf_cli import config
    from rlhf_cli.evals import grid
    from rlhf_cli.listing import grid_table
    from rlhf_cli.tools import winrate as tool

    judge = config.judge([word for word in words if "=" in word])
    policies = tool.policies(runs, [word for word in words if "=" not in word], judge)
    if dry_run or judge.kind == "llm":
        print(visible(tool.announce(policies, judge)), file=sys.stderr)
    if dry_run:
        return
    try:
        tables = tool.tables(policies, judge, tool.judged(policies, judge, Console(stderr=True)))
    except KeyboardInterrupt:
        print("\ninterrupted: give the same command again to go on.", file=sys.stderr)
        raise typer.Exit(130) from None
    names = (Path(out + end) for end in ("", "_matrix"))
    written = [grid.write(*pair) for pair in zip(tables, names, strict=False) if out]
    if as_json:
        _print_json([grid.plain(table) for table in tables])
        return
    for table in tables:
        _console().print(grid_table(table))
    for files in written:
        _say_files(files)
    print("next: rlhf winrate RUN... judge=gold, rlhf compare")


@app.command()
def runs(runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """List every run with its status and last evaluation."""
    from rlhf_cli import listing
    from rlhf_cli.store.run import all_runs

    rows = [listing.summary(run) for run in all_runs(runs)]
    if as_json:
        _print_json(rows)
    elif rows:
        console = _console()
        console.print(listing.table(rows, wide=console.width >= listing.WIDE))
    else:
        _say(f"no runs in {runs} yet; `rlhf train` makes one.")


@sweep_app.callback(invoke_without_command=True)
def sweeps(context: typer.Context, runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """List every sweep and how far it came; or look after one: status, retry, cancel."""
    if context.invoked_subcommand is not None:
        return
    from rlhf_cli.sweeps import index, standing

    found = [(sweep, standing.standings(sweep)) for sweep in index.every(runs)]
    if as_json:
        _print_json([standing.plain(*each) for each in found])
    elif found:
        _console().print(standing.table(found))
        print("next: rlhf sweep status NAME, rlhf sweep retry NAME")
    else:
        _say(f"no sweeps in {runs} yet; `rlhf train -m` makes one.")


@sweep_app.command()
def status(name: SweepName = "", runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Show every run of a sweep, why some are not done, and about how long the rest will take."""
    from rlhf_cli.sweeps import index, standing

    sweep = index.find(runs, name)
    found = standing.standings(sweep)
    if as_json:
        _print_json(standing.plain(sweep, found))
    else:
        _console().print(standing.page(sweep, found))


@sweep_app.command()
def retry(
    name: SweepName,
    runs: Runs = Path("runs"),
) -> None:
    """Run what failed, is missing or was cancelled, by the configurations of its first command."""
    from rlhf_cli.sweeps import carry_out, index

    sweep, console = index.find(runs, name), _console()
    with _interruptible():
        outcome = carry_out.retry(sweep, console)
    raise typer.Exit(carry_out.end(outcome, sweep.command, console))


@sweep_app.command()
def cancel(
    name: SweepName,
    runs: Runs = Path("runs"),
) -> None:
    """Ask what runs to stop after its step, and begin nothing more, until the sweep is retried."""
    from rlhf_cli.sweeps import carry_out, index

    sweep = index.find(runs, name)
    jobs, asked = carry_out.cancel(sweep)
    _say(f"{sweep.name}: {jobs} cancelled, {asked} running runs asked to stop")
    _say(f"next: rlhf sweep status {sweep.key}, rlhf sweep retry {sweep.key}")


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Directory, name or key, or the beginning of one.")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show one run: its origin, its end and its files."""
    from rlhf_cli import listing
    from rlhf_cli.store.run import find

    shown = listing.details(find(runs, run))
    if as_json:
        _print_json(shown)
    else:
        _console().print(listing.page(shown))


@app.command()
def credit(
    run: Annotated[str, typer.Argument(help="A finished sft or rl run.")],
    text: Annotated[
        str,
        typer.Option(help="A transcript, or an answer to --prompt; - reads stdin."),
    ],
    prompt: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(help="What is answered, up to Assistant: or TL;DR: (- reads stdin)."),
    ] = None,
    other: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Another answer to the same prompt, shown beside it."),
    ] = None,
    ref: Annotated[
        str, typer.Option(help="Another run, or a Hugging Face folder, instead of the SFT parent.")
    ] = "",
    beta: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Reward units per nat; the run's own by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the png and the html.")] = Path("figures"),
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Show what each token of an answer was worth: beta log(pi / pi_ref), an end token included."""
    from rlhf_cli.figures import credit as figure
    from rlhf_cli.tools import checkpoints, explain, terminal

    if beta is not None and not 0 < beta < float("inf"):
        raise UserError(f"--beta={beta:g} is not allowed: it must be above 0.")
    policy = checkpoints.trained(runs, run)
    anchor = checkpoints.trained_or_folder(runs, ref) if ref else policy.reference()
    if anchor is None:
        raise UserError(
            f"{policy.name} started from no policy; name what it is compared with: --ref=RUN."
        )
    asked = explain.question(_typed(text) or "", _typed(prompt), _typed(other))
    drawn, tokens = explain.explain(policy, anchor, asked, beta)
    assert policy.run is not None
    files = figure.write(drawn, out / f"credit-{policy.run.key}-{drawn.key()}")
    if as_json:
        answers = [
            {"name": answer.name, "sum": answer.total, "tokens": tokens[answer.name]}
            for answer in drawn.answers
        ]
        figures = {kind: str(path) for kind, path in files.items()}
        facts = {**drawn.facts, "beta": drawn.beta, "sums": figure.RELATIVE}
        _print_json({**facts, "prompt": drawn.prompt, "answers": answers, "figures": figures})
        return
    console = _console()
    colour = console.color_system is not None and not console.no_color
    console.print(terminal.heatmap(drawn, console.width, colour))
    _say_files(files)
    _say(f"next: rlhf sample {policy.run.key}, rlhf credit {policy.run.key} --text - --other ...")


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="A finished sft or rl run.")],
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A prompt, up to Assistant: or TL;DR: (- reads stdin)."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Without --prompt: held-out prompts.")] = 4,
    decode: Annotated[str, typer.Option(help="sample, greedy or beam.")] = "sample",
    width: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Of the beam: 5 by default."),
    ] = None,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of samples: 1 by default."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Of samples: that of the run's evaluations by default."),
    ] = None,
    proxy: Annotated[
        str, typer.Option(help="Decode pi (proxy / its reference)^weight: a finished run.")
    ] = "",
    proxy_ref: Annotated[
        str, typer.Option(help="Reference of the proxy, run or folder; its SFT parent by default.")
    ] = "",
    proxy_weight: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="1 by default."),
    ] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Decode responses: sampled, greedy, by beam search over log pi, or guided by a proxy."""
    from dataclasses import asdict

    from rlhf_cli.tools import checkpoints, terminal
    from rlhf_cli.tools.decode import Decoder, Decoding, corpus_of, prompts_of

    how = Decoding.of(decode, width, temperature, seed, bool(proxy))
    policy = checkpoints.trained(runs, run)
    pair = checkpoints.proxy(runs, proxy, proxy_ref, proxy_weight)
    corpus = corpus_of(policy)
    asked = prompts_of(policy, corpus, _typed(prompt), prompts)
    rows = Decoder.of(policy, corpus, pair).decode(asked, how)
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    _console().print(terminal.responses(rows))
    assert policy.run is not None
    _say(f"next: rlhf credit {policy.run.key} --text TRANSCRIPT, rlhf sample --help")


@app.command()
def algos(
    name: Annotated[str | None, typer.Argument(help="One of them, for all about it.")] = None,
    as_json: Json = False,
) -> None:
    """List the algorithms, or show one: its equations, its fields, where each number comes from."""
    from rlhf_cli import catalogue

    if as_json:
        chosen = [name] if name else catalogue.names()
        _print_json([catalogue.plain(catalogue.entry(each)) for each in chosen])
    elif name:
        _console().print(catalogue.page(catalogue.entry(name)))
    else:
        listed = [catalogue.entry(each, ["nano"]) for each in catalogue.names()]
        _console().print(catalogue.table(listed))
        print("next: rlhf algos NAME, rlhf train algo=NAME data=hh")


@data_app.command(context_settings=HYDRA, epilog=CHECK_EXAMPLES)
def check(
    words: DataWords = None,
    every: Annotated[
        bool, typer.Option("--all", help="Name every row that is left out, not three of a cause.")
    ] = False,
) -> None:
    """Read every row and list the bad ones.

    Exit code 2 if a run could not begin with them.
    """
    from rlhf_cli.tools import data_check

    jobs, given = _on_data(words)
    for made in jobs:
        checked = data_check.check(made.data)
        _console().print(data_check.report(checked, every))
        _end(checked, given)


@data_app.command(context_settings=HYDRA, epilog=INSPECT_EXAMPLES)
def inspect(
    words: DataWords = None,
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the lengths: to this file, or into this folder."),
    ] = None,
) -> None:
    """Measure the rows: lengths in tokens, what is cut, repeats, odd rows; a few are shown.

    Exit code 2 if a run could not begin with them.
    """
    from rlhf_cli.tools import data_inspect

    jobs, given = _on_data(words)
    if png is not None and png.suffix == ".png" and len(jobs) > 1:
        raise UserError(f"--png={png} is one file for {len(jobs)} pictures; give a folder.")
    for made in jobs:
        inspected = data_inspect.inspect(made)
        _console().print(data_inspect.report(inspected))
        if png is not None and (measured := inspected.measured):
            from rlhf_cli.figures import lengths

            panels = [measured.prompts], measured.answers
            file = lengths.write(made.data.title, measured.tokenizer, panels, png)
            _say(f"figure: {file}")
        _end(inspected.checked, given)


def _on_data(words: Sequence[str] | None) -> tuple[list[Recipe], list[str]]:
    """The jobs of a line that may begin with data of one's own, and what to tell `rlhf train`."""
    from rlhf_cli.config import recipe
    from rlhf_cli.words import collect

    given = list(words or [])
    if not given or "=" in given[0] or given[0][:1] in "-~":
        return [recipe(node) for node in collect(given)], given
    path, given[0] = given[0], "data=custom"
    jobs = collect(given)
    for node in jobs:
        # Not among the words: Hydra reads brackets and commas in a path by rules of its own.
        node.data.path = path
    return [recipe(node) for node in jobs], [*given, f"data.path={path}"]


def _end(checked: Checked, given: Sequence[str]) -> None:
    """Say what to run next, or what stands in the way of it."""
    if checked.fault is not None:
        raise checked.fault
    stage = [] if checked.survey.corpus.train.pairs else ["stage=sft"]
    _say(f"next: {shlex.join(['rlhf', 'train', *given, *stage])}")


def _chosen(runs: Path, references: Sequence[str] | None, group: str) -> tuple[list[Run], str]:
    """The runs that are named, or else all of a group, by default the newest run's, and its name."""
    from rlhf_cli.store.run import all_runs, find

    if references:
        return [find(runs, reference) for reference in references], group
    trained = [each for each in all_runs(runs) if each.stage == "rl"]
    if not trained:
        raise UserError(f"--runs={runs} holds no RL run yet; `rlhf train` makes one.")
    newest = max(trained, key=lambda each: str(each.manifest().get("started")))
    group = group or newest.manifest()["group"]
    chosen = [each for each in trained if each.manifest().get("group") == group]
    if not chosen:
        groups = sorted({str(each.manifest().get("group")) for each in trained})
        raise UserError(f"--group={group} has no RL run; choose one of {', '.join(groups)}.")
    return chosen, group


def _kls(words: str) -> list[float]:
    """KLs in nats with commas between."""
    try:
        return [float(each) for each in words.split(",") if words]
    except ValueError:
        raise UserError(
            f"--kl={words} is not allowed: give KLs in nats with commas between, such as --kl 1,2,5."
        ) from None


def _planned(line: Line) -> list[tuple[tuple[str, ...], Plan]]:
    """Compose, check and print every job of the line before any of them runs, each beside its own words.

    Of a search that is the first trial, since nobody knows the others yet.
    """
    from rlhf_cli import plan as planning
    from rlhf_cli.words import jobs

    if line.sweeper is None:
        found = [(job, planning.plan(node)) for job, node in jobs(line.words)]
    else:
        from rlhf_cli.sweeps import search

        found = [search.first(line)]
    if found:
        _console().print(planning.describe(*(each for _, each in found)))
    return found


def _carry_out(plan: Plan, command: str) -> None:
    """Build what is missing of one chain."""
    from rlhf_cli.launch import execute, set_deadline
    from rlhf_cli.plan import check_downloads

    check_downloads(plan)
    set_deadline([plan])
    with _interruptible():
        directory = execute(plan, command)
    if plan.recipe.stage == "rl":
        _say(f"next: rlhf frontier, rlhf show {plan.steps[-1].key}, rlhf runs")
    _say(f"run: {directory}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say how to go on after an interrupt."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted: give the same command again to go on.", file=sys.stderr)
        raise typer.Exit(130) from None


def _command() -> str:
    """What was typed."""
    return masked(shlex.join(["rlhf", *sys.argv[1:]]))


def _typed(words: str | None) -> str | None:
    """An option's words, or what stdin says where they are a dash; the last line's end is not meant."""
    return sys.stdin.read().removesuffix("\n") if words == "-" else words


def _console() -> Console:
    """A terminal's own width; wide enough not to break paths when piped."""
    from rich.console import Console

    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if fits else 160)


def _print_json(value: Any) -> None:
    print(as_json(value))
