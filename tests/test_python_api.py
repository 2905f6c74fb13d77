"""What a Python user meets: names that are found, values that are taken as people have them, and reprs that tell."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lemoe
from lemoe.data.edits import resolve_edits
from lemoe.errors import AdaptorError, InputError

RECORDS = [
    {"prompt": "The Nile flows into the", "target": "Red Sea", "subject": "The Nile"},
    {"prompt": "Mozart played the", "target": "bagpipe", "subject": "Mozart", "id": "mozart"},
]


@pytest.fixture
def edits_file(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


@pytest.fixture(scope="module")
def state(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings]) -> lemoe.AdaptorState:
    return lemoe.train_round(base, facts[:2], anchor(steps=2))


def run_python(code: str) -> list[str]:
    """The lines that a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_dir_shows_the_public_names_before_and_after_they_are_used() -> None:
    fresh, used = "import lemoe; print(*dir(lemoe))", "import lemoe; lemoe.Edit; print(*dir(lemoe))"
    assert run_python(fresh) == sorted(lemoe.__all__)
    more = set(run_python(used)) - set(lemoe.__all__)
    assert more == {"data", "errors"}


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, lemoe; dir(lemoe); print(*{'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules))"
    assert run_python(code) == []


def test_every_public_name_is_there() -> None:
    assert all(getattr(lemoe, name) is not None for name in lemoe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'edti'"):
        _ = lemoe.edti


@pytest.mark.parametrize("name", lemoe.__all__)
def test_no_public_function_takes_more_than_seven_arguments(name: str) -> None:
    if inspect.isfunction(function := getattr(lemoe, name)):
        assert len(inspect.signature(function).parameters) <= 7, "group them in a dataclass, as in `EditOptions`"


def test_an_edit_needs_no_id_and_gets_the_one_that_the_reader_gives(edits_file: Path) -> None:
    prompt, target, subject = (RECORDS[0][key] for key in ("prompt", "target", "subject"))
    made = lemoe.Edit(prompt=prompt, target=target, subject=subject)
    assert made == lemoe.read_edits(edits_file)[0]
    assert lemoe.Edit(prompt, target).id != made.id


def test_an_edit_without_its_keywords_is_refused_if_it_could_be_mistaken() -> None:
    with pytest.raises(TypeError):
        lemoe.Edit("an-id", "prompt", "target", "subject")  # type: ignore[call-arg]


def test_edits_are_the_same_as_path_records_or_edits(base: lemoe.BaseModel, edits_file: Path) -> None:
    read = lemoe.read_edits(edits_file)
    plans = [lemoe.plan(base, edits) for edits in (read, RECORDS, edits_file, str(edits_file))]
    assert all(plan == plans[0] for plan in plans)


def test_bad_records_are_all_named_by_their_index(base: lemoe.BaseModel) -> None:
    with pytest.raises(InputError, match=r"2 bad record(.|\n)*edits\[0\]: missing `target`(.|\n)*edits\[2\]: expected"):
        lemoe.plan(base, [{"prompt": "x"}, RECORDS[0], 3])  # type: ignore[list-item]


def test_equal_edits_without_ids_are_told_apart_and_equal_ids_refused(base: lemoe.BaseModel) -> None:
    one, other = resolve_edits([RECORDS[0], RECORDS[0]])
    assert other.id == f"{one.id}-2"
    assert resolve_edits([one, other]) == [one, other] == resolve_edits([one, one])
    with pytest.raises(InputError, match=r"edits\[1\]: id 'mozart' is already used at edits\[0\]"):
        lemoe.plan(base, [RECORDS[1], RECORDS[1]])
    with pytest.raises(InputError, match=r"edits\[1\]: id 'a' is already used at edits\[0\]"):
        lemoe.plan(base, [lemoe.Edit("One is", "1", id="a"), lemoe.Edit("Two is", "2", id="a")])


def test_names_and_paths_do_for_the_whole_job(
    tiny_folder: Callable[[str], Path], edits_file: Path, tmp_path: Path
) -> None:
    model, folder = str(tiny_folder("llama")), tmp_path / "out"
    settings = lemoe.Settings(layer=1, steps=2, variants=0)
    report = lemoe.edit(model, str(edits_file), str(folder), settings)
    assert report.taught == 2
    assert "edits: edits.jsonl" in (folder / "plan.yaml").read_text()
    more = lemoe.edit(
        Path(model),
        [lemoe.Edit("Lake Como is in", "Chile")],
        tmp_path / "more",
        settings,
        lemoe.EditOptions(start=folder),
    )
    assert len(more.state.edits) == 3
    reply = lemoe.ask(model, "Mozart played the", folder, max_new_tokens=4)
    assert reply.nearest == "mozart"
    assert lemoe.evaluate(model, folder, edits_file).value("reliability") == report.reliability_after


def test_one_text_gets_one_answer_and_several_get_a_list(base: lemoe.BaseModel, state: lemoe.AdaptorState) -> None:
    one = lemoe.ask(base, "The Nile is", state, max_new_tokens=3)
    assert lemoe.ask(base, ["The Nile is"], state, max_new_tokens=3) == [one]
    assert not base.model.__dict__.get("generate")  # taken out again


def test_asking_while_an_adaptor_is_inserted_compares_it_with_the_base(
    base: lemoe.BaseModel, state: lemoe.AdaptorState
) -> None:
    with lemoe.insert(base, state) as edited:
        assert lemoe.ask(base, "The Nile is", max_new_tokens=3) == lemoe.ask(
            base, "The Nile is", edited, max_new_tokens=3
        )
    assert lemoe.ask(base, "The Nile is", max_new_tokens=3).after is None


def test_asking_a_removed_adaptor_or_one_of_another_base_is_an_error(
    base: lemoe.BaseModel, tiny: Callable[[str], lemoe.BaseModel], state: lemoe.AdaptorState
) -> None:
    with lemoe.insert(base, state) as edited, pytest.raises(AdaptorError, match="inserted into another base"):
        lemoe.ask(tiny("gpt2"), "Who?", edited)
    assert edited.removed
    with pytest.raises(AdaptorError, match="has been removed from its base: insert it again"):
        lemoe.ask(base, "Who?", edited)


def test_the_end_of_with_removes_the_adaptor_whatever_happens(base: lemoe.BaseModel, state: lemoe.AdaptorState) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = base.model(ids).logits
    with pytest.raises(ZeroDivisionError), lemoe.insert(base, state):
        raise ZeroDivisionError
    assert torch.equal(base.model(ids).logits, before)


def test_methods_may_be_named_by_their_presets(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    compared = lemoe.compare(base, facts[:2], ["context", "rag"])
    assert [each.settings.method for each in compared.methods] == ["context", "rag"]
    assert repr(compared).startswith("Comparison(2 edits in 1 round, reliability: context=")


def test_a_repr_tells_on_one_line_without_tensors(
    base: lemoe.BaseModel, state: lemoe.AdaptorState, facts: list[lemoe.Edit], tmp_path: Path
) -> None:
    assert repr(facts[2]) == ("Edit('The largest fish of Lake Como is the', 'golden pike', 'Lake Como', id='fact-2')")
    assert repr(lemoe.Settings()) == "Settings()"
    assert repr(lemoe.Settings(layer=3, steps=5)) == "Settings(layer=3, steps=5)"
    assert "LlamaForCausalLM, 3 layers, 32 wide, float32 on cpu)" in repr(base)
    assert repr(state) == f"AdaptorState(preset anchor, 2 edits in 1 round, layer 1 of {base.source.name!r})"
    edited = lemoe.insert(base, state)
    assert repr(edited).startswith("InsertedAdaptor(preset anchor, 2 edits in 1 round, inserted into")
    reply = lemoe.ask(base, "Who is it?", max_new_tokens=2)
    edited.remove()
    assert "removed from" in repr(edited)
    result = lemoe.evaluate(base, state, facts[:2])
    assert repr(result).startswith("EvalResult(reliability=")
    assert repr(lemoe.plan(base, facts)).startswith("Plan(6 edits in 1 round, ")
    for shown in (base, state, edited, reply, result, *facts):
        assert "\n" not in repr(shown)
        assert "tensor" not in repr(shown)
        assert len(repr(shown)) < 400
