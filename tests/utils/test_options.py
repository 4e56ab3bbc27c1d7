"""Options from a file: every mistake is named, what exists is listed once for each group."""

import pytest

from dept_vl._utils.errors import UsageError
from dept_vl._utils.options import build
from dept_vl.config import RunConfig


def test_what_exists_is_listed_once_for_each_group() -> None:
    wrong = {"data": {"tsk": 1, "alpha": 2, "rank": 3}, "prompt": {"metod": "dept"}}
    with pytest.raises(UsageError) as error:
        build(RunConfig, wrong)
    message = str(error.value)
    assert [message.count(name) for name in ("data.tsk", "data.alpha", "data.rank", "prompt.metod")] == [
        1
    ] * 4
    # Of the data, and of the prompt.
    assert [message.count(name) for name in ("holdout_images", "init_parts")] == [1, 1]
    assert "closest: task" in message
    assert "closest: method" in message
