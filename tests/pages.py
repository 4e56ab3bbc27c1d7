"""The demo's page for tests: adapters with random weights, and a visitor who speaks HTTP."""

import base64
import json
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import torch

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.loading import load
from dept_vl.inference.mixed import ManyAdapters
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

TASKS = {"colours": "vqav2", "pairs": "nlvr2", "captions": "coco"}
PATIENCE = 60
"""Seconds for what takes a fraction of one, on a machine with other work."""


def many_of(backbone: Backbone, folder: Path) -> ManyAdapters:
    """An adapter of each kind of task, with the answers of random weights."""
    predictors = {}
    for name, task in TASKS.items():
        own = backbone.with_projection(backbone.visual_projection)
        prompt = DePT(own.d_model, prompt_length=3, rank=2, max_source_length=12)
        for parameter in prompt.parameters():
            torch.nn.init.normal_(parameter)
        Adapter.of(PromptedModel(own, prompt), task=task, metrics={"overall": 61.5}).save(folder / name)
        predictors[name] = load(folder / name, backbone=backbone)
    return ManyAdapters(backbone, predictors)


class Visitor:
    """Sends what it wants to a page."""

    def __init__(self, address: str, password: str | None = None) -> None:
        self.address, self.headers = address, {}
        if password is not None:
            word = base64.b64encode(f"anyone:{password}".encode()).decode()
            self.headers["Authorization"] = f"Basic {word}"

    def send(
        self, path: str, content: bytes | None = None, kind: str = "application/json", method: str = ""
    ) -> tuple[int, bytes]:
        """Status and body of a response."""
        request = urllib.request.Request(
            self.address + path,
            content,
            {"Content-Type": kind} | self.headers,
            method=method or ("GET" if content is None else "POST"),
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def status(self, path: str) -> int:
        """Status of a response."""
        return self.send(path)[0]

    def upload(self, content: bytes) -> str:
        """Upload a file; its path on the server."""
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        kind = "multipart/form-data; boundary=x"
        (path,) = json.loads(self.send("gradio_api/upload", form + content + b"\r\n--x--", kind)[1])
        return str(path)

    def ask(self, image: Any, question: Any, **more: Any) -> tuple[Any, str]:
        """Answer and problem, with the own name of the upload in it left as it is; or the status and ''."""
        session = uuid.uuid4().hex
        asked = {"data": ["colours", question, image, None], "fn_index": 0, "session_hash": session} | more
        status, body = self.send("gradio_api/queue/join", json.dumps(asked).encode())
        if status != 200:
            return status, body.decode()
        _, events = self.send(f"gradio_api/queue/data?session_hash={session}")
        lines = [json.loads(line[5:]) for line in events.splitlines() if line.startswith(b"data:")]
        done = next(event for event in lines if event["msg"] == "process_completed")
        if not done["success"]:
            return None, json.dumps(done["output"])
        answer, problem = done["output"]["data"]
        return answer, str(problem.get("value", "")) if problem.get("visible") else ""
