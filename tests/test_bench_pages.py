"""What is drawn from a record: tables, pages, pictures; and the published tables are those of the published run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastxent.bench import Comparison, pictures, publish, report, terminal
from fastxent.bench.record import NOISY, Arithmetic, Cell, Confident, Limit, Problem, Seconds

ROOT = Path(__file__).parent.parent


def seconds(median, rounds=9, spread=0.02):
    return Seconds(0.9 * median, median * (1 - spread), median, median * (1 + spread), rounds)


def of_problem(operation, classes, ours, peer, limit, **changed):
    """A limit and three cells: ours, a peer, and one that is absent."""
    problem = Problem(operation, (2**20 // classes, classes), "float32", 2)
    cells = [
        Cell(
            problem, name, seconds(time), time / 2**20 * 1e9, 2**22 / time / 1e9, limit / time, time / peer,
            extra_bytes=10**8 * (name != "fastxent"), worst_error=1e-7, worst_ulps=1.25,
            confident_error=1e-7 if name == "fastxent" else 1.0, same_bits_twice=True, same_bits_across_threads=True,
        )
        for name, time in (("fastxent", ours), ("torch", peer))
    ]  # fmt: skip
    cells[0] = replace(cells[0], **changed)
    absent = Cell(problem, "jax.jit", note="absent: needs jax: pip install fastxent[peers]")
    return Limit(problem, "read", seconds(limit), 2**22 / limit / 1e9), [*cells, absent]


@pytest.fixture
def found():
    parts = [
        of_problem("loss", 1000, 0.004, 0.02, 0.003),
        of_problem("loss", 32_000, 0.003, 0.03, 0.003),
        of_problem("loss and gradient", 1000, 0.01, 0.05, 0.008),
    ]
    return Comparison(
        {"processor": "<an abacus>", "cores": 2}, "2026-01-02 03:04 UTC", 12.5,
        tuple(limit for limit, _ in parts), tuple(cell for _, cells in parts for cell in cells),
        (Confident("loss", "float32", "fastxent", (0.0, 30.0), (1e-7, 1e-7)),
         Confident("loss", "float32", "torch", (0.0, 30.0), (1e-7, 1.0))),
        (Arithmetic("float32", 2, 1e10),),
    )  # fmt: skip


def test_json_gives_the_record_back(found, tmp_path):
    text = found.to_json(tmp_path / "record.json")
    assert (tmp_path / "record.json").read_text("utf-8") == text
    assert Comparison.from_json(text) == found
    record = json.loads(text)
    assert record["noise"] == pytest.approx(0.04)
    assert {"operation", "shape", "candidate", "seconds", "of_limit"} <= set(record["cells"][0])


def test_terminal_says_who_is_fastest_and_by_how_much(found):
    text = str(found)
    assert "fastxent is 5.00 times as fast as torch, the fastest peer; fastxent runs at 75% of the limit, read." in text
    assert text.count("jax.jit: absent: needs jax: pip install fastxent[peers]") == 1
    assert max(map(len, text.splitlines())) <= terminal.WIDE
    rows = [line.split() for line in text.splitlines() if line.startswith(" fastxent ")]
    assert rows[0] == [
        "fastxent",
        "████████",
        "3.6",
        "ms",
        "4",
        "ms",
        "4%",
        "3.8",
        "1",
        "75%",
        "0.20",
        "x",
        "<",
        "1",
        "MB",
        "1.2",
        "1.0e-07",
        "yes",
    ]


def test_a_machine_too_noisy_to_tell_says_so(found):
    assert "too noisy" not in str(found)
    noisy = replace(found.limits[0], seconds=replace(found.limits[0].seconds, high=0.003 * (1 + NOISY), low=0.0029))
    assert "This machine is too noisy to tell much" in report.noise(replace(found, limits=(noisy, *found.limits[1:])))


def test_quartiles_that_overlap_tell_nothing():
    limit, cells = of_problem("loss", 1000, 0.0201, 0.02, 0.003)
    assert report.verdict(limit, cells).startswith("Too noisy to tell fastxent from torch, the fastest peer")
    limit, cells = of_problem("loss", 1000, 0.03, 0.02, 0.003)
    assert report.verdict(limit, cells).startswith("torch is 1.50 times as fast as fastxent; fastxent runs at 10%")


def test_few_rounds_tell_little():
    limit, cells = of_problem("loss", 1000, 0.01, 0.02, 0.003)
    limit = replace(limit, seconds=replace(limit.seconds, rounds=2))
    assert "in 2 rounds, which is too few to tell" in report.verdict(limit, cells)
    assert report.spread(limit.seconds) == ""
    limit, cells = of_problem("loss", 1000, 0.01, 0.02, 0.003)
    for place in (0, 1):
        few = [
            replace(cell, seconds=replace(cell.seconds, rounds=1)) if i == place else cell
            for i, cell in enumerate(cells)
        ]
        assert "in 1 round, which is too few to tell" in report.verdict(limit, few)


def test_noise_of_few_rounds_is_not_known(found):
    few = replace(found, limits=tuple(replace(limit, seconds=seconds(0.003, rounds=2)) for limit in found.limits))
    assert few.noise is None
    assert "over its median: not known, of fewer than 3 rounds." in str(few)
    assert json.loads(few.to_json())["noise"] is None
    assert Comparison.from_json(few.to_json()) == few
    assert "noise" not in publish.grid(few)
    one_known = replace(few, limits=(*few.limits[:2], found.limits[2]))
    assert one_known.noise == pytest.approx(0.04)


def test_a_wrong_one_is_named_with_its_error():
    limit, cells = of_problem("loss", 1000, 0.01, 0.02, 0.003)
    wrong = Cell(limit.problem, "abacus", worst_error=0.25, row_error=0.5, note="wrong")
    text = str(Comparison({}, "", 0.0, (limit,), (*cells, wrong)))
    assert "abacus is wrong, by 25% of a row's largest entry, 50% of a row's sum, and was not timed." in " ".join(
        text.split()
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5 s"), (0.00123, "1.23 ms"), (4.2e-5, "42 us"), (5e-7, "0.5 us"),
        (0.9996, "1 s"), (0.9994, "999 ms"), (9.996e-4, "1 ms"), (999.7, "1000 s"), (3600.0, "3600 s"),
    ],
)  # fmt: skip
def test_seconds(value, text):
    assert report.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.004, "0.004 x"), (0.05, "0.05 x"), (0.25, "0.25 x"), (9.996, "10 x"), (12.3, "12 x"), (None, "")],
)
def test_ratio(value, text):
    assert report.ratio(value) == text


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (40, "median"),
        (80, "min median of limit of peer ulp"),
        (100, "min median IQR of limit of peer ulp confident"),
        (terminal.WIDE, "min median IQR ns/element GB/s of limit of peer memory ulp confident bits"),
    ],
)
def test_a_table_fits_its_terminal(found, width, headings):
    """Columns go, the least telling first; nothing is cut."""
    new = replace(found.cells[0], candidate="fastxent, new memory", seconds=seconds(0.0123))
    text = terminal.text(replace(found, cells=(*found.cells, new)), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert headings in {" ".join(line.split()) for line in text.splitlines()}
    assert re.search("^ fastxent, new memory .* 12.3 ms ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("twice", "across", "text"),
    [(True, True, "yes"), (True, None, "twice"), (True, False, "twice only"), (False, None, "no"), (None, None, "")],
)
def test_same_bits(twice, across, text):
    _, (cell, *_) = of_problem("loss", 10, 1.0, 2.0, 0.5, same_bits_twice=twice, same_bits_across_threads=across)
    assert report.same_bits(cell) == text


class TestPage:
    @pytest.fixture(autouse=True)
    def packages(self):
        pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")

    def test_it_is_one_file_without_network(self, found):
        text = found.html()
        assert not re.search(r"""(src|href)=["'](?!#)""", text.replace('xlink:href="#', ""))
        assert "<script" not in text
        assert "&lt;an abacus&gt;" in text
        assert "pip install fastxent[peers]" in text

    def test_a_picture_for_everything_that_was_measured(self, found):
        # three problems, one operation at two numbers of classes, one roofline, one sweep of confident rows
        assert found.html().count("<svg") == 3 + 1 + 1 + 1
        less = replace(found, confident=(), arithmetic=(), limits=found.limits[:1], cells=found.cells[:3])
        assert less.html().count("<svg") == 1

    def test_pictures_say_what_they_show(self, found):
        text = found.html()
        for words in (
            "Time against classes",
            "ns an element",
            "Roofline, 2 threads",
            "exponentials for each byte moved",
            "of the limit, read",
        ):
            assert words in text

    def test_a_roof_for_each_dtype(self, found):
        half = [replace(limit, problem=replace(limit.problem, dtype="bfloat16")) for limit in found.limits]
        cells = [replace(cell, problem=replace(cell.problem, dtype="bfloat16")) for cell in found.cells]
        roofs = (Arithmetic("float32", 2, 1e10), Arithmetic("bfloat16", 2, 8e9), Arithmetic("bfloat16", 1, 5e9))
        both = replace(found, limits=(*found.limits, *half), cells=(*found.cells, *cells), arithmetic=roofs)
        (text,) = pictures.rooflines(both)
        assert "float32 arithmetic, 10.0 G/s" in text
        assert "bfloat16 arithmetic, 8.0 G/s" in text
        assert "5.0 G/s" not in text

    def test_a_float16_gradient_that_vanishes_is_nobodys(self, found):
        gradient = replace(found.confident[0], operation="loss and gradient")
        curves = tuple(replace(gradient, dtype=dtype) for dtype in ("float16", "float32"))
        few, many = pictures.confidence(replace(found, confident=curves))
        assert "float16 holds no gradient below 6e-8" in few
        assert "6e-8" not in many

    def test_a_row_of_new_memory_has_its_colour(self, found):
        new = replace(found.cells[0], candidate="fastxent, new memory")
        assert "fastxent, new memory" in replace(found, cells=(*found.cells, new)).html()

    def test_one_picture_of_all_bars(self, found):
        text = found.svg()
        assert text.startswith("<svg")
        assert text.count("of the limit, read: 3 ms") == 2
        assert text == found.svg()

    def test_nothing_timed_is_no_error(self, found):
        nothing = replace(found, cells=tuple(replace(cell, seconds=None, note="wrong") for cell in found.cells))
        assert "<svg" in nothing.html()
        assert "Nothing of ours was timed." in str(nothing)


def test_published_tables_are_those_of_the_published_run():
    found = list(publish.tables(ROOT))
    assert len(found) >= 2
    for page, name, table in found:
        text = page.read_text("utf-8")
        assert publish.replaced(text, name, table) == text, f"{page}: run python -m fastxent.bench.publish"
        assert publish.replaced(text, name, f"{table}, another day") != text


def test_every_table_has_a_place():
    for page, name, *_ in publish.PAGES:
        assert "of another day" in publish.replaced((ROOT / page).read_text("utf-8"), name, "of another day")


def test_a_page_without_a_place_for_its_table():
    with pytest.raises(ValueError, match=r"<!-- grid: python -m fastxent\.bench\.publish -->"):
        publish.replaced("no marks", "grid", "table")


def test_a_whole_record_is_published(found):
    """With rounds, memory, noise, versions and the row of new memory, read back from its file."""
    new = [
        replace(cell, candidate="fastxent, new memory", seconds=seconds(2 * cell.seconds.median))
        for cell in found.cells
        if cell.candidate == "fastxent" and cell.problem.operation == "loss and gradient"
    ]
    record = Comparison.from_json(replace(found, cells=(*found.cells, *new)).to_json())
    lines = publish.grid(record).splitlines()
    assert lines[0] == "processor <an abacus>; cores 2; measured 2026-01-02 03:04 UTC; noise 4%"
    assert "| classes | dtype | fastxent | GB/s | of the limit | ulp | torch | fastxent, new memory |" in lines
    assert "| 1,000 | float32 | 10 ms | 0.42 | 80% | 1.2 | 5.0 x | 2.0 x |" in lines
    assert publish.summary(record).splitlines()[0] == lines[0]


def test_tables_to_publish(found):
    lines = publish.grid(found).splitlines()
    assert "| 1,000 | float32 | 4 ms | 1 | 75% | 1.2 | 5.0 x |" in lines
    assert "| classes | dtype | fastxent | GB/s | of the limit | ulp | torch |" in lines
    assert "| 1,000 | 4 ms | 75% | torch 5.0 x | 10 ms | 80% | torch 5.0 x |" in publish.summary(found).splitlines()
