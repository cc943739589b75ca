"""One Markdown table of everything that a run has measured so far."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = ("part", "way", "median", "quartiles", "unit", "times the published way", "memory, GB", "said")


def markdown(run: dict[str, Any]) -> str:
    """The facts of a run, then a row for every way of every measurement; a way that failed says why."""
    machine, versions = run["machine"], run["versions"]
    facts = {
        **{name: value for name, value in machine.items() if name != "load"},
        **versions,
        **run.get("switches", {}),
    }
    lines = [
        f"# {machine.get('gpu', machine['cpu'])}, {run['date']}",
        "",
        f"Commit {run['commit']}. " + "; ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for one in run["measurements"]:
        title = f"{one['title']} ({one['backbone']}, {one['image_size']} px)" if one.get("backbone") else one["title"]
        lines += [_line(title, cells) for cells in _cells(one)]
    return "\n".join(lines) + "\n"


def write(run: dict[str, Any], path: Path) -> None:
    """`markdown`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(markdown(run))
    partial.replace(path)


def stored(path: Path, date: str) -> dict[str, Any]:
    """The run of that start time in a file of results. Raises SystemExit: there is none."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for run in runs:
        if run["date"] == date:
            return run
    raise SystemExit(f"{path} holds no run of {date}.")


def _line(title: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") or "–" for cell in (title, *cells)) + " |"


def _cells(measured: dict[str, Any]) -> list[list[str]]:
    if "variants" in measured:
        return [_variant(entry) for entry in measured["variants"].values()]
    return [_row(label, row) for label, row in measured["rows"].items()]


def _variant(entry: dict[str, Any]) -> list[str]:
    if "failed" in entry:
        return [entry["label"], "", "", "", "", "", entry["failed"]]
    wall = entry["wall_s"]
    said = [f"{entry['episodes_per_s']:.4g} episodes/s"]
    said += [f"{entry['share_of_peak']:.1%} of peak"] if "share_of_peak" in entry else []
    said += [f"logits {entry['logits_diff']:.1e}"] if "logits_diff" in entry else []
    if "device_s" in entry:
        said.append(f"device {1e3 * entry['device_s']['median']:.4g} ms")
    kinds = [("allocated", "peak_bytes"), ("reserved", "reserved_bytes"), ("of the device", "device_bytes")]
    memory = ", ".join(f"{entry[key] / 1e9:.2f} {name}" for name, key in kinds if key in entry)
    ratio = f"{entry['ratio']['of_medians']:.2f}" if "ratio" in entry else ""
    milliseconds = [f"{1e3 * wall[name]:.4g}" for name in ("median", "q1", "q3")]
    return [
        entry["label"],
        milliseconds[0],
        f"{milliseconds[1]}–{milliseconds[2]}",
        "ms",
        ratio,
        memory,
        ", ".join(said),
    ]


def _row(label: str, row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [label, "", "", "", "", "", row["failed"]]
    spread = f"{row['q1']:.4g}–{row['q3']:.4g}" if "q1" in row else ""
    said = [f"{row['episodes_per_s']:.4g} episodes/s"] if "episodes_per_s" in row else []
    said += [row["note"]] if row.get("note") else []
    return [label, f"{row['value']:.4g}", spread, row.get("unit", ""), "", "", ", ".join(said)]
