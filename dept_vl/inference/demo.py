"""A page on which images are uploaded, questions asked and adapters picked."""

import os
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dept_vl._utils.images import ImageSource
from dept_vl._utils.io import one_line
from dept_vl.config import DemoConfig
from dept_vl.inference.mixed import ManyAdapters, load_many
from dept_vl.inference.predictor import Predictor

BASE = "no adapter (the backbone alone)"
MOST_BYTES = 20 * 2**20
"""Of an upload."""
KEPT = 3600
"""Seconds after which an upload is deleted."""
STYLE = """
.gradio-container {width: min(1080px, 100%) !important; margin: 0 auto !important}
.upload img {width: 100%; height: 100%; object-fit: contain}
#answer textarea {font-size: 1.6rem; font-weight: 600}
.problem {color: #7a2e0e; background: #fffaeb; border: 1px solid #fec84b; border-radius: 8px; padding: 12px}
footer {display: none !important}
"""


def names_of(sources: Sequence[str]) -> dict[str, str]:
    """Adapters by the names that they are shown under: the shortest ends of their paths that differ.

    Raises:
        ValueError: If one is named twice.
    """
    if len(set(sources)) != len(sources):
        raise ValueError(f"an adapter is named twice: {', '.join(sources)}")
    parts = {source: Path(source).parts for source in sources}
    longest = max((len(part) for part in parts.values()), default=1)
    for count in range(1, longest + 1):
        ends = ["/".join(parts[source][-count:]) for source in sources]
        if len(set(ends)) == len(ends):
            return dict(zip(ends, sources, strict=True))
    return {source: source for source in sources}


def describe(predictor: Predictor) -> str:
    """Describe an adapter in Markdown."""
    adapter, backbone = predictor.adapter, predictor.model.backbone
    if adapter is None:
        return f"**{backbone.name}** as it was before any adapter, asked as *{predictor.task.name}*."
    lines = [f"Task *{predictor.task.name}*, on **{backbone.name}**."]
    if adapter.prompt is not None:
        prompt = adapter.prompt
        lines.append(
            f"{prompt['method']}: {prompt['prompt_length']} vectors, rank {prompt['rank']}, texts of at most "
            f"{prompt['max_source_length']} tokens."
        )
    lines.append(f"{adapter.trainable_parameters['total']:,} trained parameters.")
    figures = list(adapter.metrics.items())[:1]
    lines += [f"{name}: {value:.2f}." for name, value in figures]
    return "  \n".join(lines)


def respond(
    many: ManyAdapters, name: str, uploads: Sequence[dict[str, Any] | None], question: str
) -> tuple[str, str]:
    """The answer, and what is wrong or noteworthy; either may be empty.

    Args:
        many: The adapters.
        name: Of the one that is picked.
        uploads: What Gradio says of each uploaded file, `path` and `orig_name`; None for none.
        question: As typed.
    """
    adapter = None if name == BASE else name
    shown: dict[str, str] = {}
    try:
        task = many.predictor(adapter).task
        images: list[ImageSource] = []
        for upload in uploads[: task.image_count]:
            path = (upload or {}).get("path")
            if upload is None or path is None:
                each = "an image" if task.image_count == 1 else f"{task.image_count} images"
                raise ValueError(f"{task.name} asks about {each}: upload {each}")
            shown[str(path)] = str(upload.get("orig_name") or "the upload")
            images.append(Path(path))
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", UserWarning)
            answers = many.answer(
                [tuple(images)], question if task.asks else "", adapters=adapter, batch_size=1
            )
        return answers[0], " ".join(str(note.message) for note in noted)
    except (ValueError, OSError) as error:
        problem = one_line(error)
        for path, own_name in shown.items():
            problem = problem.replace(path, own_name)
        return "", problem


def build(many: ManyAdapters) -> Any:
    """The page, a `gradio.Blocks`.

    Raises:
        ImportError: If Gradio is not installed.
    """
    gradio = _gradio()
    names = [name for name in many.predictors if name is not None]
    most_images = max(predictor.task.image_count for predictor in many.predictors.values())
    first = many.predictor(names[0])

    def looks(name: str) -> list[Any]:
        """What is shown for an adapter: images as many as it asks about, a question if it has one."""
        task = many.predictor(None if name == BASE else name).task
        boxes = [gradio.update(visible=task.image_count > place) for place in range(most_images)]
        about = describe(many.predictor(None if name == BASE else name))
        return [*boxes, gradio.update(visible=task.asks), about, "", gradio.update(visible=False)]

    def ask(name: str, question: str, *uploads: dict[str, Any] | None) -> list[Any]:
        answer, problem = respond(many, name, uploads, question or "")
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
                    elem_id="question",
                )
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
                answer = gradio.Textbox(label="Answer", interactive=False, elem_id="answer")
                problem = gradio.HTML(visible=False, elem_id="problem")
        asked = {
            "inputs": [adapter, question, *uploads],
            "outputs": [answer, problem],
            # Gradio would open an image by itself, and say nothing useful of one that is broken. That an
            # upload is one is still checked.
            "preprocess": False,
            # One model, which one question at a time goes through.
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        button.click(ask, **asked)
        question.submit(ask, **asked)
        shown = [*uploads, question, about, answer, problem]
        adapter.change(looks, adapter, shown, api_visibility="private", show_progress="hidden")
    return page


def _upload(place: int, most_images: int, shown: int) -> Any:
    """The field of an image, visible for the first of them."""
    return _gradio().Image(
        label="Image" if most_images == 1 else ("Left image", "Right image")[place],
        type="filepath",
        sources=["upload", "clipboard"],
        height=360,
        buttons=[],
        visible=shown > place,
        elem_id=f"image-{place}",
        elem_classes="upload",
    )


def launch(many: ManyAdapters, *, host: str = "127.0.0.1", port: int | None = 7860, wait: bool = True) -> str:
    """Serve the page: to this machine alone, unless another host is named; with no link to share it.

    Args:
        many: The adapters.
        host: Address to listen at; 0.0.0.0 is every one of this machine's.
        port: To listen at; None takes a free one.
        wait: Until it is interrupted. Else it is served in the background.

    Returns:
        The page's address.

    Raises:
        ImportError: If Gradio is not installed.
    """
    page = build(many)
    gradio = _gradio()
    fonts = ["system-ui", "sans-serif"]  # the page's own would come from a server of Google's
    _, address, _ = page.launch(
        share=False,
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=MOST_BYTES,
        footer_links=[],
        ssr_mode=False,
        theme=gradio.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )
    if wait:
        print(f"serving at {address}; Ctrl-C ends it", flush=True)
        page.block_thread()
    return str(address)


def serve(config: DemoConfig) -> str:
    """Load the adapters and serve until interrupted; returns the page's address."""
    _gradio()  # now, rather than after loading
    disable_progress_bar()
    set_verbosity_error()
    many = load_many(names_of(config.adapters), backbone=config.backbone, device=config.device)
    return launch(many, host=config.host, port=config.port)


def _gradio() -> Any:
    # Before it is imported: it would call home.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ImportError('the demo needs Gradio: pip install -e ".[demo]"') from None
    return gradio
