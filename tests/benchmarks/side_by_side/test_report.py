from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side.analysis import analyze
from layersample_benchmarks.side_by_side.label_places import find_places
from layersample_benchmarks.side_by_side.power_words import power_beforehand
from layersample_benchmarks.side_by_side.report import findings, write_report
from layersample_benchmarks.side_by_side.results import Results, read_results
from layersample_benchmarks.side_by_side.suite import Suite
from layersample_benchmarks.side_by_side.wording import signed

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Losses by method and seed: one clearly better, one that can't be told, one that failed.
LOSSES = {
    "full": [1.00, 1.02, 0.98, 1.01],
    "lisa": [0.50, 0.521, 0.479, 0.511],
    "lora": [1.03, 1.00, 0.99, 1.02],
    "cyclic": [1.50, 1.519, 1.481, 1.513],
}


@pytest.fixture
def folder(tmp_path: Path, made_up: Callable[..., dict[str, Any]]) -> Path:
    """A finished benchmark, with a method that failed."""
    suite = Suite(methods=[*LOSSES, "owlore"], seeds=[0, 1, 2, 3], learning_rates=[1e-3, 1e-2], steps=6)
    results = Results(tmp_path / "results", suite).open("layersample benchmark --output results")
    for entry in suite.entries:
        for rate in suite.rates(entry):
            job = suite.search_job(entry, rate)
            failed = {"error": "NonFiniteLossError: the loss is <nan> | at step 3"}
            results.add(job, failed if entry.name == "owlore" else made_up(job, 1 + job.learning_rate))
        for job in suite.final_jobs(entry, 1e-3):
            if entry.name in LOSSES:
                loss = LOSSES[entry.name][job.seed]
                right = 0.25 if entry.name == "lora" else 0.5
                more = {"moving_parameters": 300.0} if entry.name == "cyclic" else {}  # older runs haven't it
                results.add(job, made_up(job, loss, right=right + 0.01 * job.seed, **more))
    stored: Path = results.folder
    return stored


def test_seconds_of_several_machines_are_not_compared(tmp_path: Path, made_up: Callable[..., Any]) -> None:
    suite = Suite(methods=["full", "lora"], seeds=[0, 1], learning_rates=[1e-3], steps=6)
    results = Results(tmp_path, suite).open()
    for entry in suite.entries:
        for job in suite.final_jobs(entry, 1e-3):
            line = made_up(job, 1.0 + job.seed)
            line["environment"] = {**line["environment"], "processor": f"of {entry.name}"}
            results.add(job, line)
    results.close()
    shown = analyze(*read_results(tmp_path))
    assert shown.fast_front == () and shown.front
    told = "Seconds are of several machines (of full, 1 thread; of lora, 1 thread), so don't compare them."
    assert told in findings(shown)
    write_report(tmp_path)
    assert (
        "On of full, 1 thread a run; or on of lora, 1 thread a run, Python"
        in (tmp_path / "report.md").read_text()
    )


class Page(HTMLParser):
    """Text of the cells of each table, and everything that a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._table = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        for key in ("src", "href", "xlink:href"):
            if key in given and not str(given[key]).startswith("#"):
                self.loads.append(str(given[key]))
        if tag == "table":
            self._table = str(given["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[self._table][-1][-1] += data


@pytest.fixture
def page(folder: Path) -> Page:
    write_report(folder)
    return Page((folder / "report.html").read_text())


def test_the_page_needs_nothing_else(page: Page, folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert page.loads == [] and page.tags.count("script") == 1
    assert "@import" not in text and "url(http" not in text
    assert page.tags.count("svg") == 4 + 3 * len(LOSSES)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used <= set(page.ids), "every clip path and marker is there"


def test_words_follow_the_numbers(page: Page) -> None:
    head, *rows = page.tables["quality"]
    by_name = {row[0].split(". ")[1]: dict(zip(head, row, strict=True)) for row in rows}
    # The second column of that name is that of the answers, which differ by the same in every seed, or not at all.
    answers = {name: row["against full"] for name, row in by_name.items()}
    same = "no difference shown"
    assert answers == {"full": "baseline", "lisa": same, "lora": "not tested", "cyclic": same}
    assert [row[0] for row in rows] == ["1. lisa", "2. full", "3. lora", "4. cyclic"], "from the lowest loss"
    assert [row[5] for row in rows] == ["better", "baseline", "no difference shown", "worse"]
    assert by_name["lisa"]["difference"] == signed(-0.5)
    assert by_name["full"]["loss"] == "1.002 ± 0.027"
    low, high = (float(x.replace("\N{MINUS SIGN}", "-")) for x in by_name["lora"]["interval"].split(" to "))
    assert low < 0 < high
    assert by_name["full"]["right answers"].startswith("51.5 ±")


def test_failures_rates_and_costs_are_rows(page: Page) -> None:
    assert page.tables["failures"][1] == [
        "search/owlore/rate-0.001",
        "NonFiniteLossError: the loss is <nan> | at step 3",
    ]
    rates = {row[0]: row[1:] for row in page.tables["rates"][1:]}
    assert rates["lisa"] == ["0.001: 1.001; 0.01: 1.010", "0.001"]
    assert rates["owlore"] == ["0.001: failed; 0.01: failed", "none"]
    cost_head, *cost_rows = page.tables["cost"]
    cost = dict(zip(cost_head, cost_rows[0], strict=True))
    assert (cost["CPU s"], cost["forward"], cost["trainable"], cost["coverage"]) == (
        "3.51",
        "1.00",
        "50.0%",
        "100%",
    )
    trainable = {row[0]: row[cost_head.index("trainable")] for row in cost_rows}
    assert trainable["lisa"] == "50.0%" and trainable["cyclic"] == "50.0%, and 30.0% without state"


def test_the_same_as_markdown(page: Page, folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for row in page.tables["quality"][1:]:
        assert f"| {row[0]} | {row[1]} | {row[2]} | {row[3]} |" in text
    assert "the loss is <nan> \\| at step 3" in text
    assert "    layersample benchmark --output results\n" in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).read_text().startswith("<svg")
    # Behind an empty line, as Markdown wants it.
    tables = re.findall(r"\n\n((?:^\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_numbers_are_there_for_other_programs(page: Page, folder: Path) -> None:
    numbers = json.loads((folder / "table.json").read_text())
    with open(folder / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        [row["method"] for row in numbers]
        == [row["method"] for row in rows]
        == ["lisa", "full", "lora", "cyclic"]
    )
    assert numbers[0]["loss"] == pytest.approx(0.50275) and float(rows[0]["loss"]) == numbers[0]["loss"]
    assert (numbers[1]["difference"], rows[1]["difference"]) == (None, "")
    assert numbers[0]["verdict"] == "lower" and numbers[0]["seconds"] == pytest.approx(6 * 3.51)


def test_each_method_is_a_sentence_and_the_verdict_is_first(page: Page, folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert (
        "- lisa ends at 0.503 nats, \N{MINUS SIGN}0.500 to full (a difference that is shown), with 1.00 of its seconds"
        in text
    )
    assert "- full ends at 1.002 nats, with 21 cpu seconds and" in text
    assert "to full (which these runs can't tell from none), with" in text
    assert "**Best trade-offs: lisa (time and memory). No other method" in text
    shown = (folder / "report.html").read_text()
    assert shown.index("Best trade-offs") < shown.index("Lower held-out loss") < shown.index("<table")
    assert shown.index("Time against loss") < shown.index("Memory against loss") < shown.index('id="quality"')
    assert "Date: not noted." in text


def test_each_colour_has_one_meaning(page: Page, folder: Path) -> None:
    """In every picture: the baseline's, better's and worse's."""
    text = (folder / "report.html").read_text()
    legend = dict(re.findall(r'<li class="(\w+)" data-name="(\w+)"', text))
    assert legend == {"ink": "full", "better": "lisa", "worse": "cyclic", "muted": "lora"}
    for name, variable in (("lisa", "better"), ("cyclic", "worse"), ("full", "ink")):
        marks = re.findall(rf'<g data-name="{name}">(.*?)</g>', text, re.DOTALL)
        assert marks and all(f"var(--{variable})" in mark for mark in marks), name


def test_names_do_not_overlap() -> None:
    """Close together, the most urgent is named, and the others only where there is room."""
    names = [f"method-{i}" for i in range(12)]
    points = [(100 + 3 * i, 100 + 2 * (i % 3)) for i in range(12)]
    places = find_places(names, points, (360, 280), 9)
    boxes = [
        (x + place[0], y + place[1], x + place[0] + 0.62 * 9 * len(name), y + place[1] + 1.15 * 9)
        for name, (x, y), place in zip(names, points, places, strict=True)
        if place is not None
    ]
    assert places[0] is not None and 4 <= len(boxes) < 12
    for i, one in enumerate(boxes):
        assert 0 <= one[0] and one[2] <= 360 and 0 <= one[1] and one[3] <= 280
        for other in boxes[i + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert find_places(["far too long for the picture"], [(5, 5)], (60, 20), 9) == [None]


def test_findings_say_no_more_than_the_numbers(folder: Path) -> None:
    from layersample_benchmarks.side_by_side.results import read_results

    said = findings(analyze(*read_results(folder)))
    assert said[0] == f"Lower held-out loss than full: lisa ({signed(-0.5)})."
    assert said[1] == f"Higher held-out loss than full: cyclic ({signed(0.501)})."
    assert "No difference to full shown: lora. That means that these runs can't tell" in said[2]
    assert "Best at the lowest or highest rate tried" in " ".join(said)
    assert said[-1] == "4 of 20 runs are not there (failed, or not run yet)."


def test_losses_as_trained_have_a_column(tmp_path: Path, made_up: Callable[..., dict[str, Any]]) -> None:
    suite = Suite(methods=["full", "lisa"], seeds=[0, 1], learning_rates=[1e-3], steps=6)
    results = Results(tmp_path, suite).open()
    for entry, more in zip(suite.entries, ({}, {"as_trained": 0.75}), strict=True):
        for job in suite.final_jobs(entry, 1e-3):
            loss = {"steps": [0, 6], "held_out": [1.5, 0.5], **more}
            results.add(job, {**made_up(job, 0.5), "loss": loss})
    write_report(tmp_path)
    head, *rows = Page((tmp_path / "report.html").read_text()).tables["quality"]
    assert head[1:3] == ["loss", "as trained"] and all(len(row) == len(head) for row in rows)
    assert {row[0][3:]: row[2] for row in rows} == {"full": "–", "lisa": "0.750 ± 0.000"}
    assert f"| {' | '.join(rows[0][:4])} |" in (tmp_path / "report.md").read_text()


def test_one_seed_is_not_tested(tmp_path: Path, made_up: Callable[..., dict[str, Any]]) -> None:
    suite = Suite(methods=["full", "lisa"], seeds=[7], learning_rates=[1e-3], steps=6)
    results = Results(tmp_path, suite).open()
    for entry, loss in zip(suite.entries, (1.0, 0.1), strict=True):
        job = suite.final_jobs(entry, 1e-3)[0]
        results.add(job, made_up(job, loss, inclusion_probabilities=None))
    write_report(tmp_path)
    rows = Page((tmp_path / "report.html").read_text()).tables["quality"][1:]
    assert rows[0][1:6] == ["0.100", signed(-0.9), "–", "–", "not tested"]


def test_a_loss_that_was_measured_once_has_no_curve(
    tmp_path: Path, made_up: Callable[..., dict[str, Any]]
) -> None:
    suite = Suite(methods=["full", "lisa"], seeds=2, learning_rates=[1e-3], steps=6, evaluations=0)
    results = Results(tmp_path, suite).open()
    for entry in suite.entries:
        for job in suite.final_jobs(entry, 1e-3):
            results.add(job, {**made_up(job, 1.0), "loss": {"steps": [6], "held_out": [1.0]}})
    files = write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "differences.svg" in files and "curves.svg" not in files
    assert "along the run" not in page and "curves.svg" not in (tmp_path / "report.md").read_text()
    assert [row[1] for row in Page(page).tables["quality"][1:]] == ["1.000 ± 0.000"] * 2


def test_a_report_of_some_seeds(tmp_path: Path, made_up: Callable[..., dict[str, Any]]) -> None:
    suite = Suite(methods=["full", "lisa"], seeds=5, learning_rates=[1e-3])
    results = Results(tmp_path, suite).open()
    for entry in suite.entries:
        for job in suite.final_jobs(entry, 1e-3):
            results.add(job, made_up(job, 1.0 + job.seed))
    results.add(
        suite.search_job(suite.entries[0], 1e-3), made_up(suite.search_job(suite.entries[0], 1e-3), 1.0)
    )
    write_report(tmp_path, seeds=range(2, 5))
    text = (tmp_path / "report.md").read_text()
    assert "3 seeds (2, 3, 4, chosen from 5)" in text and "| 4.000 " in text
    assert "steps with seed 0; loss on" in text, "rates were tried with the first seed of the suite"
    write_report(tmp_path, seeds=[3, 1, 3])
    assert "2 seeds" in (tmp_path / "report.md").read_text()
    for others in ([4, 5], range(10**12)):
        with pytest.raises(ConfigError, match="seeds must be among those of .*, 0, 1, 2, 3, 4, but got 5"):
            write_report(tmp_path, seeds=others)


def test_a_report_of_some_methods(tmp_path: Path, made_up: Callable[..., dict[str, Any]]) -> None:
    suite = Suite(methods=["full", "lora", "lisa", "cyclic"], seeds=4, learning_rates=[1e-3])
    results = Results(tmp_path, suite).open()
    for place, entry in enumerate(suite.entries):
        for job in suite.final_jobs(entry, 1e-3):
            measured = made_up(job, 1.0 + 0.1 * place + 0.04 * (place + 1) * (job.seed % 2))
            if entry.name == "cyclic":
                measured["environment"] |= {
                    "processor": "another one",
                    "git": "fed",
                    "versions": {"torch": "9"},
                }
                measured["date"] = "2001-02-03"
            results.add(job, measured)

    def rows(**options: Any) -> dict[str, str]:
        write_report(tmp_path, **options)
        table = Page((tmp_path / "report.html").read_text()).tables["quality"]
        return {name.split()[-1]: p for name, _, _, _, p, *_ in table[1:]}

    every, some = rows(), rows(methods=["lisa", "lora", "full"])
    assert set(some) == {"full", "lora", "lisa"} and set(every) == {*some, "cyclic"}
    text = (tmp_path / "report.md").read_text()
    assert "3 ways to fine-tune" in text and "These rows were chosen from 4." in text
    assert "12 of 12 runs are done" in text and "or choosing rows, finds" in text
    for other in ("cyclic", "another one", "fed", "2001"):
        assert other not in text, "what only rows have that are left out"
    assert float(some["lisa"]) < float(every["lisa"]), "corrected for one comparison less"


def test_a_report_of_one_method_compares_nothing(
    tmp_path: Path, made_up: Callable[..., dict[str, Any]]
) -> None:
    suite = Suite(methods=["full", "lisa"], seeds=3, learning_rates=[1e-3])
    results = Results(tmp_path, suite).open()
    for entry in suite.entries:
        for job in suite.final_jobs(entry, 1e-3):
            results.add(job, made_up(job, 1.0 + 0.1 * job.seed))
    place = tmp_path / "one"
    write_report(tmp_path, output=place)
    assert (place / "differences.svg").is_file()
    files = write_report(tmp_path, output=place, methods=["full"])
    assert sorted(path.name for path in place.iterdir()) == sorted(files), "no picture of an earlier report"
    assert "differences.svg" not in files
    for name in ("report.md", "report.html"):
        text = (place / name).read_text()
        assert "Nothing has been measured" not in text and "1 way to fine-tune" in text
    assert "Difference in held-out loss to" not in (place / "report.html").read_text()


def test_a_name_with_dollars_is_no_formula(tmp_path: Path, made_up: Callable[..., dict[str, Any]]) -> None:
    suite = Suite(methods=["full", {"name": "x$^$y", "method": "lisa"}], seeds=2, learning_rates=[1e-3])
    results = Results(tmp_path, suite).open()
    for entry in suite.entries:
        for job in suite.final_jobs(entry, 1e-3):
            results.add(job, made_up(job, 1.0))
    write_report(tmp_path)
    assert "x$^$y" in (tmp_path / "differences.svg").read_text()


def test_a_report_of_an_unfinished_benchmark(tmp_path: Path, made_up: Callable[..., dict[str, Any]]) -> None:
    suite = Suite(methods=["full", "lisa"], learning_rates=[1e-3, 1e-2])
    results = Results(tmp_path, suite).open()
    with pytest.raises(ConfigError, match="At least one run must have ended"):
        write_report(tmp_path)
    job = suite.search_job(suite.entries[1], 1e-3)
    results.add(job, made_up(job, 1.0, other_loss=None))
    write_report(tmp_path)
    assert "6 of 6 runs are not there" in (tmp_path / "report.md").read_text()
    job = suite.final_jobs(suite.entries[1], 1e-3)[0]
    results.add(job, made_up(job, 1.0))  # and nothing of the baseline
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "1. lisa" in page and "1 of 2 methods have no runs yet: with more of them the correction" in page


def test_the_same_results_give_the_same_report(folder: Path) -> None:
    names = write_report(folder)
    first = [(folder / name).read_bytes() for name in names]
    write_report(folder)
    assert first == [(folder / name).read_bytes() for name in names]


PROBE = """
<title>waiting</title>
%s
<script>
onload = () => {
  const said = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, width = page.documentElement.clientWidth;
    const cut = [...page.querySelectorAll("svg text, h1, h3, p, li, figcaption")].filter((one) => {
      const box = one.getBoundingClientRect();
      return box.width && (box.right > width + 1 || box.left < -1);
    });
    said.push({width, wide: page.documentElement.scrollWidth - width, cut: cut.map((one) => one.textContent)});
  }
  const page = document.querySelector("iframe").contentDocument, table = page.getElementById("quality");
  const rows = () => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
  const order = [];
  for (const header of [0, 2, 2, 8]) {
    table.tHead.rows[0].cells[header].querySelector("button").click();
    order.push(rows());
  }
  const filter = table.parentElement.previousElementSibling;
  filter.value = "CYC";
  filter.dispatchEvent(new Event("input"));
  const filtered = rows();
  const mark = page.querySelector("svg [data-name=lisa]");
  mark.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  const lit = [...page.querySelectorAll(".on")].map((one) => one.dataset.name);
  document.title = JSON.stringify({said, order, filtered, lit, hint: mark.querySelector("title").textContent});
};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_sorts_filters_and_names_and_nothing_is_cut(
    page: Page, folder: Path, tmp_path: Path
) -> None:
    """In frames as wide as a screen, a tablet and a phone; only tables may be wider, inside of what scrolls."""
    assert CHROMIUM is not None
    probe = tmp_path / "probe.html"
    frame = (
        f'<iframe src="file://{folder}/report.html" style="width: %dpx; height: 800px; border: 0"></iframe>'
    )
    probe.write_text(PROBE % "".join(frame % width for width in (1280, 768, 360)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        f"file://{probe}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and title[1] != "waiting", done.stderr
    found = json.loads(html.unescape(title[1]))
    assert [one["width"] for one in found["said"]] == [1280, 768, 360]
    assert all(one["wide"] <= 0 and one["cut"] == [] for one in found["said"]), found["said"]
    by_difference = ["1. lisa", "3. lora", "4. cyclic", "2. full"]  # the baseline has none, and is last
    assert found["order"][0] == ["1. lisa", "2. full", "3. lora", "4. cyclic"], "by name and number"
    falling = [*by_difference[-2::-1], "2. full"]
    assert found["order"][1] == by_difference and found["order"][2] == falling
    assert set(found["order"][3]) == set(by_difference)
    assert found["filtered"] == ["4. cyclic"]
    assert set(found["lit"]) == {"lisa"} and len(found["lit"]) >= 5, (
        "in each picture, the legend and the tables"
    )
    assert found["hint"].startswith("lisa: 0.50")


def test_what_the_seeds_can_tell(folder: Path) -> None:
    """Said afterwards for each method, and beforehand for more seeds."""
    analysis = analyze(*read_results(folder))
    write_report(folder)
    page = (folder / "report.md").read_text()
    table = page.split("## What these seeds can tell")[1].split("##")[0]
    rows = {
        row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]]
        for row in table.splitlines()
        if "|" in row
    }
    spread, smallest, seeds, needed, equal, not_worse, verdict = rows["lora"]
    assert float(spread) == pytest.approx(0.0206, abs=1e-4) and seeds == "4"
    assert 0.02 < float(smallest) < 0.2 and int(needed) > 4
    assert (float(equal) > 0.05, verdict) == (True, "not shown")
    assert (rows["lisa"][5], rows["lisa"][6]) == ("< 0.001", "not worse")
    assert re.search(r"With 4 seeds a difference of [\d.]+ nats is shown with a chance of 80%", page)
    assert "Not worse than full by more than 0.02 nats: lisa." in page
    assert float(
        table_cell(power_beforehand(analysis.suite.model_copy(update={"seeds": [*range(16)]}), analysis))
    ) < float(smallest)
    unknown = power_beforehand(Suite(methods=["full", "lisa"], seeds=[0, 1, 2]), None)
    assert "3.3 times the spread" in unknown and "8 seeds 1.2" in unknown
    assert "give at least 2" in power_beforehand(Suite(methods=["full", "lisa"], seeds=[0]), None)
    # owlore has no runs, so that three differences are tested; beforehand it is one of those asked for.
    asked = analysis.suite
    run = asked.model_copy(update={"methods": [row for row in asked.entries if row.name != "owlore"]})
    said = re.search(r"With 4 seeds a difference of ([\d.]+) nats is shown", page)
    assert said and said[1] == table_cell(power_beforehand(run, analysis))
    assert float(said[1]) < float(table_cell(power_beforehand(asked, analysis)))
    assert power_beforehand(run, analysis, {"owlore", "full"}) == power_beforehand(asked, analysis)


def table_cell(sentence: str) -> str:
    """The difference that a sentence names."""
    found = re.search(r"a difference of ([\d.]+) nats", sentence)
    assert found is not None, sentence
    return found.group(1)
