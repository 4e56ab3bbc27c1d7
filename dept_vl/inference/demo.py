"""Web page on which visitors upload images, choose an adapter and ask questions."""

import atexit
import os
import secrets
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dept_vl._utils.errors import UsageError
from dept_vl._utils.images import FORMATS, ImageSource, read_image
from dept_vl._utils.io import one_line
from dept_vl._utils.printable import markdown_text, notes_caught, printable, say
from dept_vl.adapters.hub import names_of
from dept_vl.inference.gate import MOST_UPLOADED, PageGate, is_loopback, upload_at
from dept_vl.inference.mixed import ManyAdapters, load_many
from dept_vl.inference.options import DemoConfig
from dept_vl.inference.predictor import Predictor

BASE = "no adapter (the backbone alone)"
PASSWORD_VARIABLE = "DEPT_VL_PASSWORD"
FOLDER_VARIABLE = "GRADIO_TEMP_DIR"
"""Environment variable with the folder in which Gradio saves uploads."""
MOST_CHARACTERS = 1000
"""Maximum number of characters of a question."""
MOST_WAITING = 16
"""Maximum number of questions in the queue; further ones are rejected immediately."""
LONGEST_ANSWER = 60.0
"""Maximum time for one answer, in seconds, after which decoding is stopped."""
MOST_SESSIONS = 1000
"""Number of visitors whose session state Gradio keeps."""
KEPT = 3600
"""Seconds after which an upload is deleted."""
STYLE = """
.gradio-container {width: min(1080px, 100%) !important; margin: 0 auto !important}
.upload img {width: 100%; height: 100%; object-fit: contain}
#answer textarea {font-size: 1.6rem; font-weight: 600}
.problem {color: #7a2e0e; background: #fffaeb; border: 1px solid #fec84b; border-radius: 8px; padding: 12px}
::placeholder {color: var(--body-text-color-subdued) !important}
.gradio-container {--body-text-color-subdued: var(--neutral-500)}  /* 4.5:1 and more on the background */
.gradio-container.dark, .dark .gradio-container {--body-text-color-subdued: var(--neutral-300)}
input[role=combobox] {padding-right: 2rem !important; text-overflow: ellipsis}
footer {display: none !important}
"""


def describe(predictor: Predictor) -> str:
    """Return a description of an adapter in Markdown."""
    adapter, backbone = predictor.adapter, predictor.model.backbone
    if adapter is None:
        name = markdown_text(backbone.name)
        return f"**{name}** as it was before any adapter, asked as *{predictor.task.name}*."
    lines = [f"Task *{predictor.task.name}*, on **{markdown_text(backbone.name)}**."]
    if adapter.prompt is not None:
        prompt = adapter.prompt
        lines.append(
            f"{markdown_text(prompt['method'])}: {prompt['prompt_length']} vectors, rank {prompt['rank']}, "
            f"texts of at most {prompt['max_source_length']} tokens."
        )
    lines.append(f"{adapter.trainable_parameters['total']:,} trained parameters.")
    figures = list(adapter.metrics.items())[:1]
    lines += [f"{markdown_text(name)}: {value:.2f}." for name, value in figures]
    return "  \n".join(lines)


def respond(
    many: ManyAdapters, name: str, uploads: Sequence[dict[str, Any] | None], question: str, folder: Path
) -> tuple[str, str]:
    """Return the answer to a question, and its errors or warnings; either may be empty.

    An upload holds the `path` and the `orig_name` of a file as the request gives them; None is a missing
    image. Only files inside `folder` are read. All unusable uploads get the same message, so that it reveals
    nothing about files on this machine.
    """
    adapter = None if name == BASE else name
    try:
        task = many.predictor(adapter).task
        if len(question) > MOST_CHARACTERS:
            raise ValueError(
                f"the question has {len(question):,} characters; at most {MOST_CHARACTERS:,} are read"
            )
        images: list[ImageSource] = []
        for upload in uploads[: task.image_count]:
            if upload is None:
                each = "an image" if task.image_count == 1 else f"{task.image_count} images"
                raise ValueError(f"{task.name} asks about {each}: upload {each}")
            images.append(_read_upload(upload, folder, exif=many.backbone.exif is not False))
        with notes_caught() as notes:
            answers = many.answer(
                [tuple(images)],
                question if task.asks else "",
                adapters=adapter,
                batch_size=1,
                max_time=LONGEST_ANSWER,
            )
        return printable(answers[0]), " ".join(notes)
    except (ValueError, OSError) as error:
        return "", printable(one_line(error))


def _read_upload(upload: dict[str, Any], folder: Path, *, exif: bool) -> Image.Image:
    """Read an uploaded image. ValueError does not tell whether this is no upload or no image."""
    found = upload_at(str(upload.get("path")), folder)
    try:
        if found is not None:
            return read_image(found, exif=exif)
    except (ValueError, OSError):
        pass
    own_name = str(upload.get("orig_name") or "the upload")[:80]
    raise ValueError(f"{own_name} is not a readable image: upload one of {', '.join(FORMATS)}")


def answer_in_time(
    worker: ThreadPoolExecutor,
    many: ManyAdapters,
    name: str,
    uploads: Sequence[dict[str, Any] | None],
    question: str,
    folder: Path,
) -> tuple[str, str]:
    """Call `respond` with a time limit. Tracebacks of internal errors are printed, not shown on the page."""
    answering = worker.submit(respond, many, name, uploads, question, folder)
    try:
        return answering.result(LONGEST_ANSWER)
    except TimeoutError:
        answering.cancel()
        return "", f"no answer within {LONGEST_ANSWER:.0f} seconds: ask something shorter, or later"
    except Exception:
        say(*traceback.format_exc().splitlines(), error=True)
        return "", "this question could not be answered; whoever serves the page finds the reason there"


def build(many: ManyAdapters, folder: Path) -> Any:
    """Build the page, a `gradio.Blocks`."""
    gradio = _gradio()
    names = [name for name in many.predictors if name is not None]
    most_images = max(predictor.task.image_count for predictor in many.predictors.values())
    first = many.predictor(names[0])
    # The model answers one question at a time.
    worker = ThreadPoolExecutor(max_workers=1)

    def looks(name: str) -> list[Any]:
        """Return updates that show the image fields and the question field that the adapter needs."""
        task = many.predictor(None if name == BASE else name).task
        boxes = [gradio.update(visible=task.image_count > place) for place in range(most_images)]
        about = describe(many.predictor(None if name == BASE else name))
        return [*boxes, gradio.update(visible=task.asks), about, "", gradio.update(visible=False)]

    def ask(name: Any, question: Any, *uploads: dict[str, Any] | None) -> list[Any]:
        answer, problem = answer_in_time(worker, many, str(name), uploads, str(question or ""), folder)
        box = f'<div class="problem" role="alert">{escape(problem)}</div>'
        return [answer, gradio.update(value=box, visible=bool(problem))]

    with gradio.Blocks(title="dept_vl", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown("# Ask about an image")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=5), gradio.Row():
                uploads = [
                    _upload(place, most_images, first.task.image_count) for place in range(most_images)
                ]
            with gradio.Column(scale=4):
                adapter = gradio.Dropdown(
                    [*names, BASE], value=names[0], label="Adapter", elem_id="adapter", filterable=False
                )
                about = gradio.Markdown(describe(first), elem_id="about")
                question = gradio.Textbox(
                    label="Question",
                    placeholder="what colour is the car?",
                    visible=first.task.asks,
                    max_length=MOST_CHARACTERS,
                    elem_id="question",
                )
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
                answer = gradio.Textbox(label="Answer", interactive=False, elem_id="answer")
                problem = gradio.HTML(visible=False, elem_id="problem")
        asked = {
            "inputs": [adapter, question, *uploads],
            "outputs": [answer, problem],
            # Gradio would open images itself, with useless messages for broken ones. `respond` checks them.
            "preprocess": False,
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        pending = [button.click(ask, **asked), question.submit(ask, **asked)]
        shown = [*uploads, question, about, answer, problem]
        # An answer of the former adapter must not come under the name of the new one.
        adapter.change(
            looks, adapter, shown, api_visibility="private", show_progress="hidden", cancels=pending
        )
    return page.queue(max_size=MOST_WAITING)


def _upload(place: int, most_images: int, shown: int) -> Any:
    """Return the upload field of an image; it is visible if at least `place + 1` images are shown."""
    label = "Image" if most_images == 1 else f"Image {place + 1}"
    if most_images == 2:
        label = ("Left image", "Right image")[place]
    return _gradio().Image(
        label=label,
        type="filepath",
        sources=["upload", "clipboard"],
        height=360,
        buttons=[],
        visible=shown > place,
        elem_id=f"image-{place}",
        elem_classes="upload",
    )


def launch(
    many: ManyAdapters,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    password: str | None = None,
    wait: bool = True,
) -> str:
    """Serve the page, by default to this machine only, and without a public link.

    Args:
        many: Adapters to choose from.
        host: Address to listen on; 0.0.0.0 listens on all addresses of this machine.
        port: Port to listen on; None uses a free one.
        password: Password for visitors; the user name is ignored. If None, there is no password on this
            machine, and one is generated and printed if other machines can reach the page.
        wait: Whether to block until interrupted; otherwise the page is served in the background.

    Returns:
        URL of the page.

    Raises:
        ImportError: If Gradio is not installed.
        UsageError: If the password is empty.
    """
    if password is not None:
        password = password.strip("\r\n")  # secrets end with a line end, which nobody can type
        if not password.strip():
            raise UsageError("the password is empty; leave it out for none on this machine")
    gradio = _gradio()
    if password is None and not is_loopback(host):
        password = secrets.token_urlsafe(9)
        say(
            f"warning: everyone who reaches {host} can open this page, and it is not encrypted. The password "
            f"is {password} (any user name); set your own in the environment as {PASSWORD_VARIABLE}",
            error=True,
        )
    folder = uploads_folder()
    page = build(many, folder)
    fonts = ["system-ui", "sans-serif"]  # Gradio's default fonts are fetched from Google
    _, address, _ = page.launch(
        share=False,
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=MOST_UPLOADED,
        state_session_capacity=MOST_SESSIONS,
        app_kwargs={"middleware": [(PageGate, (), {"folder": folder, "password": password})]},
        footer_links=[],
        ssr_mode=False,
        theme=gradio.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )
    if wait:
        say(f"serving at {address}; Ctrl-C ends it")
        page.block_thread()
    return str(address)


def uploads_folder() -> Path:
    """Return the folder for uploads: Gradio's if set, otherwise one that is removed when the program ends."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given is None:
        given = os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="dept-vl-uploads-")
        atexit.register(shutil.rmtree, given, ignore_errors=True)
    return Path(given).resolve()


def serve(config: DemoConfig) -> str:
    """Load the adapters, serve the page until interrupted, and return its URL."""
    _gradio()  # raise a missing import before loading
    disable_progress_bar()
    set_verbosity_error()
    many = load_many(names_of(config.adapters), backbone=config.backbone, device=config.device)
    password = os.environ.get(PASSWORD_VARIABLE) if config.password is None else config.password
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # otherwise the folder of uploads would stay
    return launch(many, host=config.host, port=config.port, password=password)


def _gradio() -> Any:
    # Disable Gradio's telemetry before it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ImportError('the demo needs Gradio: pip install -e ".[demo]"') from None
    return gradio
