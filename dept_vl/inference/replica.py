"""Model process of the server: it answers batches of questions to any of the adapters."""

import multiprocessing
import os
import queue
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from litserve import LitAPI
from litserve.loops.simple_loops import BatchedLoop

from dept_vl._utils.io import one_line
from dept_vl._utils.printable import notes_caught, printable, say
from dept_vl.inference.options import ServeConfig

if TYPE_CHECKING:  # the main process does not import torch
    from dept_vl.inference.mixed import ManyAdapters
    from dept_vl.inference.predictor import Ask, Predictor, Reply

IDLE = 0.2
"""Seconds that a process waits for a question before it tries again."""
END = (None, None, None, None)
"""Queue item that ends the process that takes it."""
BASE, FIRST = "backbone", "first"
"""Used instead of adapter numbers: the backbone alone, and the adapter that the backbone is loaded for."""


@dataclass(frozen=True)
class Question:
    """A question, as it is sent to the model processes."""

    adapter: str  # number of the adapter, which is never reused; `BASE` is the backbone alone
    source: str = ""  # folder or Hub name of the adapter
    text: str = ""
    images: tuple[bytes, ...] = ()  # contents of image files
    longest: int | None = None  # maximum number of tokens of the answer; None uses the adapter's maximum
    loading: bool = False  # whether to only load the adapter and describe it, without a question


def end_with_parent(after: float = 0.0) -> None:
    """End this process `after` so many seconds when its parent process has ended, even if it was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        time.sleep(after)
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


class Batches(BatchedLoop):  # type: ignore[misc]
    """LitServe's loop over batches, but waiting for the first question without busy polling."""

    def get_batch_requests(
        self, lit_api: LitAPI, request_queue: Any, transport: Any
    ) -> tuple[list[Any], list[Any]]:
        """Collect a batch from the queue, until it is full or the first question has waited long enough."""
        from litserve.utils import LitAPIStatus, LoopResponseType

        taken: list[Any] = []
        until = 0.0
        while len(taken) < lit_api.max_batch_size:
            left = until - time.monotonic() if taken else IDLE
            try:
                number, uid, asked, question = request_queue.get(left > 0, max(left, 0))
            except queue.Empty:
                if taken:
                    break
                continue
            if uid is None:
                raise SystemExit(0)
            self.put_response(transport, number, uid, (), LitAPIStatus.START, LoopResponseType.REGULAR)
            if not taken:
                until = time.monotonic() + lit_api.batch_timeout
            if time.monotonic() - asked < lit_api.request_timeout:  # not timed out
                taken.append((number, uid, question))
        return taken, []


class Replica(LitAPI):  # type: ignore[misc]
    """One backbone with all adapters, as LitServe's model. The backbone is loaded for the first adapter."""

    def __init__(self, config: ServeConfig, spec: Any) -> None:
        super().__init__(
            max_batch_size=config.max_batch_size,
            batch_timeout=config.max_wait_ms / 1000,
            loop=Batches(),
            spec=spec,
        )
        self.config = config
        self.told: dict[str, str] = {}
        self.shared: Any = None
        """State shared by all processes: `adapters`, sources by number; `content of NUMBER`, fingerprints;
        `models`, descriptions of those that were loaded at the start; `failed`, why the start failed."""

    def setup(self, device: str) -> None:
        """Load the backbone and the adapters; LitServe calls this in the model process."""
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from dept_vl.inference.mixed import load_many

        end_with_parent()
        disable_progress_bar()
        set_verbosity_error()
        try:
            # Determines the backbone and its task without adapter, even if the adapter was removed since.
            self.many: ManyAdapters = load_many(
                {FIRST: self.config.adapters[0]}, backbone=self.config.backbone, device=str(device)
            )
            self.base_task = self.many.predictor(None).task
            errors = self._load(())
        except Exception as error:
            self.shared["failed"] = one_line(error)
            raise
        if errors and "models" not in self.shared:
            self.shared["failed"] = next(iter(errors.values()))
            raise ValueError(self.shared["failed"])
        self.shared["models"] = {
            number or BASE: self._about(predictor) for number, predictor in self.many.predictors.items()
        }

    def predict(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Answer a batch. An invalid question gets an error as its reply and does not affect the others."""
        errors = self._load(questions)
        outcomes: list[dict[str, Any]] = [{} for _ in questions]
        asks: dict[int, Ask] = {}
        pixels: dict[bytes, Any] = {}
        for place, question in enumerate(questions):
            reason = errors.get(question.adapter)
            if reason is not None:  # folders of this machine are told to those alone who add adapters
                outcomes[place] = (
                    _refusal(400, "invalid_adapter", reason)
                    if question.loading
                    else _refusal(503, "adapter_changed", "this adapter has changed since it was added")
                )
            elif question.loading:
                outcomes[place] = self._about(self._predictor(question))
            else:
                try:
                    with notes_caught() as notes:
                        ask = self._ask(question, pixels)
                        ask.source()
                    asks[place], outcomes[place] = ask, {"notes": notes}
                except (ValueError, OSError, MemoryError) as error:
                    outcomes[place] = _refusal(400, "invalid_question", one_line(error))
                except Exception:  # any error: the other questions must still be answered
                    outcomes[place] = _internal_error()
        numbers = {id(ask.predictor): questions[place].adapter for place, ask in asks.items()}
        for place, reply in zip(asks, self._answer([*asks.values()], numbers), strict=True):
            outcomes[place] |= reply
        # Only the first reply has the batch size, so that a batch is counted once.
        return [
            outcome | {"batch": len(questions) if place == 0 else 0} for place, outcome in enumerate(outcomes)
        ]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the reply unchanged; `ChatSpec.chat` formats it."""
        return output

    def decode_request(self, request: Any) -> Any:
        """Return the request unchanged; `ChatSpec.chat` has parsed it."""
        return request

    def _load(self, questions: Sequence[Question]) -> dict[str, str]:
        """Load new adapters and drop removed ones; return the reasons why others cannot be loaded.

        All processes answer with the content that the first of them has loaded.
        """
        from dept_vl._utils.tensors import exact_fingerprint
        from dept_vl.inference.loading import load
        from dept_vl.inference.mixed import ManyAdapters

        wanted = dict(self.shared["adapters"]) | {
            question.adapter: question.source for question in questions if question.adapter != BASE
        }
        known = {number: p for number, p in self.many.predictors.items() if number is not None}
        errors = {}
        kept = {number: predictor for number, predictor in known.items() if number in wanted}
        for number in wanted.keys() - known.keys():
            try:
                kept[number] = load(wanted[number], backbone=self.many.backbone)
                ManyAdapters(self.many.backbone, {number: kept[number]})
                adapter = kept[number].adapter
                assert adapter is not None  # `load` has read it
                content = exact_fingerprint(adapter.tensors, adapter.prompt)
                if self.shared.setdefault(f"content of {number}", content) != content:
                    raise ValueError("its files have changed since it was added; remove it and add it again")
            except Exception as error:  # any error: the other questions must still be answered
                kept.pop(number, None)
                errors[number] = printable(f"{wanted[number]}: {one_line(error)}")
                if self.told.get(number) != errors[number]:  # tried again with every batch
                    say(f"warning: {errors[number]}", error=True)
                self.told[number] = errors[number]
        if kept.keys() != known.keys():
            self.many = ManyAdapters(self.many.backbone, kept, base_task=self.base_task)
        return errors

    def _predictor(self, question: Question) -> "Predictor":
        return self.many.predictor(None if question.adapter == BASE else question.adapter)

    def _ask(self, question: Question, pixels: dict[bytes, Any]) -> "Ask":
        """Return a question with its images read and preprocessed; `pixels` caches them."""
        from dept_vl.data.features import load_pixels
        from dept_vl.inference.predictor import Ask

        predictor = self._predictor(question)
        vision = self.many.backbone.vision
        if predictor.task.image_count and vision is not None:
            for content in question.images:
                if content not in pixels:
                    pixels[content] = load_pixels(vision, content)
        longest = predictor.generation[0]["max_new_tokens"]
        if question.longest is not None and question.longest < longest:
            predictor = replace(
                predictor, decoding=replace(predictor.decoding, max_new_tokens=question.longest)
            )
        return Ask(
            predictor, question.text, tuple(pixels.get(content, content) for content in question.images)
        )

    def _answer(self, asks: Sequence["Ask"], numbers: dict[int, str]) -> list[dict[str, Any]]:
        """Answer a batch; if it fails, answer its questions one by one."""
        from dept_vl.inference.predictor import answer_all

        if not asks:
            return []

        def model_of(rows: Sequence["Ask"]) -> Any:
            names = [numbers[id(ask.predictor)] for ask in rows]
            return self.many.model([None if name == BASE else name for name in names])

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # collected by `predict`
                return [_said(reply) for reply in answer_all(asks, model_of, len(asks))]
        except Exception as error:
            if len(asks) > 1:
                return [reply for ask in asks for reply in self._answer([ask], numbers)]
            if isinstance(error, ValueError):
                return [_refusal(400, "invalid_question", one_line(error))]
            return [_internal_error()]

    def _about(self, predictor: "Predictor") -> dict[str, Any]:
        """Return the description of an adapter that the server needs."""
        task = predictor.task
        name = predictor.model.backbone.name
        # Answers that are chosen from a list cannot be shortened.
        least = predictor.generation[0]["max_new_tokens"] if predictor.decoding.candidates else 1
        return {"task": task.name, "images": task.image_count, "backbone": name, "least": least}


def _said(reply: "Reply") -> dict[str, Any]:
    finish = "stop" if reply.whole else "length"
    return {"text": reply.text, "read": reply.read, "written": reply.written, "finish_reason": finish}


def _internal_error() -> dict[str, Any]:
    """Print the traceback of the error that is being handled, and return a refusal that does not show it."""
    say(*traceback.format_exc().splitlines(), error=True)
    return _refusal(500, "internal_error", "this question could not be answered")


def _refusal(status: int, code: str, text: str) -> dict[str, Any]:
    return {"error": printable(text), "status": status, "code": code}
