"""`hsnet doctor`: what works on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import ANY_PATH, json_option
from commands.steps import emit


@click.command(short_help="What works on this machine and what will not.")
@click.option("--path", type=ANY_PATH, default=Path(), help="Where stores will be written. [default: here]")
@json_option
def doctor(path: Path, as_json: bool) -> None:
    """Say what works on this machine and what will not: versions, devices, memory, disk, weights.

    Exit code 1 if the main job cannot run here. Nothing is changed, started or downloaded.

    \b
    Example:
      hsnet doctor
    """
    from pipeline import doctor as stage

    findings = stage.examine(path)
    marks = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark, colour = marks[finding.status]
        lines.append(f"{click.style(mark, fg=colour)}  {finding.name.ljust(width)}  {finding.detail}")
        if finding.todo and finding.status != "ok":
            lines.append(f"{' ' * (width + 8)}-> {finding.todo}")
    verdict = {"ok": "All is well.", "warn": "The main job runs here.", "fail": "The main job will not run here."}
    worst = stage.worst(findings)
    emit({"status": worst, "findings": findings}, "\n".join([*lines, "", verdict[worst]]), as_json)
    if worst == "fail":
        click.get_current_context().exit(1)
