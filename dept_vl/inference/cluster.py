"""Deployment of the server on a cluster, with Ray Serve.

from dept_vl.inference.options import ServeConfig
from dept_vl.inference.cluster import deployment
app = deployment(ServeConfig(("runs/vqa", "runs/gqa")), num_replicas=8, ray_actor_options={"num_gpus": 1})
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.hub import names_of
from dept_vl.inference.endpoints import ChatSpec, Metrics
from dept_vl.inference.options import ServeConfig
from dept_vl.inference.replica import Question, Replica
from dept_vl.inference.server import find_token, guard


class ClusterSpec(ChatSpec):
    """Endpoints of one replica. Its process holds the model, and Ray Serve batches the questions."""

    def load(self) -> None:
        """Load the model in this process."""
        import torch

        self.replica = Replica(self.config, self)
        self.replica.shared = {}
        self._share()
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        self.replica.setup(self.config.device or accelerator)
        self.started()
        wait = self.config.max_wait_ms / 1000
        batched = serve.batch(max_batch_size=self.config.max_batch_size, batch_wait_timeout_s=wait)
        self.answers = batched(self._predict)

    async def _predict(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.replica.predict, questions)

    async def health(self, request: Request) -> Response:
        """Report readiness; Ray Serve sends no requests to replicas that are not ready."""
        return JSONResponse({"status": "ok", "ready": 1, "processes": 1})

    async def outcome(self, question: Question) -> dict[str, Any]:
        """See `ChatSpec.outcome`."""
        return dict(await self.answers(question))


def deployment(config: ServeConfig, **options: Any) -> serve.Application:
    """Return the application for `serve run` and `ray.serve.run`.

    Args:
        config: Options of `dept-vl serve`. Host and port are ignored, because Ray Serve sets them.
        **options: Arguments of `ray.serve.deployment`, such as `num_replicas`.

    Raises:
        UsageError: If `config.allow_adapter_changes` is set, because only one replica would get a change.
    """
    if config.allow_adapter_changes:
        raise UsageError("adapters of a cluster change by deploying it anew; leave out allow_adapter_changes")
    token = find_token(config)
    usual = {"name": "dept_vl", "max_ongoing_requests": config.max_requests}
    # The function is sent to the replicas, which call it there.
    made = serve.ingress(lambda: _app(config, token))()
    return serve.deployment(made, **(usual | options)).bind()


def _app(config: ServeConfig, token: str | None) -> FastAPI:
    metrics, app = Metrics(), FastAPI(openapi_url=None)
    spec = ClusterSpec(config, names_of(config.adapters), metrics)
    spec.load()
    for path, endpoint, methods in spec.endpoints:
        app.add_api_route(path, endpoint, methods=methods)
    guard(app, config, token, metrics)
    return app
