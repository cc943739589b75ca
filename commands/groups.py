"""Groups of commands: headings in the help, and every foreseen error as one message."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any

import click

from hsnet.errors import HSNetError


class Failure(click.ClickException):
    """An error that the user can mend: printed as `Error: ...` on stderr, exit code 1."""


class OrderedGroup(click.Group):
    """Lists its commands in the order they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Commands(OrderedGroup):
    """The top group: commands under headings, and every foreseen error as one message."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sections: dict[str, Sequence[click.Command]] = {}

    def add_sections(self, sections: Mapping[str, Sequence[click.Command]]) -> None:
        """Add commands, to be listed under these headings."""
        self.sections.update(sections)
        for commands in sections.values():
            for command in commands:
                self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, click.Command]]] = {}
        for heading, commands in self.sections.items():
            for command in commands:
                if isinstance(command, click.Group):
                    subs = command.commands.items()
                    rows.setdefault(heading, []).extend((f"{command.name} {sub}", c) for sub, c in subs)
                else:
                    rows.setdefault(heading, []).append((str(command.name), command))
        width = max(len(name) for row in rows.values() for name, _ in row)
        room = formatter.width - width - 6
        for heading, row in rows.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), c.get_short_help_str(room)) for name, c in row])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HSNetError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted. {ctx.meta.get('resume', 'Nothing was left half done.')}", err=True)
            ctx.exit(130)
        except OSError as error:
            message = _disk_trouble(error)
            if message is None:
                raise
            raise Failure(message) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which must not be imported for its name
                raise
            raise Failure(
                f"The GPU ran out of memory ({str(error).splitlines()[0]}). Use a smaller --image-size or "
                "--micro-batch where the command has them, or --device cpu."
            ) from error


def _disk_trouble(error: OSError) -> str | None:
    """A message for the troubles with disks that no stage can foresee, None for other errors."""
    file = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space left on the disk{file}. Make room and run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Not allowed to read or write{file} ({error.strerror}). Give another path or change its permissions."
    return None


def on_interrupt(hint: str) -> None:
    """What the running command will say about going on if it is interrupted."""
    click.get_current_context().meta["resume"] = hint
