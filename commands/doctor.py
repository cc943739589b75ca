"""`hsnet doctor`: what works on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.options import ANY_PATH, STORE, json_option
from commands.steps import emit
from pipeline.common.text import printable

if TYPE_CHECKING:
    from pipeline.doctor import Finding

MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command(short_help="What works on this machine and what will not.")
@click.option("--path", type=ANY_PATH, default=Path(), help="Where stores will be written. [default: here]")
@click.option(
    "--address", metavar="ADDRESS", help="Look at every machine of this Ray cluster instead: host:port or auto."
)
@click.option("--store", type=STORE, metavar="S.zarr", help="With --address: does every machine see this store?")
@click.option("--data-root", type=ANY_PATH, metavar="DIR", help="With --address: ... these photos?")
@click.option("--run-dir", type=ANY_PATH, metavar="DIR", help="With --address: ... this folder for runs?")
@json_option
def doctor(path: Path, address: str | None, as_json: bool, **places: Any) -> None:
    """Say what works on this machine and what will not: versions, devices, memory, disk, weights.

    With --address, the same of every machine of a cluster: what it has, whether its versions are those of this one, and
    which paths it sees. Exit code 1 if the main job cannot run. Nothing is changed, started or downloaded.

    \b
    Example:
      hsnet doctor
      hsnet doctor --address auto --store /shared/voc.zarr --data-root /shared/VOC2012 --run-dir /shared/runs
    """
    from pipeline import doctor as stage

    given = {name: str(place) for name, place in places.items() if place is not None}
    if given and address is None:
        raise click.UsageError(f"--{next(iter(given)).replace('_', '-')} is for --address.")
    findings = stage.examine(path) if address is None else _of_cluster(address, given)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark, colour = MARKS[finding.status]
        lines.append(f"{click.style(mark, fg=colour)}  {finding.name.ljust(width)}  {finding.detail}")
        if finding.todo and finding.status != "ok":
            lines.append(f"{' ' * (width + 8)}-> {finding.todo}")
    verdict = {"ok": "All is well.", "warn": "The main job runs here.", "fail": "The main job will not run here."}
    if address is not None:
        verdict |= {"warn": "Work can be done on this cluster.", "fail": "Not all of this cluster can be worked on."}
    worst = stage.worst(findings)
    emit({"status": worst, "findings": findings}, "\n".join([*lines, "", verdict[worst]]), as_json)
    if worst == "fail":
        click.get_current_context().exit(1)


def _of_cluster(address: str, places: dict[str, str]) -> list[Finding]:
    """Findings about every node, and about each path on it."""
    from cluster import nodes
    from cluster.session import session
    from pipeline.doctor import Finding
    from pipeline.store.bucket import location

    paths = {f"--{name.replace('_', '-')}": location(place) for name, place in places.items()}
    local = [str(place) for place in paths.values() if isinstance(place, Path)]
    mine = nodes.here(local)
    with session(address, check=False):
        machines = nodes.look(local)
    findings = []
    for one in machines:
        name = f"{one.host} {one.node[:8]}"
        if one.silent:
            todo = "look at Ray's logs there (/tmp/ray/session_latest/logs)"
            findings.append(Finding(name, "fail", f"{one.address}: no worker answered", todo))
            continue
        findings.append(Finding(name, "ok", f"{one.address}: {nodes.describe(one)}"))
        findings += [Finding(name, *told) for told in nodes.compared(one, mine["versions"])]
        for option, place in paths.items():
            what = f"{option} {printable(place)}"
            if not isinstance(place, Path):
                findings.append(Finding(name, "ok", f"{what}: in a bucket, which every worker opens itself"))
                continue
            seen, here = one.paths[str(place)], mine["paths"][str(place)]
            if seen != here:
                todo = "put it on a file system that all machines mount at the same path"
                findings.append(Finding(name, "fail", f"{what}: {seen}, here: {here}", todo))
            elif seen == "nothing":
                findings.append(Finding(name, "warn", f"{what}: nothing", "there is nothing here, either"))
            else:
                findings.append(Finding(name, "ok", f"{what}: {seen}"))
    return findings
