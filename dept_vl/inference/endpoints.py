"""Endpoints of the server: chat completions, models, adapters, health and metrics."""

import asyncio
import itertools
import json
import re
import signal
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litserve import LitAPI, LitServer
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import one_line
from dept_vl._utils.printable import say
from dept_vl.adapters.hub import adapter_folder
from dept_vl.inference.chat import ChatRequest, NewAdapter, chunks, completion, image_bytes, read
from dept_vl.inference.gate import MOST_STORED, Gate, Refused, check_size, credentials, length_of
from dept_vl.inference.options import ServeConfig
from dept_vl.inference.replica import BASE, IDLE, Question

KNOWN = re.compile(r"/health|/metrics|/v1/(models(/.+)?|chat/completions|adapters(/.+)?)")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""OpenAI's error types by status; others are `invalid_request_error`, or `server_error` from 500 on."""
UNCOUNTED = ("/health", "/metrics")
"""Paths that do not count towards the limit of open requests."""
HELD = "dept_vl.held"
"""Key in a request's scope: its bytes that count in `held` until it ends."""
MOST_ADAPTERS = 1000
LONGEST_PAUSE = 30.0
"""Maximum number of seconds before a process that keeps dying is restarted."""
ENDINGS = (signal.SIGTERM, signal.SIGINT)
"""Signals that only the main process handles; it ends the model processes after all answers are sent. These
block the signals, because a terminal (Ctrl-C) and systemd send them to all processes."""


class Metrics:
    """Metrics of the server, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to: dict[str, Any] = {"registry": self.registry}
        self.answered = Counter("dept_vl_answers", "Questions answered", ["model"], **to)
        self.refused = Counter("dept_vl_refusals", "Requests rejected, by reason", ["reason"], **to)
        self.seconds = Histogram("dept_vl_seconds", "From the request to its answer", **to)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch = Histogram("dept_vl_batch_size", "Questions answered together", buckets=sizes, **to)
        self.waiting = Gauge("dept_vl_waiting", "Questions that are not answered yet", **to)
        self.restarts = Counter("dept_vl_restarts", "Processes that died and were started again", **to)


@dataclass
class Model:
    """A model that requests can name: an adapter, or the backbone alone."""

    number: str
    source: str
    about: dict[str, Any]
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self, name: str) -> dict[str, Any]:
        """Return the entry of the model in `/v1/models`."""
        known = {"task": self.about["task"], "images": self.about["images"]}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "dept_vl"} | known


def refusal(refused: Refused, metrics: Metrics) -> Response:
    """Return an error response in OpenAI's format, and count it."""
    metrics.refused.labels(refused.code).inc()
    again = {"retry-after": "1"} if refused.status in (429, 503) else {}
    kind = TYPES.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    fields = {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}
    return JSONResponse({"error": fields}, refused.status, again)


class ServerGate(Gate):
    """Gate of the server. It checks the bearer token that OpenAI's clients send."""

    when_busy = 429

    def __init__(self, app: ASGIApp, *, config: ServeConfig, token: str | None, metrics: Metrics) -> None:
        super().__init__(app, password=token)
        # Receiving the request, fetching its images and answering each have a time limit of their own.
        self.most_open, self.longest = config.max_requests, 3 * config.timeout
        self.most_sent, self.metrics = config.max_request_mb << 20, metrics
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Gate.__call__`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.held -= scope.pop(HELD, 0)

    def counts(self, scope: Scope) -> bool:
        """See `Gate.counts`."""
        return scope["path"] not in UNCOUNTED

    async def admit(self, scope: Scope) -> None:
        """See `Gate.admit`."""
        if scope["path"] == "/health":
            return
        if not await self.knows(credentials(scope, "bearer").encode("latin-1")):
            raise Refused(401, "a valid token is needed: Authorization: Bearer ...", code="invalid_api_key")

    async def passed(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """See `Gate.passed`."""
        headers = Headers(scope=scope)
        if not KNOWN.fullmatch(scope["path"]):
            raise Refused(404, "there is nothing here", code="not_found")
        if scope["method"] == "POST":
            check_size(headers, self.most_sent)
        scope[HELD] = min(length_of(headers) or 0, self.most_sent)
        self.held += scope[HELD]
        if self.held > MOST_STORED:
            raise Refused(429, "busy: try again in a while", code="busy")
        return scope, receive

    def refusal(self, refused: Refused) -> Response:
        """Return an error response in OpenAI's format, and count it."""
        return refusal(refused, self.metrics)


class ChatSpec(LitSpec):  # type: ignore[misc]
    """Endpoints of the server, which send questions to the model processes by LitServe's queue."""

    def __init__(self, config: ServeConfig, sources: dict[str, str], metrics: Metrics) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self.config, self.metrics = config, metrics
        self.server: LitServer  # set when the server has started
        self.numbers = map(str, itertools.count(1))
        self.models = {name: Model(next(self.numbers), source, {}) for name, source in sources.items()}
        self.changing = asyncio.Lock()
        self.add_endpoint("/health", self.health, ["GET", "HEAD"])
        self.add_endpoint("/metrics", self.show_metrics, ["GET"])
        self.add_endpoint("/v1/models", self.list_models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.show_model, ["GET"])
        self.add_endpoint(self.api_path, self.chat, ["POST"])
        self.add_endpoint("/v1/adapters", self.add_adapter, ["POST"])
        self.add_endpoint("/v1/adapters/{name:path}", self.remove_adapter, ["DELETE"])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that the model processes need."""
        return {"api_path": self.api_path}

    def pre_setup(self, lit_api: LitAPI) -> None:
        """Keep the `Replica`; LitServe calls this before `setup`."""
        self.replica = lit_api

    def setup(self, server: LitServer) -> None:
        """Prepare the state shared with the model processes; LitServe calls this before it starts them."""
        super().setup(server)
        if self.replica.shared is None:
            server.manager.end_with_parent(LONGEST_PAUSE / 10)  # after the model processes, which use it
            self.replica.shared = server.manager.dict()
            self._share()

    def started(self) -> None:
        """Take over the description of the models from the model processes, and add the backbone.

        Raise UsageError if an adapter has the name of the backbone.
        """
        about = self.replica.shared["models"]
        for model in self.models.values():
            model.about = about[model.number]
        # Do not reveal folders of this machine.
        name = "+".join(Path(part).name for part in about[BASE]["backbone"].split("+"))
        if name in self.models:
            raise UsageError(
                f"an adapter and the backbone are both called {name!r}: rename the adapter's folder"
            )
        self.models[name] = Model(BASE, "", about[BASE])

    # Endpoints

    async def health(self, request: Request) -> Response:
        """Report how many model processes are ready; refuse with 503 if there are none."""
        states = list(self.server.workers_setup_status.values())
        ready = states.count(WorkerSetupStatus.READY)
        if not ready:
            raise Refused(503, "no model is ready", code="not_ready")
        return JSONResponse({"status": "ok", "ready": ready, "processes": len(states)})

    async def show_metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        """List the adapters and the backbone."""
        cards = [model.card(name) for name, model in self.models.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(self, request: Request) -> Response:
        """Return the entry of one model."""
        name = request.path_params["name"]
        return JSONResponse(self._model(name).card(name))

    async def chat(self, request: Request) -> Response:
        """Answer a question."""
        arrived = time.perf_counter()
        asked = read(ChatRequest, await self._body(request))
        model = self._model(asked.model)
        length, most = len(asked.question), self.config.max_question
        if length > most:
            text = f"the question has {length:,} characters; at most {most:,} are read"
            raise Refused(400, text, code="question_too_long", param="messages")
        count = model.about["images"]
        if len(asked.images) != count:
            text = (
                f"questions to {asked.model} are about {count} image(s); this message has {len(asked.images)}"
            )
            raise Refused(400, text, code="wrong_number_of_images", param="messages")
        least = model.about["least"]
        if asked.longest is not None and asked.longest < least:
            text = (
                f"max_tokens is {asked.longest}, and answers of {asked.model}, which are chosen from a list, "
                f"have up to {least} tokens; leave it out"
            )
            raise Refused(400, text, code="max_tokens_too_small", param="max_tokens")
        fetched = [image_bytes(url, allow_urls=self.config.allow_urls) for url in asked.images]
        images = tuple(await asyncio.gather(*fetched))
        question = Question(model.number, model.source, asked.question, images, asked.longest)
        reply = await self.submit(question, param="messages")
        self.metrics.answered.labels(asked.model).inc()
        self.metrics.seconds.observe(time.perf_counter() - arrived)
        if not asked.stream:
            return JSONResponse(completion(asked.model, reply))
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        parts = [json.dumps(part) for part in chunks(asked.model, reply, usage=usage)]
        events = "".join(f"data: {part}\n\n" for part in [*parts, "[DONE]"])
        return Response(events, media_type="text/event-stream")

    async def add_adapter(self, request: Request) -> Response:
        """Load an adapter, and return its entry."""
        self._check_changes()
        new = read(NewAdapter, await self._body(request))
        name = new.name or Path(new.source).name or new.source
        async with self.changing:
            if name in self.models:
                raise Refused(409, f"there is already a model {name!r}", code="name_taken", param="name")
            if len(self.models) > MOST_ADAPTERS:
                text = f"at most {MOST_ADAPTERS} adapters are served: remove one"
                raise Refused(400, text, code="too_many_adapters")
            source = new.source
            try:
                # Download first, because the model process answers no questions while it loads an adapter.
                if not Path(source).is_dir():
                    source = str(await asyncio.to_thread(adapter_folder, source))
            except (OSError, ValueError) as error:
                raise Refused(400, one_line(error), code="invalid_adapter", param="source") from None
            number = next(self.numbers)
            self._share({number: source})
            try:
                about = await self.submit(Question(number, source, loading=True), param="source")
            except Refused:
                self._share()
                raise
            self.models[name] = Model(number, source, about)
            return JSONResponse(self.models[name].card(name), status_code=201)

    async def remove_adapter(self, request: Request) -> Response:
        """Remove an adapter; questions that were sent before are still answered."""
        self._check_changes()
        name = request.path_params["name"]
        async with self.changing:
            if self._model(name).number == BASE:
                raise Refused(400, f"{name} is the backbone, which stays", code="not_an_adapter")
            del self.models[name]
            self._share()
            with suppress(KeyError):  # without answers there is no counter
                self.metrics.answered.remove(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    # The queue

    async def submit(self, question: Question, *, param: str) -> dict[str, Any]:
        """Send a question to the model processes, and return the reply; Refused if there is none in time."""
        self.metrics.waiting.inc()
        try:
            async with asyncio.timeout(self.config.timeout):
                reply = await self.outcome(question)
        except TimeoutError:
            text = f"no answer within {self.config.timeout:g} seconds: try again later"
            raise Refused(503, text, code="timeout") from None
        finally:
            self.metrics.waiting.dec()
        if reply["batch"]:
            self.metrics.batch.observe(reply["batch"])
        if "error" in reply:
            raise Refused(reply["status"], reply["error"], code=reply["code"], param=param)
        return reply

    async def outcome(self, question: Question) -> dict[str, Any]:
        """Put a question into the queue, and return the result of `Replica.predict`.

        Raise Refused if the process that was answering it has died.
        """
        uid = uuid.uuid4().hex
        item = self.response_buffer[uid] = ResponseBufferItem(asyncio.Event())
        try:
            self.request_queue.put((self.server.app.response_queue_id, uid, time.monotonic(), question))
            await item.event.wait()
        finally:
            del self.response_buffer[uid]
        reply, status = item.response
        if status != LitAPIStatus.OK:
            raise Refused(503, "the process with the model has died: try again", code="process_died")
        return dict(reply)

    async def watch(self) -> None:
        """Restart model processes that die, and fail the questions that were lost."""
        workers, pause, started = self.server.inference_workers, 0.0, 0.0
        while True:
            await asyncio.sleep(IDLE / 2)
            dead = {place for place, worker in enumerate(workers) if not worker.is_alive()}
            if not dead:
                continue
            # The queue may still hand questions to a dead process for as long as that would have waited.
            # Questions that no process has begun fail too, because any of them may be lost.
            await asyncio.sleep(IDLE)
            for item in list(self.response_buffer.values()):
                if item.worker_id is None or item.worker_id in dead:
                    item.response = (None, LitAPIStatus.ERROR)
                    item.event.set()
            soon = time.monotonic() - started < 2 * LONGEST_PAUSE
            pause = min(2 * pause + 1, LONGEST_PAUSE) if soon and started else 0.0
            await asyncio.sleep(pause)
            started = time.monotonic()
            for place in dead:
                say(f"warning: process {place} with the model died; starting another", error=True)
                self.metrics.restarts.inc()
                workers[place] = await asyncio.to_thread(self._start, place)

    # Helpers

    def _start(self, place: int) -> Any:
        # A process inherits the mask of the thread that starts it.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        try:
            return self.server.launch_single_inference_worker(self.replica, place)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)

    async def _body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self.config.timeout):
                return await request.body()
        except TimeoutError:
            raise Refused(408, "the request did not come in time", code="timeout") from None
        except ClientDisconnect:
            raise Refused(400, "the visitor has gone", code="disconnected") from None

    def _model(self, name: str) -> Model:
        if name not in self.models:
            text = f"there is no model {name!r:.200}; GET /v1/models lists those there are"
            raise Refused(404, text, code="model_not_found", param="model")
        return self.models[name]

    def _check_changes(self) -> None:
        if not self.config.allow_adapter_changes:
            text = "adapters are neither added nor removed here (--allow_adapter_changes)"
            raise Refused(403, text, code="not_allowed")

    def _share(self, more: dict[str, str] | None = None) -> None:
        known = {model.number: model.source for model in self.models.values() if model.number != BASE}
        self.replica.shared["adapters"] = known | (more or {})
