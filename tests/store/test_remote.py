"""Requests to a store: which are retried, which are given up, and the error messages."""

from collections.abc import Callable

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from botocore.parsers import ResponseParserError

from backlens.errors import BacklensError, Interrupted
from backlens.store import directory as remote
from backlens.store.directory import ask, file_system


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT_SECONDS", 0.0)


def failing(times: int, error: Exception) -> Callable[[], int]:
    """Fails so many times, then returns how often it was called."""
    calls = 0

    def call() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error
        return calls

    return call


@pytest.mark.parametrize(
    "error",
    [
        OSError(16, "Please reduce your request rate."),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(),
        ResponseParserError("Unable to parse response\nno element found"),
        EndpointConnectionError(endpoint_url="http://nowhere"),
    ],
)
def test_what_may_pass_is_asked_again_and_then_given_up(error: Exception) -> None:
    assert ask(failing(2, error), "out: s3://a/b") == 3
    with pytest.raises(Interrupted, match=r"^out: s3://a/b: the store fails \(.+\); run the same .*") as end:
        ask(failing(3, error), "out: s3://a/b")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), NoCredentialsError()])
def test_what_the_user_has_to_mend_is_refused_at_once(error: Exception) -> None:
    with pytest.raises(BacklensError, match=r"^out: s3://a/b: .*; see that the credentials are right") as end:
        ask(failing(1, error), "out: s3://a/b")
    assert end.value.status == 2


@pytest.mark.parametrize("error", [FileNotFoundError("a"), FileExistsError("a"), KeyError("defect")])
def test_answers_and_defects_are_the_callers_affair(error: Exception) -> None:
    with pytest.raises(type(error)):
        ask(failing(1, error), "out: s3://a/b")


def test_how_often_botocore_tries_is_ours_to_say_unless_its_variables_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = {"retries": {"mode": "standard", "total_max_attempts": remote.S3_ATTEMPTS}}
    assert file_system("s3://a/b")[0].config_kwargs == ours  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "9")
    theirs = {"retries": {"mode": "standard"}}
    assert file_system("s3://a/b")[0].config_kwargs == theirs  # pyright: ignore[reportAttributeAccessIssue]
