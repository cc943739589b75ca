"""README and docs/ against the program: commands, options, targets, links and examples that really exist."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

import cli
from pipeline.datasets import DATASETS
from pipeline.datasets.folder_description import Description
from pipeline.scores import way_rows
from pipeline.scores.rows import schema

ROOT = Path(cli.__file__).parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FOREIGN_OPTIONS = (
    {"--extra-index-url"}
    | {
        "--server-host",
        "--auth",
        "--function-module",
        "--function-file",
        "--allow-unmatched-labels",
        "--conv-mask-to-poly",
    }
    | {"--folder", "--bits", "--bytes", "--photos"}
    | {"--port", "--num-cpus", "--object-store-memory", "--node-manager-port", "--object-manager-port", "--block"}
    | {"--working-dir", "--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal"}
    | {"--exclude", "--stage", "--count", "--fault", "--kills", "--table"}
    | {
        "--parts",
        "--backbones",
    }
    | {"--hour", "--cudnn-benchmark"}
)
"""Of pip, ray, Slurm and cvat-cli, and of compression.py, faults.py, pipeline.py and gpu/run.py in benchmarks/."""


def commands(group: click.Group = cli.main, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(where, arguments) of every `hsnet ...` line in a fenced block, continued lines joined."""
    for path in DOCS:
        for _, block in FENCE.findall(path.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True) if "hsnet " in line else []
                if words and words[0] in ("hsnet", ".venv/bin/hsnet"):
                    yield f"{path.name}: {' '.join(words[1:])}", words[1:]


def resolve(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that a line names, and the rest of the line."""
    command: click.Command = cli.main
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


def check(command: click.Command, arguments: list[str]) -> None:
    """Parse as the program would, but ask for no file to exist."""
    context = click.Context(command, info_name="hsnet")
    values, left, _ = command.make_parser(context).parse_args(arguments)
    assert not left, f"too many arguments: {left}"
    if isinstance(command, click.Group):
        return
    for parameter in command.params:
        value = values.get(parameter.name)
        given = value not in (None, ()) and not type(value).__name__.startswith("Sentinel")
        assert given or not parameter.required, f"missing {parameter.name}"
        if given and not isinstance(parameter.type, click.Path) and not isinstance(value, bool):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                parameter.type.convert(one, parameter, context)


def test_a_wrong_line_would_be_found() -> None:
    for line in ("evaluate --store S --shot 1", "train", "extract cityscapes --store S --backbone vgg16", "verify S"):
        with pytest.raises((click.UsageError, AssertionError)):
            check(*resolve(line.split()))


@pytest.mark.parametrize(("where", "arguments"), list(command_lines()), ids=lambda value: str(value)[:60])
def test_every_command_line_parses(where: str, arguments: list[str]) -> None:
    check(*resolve(arguments))


def test_there_are_command_lines() -> None:
    assert len(list(command_lines())) > 15


def test_every_command_is_in_the_docs() -> None:
    text = "\n".join(path.read_text() for path in DOCS)
    assert not [name for name, _ in commands() if f"hsnet {name}" not in text]


def flags(parameter: click.Parameter) -> list[str]:
    """What it is called on the command line, its opposite included."""
    return [*parameter.opts, *parameter.secondary_opts]


def test_every_option_that_is_named_exists() -> None:
    known = {flag for _, command in commands() for parameter in command.params for flag in flags(parameter)}
    known |= {"--help", "--version"} | FOREIGN_OPTIONS
    for path in DOCS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text()))
        assert named <= known, f"{path.name}: {named - known}"


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        named = re.findall(r"`make ([a-z-]+)|^(?:\$ )?make ([a-z-]+)", path.read_text(), re.MULTILINE)
        assert {a or b for a, b in named} <= targets, path.name
    readme = DOCS[0].read_text()
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CHANGELOG.md", ROOT / "THIRD_PARTY.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path.name}: {target}"


def test_files_named_in_the_docs_exist() -> None:
    for path in DOCS:
        for name in re.findall(r"`((?:hsnet|pipeline|cluster|tests)/[\w/]*(?:\.py|/))`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_the_columns_of_the_rows_are_described() -> None:
    text = (ROOT / "docs" / "training-and-evaluation.md").read_text()
    assert not [name for name in schema().names if f"`{name}`" not in text]
    text = (ROOT / "docs" / "evaluation.md").read_text().split("### Columns of N-way rows")[1]
    assert not [name for name in way_rows.schema().names if f"`{name}`" not in text]


def test_data_sets_with_their_options_are_described() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text()
    for name, place in DATASETS.items():
        module, _, reader = place.partition(":")
        assert f"### {name}" in text
        section = text.split(f"### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
        options = set(inspect.signature(getattr(importlib.import_module(module), reader)).parameters)
        assert not [option for option in options - {"root", "splits"} if f"`{option}`" not in section], name
    assert not [field.name for field in fields(Description) if f"| `{field.name}` |" not in text]


def modules_with_examples() -> list[str]:
    paths = [path for room in ("hsnet", "pipeline", "cluster") for path in sorted((ROOT / room).rglob("*.py"))]
    found = [path.relative_to(ROOT).with_suffix("") for path in paths if re.search(r"^\s*>>> ", path.read_text(), re.M)]
    return [".".join(path.parts) for path in found]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), verbose=False)
    assert results.attempted
    assert not results.failed


def test_readme_is_short() -> None:
    assert len(DOCS[0].read_text().splitlines()) <= 200
