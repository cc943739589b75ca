"""The guard against slower code, and the table in README."""

from __future__ import annotations

import json

import pytest

from benchmarks import check, table, timing

RATIOS = {"exact": (3.0, 2.9, 3.1), "default": (4.0, 3.8, 4.2)}


def measurement(ratios=RATIOS, work="train4", device="cpu"):
    variants = {"baseline": {"label": "published way", "wall_s": {"median": 6.0}}}
    for name, (ratio, q1, q3) in ratios.items():
        variants[name] = {
            "label": f"our {name}",
            "wall_s": {"median": 6.0 / ratio},
            "ratio": {"of_medians": ratio, "q1": q1, "q3": q3},
        }
    facts = {"device": device, "backbone": "resnet50", "work": work, "image_size": 400, "threads": 2}
    return {**facts, "title": "training step, batch 4", "variants": variants}


def write(folder, name, date, *measurements):
    machine = {"cpu": "Some CPU", "cores": 2}
    run = {"date": date, "commit": "abc+changes", "machine": machine, "versions": {"torch": "9.9"}}
    for one in measurements:
        timing.record(run, one, folder / name)
    return folder / name


def run_check(tmp_path, ratios, *extra):
    stored = tmp_path / "stored"
    old = dict.fromkeys(RATIOS, (1.0, 1.0, 1.0))
    write(stored, "a.json", "2030-01-02T00:00:00", measurement())
    write(stored, "b.json", "2030-01-01T00:00:00", measurement(old))  # older: does not count
    new = write(tmp_path, "new.json", "2030-01-03T00:00:00", measurement(ratios))
    return check.main(["--stored", str(stored), "--result", str(new), *extra])


def test_equal_ratios_pass(tmp_path, capsys):
    assert run_check(tmp_path, RATIOS) == 0
    out = capsys.readouterr().out
    assert "0 of 2 ratios got worse" in out
    assert "WORSE" not in out


def test_a_worse_ratio_is_flagged_by_name(tmp_path, capsys):
    assert run_check(tmp_path, {**RATIOS, "default": (3.0, 2.9, 3.1)}) == 1
    flagged = [line for line in capsys.readouterr().out.splitlines() if "WORSE" in line]
    assert len(flagged) == 1
    assert "resnet50 train4 400 px cpu default" in flagged[0]
    assert "-25%" in flagged[0]


@pytest.mark.parametrize(
    "default",
    [
        pytest.param((3.5, 3.45, 3.55), id="within the tolerance"),
        pytest.param((3.0, 2.5, 3.9), id="within the scatter"),
        pytest.param((9.0, 8.9, 9.1), id="better"),
    ],
)
def test_what_is_not_worse(tmp_path, default):
    assert run_check(tmp_path, {**RATIOS, "default": default}) == 0


def test_the_tolerance_can_be_chosen(tmp_path):
    assert run_check(tmp_path, {**RATIOS, "default": (3.5, 3.45, 3.55)}, "--tolerance", "0.05") == 1


def test_nothing_to_compare_is_not_a_pass(tmp_path):
    assert check.main(["--stored", str(tmp_path)]) == 2
    write(tmp_path / "stored", "a.json", "2030-01-01T00:00:00", measurement(work="eval1"))
    new = write(tmp_path, "new.json", "2030-01-03T00:00:00", measurement())
    assert check.main(["--stored", str(tmp_path / "stored"), "--result", str(new)]) == 2


def test_the_table_of_results(tmp_path):
    write(tmp_path, "a.json", "2030-01-02T00:00:00", measurement(), measurement(work="eval1x4"))
    made = table.stored_table(tmp_path)
    assert "| training step, batch 4: our exact | **3.0** (6.00 → 2.00) |" in made
    assert "Some CPU, 2 cores, 2 threads, torch 9.9, 2030-01-02, commit abc." in made
    assert "GPU: **not yet measured here**" in made
    gpu = measurement({"fastest": (12.0, 11.0, 13.0)}, "train20", "cuda")
    path = write(tmp_path, "g.json", "2030-01-04T00:00:00", gpu)
    stored = json.loads(path.read_text())
    stored["runs"][0]["machine"]["gpu"] = "Some GPU"
    path.write_text(json.dumps(stored))
    made = table.stored_table(tmp_path)
    assert "**12.0** (6.00 → 0.50)" in made
    assert "Some GPU, torch 9.9" in made
    assert "not yet measured" not in made


def test_the_table_replaces_only_what_is_between_the_markers():
    text = f"a\n{table.BEGIN}\nold\n{table.END}\nb\n"
    assert table.replaced(text, "new") == f"a\n{table.BEGIN}\nnew\n{table.END}\nb\n"
    with pytest.raises(SystemExit, match="left as it is"):
        table.replaced("a", "new")


def test_readme_holds_the_table_of_the_stored_results():
    """If this fails: make bench-table"""
    text = table.README.read_text()
    assert table.replaced(text, table.stored_table()) == text
