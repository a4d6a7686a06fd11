"""`cce-torchrec report`: pages of whole, failed, running, older, damaged and hostile runs."""

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from cce_torchrec.cli.main import command
from cce_torchrec.report import charts, write_report
from cce_torchrec.report.charts import Bars, Line, histogram_chart, line_chart, thin
from cce_torchrec.report.html import Html, tag
from cce_torchrec.report.numbers import duration, number, percent, short, size, tick_label, ticks
from cce_torchrec.report.page import page
from cce_torchrec.report.runs import read_runs
from cce_torchrec.report.tables import _together
from tests.support.optional import needs
from tests.support.runs import write_older_run, write_run

VOID = {"meta", "br", "hr"}


class Parsed(HTMLParser):
    """Elements and text of a page, whose tags have to match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], {}
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        inside = self.open[-1] if self.open else ""
        self.text[inside] = self.text.get(inside, "") + text

    def words(self):
        return " ".join(v for k, v in self.text.items() if k not in ("script", "style"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "cce", steps=600)
    write_run(root / "small", seed=1, rows=32, steps=600, learning_rate=0.05)
    write_run(root / "failed", steps=600, state="failed", error="rank 1: no memory")
    write_run(root / "running", steps=600, state="running")
    write_older_run(root / "older")
    return root


def parsed(*folders):
    return Parsed(page(read_runs(folders)))


def assert_needs_no_network(found, text):
    """Nothing is loaded, and nothing may be: by the page's own policy neither."""
    for name, attributes in found.elements:
        assert name not in ("img", "link", "iframe", "object", "embed", "base", "form"), name
        assert not attributes.keys() & {"src", "srcset", "action", "data"}, name
        assert attributes.get("href", "#").startswith("#")
        assert not [key for key in attributes if key.startswith("on")]
    assert "url(" not in text and "@import" not in text
    script = found.text["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in found.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy
    assert sum(name == "script" for name, _ in found.elements) == 1


def test_a_page_of_a_run_has_all_of_it(runs):
    text = page(read_runs([runs / "cce"]))
    found = Parsed(text)
    assert_needs_no_network(found, text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)  # well-formed, as other programs may want the charts
    words = found.words()
    for said in (
        "Run cce", "Log loss", "AUC", "Objective of K-means", "Codes changed", "Imbalance",
        "Dead rows", "Examples per second", "Learning rates", "Memory", "sparse.tailnum: usage",
        "norms of rows", "a quarter of the main rows of chunk 2 have no id", "dense_lr", "2.13.0",
    ):  # fmt: skip
        assert said in words, said
    marks = [a for name, a in found.elements if a.get("class", "").startswith("mark")]
    assert len(marks) == 2 * 8  # eight clusterings, in the charts of loss and of AUC
    assert not [a for _, a in found.elements if "state" in a.get("class", "").split()]
    # A bar for each of rows, codes and optimizer of three compressed tables, two of the plain one.
    boxes = [a for name, a in found.elements if name == "i" and "style" in a]
    assert len(boxes) == 3 * 4 + 3


def test_several_runs_are_compared(runs):
    text = page(read_runs([runs / "cce", runs / "small"]))
    found = Parsed(text)
    assert_needs_no_network(found, text)
    # The settings that differ come first, and are highlighted.
    rows = re.findall(r'<tr class="differs">.*?</tr>', text)
    names = [re.search(r"<th[^>]*>(.*?)</th>", row).group(1) for row in rows]
    assert names == ["num_rows", "lr", "seed", "out"]
    assert "4 of 14 differ, and come first." in found.words()
    assert "All are the same." in found.words()  # the versions
    assert "cce-small" not in found.words() and "small, validation" in found.words()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("failed", "This run failed after step 350: rank 1: no memory"),
        ("running", "this run is training since 2025-10-09"),
    ],
)
def test_a_run_that_is_not_finished_says_so_at_the_top(name, said, runs):
    text = page(read_runs([runs / name]))
    assert said in Parsed(text).words()
    assert text.index(said) < text.index("At a glance</h2>")
    assert "There is no health.json" in text and "Log loss" in text


def test_an_older_run_has_its_epochs(runs):
    found = parsed(runs / "older")
    words = found.words()
    assert "epoch" in words and "0.4300" in words and "478 kB" in words
    assert "step" not in found.text["text"]  # there were none


def lines_of(folder, text):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_what_is_cut_off_or_damaged_is_left_out_and_told(tmp_path):
    whole = json.dumps({"kind": "train", "step": 5, "loss": 0.5})
    cases = [
        ("", "metrics.jsonl is empty"),
        (f'{whole}\n{{"kind": "tra', "The last line of metrics.jsonl is cut off"),
        (f"{whole}\nnothing\n{whole}\n7\n", "2 lines of metrics.jsonl cannot be read"),
        (f"{whole}\n{'[' * 100_000}\n", "1 lines of metrics.jsonl cannot be read"),
    ]
    for place, (text, said) in enumerate(cases):
        words = parsed(lines_of(tmp_path / str(place), text)).words()
        assert said in words and "neither run.json nor summary.json" in words
    broken = lines_of(tmp_path / "broken", whole)
    (broken / "run.json").write_text("{")
    (broken / "health.json").write_text("[]")
    (broken / "summary.json").write_bytes(b"\xff\xfe")
    words = parsed(broken).words()
    assert "run.json is damaged" in words and "health.json holds a list" in words
    assert "summary.json is damaged" in words
    (broken / "metrics.jsonl").unlink()
    assert "There is no metrics.jsonl" in parsed(broken).words()


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for where, said in [
        (tmp_path / "nowhere", "is not there"), (tmp_path / "file", "is a file"),
        (tmp_path, "is no run: it has none of run.json"),
    ]:  # fmt: skip
        found = CliRunner().invoke(command, ["report", str(where)])
        assert found.exit_code == 1 and found.output.startswith("Error: ")
        assert said in found.output and found.output.count("\n") == 1
    assert CliRunner().invoke(command, ["report"]).exit_code == 2
    with pytest.raises(ValueError, match="no run is given"):
        write_report([], tmp_path / "page.html")
    assert not list(tmp_path.glob("*.html"))


EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'"


def evil(value):
    """`value` with all text in it made hostile; the kinds of lines stay."""
    if isinstance(value, dict):
        return {
            (key if value is not None and known(key) else f"{key}{EVIL}"): (
                inner if key in ("kind", "state") else evil(inner)
            )
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [evil(inner) for inner in value]
    return f"{value}{EVIL}" if isinstance(value, str) else value


def known(key):
    """Names that pages look for."""
    return key not in ("lr", "tables_rate", "torch", "dense")


def test_text_of_files_is_text(tmp_path):
    # Slashes make folders: the rest of it is the run's name.
    folder = write_run(tmp_path / EVIL.replace("/", "|"), steps=300)
    for file in folder.glob("*.json"):
        file.write_text(json.dumps(evil(json.loads(file.read_text()))))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(evil(x)) + "\n" for x in lines))
    (folder / "config.yaml").write_text(EVIL)
    for given in ([folder], [folder, folder]):
        text = page(read_runs(given))
        found = Parsed(text)
        assert_needs_no_network(found, text)
        assert found.words().count("<script>alert(1)") > 30
    failed = write_run(tmp_path / "failed", steps=300, state="failed", error=EVIL)
    text = page(read_runs([failed]))
    assert EVIL in Parsed(text).words()
    assert_needs_no_network(Parsed(text), text)


ODD = [None, "text", -1, 0, 1e308, float("nan"), float("inf"), 10**400, [], {}, [None], True,
       {"a": 1}, [[1]], -0.0]  # fmt: skip


def mutated(value, draw, share):
    """`value` in which some parts are something else."""
    if draw.random() < share:
        return draw.choice(ODD)
    if isinstance(value, dict):
        return {k: mutated(v, draw, share) for k, v in value.items() if draw.random() > share / 2}
    if isinstance(value, list):
        return [mutated(inner, draw, share) for inner in value]
    return value


def test_no_content_of_files_stops_a_page(runs, tmp_path):
    """Files of a run with odd values in odd places, from a few to many."""
    draw = random.Random(0)
    for number_ in range(60):
        folder = tmp_path / str(number_)
        folder.mkdir()
        share = draw.choice([0.003, 0.02, 0.1])
        source = runs / draw.choice(["cce", "older"])
        for file in source.iterdir():
            text = file.read_text()
            if file.suffix == ".json":
                text = json.dumps(mutated(json.loads(text), draw, share))
            elif file.suffix == ".jsonl":
                lines = [json.loads(line) for line in text.splitlines()[:40]]
                text = "".join(json.dumps(mutated(x, draw, share)) + "\n" for x in lines)
            (folder / file.name).write_text(text)
        Parsed(page(read_runs([folder, runs / "cce"] if number_ % 2 else [folder])))


def test_the_page_is_written_as_a_whole_and_where_it_is_said(runs, tmp_path):
    out = tmp_path / "new" / "page.html"
    found = CliRunner().invoke(command, ["report", str(runs / "cce"), "--out", str(out)])
    assert found.exit_code == 0 and found.output == f"{out}\n"
    assert out.read_text().startswith("<!doctype html>")
    found = CliRunner().invoke(command, ["report", str(runs / "older")])
    assert found.output == f"{runs / 'older' / 'report.html'}\n"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        write_report([runs / "older"], tmp_path / "folder")
    with pytest.raises(ValueError, match="cannot be written"):
        write_report([runs / "older"], out / "below" / "page.html")
    assert not list(tmp_path.rglob(".*"))  # nor anything half-written beside it


@needs("upath")
def test_runs_in_an_object_store(runs):
    from upath import UPath

    store = UPath("memory://runs/far")
    store.mkdir(parents=True)
    for file in (runs / "small").iterdir():
        (store / file.name).write_bytes(file.read_bytes())
    where = write_report(["memory://runs/far", runs / "cce"], "memory://pages/page.html")
    assert "2 runs: far, cce" in where.read_text()


def test_runs_are_called_by_as_much_of_their_paths_as_tells_them_apart(tmp_path):
    for parent in "ab":
        write_older_run(tmp_path / parent / "run")
    names = [r.name for r in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert names == ["a/run", "b/run"]
    twice = [r.name for r in read_runs([tmp_path / "a" / "run"] * 2)]
    assert twice == ["run (1)", "run (2)"]


def test_long_lines_are_thinned_to_means():
    points = [(float(x), float(x % 2)) for x in range(10_001)]
    found = thin(points)
    assert len(found) <= 400 and found[-1][0] == 10_000
    assert all(y in (0.0, 1.0) or abs(y - 0.5) < 0.05 for _, y in found)
    assert thin(points[:400]) == points[:400]


def polylines(chart):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()]
        for line in re.findall(r'points="([^"]*)"', chart)
    ]


def test_points_are_where_their_numbers_are():
    chart = line_chart("t", [Line(name="a", points=[(0, 1), (5, 3), (10, 2)], color=0, dots=True)])
    ((first, middle, last),) = polylines(chart)
    assert first[0] < middle[0] < last[0] and middle[0] - first[0] == last[0] - middle[0]
    assert first[1] > last[1] > middle[1]  # upwards is less
    assert abs((first[1] - middle[1]) - 2 * (last[1] - middle[1])) <= 0.2  # drawn to a tenth
    assert "a, step 5: 3" in chart


def test_the_first_steps_of_a_loss_do_not_take_all_the_room():
    points = [(x, 100.0 / (1 + x)) for x in range(100)]
    chart = line_chart("t", [Line(name="t", points=points, color=0)], late=True)
    assert "The first steps are outside." in chart
    (line,) = polylines(chart)
    assert all(0 <= y <= charts.HEIGHT for _, y in line) and len(line) < 100
    # It comes in at the upper edge.
    assert line[0][1] == pytest.approx(12, abs=0.1)
    few = line_chart("t", [Line(name="t", points=points[:5], color=0)], late=True)
    assert len(polylines(few)[0]) == 5


def test_charts_of_nothing_of_one_point_and_of_equal_values():
    assert line_chart("t", [Line(name="a", points=[], color=0)]) is None
    assert histogram_chart("t", [Bars(name="a", edges=[], counts=[], color=0)], x_label="x") is None
    for points in ([(3, 0)], [(3, 7), (4, 7)], [(0, 0), (1, 0)], [(-5, -1), (5, 1e100)]):
        for from_zero in (True, False):
            chart = line_chart("t", [Line(name="a", points=points, color=0)], from_zero=from_zero)
            ElementTree.fromstring(re.search("<svg.*</svg>", chart).group())
    one = histogram_chart("t", [Bars(name="a", edges=[2.0, 2.0], counts=[9], color=0)], x_label="x")
    assert "9 from 2 to 2" in one


def test_histograms_of_chunks_are_put_together_without_losing_a_row():
    edges, counts = _together([([0.0, 1.0, 2.0], [4, 4]), ([1.0, 3.0], [8]), ([1.5, 1.5], [5])])
    assert sum(counts) == pytest.approx(21) and edges[0] == 0 and edges[-1] == pytest.approx(3)
    # Half of the second one's 8 are from 2 to 3.
    assert sum(c for e, c in zip(edges, counts, strict=False) if e >= 2.05) == pytest.approx(
        4, rel=0.1
    )
    assert _together([([1.0, 1.0], [3]), ([1.0, 1.0], [4])]) == ([1.0, 1.0], [7])


@pytest.mark.parametrize(
    ("form", "value", "said"),
    [
        (short, 0, "0"), (short, 12_345, "12.3k"), (short, 0.0321, "0.0321"),
        (short, 1.23e-7, "1.23e-7"), (short, -2.5e9, "-2.5G"), (short, 999_700, "1M"),
        (size, 999, "999 B"), (size, 85_500, "85.5 kB"), (size, 2.56e10, "25.6 GB"),
        (percent, 0.164, "16.4 %"), (percent, 1, "100 %"), (percent, 0.00012, "0.012 %"),
        (duration, 12.34, "12.3 s"), (duration, 203, "3 min 23 s"), (duration, 9_000, "2 h 30 min"),
        (duration, 300_000, "3.5 days"),
    ],
)  # fmt: skip
def test_numbers_are_short(form, value, said):
    assert form(value) == said


def test_ticks_are_round_and_inside():
    for low, high in [(0, 1), (0.41, 0.69), (-3, 12_345), (1e-9, 3e-9), (0, 1e100)]:
        found = ticks(low, high, 6)
        assert 2 <= len(found) <= 7
        room = 1e-9 * (high - low)
        assert all(low - room <= value <= high + room for value in found)
        labels = [tick_label(value, found) for value in found]
        assert len(set(labels)) == len(labels), labels
    assert ticks(2, 2, 6) == [2]


def test_what_is_no_finite_number_is_none():
    for value in (None, True, "3", [], float("nan"), float("inf"), 1e300, 10**400):
        assert number(value) is None
    assert number(3) == 3


def test_elements_escape_text_and_attributes():
    assert tag("p", "<b>", Html("<i></i>"), None, ["&"], title='"') == (
        '<p title="&quot;">&lt;b&gt;<i></i>&amp;</p>'
    )
