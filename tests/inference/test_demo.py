"""The page, as a visitor uses it: in Chromium, with an image uploaded."""

import atexit
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import random_image
from pages import Visitor, many_of
from PIL import Image
from runs import forking

from dept_vl._utils.errors import UsageError
from dept_vl.inference import demo
from dept_vl.inference.demo import BASE, is_loopback, launch, names_of
from dept_vl.inference.gate import CALLS
from dept_vl.inference.mixed import ManyAdapters
from dept_vl.inference.options import DemoConfig
from dept_vl.models.backbone import Backbone

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
PATIENCE = 60
"""Seconds for what takes a fraction of one, on a machine with other work."""


@pytest.fixture
def many(make_backbone: Callable[..., Backbone], tmp_path: Path) -> ManyAdapters:
    """An adapter of each kind of task, with the answers of random weights."""
    return many_of(make_backbone("t5"), tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    random_image((64, 48), 3).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no image" * 20)
    return tmp_path / "broken.png"


def upload(path: Path) -> dict[str, Any]:
    return {"path": str(path), "orig_name": path.name}


def respond(many: ManyAdapters, name: str, uploads: list[Any], question: str) -> tuple[str, str]:
    folder = next((Path(one["path"]).parent for one in uploads if one), Path("nowhere"))
    return demo.respond(many, name, uploads, question, folder)


def test_what_the_page_says(many: ManyAdapters, picture: Path, broken: Path) -> None:
    shown = upload(picture)
    answer = many.answer(picture, "what colour?", adapters="colours")
    assert answer
    assert respond(many, "colours", [shown, None], "what colour?") == (answer, "")
    base = many.answer(picture, "what colour?", adapters=None)
    assert respond(many, BASE, [shown, None], "what colour?") == (base, "")
    assert respond(many, "captions", [shown, shown], "of another adapter")[1] == ""
    assert respond(many, "pairs", [shown, shown], "both are red")[0] in ("true", "false")


@pytest.mark.parametrize("exif", [True, False])
def test_an_upload_is_turned_as_the_backbone_turns_images(
    many: ManyAdapters, tmp_path: Path, exif: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many.backbone, "exif", exif)
    turned = Image.Exif()
    turned[0x0112] = 6
    path = tmp_path / "turned.jpg"
    random_image((64, 48), 3).save(path, exif=turned)
    asked: list[Any] = []

    def answer(_: ManyAdapters, images: list[Any], *__: Any, **___: Any) -> list[str]:
        asked.extend(images[0])
        return ["x"]

    monkeypatch.setattr(ManyAdapters, "answer", answer)
    respond(many, "colours", [upload(path), None], "what?")
    assert [image.size for image in asked] == [(48, 64) if exif else (64, 48)]


def test_what_is_wrong_is_said_on_the_page(many: ManyAdapters, picture: Path, broken: Path) -> None:
    shown = upload(picture)
    assert respond(many, "colours", [None, None], "what?") == (
        "",
        "vqav2 asks about an image: upload an image",
    )
    assert "upload 2 images" in respond(many, "pairs", [shown, None], "what?")[1]
    assert respond(many, "colours", [shown, None], " ")[1].endswith("this one is empty; ask something")
    answer, problem = respond(many, "colours", [upload(broken), None], "what?")
    assert answer == ""
    assert problem.startswith("broken.png is not a readable image")
    assert str(broken.parent) not in problem
    answer, noted = respond(many, "colours", [shown, None], "what colour is it " * 9)
    assert answer
    assert "is cut to 12" in noted


@pytest.mark.parametrize(
    ("count", "labels"),
    [(2, ["Left image", "Right image"]), (3, ["Image 1", "Image 2", "Image 3"])],
)
def test_each_image_of_a_question_has_a_field(
    many: ManyAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, labels: list[str]
) -> None:
    gradio = pytest.importorskip("gradio")
    monkeypatch.setattr(type(many.predictor("pairs").task), "image_count", count)
    page = demo.build(many, tmp_path)
    assert [part.label for part in page.blocks.values() if isinstance(part, gradio.Image)] == labels


def test_adapters_are_shown_by_the_ends_of_their_paths() -> None:
    assert names_of(["runs/one", "user/two"]) == {"one": "runs/one", "two": "user/two"}
    assert list(names_of(["a/best", "b/best"])) == ["a/best", "b/best"]
    with pytest.raises(ValueError, match="named twice"):
        names_of(["a", "a"])


@pytest.fixture
def address(many: ManyAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    yield launch(many, port=None, wait=False)
    gradio.close_all()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "no-first-run", "window-size=1280,900"),
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.find("#ask"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition())

    def find(self, selector: str) -> Any:
        found = self.driver.find_elements("css selector", selector)
        return found[0] if found else None

    def seen(self, selector: str) -> bool:
        found = self.find(selector)
        return found is not None and found.is_displayed()

    def upload(self, path: Path, place: int = 0) -> None:
        box = f"#image-{place}"
        if self.find(f"{box} button[aria-label='Clear']"):
            self.find(f"{box} button[aria-label='Clear']").click()
        self.wait(lambda: self.find(f"{box} input[type=file]")).send_keys(str(path))
        self.wait(lambda: self.find(f"{box} img"))

    def ask(self, question: str | None = None) -> None:
        if question is not None:
            box = self.find("#question textarea, #question input")
            box.clear()
            box.send_keys(question)
        self.find("#ask").click()

    def answer(self) -> str:
        text: str = self.find("#answer textarea, #answer input").get_property("value")
        return text

    def contrast(self, selector: str, part: str) -> float:
        """Contrast of a part of an element with its background, from 1 to 21, as in WCAG 2.1."""
        script = (
            "const at = (e, p) => getComputedStyle(e, p); const e = document.querySelector(arguments[0]);"
        )
        script += "return [at(e, arguments[1]).color, at(e).backgroundColor]"
        light = []
        for colour in self.driver.execute_script(script, selector, part):
            parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
            light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
        return (max(light) + 0.05) / (min(light) + 0.05)

    def pick(self, adapter: str) -> None:
        self.find("#adapter input").click()

        def option() -> Any:
            # The list opens empty, and may be drawn again while it is read.
            options = self.driver.find_elements("css selector", "[role=option]")
            return next((one for one in options if one.text.strip().endswith(adapter)), None)

        self.wait(option).click()


@needs_browser
def test_an_answer_does_not_come_under_another_adapter(
    many: ManyAdapters, picture: Path, address: str, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, held, original = threading.Event(), threading.Event(), demo.answer_in_time

    def late(*asked: Any) -> tuple[str, str]:
        arrived.set()
        held.wait(PATIENCE)
        return original(*asked)

    monkeypatch.setattr(demo, "answer_in_time", late)
    page = Page(browser, address)
    page.upload(picture)
    page.ask("what colour?")
    assert arrived.wait(PATIENCE)
    page.pick(BASE)
    page.wait(lambda: "before any adapter" in page.find("#about").text)
    held.set()
    time.sleep(1)  # the answer of the first adapter would come now
    assert page.answer() == ""
    page.ask()
    page.wait(lambda: page.answer() == many.answer(picture, "what colour?", adapters=None))


@needs_browser
def test_a_visitor_asks_and_picks_another_adapter(
    many: ManyAdapters, picture: Path, broken: Path, address: str, browser: Any
) -> None:
    expected = {name: many.answer(picture, "what colour?", adapters=name) for name in ("colours", None)}
    assert expected["colours"] != expected[None]
    page = Page(browser, address)
    assert page.contrast("#question textarea, #question input", "::placeholder") >= 4.5
    page.upload(picture)
    page.ask("what colour?")
    page.wait(lambda: page.answer() == expected["colours"])
    assert not page.seen("#problem .problem")

    page.pick(BASE)
    page.wait(lambda: page.answer() == "")
    page.ask()
    page.wait(lambda: page.answer() == expected[None])

    page.upload(broken)
    page.ask()
    page.wait(lambda: page.seen("#problem .problem"))
    assert page.find("#problem .problem").text.startswith("broken.png is not a readable image")
    assert page.answer() == ""
    assert "Traceback" not in browser.page_source
    entries = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(entry.startswith((address, "data:", "blob:")) for entry in entries)

    assert not page.seen("#image-1")
    page.pick("pairs")
    page.wait(lambda: page.seen("#image-1"))
    page.upload(picture)
    page.upload(picture, 1)
    page.ask("both are red")
    page.wait(lambda: page.answer() in ("true", "false"))
    page.pick("captions")
    page.wait(lambda: not page.seen("#question"))
    page.ask()
    page.wait(lambda: page.answer() == many.answer(picture, adapters="captions"))


def test_the_page_is_for_this_machine_and_reads_uploads_alone(
    many: ManyAdapters, picture: Path, address: str
) -> None:
    assert address.startswith("http://127.0.0.1:")
    page = urllib.request.urlopen(address).read().decode()
    assert '"analytics_enabled":false' in page.replace(" ", "")
    assert "fonts.googleapis.com" not in page

    calls = json.loads(urllib.request.urlopen(f"{address}config").read())["dependencies"]
    assert [call["id"] for call in calls if call["backend_fn"]] == list(CALLS)

    visitor = Visitor(address)
    answer, problem = visitor.ask({"path": visitor.upload(picture.read_bytes())}, "what?")
    assert (answer, problem) == (many.answer(picture, "what?", adapters="colours"), "")
    assert visitor.ask({"path": str(picture)}, "what?")[0] == ""


def test_an_address_that_others_reach_has_a_password(
    many: ManyAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr("dept_vl.inference.gate.AFTER_WRONG_PASSWORD", 0.0)
    launch(many, host="0.0.0.0", port=None, wait=False)
    said = capsys.readouterr().err
    assert said.startswith("warning: everyone who reaches 0.0.0.0")
    made_up = said.split("The password is ")[1].split()[0]
    address = launch(many, password="p:ä\n", port=None, wait=False)
    assert capsys.readouterr().err == ""
    try:
        for path in ("", "config", "gradio_api/queue/data?session_hash=x", "gradio_api/heartbeat/x", "x"):
            for password in (None, "", "p", made_up):
                assert Visitor(address, password).status(path) == 401
        assert Visitor(address, "p:ä").status("") == 200
    finally:
        gradio.close_all()
    with pytest.raises(UsageError):
        launch(many, password=" ", port=None, wait=False)


def page_until_ended(folder: Path) -> None:
    """Serve a page that answers nothing; a forked process leaves out what is registered for its end."""
    os.environ.pop(demo.FOLDER_VARIABLE, None)
    tempfile.tempdir = str(folder)
    atexit._clear()  # of the process that this one is forked from

    class Page:
        def launch(self, *_: object, **__: object) -> tuple[None, str, None]:
            return None, "here", None

        def block_thread(self) -> None:
            signal.pause()

    demo.load_many = demo.build = lambda *_, **__: Page()  # type: ignore[assignment]
    try:
        demo.serve(DemoConfig(("runs/vqa",)))
    finally:
        atexit._run_exitfuncs()


def test_uploads_are_removed_when_the_page_is_ended(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    process = forking().Process(target=page_until_ended, args=(tmp_path,))
    process.start()
    try:
        latest = time.monotonic() + PATIENCE
        while not list(tmp_path.glob("dept-vl-uploads-*")):
            assert process.is_alive()
            assert time.monotonic() < latest
            time.sleep(0.05)
        process.terminate()
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        process.kill()
    assert not list(tmp_path.glob("dept-vl-uploads-*"))


def test_which_addresses_are_of_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "example.org", "localhost.example.org"))
    )


def test_nobody_waits_for_ever_and_a_bug_stays_on_this_side(
    many: ManyAdapters,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "LONGEST_ANSWER", 0.05)
    ended = threading.Event()
    asked = ("colours", [upload(picture)], "what?", picture.parent)
    with ThreadPoolExecutor(1) as worker:
        monkeypatch.setattr(ManyAdapters, "answer", lambda *_, **__: str(ended.wait(PATIENCE)))
        answer, problem = demo.answer_in_time(worker, many, *asked)
        ended.set()
        assert answer == ""
        assert problem.startswith("no answer within")
    monkeypatch.setattr(demo, "LONGEST_ANSWER", PATIENCE)
    monkeypatch.setattr(ManyAdapters, "answer", lambda *_, **__: {}["/secret/\x1b"])
    with ThreadPoolExecutor(1) as worker:
        answer, problem = demo.answer_in_time(worker, many, *asked)
    assert (answer, "secret" in problem) == ("", False)
    assert "KeyError" in (said := capsys.readouterr().err)
    assert "\x1b" not in said


def test_an_answer_that_takes_too_long_ends_and_the_next_is_given(
    many: ManyAdapters, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    language = many.backbone.language

    def slowly(*_: Any) -> None:
        steps.append(1)
        time.sleep(0.05)

    many.answer(picture, adapters="captions", batch_size=1)
    hook = language.decoder.register_forward_pre_hook(slowly)
    expected = many.answer(picture, adapters="captions", batch_size=1)
    whole, seconds = len(steps), 0.05 * len(steps)
    assert whole >= 8  # or nothing could be cut
    steps.clear()
    monkeypatch.setattr(demo, "LONGEST_ANSWER", seconds / 3)
    with ThreadPoolExecutor(1) as worker:
        answer, problem = demo.answer_in_time(worker, many, "captions", [upload(picture)], "", picture.parent)
        worker.submit(lambda: None).result()
        assert 0 < len(steps) < whole
        assert answer == ""
        assert problem.startswith("no answer within")
        hook.remove()
        monkeypatch.setattr(demo, "LONGEST_ANSWER", float(PATIENCE))
        asked = ("captions", [upload(picture)], "", picture.parent)
        assert demo.answer_in_time(worker, many, *asked) == (expected, "")


def test_texts_of_strangers_are_no_markup(many: ManyAdapters) -> None:
    predictor = many.predictor("colours")
    assert predictor.adapter is not None
    odd = "![x](http://example.org/a)\n# <script>alert(1)</script>\x1b[31m"
    predictor.adapter.metrics.clear()
    predictor.adapter.metrics[odd] = 1.0
    predictor.model.backbone.name = odd
    said = demo.describe(predictor)
    assert not set("<>[]\x1b#!") & set(said.replace("&#", ""))
    assert "http://" not in said
    assert len(said.splitlines()) == 4
