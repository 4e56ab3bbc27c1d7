"""The page, as a visitor uses it: in Chromium, with an image uploaded."""

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_image

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.demo import BASE, launch, names_of, respond
from dept_vl.inference.loading import load
from dept_vl.inference.mixed import ManyAdapters
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

TASKS = {"colours": "vqav2", "pairs": "nlvr2", "captions": "coco"}
MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
PATIENCE = 60
"""Seconds for what takes a fraction of one, on a machine with other work."""


@pytest.fixture
def many(make_backbone: Callable[..., Backbone], tmp_path: Path) -> ManyAdapters:
    """An adapter of each kind of task, with the answers of random weights."""
    backbone = make_backbone("t5")
    predictors = {}
    for name, task in TASKS.items():
        own = backbone.with_projection(backbone.visual_projection)
        prompt = DePT(own.d_model, prompt_length=3, rank=2, max_source_length=12)
        for parameter in prompt.parameters():
            torch.nn.init.normal_(parameter)
        Adapter.of(PromptedModel(own, prompt), task=task, metrics={"overall": 61.5}).save(tmp_path / name)
        predictors[name] = load(tmp_path / name, backbone=backbone)
    return ManyAdapters(backbone, predictors)


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


def test_what_the_page_says(many: ManyAdapters, picture: Path, broken: Path) -> None:
    shown = upload(picture)
    answer = many.answer(picture, "what colour?", adapters="colours")
    assert answer
    assert respond(many, "colours", [shown, None], "what colour?") == (answer, "")
    base = many.answer(picture, "what colour?", adapters=None)
    assert respond(many, BASE, [shown, None], "what colour?") == (base, "")
    assert respond(many, "captions", [shown, shown], "of another adapter")[1] == ""
    assert respond(many, "pairs", [shown, shown], "both are red")[0] in ("true", "false")


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
    assert problem.startswith("broken.png is no readable image")
    assert str(broken.parent) not in problem
    answer, noted = respond(many, "colours", [shown, None], "what colour is it " * 9)
    assert answer
    assert "is cut to 12" in noted


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

    def pick(self, adapter: str) -> None:
        self.find("#adapter input").click()

        def option() -> Any:
            # The list opens empty, and may be drawn again while it is read.
            options = self.driver.find_elements("css selector", "[role=option]")
            return next((one for one in options if one.text.strip().endswith(adapter)), None)

        self.wait(option).click()


@needs_browser
def test_a_visitor_asks_and_picks_another_adapter(
    many: ManyAdapters, picture: Path, broken: Path, address: str, browser: Any
) -> None:
    expected = {name: many.answer(picture, "what colour?", adapters=name) for name in ("colours", None)}
    assert expected["colours"] != expected[None]
    page = Page(browser, address)
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
    assert page.find("#problem .problem").text.startswith("broken.png is no readable image")
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

    def send(path: str, content: bytes, kind: str) -> bytes:
        request = urllib.request.Request(f"{address}gradio_api/{path}", content, {"Content-Type": kind})
        body: bytes = urllib.request.urlopen(request).read()
        return body

    def ask(path: str) -> dict[str, Any]:
        """As the page does it, about any file of this machine."""
        shown = {"path": path, "meta": {"_type": "gradio.FileData"}}
        question = {"data": ["colours", "what?", shown, None], "fn_index": 0, "session_hash": "one"}
        send("queue/join", json.dumps(question).encode(), "application/json")
        events = urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=one")
        lines = (json.loads(line.removeprefix(b"data:")) for line in events if line.startswith(b"data:"))
        found: dict[str, Any] = next(event for event in lines if event["msg"] == "process_completed")
        return found

    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    (uploaded,) = json.loads(
        send("upload", form + picture.read_bytes() + b"\r\n--x--", "multipart/form-data; boundary=x")
    )
    answered = ask(uploaded)
    assert answered["success"]
    assert answered["output"]["data"][0] == many.answer(picture, "what?", adapters="colours")
    assert not ask(str(picture))["success"]
