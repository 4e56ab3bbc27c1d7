"""Raw requests to a running page, as a stranger sends them: nothing of this machine is read or told apart."""

import json
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_image
from pages import PATIENCE, Visitor, many_of
from starlette.datastructures import Headers

from dept_vl.inference.demo import MOST_CHARACTERS, MOST_WAITING, launch
from dept_vl.inference.gate import MOST_ASKED, MOST_UPLOADED, Refused, check_size, cleaned, upload_at
from dept_vl.inference.mixed import ManyAdapters
from dept_vl.models.backbone import Backbone

MARK = "what-nobody-may-read"
META = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def page(
    make_backbone: Callable[..., Backbone], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ManyAdapters, Path]]:
    """Address, adapters and folder of uploads."""
    gradio = pytest.importorskip("gradio")
    root = tmp_path_factory.mktemp("page")
    many = many_of(make_backbone("t5"), root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "uploads"))
        yield launch(many, port=None, wait=False), many, root / "uploads"
    gradio.close_all()


@pytest.fixture(scope="module")
def files(page: tuple[str, ManyAdapters, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of as many kinds, none of which is an upload: pictures, texts, folders, nothing."""
    root = tmp_path_factory.mktemp("secrets")
    random_image((64, 48), 3).save(root / "picture.png")
    (root / "text.txt").write_text(MARK)
    (root / "empty.png").touch()
    (root / "folder.png").mkdir()
    uploads = page[2]
    uploads.mkdir(exist_ok=True)
    for name in ("picture.png", "text.txt", "nowhere.png"):
        (uploads / f"link-{name}").symlink_to(root / name)
    (uploads / "into").symlink_to(root)
    broken = [uploads / "link-picture.png", uploads / "link-nowhere.png", uploads / "into" / "picture.png"]
    names = ("picture.png", "text.txt", "empty.png", "folder.png", "nowhere.png")
    return [*(str(root / name) for name in names), *map(str, broken), "/etc/passwd", "/", str(uploads)]


def spelled(path: str, uploads: Path, chance: random.Random) -> str:
    """A path, written in one of many ways."""
    up = "/".join([".."] * 20)
    ways = [
        path,
        f"{uploads}/{up}{path}",
        f"{uploads}/./x/..//{up}{path}",
        f"//{path}",
        f"file://{path}",
        urllib.parse.quote(path, safe=""),
        urllib.parse.quote(urllib.parse.quote(path, safe=""), safe=""),
        path + "\0.png",
        path + " ",
        f"{up}{path}",
        f"/proc/self/root{path}",
        f"~root/{up}{path}",
        path.replace("/", "\\"),
        path + "/." * chance.randrange(1, 2000),
        f"http://127.0.0.1{path}",
        f"data:image/png;base64,{path}",
        f"/gradio_api/file={path}",
    ]
    return chance.choice(ways)


def image_of(path: str, chance: random.Random, address: str) -> Any:
    """What a request may say that an image is."""
    url = f"{address}gradio_api/file={path}"
    ways: list[Any] = [
        {"path": path},
        {"path": path, **META},
        {"path": path, "url": url, **META},
        {"path": path, "is_stream": True, "size": 1, "mime_type": "image/png", **META},
        {"path": url, "url": path, **META},
        {"path": {"path": path, **META}, **META},
        {"path": [path], **META},
        {"url": f"file://{path}"},
        {"path": None, "url": path, **META},
        [{"path": path, **META}],
        {"image": {"path": path, **META}, "value": {"path": path, **META}},
        {"background": {"path": path}, "layers": [{"path": path}], "composite": {"path": path}},
        {"__type__": "update", "value": path},
        path,
        {"path": path, "orig_name": "../" * 9 + "x", "meta": {"_type": "gradio.FileData", "x": [[{}]]}},
    ]
    return chance.choice(ways)


@pytest.mark.parametrize("ways", [10, pytest.param(25, marks=pytest.mark.slow)])
def test_questions_about_files_of_the_server_learn_nothing(
    page: tuple[str, ManyAdapters, Path], files: list[str], ways: int
) -> None:
    address, many, uploads = page
    visitor = Visitor(address)
    own = visitor.upload((Path(files[0])).read_bytes())
    good = many.answer(files[0], "what?", adapters="colours")
    assert visitor.ask({"path": own, **META}, "what?") == (good, "")
    sent = 0
    for seed in range(ways):
        said = set()
        for path in files:
            chance = random.Random(seed)  # the same way for every file
            image = image_of(spelled(path, uploads, chance), chance, address)
            answer, problem = visitor.ask(image, "what?")
            assert answer != good
            assert MARK not in problem
            assert path == "/" or path not in problem
            said.add((answer, problem))
            sent += 1
        assert len(said) == 1, (seed, said)
    assert sent >= 10 * ways
    assert visitor.ask({"path": own, **META}, "what?") == (good, "")


def test_what_is_uploaded_and_no_image_is_not_told_from_what_is_missing(
    page: tuple[str, ManyAdapters, Path], files: list[str]
) -> None:
    address, _, uploads = page
    visitor = Visitor(address)
    broken = [visitor.upload(content) for content in (b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(99))]
    paths = [*broken, str(uploads / "gone.png"), str(Path(broken[0]).parent), *files]
    assert len({visitor.ask({"path": path, "orig_name": "a.png"}, "what?") for path in paths}) == 1


def test_other_requests_learn_nothing(page: tuple[str, ManyAdapters, Path], files: list[str]) -> None:
    address, _, uploads = page
    visitor, chance = Visitor(address), random.Random(0)
    ways = [
        "gradio_api/file={}",
        "gradio_api/file/{}",
        "gradio_api/proxy=http://127.0.0.1{}",
        "gradio_api/stream/{}",
        "gradio_api/run/ask?{}",
        "gradio_api/call/ask?{}",
        "static/{}",
        "assets/{}",
        "svelte/{}",
        "{}",
        "gradio_api/custom_component/x/y/z/{}",
        "monitoring/{}",
        "gradio_api/component_server?{}",
        "gradio_api/process_recording?{}",
        "gradio_api/vibe-code/?{}",
        "gradio_api/runs?{}",
        "gradio_api/openapi.json?{}",
        "gradio_api/deep_link?session_hash={}",
        "gradio_api/startup-events/{}",
        "gradio_api/../{}",
    ]
    for way in ways:
        for _ in range(3):
            state = chance.getrandbits(32)
            said = set()
            for path in files[:5]:
                odd = urllib.parse.quote(spelled(path, uploads, random.Random(state)), safe="/:=%")
                for content in (None, json.dumps({"data": [{"path": path, **META}]}).encode()):
                    status, body = visitor.send(way.format(odd), content)
                    assert 400 <= status < 500, (way, status)
                    assert MARK.encode() not in body
                    assert b"PNG" not in body
                    said.add((content is None, status, body))
            assert len(said) <= 2, (way, said)
    assert visitor.status("") == 200


def test_an_upload_is_shown_again(page: tuple[str, ManyAdapters, Path], files: list[str]) -> None:
    visitor = Visitor(page[0])
    content = Path(files[0]).read_bytes()
    own = visitor.upload(content)
    assert visitor.send(f"gradio_api/file={own}") == (200, content)


def test_requests_are_bounded(page: tuple[str, ManyAdapters, Path], files: list[str]) -> None:
    address, many, _ = page
    visitor = Visitor(address)
    own = visitor.upload(Path(files[0]).read_bytes())
    started = time.monotonic()
    assert visitor.ask({"path": own}, "x" * 5_000_000)[0] == 413
    answer, problem = visitor.ask({"path": own}, "x" * (MOST_CHARACTERS + 1))
    assert (answer, f"{MOST_CHARACTERS + 1:,} characters" in problem) == ("", True)
    for body in (
        b"",
        b"[",
        b"[]",
        b"{}",
        b'{"data": 1}',
        b"[" * 60_000,
        b'{"data":' * 7_000,
        b"\xff",
        b"null",
    ):
        assert visitor.send("gradio_api/queue/join", body)[0] == 400
    assert visitor.send("gradio_api/queue/join", b" " * (MOST_ASKED + 1))[0] == 413
    assert visitor.send("gradio_api/upload", b" " * (MOST_UPLOADED + MOST_ASKED + 1), "text/x")[0] == 413
    assert visitor.send("gradio_api/queue/join", method="POST")[0] in (400, 411)
    for name in ("no such adapter", None, 3, ["colours"], {"path": own}):
        more = {"data": [name, "what?", {"path": own}, None]}
        answer, problem = visitor.ask(None, "", **more)
        assert (answer, "there is no adapter" in problem) == ("", True)
    for number in (99, -1, 3, "x", "0", None, True, 0.0):
        assert visitor.ask({"path": own}, "what?", fn_index=number)[0] == 400
    for odd in ({"data": []}, {"session_hash": {}}):
        assert visitor.ask({"path": own}, "what?", **odd)[0] in (None, 400, 404, 422, 500)
    assert visitor.ask({"path": own}, "what?") == (many.answer(files[0], "what?", adapters="colours"), "")
    assert time.monotonic() - started < PATIENCE


def test_three_hundred_questions_at_once_leave_room_for_the_next_visitor(
    page: tuple[str, ManyAdapters, Path], files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, many, _ = page
    visitor = Visitor(address)
    own = visitor.upload(Path(files[0]).read_bytes())
    go = threading.Event()
    slow = ManyAdapters.answer

    def after(*given: Any, **named: Any) -> Any:
        go.wait(PATIENCE)
        return slow(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ManyAdapters, "answer", after)
        statuses = []
        for number in range(300):
            asked = {
                "data": ["colours", "what?", {"path": own}, None],
                "fn_index": 0,
                "session_hash": f"s{number}",
            }
            statuses.append(visitor.send("gradio_api/queue/join", json.dumps(asked).encode())[0])
        go.set()
    assert statuses.count(200) <= MOST_WAITING + 2
    assert set(statuses) == {200, 503}
    started = time.monotonic()
    while (found := visitor.ask({"path": own}, "what?"))[0] == 503 and time.monotonic() - started < PATIENCE:
        time.sleep(0.05)
    assert found == (many.answer(files[0], "what?", adapters="colours"), "")


@pytest.mark.parametrize("digits", ["101", "0" * 30 + "101", "1" + "0" * 5000])
def test_a_length_is_a_number_however_it_is_written(digits: str) -> None:
    with pytest.raises(Refused) as refused:
        check_size(Headers({"content-length": digits}), 100)
    assert refused.value.status == 413
    check_size(Headers({"content-length": "000100"}), 100)
    for length in ({}, *({"content-length": odd} for odd in ("-1", "", "\xb2"))):
        with pytest.raises(Refused) as refused:
            check_size(Headers(length), 100)
        assert refused.value.status == 411


def test_what_is_left_of_a_question() -> None:
    odd = {"path": "p", "orig_name": 3, "url": "u", "meta": {}}
    asked = {"data": ["a", 1, [], odd, {"url": "u"}, None], "fn_index": 0, "event_data": {"path": "p"}}
    assert json.loads(cleaned(json.dumps(asked).encode())) == {
        "data": ["a", None, None, {"path": "p"}, None, None],
        "fn_index": 0,
    }


def test_an_upload_lies_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a").touch()
    (tmp_path / "uploads-not").mkdir()
    (tmp_path / "uploads-not" / "a").touch()
    (tmp_path / "link").symlink_to(folder)
    for path in (folder / "a", tmp_path / "link" / "a", folder / ".." / "uploads" / "a"):
        assert upload_at(str(path), folder) == folder / "a"
    ring = folder / "ring"
    ring.symlink_to(ring)
    odd = ("", "a", "\0", "x" * 9999, str(ring), str(folder), str(tmp_path / "uploads-not" / "a"))
    assert [upload_at(path, folder) for path in odd] == [None] * len(odd)
