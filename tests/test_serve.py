"""`lemoe serve`: OpenAI's API in front of a base with adaptors, many requests at once, adaptors that come and go."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from test_cli import lemoe_command

import lemoe
from lemoe.errors import InputError
from lemoe.serving.adaptors import ServedAdaptors, UnknownModelError
from lemoe.serving.app import build_app
from lemoe.serving.generation import Sampling, write_answer
from lemoe.serving.server import Server
from lemoe_cli.serve import name_adaptors

pytestmark = pytest.mark.versions

SettingsOf = Callable[..., lemoe.Settings]
PROMPTS = ("The Eiffel Tower stands in the city of", "The largest fish of Lake Como is the", "The Nile flows into the")
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"


@pytest.fixture(scope="module")
def host(tiny_folder: Callable[[str], Path]) -> lemoe.BaseModel:
    """A base of its own, since adaptors are loaded into it."""
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    base.tokenizer.chat_template = CHAT_TEMPLATE
    return base


@pytest.fixture(scope="module")
def files(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two adaptors: of one fact, and of another answer to it and one more."""
    home = tmp_path_factory.mktemp("adaptors")
    first, second = facts[0], lemoe.Edit(facts[0].prompt, "Oslo", facts[0].subject, id="other")
    for name, edits in {"one": [first], "two": [second, facts[2]]}.items():
        lemoe.save_adaptor(lemoe.train_round(base, edits, anchor(steps=30)), home / f"{name}.safetensors")
    return {name: home / f"{name}.safetensors" for name in ("one", "two")}


@pytest.fixture
def served(host: lemoe.BaseModel, files: dict[str, Path]) -> Iterator[ServedAdaptors]:
    served = ServedAdaptors(host)
    served.load("one", files["one"])
    yield served
    for name in served.names[1:]:
        served.unload(name)


@pytest.fixture
def client(served: ServedAdaptors) -> Iterator[TestClient]:
    with TestClient(build_app(Server(served), allow_updates=True), raise_server_exceptions=False) as client:
        yield client


def ask(base: lemoe.BaseModel, path: Path | None, prompts: tuple[str, ...] = PROMPTS) -> dict[str, str]:
    """What `lemoe ask` gives: the base's answers, or those with an adaptor."""
    if path is None:
        return {reply.prompt: reply.before for reply in lemoe.ask(base, prompts, max_new_tokens=6)}
    with lemoe.insert(base, path) as edited:
        return {reply.prompt: reply.after or "" for reply in lemoe.ask(base, prompts, edited, max_new_tokens=6)}


def complete(client: TestClient, model: str | None, prompt: Any, **given: Any) -> list[str]:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, **given}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return [choice["text"].strip() for choice in response.json()["choices"]]


def refusal(client: TestClient, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_answers_are_those_of_ask_by_the_name_of_base_or_adaptor(
    client: TestClient, host: lemoe.BaseModel, base: lemoe.BaseModel, files: dict[str, Path]
) -> None:
    before, after = ask(base, None), ask(base, files["one"])
    assert before != after
    for prompt in PROMPTS:
        assert complete(client, host.source.name, prompt) == [before[prompt]]
        assert complete(client, "one", prompt) == [after[prompt]] == complete(client, None, prompt)
    assert complete(client, "one", list(PROMPTS)) == [after[prompt] for prompt in PROMPTS]
    assert complete(client, "one", host.tokenizer(PROMPTS[0]).input_ids) == [after[PROMPTS[0]]]
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == [host.source.name, "one"]
    assert client.get("/health").json() == {"status": "ok"}


def test_a_conversation_is_put_into_the_chat_template(client: TestClient, host: lemoe.BaseModel) -> None:
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": " the Nile?"}]
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the Nile?"}
    messages = [system, {"role": "user", "content": parts}]
    body = {"model": "one", "messages": messages, "max_completion_tokens": 5, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    text = host.tokenizer.apply_chat_template([system, question], tokenize=False, add_generation_prompt=True)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"].strip() == complete(client, "one", text, max_tokens=5)[0]
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(host.tokenizer(text).input_ids)


def read_events(text: str) -> list[Any]:
    """The events of a stream, without the one that ends it."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_holds_the_same_text(client: TestClient, path: str) -> None:
    asked = (
        {"prompt": PROMPTS[0]} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPTS[0]}]}
    )
    body = {"model": "one", "max_tokens": 12, "temperature": 0, **asked}
    whole = client.post(path, json=body).json()
    events = read_events(
        client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    )
    choices = [event["choices"][0] for event in events if event["choices"]]
    if path == "/v1/completions":
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    else:
        said = "".join(choice["delta"]["content"] for choice in choices)
        assert said == whole["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for choice in choices][-1] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1


def test_a_failure_in_mid_stream_is_an_event_of_it(
    client: TestClient, host: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward, calls = host.model.forward, count(1)

    def fail_at_the_second_token(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(host.model, "forward", fail_at_the_second_token)
    body = {"model": "one", "prompt": PROMPTS[0], "max_tokens": 12, "stream": True}
    text = client.post("/v1/completions", json=body).text.strip()
    *pieces, last = text.split("\n\n")
    assert all("choices" in json.loads(piece.removeprefix("data: ")) for piece in pieces)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error == {"message": "RuntimeError: out of memory", "type": "server_error", "param": None, "code": None}
    assert "out of memory" in caplog.text


def test_sampling_is_repeated_by_its_seed_alone(client: TestClient) -> None:
    drawn = {"temperature": 1.5, "seed": 3, "max_tokens": 12}
    first = complete(client, "one", PROMPTS[2], **drawn)
    assert complete(client, "one", PROMPTS[2], **drawn) == first
    several = complete(client, "one", PROMPTS[2], n=4, **drawn)
    assert several[0] == first[0]
    assert len(set(several)) == 4
    likeliest = complete(client, "one", PROMPTS[2], max_tokens=12)
    assert complete(client, "one", PROMPTS[2], **{**drawn, "top_p": 1e-6}) == likeliest


def test_tokens_are_drawn_by_their_probability(host: lemoe.BaseModel) -> None:
    prompt = host.tokenizer(PROMPTS[2]).input_ids
    with torch.no_grad():
        expected = (host.model(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    found = torch.zeros_like(expected)
    for seed in range(800):
        sampling = Sampling(1, temperature=0.8, seed=seed)
        pieces: list[str] = []
        given: Any = {"strip_start": False, "on_text": pieces.append, "cancelled": threading.Event()}
        write_answer(host, None, prompt, sampling, **given)
        found[host.tokenizer("".join(pieces)).input_ids[0] if "".join(pieces) else host.eos_token_id] += 1 / 800
    likely = expected.topk(3).indices
    assert float((found[likely] - expected[likely]).abs().max()) < 0.06


def test_an_answer_ends_before_a_stop_text_however_it_is_cut(client: TestClient) -> None:
    (whole,) = complete(client, "one", PROMPTS[2], max_tokens=16)
    stop = whole[5:9]
    for given in ({"stop": stop}, {"stop": ["never said", stop]}):
        body = {"model": "one", "prompt": PROMPTS[2], "max_tokens": 16, "temperature": 0, **given}
        answer = client.post("/v1/completions", json=body).json()["choices"][0]
        assert answer["text"].strip() == whole[: whole.index(stop)].strip()
        assert answer["finish_reason"] == "stop"
        events = read_events(client.post("/v1/completions", json={**body, "stream": True}).text)
        assert "".join(event["choices"][0]["text"] for event in events) == answer["text"]


def test_what_is_not_served_is_refused_in_openais_shape(client: TestClient, host: lemoe.BaseModel) -> None:
    path, asked = "/v1/completions", {"model": "one", "prompt": "The Nile"}
    error = refusal(client, path, {**asked, "model": "gpt-9"}, 404)
    assert error["code"] == "model_not_found"
    assert "one" in error["message"]
    assert refusal(client, path, {**asked, "logit_bias": {"5": 1}})["param"] == "logit_bias"
    assert refusal(client, path, {**asked, "presence_penalty": 0.5})["param"].startswith("presence_penalty")
    assert "not served" in refusal(client, path, {**asked, "best_off": 3})["message"]
    assert refusal(client, path, {**asked, "temperature": -1})["param"] == "temperature"
    assert refusal(client, path, {**asked, "max_tokens": 4096})["code"] == "context_length_exceeded"
    assert refusal(client, path, {**asked, "prompt": "The Nile " * 2000})["code"] == "context_length_exceeded"
    assert refusal(client, path, {**asked, "prompt": ""})["param"] == "prompt"
    assert "no token" in refusal(client, path, {**asked, "prompt": [5, 1 << 20]})["message"]
    assert refusal(client, path, {**asked, "n": 2, "stream": True})["param"] == "stream"
    assert refusal(client, "/v1/chat/completions", {"model": "one", "messages": []})["param"] == "messages"
    assert refusal(client, "/v1/nothing", {}, 404)["type"] == "invalid_request_error"
    assert client.post(path, content=b"{").status_code == 400
    neutral = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "logprobs": None,
        "n": 1,
    }
    assert complete(client, "one", PROMPTS[0], **neutral) == complete(client, "one", PROMPTS[0])


def test_a_model_without_a_chat_template_says_so(
    client: TestClient, host: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.tokenizer, "chat_template", None)
    body = {"model": "one", "messages": [{"role": "user", "content": "Hi"}]}
    assert "no chat template" in refusal(client, "/v1/chat/completions", body)["message"]


def test_an_api_key_is_asked_for_but_for_health(served: ServedAdaptors) -> None:
    with TestClient(build_app(Server(served), api_key="secret")) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert (
            client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).json()["error"]["code"]
            == "invalid_api_key"
        )
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert client.post("/v1/unload_adaptor", json={"name": "one"}, headers=key).status_code == 404


def test_many_mixed_requests_at_once_never_see_each_other(
    client: TestClient, host: lemoe.BaseModel, base: lemoe.BaseModel, files: dict[str, Path]
) -> None:
    client.post("/v1/load_adaptor", json={"name": "two", "path": str(files["two"])})
    expected = {host.source.name: ask(base, None), **{name: ask(base, path) for name, path in files.items()}}
    requests = [(model, prompt) for model in expected for prompt in PROMPTS] * 12
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda request: complete(client, *request), requests))
    assert [texts[0] for texts in found] == [expected[model][prompt] for model, prompt in requests]


def test_an_adaptor_is_swapped_while_requests_run_and_none_is_lost(
    client: TestClient, served: ServedAdaptors, base: lemoe.BaseModel, files: dict[str, Path]
) -> None:
    states = [ask(base, path)[PROMPTS[0]] for path in files.values()]
    assert states[0] != states[1]
    hooks = len(served.base.decoder._forward_pre_hooks)

    def swap(number: int) -> None:
        path = files["two" if number % 2 == 0 else "one"]
        assert client.post("/v1/load_adaptor", json={"name": "one", "path": str(path)}).status_code == 200

    with ThreadPoolExecutor(8) as pool, ThreadPoolExecutor(1) as swapping:
        swaps = swapping.map(swap, range(7))
        found = list(pool.map(lambda number: complete(client, "one", PROMPTS[0])[0], range(80)))
        list(swaps)
    assert set(found) <= set(states)
    assert complete(client, "one", PROMPTS[0]) == [states[1]]
    assert len(served.base.decoder._forward_pre_hooks) == hooks  # those that were replaced are taken out


def test_what_cannot_be_loaded_changes_nothing(client: TestClient, host: lemoe.BaseModel, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no adaptor")
    before = complete(client, "one", PROMPTS[0])
    for name, path in (("one", "broken.safetensors"), ("one", "missing"), (host.source.name, "broken.safetensors")):
        refusal(client, "/v1/load_adaptor", {"name": name, "path": str(tmp_path / path)})
    assert refusal(client, "/v1/unload_adaptor", {"name": "two"}, 404)["code"] == "model_not_found"
    assert complete(client, "one", PROMPTS[0]) == before


def test_a_request_keeps_its_adaptor_until_it_is_answered(served: ServedAdaptors, files: dict[str, Path]) -> None:
    with served.use("one") as adaptor:
        assert adaptor is not None
        served.unload("one")
        assert adaptor._hooks
        with pytest.raises(UnknownModelError, match="'one' is not served"), served.use("one"):
            pass
    assert not adaptor._hooks
    with served.use(None) as nothing:
        assert nothing is None  # the base's turn, where no adaptor is left
    served.load("one", files["one"])


def test_the_command_refuses_what_it_cannot_serve_before_it_loads_anything(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    result = lemoe_command("serve", "-m", str(tiny_folder("llama")), "-a", str(tmp_path / "missing"))
    assert result.exit_code == 2
    assert "missing" in result.stderr
    with pytest.raises(InputError, match="--adaptor NAME="):
        name_adaptors(((None, Path("x/facts.lemoe")), (None, Path("y/facts.safetensors"))))
    named = name_adaptors(((None, Path("x/facts.lemoe/adaptor.safetensors")), ("prices", Path("p.safetensors"))))
    assert named == {"facts": Path("x/facts.lemoe/adaptor.safetensors"), "prices": Path("p.safetensors")}
