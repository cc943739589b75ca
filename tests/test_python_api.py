"""docs/python-api.md is run as it stands, in one go."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_worked_example_runs_and_learns(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python-api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "320 images" in done.stdout
    scores = {
        (int(shots), fusion): float(miou)
        for shots, fusion, miou in re.findall(r"(\d)-shot, (\w+): mIoU ([\d.]+) \[", done.stdout)
    }
    assert set(scores) == {(1, "vote"), (3, "vote"), (3, "joint"), (3, "probabilities")}
    assert min(scores.values()) > 30, "60 steps are enough to leave the untrained head (18) behind"
    better = [float(points) for points in re.findall(r": ([-\d.]+) \[.*points better than untrained", done.stdout)]
    assert len(better) == 4
    assert re.search(r"^3-way: mIoU of classes [\d.]+ \[", done.stdout, re.MULTILINE)
    assert "fitted on the classes of 'trn'" in done.stdout
    assert min(better) > 0
