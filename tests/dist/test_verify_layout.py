"""`keye verify-layout` with real processes."""

import json

from megatron_keye.train import cli


def test_a_layout_is_verified(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert cli.main(["verify-layout", "debug", "--layouts", "tp2", "--json", str(report)]) == 0
    (row,) = json.loads(report.read_text())["layouts"]
    assert row["ok"] is True
    assert len(row["difference"]["gradients"]) > 10
    assert "tp2" in capsys.readouterr().out
