"""Methods side by side, and the three factors: every method meets the same edits, rounds and probes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from click.testing import CliRunner, Result

import lemoe
from lemoe.evaluation.comparison import Comparison
from lemoe.evaluation.factors import Factors
from lemoe.evaluation.sweep import sweep
from lemoe.training.rounds import count_bytes, teach_rounds
from lemoe_cli.main import cli

METHODS = ("ft", "lora", "memoe", "paper", "anchor")
SMALL = {"layer": 1, "round_size": 2, "steps": 8, "width": 4, "router_width": 16, "variants": 1, "negatives": 1}
SettingsOf = Callable[..., lemoe.Settings]


def small_settings(method: str, **given: object) -> lemoe.Settings:
    return lemoe.resolve_settings(method, None, {**SMALL, **given})


@pytest.fixture(scope="module")
def probed(facts: list[lemoe.Edit]) -> list[lemoe.Edit]:
    """The facts with a rephrase and a locality probe each."""
    return [
        replace(
            edit,
            rephrases=(lemoe.Probe(f"Tell me: {edit.prompt}", edit.target, "paraphrase"),),
            locality=(lemoe.Probe("The opposite of hot is", "cold", "unrelated"),),
        )
        for edit in facts
    ]


@pytest.fixture(scope="module")
def comparison(base: lemoe.BaseModel, probed: list[lemoe.Edit]) -> Comparison:
    return lemoe.compare(base, probed, [small_settings(method) for method in METHODS])


@pytest.fixture(scope="module")
def factors(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> dict[str, Factors]:
    """Of each method, on the facts in rounds of two."""
    fast = {"steps": 15, "learning_rate": 2e-2}
    methods = [small_settings("anchor"), small_settings("paper", **fast), small_settings("memoe", **fast)]
    return {each.method: lemoe.measure_factors(base, facts, each, orders=1) for each in methods}


def test_each_method_has_a_row_over_the_same_edits_and_probes(comparison: Comparison, facts: list[lemoe.Edit]) -> None:
    assert [each.settings.method for each in comparison.methods] == list(METHODS)
    assert {name for members in comparison.rounds for name in members} == {edit.id for edit in facts}
    for each in comparison.methods:
        assert [(m.name, m.measure, m.kind, m.n) for m in each.metrics] == [
            (m.name, m.measure, m.kind, m.n) for m in comparison.methods[0].metrics
        ]
        assert {m.n for m in each.metrics} == {len(facts)}
        assert {m.stage for m in each.metrics} == {"after"}
        assert each.seconds_per_edit > 0


def test_a_row_is_what_teaching_round_by_round_and_measuring_gives(
    base: lemoe.BaseModel, probed: list[lemoe.Edit], comparison: Comparison
) -> None:
    by_id = {edit.id: edit for edit in probed}
    rounds = [[by_id[name] for name in members] for members in comparison.rounds]
    for each in comparison.methods:
        states = list(teach_rounds(base, rounds, each.settings))
        result = lemoe.evaluate(base, states[-1], [edit for members in rounds for edit in members])
        for metric in each.metrics:
            assert metric.value == result.value(metric.name, metric.measure, metric.kind)
        fresh = [lemoe.evaluate(base, s, m).value("reliability") for s, m in zip(states, rounds, strict=True)]
        assert each.learned == pytest.approx(fmean(fresh))
        assert each.bytes_per_edit == count_bytes(states[-1]) / len(probed)


def test_an_edit_of_paper_and_anchor_costs_what_its_file_holds(
    base: lemoe.BaseModel, probed: list[lemoe.Edit], comparison: Comparison, tmp_path: Path
) -> None:
    for method in ("paper", "anchor"):
        *_, state = teach_rounds(base, [probed[:2], probed[2:4]], small_settings(method))
        assert isinstance(state, lemoe.AdaptorState)
        lemoe.save_adaptor(state, tmp_path / method)
        content = (tmp_path / method).read_bytes()
        assert count_bytes(state) == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_comparing_again_gives_the_same_metrics(
    base: lemoe.BaseModel, probed: list[lemoe.Edit], comparison: Comparison
) -> None:
    again = lemoe.compare(base, probed, [each.settings for each in comparison.methods[:2]])
    assert again.rounds == comparison.rounds
    for one, other in zip(again.methods, comparison.methods[:2], strict=True):
        assert replace(one, seconds_per_edit=0) == replace(other, seconds_per_edit=0)


def test_a_forgetting_matrix_has_a_row_a_round_and_starts_at_its_diagonal(factors: dict[str, Factors]) -> None:
    for each in factors.values():
        rounds = len(each.rounds)
        for matrix in (each.forgetting, each.forgetting_exact, *([each.routing] if each.routing else [])):
            assert len(matrix) == rounds >= 3
            for number, row in enumerate(matrix):
                assert [value is None for value in row] == [moment < number for moment in range(rounds)]


def test_the_diagonal_is_each_round_when_it_had_just_been_taught_and_the_last_column_is_the_end(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], factors: dict[str, Factors]
) -> None:
    by_id = {edit.id: edit for edit in facts}
    for each in factors.values():
        rounds = [[by_id[name] for name in members] for members in each.rounds]
        states = list(teach_rounds(base, rounds, each.settings))
        for number, members in enumerate(rounds):
            for moment in (number, len(rounds) - 1):
                result = lemoe.evaluate(base, states[moment], members)
                assert each.forgetting[number][moment] == pytest.approx(result.value("reliability"))
                assert each.forgetting_exact[number][moment] == result.value("reliability", "exact_match")
                if each.routing:
                    assert each.routing[number][moment] == result.value("routing", "agreement")


def test_later_rounds_of_anchor_change_no_earlier_answer_and_no_route(factors: dict[str, Factors]) -> None:
    each = factors["anchor"]
    assert each.routing is not None
    for matrix in (each.forgetting, each.forgetting_exact, each.routing):
        for number, row in enumerate(matrix):
            assert set(row[number:]) == {row[number]}
    assert each.forgotten == 0.0
    assert {value for row in each.routing for value in row} == {None, 1.0}


def test_a_mixture_trained_jointly_forgets_and_none_of_its_experts_is_one_edits(factors: dict[str, Factors]) -> None:
    assert factors["memoe"].forgotten > 0
    assert factors["memoe"].routing is None


def test_orders_are_the_planned_one_and_as_many_random_ones_as_asked_for(factors: dict[str, Factors]) -> None:
    for each in factors.values():
        assert [(order.order, order.seed) for order in each.orders] == [("planned", None), ("random", 1)]
        end = fmean(row[-1] or 0.0 for row in each.forgetting)  # rounds are of equal size
        assert each.orders[0].value("reliability") == pytest.approx(end)
        values = [order.value("reliability") or 0.0 for order in each.orders]
        assert each.spread("reliability") == max(values) - min(values)
        assert each.spread("generality") is None


def lemoe_command(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def edits(probed: list[lemoe.Edit], tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    lines = [
        {
            "id": edit.id,
            "prompt": edit.prompt,
            "target": edit.target,
            "subject": edit.subject,
            "rephrases": [probe.prompt for probe in edit.rephrases],
            "locality": [probe.prompt for probe in edit.locality],
        }
        for edit in probed[:4]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_one_command_puts_methods_side_by_side(edits: Path, tiny_folder: Callable[[str], Path]) -> None:
    options = ("--model", tiny_folder("llama"), "--presets", "memoe, ft", "--round-size", 2, "-q")
    shown = lemoe_command("compare", edits, *options)
    assert shown.exit_code == 0, shown.output
    named = [line.split()[0] for line in shown.stdout.splitlines() if line.startswith(("ft", "memoe"))]
    assert named == ["memoe", "ft"]
    assert "4 edits in 2 rounds" in shown.stdout
    document = json.loads(lemoe_command("compare", edits, *options, "--json").stdout)
    assert document["settings"]["decode"] == "teacher"
    methods = document["comparison"]["methods"]
    assert [method["settings"]["method"] for method in methods] == ["memoe", "ft"]
    assert {metric["name"] for metric in methods[0]["metrics"]} == {"reliability", "generality", "locality"}


def test_one_command_measures_the_three_factors(edits: Path, tiny_folder: Callable[[str], Path]) -> None:
    small = ("--preset", "paper", "--round-size", 2, "--orders", 1, "-q")
    options = ("--model", tiny_folder("llama"), *small)
    shown = lemoe_command("study", edits, *options)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.stdout for word in ("Forgetting", "Routing", "Order", "random 1"))
    found = json.loads(lemoe_command("study", edits, *options, "--json").stdout)["factors"]
    assert found["forgetting"][1][0] is None
    assert len(found["orders"]) == 2


VARIED = ("--vary", "round-size=2,4", "--vary", "steps=1,2")


def test_a_study_varies_settings_in_one_table_and_a_plot(
    edits: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    page, short = tmp_path / "study.html", tmp_path / "study.md"
    options = ("--model", tiny_folder("llama"), "--preset", "paper", *VARIED, "-q")
    shown = lemoe_command("study", edits, *options, "--report", page, "--report", short)
    assert shown.exit_code == 0, shown.output
    assert "4 edits, taught by paper with each combination" in shown.stdout
    rows = [line.split()[:2] for line in shown.stdout.splitlines() if line[:1].isdigit()][1:]
    assert rows == [["2", "1"], ["2", "2"], ["4", "1"], ["4", "2"]]
    assert "Quality by settings" in page.read_text()
    assert "edits.jsonl: lemoe study" in page.read_text()
    assert "| 4, 2 |" in short.read_text()
    found = json.loads(lemoe_command("study", edits, *options, "--json").stdout)["sweep"]
    assert found["varied"] == ["round_size", "steps"]
    assert [result["settings"]["steps"] for result in found["results"]] == [1, 2, 1, 2]
    assert found["results"][0]["metrics"] != found["results"][3]["metrics"]


def test_a_sweep_of_one_combination_is_the_comparison_of_one_method(
    base: lemoe.BaseModel, probed: list[lemoe.Edit]
) -> None:
    settings = small_settings("anchor")
    (one,) = sweep(base, probed, [settings], ("width",)).results
    (other,) = lemoe.compare(base, probed, [settings]).methods
    assert one == replace(other, seconds_per_edit=one.seconds_per_edit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--presets", "ft,nothing"], "nothing"),
        (["compare", "--presets", ","], "names no preset"),
        (["study", "--preset", "nothing"], "nothing"),
        (["study", "--vary", "stepz=1,2"], "did you mean steps?"),
        (["study", "--vary", "steps=0"], "steps: must be at least 1"),
        (["study", "--vary", "steps=many"], "is not a whole number"),
        (["study", "--vary", "steps"], "expected one like round-size=1,10,50"),
        (["study", "--vary", "steps=1,,2"], "expected one like round-size=1,10,50"),
        (["study", "--vary", "steps=1", "--vary", "steps=2"], "names a setting twice"),
        (["study", "--vary", "preset=ft,lora"], "lemoe compare --presets"),
        (["study", "--vary", "steps=1", "--orders", "2"], "exclude each other"),
        (["study", "--report", "study.pdf"], "ends in .html or .md"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_loaded(
    edits: Path, arguments: list[str], message: str
) -> None:
    command, *given = arguments
    result = lemoe_command(command, edits, "--model", "no-such-model", *given)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "no-such-model" not in result.stderr
    assert result.stdout == ""
