"""A directory that appears whole or not at all, also when two write it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ascend.errors import UserError
from convert.staging import staged_directory


def stage(target: Path, text: str, replace: bool, meanwhile: str | None = None) -> None:
    with staged_directory(target, replace) as staging:
        (staging / "file").write_text(text)
        if meanwhile is not None:
            stage(target, meanwhile, replace=False)


def test_the_loser_of_a_race(tmp_path):
    target = tmp_path / "target"
    stage(target, "same", replace=False, meanwhile="same")
    assert (target / "file").read_text() == "same"
    with pytest.raises(UserError, match="filled with something else meanwhile"):
        stage(target, "other", replace=False)
    assert (target / "file").read_text() == "same"
    stage(target, "other", replace=True)
    assert (target / "file").read_text() == "other"
    assert os.listdir(tmp_path) == ["target"]


def test_a_target_that_vanishes_while_it_is_compared(tmp_path, monkeypatch):
    stage(tmp_path / "target", "old", replace=False)

    def vanish(left: Path, right: Path) -> bool:
        shutil.rmtree(right)
        return False

    monkeypatch.setattr("convert.staging._same_files", vanish)
    stage(tmp_path / "target", "new", replace=True)
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]
