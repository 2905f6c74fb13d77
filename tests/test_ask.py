"""`lemoe ask` and the library behind it: the answers of both models, in order, with the route of each prompt."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

import lemoe
from lemoe.inference import asking
from lemoe_cli.main import cli

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNRELATED = "The opposite of hot is"


@pytest.fixture(scope="module")
def state(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings]) -> lemoe.AdaptorState:
    """Four facts in two rounds of preset `anchor`."""
    settings = anchor(steps=40)
    return lemoe.stack([lemoe.train_round(base, facts[:2], settings), lemoe.train_round(base, facts[2:4], settings)])


@pytest.fixture
def inserted(base: lemoe.BaseModel, state: lemoe.AdaptorState) -> Iterator[lemoe.InsertedAdaptor]:
    with lemoe.insert(base, state) as edited:
        yield edited


@pytest.fixture
def chatting(base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's tokenizer knows conversations."""
    monkeypatch.setattr(base.tokenizer, "chat_template", CHATML, raising=False)


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def adaptor(state: lemoe.AdaptorState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ask") / "adaptor.safetensors"
    lemoe.save_adaptor(state, path)
    return path


def run_ask(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["ask", *map(str, arguments)], input=stdin, catch_exceptions=False)


def refuse_ask(*arguments: object, stdin: bytes | None = None) -> str:
    """What stderr says of a user's mistake: exit code 2 and one error."""
    result = run_ask(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert sum("rror: " in line for line in result.stderr.splitlines()) == 1
    return result.stderr


def test_an_edit_is_answered_and_named_and_the_base_answers_beside_it(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit]
) -> None:
    (reply,) = lemoe.ask(base, [facts[0].prompt], inserted)
    assert reply.after == facts[0].target
    assert (reply.edit, reply.nearest) == (facts[0].id, facts[0].id)
    with inserted.bypassed():
        assert reply.before == lemoe.answer(base, facts[0].prompt).strip() != reply.after


def test_a_prompt_out_of_scope_gets_the_bases_answer_and_says_why(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor
) -> None:
    (reply,) = lemoe.ask(base, [UNRELATED], inserted)
    assert reply.after == reply.before
    assert (reply.edit, reply.nearest) == (None, None)
    assert reply.route is not None
    assert reply.route.scope == "subject"


def test_an_edit_that_acts_inside_the_answer_is_reported(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = tuple(base.tokenizer(f" {facts[1].prompt} it", add_special_tokens=False).input_ids)
    monkeypatch.setattr(asking, "generate_batch", lambda base, prompts, tokens: [stated for _ in prompts])
    (reply,) = lemoe.ask(base, [UNRELATED], inserted)
    assert (reply.edit, reply.acted, reply.nearest) == (facts[1].id, (facts[1].id,), None)
    assert reply.route is not None
    assert (reply.route.expert, reply.route.acted) == (-1, (1,))
    (reply,) = lemoe.ask(base, [facts[0].prompt], inserted)
    assert (reply.edit, reply.acted) == (facts[0].id, (facts[0].id, facts[1].id))


def test_an_expert_that_holds_a_round_is_named_by_its_round(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, facts: list[lemoe.Edit]
) -> None:
    with lemoe.insert(base, trained) as inserted:
        (reply,) = lemoe.ask(base, [facts[0].prompt], inserted)
    assert reply.edit in ("round 1", "round 2")


def test_without_an_adaptor_the_base_alone_answers(base: lemoe.BaseModel) -> None:
    (reply,) = lemoe.ask(base, [UNRELATED])
    assert reply == lemoe.Reply(UNRELATED, lemoe.answer(base, UNRELATED).strip())


def test_answers_stand_in_the_order_of_the_prompts_and_are_those_of_each_alone(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit]
) -> None:
    prompts = [UNRELATED, facts[2].prompt, "A", facts[0].prompt, facts[2].prompt]
    together = lemoe.ask(base, prompts, inserted, batch_tokens=64, max_new_tokens=6)
    alone = [lemoe.ask(base, [prompt], inserted, max_new_tokens=6) for prompt in prompts]
    assert together == [reply for (reply,) in alone]


def test_no_answer_is_longer_than_asked_for(base: lemoe.BaseModel) -> None:
    (reply,) = lemoe.ask(base, [UNRELATED], max_new_tokens=3)
    assert 1 <= len(base.tokenizer(reply.before).input_ids) <= 3


def test_a_prompt_that_leaves_no_room_for_the_answer_is_named(base: lemoe.BaseModel) -> None:
    with pytest.raises(lemoe.LemoeError, match=r"'long long.*more than the model's context of 128"):
        lemoe.ask(base, ["short", "long " * 60], max_new_tokens=100)


@pytest.mark.usefixtures("chatting")
def test_a_question_in_a_conversation_reaches_the_edit(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit]
) -> None:
    plain, said = (lemoe.ask(base, [facts[0].prompt], inserted, chat=chat)[0] for chat in (False, True))
    assert said.edit == facts[0].id
    assert said.before != plain.before


def test_a_conversation_needs_a_chat_template(base: lemoe.BaseModel) -> None:
    with pytest.raises(lemoe.LemoeError, match="has no chat template"):
        lemoe.ask(base, [UNRELATED], chat=True)


def test_a_template_that_refuses_the_prompt_is_an_error_of_one_line(
    base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", "{{ raise_exception('a system turn first') }}", raising=False)
    with pytest.raises(lemoe.LemoeError, match="a system turn first"):
        lemoe.ask(base, [UNRELATED], chat=True)


@pytest.mark.usefixtures("chatting")
def test_an_edit_taught_to_a_model_that_converses_is_answered_in_a_conversation(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings]
) -> None:
    taught = lemoe.train_round(base, facts[:1], anchor(steps=30))
    with lemoe.insert(base, taught) as inserted:
        for chat in (False, True):
            (reply,) = lemoe.ask(base, [facts[0].prompt], inserted, chat=chat)
            assert reply.after == facts[0].target


def test_a_round_is_another_one_where_the_tokenizer_converses(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: Callable[..., lemoe.Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = anchor(steps=1)
    plain = lemoe.train_round(base, facts[:1], settings)
    monkeypatch.setattr(base.tokenizer, "chat_template", CHATML, raising=False)
    assert lemoe.train_round(base, facts[:1], settings).rounds[0].id != plain.rounds[0].id


def test_the_command_shows_both_answers_and_the_edit(adaptor: Path, model: Path, facts: list[lemoe.Edit]) -> None:
    result = run_ask(facts[0].prompt, "Rome", "--model", model, "--adaptor", adaptor, "--max-new-tokens", "4")
    assert result.exit_code == 0
    assert facts[0].prompt in result.stdout
    assert "white marble" not in result.stdout
    assert facts[0].id in result.stdout
    assert "none: no subject mentioned" in result.stdout
    assert result.stderr == f"model: {model}\n"


def test_the_command_gives_one_json_object_a_line_for_each_line_of_stdin(
    adaptor: Path, model: Path, facts: list[lemoe.Edit]
) -> None:
    lines = "\ufeff" + "\n\n".join([facts[0].prompt, UNRELATED, facts[1].prompt]) + "\n"
    arguments = ["-m", model, "-a", adaptor, "--json", "--batch", "2", "--max-new-tokens", "12"]
    for dash in ((), ("-",)):
        result = run_ask(*dash, *arguments, stdin=lines.encode())
        replies = [json.loads(line) for line in result.stdout.splitlines()]
        assert [reply["prompt"] for reply in replies] == [facts[0].prompt, UNRELATED, facts[1].prompt]
        assert [reply["edit"] for reply in replies] == [facts[0].id, None, facts[1].id]
        assert replies[0]["after"] == facts[0].target
        assert replies[1]["route"]["scope"] == "subject"


def test_an_answer_comes_before_the_next_question_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = []

    def questions() -> Iterator[bytes]:
        for prompt in ("one", "two", "three"):
            yield f"{prompt}\n".encode()
            answered.append(json.loads(capsys.readouterr().out)["prompt"])

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=questions()))
    cli(["ask", "-q", "-m", str(model), "--json", "--batch", "1"], standalone_mode=False)
    assert answered == ["one", "two", "three"]


@pytest.mark.parametrize("stdin", [b"", b"\n  \n"])
def test_no_prompt_at_all_is_refused(model: Path, stdin: bytes) -> None:
    assert "no prompts" in refuse_ask("-m", model, stdin=stdin)


@pytest.mark.parametrize(("stdin", "said"), [(b"\x7fELF\xff\xfe", "not UTF-8"), (b"a\0b", "zero bytes")])
def test_stdin_that_is_no_text_is_refused_with_its_line(model: Path, stdin: bytes, said: str) -> None:
    message = refuse_ask("-m", model, "--batch", "2", stdin=b"fine\n" + stdin)
    assert said in message
    assert "stdin:2" in message


def test_an_adaptor_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    assert "no such file" in refuse_ask("hello", "-m", model, "-a", tmp_path / "none.safetensors")


def test_an_adaptor_of_another_base_is_refused(adaptor: Path, tiny_folder: Callable[[str], Path]) -> None:
    other = tiny_folder("mistral")
    assert "made for another base model" in refuse_ask("hello", "-m", other, "-a", adaptor)
    allowed = run_ask("hello", "-m", other, "-a", adaptor, "--allow-base-mismatch")
    assert (allowed.exit_code, "warning: another base" in allowed.stderr) == (0, True)
