"""Parsing of requests, and formatting of answers and errors, for OpenAI's chat completions API.

A request is one user message with text and images. Unsupported options that would change the answer are
rejected by name; options that do not change it are ignored.
"""

import asyncio
import ipaddress
import socket
import time
import uuid
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dept_vl._utils.embedded import data_url_bytes
from dept_vl._utils.io import one_line, parse_json
from dept_vl.inference.gate import MOST_UPLOADED, Refused

LONGEST_FETCH = 10.0
"""Maximum number of seconds to fetch an image from another server."""
PORTS = {"http": 80, "https": 443}
"""The only ports from which images are fetched, by scheme."""
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "fec0::/10", "3fff::/20")))
"""Networks that are not public, but that some versions of Python take for it."""
MOST_VALUES = 10_000
"""Maximum number of values in the body of a request; more of them would keep all other requests waiting."""
IMAGE_URL = '{"url": "data:image/png;base64,..."}'
T = TypeVar("T", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Text(_Strict):
    """Text part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """URL of an image: a data URL, or an http(s) URL if the server allows it."""

    url: str
    detail: str | None = None


class Picture(_Strict):
    """Image part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Strict):
    """User message with the question."""

    role: Literal["user"]
    content: str | list[Annotated[Text | Picture, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """Body of a request for a chat completion. Fields that are not listed here are rejected."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted only with the values that describe what is always done: one answer, the most probable.
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    # Ignored: they change nothing.
    top_p: float | None = None
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def question(self) -> str:
        """Text of the message."""
        content = self.messages[0].content
        if isinstance(content, str):
            return content
        return "\n".join(part.text for part in content if isinstance(part, Text))

    @property
    def images(self) -> list[str]:
        """URLs of the images of the message."""
        content = self.messages[0].content
        parts = [] if isinstance(content, str) else content
        return [part.image_url.url for part in parts if isinstance(part, Picture)]

    @property
    def longest(self) -> int | None:
        """Maximum number of tokens of the answer; None uses the adapter's maximum."""
        return self.max_completion_tokens or self.max_tokens


class NewAdapter(_Strict):
    """Body of a request to add an adapter."""

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder of a run or an adapter, or name of an adapter on the Hub."""
    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.@/+ -]+$")] | None = None
    """Name of the adapter in requests. Defaults to the last part of the source."""


def read(kind: type[T], body: bytes) -> T:
    """Parse the body of a request; Refused describes the first problem."""
    if sum(map(body.count, b"{[,")) > MOST_VALUES:
        text = f"the body is not valid: expected at most {MOST_VALUES:,} of {{, [ and , in it"
        raise Refused(400, text, code="invalid_request")
    try:
        content = parse_json(body.decode())
    except ValueError as error:
        raise Refused(400, f"the body is not valid JSON: {one_line(error)}", code="invalid_request") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        # Of a message's content both kinds are reported, text and list; the deeper error is of the one meant.
        same = [one for one in errors if one["loc"][:3] == errors[0]["loc"][:3]]
        first = max(same, key=lambda one: len(one["loc"]))
        param = _place(first["loc"])
        where = "the body: " if param is None else f"{param}: "
        text = f"{where}{_problem(first, param or '')}"
        raise Refused(400, text, code="invalid_request", param=param) from None


def _place(loc: tuple[str | int, ...]) -> str | None:
    """Return the location of an error as it is written in Python, without the kinds that pydantic tried."""
    parts = list(loc)
    # Behind `content` and behind the number of a part stands the kind that was tried.
    if parts[:3] == ["messages", 0, "content"]:
        parts = [*parts[:3], *parts[4:5], *parts[6:]]
    named = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return named.removeprefix(".") or None


def _problem(error: Any, param: str) -> str:
    """Describe an error of pydantic at a location, and what to send instead."""
    message: str = error["msg"]
    kind: str = error["type"]
    if kind == "extra_forbidden":
        return "this option is not supported"
    if param.split(".")[0].split("[")[0] in ("stop", "logprobs", "response_format"):
        return "this is not supported: leave it out"
    if param in ("temperature", "n", "presence_penalty", "frequency_penalty"):
        return f"{message}; there is one answer to a question, the likeliest: leave it out"
    if param == "messages" or "role" in param:
        return (
            "expected one user message with the text and the images of one question; there is no system "
            "prompt and no conversation"
        )
    if param.endswith(".image_url"):
        return f"expected {IMAGE_URL}"
    if param.startswith("messages[0].content") and kind not in ("missing", "string_type"):
        return (
            f'expected {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": {IMAGE_URL}}}'
        )
    if param == "messages[0].content":
        return "expected text, or a list of parts"
    return message


def completion(model: str, reply: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a response in OpenAI's format."""
    body = _head("chat.completion", model) | {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply["text"], "refusal": None},
                "logprobs": None,
                "finish_reason": reply["finish_reason"],
            }
        ],
        "usage": _usage(reply),
    }
    # `warnings` is not a field of OpenAI's; clients show it as an extra field.
    return body | ({"warnings": reply["notes"]} if reply["notes"] else {})


def chunks(model: str, reply: dict[str, Any], *, usage: bool) -> list[dict[str, Any]]:
    """Return the chunks of a streamed response. The first one contains the complete answer."""
    head = _head("chat.completion.chunk", model) | ({"usage": None} if usage else {})

    def chunk(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    parts = [chunk({"role": "assistant", "content": reply["text"]}, None), chunk({}, reply["finish_reason"])]
    return [*parts, head | {"choices": [], "usage": _usage(reply)}] if usage else parts


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(reply: dict[str, Any]) -> dict[str, int]:
    read, written = reply["read"], reply["written"]
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def image_bytes(url: str, *, allow_urls: bool) -> bytes:
    """Return the content of the image file at a URL; Refused says why not."""
    scheme = url[:8].partition(":")[0].lower()
    try:
        if scheme == "data":
            return data_url_bytes(url)
        if scheme not in PORTS:
            raise ValueError("expected a data URL, data:image/png;base64,...")
        if not allow_urls:
            raise ValueError(
                "this server fetches no images; send them as data URLs, data:image/png;base64,..."
            )
        async with asyncio.timeout(LONGEST_FETCH):
            return await fetch(url)
    except ValueError as error:
        raise Refused(400, str(error), code="invalid_image_url", param="messages") from None
    except TimeoutError:
        text = f"the image did not come within {LONGEST_FETCH:.0f} seconds"
        raise Refused(400, text, code="invalid_image_url", param="messages") from None


async def fetch(url: str) -> bytes:
    """Fetch an http or https URL of a public server, but never one of this machine or its network.

    The host name is resolved only once, and redirects are not followed. Raise ValueError if the URL is not
    allowed, or the content is too large or cannot be fetched.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        port = parts.port or PORTS[parts.scheme]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError, UnicodeError):
        raise ValueError(f"there is no server {host!r:.100}") from None
    addresses = [str(entry[4][0]) for entry in found]
    # One message for all cases, so that it reveals nothing about this network.
    if parts.username is not None or not addresses or not all(map(is_public, addresses)):
        raise ValueError(f"images are not fetched from {host!r:.100}")
    if port != PORTS[parts.scheme]:
        raise ValueError(f"images are fetched from the ports of http and https alone, not from {port}")
    try:
        target = httpx.URL(url)
        async with (
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=LONGEST_FETCH) as client,
            client.stream(
                "GET",
                target.copy_with(host=addresses[0]),
                headers={"Host": target.netloc.decode(), "Accept-Encoding": "identity"},
                extensions={"sni_hostname": host},
            ) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"{host} answers {response.status_code} instead of an image")
            content = bytearray()
            async for part in response.aiter_raw():
                content += part
                if len(content) > MOST_UPLOADED:
                    raise ValueError(f"the image has more than {MOST_UPLOADED:,} bytes")
            return bytes(content)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"no image could be fetched from {host}: {type(error).__name__}") from None


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    return all(
        each.is_global
        and not each.is_multicast
        and not each.is_reserved
        and not any(each in network for network in NOT_PUBLIC)
        for each in (ip, inner)
    )
