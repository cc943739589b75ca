"""The table of README's "Performance" section, from benchmarks/results/.

python -m benchmarks.table            prints it
python -m benchmarks.table --write    puts it between the markers in README.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import timing

README = timing.ROOT / "README.md"
BEGIN = "<!-- performance: made from benchmarks/results/ by `make bench-table` -->"
END = "<!-- performance: end -->"
BACKBONES = {"resnet50": "ResNet-50", "resnet101": "ResNet-101", "vgg16": "VGG-16"}
SIZE = 400
CPU_WORK = ("train4", "eval1", "eval5")

Measured = dict[tuple[str, str, str, int], dict[str, Any]]


def table(measured: Measured) -> str:
    """Markdown: one row per piece of work and way of ours, one column per backbone; what it was measured on below."""
    cpu = {key: one for key, one in measured.items() if key[0] == "cpu" and key[2] in CPU_WORK and key[3] == SIZE}
    gpu = {key: one for key, one in measured.items() if key[0] != "cpu" and key[3] == SIZE and _compared(one)}
    parts = []
    if cpu:
        parts += [_rows(cpu, CPU_WORK), "", _about(cpu.values())]
    if gpu:
        works = list(dict.fromkeys(work for _, _, work, _ in sorted(gpu, key=lambda key: key[2], reverse=True)))
        parts += ["", _rows(gpu, works), "", _about(gpu.values())]
    else:
        script = "`python benchmarks/gpu/run.py --hour`"
        parts += ["", f"GPU: **not yet measured here**. {script} measures all of it in 55 minutes."]
    return "\n".join(parts).strip()


def _compared(measured: dict[str, Any]) -> bool:
    """Whether the published way is in a measurement of a GPU: benchmarks/gpu/ also times parts by themselves."""
    return any(name.startswith("baseline") for name in measured.get("variants", ()))


def _rows(measured: Measured, works: Iterable[str]) -> str:
    by_work = {work: {key[1]: one for key, one in measured.items() if key[2] == work} for work in works}
    backbones = [name for name in BACKBONES if any(name in found for found in by_work.values())]
    lines = [
        f"| Times faster (seconds, published way → ours) | {' | '.join(BACKBONES[name] for name in backbones)} |",
        "|---|" + "---|" * len(backbones),
    ]
    for found in by_work.values():
        names = {name: entry["label"] for one in found.values() for name, entry in one["variants"].items()}
        for name, label in names.items():
            if not name.startswith("baseline"):
                title = next(iter(found.values()))["title"]
                cells = [_cell(found.get(backbone), name) for backbone in backbones]
                lines.append(f"| {title}: {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(measured: dict[str, Any] | None, name: str) -> str:
    if measured is None or name not in measured["variants"]:
        return "–"
    baseline, ours = (measured["variants"].get(one, {"failed": "not run"}) for one in ("baseline", name))
    if "failed" in ours:
        return ours["failed"].partition(":")[0]
    if "failed" in baseline:
        return f"published way: {baseline['failed'].partition(':')[0]} → {_seconds(ours['wall_s']['median'])}"
    seconds = f"{_seconds(baseline['wall_s']['median'])} → {_seconds(ours['wall_s']['median'])}"
    return f"**{ours['ratio']['of_medians']:.1f}** ({seconds})"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}".rstrip("0")


def _about(measured: Iterable[dict[str, Any]]) -> str:
    """Where and when, one sentence per machine."""
    said: dict[str, tuple[set[str], set[str]]] = {}
    for one in measured:
        facts = one["run"]["machine"]
        device = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {one['threads']} threads"
        days, commits = said.setdefault(f"{device}, torch {one['run']['versions']['torch']}", (set(), set()))
        days.add(one["run"]["date"][:10])
        commits.add(one["run"]["commit"].removesuffix("+changes"))
    share = f"{SIZE} px, random weights, object on 18 % of the photo"
    where = "; ".join(
        f"{device}, {' and '.join(sorted(days))}, commit {', '.join(sorted(commits))}"
        for device, (days, commits) in sorted(said.items())
    )
    return f"{share}; medians; {where}."


def replaced(text: str, made: str) -> str:
    """README's text with the part between the markers replaced. Raises SystemExit if a marker is missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md must hold the lines '{BEGIN}' and '{END}' once each. It was left as it is.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def stored_table(folder: Path = timing.RESULTS) -> str:
    """The table of the stored results."""
    return table(timing.newest(sorted(folder.glob("*.json"))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    if parser.parse_args().write:
        README.write_text(replaced(README.read_text(), stored_table()))
    else:
        print(stored_table())
