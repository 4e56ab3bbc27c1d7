"""Middleware in front of the demo page and the server: checks password, path, size and number of requests.

Gradio has many more endpoints than the page uses, and trusts the content of requests. `PageGate` therefore
allows only the paths of the page, and keeps only texts and names of uploads of a question.
"""

import asyncio
import base64
import binascii
import ipaddress
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_UPLOADED = 20 * 2**20
"""Maximum size of an image, in bytes."""
MOST_STORED = 2**30
"""Maximum total size of stored uploads, in bytes."""
MOST_ASKED = 2**16
"""Maximum size of a question with the names of its uploads, in bytes."""
MOST_OPEN = 256
"""Maximum number of open requests; every open page holds one."""
LONGEST_REQUEST = 120.0
"""Maximum number of seconds for a request and its response, except for event streams."""
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
    """ASGI middleware that rejects requests. Subclasses decide which.

    At most `most_open` requests are open at a time, and each may take `longest` seconds.
    """

    when_busy = 503
    """HTTP status of requests that exceed `most_open`."""

    def __init__(
        self, app: App, *, password: str | None, most_open: int = MOST_OPEN, longest: float = LONGEST_REQUEST
    ) -> None:
        self.app, self.password = app, password
        self.most_open, self.longest = most_open, longest
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or reject it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        else:
            await self._in_time(scope, _Body(receive), send)

    async def _in_time(self, scope: Scope, body: "_Body", send: Send) -> None:
        answer = _Answer(send)
        counted = False
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
                    while body.coming:
                        await body()
            await self.refuse(send, refused)
        except TimeoutError:
            if answer.begun:
                raise
            await self.refuse(send, Refused(408, "this took too long", code="timeout"))
        finally:
            self.open -= counted

    @abstractmethod
    async def admit(self, scope: Scope) -> None:
        """Check the password; until then a request does not count as open.

        Raises:
            Refused: If it is wrong.
        """

    @abstractmethod
    async def passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Return the request to pass on, possibly modified.

        Raises:
            Refused: If the request is rejected.
        """

    @abstractmethod
    async def refuse(self, send: Send, refused: Refused) -> None:
        """Send the response to a rejected request."""

    def counts(self, scope: Scope) -> bool:
        """Return whether a request counts towards the limit of open requests."""
        return True

    def is_stream(self, scope: Scope) -> bool:
        """Return whether the response is an event stream, which has no time limit."""
        return False

    async def knows(self, word: bytes) -> bool:
        """Return whether a word is the password; for a wrong one, after a delay."""
        if self.password is None or secrets.compare_digest(word, self.password.encode()):
            return True
        await asyncio.sleep(AFTER_WRONG_PASSWORD)
        return False


class PageGate(Gate):
    """Gate of the demo page. It checks the password by HTTP Basic, and ignores the user name."""

    def __init__(self, app: App, *, folder: Path, password: str | None) -> None:
        super().__init__(app, password=password)
        self.folder = folder

    def is_stream(self, scope: Scope) -> bool:
        """See `Gate.is_stream`."""
        return STREAMS.fullmatch(scope["path"]) is not None

    async def admit(self, scope: Scope) -> None:
        """See `Gate.admit`."""
        # Gradio itself requests this path when it starts; it reveals nothing.
        if scope["path"] != READY and not await self._knows_password(headers_of(scope)):
            raise Refused(401, "a password is needed")

    async def passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """See `Gate.passed`."""
        path, method = scope["path"], scope["method"]
        headers = headers_of(scope)
        allowed = {"GET": (READ, STREAMS), "HEAD": (READ,), "POST": (SENT,)}.get(method, ())
        known = any(pattern.fullmatch(path) for pattern in allowed) and ".." not in path
        if not known or (path.startswith(FILE) and upload_at(path[len(FILE) :], self.folder) is None):
            raise Refused(404, "there is nothing here")
        if method == "POST":
            check_size(headers, MOST_UPLOADED + MOST_ASKED if path == UPLOAD else MOST_ASKED)
            if path == UPLOAD and await asyncio.to_thread(stored, self.folder) > MOST_STORED:
                raise Refused(503, "no room for uploads: try again in an hour")
        if path != ASK:
            return scope, receive
        try:
            return _with_body(scope, cleaned(await read_body(receive)))
        except (ValueError, RecursionError):
            raise Refused(400, "this is no question of the page") from None

    async def refuse(self, send: Send, refused: Refused) -> None:
        """Send an error response in FastAPI's format, which the page shows."""
        basic = {b"www-authenticate": b'Basic realm="dept_vl", charset="UTF-8"'}
        await send_json(
            send, refused.status, {"detail": str(refused)}, basic if refused.status == 401 else {}
        )

    async def _knows_password(self, headers: MutableMapping[bytes, bytes]) -> bool:
        if self.password is None:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"basic":
            return False
        try:
            _, _, word = base64.b64decode(given.strip()).partition(b":")
        except binascii.Error:
            word = b""
        return await self.knows(word)


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """Return the headers of a request, with lower-case names."""
    return {name.lower(): value for name, value in scope["headers"]}


def length_of(headers: MutableMapping[bytes, bytes]) -> int | None:
    """Return the Content-Length of a request, or None without one. Of a longer number, 20 digits are read."""
    digits = headers.get(b"content-length", b"")
    return int(digits.lstrip(b"0")[:20] or b"0") if digits.isdigit() else None


def check_size(headers: MutableMapping[bytes, bytes], most: int) -> None:
    """Check the Content-Length of a request.

    Raises:
        Refused: If it is missing or larger than `most`.
    """
    length = length_of(headers)
    if length is None or b"transfer-encoding" in headers:
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
    a request names.

    Raises:
        ValueError: If the body is not a question.
        RecursionError: If the JSON is nested too deeply.
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


class _Body:
    """Wrapper of `receive` that records whether more of the body is to come."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.coming = receive, True

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        self.coming = self.coming and bool(message.get("more_body"))
        return message


class _Answer:
    """Wrapper of `send` that records whether the response has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        self.begun = True
        await self.send(message)


async def send_json(
    send: Send, status: int, content: dict[str, Any], headers: MutableMapping[bytes, bytes]
) -> None:
    """Send a JSON response."""
    body = json.dumps(content).encode()
    usual = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*usual, *headers.items()]})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive) -> bytes:
    """Read the body of a request.

    Raises:
        ValueError: If the connection is closed before the end of the body.
    """
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ValueError("the visitor has gone")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _with_body(scope: Scope, body: bytes) -> tuple[Scope, Receive]:
    """Return a request with another body."""
    length = (b"content-length", str(len(body)).encode())
    replaced = (b"content-length", b"content-type")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return {**scope, "headers": [*headers, length, (b"content-type", b"application/json")]}, again
