"""What strangers wrote, where it is shown."""

import io
import sys
import warnings
from pathlib import Path

import pytest

import dept_vl
from dept_vl._utils.printable import markdown_text, notes_caught, printable, say, warn


@pytest.mark.parametrize(
    "text", ["győri", "日本\u3000語", "a\xa0b", "नमस्\u200dते", "👩\u200d🚀", "می\u200cخواهم"]
)
def test_text_of_every_script_stays(text: str) -> None:
    assert printable(text) == text


def test_what_steers_a_terminal_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a\x1b]0;x\x07\r\x9b\u202e\u2028\ud800\n\tb"
    said = r"a\x1b]0;x\x07\r\x9b\u202e\u2028\ud800\n\tb"
    assert printable(odd) == said
    assert printable(odd, lines=True) == said.replace(r"\n\t", "\n\t")
    say(odd, 7)
    say(odd, error=True)
    assert capsys.readouterr() == (f"{said}\n7\n", f"{said}\n")
    with pytest.warns(UserWarning, match="x1b") as noted:
        warn(odd)
    assert str(noted[0].message) == said


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", r"gy\u0151r é"), ("ascii", r"gy\u0151r \xe9")])
def test_what_a_terminal_cannot_show_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    say("győr é")
    assert written.getvalue() == f"{shown}\n".encode(encoding)


def test_of_several_processes_the_main_one_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    say("not this")
    say("this", each=True)
    assert capsys.readouterr().out == "this\n"


@pytest.mark.parametrize(
    "text",
    ["<b>", "![x](y)", "[x](y)", "[1](y)", "[1]: y", "a|b", "`x`", "*x*", "_x_", "$x$", "&lt;", "~~x~~"],
)
def test_markup_is_none(text: str) -> None:
    said = markdown_text(text)
    assert said != text
    assert not set("<`*|$~") & set(said)
    assert "](" not in said.replace("&#93;", "]") or "&#91;" in said


@pytest.mark.parametrize("text", ["question_type/is", "yes/no (0-100)", "refused [2]", "<= 0.70", "A & B"])
def test_usual_text_is_readable(text: str) -> None:
    assert markdown_text(text) == text


def test_the_package_prints_in_one_place() -> None:
    """The linter sees `print`, not that of accelerate."""
    package = Path(dept_vl.__file__).parent
    assert [path for path in package.rglob("*.py") if "accelerator.print" in path.read_text()] == []


def test_warnings_of_other_packages_are_no_notes() -> None:
    with notes_caught() as notes:
        warn("cut to\n20 tokens")
        warnings.warn("a keyword is deprecated", DeprecationWarning, stacklevel=1)
        warnings.warn("not of this package", UserWarning, stacklevel=1)
    assert notes == [printable("cut to\n20 tokens")]
