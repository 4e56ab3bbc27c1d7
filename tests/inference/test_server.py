"""The server: answers as a predictor's own, refusals in OpenAI's form, what clients and accidents do to it.

One server for this file; the last test ends it.
"""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from pages import many_of
from PIL import Image
from serving import BACKBONE, IMAGES, PATIENCE, QUESTIONS, TOKEN, Served, message, openai, png, start

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.mixed import load_many
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

pytest.importorskip("litserve")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    backbone = Backbone.from_pretrained(BACKBONE).eval()
    many_of(backbone, root)
    for name, length in (("short", 2), ("long", 9), ("late", 4)):
        prompt = DePT(backbone.d_model, prompt_length=length, rank=3, max_source_length=24)
        for parameter in prompt.parameters():
            torch.nn.init.normal_(parameter)
        own = backbone.with_projection(backbone.visual_projection)
        Adapter.of(PromptedModel(own, prompt), task="vqav2", metrics={}).save(root / name)
    sources = {name: str(root / name) for name in ("colours", "pairs", "captions", "short", "long")}
    process, port = start(
        root,
        list(sources.values()),
        *[
            "--backbone",
            str(BACKBONE),
            "--allow_adapter_changes",
            "--allow_urls",
            "--max_wait_ms",
            "20",
            "--timeout",
            "20",
        ],
        *["--max_request_mb", "1", "--max_requests", "200"],
    )
    many = load_many(sources | {"late": str(root / "late")}, backbone=backbone)
    yield Served(process, port, many, root)
    process.terminate()
    process.wait(PATIENCE)


def test_answers_are_a_predictors_own(served: Served) -> None:
    for name in ("colours", "short", "long"):
        answer = served.ask(name, QUESTIONS[0], IMAGES[0])
        assert answer.choices[0].message.content == served.many.predictor(name).answer(
            IMAGES[0], QUESTIONS[0]
        )
        assert (answer.model, answer.choices[0].message.role) == (name, "assistant")
    bare = served.ask("tiny-clip-t5", QUESTIONS[0], IMAGES[0]).choices[0].message.content
    assert bare == served.many.predictor(None).answer(IMAGES[0], QUESTIONS[0])
    pair = served.ask("pairs", "both are red", IMAGES[0], IMAGES[1]).choices[0].message.content
    assert pair == served.many.predictor("pairs").answer((IMAGES[0], IMAGES[1]), "both are red")
    caption = served.ask("captions", "", IMAGES[3]).choices[0].message.content
    assert caption == served.many.predictor("captions").answer(IMAGES[3])
    plain = served.client.models.list()
    assert [model.id for model in plain] == ["colours", "pairs", "captions", "short", "long", "tiny-clip-t5"]
    assert served.client.models.retrieve("pairs").images == 2


def test_tokens_are_counted_as_they_are(served: Served) -> None:
    predictor = served.many.predictor("captions")
    backbone = served.many.backbone
    assert backbone.vision is not None
    answer = served.ask("captions", "", IMAGES[3])
    text = backbone.tokenizer(predictor.task.source("")).input_ids
    assert answer.usage.prompt_tokens == len(text) + backbone.vision.token_count
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    pair = served.ask("pairs", "both", IMAGES[0], IMAGES[1])
    text = backbone.tokenizer(served.many.predictor("pairs").task.source("both")).input_ids
    assert pair.usage.prompt_tokens == len(text) + 2 * backbone.vision.token_count
    # As many tokens as were counted are enough for the answer, and one less is not.
    full = served.ask("tiny-clip-t5", QUESTIONS[0], IMAGES[0])
    count = full.usage.completion_tokens
    assert (count > 1, full.choices[0].finish_reason) == (True, "stop")
    enough = served.ask("tiny-clip-t5", QUESTIONS[0], IMAGES[0], max_tokens=count)
    assert enough.choices[0] == full.choices[0]
    cut = served.ask("tiny-clip-t5", QUESTIONS[0], IMAGES[0], max_completion_tokens=count - 1)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", count - 1)


def test_a_stream_has_the_same_answer(served: Served) -> None:
    whole = served.ask("colours", QUESTIONS[1], IMAGES[2])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(served.ask("colours", QUESTIONS[1], IMAGES[2], **options))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "stop"


def test_rows_of_all_adapters_at_once_are_never_swapped(served: Served) -> None:
    names = ["colours", "short", "long", "tiny-clip-t5"]
    rows = [
        (name, question, place) for name in names for question in QUESTIONS for place in range(len(IMAGES))
    ]
    expected = {
        (name, question, place): served.many.predictor(None if name == "tiny-clip-t5" else name).answer(
            IMAGES[place], question
        )
        for name, question, place in rows
    }
    assert len(set(expected.values())) > 5
    before = served.metric("dept_vl_batch_size_count")
    client = served.client

    def ask(row: tuple[str, str, int]) -> tuple[tuple[str, str, int], str]:
        name, question, place = row
        answer = served.ask(name, question, IMAGES[place], client=client)
        return row, answer.choices[0].message.content

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, rows))
    assert dict(answers) == expected
    assert served.metric("dept_vl_batch_size_count") - before < len(rows) / 2  # they went together


def long_png(width: int) -> bytes:
    return png(Image.new("1", (width, 1)))


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown adapter": ({"model": "nobody"}, 404, "model_not_found"),
    "no model": ({"model": ""}, 404, "model_not_found"),
    "system prompt": (
        {"messages": [{"role": "system", "content": "be kind"}, *message("what?", IMAGES[0])]},
        400,
        "invalid_request",
    ),
    "conversation": ({"messages": message("what?", IMAGES[0]) * 2}, 400, "invalid_request"),
    "no message": ({"messages": []}, 400, "invalid_request"),
    "no image": ({"messages": message("what?")}, 400, "wrong_number_of_images"),
    "two images": ({"messages": message("what?", *IMAGES[:2])}, 400, "wrong_number_of_images"),
    "no question": ({"messages": message("  ", IMAGES[0])}, 400, "invalid_question"),
    "long question": ({"messages": message("a" * 1001, IMAGES[0])}, 400, "question_too_long"),
    "no picture": ({"messages": message("what?", b"hello")}, 400, "invalid_question"),
    "cut picture": ({"messages": message("what?", IMAGES[3][:-900])}, 400, "invalid_question"),
    "long bomb": ({"messages": message("what?", long_png(60_000))}, 400, "invalid_question"),
    "large bomb": (
        {"messages": message("what?", png(Image.new("1", (20_000, 20_000))))},
        400,
        "invalid_question",
    ),
    "file": ({"messages": message("what?", "file:///etc/passwd")}, 400, "invalid_image_url"),
    "path": ({"messages": message("what?", "/etc/passwd")}, 400, "invalid_image_url"),
    "no base64": ({"messages": message("what?", "data:image/png;base64,%%%")}, 400, "invalid_image_url"),
    "this machine": ({"messages": message("what?", "http://127.0.0.1/a.png")}, 400, "invalid_image_url"),
    "metadata": ({"messages": message("what?", "http://169.254.169.254/")}, 400, "invalid_image_url"),
    "large request": ({"messages": message("what?", bytes(2**21))}, 413, "request_too_large"),
    "warm": ({"temperature": 0.7}, 400, "invalid_request"),
    "two answers": ({"n": 2}, 400, "invalid_request"),
    "tools": ({"tools": []}, 400, "invalid_request"),
    "stop": ({"stop": ["."]}, 400, "invalid_request"),
    "one token as a truth": ({"max_tokens": True}, 400, "invalid_request"),
    "tokens as text": ({"max_tokens": "3"}, 400, "invalid_request"),
    "stream as text": ({"extra_body": {"stream": "yes"}}, 400, "invalid_request"),
    "no tokens": ({"max_tokens": 0}, 400, "invalid_request"),
    "too few tokens for a choice": (
        {"model": "pairs", "messages": message("both", IMAGES[0], IMAGES[1]), "max_tokens": 1},
        400,
        "max_tokens_too_small",
    ),
    "unknown": ({"extra_body": {"wings": 2}}, 400, "invalid_request"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_in_openais_form(served: Served, name: str) -> None:
    options, status, code = REFUSED[name]
    usual = {"model": "colours", "messages": message("what?", IMAGES[0])}
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.chat.completions.create(**(usual | options))
    error = caught.value
    assert (error.status_code, error.code) == (status, code), error
    assert error.type == "invalid_request_error"
    assert set(error.body) == {"message", "type", "param", "code"}
    assert str(served.root) not in error.message


def test_other_refusals(served: Served) -> None:
    wrong = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"
    # Whoever sends much hears why, too.
    assert served.send("POST", "/v1/chat/completions", bytes(10**6), token="")[0] == 401
    raw = {
        ("GET", "/v1/chat/completions", None): 405,
        ("GET", "/docs", None): 404,
        ("GET", "/openapi.json", None): 404,
        ("GET", "/litserve/info", None): 404,
        ("POST", "/v1/models", b"{}"): 405,
        ("POST", "/v1/chat/completions", b"{"): 400,
        ("POST", "/v1/chat/completions", b"[" * 100_000): 400,
        ("POST", "/v1/chat/completions", b'{"model": "\xff"}'): 400,
    }
    for (method, path, body), status in raw.items():
        found, content = served.send(method, path, body)
        assert found == status, (method, path, content)
        assert set(content["error"]) == {"message", "type", "param", "code"}
    assert served.send("GET", "/health", token="")[1] == {"status": "ok", "ready": 1, "processes": 1}
    assert served.send("HEAD", "/health", token="") == (200, "")
    assert served.send("GET", "/metrics", token="")[0] == 401
    assert served.metric('dept_vl_refusals_total{reason="invalid_api_key"}') >= 2


def test_adapters_come_and_go_while_others_are_asked(served: Served) -> None:
    late = {"source": str(served.root / "late")}
    expected = served.many.predictor("late").answer(IMAGES[3], QUESTIONS[0])
    other = served.many.predictor("short").answer(IMAGES[3], QUESTIONS[0])
    over, wrong = threading.Event(), []
    client = served.client

    def ask() -> None:
        while not over.is_set():
            found = served.ask("short", QUESTIONS[0], IMAGES[3], client=client).choices[0].message.content
            wrong.extend([found] if found != other else [])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for name in ("late", "later"):
            with pytest.raises(openai.NotFoundError):
                served.ask(name, QUESTIONS[0], IMAGES[3])
            status, card = served.send("POST", "/v1/adapters", json.dumps(late | {"name": name}).encode())
            assert (status, card["id"], card["task"]) == (201, name, "vqav2")
            assert served.ask(name, QUESTIONS[0], IMAGES[3]).choices[0].message.content == expected
            assert name in [model.id for model in client.models.list()]
            assert served.send("DELETE", f"/v1/adapters/{name}")[1]["deleted"] is True
            with pytest.raises(openai.NotFoundError):
                served.ask(name, QUESTIONS[0], IMAGES[3])
    finally:
        over.set()
        asking.join()
    assert not wrong
    bad = {
        ("POST", "/v1/adapters", b'{"source": "short", "name": "short"}'): (409, "name_taken"),
        ("POST", "/v1/adapters", b'{"source": "./nowhere"}'): (400, "invalid_adapter"),
        ("POST", "/v1/adapters", b'{"source": ""}'): (400, "invalid_request"),
        ("DELETE", "/v1/adapters/nobody", None): (404, "model_not_found"),
        ("DELETE", "/v1/adapters/tiny-clip-t5", None): (400, "not_an_adapter"),
    }
    for (method, path, body), (status, code) in bad.items():
        found, content = served.send(method, path, body)
        assert (found, content["error"]["code"]) == (status, code)
    assert served.ask("short", QUESTIONS[0], IMAGES[3]).choices[0].message.content == other


def test_who_leaves_or_sends_half_costs_nothing(served: Served) -> None:
    body = json.dumps({"model": "colours", "messages": message("what?", IMAGES[0])}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    sockets = []
    for sent in (head, head + body[:100], head + body, head[:20], b"\x16\x03\x01" * 50):
        for _ in range(5):
            sockets.append(socket.create_connection(("127.0.0.1", served.port)))
            sockets[-1].sendall(sent)
    assert served.ask("colours", "what?", IMAGES[0]).choices  # meanwhile
    for each in sockets:
        each.close()
    assert served.ask("colours", "what?", IMAGES[0]).choices
    served.until(lambda: served.metric("dept_vl_waiting") == 0)


def test_more_requests_than_there_may_be_are_told_so(served: Served) -> None:
    body = json.dumps({"model": "colours", "messages": message(QUESTIONS[0], IMAGES[0])}).encode()
    expected = served.many.predictor("colours").answer(IMAGES[0], QUESTIONS[0])
    statuses = asyncio.run(at_once(served.port, body, 400, expected))
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 200
    assert served.send("GET", "/health")[0] == 200


async def at_once(port: int, body: bytes, count: int, expected: str) -> list[int]:
    """The statuses of as many requests, sent together; answers and refusals are checked."""
    go = asyncio.Event()

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await go.wait()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        response = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        first, _, rest = response.partition(b"\r\n")
        status, content = int(first.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])
        if status == 200:
            assert content["choices"][0]["message"]["content"] == expected
        else:
            assert content["error"]["code"] == "busy"
        return status

    asking = []
    for number in range(count):
        asking.append(asyncio.create_task(one()))
        if number % 200 == 199:
            await asyncio.sleep(0.1)  # no more connections at once than the queue of the system has
    go.set()
    return await asyncio.gather(*asking)


@pytest.mark.slow
def test_ten_thousand_requests_at_once(served: Served) -> None:
    body = json.dumps({"model": "short", "messages": message(QUESTIONS[0], IMAGES[0])}).encode()
    expected = served.many.predictor("short").answer(IMAGES[0], QUESTIONS[0])
    statuses = asyncio.run(at_once(served.port, body, 10_000, expected))
    assert len(statuses) == 10_000
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 200
    assert served.ask("short", QUESTIONS[0], IMAGES[0]).choices[0].message.content == expected


def test_a_killed_model_is_started_again(served: Served) -> None:
    killed = served.model_process()
    expected = served.many.predictor("long").answer(IMAGES[1], QUESTIONS[0])
    killed.suspend()  # so that the questions are there when it dies

    def ask(_: int) -> tuple[int, str]:
        try:
            answer = served.ask("long", QUESTIONS[0], IMAGES[1])
        except openai.APIStatusError as error:
            return error.status_code, error.code
        return 200, answer.choices[0].message.content

    with ThreadPoolExecutor(8) as clients:
        answers = clients.map(ask, range(8))
        served.until(lambda: served.metric("dept_vl_waiting") == 8)
        killed.kill()
        assert set(answers) == {(503, "process_died")}
    served.until(lambda: served.send("GET", "/health")[0] == 200)
    assert ask(0) == (200, expected)
    assert served.metric("dept_vl_restarts_total") == 1
    assert served.model_process().pid != killed.pid


def test_what_was_asked_before_the_end_is_answered(served: Served) -> None:
    expected = {
        place: served.many.predictor("long").answer(IMAGES[place], QUESTIONS[2])
        for place in range(len(IMAGES))
    }
    model = served.model_process()
    client = served.client

    def ask(number: int) -> bool:
        place = number % len(IMAGES)
        answer = served.ask("long", QUESTIONS[2], IMAGES[place], client=client)
        return bool(answer.choices[0].message.content == expected[place])

    model.suspend()
    with ThreadPoolExecutor(48) as clients:
        answers = clients.map(ask, range(48))
        served.until(lambda: served.metric("dept_vl_waiting") == 48)
        # To all processes, as systemd sends it.
        everyone = [served.process.pid, *(c.pid for c in psutil.Process(served.process.pid).children(True))]
        for pid in everyone:
            os.kill(pid, signal.SIGTERM)
        served.until(served.refuses_connections)  # while it answers, so that others are asked instead
        model.resume()
        assert all(answers)
    assert served.process.wait(PATIENCE) == 0
    served.until(lambda: not any(map(psutil.pid_exists, everyone)))
