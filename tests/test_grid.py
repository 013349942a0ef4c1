"""Tables in every format: the numbers come back out of them, and every character survives LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_cli.errors import UserError
from rlhf_cli.evals.grid import Cell, Grid, escaped, shown, text, write
from rlhf_cli.listing import grid_table

NAN = math.nan
GRID = Grid(
    "HH & TL;DR",
    ("curve", "seeds", "KL", "gold", "FLOP"),
    (
        ("p3o_v2", 3, Cell(1.234, se=0.04), Cell(1.23, interval=(1.1, 1.35)), 1.25e15),
        ("a|b 50%", 4096, Cell(-2.5), None, NAN),
    ),
    ("Means ± errors.",),
)


def drawn(grid: Grid, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(grid_table(grid))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (Cell(1.234, se=0.04), "1.23 ± 0.04"),
        (Cell(1.23, interval=(1.1, 1.35)), "1.23 [1.10, 1.35]"),
        (Cell(-0.5, interval=(-1.0, 0.25)), "-0.50 [-1.00, 0.25]"),
        (Cell(12.0, se=3.4), "12.00 ± 3.40"),
        (Cell(1.23456, se=0.0004), "1.2346 ± 0.0004"),
        (Cell(0.5, interval=(0.498, 0.502)), "0.500 [0.498, 0.502]"),
        (Cell(1.0, se=1e-12), "1.000000 ± 0.000000"),
        (Cell(1.2, se=0.0), "1.20 ± 0.00"),
        (Cell(1.2, se=NAN), "1.20"),
        (Cell(1.2), "1.20"),
        (Cell(NAN, se=0.1), ""),
        (NAN, ""),
        (None, ""),
        (4096, "4,096"),
        (12, "12"),
        (2_500_000_000_000, "2.5e+12"),
        (98304.4, "98,304"),
        (-98304.4, "-98,304"),
        (178.25, "178.2"),
        (1.25e15, "1.25e+15"),
        (2e-5, "2e-05"),
        ("p3o_v2", "p3o_v2"),
    ],
)
def test_a_cell_shows_as_many_places_as_its_error_has_and_at_least_two(
    cell: object, said: str
) -> None:
    assert shown(cell) == said


def test_the_csv_has_a_column_for_each_part_of_a_number_and_leaves_nan_empty() -> None:
    assert text(GRID, "csv") == (
        "curve,seeds,KL,KL se,gold,gold low,gold high,FLOP\n"
        "p3o_v2,3,1.234,0.04,1.23,1.1,1.35,1250000000000000.0\n"
        "a|b 50%,4096,-2.5,,,,,\n"
    )


def test_every_number_comes_back_out_of_the_csv_and_the_json_as_it_was() -> None:
    chance = random.Random(0)
    values = [(chance.gauss(0, 1e3), chance.random(), chance.randrange(10**12)) for _ in range(50)]
    grid = Grid("", ("x", "n"), tuple((Cell(x, se=se), n) for x, se, n in values))
    rows = csv.DictReader(io.StringIO(text(grid, "csv")))
    assert [(float(row["x"]), float(row["x se"]), int(row["n"])) for row in rows] == values
    read = json.loads(text(grid, "json"))["rows"]
    assert [(row["x"]["value"], row["x"]["se"], row["n"]) for row in read] == values


def test_commas_quotes_and_line_ends_in_a_name_do_not_break_the_csv() -> None:
    name = 'a, "b"\nc'
    assert list(csv.reader(io.StringIO(text(Grid("", (name,), ((name,),)), "csv")))) == [
        *([name], [name])
    ]


def test_the_json_has_rows_by_column_and_null_for_what_is_no_number() -> None:
    grid = Grid("t", ("a", "b"), (("x", Cell(1.0, interval=(0.5, math.inf))), (NAN, Cell(NAN))))
    assert json.loads(text(grid, "json")) == {
        "title": "t",
        "columns": ["a", "b"],
        "rows": [
            {"a": "x", "b": {"value": 1.0, "low": 0.5, "high": None}},
            {"a": None, "b": None},
        ],
        "notes": [],
    }
    assert "NaN" not in text(grid, "json") and "Infinity" not in text(grid, "json")


def test_the_markdown_is_a_table_with_numbers_at_the_right() -> None:
    assert text(GRID, "md") == (
        "**HH & TL;DR**\n"
        "\n"
        "| curve | seeds | KL | gold | FLOP |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| p3o_v2 | 3 | 1.23 ± 0.04 | 1.23 [1.10, 1.35] | 1.25e+15 |\n"
        "| a\\|b 50% | 4,096 | -2.50 |  |  |\n"
        "\n"
        "Means ± errors.\n"
    )


def test_the_latex_is_a_booktabs_table_with_numbers_in_math_mode() -> None:
    assert text(GRID, "tex") == (
        "% needs \\usepackage{booktabs}\n"
        "\\begin{table}\n"
        "  \\centering\n"
        "  \\caption{HH \\& TL;DR}\n"
        "  \\begin{tabular}{lrrrr}\n"
        "    \\toprule\n"
        "    curve & seeds & KL & gold & FLOP \\\\\n"
        "    \\midrule\n"
        "    p3o\\_v2 & $3$ & $1.23 \\pm 0.04$ & $1.23\\ [1.10, 1.35]$ & $1.25 \\times 10^{15}$ \\\\\n"
        "    a\\textbar{}b 50\\% & $4{,}096$ & $-2.50$ &  &  \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "  \\par\\smallskip{\\footnotesize Means $\\pm$ errors.\\par}\n"
        "\\end{table}\n"
    )


@pytest.mark.parametrize(
    ("sign", "safe"),
    [
        *((sign, "\\" + sign) for sign in "&%$#_{}"),
        ("\\", "\\textbackslash{}"),
        ("~", "\\textasciitilde{}"),
        ("^", "\\textasciicircum{}"),
        ("<", "\\textless{}"),
        (">", "\\textgreater{}"),
        ("|", "\\textbar{}"),
        ("[", "{[}"),
        ("]", "{]}"),
        ("*", "{*}"),
        ("±", "$\\pm$"),
    ],
)
def test_a_character_that_latex_would_obey_is_only_printed(sign: str, safe: str) -> None:
    assert escaped(f"a{sign}{sign}b") == f"a{safe}{safe}b"


def test_what_is_plain_in_latex_stays_as_it_is() -> None:
    assert escaped("beta=0.1, lr 1e-06; (p < q)?") == "beta=0.1, lr 1e-06; (p \\textless{} q)?"


def test_columns_in_which_no_row_has_anything_can_be_left_out() -> None:
    grid = Grid("t", ("a", "b", "c", "d"), (("x", None, NAN, 0), ("y", "", Cell(NAN), NAN)), ("n",))
    assert grid.without_empty_columns() == Grid("t", ("a", "d"), (("x", 0), ("y", NAN)), ("n",))


def test_a_table_without_rows_keeps_its_columns_in_every_format() -> None:
    empty = Grid("t", ("a", "b"), ())
    assert text(empty, "csv") == "a,b\n"
    assert json.loads(text(empty, "json"))["columns"] == ["a", "b"]
    assert "| a | b |\n| --- | --- |\n" in text(empty, "md")
    assert "    a & b \\\\\n    \\midrule\n    \\bottomrule\n" in text(empty, "tex")


def test_a_wide_terminal_shows_all_columns_side_by_side() -> None:
    assert drawn(GRID, 80) == [
        "HH & TL;DR",
        "curve    seeds           KL               gold      FLOP",
        "p3o_v2       3  1.23 ± 0.04  1.23 [1.10, 1.35]  1.25e+15",
        "a|b 50%  4,096        -2.50",
        "Means ± errors.",
    ]


def test_in_a_narrow_one_what_does_not_fit_goes_below_beside_the_names() -> None:
    assert drawn(GRID, 30) == [
        "HH & TL;DR",
        "curve    seeds           KL",
        "p3o_v2       3  1.23 ± 0.04",
        "a|b 50%  4,096        -2.50",
        "curve                 gold",
        "p3o_v2   1.23 [1.10, 1.35]",
        "a|b 50%",
        "curve        FLOP",
        "p3o_v2   1.25e+15",
        "a|b 50%",
        "Means ± errors.",
    ]


def test_both_columns_that_name_a_row_are_repeated_and_a_long_name_is_folded() -> None:
    names = ("a name of twenty-one", 1.5)
    grid = Grid("", ("curve", "KL", "x", "y"), ((*names, Cell(0.25), Cell(0.5)),), names=2)
    assert drawn(grid, 24)[1:] == [
        "curve          KL     x",
        "a name of     1.5  0.25",
        "twenty-one",
        "curve          KL     y",
        "a name of     1.5  0.50",
        "twenty-one",
    ]


def test_square_brackets_in_a_name_are_no_markup() -> None:
    assert drawn(Grid("[bold]t", ("[red]c",), (("[dim]x[/]",),), ("[b]n",)), 40) == [
        "[bold]t",
        "[red]c",
        "[dim]x[/]",
        "[b]n",
    ]


def test_every_kind_is_a_file_whose_name_only_gains_an_ending(tmp_path: Path) -> None:
    files = write(GRID, tmp_path / "new" / "v1.5")
    assert {kind: path.name for kind, path in files.items()} == {
        "csv": "v1.5.csv",
        "json": "v1.5.json",
        "md": "v1.5.md",
        "tex": "v1.5.tex",
    }
    assert files["md"].read_text(encoding="utf-8").startswith("**HH & TL;DR**\n")
    assert [*write(GRID, tmp_path / "one", ["csv"])] == ["csv"]
    assert not (tmp_path / "one.tex").exists()


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*taken: a file of that name is in the way"):
        write(GRID, tmp_path / "taken" / "table")
