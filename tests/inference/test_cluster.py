"""The server under Ray Serve: answers as a predictor's own, refusals in OpenAI's form."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from runs import two_adapters

from dept_vl._utils.errors import UsageError
from dept_vl.inference.options import ServeConfig

openai = pytest.importorskip("openai")
ray = pytest.importorskip("ray")
PATIENCE = 180


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where Ray listens, on this machine alone."""
    from ray import serve

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": number}, logging_config={"log_level": "ERROR"})
    yield number
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
def test_a_cluster_answers_as_a_predictor(
    pretrained_folder: Callable[[str], Path], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve
    from serving import IMAGES, QUESTIONS, message

    from dept_vl.inference.cluster import deployment

    sources, many = two_adapters(pretrained_folder("blip2"), tmp_path)
    monkeypatch.setenv("DEPT_VL_TOKEN", "word")
    config = ServeConfig(tuple(sources.values()), device="cpu", max_wait_ms=100.0)
    serve.run(deployment(config), route_prefix="/")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="word", max_retries=0, timeout=PATIENCE
    )
    assert [model.id for model in client.models.list()] == ["short", "long", "blip2"]
    rows = [(name, place) for name in (*sources, "blip2") for place in range(4)]

    def ask(row: tuple[str, int]) -> str:
        asked = client.chat.completions.create(model=row[0], messages=message(QUESTIONS[0], IMAGES[row[1]]))
        return str(asked.choices[0].message.content)

    with ThreadPoolExecutor(len(rows)) as clients:
        answers = list(clients.map(ask, rows))
    assert answers == [
        many.predictor(None if name == "blip2" else name).answer(IMAGES[place], QUESTIONS[0])
        for name, place in rows
    ]
    assert len(set(answers)) > 3
    refused: dict[str, Any] = {"model": "nobody", "messages": message("what?", IMAGES[0])}
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**refused)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**(refused | {"model": "short", "messages": message("what?", b"no")}))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="guess").models.list()


def test_adapters_of_a_cluster_stay_as_they_are() -> None:
    from dept_vl.inference.cluster import deployment

    with pytest.raises(UsageError, match="allow_adapter_changes"):
        deployment(ServeConfig(("a",), allow_adapter_changes=True))
