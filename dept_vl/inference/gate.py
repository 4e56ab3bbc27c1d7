"""Middleware in front of the demo page and the server: checks password, path, size and number of requests.

Gradio has many more endpoints than the page uses, and trusts the content of requests. `PageGate` therefore
allows only the paths of the page, and keeps only texts and names of uploads of a question.
"""

import asyncio
import base64
import ipaddress
import json
import re
import secrets
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_UPLOADED = 20 * 2**20
"""Maximum size of an image, in bytes."""
MOST_STORED = 2**30
"""Maximum total size of stored uploads, in bytes."""
MOST_ASKED = 2**16
"""Maximum size of a question with the names of its uploads, in bytes."""
AFTER_WRONG_PASSWORD = 1.0
"""Delay after a wrong password, in seconds, against guessing."""

API = "/gradio_api"
ASK, UPLOAD, FILE, READY = f"{API}/queue/join", f"{API}/upload", f"{API}/file=", f"{API}/startup-events"
READ = re.compile(
    rf"/|/config|/favicon\.ico|/manifest\.json|/pwa_icon(/\d+)?|/robots\.txt|(?:{API})?/theme\.css"
    rf"|/(?:assets|static|svelte)/[\w./@+-]+|{READY}|{FILE}.+"
)
STREAMS = re.compile(rf"{API}/(?:queue/data|upload_progress|heartbeat/\w+)")
SENT = re.compile(rf"{ASK}|{UPLOAD}|{API}/(?:cancel|reset)")
CALLS = range(3)
"""Numbers of the functions of the page, which a question names: ask (by button and by Enter) and looks."""
KEPT_OF_QUESTION = ("data", "fn_index", "trigger_id", "session_hash")


class Refused(Exception):
    """A rejected request.

    `code` is a machine-readable reason, and `param` names the part of the request that is wrong.
    """

    def __init__(self, status: int, text: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(text)
        self.status, self.code, self.param = status, code, param


class Gate(ABC):
    """ASGI middleware that rejects requests. Subclasses decide which."""

    most_open = 256
    """Maximum number of open requests; every open page holds one."""
    when_busy = 503
    """HTTP status of requests that exceed `most_open`."""
    longest = 120.0
    """Maximum number of seconds for a request and its response, except for event streams."""

    def __init__(self, app: ASGIApp, *, password: str | None) -> None:
        self.app, self.password = app, password
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or reject it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        else:
            await self._in_time(scope, receive, send)

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        coming, begun, counted = True, False, False

        async def body() -> Message:
            """Record whether more of the body is to come."""
            nonlocal coming
            message = await receive()
            coming = coming and bool(message.get("more_body"))
            return message

        async def answer(message: Message) -> None:
            """Record that the response has begun."""
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(None if self.is_stream(scope) else self.longest):
                await self.admit(scope)
                if self.counts(scope):
                    if self.open >= self.most_open:
                        raise Refused(self.when_busy, "busy: try again in a while", code="busy")
                    counted = True
                    self.open += 1
                await self.app(*await self.passed(scope, body), answer)
        except Refused as refused:
            # Read the rest of the body, or the client would lose the connection before it gets the response.
            with suppress(TimeoutError):
                async with asyncio.timeout(self.longest):
                    while coming:
                        await body()
            await self.refusal(refused)(scope, body, send)
        except TimeoutError:
            if begun:
                raise
            response = self.refusal(Refused(408, "this took too long", code="timeout"))
            await response(scope, body, send)
        finally:
            self.open -= counted

    @abstractmethod
    async def admit(self, scope: Scope) -> None:
        """Raise Refused if the password is wrong; until then a request does not count as open."""

    @abstractmethod
    async def passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Return the request to pass on, possibly modified; raise Refused to reject it."""

    @abstractmethod
    def refusal(self, refused: Refused) -> Response:
        """Return the response to a rejected request."""

    def counts(self, scope: Scope) -> bool:
        """Return whether a request counts towards the limit of open requests."""
        return True

    def is_stream(self, scope: Scope) -> bool:
        """Return whether the response is an event stream, which has no time limit."""
        return False

    async def knows(self, word: bytes) -> bool:
        """Return whether a word is the password; for a wrong one, after a delay, and at once for none."""
        if self.password is None or secrets.compare_digest(word, self.password.encode()):
            return True
        if word:
            await asyncio.sleep(AFTER_WRONG_PASSWORD)
        return False


class PageGate(Gate):
    """Gate of the demo page. It checks the password by HTTP Basic, and ignores the user name."""

    def __init__(self, app: ASGIApp, *, folder: Path, password: str | None) -> None:
        super().__init__(app, password=password)
        self.folder = folder

    def is_stream(self, scope: Scope) -> bool:
        """See `Gate.is_stream`."""
        return STREAMS.fullmatch(scope["path"]) is not None

    async def admit(self, scope: Scope) -> None:
        """See `Gate.admit`."""
        if scope["path"] == READY:  # Gradio itself requests this when it starts; it reveals nothing
            return
        try:
            _, _, word = base64.b64decode(credentials(scope, "basic")).partition(b":")
        except ValueError:
            word = b""
        if not await self.knows(word):
            raise Refused(401, "a password is needed")

    async def passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """See `Gate.passed`."""
        path, method = scope["path"], scope["method"]
        allowed = {"GET": (READ, STREAMS), "HEAD": (READ,), "POST": (SENT,)}.get(method, ())
        known = any(pattern.fullmatch(path) for pattern in allowed) and ".." not in path
        if not known or (path.startswith(FILE) and upload_at(path[len(FILE) :], self.folder) is None):
            raise Refused(404, "there is nothing here")
        if method == "POST":
            check_size(Headers(scope=scope), MOST_UPLOADED + MOST_ASKED if path == UPLOAD else MOST_ASKED)
            if path == UPLOAD and await asyncio.to_thread(stored, self.folder) > MOST_STORED:
                raise Refused(503, "no room for uploads: try again in an hour")
        if path != ASK:
            return scope, receive
        try:
            return _with_body(scope, cleaned(await Request(scope, receive).body()))
        except (ValueError, RecursionError, ClientDisconnect):
            raise Refused(400, "this is no question of the page") from None

    def refusal(self, refused: Refused) -> Response:
        """Return an error response in FastAPI's format, which the page shows."""
        basic = {"www-authenticate": 'Basic realm="dept_vl", charset="UTF-8"'}
        content = {"detail": str(refused)}
        return JSONResponse(content, refused.status, basic if refused.status == 401 else None)


def credentials(scope: Scope, kind: str) -> str:
    """Return what a request sends as its credentials of a kind, such as `basic`; empty if nothing."""
    found, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    return given.strip() if found.lower() == kind else ""


def length_of(headers: Headers) -> int | None:
    """Return the Content-Length of a request, or None without one. Of a longer number, 20 digits are read."""
    digits = headers.get("content-length", "")
    return int(digits.lstrip("0")[:20] or "0") if digits.isdecimal() else None


def check_size(headers: Headers, most: int) -> None:
    """Raise Refused if the Content-Length of a request is missing or larger than `most`."""
    length = length_of(headers)
    if length is None or "transfer-encoding" in headers:
        raise Refused(411, "the length has to be said", code="length_required")
    if length > most:
        raise Refused(413, f"at most {most:,} bytes are taken", code="request_too_large")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def upload_at(path: str, folder: Path) -> Path | None:
    """Return the resolved path of a file if it is inside the folder of uploads, otherwise None."""
    try:
        found = Path(path).resolve(strict=True)
        inside = Path(path).is_absolute() and found.is_relative_to(folder.resolve()) and found.is_file()
    # The file does not exist, or its name is too long, has a zero byte or is a cycle of links.
    except (OSError, ValueError, RuntimeError):
        return None
    return found if inside else None


def cleaned(body: bytes) -> bytes:
    """Return the body of a question with only its texts, and the path and original name of its uploads.

    Without the field `meta`, Gradio does not treat the latter as files, so it fetches or copies nothing that
    a request names. Raise ValueError if the body is not a question, or RecursionError.
    """
    asked = json.loads(body)
    if not isinstance(asked, dict) or not isinstance(asked.get("data"), list):
        raise ValueError("expected an object with data")
    if type(asked.get("fn_index")) is not int or asked["fn_index"] not in CALLS:
        raise ValueError("expected a function of the page")
    kept = {name: asked[name] for name in KEPT_OF_QUESTION if name in asked}
    return json.dumps(kept | {"data": [_plain(value) for value in asked["data"]]}).encode()


def _plain(value: Any) -> str | dict[str, str] | None:
    if isinstance(value, dict):
        texts = {name: value.get(name) for name in ("path", "orig_name")}
        upload = {name: text for name, text in texts.items() if isinstance(text, str)}
        return upload if "path" in upload else None
    return value if isinstance(value, str) else None


def stored(folder: Path) -> int:
    """Return the total size of all files in a folder and its subfolders, in bytes."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            total += path.lstat().st_size
    return total


def _with_body(scope: Scope, body: bytes) -> tuple[Scope, Receive]:
    """Return a request with another body."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers.update({"content-length": str(len(body)), "content-type": "application/json"})
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return {**scope, "headers": headers.raw}, again
