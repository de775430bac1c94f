"""Progress where nobody sees a bar: plain lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qatana.jobs import progress
from qatana.jobs.progress import Progress


def log_of(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    text = io.StringIO()
    with Progress(Console(file=text, force_terminal=False)).bar("training", 3) as advance:
        for _ in range(3):
            advance(1, "loss 0.5")
    return [line.split(None, 1)[1] for line in text.getvalue().splitlines()]


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_of(0.0, monkeypatch) == [f"training: {done} of 3, loss 0.5" for done in (1, 2, 3)]


def test_what_is_done_sooner_needs_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert log_of(60.0, monkeypatch) == []


def test_without_a_console_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress().bar("training", 3) as advance:
        advance()
    assert capsys.readouterr().out == ""
