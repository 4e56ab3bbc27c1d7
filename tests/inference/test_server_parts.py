"""The server in parts: how a question is read, what is fetched, and how many may ask."""

import asyncio
import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pages import many_of
from runs import two_adapters
from serving import IMAGES, QUESTIONS, Served, openai, start

from dept_vl._utils.errors import UsageError
from dept_vl.inference import chat
from dept_vl.inference.gate import Refused
from dept_vl.inference.options import ServeConfig
from dept_vl.models.backbone import Backbone
from scripts import bench_serve

pytest.importorskip("litserve")


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
        asyncio.run(chat.image_bytes("http://8.8.8.8/a.png", allow_urls=False))


def test_a_bad_question_costs_nobody_else_an_answer(
    make_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dept_vl.inference import predictor
    from dept_vl.inference.replica import Question, Replica

    many = many_of(make_backbone("t5"), tmp_path)
    replica = Replica(ServeConfig(("a",)), None)
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
    assert statuses == [None, 400, 503, None, 500, 400, 500]
    assert str(tmp_path) not in outcomes[2]["error"]
    assert "pairs" not in replica.many.predictors  # which is no longer wanted


def test_all_model_processes_answer_with_one_content(
    make_backbone: Callable[..., Backbone], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dept_vl.inference.replica import Question, Replica

    many = many_of(make_backbone("t5"), tmp_path)
    new, shared = tmp_path / "new", {"adapters": {"1": str(tmp_path / "new")}}
    shutil.copytree(tmp_path / "colours", new)

    def process() -> Replica:
        replica = Replica(ServeConfig(("a",)), None)
        replica.many, replica.base_task, replica.shared = many, many.predictor(None).task, shared
        return replica

    first, asked = process(), [Question("1", str(new), "what?", (IMAGES[0],))]
    expected = many.answer(IMAGES[0], "what?", adapters="colours")
    assert first.predict(asked)[0]["text"] == expected
    assert process().predict(asked)[0]["text"] == expected
    shutil.rmtree(new)
    shutil.copytree(tmp_path / "captions", new)
    late = process()
    for _ in range(2):
        outcome = late.predict(asked)[0]
        assert (outcome["status"], outcome["code"]) == (503, "adapter_changed")
    assert capsys.readouterr().err.count(str(new)) == 1
    assert first.predict(asked)[0]["text"] == expected


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


def test_the_second_server_on_a_port_names_it() -> None:
    from dept_vl.inference.server import bound, listen

    host = "127.0.0.1"
    with bound(host, 0) as first:
        port = first.getsockname()[1]
        with bound(host, port) as second:  # while both load their models
            listen(first, host, port)
            with pytest.raises(OSError, match=f"{host}:{port}"):
                listen(second, host, port)
