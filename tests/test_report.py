"""Reports: what a reader relies on in the page and in the Markdown, also when edits mean harm."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

import lemoe
from lemoe.adaptor.state import AdaptorState, RoundRecord
from lemoe.errors import InputError, OutputError
from lemoe.evaluation.comparison import Comparison, MethodResult
from lemoe.evaluation.evaluate import EvalResult, Record
from lemoe.evaluation.factors import Factors, Matrix, OrderScore
from lemoe.evaluation.metrics import mean_metric
from lemoe.report import build_report, render_html, render_markdown, write_reports
from lemoe.report.clusters import build_clusters
from lemoe.report.plots import gate_plot, scatter_plot
from lemoe.report.routes import Gate, GateScores
from lemoe.report.text import clean_text, format_number, format_percent
from lemoe.routing.router import Explanation
from lemoe.settings import Settings

XHTML = "{http://www.w3.org/1999/xhtml}"
HOSTILE = (
    "</title></style><script>alert(1)</script>{{ 7 * 7 }} | `x` @user #1 www.x.org \x00\x1b[31m\u202e\ud800 <img src=x>"
)


@pytest.fixture(scope="module")
def probed(facts: list[lemoe.Edit]) -> list[lemoe.Edit]:
    """The facts with probes; those of the last one mean harm."""
    edits = [
        replace(
            edit,
            rephrases=(lemoe.Probe(f"Tell me: {edit.prompt}", edit.target, "paraphrase"),),
            locality=(
                lemoe.Probe(f"Number {number} and the opposite of hot is", "cold", "unrelated"),
                lemoe.Probe(f"{edit.subject} is known for its", None, "same_subject"),
            ),
        )
        for number, edit in enumerate(facts)
    ]
    hostile = lemoe.Probe(f"Tell {HOSTILE}".replace("\ud800", ""), "some other answer", "a | kind <b>\x07")
    return [*edits[:-1], replace(edits[-1], rephrases=(hostile, hostile))]


@pytest.fixture(scope="module")
def state(base: lemoe.BaseModel, probed: list[lemoe.Edit], anchor: Callable[..., Settings]) -> AdaptorState:
    """Two rounds of three edits."""
    return lemoe.stack([lemoe.train_round(base, part, anchor()) for part in (probed[:3], probed[3:])])


@pytest.fixture(scope="module")
def result(base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit]) -> EvalResult:
    return lemoe.evaluate(base, state, probed)


@pytest.fixture(scope="module")
def page(base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit], result: EvalResult) -> str:
    return render_html(build_report(base, state, probed, result, source=f"edits {HOSTILE}"))


@pytest.fixture(scope="module")
def markdown(base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit], result: EvalResult) -> str:
    return render_markdown(build_report(base, state, probed, result, source=f"edits {HOSTILE}"))


def parse_page(page: str) -> ElementTree.Element:
    """The page as XML, so that a single sign that is not escaped fails."""
    return ElementTree.fromstring(page)


def page_text(page: str) -> str:
    return element_text(parse_page(page))


def element_text(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def test_the_page_is_well_formed_and_hostile_texts_stay_texts(page: str) -> None:
    root = parse_page(page)
    names = {element.tag.removeprefix(XHTML) for element in root.iter()}
    assert not names & {"script", "img", "iframe", "object", "embed", "form"}
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    assert len(root.findall(f".//{XHTML}title")) >= 1
    assert "<script>alert(1)</script>{{ 7 * 7 }} | `x` @user" in page_text(page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)
    page.encode()


def test_the_page_loads_nothing(page: str) -> None:
    root = parse_page(page)
    loads = [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name in ("src", "href", "data", "srcset", "action") and not value.startswith("#")
    ]
    assert loads == ["data:,"]
    style = root.findtext(f".//{XHTML}style") or ""
    assert "url(" not in style
    assert "@import" not in style
    policy = root.find(f".//{XHTML}meta[@http-equiv='Content-Security-Policy']")
    assert policy is not None
    assert policy.attrib["content"].startswith("default-src 'none'; ")


def test_the_page_suits_phones_and_both_themes(page: str) -> None:
    root = parse_page(page)
    viewport = root.find(f".//{XHTML}meta[@name='viewport']")
    assert viewport is not None
    assert viewport.attrib["content"] == "width=device-width, initial-scale=1"
    assert "@media (prefers-color-scheme: dark)" in page
    widths = re.findall(r"(?<!max-)(?<!stroke-)width: *([\d.]+)(px|rem)", page)
    assert all(float(size) * (16 if unit == "rem" else 1) < 100 for size, unit in widths)
    tables = list(root.iter(f"{XHTML}table"))
    scrolled = [table for div in root.iter(f"{XHTML}div") if "scroll" in div.get("class", "") for table in div]
    assert tables == scrolled


def test_every_drawing_has_a_title_and_a_description(page: str) -> None:
    drawings = [svg for svg in parse_page(page).iter(f"{XHTML}svg") if svg.get("role") == "img"]
    assert len(drawings) == 3
    ids = [element.attrib["id"] for element in parse_page(page).iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    for drawing in drawings:
        assert all(name in ids for name in drawing.attrib["aria-labelledby"].split())


def test_reports_are_deterministic(
    base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit], page: str, markdown: str
) -> None:
    again = lemoe.evaluate(base, state, probed)
    report = build_report(base, state, probed, again, source=f"edits {HOSTILE}")
    assert render_html(report) == page
    assert render_markdown(report) == markdown


def test_every_metric_is_in_the_page_and_in_the_markdown(result: EvalResult, page: str, markdown: str) -> None:
    shown_ = page_text(page)
    for metric in result.metrics:
        if not metric.kind.startswith("round "):
            value = format_number(metric.value) + ("" if metric.stderr is None else f" ±{format_number(metric.stderr)}")
            assert value in shown_
            assert value in markdown
            assert metric.measure.replace("_", " ") in shown_
    assert {metric.name for metric in result.metrics} <= set(re.findall(r"\w+", shown_))


def test_the_worst_failures_tell_expected_before_after_and_route(result: EvalResult, page: str) -> None:
    failed = [r for r in result.records if r.name == "generality" and r.token_accuracy_after < 1]
    worst = min(failed, key=lambda r: (r.token_accuracy_after, -r.token_accuracy_before))
    (group,) = [one for one in parse_page(page).iter(f"{XHTML}details") if element_text(one).startswith("generality")]
    first = element_text(group.findall(f"{XHTML}ol/{XHTML}li")[0])
    for text in (worst.prompt, worst.expected, worst.before, worst.after):
        assert " ".join(clean_text(text).split()) in first
    assert f"after, {format_percent(worst.token_accuracy_after)} of the tokens" in first
    assert f"{len(failed)} of 7 probes fail" in element_text(group)
    assert re.search("reached the|no expert", first)


def test_the_base_alone_has_a_report_too(base: lemoe.BaseModel, probed: list[lemoe.Edit]) -> None:
    report = build_report(base, None, probed, lemoe.evaluate(base, None, probed), source="edits")
    text = page_text(render_html(report))
    assert "The base model alone" in text
    assert "Worst failures" not in text
    assert "| reliability | token accuracy |" in render_markdown(report)


def test_nothing_measured_is_said(base: lemoe.BaseModel, probed: list[lemoe.Edit]) -> None:
    report = build_report(base, None, probed, EvalResult((), ()), source="edits")
    assert "No probes were measured." in page_text(render_html(report))
    assert render_markdown(report).startswith("### lemoe eval: <code>edits</code>")


def test_a_method_without_a_gate_says_so(base: lemoe.BaseModel, trained: AdaptorState, facts: list[lemoe.Edit]) -> None:
    report = build_report(base, trained, facts[:4], lemoe.evaluate(base, trained, facts[:4]), source="edits")
    assert report.gate is None
    assert "has no gate" in page_text(render_html(report))


def make_order_score(order: str, seed: int | None, reliability: float, generality: float | None = None) -> OrderScore:
    values = {"reliability": reliability, "generality": generality}
    metrics = [
        mean_metric(name, "all", "token_accuracy", "teacher", "after", [value])
        for name, value in values.items()
        if value is not None
    ]
    return OrderScore(order, seed, tuple(metrics))


def make_factors(state: AdaptorState, forgetting: Matrix, routing: Matrix | None, *orders: OrderScore) -> Factors:
    return Factors(state.settings, (), forgetting, forgetting, routing, orders)


def test_factors_add_forgetting_and_order(
    base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit], result: EvalResult, page: str
) -> None:
    orders = (make_order_score("planned", None, 0.9, 0.5), make_order_score("random", 7, 0.64))
    matrix = ((0.875, 0.25), (None, 0.75))
    factors = make_factors(state, matrix, None, *orders)
    text = page_text(render_html(build_report(base, state, probed, result, source="edits", factors=factors)))
    assert "0.88 0.25 0.75" in text
    assert "random, seed 7 0.640 –" in text
    assert "largest difference 0.260 0.000" in text
    assert "Routing over rounds" not in text
    assert "Forgetting" not in page_text(page)


def test_markdown_has_the_matrix_the_orders_and_the_methods_too(
    base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit], result: EvalResult, markdown: str
) -> None:
    factors = make_factors(state, ((0.875, 0.25), (None, 0.75)), None, make_order_score("planned", None, 0.9, 0.5))
    compared = MethodResult(replace(state.settings, method="anchor"), 0.975, 0.9, result.metrics, 1.5, 2048.0)
    text = render_markdown(
        build_report(
            base, state, probed, result, source="edits", factors=factors, comparison=Comparison((), (compared,))
        )
    )
    assert "| 1 | 0.875 | 0.250 |\n| 2 |  | 0.750 |" in text
    assert "| planned | 0.900 | 0.500 |" in text
    assert "| anchor | 0.975 |" in text
    assert "| 1.500 | 2.0 |" in text
    assert "planned" not in markdown


def test_a_long_run_leaves_rounds_out_of_its_drawings_and_says_so(
    base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit], result: EvalResult
) -> None:
    count = 150
    matrix = tuple(tuple(1.0 if j >= i else None for j in range(count)) for i in range(count))
    factors = make_factors(state, matrix, matrix)
    page = render_html(build_report(base, state, probed, result, source="edits", factors=factors))
    assert "40 of 150 rounds, evenly spread." in page_text(page)
    assert len(page.encode()) < 500_000


def build_large_run(state: AdaptorState) -> tuple[AdaptorState, list[lemoe.Edit], EvalResult]:
    """A thousand edits in fifty rounds, with long texts, all of them missed."""
    edits = [lemoe.Edit(f"Prompt number {i} is", "so", id=f"edit {i}") for i in range(1000)]
    long = f"Prompt {HOSTILE}" * 8
    rounds = []
    for number in range(50):
        part = edits[number * 20 : number * 20 + 20]
        ids, digests = tuple(edit.id for edit in part), tuple(edit.digest for edit in part)
        rounds.append(RoundRecord(f"r{number}", None, 1, 20, ids, digests, "", 0, 0.1, None, 9, 0, (), 20))
    records = [
        Record(
            edit.id, name, "kind", long, long, long, long, 1.0, (i % 7) / 6, None, None,
            edit.id, (edit.id,), Explanation(i, conflict=i / 50),
        )
        for name in ("reliability", "generality", "locality", "portability")
        for i, edit in enumerate(edits)
    ]  # fmt: skip
    metrics = [mean_metric("routing", f"round {n}", "agreement", "route", "after", [1.0] * 20) for n in range(1, 51)]
    return replace(state, rounds=tuple(rounds)), edits, EvalResult(tuple(metrics), tuple(records))


def test_a_thousand_edits_make_a_small_page(base: lemoe.BaseModel, state: AdaptorState) -> None:
    large, edits, result = build_large_run(state)
    report = build_report(base, large, edits, result, source="edits")
    page = render_html(report)
    assert len(page.encode()) < 500_000
    text = page_text(page)
    assert "12 of 50 rounds are drawn, evenly spread" in text
    assert "858 of 1,000 probes fail, the worst 10" in text
    assert len(render_markdown(report)) < 65_536  # what GitHub takes as a comment


def test_every_prompt_is_in_one_bar_and_one_at_the_threshold_in_the_bar_below_it() -> None:
    scores = GateScores("generality", (0.0, 0.0, 3.5, 3.6, 10.5, 10.6, 1e9), unmentioned=2, opened=3)
    (panel,) = gate_plot(Gate("conflict", 3.5, (scores,))).panels
    counts = {bar.label.split(": ")[0]: int(bar.label.split(": ")[1]) for bar in (*panel.bars, panel.absent)}
    assert counts == {
        "0.0 to 0.5": 2,
        "3.0 to 3.5": 1,
        "3.5 to 4.0": 1,
        "10.0 to 10.5": 1,
        "above 10.5": 2,
        "no subject mentioned": 2,
    }


@pytest.mark.parametrize("threshold", [0.0, 1e9, float("inf")])
def test_a_threshold_off_the_axis_is_not_drawn_and_harms_nothing(threshold: float) -> None:
    plot = gate_plot(Gate("conflict", threshold, (GateScores("locality", (0.0, 2.0), 0, 0),)))
    assert (plot.threshold is None) == (threshold > 0)


def test_clusters_keep_distances_and_their_rounds(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    clusters = build_clusters(base, [(2, facts[:3]), (5, facts[3:])])
    assert clusters is not None
    assert [cluster.number for cluster in clusters.drawn] == [2, 5]
    assert [len(cluster.points) for cluster in clusters.drawn] == [3, 3]
    groups = scatter_plot(clusters).groups
    points = [point for cluster in clusters.drawn for point in cluster.points]
    dots = [dot for group in groups for dot in group.dots]
    wide = [abs(a[0] - points[0][0]) for a in points[1:]]
    drawn = [abs(a[0] - dots[0][0]) for a in dots[1:]]
    ratios = [d / w for d, w in zip(drawn, wide, strict=True) if w > 1e-3]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.1)
    assert build_clusters(base, [(1, facts[:1] * 2)]) is None


def test_the_markdown_has_whole_tables_and_nothing_that_acts(markdown: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len([token for token in tokens if token.type == "tr_open"]) == len([row for row in rows if "---" not in row])
    inside = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inside} <= {"text", "html_inline", "softbreak"}
    html = {child.content for child in inside if child.type == "html_inline"}
    assert html <= {"<code>", "</code>", "<br>"}
    blocks = " ".join(token.content for token in tokens if token.type == "html_block")
    assert "script" not in blocks
    shown_ = "".join(child.content for child in inside if child.type == "text")
    assert "<script>alert(1)</script>{{ 7 * 7 }} | `x` @user #1 www.x.org" in shown_


def test_markdown_mentions_nobody(markdown: str) -> None:
    assert "@" not in markdown
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    for token in tokens:
        depth = 0
        for child in token.children or ():
            depth += {"<code>": 1, "</code>": -1}.get(child.content, 0) if child.type == "html_inline" else 0
            assert depth or "@user" not in child.content


def test_reports_are_written_by_their_suffix_and_replaced_only_if_asked(
    base: lemoe.BaseModel, state: AdaptorState, probed: list[lemoe.Edit], result: EvalResult, tmp_path: Path
) -> None:
    report = build_report(base, state, probed, result, source="edits")
    page, short = tmp_path / "a.html", tmp_path / "b.md"
    write_reports(report, [page, short, page])
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert short.read_text(encoding="utf-8").startswith("### lemoe eval")
    with pytest.raises(OutputError, match="exists"):
        write_reports(report, [tmp_path / "c.md", short])
    assert not (tmp_path / "c.md").exists()
    write_reports(report, [short], overwrite=True)
    with pytest.raises(InputError, match=r"\.html or \.md"):
        write_reports(report, [tmp_path / "d.pdf"])


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)

FRAMED = """<!DOCTYPE html><body><iframe src="report.html" style="width:390px;height:800px;border:0"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach(one => one.open = true);
  document.body.dataset.widths = page.scrollingElement.scrollWidth + " of " + page.documentElement.clientWidth;
});
</script></body>"""


@pytest.mark.skipif(not BROWSER, reason="no browser is installed")
def test_a_browser_shows_the_page_at_390_pixels_without_errors_or_sideways_scrolling(page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    (tmp_path / "framed.html").write_text(FRAMED, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    flags += ["--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "framed.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-widths="(\d+) of (\d+)"', done.stdout)
    assert found, done.stderr
    assert found[1] == found[2]
    assert "CONSOLE" not in done.stderr
