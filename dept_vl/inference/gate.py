"""What stands in front of the page and of the server: who may send which requests, how many and how large.

Gradio answers much more than the page asks, and takes a request's word: the page's gate knows the few
addresses of the page, asks for the password, and leaves of a question nothing but texts and names of uploads.
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
"""Bytes of an image."""
MOST_STORED = 2**30
"""Bytes of all uploads that are kept."""
MOST_ASKED = 2**16
"""Bytes of a question with the names of its uploads."""
MOST_OPEN = 256
"""Requests at a time; a page that is looked at holds one open."""
LONGEST_REQUEST = 120.0
"""Seconds for all of a request and its response, besides the streams of events."""
AFTER_WRONG_PASSWORD = 1.0
"""Seconds until the next try, which guessing takes."""

API = "/gradio_api"
ASK, UPLOAD, FILE, READY = f"{API}/queue/join", f"{API}/upload", f"{API}/file=", f"{API}/startup-events"
READ = re.compile(
    rf"/|/config|/favicon\.ico|/manifest\.json|/pwa_icon(/\d+)?|/robots\.txt|(?:{API})?/theme\.css"
    rf"|/(?:assets|static|svelte)/[\w./@+-]+|{READY}|{FILE}.+"
)
STREAMS = re.compile(rf"{API}/(?:queue/data|upload_progress|heartbeat/\w+)")
SENT = re.compile(rf"{ASK}|{UPLOAD}|{API}/(?:cancel|reset)")
KEPT_OF_QUESTION = ("data", "fn_index", "trigger_id", "session_hash")


class Refused(Exception):
    """A request that is not handed on.

    `code` says in a word what is wrong, for programs, and `param` names the part of the request.
    """

    def __init__(self, status: int, text: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(text)
        self.status, self.code, self.param = status, code, param


class Gate(ABC):
    """A gate, as a middleware of ASGI; what it lets through is up to its kind.

    `most_open` requests are let through at a time; each has `longest` seconds with its response.
    """

    when_busy = 503
    """Status for requests beyond `most_open`."""

    def __init__(
        self, app: App, *, password: str | None, most_open: int = MOST_OPEN, longest: float = LONGEST_REQUEST
    ) -> None:
        self.app, self.password = app, password
        self.most_open, self.longest = most_open, longest
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        else:
            await self._in_time(scope, _Body(receive), send)

    async def _in_time(self, scope: Scope, body: "_Body", send: Send) -> None:
        answer = _Answer(send)
        busy = self.open >= self.most_open
        self.open += not busy
        try:
            async with asyncio.timeout(None if self.is_stream(scope) else self.longest):
                if busy:
                    raise Refused(self.when_busy, "busy: try again in a while", code="busy")
                await self.app(*await self.passed(scope, body), answer)
        except Refused as refused:
            # Whoever is still sending would lose the connection instead of hearing why.
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
            self.open -= not busy

    @abstractmethod
    async def passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """Return the request that is handed on.

        Raises:
            Refused: If it is not.
        """

    @abstractmethod
    async def refuse(self, send: Send, refused: Refused) -> None:
        """Answer a request that is not handed on."""

    def is_stream(self, scope: Scope) -> bool:
        """Whether a response is open as long as whoever asked wants it."""
        return False

    async def knows(self, word: bytes) -> bool:
        """Whether this is the password; if not, only after a while."""
        if self.password is None or secrets.compare_digest(word, self.password.encode()):
            return True
        await asyncio.sleep(AFTER_WRONG_PASSWORD)
        return False


class PageGate(Gate):
    """The page's gate, which asks for the password by HTTP Basic, with any user name."""

    def __init__(self, app: App, *, folder: Path, password: str | None) -> None:
        super().__init__(app, password=password)
        self.folder = folder

    def is_stream(self, scope: Scope) -> bool:
        """See `Gate.is_stream`."""
        return STREAMS.fullmatch(scope["path"]) is not None

    async def passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """See `Gate.passed`."""
        path, method = scope["path"], scope["method"]
        headers = headers_of(scope)
        # Gradio asks for this itself as it starts; there is nothing to learn from it.
        if path != READY and not await self._knows_password(headers):
            raise Refused(401, "a password is needed")
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
        """Answer as FastAPI does, so that the page shows it."""
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
    """Return the headers of a request by their lower-case names."""
    return {name.lower(): value for name, value in scope["headers"]}


def check_size(headers: MutableMapping[bytes, bytes], most: int) -> None:
    """Check how long a request says that its body is.

    Raises:
        Refused: If it does not say, or the body is too long.
    """
    length = headers.get(b"content-length", b"")
    if not length.isdigit() or b"transfer-encoding" in headers:
        raise Refused(411, "the length has to be said", code="length_required")
    if int(length[:20]) > most:
        raise Refused(413, f"at most {most:,} bytes are taken", code="request_too_large")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a page at this address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def upload_at(path: str, folder: Path) -> Path | None:
    """Return the file at a path if it resolves into the folder of uploads, else None."""
    try:
        found = Path(path).resolve(strict=True)
        inside = Path(path).is_absolute() and found.is_relative_to(folder.resolve()) and found.is_file()
    # No such file, a name that is too long, a zero byte, a ring of links.
    except (OSError, ValueError, RuntimeError):
        return None
    return found if inside else None


def cleaned(body: bytes) -> bytes:
    """Return a question with nothing but texts and, for uploads, path and original name.

    Without the mark of an upload (`meta`) Gradio does not look at the file, and nothing is fetched or copied
    that a request names.

    Raises:
        ValueError: If it is none.
        RecursionError: If it is nested a thousand deep.
    """
    asked = json.loads(body)
    if not isinstance(asked, dict) or not isinstance(asked.get("data"), list):
        raise ValueError("expected an object with data")
    kept = {name: asked[name] for name in KEPT_OF_QUESTION if name in asked}
    return json.dumps(kept | {"data": [_plain(value) for value in asked["data"]]}).encode()


def _plain(value: Any) -> str | dict[str, str] | None:
    if isinstance(value, dict):
        texts = {name: value.get(name) for name in ("path", "orig_name")}
        upload = {name: text for name, text in texts.items() if isinstance(text, str)}
        return upload if "path" in upload else None
    return value if isinstance(value, str) else None


def stored(folder: Path) -> int:
    """Return the bytes of all files in a folder and below."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            total += path.lstat().st_size
    return total


class _Body:
    """Notes whether there is more of a request's body to come."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.coming = receive, True

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        self.coming = self.coming and bool(message.get("more_body"))
        return message


class _Answer:
    """Notes whether a response has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        self.begun = True
        await self.send(message)


async def send_json(
    send: Send, status: int, content: dict[str, Any], headers: MutableMapping[bytes, bytes]
) -> None:
    """Answer with JSON."""
    body = json.dumps(content).encode()
    usual = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*usual, *headers.items()]})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive) -> bytes:
    """Read the body of a request.

    Raises:
        ValueError: If the connection is closed before it has come.
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
    """Replace the body of a request."""
    length = (b"content-length", str(len(body)).encode())
    replaced = (b"content-length", b"content-type")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return {**scope, "headers": [*headers, length, (b"content-type", b"application/json")]}, again
