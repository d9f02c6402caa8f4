"""Plans of the paper's own draws, on small shapes."""

import importlib
import json
from typing import Any

from benchmarks.common.published import tiny


def test_draws_of_the_experiments_are_planned(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    draws = importlib.import_module("benchmarks.draws")
    file = tmp_path / "d.json"
    wanted = ["--pairs", "6", "--batch", "8", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["draws", *wanted])
    draws.main([tiny("Qwen2-VL-7B"), tiny("Gemma-3-4b")])
    rows = json.loads(file.read_text())
    assert [row["experiment"] for row in rows] == ["E4", "E2"] * 2
    for row in rows:
        kinds = 2 if row["experiment"] == "E4" else 1
        assert row["pairs"] == 4 * 6 and row["patches"] == 4 * 6 * kinds * 3
        assert row["floor"] <= row["planned"] < row["naive"]
    assert "first batch:" in capsys.readouterr().out


def test_questions_about_one_picture_share_rows(monkeypatch: Any) -> None:
    draws = importlib.import_module("benchmarks.draws")
    plans = draws.planned(tiny("Qwen2-VL-7B"), "E4", 50, 16)
    assert any("share rows" in str(plan) for plan in plans)
