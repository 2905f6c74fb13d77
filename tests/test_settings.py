"""Settings: where each value comes from, and what is refused."""

import json
from pathlib import Path

import pytest

import lemoe
from lemoe.errors import InputError
from lemoe.settings import preset_names


def write_config(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal_message(path: Path | None, given: dict[str, object] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        lemoe.resolve_settings("paper", path, given)
    return str(caught.value)


def test_preset_paper_needs_no_other_settings() -> None:
    settings = lemoe.resolve_settings("paper")
    assert (settings.method, settings.top_k, settings.round_size) == ("paper", 1, 20)


OF_ANCHOR: dict[str, object] = {
    **{"method": "anchor", "layer": None, "depth": 0.72, "layer_path": None, "round_size": 50, "order": "planned"},
    **{"seed": 0, "width": None, "router_width": 512, "experts": 4, "top_k": 1, "steps": 16, "learning_rate": 5e-3},
    **{"router_learning_rate": 2e-5, "weight_decay": 0.0, "loss_target": 0.1, "retries": 3, "noise": 0.5},
    **{"variants": 3, "train_rephrases": False, "negatives": 0, "negative_weight": 3.0, "gate": "meaning"},
    **{"gate_probability": 0.5, "gate_conflict": 3.5, "gate_slack": 16, "norm_limit": 5e-4, "change_share": 1.0},
    **{"demonstrations": 0, "retrieval_threshold": 0.0, "merge_share": 1.0, "radius": 1.0, "batch_tokens": 2048},
}
OF_PAPER = {
    **OF_ANCHOR,
    **{"method": "paper", "depth": 0.5625, "round_size": 20, "steps": 60, "loss_target": 0.01, "noise": 0.0},
    **{"variants": 0, "negative_weight": 0.0},
}
OF_FT = {**OF_PAPER, "method": "ft", "steps": 25, "learning_rate": 1e-3, "norm_limit": 0.02}
OF_LORA = {**OF_PAPER, "method": "lora", "width": 8, "steps": 30, "learning_rate": 1e-3}
PRESETS: dict[str, dict[str, object]] = {
    "anchor": OF_ANCHOR,
    "paper": OF_PAPER,
    "memoe": {**OF_PAPER, "method": "memoe"},
    "context": {**OF_PAPER, "method": "context"},
    "rag": {**OF_PAPER, "method": "rag", "retrieval_threshold": 0.5},
    "ft": OF_FT,
    "rect": {**OF_FT, "method": "rect", "change_share": 0.4},
    "lora": OF_LORA,
    "lora-merge": {**OF_LORA, "method": "lora-merge", "merge_share": 0.5},
    "grace": {**OF_PAPER, "method": "grace", "depth": 0.5, "steps": 100, "learning_rate": 1.0},
    "ultraedit": {**OF_PAPER, "method": "ultraedit", "depth": 0.64, "learning_rate": 1e-4},
}


def test_the_default_settings_are_the_default_preset() -> None:
    assert lemoe.Settings() == lemoe.resolve_settings() == lemoe.resolve_settings("anchor")


@pytest.mark.parametrize("preset", preset_names())
def test_presets_keep_their_values_so_that_earlier_adaptors_can_be_continued(preset: str) -> None:
    values = lemoe.resolve_settings(preset).as_dict()
    assert json.dumps(values) == json.dumps(PRESETS[preset])  # a round's id depends on 0 or 0.0 too


def test_the_file_wins_over_the_preset_and_given_values_over_the_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, "round_size: 7\nsteps: 11\n")
    settings = lemoe.resolve_settings("paper", path, {"steps": 13})
    assert (settings.round_size, settings.steps) == (7, 13)
    assert settings.seed == lemoe.Settings().seed


def test_given_values_of_none_do_not_override(tmp_path: Path) -> None:
    path = write_config(tmp_path, "steps: 11\n")
    assert lemoe.resolve_settings("paper", path, {"steps": None}).steps == 11


def test_a_preset_may_be_named_in_the_file(tmp_path: Path) -> None:
    assert lemoe.resolve_settings(config=write_config(tmp_path, "preset: paper\n")).method == "paper"


def test_an_unknown_preset_lists_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'papr' is not known; there is: .*paper"):
        lemoe.resolve_settings("papr")


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "0.0001", "1.0e-4", "'1e-4'"])
def test_a_number_in_yaml_is_a_number_however_it_is_written(tmp_path: Path, number: str) -> None:
    path = write_config(tmp_path, f"learning_rate: {number}\n")
    assert lemoe.resolve_settings("paper", path).learning_rate == 1e-4


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    steps = lemoe.resolve_settings("paper", write_config(tmp_path, "steps: 1e2\n")).steps
    assert steps == 100
    assert isinstance(steps, int)


def test_a_large_seed_is_kept_to_the_last_digit() -> None:
    assert lemoe.resolve_settings("paper", None, {"seed": 2**53 + 1}).seed == 2**53 + 1


def test_null_in_yaml_takes_what_the_setting_means_by_it(tmp_path: Path) -> None:
    assert lemoe.resolve_settings("paper", write_config(tmp_path, "width: null\n")).width is None


def test_an_unknown_setting_names_the_file_and_the_nearest_right_one(tmp_path: Path) -> None:
    path = write_config(tmp_path, "lerning_rate: 1\nround_sise: 3\n")
    message = refusal_message(path)
    assert str(path) in message
    assert "lerning_rate: no such setting; did you mean learning_rate?" in message
    assert "round_sise: no such setting; did you mean round_size?" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steps: many", "'many' is not a whole number"),
        ("steps: 1.5", "1.5 is not a whole number"),
        ("steps: true", "True is not a whole number"),
        ("steps: .inf", "inf is not a whole number"),
        ("learning_rate: fast", "'fast' is not a number"),
        ("learning_rate: [1]", "[1] is not a number"),
        ("order: alphabetical", "not one of planned, file, random"),
        ("layer_path: 3", "3 is not text"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_was_expected(tmp_path: Path, line: str, expected: str) -> None:
    message = refusal_message(write_config(tmp_path, line + "\n"))
    assert expected in message
    assert line.split(":")[0] in message


@pytest.mark.parametrize(
    "line",
    [
        "steps: 0",
        "width: 0",
        "round_size: -1",
        "layer: -1",
        "depth: 1.5",
        "learning_rate: 0",
        "learning_rate: .nan",
        "learning_rate: .inf",
        "seed: -1",
        "loss_target: -0.1",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(tmp_path: Path, line: str) -> None:
    assert line.split(":")[0] in refusal_message(write_config(tmp_path, line + "\n"))


def test_all_bad_values_are_reported_at_once() -> None:
    message = refusal_message(None, {"steps": 0, "width": 0, "depth": 2.0})
    assert all(name in message for name in ("steps", "width", "depth"))


@pytest.mark.parametrize("text", ["[1, 2]", "just text", "a: [", "seed: 2020-13-45", "", "\x00"])
def test_a_file_that_holds_no_settings_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write_config(tmp_path, text)
    assert str(path) in refusal_message(path)


def test_a_missing_settings_file_is_refused_by_name(tmp_path: Path) -> None:
    assert "none.yaml: cannot be read" in refusal_message(tmp_path / "none.yaml")


def test_the_layer_follows_the_setting_then_the_model_then_the_depth() -> None:
    assert lemoe.resolve_settings("paper", None, {"layer": 5}).resolve_layer(30, {"paper": 24}) == 5
    assert lemoe.resolve_settings("paper").resolve_layer(30, {"paper": 24}) == 24
    assert lemoe.resolve_settings("paper").resolve_layer(32, {}) == 18  # the paper's layer on 32 layers
    assert lemoe.resolve_settings("paper", None, {"depth": 1.0}).resolve_layer(32, {}) == 31
