"""The server: answers as a predictor's own, refusals in OpenAI's form, what clients and accidents do to it.

One server for this file; the last test ends it.
"""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import random_image
from pages import many_of
from PIL import Image
from runs import two_adapters

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.inference import chat
from dept_vl.inference.gate import Refused
from dept_vl.inference.mixed import ManyAdapters, load_many
from dept_vl.inference.options import ServeConfig
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from scripts import bench_serve

openai = pytest.importorskip("openai")
pytest.importorskip("litserve")

ROOT = Path(__file__).parents[2]
BACKBONE = ROOT / "data" / "tiny-clip-t5"
TOKEN = "a-word-that-few-know"
PATIENCE = 120
QUESTIONS = ("what color is the shape?", "is there a circle?", "how many shapes are there in the image?")


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


SHAPES = [path.read_bytes() for path in sorted((ROOT / "data" / "samples" / "images").glob("*.png"))]
IMAGES = [*SHAPES[:3], png(random_image((70, 40), 1)), png(random_image((33, 64), 2))]


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def message(question: str, *images: bytes | str) -> list[dict[str, Any]]:
    """A user's message with images, as content or by address."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": question}, *parts]}]


@dataclass
class Served:
    """A running server, and the same adapters here."""

    process: "subprocess.Popen[str]"
    port: int
    many: ManyAdapters
    root: Path

    @property
    def client(self) -> Any:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=TOKEN, max_retries=0, timeout=PATIENCE
        )

    def ask(self, model: str, question: str, *images: bytes | str, client: Any = None, **options: Any) -> Any:
        return (client or self.client).chat.completions.create(
            model=model, messages=message(question, *images), **options
        )

    def send(
        self, method: str, path: str, body: bytes | None = None, token: str = TOKEN, **headers: str
    ) -> tuple[int, Any]:
        """Status and body of a raw request; JSON unless it is text."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"} | headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        text = response.getheader("content-type", "").startswith("text/")
        return response.status, content.decode() if text or not content else json.loads(content)

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.send("GET", "/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end
            time.sleep(0.05)

    def refuses_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE).close()
        except ConnectionError:
            return True
        return False

    def model_process(self) -> psutil.Process:
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if any("multiprocessing.spawn" in part for part in child.cmdline())
        ]
        return found


def start(root: Path, sources: list[str], *flags: str) -> tuple["subprocess.Popen[str]", int]:
    """The server's process and port, once it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dept_vl", "serve", "--adapters", *sources, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=(root / "stderr.txt").open("w"),
        text=True,
        cwd=ROOT,
        env=os.environ | {"DEPT_VL_TOKEN": TOKEN},
    )
    assert process.stdout is not None
    found = re.search(r"at http://127.0.0.1:(\d+)", process.stdout.readline())
    assert found is not None, (root / "stderr.txt").read_text()
    return process, int(found[1])


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


BOMB = b"\x89PNG\r\n\x1a\n"


def refused(body: dict[str, Any] | bytes) -> tuple[str, str]:
    """The place and the message of a body that is refused."""
    usual = {"model": "a", "messages": [{"role": "user", "content": "what?"}]}
    with pytest.raises(Refused) as caught:
        chat.read(chat.ChatRequest, body if isinstance(body, bytes) else json.dumps(usual | body).encode())
    assert caught.value.status == 400
    return caught.value.param or "", str(caught.value)


def of_parts(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


TEXT = {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    ("body", "param", "expected"),
    [
        (of_parts(TEXT, {"type": "image_url", "image_url": "http://x"}), "[1].image_url", '{"url": '),
        (of_parts(TEXT, {"type": "image_url", "image_url": {"url": 5}}), "[1].image_url.url", "string"),
        (of_parts(TEXT, {"type": "audio"}), "[1]", '{"type": "text", "text": ...} or {"type": "image_url"'),
        (of_parts("what?"), "[0]", '{"type": "text", "text": ...}'),
        (of_parts(TEXT, {**TEXT, "more": 1}), "[1].more", "not supported"),
        ({"messages": [{"role": "user", "content": 5}]}, "", "text, or a list of parts"),
    ],
)
def test_a_wrong_part_of_a_message_is_named(body: dict[str, Any], param: str, expected: str) -> None:
    place, text = refused(body)
    assert place == f"messages[0].content{param}"
    assert text.startswith(f"{place}: ")
    assert expected in text


@pytest.mark.parametrize(
    "body",
    [
        *({"stop": ["e"]}, {"stop": "e"}, {"logprobs": True}, {"response_format": {"type": "json_object"}}),
        *({"max_tokens": True}, {"max_tokens": "3"}, {"max_tokens": 2.5}, {"stream": "yes"}, {"stream": 1}),
        *({"n": True}, {"temperature": "0"}, {"seed": "1"}, {"stream_options": {"include_usage": 1}}),
    ],
)
def test_an_option_of_another_kind_is_refused(body: dict[str, Any]) -> None:
    assert refused(body)[0].split(".")[0] == next(iter(body))
    if {"stop", "logprobs", "response_format"} & body.keys():
        assert refused(body)[1].endswith("this is not supported: leave it out")


def test_a_key_twice_in_a_body_is_refused() -> None:
    assert "the key 'model' stands twice" in refused(b'{"model": "a", "model": "b", "messages": []}')[1]
    assert "nested too deeply" in refused(b"[" * 5_000)[1]


def test_a_body_of_more_values_than_a_question_has_is_refused_unread() -> None:
    parts = b",".join([b"{}"] * 20_000)
    for body in (b'{"messages":[%s]}' % parts, b'{"a":' * 20_000, b'{"metadata":{%s}}' % parts):
        assert "10,000" in refused(body)[1]


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


# Without that server


@pytest.mark.parametrize("family", [pytest.param("blip2", marks=pytest.mark.slow), "llava"])
def test_pretrained_models_are_served_and_all_ends_with_the_server(
    family: str, pretrained_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    sources, many = two_adapters(pretrained_folder(family), tmp_path)
    process, port = start(tmp_path, list(sources.values()), "--max_wait_ms", "200")
    served = Served(process, port, many, tmp_path)
    try:
        rows = [(name, place) for name in (*sources, family) for place in range(3)]

        def ask(row: tuple[str, int]) -> str:
            return str(served.ask(row[0], QUESTIONS[0], IMAGES[row[1]]).choices[0].message.content)

        with ThreadPoolExecutor(9) as clients:
            answers = list(clients.map(ask, rows))
        assert answers == [
            many.predictor(None if name == family else name).answer(IMAGES[place], QUESTIONS[0])
            for name, place in rows
        ]
        assert len(set(answers)) > 3
        assert served.metric("dept_vl_batch_size_count") < len(rows)
        with pytest.raises(openai.BadRequestError):
            served.ask("short", QUESTIONS[0], b"no picture")
        children = psutil.Process(process.pid).children(True)
        assert len(children) > 1  # the model, and LitServe's queue
    finally:
        process.kill()
    served.until(lambda: not any(map(psutil.pid_exists, (child.pid for child in children))))


@pytest.mark.slow
def test_the_load_test_compares_answers(tmp_path: Path) -> None:
    config = bench_serve.BenchConfig(
        adapters=2, requests=16, rounds=1, mixed=40, json_out=tmp_path / "serve.json"
    )
    figures = bench_serve.main(config)
    assert (figures.lost, figures.swapped, figures.compared) == (0, 0, 40)
    content = json.loads((tmp_path / "serve.json").read_text())
    assert content["met"]["no answer lost or swapped"] is True
    # Two ways, three numbers of clients, one adapter or both; and both with a server each.
    assert len(content["loads"]) == 2 * 3 * 2 + 1


def test_only_addresses_of_the_internet_are_public() -> None:
    from dept_vl.inference.chat import is_public

    assert all(map(is_public, ("8.8.8.8", "1.1.1.1", "2606:4700::1111")))
    inside = [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
    ]
    inside += ["224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1"]
    inside += ["192.0.0.192", "fec0::1", "3fff::1"]
    inside += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1"]
    assert not any(map(is_public, inside))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "u@8.8.8.8"],
)
def test_nothing_is_fetched_from_this_machine(host: str) -> None:
    from dept_vl.inference.chat import fetch

    with pytest.raises(ValueError, match=r"not fetched|no server"):
        asyncio.run(fetch(f"http://{host}/"))


def test_what_is_fetched_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "/image")
            self.end_headers()
            self.wfile.write(IMAGES[0] if self.path != "/large" else bytes(3000))

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(chat, "MOST_UPLOADED", 2000)
    with HTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            address = f"http://127.0.0.1:{web.server_port}"
            monkeypatch.setattr(chat, "is_public", lambda _: True)
            with pytest.raises(ValueError, match="ports of http"):
                asyncio.run(chat.fetch(f"{address}/image"))
            monkeypatch.setitem(chat.PORTS, "http", web.server_port)
            assert asyncio.run(chat.fetch(f"{address}/image")) == IMAGES[0]
            odd = (("/\x01", "InvalidURL"), (f"/{'a' * 70_000}", "InvalidURL"))
            for path, problem in (("/away", "302"), ("/large", "2,000 bytes"), *odd):
                with pytest.raises(ValueError, match=problem):
                    asyncio.run(chat.fetch(address + path))
        finally:
            web.shutdown()
            thread.join()
    with pytest.raises(Refused):
        asyncio.run(chat.image_bytes("http://8.8.8.8/a.png", allow_urls=False, param="messages"))


def test_a_bad_question_costs_nobody_else_an_answer(
    make_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dept_vl.inference import predictor
    from dept_vl.inference.replica import Question, Replica

    many = many_of(make_backbone("t5"), tmp_path)
    replica = Replica("", None, max_batch_size=4, max_wait=0.0, spec=None)
    replica.many, replica.base_task = many, many.predictor(None).task
    replica.shared = {"adapters": {name: str(tmp_path / name) for name in ("colours", "captions")}}
    content = IMAGES[0]
    asks = [
        Question("colours", "", "what?", (content,)),
        Question("colours", "", "what?", (b"no image",)),
        Question("gone", str(tmp_path / "gone"), "what?", (content,)),
        Question("captions", "", "", (content,)),
        Question("colours", "", "fails", (content,)),
        Question("colours", "", "half a pair: \ud800", (content,)),
        Question("colours", "", "cannot be read", (content,)),
    ]
    real, real_source = predictor.answer_all, predictor.Ask.source

    def answer_all(asked: Any, *others: Any) -> Any:
        if any(ask.question == "fails" for ask in asked):
            raise RuntimeError("out of memory")
        return real(asked, *others)

    def source(ask: Any) -> str:
        if ask.question == "cannot be read":
            raise TypeError("a fault of a tokenizer")
        return real_source(ask)

    monkeypatch.setattr(predictor, "answer_all", answer_all)
    monkeypatch.setattr(predictor.Ask, "source", source)
    outcomes = replica.predict(asks)
    assert outcomes[0]["text"] == many.answer(content, "what?", adapters="colours")
    assert outcomes[3]["text"] == many.answer(content, adapters="captions")
    statuses = [outcome.get("status") for outcome in outcomes]
    assert statuses == [None, 400, 400, None, 500, 400, 500]
    assert "pairs" not in replica.many.predictors  # which is no longer wanted


def test_requests_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from dept_vl.inference import endpoints

    monkeypatch.setattr(endpoints, "MOST_STORED", 100)
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    gate = endpoints.ServerGate(app, config=ServeConfig(("a",)), token=None, metrics=endpoints.Metrics())

    async def ask() -> None:
        headers = [(b"content-length", b"40")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        await asyncio.gather(*(gate(dict(scope), receive, send) for _ in range(4)))

    for _ in range(2):  # what is answered is held no longer
        asyncio.run(ask())
    assert sorted(statuses) == [200] * 4 + [429] * 4


def test_a_wrong_token_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from dept_vl.inference import endpoints

    monkeypatch.setattr(endpoints, "MOST_STORED", 100)
    statuses: dict[str, list[int]] = {"right": [], "wrong": []}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    config = ServeConfig(("a",), max_requests=2)
    gate = endpoints.ServerGate(app, config=config, token="right", metrics=endpoints.Metrics())

    async def ask(token: str) -> None:
        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses[token].append(message["status"])

        headers = [(b"content-length", b"90"), (b"authorization", f"Bearer {token}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        await gate(scope, receive, send)

    async def both() -> None:
        guesses = [asyncio.create_task(ask("wrong")) for _ in range(3)]
        await asyncio.sleep(0)
        await ask("right")
        await asyncio.gather(*guesses)

    asyncio.run(both())
    assert statuses == {"right": [200], "wrong": [401, 401, 401]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_server_on_a_device_that_is_not_here_is_refused() -> None:
    from dept_vl.inference.server import build

    with pytest.raises(UsageError):
        build(ServeConfig(("a",), device="cuda"), None)


def test_where_others_reach_the_server_there_is_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dept_vl.inference.server import find_token

    monkeypatch.delenv("DEPT_VL_TOKEN", raising=False)
    assert find_token(ServeConfig(("a",))) is None
    made_up = find_token(ServeConfig(("a",), host="0.0.0.0"))
    assert made_up is not None
    assert made_up in capsys.readouterr().err
    monkeypatch.setenv("DEPT_VL_TOKEN", "word")
    assert find_token(ServeConfig(("a",), host="0.0.0.0")) == "word"
    file = tmp_path / "token"
    file.write_text("other\n")
    assert find_token(ServeConfig(("a",), token_file=file)) == "other"
    file.write_bytes("\ufeffother\r\n".encode())  # as Windows' editors write it
    assert find_token(ServeConfig(("a",), token_file=file)) == "other"
    for content in (b"\n", b"two\nlines\n", b"two words", b"\xff\xfe\0", "w\u00f6rd".encode()):
        file.write_bytes(content)
        with pytest.raises(UsageError) as refused:
            find_token(ServeConfig(("a",), token_file=file))
        assert "w\u00f6rd" not in str(refused.value)
    monkeypatch.setenv("DEPT_VL_TOKEN", "word\n")  # as secrets in the environment are
    assert find_token(ServeConfig(("a",))) == "word"
    monkeypatch.setenv("DEPT_VL_TOKEN", "")
    with pytest.raises(UsageError):
        find_token(ServeConfig(("a",)))


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "127.0.0.1:80", "http://127.0.0.1"])
def test_a_host_that_is_no_address_is_told(host: str) -> None:
    from dept_vl.inference.server import bound

    with pytest.raises(OSError, match=re.escape(host)) as refused:
        bound(host, 0)
    assert "Unknown error" not in str(refused.value)
