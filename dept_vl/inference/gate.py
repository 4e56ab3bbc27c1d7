"""What a request to the page may be: Gradio answers much more than the page asks, and takes a request's word.

In front of it stands a gate that knows the few addresses of the page, bounds what they are sent, asks for the
password, and leaves of a question nothing but texts and names of uploads.
"""

import asyncio
import base64
import binascii
import json
import re
import secrets
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


class Gate:
    """The gate, as a middleware of ASGI.

    Args:
        app: What is behind it.
        folder: Where uploads are.
        password: Asked for by HTTP Basic, with any user name; None for none.
    """

    def __init__(self, app: App, *, folder: Path, password: str | None) -> None:
        self.app, self.folder, self.password = app, folder, password
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        elif self.open >= MOST_OPEN:
            await _refuse(send, _Refused(503, "busy: try again in a while"))
        else:
            await self._in_time(scope, receive, send)

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.open += 1
        answer = _Answer(send)
        try:
            async with asyncio.timeout(None if STREAMS.fullmatch(scope["path"]) else LONGEST_REQUEST):
                await self.app(*await self._passed(scope, receive), answer)
        except _Refused as refused:
            if refused.status == 413:
                # Whoever is still sending would lose the connection instead of hearing why.
                with suppress(TimeoutError):
                    async with asyncio.timeout(LONGEST_REQUEST):
                        while (await receive()).get("more_body"):
                            pass
            await _refuse(send, refused)
        except TimeoutError:
            if answer.begun:
                raise
            await _refuse(send, _Refused(408, "this took too long"))
        finally:
            self.open -= 1

    async def _passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """The request as it is handed on; raises `_Refused` if it is not."""
        path, method = scope["path"], scope["method"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        # Gradio asks for this itself as it starts; there is nothing to learn from it.
        if path != READY and not await self._knows_password(headers):
            raise _Refused(401, "a password is needed")
        allowed = {"GET": (READ, STREAMS), "HEAD": (READ,), "POST": (SENT,)}.get(method, ())
        known = any(pattern.fullmatch(path) for pattern in allowed) and ".." not in path
        if not known or (path.startswith(FILE) and upload_at(path[len(FILE) :], self.folder) is None):
            raise _Refused(404, "there is nothing here")
        if method == "POST":
            await self._check_size(path, headers)
        if path != ASK:
            return scope, receive
        try:
            return _with_body(scope, cleaned(await _read(receive)))
        except (ValueError, RecursionError):
            raise _Refused(400, "this is no question of the page") from None

    async def _check_size(self, path: str, headers: MutableMapping[bytes, bytes]) -> None:
        most = MOST_UPLOADED + MOST_ASKED if path == UPLOAD else MOST_ASKED
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:
            raise _Refused(411, "the length has to be said")
        if int(length[:20]) > most:
            raise _Refused(413, f"at most {most:,} bytes are taken")
        if path == UPLOAD and await asyncio.to_thread(stored, self.folder) > MOST_STORED:
            raise _Refused(503, "no room for uploads: try again in an hour")

    async def _knows_password(self, headers: MutableMapping[bytes, bytes]) -> bool:
        if self.password is None:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"basic":
            return False
        with suppress(binascii.Error):
            _, _, word = base64.b64decode(given.strip()).partition(b":")
            if secrets.compare_digest(word, self.password.encode()):
                return True
        await asyncio.sleep(AFTER_WRONG_PASSWORD)
        return False


def upload_at(path: str, folder: Path) -> Path | None:
    """The file at a path, if it is really inside the folder of uploads; None for whatever else.

    Args:
        path: From a request.
        folder: Of the uploads.
    """
    try:
        found = Path(path).resolve(strict=True)
        inside = Path(path).is_absolute() and found.is_relative_to(folder.resolve()) and found.is_file()
    # No such file, a name that is too long, a zero byte, a ring of links.
    except (OSError, ValueError, RuntimeError):
        return None
    return found if inside else None


def cleaned(body: bytes) -> bytes:
    """A question without what the page does not send: of an upload path and own name, of others texts.

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
    """Bytes of all files in a folder, below it too."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            total += path.lstat().st_size
    return total


class _Answer:
    """Notes whether a response has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        self.begun = True
        await self.send(message)


class _Refused(Exception):
    """A request that is not handed on."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def _refuse(send: Send, refused: _Refused) -> None:
    # As FastAPI says it, so that the page shows it.
    body = json.dumps({"detail": str(refused)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="dept_vl", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive) -> bytes:
    """A request's body, which is as long as the request has said."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ValueError("the visitor has gone")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _with_body(scope: Scope, body: bytes) -> tuple[Scope, Receive]:
    """The request with another body."""
    length = (b"content-length", str(len(body)).encode())
    replaced = (b"content-length", b"content-type")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return {**scope, "headers": [*headers, length, (b"content-type", b"application/json")]}, again
