"""`lemoe ask` as a conversation: turns that build on each other, the terminal's commands, and lines of messages."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers as hf
from click.testing import CliRunner, Result
from conftest import REPOSITORY

import lemoe
from lemoe.data.conversation import read_conversation
from lemoe.errors import InputError
from lemoe.inference import asking
from lemoe.inference.chatting import Chat
from lemoe.inference.generation import generate_batch
from lemoe_cli.conversation import COMMANDS, converse
from lemoe_cli.main import cli

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
UNRELATED = "The opposite of hot is"
SHORT = 6  # tokens of an answer, so that some turns fit the tiny model's context


@pytest.fixture(scope="module")
def state(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings]) -> lemoe.AdaptorState:
    return lemoe.train_round(base, facts[:2], anchor(steps=40))


@pytest.fixture
def chatting(base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's tokenizer knows conversations."""
    monkeypatch.setattr(base.tokenizer, "chat_template", CHATML, raising=False)


@pytest.fixture
def inserted(base: lemoe.BaseModel, state: lemoe.AdaptorState) -> Iterator[lemoe.InsertedAdaptor]:
    with lemoe.insert(base, state) as edited:
        yield edited


Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines, and gives what stands on stdout and on stderr afterwards; an exception is raised in its place."""

    def type_lines(
        *lines: str | type[BaseException], system: str | None = None, adaptor: bool = True
    ) -> tuple[str, str]:
        waiting = iter(lines)

        def read_line(mark: str) -> str:
            line = next(waiting, EOFError)
            if isinstance(line, str):
                return line
            raise line

        converse(base, inserted if adaptor else None, system, SHORT, quiet=True, read_line=read_line)
        assert next(waiting, None) is None
        printed = capsys.readouterr()
        return printed.out, " ".join(printed.err.split())

    return type_lines


@pytest.fixture
def asked(base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model is run on, as they come."""
    texts: list[str] = []

    def note_prompts(base: lemoe.BaseModel, prompts: list[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
        texts.extend(base.tokenizer.decode(list(prompt)) for prompt in prompts)
        return generate_batch(base, prompts, tokens)

    monkeypatch.setattr(asking, "generate_batch", note_prompts)
    return texts


# The conversation


@pytest.mark.usefixtures("chatting")
def test_each_turn_is_answered_with_those_before_it(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit], asked: list[str]
) -> None:
    chat = Chat(base, inserted, max_new_tokens=SHORT)
    first = chat.say(facts[0].prompt)
    second = chat.say("Hm")
    assert first.text == facts[0].target
    assert first.acted == (facts[0].id,)
    said = f"<|user|>\n{facts[0].prompt}\n<|assistant|>\n"
    assert asked == [said, f"{said}{first.text}\n<|user|>\nHm\n<|assistant|>\n"]
    assert [text for _, text in chat.turns] == [facts[0].prompt, first.text, "Hm", second.text]


@pytest.mark.usefixtures("chatting")
def test_the_base_answers_the_last_turn_with_the_same_turns_before_it(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit], asked: list[str]
) -> None:
    chat = Chat(base, inserted, max_new_tokens=SHORT)
    assert chat.answer_as_base() is None
    chat.say("Hm")
    answer = chat.say(facts[0].prompt)
    before = chat.answer_as_base()
    assert before != answer.text
    inserted.remove()
    turns = (*chat.turns[:2], ("user", facts[0].prompt))
    assert before == lemoe.ask(base, lemoe.Conversation(turns), max_new_tokens=SHORT).before
    assert asked[1] == asked[2] == asked[3]
    assert len(chat.turns) == 4


@pytest.mark.usefixtures("chatting")
def test_a_forgotten_conversation_is_not_asked_again_but_its_system_prompt_is(
    base: lemoe.BaseModel, asked: list[str]
) -> None:
    chat = Chat(base, system="Be short.", max_new_tokens=SHORT)
    chat.say("one")
    chat.forget()
    assert (chat.turns, chat.last, chat.answer_as_base()) == ((), None, None)
    chat.say("two")
    assert asked[1] == "<|system|>\nBe short.\n<|user|>\ntwo\n<|assistant|>\n"


@pytest.mark.usefixtures("chatting")
def test_a_turn_that_fails_is_as_if_it_had_not_been_said(
    base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(base, inserted, max_new_tokens=SHORT)
    with pytest.raises(InputError, match=r"context of 128; begin another conversation"):
        chat.say("long " * 200)
    with pytest.raises(InputError, match="half a surrogate"):
        chat.say("\ud800")
    with monkeypatch.context() as patch:
        patch.setattr(base.layers[-1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.say("never mind")
    assert (chat.turns, chat.last) == ((), None)
    assert chat.say(facts[0].prompt).text == facts[0].target


def interrupt(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("chatting")
def test_an_answer_has_no_more_tokens_than_the_context_has_room_for(base: lemoe.BaseModel) -> None:
    chat = Chat(base, max_new_tokens=1000)
    answer = chat.say("one")
    assert answer.text
    with pytest.raises(InputError, match=r"with the 2 turns before, .*begin another conversation"):
        chat.say("two " * 40)


def test_without_a_chat_template_each_turn_is_a_prompt_of_its_own(base: lemoe.BaseModel, asked: list[str]) -> None:
    chat = Chat(base, max_new_tokens=SHORT)
    chat.say("one")
    chat.say("two")
    assert asked == ["one", "two"]
    with pytest.raises(InputError, match=r"no system prompt can be given to .*no chat template"):
        chat.set_system("Be short.")


def test_a_template_that_takes_no_system_prompt_is_not_given_one(
    base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", WITHOUT_SYSTEM, raising=False)
    with pytest.raises(InputError, match=r"no system prompt can be given to .*: no system"):
        Chat(base, system="Be short.")


# The terminal


@pytest.mark.usefixtures("chatting")
def test_a_line_is_answered_and_the_edit_that_acted_is_named(talk: Talk, facts: list[lemoe.Edit]) -> None:
    out, err = talk(facts[0].prompt, "", UNRELATED)
    lines = out.splitlines()
    assert lines[:2] == [facts[0].target, f"edit: {facts[0].id}"]
    assert lines[-1].startswith("edit: ")
    assert "error" not in err


@pytest.mark.usefixtures("chatting")
def test_why_tells_scope_nearest_edit_probability_and_conflict(talk: Talk, facts: list[lemoe.Edit]) -> None:
    out, _ = talk(facts[0].prompt, "/why", "/new", UNRELATED, "/why")
    rows = [line.split(None, 1) for line in out.splitlines()[2:]]
    acted = dict(rows[:5])
    assert acted["edit"].strip() == facts[0].id
    assert acted["scope"].startswith("in: ")
    assert facts[0].target in acted["nearest"]
    assert "(acts from 0.5)" in acted["probability"]
    assert float(acted["conflict"]) >= 0
    assert "scope  subject: no edit's subject is mentioned" in out


@pytest.mark.usefixtures("chatting")
def test_base_shows_what_the_base_answers(
    talk: Talk, base: lemoe.BaseModel, inserted: lemoe.InsertedAdaptor, facts: list[lemoe.Edit]
) -> None:
    out, _ = talk(facts[0].prompt, "/base")
    with inserted.bypassed():
        expected = Chat(base, max_new_tokens=SHORT).say(facts[0].prompt).text
    assert "".join(out.splitlines()[2:]).split() == expected.split()


def test_edits_lists_what_the_adaptor_holds_or_what_has_the_words(talk: Talk, facts: list[lemoe.Edit]) -> None:
    out, _ = talk("/edits")
    assert [f"1/{fact.id}" in out for fact in facts[:3]] == [True, True, False]
    out, _ = talk("/edits marble")
    assert [f"1/{fact.id}" in out for fact in facts[:2]] == [False, True]


@pytest.mark.usefixtures("chatting")
def test_system_and_new_change_what_the_model_reads(talk: Talk, asked: list[str]) -> None:
    talk("one", "/system Be kind.", "/new", "two", "/system", "/new", "three", system="Be short.")
    assert [text.split("\n")[:4] for text in asked] == [
        ["<|system|>", "Be short.", "<|user|>", "one"],
        ["<|system|>", "Be kind.", "<|user|>", "two"],
        ["<|user|>", "three", "<|assistant|>", ""],
    ]


def test_help_names_every_command_and_an_unknown_one_is_told_the_nearest(talk: Talk) -> None:
    out, err = talk("/help", "/edit", "/xyz")
    assert all(f"/{name}" in out for name in COMMANDS)
    assert "no command /edit; did you mean /edits?" in err
    assert "no command /xyz; /help lists them" in err


@pytest.mark.usefixtures("chatting")
def test_a_path_is_no_command(talk: Talk, asked: list[str]) -> None:
    talk("/etc/hosts is")
    assert "/etc/hosts is" in asked[0]


@pytest.mark.usefixtures("chatting")
def test_ctrl_c_gives_up_the_line_and_quit_ends(talk: Talk, facts: list[lemoe.Edit]) -> None:
    out, _ = talk(KeyboardInterrupt, facts[0].prompt, "/quit")
    assert out.startswith(facts[0].target)


@pytest.mark.usefixtures("chatting")
def test_an_error_is_one_line_and_the_conversation_goes_on(talk: Talk, facts: list[lemoe.Edit]) -> None:
    out, err = talk("long " * 200, facts[0].prompt)
    assert err.startswith("error: ")
    assert out.startswith(facts[0].target)


@pytest.mark.parametrize("adaptor", [True, False])
def test_commands_before_anything_was_asked_say_so(talk: Talk, adaptor: bool) -> None:
    out, err = talk("/why", "/base", *([] if adaptor else ["/edits"]), adaptor=adaptor)
    assert out == ""
    assert err.count("nothing was asked yet") == 2
    assert adaptor or "no adaptor" in err


def test_without_a_chat_template_the_terminal_says_that_lines_stand_alone(talk: Talk) -> None:
    out, err = talk("one", "/system Be short.")
    assert "each line is a prompt of its own" in err
    assert "error: no system prompt can be given" in err
    assert out


# Lines of messages


@pytest.fixture(scope="module")
def chat_model(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with a chat template in its tokenizer."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    hf.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).save_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_folder("llama"))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def run_ask(*arguments: object, stdin: str) -> Result:
    return CliRunner().invoke(cli, ["ask", *map(str, arguments)], input=stdin, catch_exceptions=False)


def write_messages(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


def test_a_line_of_messages_is_answered_as_that_conversation(chat_model: Path, base: lemoe.BaseModel) -> None:
    turns = (("user", "one"), ("assistant", "1"), ("user", "two"))
    stdin = "\n".join([write_messages(*turns), "two", '{"name": "plain'])
    arguments = ["-m", chat_model, "--json", "--max-new-tokens", SHORT]
    result = run_ask(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert [reply["prompt"] for reply in replies] == ["two", "two", '{"name": "plain']
    loaded = lemoe.load_base(str(chat_model), device="cpu")
    expected = lemoe.ask(loaded, lemoe.Conversation(turns), max_new_tokens=SHORT)
    assert replies[0]["before"] == expected.before != replies[1]["before"]


BAD_LINES = {
    '{"messages": [': "invalid JSON",
    '{"message": "one"}': "the keys message; expected",
    '{"messages": [], "model": "x"}': "the keys messages, model; expected",
    '{"messages": []}': "no list with a message in it",
    '{"messages": [{"role": "user"}, 3, {"role": "tool", "content": "x"}]}': "messages[2]: role 'tool'",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "messages[0]: `content` is neither",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "half a surrogate pair",
    write_messages(("user", "one"), ("assistant", "1")): "the last message is of role 'assistant'",
    write_messages(("user", "long " * 200)): "more than the model's context of 128",
}


def test_bad_lines_are_reported_with_their_number_and_lose_nothing_else(chat_model: Path) -> None:
    good = write_messages(("user", "one"))
    stdin = "\n".join(line for bad in BAD_LINES for line in (good, bad))
    result = run_ask("-m", chat_model, "--json", "--max-new-tokens", SHORT, "--batch", "5", stdin=stdin)
    assert result.exit_code == 2
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {record["prompt"] for record in records[::2]} == {"one"}
    for number, (record, said) in enumerate(zip(records[1::2], BAD_LINES.values(), strict=True), 1):
        assert record["line"] == 2 * number
        assert said in record["error"]
        assert f"stdin:{2 * number}: " in result.stderr
    assert f"error: lines of stdin that were not answered: {len(BAD_LINES)}" in result.stderr


def test_content_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    line = json.dumps({"messages": [{"role": "user", "content": parts, "name": "ann"}]})
    assert read_conversation(line) == lemoe.Conversation((("user", "Who are you?"),))


@pytest.mark.parametrize("line", ["What is this?", '["a"]', "3", '{"a": ', "{x} is a set"])
def test_a_line_that_is_no_object_is_a_plain_prompt(line: str) -> None:
    assert read_conversation(line) is None


def test_the_system_prompt_is_given_to_prompts_and_to_conversations_without_one(
    chat_model: Path, asked: list[str]
) -> None:
    own = write_messages(("system", "Mine."), ("user", "two"))
    stdin = "\n".join(["one", own, write_messages(("user", "three"))])
    arguments = ["-m", chat_model, "--json", "--chat", "--system", "Be short.", "--max-new-tokens", SHORT]
    assert run_ask(*arguments, stdin=stdin).exit_code == 0
    assert sorted(text.split("\n")[1] + text.split("\n")[3] for text in asked) == [
        "Be short.one",
        "Be short.three",
        "Mine.two",
    ]


def test_a_system_prompt_without_a_place_for_it_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    refused = run_ask("one", "-m", tiny_folder("llama"), "--system", "Be short.", stdin="")
    assert (refused.exit_code, "--system needs --chat" in refused.stderr) == (2, True)
    refused = run_ask("one", "-m", tiny_folder("llama"), "--system", "Be short.", "--chat", stdin="")
    assert (refused.exit_code, "has no chat template" in refused.stderr) == (2, True)


# A terminal


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_in_a_terminal_ask_without_a_prompt_is_a_conversation(chat_model: Path) -> None:
    main, terminal = os.openpty()
    command = [sys.executable, "-m", "lemoe_cli.main", "ask", "-m", str(chat_model), "--max-new-tokens", str(SHORT)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "dumb"}
    with subprocess.Popen(command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = read_until(main, "> ")
        for keys in ("one\n", "/why\n"):
            os.write(main, keys.encode())
            shown += read_until(main, "\r\n> ")
        os.write(main, b"\x04")
        assert process.wait(60) == 0
    os.close(main)
    assert "/help lists the commands" in shown
    assert "no adaptor, and so no edit acts" in shown


def read_until(terminal: int, end: str) -> str:
    """What a terminal shows, until it ends with `end` or nothing more comes."""
    shown, last = b"", time.monotonic() + 120
    while not shown.endswith(end.encode()) and time.monotonic() < last:
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    return shown.decode(errors="replace")
