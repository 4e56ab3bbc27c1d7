"""HTTP server with an API like OpenAI's for any number of adapters: `dept-vl serve`.

LitServe starts model processes on each device, queues questions for them and batches them (see `replica`).
The main process reads requests, rejects those over the limits, and writes responses (see `endpoints`).
"""

import asyncio
import errno
import os
import re
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager

import uvicorn
from fastapi import FastAPI
from litserve import LitServer
from litserve.connector import check_cuda_with_nvidia_smi
from litserve.utils import WorkerSetupStatus, wrap_litserve_start
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import say
from dept_vl.adapters.hub import names_of
from dept_vl.inference.endpoints import ENDINGS, ChatSpec, Metrics, ServerGate, refusal
from dept_vl.inference.gate import Refused, is_loopback
from dept_vl.inference.options import ServeConfig
from dept_vl.inference.replica import END, Replica, end_with_parent

TOKEN_VARIABLE = "DEPT_VL_TOKEN"
SENDABLE = re.compile(r"[!-~]+")
"""Tokens that every client can send in a header."""
KEPT_OPEN = 30
"""Seconds that an idle connection stays open."""
BACKLOG = 4096
"""Number of connections that may wait to be accepted."""
LONGEST_END = 2.0
"""Seconds that a model process has to end by itself before it is killed, for example while loading."""


def build(config: ServeConfig, token: str | None) -> tuple[LitServer, ChatSpec]:
    """Build the server without starting its processes; UsageError if there is no such device."""
    # LitServe runs its queue in a manager process of this class.
    SyncManager.register("end_with_parent", end_with_parent)
    metrics = Metrics()
    spec = ChatSpec(config, names_of(config.adapters), metrics)
    server = LitServer(
        Replica(config, spec),
        accelerator=config.device or ("cuda" if check_cuda_with_nvidia_smi() else "cpu"),
        workers_per_device=config.copies,
        timeout=config.timeout,
        # LitServe's own endpoints do not have OpenAI's format; the gate hides them.
        healthcheck_path="/litserve/health",
        info_path="/litserve/info",
        disable_openapi_url=True,
    )
    if not server.devices:
        raise UsageError(f"--device {config.device}: this machine has none; leave it out, or give cpu")
    guard(server.app, config, token, metrics)
    # Makes LitServe report which process has begun a question. With a single one, that is known and slower.
    server.restart_workers = len(server.devices) * config.copies > 1
    return server, spec


def guard(app: FastAPI, config: ServeConfig, token: str | None, metrics: Metrics) -> None:
    """Add the gate to an application, and return errors in OpenAI's format."""
    app.add_middleware(ServerGate, config=config, token=token, metrics=metrics)

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refused(error.status_code, str(error.detail), code="not_found")
        if not isinstance(error, Refused):
            error = Refused(500, "this request could not be answered", code="internal_error")
        return refusal(error, metrics)

    for kind in (Refused, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)


def serve(config: ServeConfig) -> None:
    """Load the adapters and serve until SIGTERM or Ctrl-C; pending requests are still answered."""
    token = find_token(config)
    server, spec = build(config, token)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with bound(config.host, config.port) as listening, suppress(KeyboardInterrupt), started(server, spec):
        wait_until_ready(server, spec)
        spec.server = server
        spec.started()
        listen(listening, config.host, config.port)
        asyncio.run(_answer(config, server, spec, listening))


@contextmanager
def started(server: LitServer, spec: ChatSpec) -> Iterator[None]:
    """Start the processes of the server, and end them on exit."""
    # Started before signals are blocked, since it unblocks them in this process in Python 3.11.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    with wrap_litserve_start(server):
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
            yield
        finally:
            # These processes block SIGTERM, with which LitServe would end them.
            for _ in server.inference_workers:
                spec.request_queue.put(END)
            for worker in server.inference_workers:
                worker.join(LONGEST_END)
                worker.kill()


def find_token(config: ServeConfig) -> str | None:
    """Return the token that requests need; generate and print one if other machines can reach the server.

    Raise UsageError if the given token is empty, or no request can send it.
    """
    token, place = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if config.token_file is not None:
        # Editors of Windows write a byte order mark.
        token = config.token_file.read_text(encoding="utf-8-sig", errors="replace")
        place = str(config.token_file)
    if token is not None:
        token = token.strip()  # files and secrets end with a line end
        if SENDABLE.fullmatch(token) is None:
            found = "others" if token else "none"
            raise UsageError(
                f"the token in {place}: expected letters, digits and signs of ASCII without spaces, found "
                f"{found}; without a token, everyone on this machine may ask"
            )
    if token is None and not is_loopback(config.host):
        token = secrets.token_urlsafe(18)
        say(
            f"warning: everyone who reaches {config.host} can ask this server, and it is not encrypted. The "
            f"token is {token}; set your own in the environment as {TOKEN_VARIABLE}, or with --token_file",
            error=True,
        )
    return token


def bound(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet; OSError names the host and the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        with _named(host, port):
            found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found


def listen(found: socket.socket, host: str, port: int) -> None:
    """Listen on a bound socket; raise OSError if another server has begun to listen there since."""
    with _named(host, port):
        found.listen(BACKLOG)


@contextmanager
def _named(host: str, port: int) -> Iterator[None]:
    """Name host and port in errors."""
    try:
        yield
    except (OSError, TypeError) as error:  # TypeError: a name that cannot be encoded
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(number, f"cannot listen at {host}:{port}: {reason}") from None


def wait_until_ready(server: LitServer, spec: ChatSpec) -> None:
    """Wait until every process has loaded its model; UsageError if one cannot, RuntimeError if it dies."""
    while any(state != WorkerSetupStatus.READY for state in server.workers_setup_status.values()):
        failed = spec.replica.shared.get("failed")
        if failed is not None:
            raise UsageError(failed)
        if not all(worker.is_alive() for worker in server.inference_workers):
            raise RuntimeError("the process with the model ended while it was loading")
        time.sleep(0.05)


async def _answer(config: ServeConfig, server: LitServer, spec: ChatSpec, listening: socket.socket) -> None:
    options = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=KEPT_OPEN,
        # The longest that a request can take.
        timeout_graceful_shutdown=int(3 * config.timeout) + 1,
    )
    running = _Listener(options)
    for number in ENDINGS:  # before uvicorn installs its own handlers, and after it
        signal.signal(number, lambda *_: setattr(running, "should_exit", True))
    watching = asyncio.create_task(spec.watch())
    serving = asyncio.create_task(running.serve(sockets=[listening]))
    while not running.started and not serving.done():
        await asyncio.sleep(0.01)
    if running.started:
        host = f"[{config.host}]" if ":" in config.host else config.host
        names = ", ".join(spec.models)
        say(f"serving {names} at http://{host}:{listening.getsockname()[1]}; Ctrl-C ends it")
    done, _ = await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
    running.should_exit = True
    await serving
    watching.cancel()
    for task in done - {serving}:
        task.result()  # raise internal errors


class _Listener(uvicorn.Server):
    """uvicorn's server, which refuses new connections as soon as it begins to end.

    LitServe's manager process inherits the socket. If it was only closed here, new connections would be
    accepted and wait for nobody, and a load balancer would not try another server.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in sockets or ():
            with suppress(OSError):  # macOS does not know this
                listening.shutdown(socket.SHUT_RDWR)
        await super().shutdown(sockets)
