"""A server in a process of its own, and how its tests ask it."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import random_image
from PIL import Image

from dept_vl.inference.mixed import ManyAdapters

openai = pytest.importorskip("openai")

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
