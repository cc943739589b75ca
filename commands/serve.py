"""`hsnet serve`: a bank behind a page and behind annotation tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.options import ANY_PATH, Whole, device_option, options, quiet_option, weights_option
from commands.predict import PHOTO_HEADS
from commands.steps import pick_device
from commands.terminal import set_up_logging
from pipeline.common.text import printable


class Port(Whole):
    """A port's number; 0 for any that is free."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        if number > 65535:
            self.fail(f"{number} is more than 65535", param, ctx)
        return number


host_option = click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on. Another than this machine's own needs --token.",
)
port_option = click.option(
    "--port", type=Port(0), default=8765, show_default=True, help="Port to listen on; 0 for any that is free."
)
token_option = click.option(
    "--token",
    envvar="HSNET_TOKEN",
    metavar="TOKEN",
    help="What callers must know; read from HSNET_TOKEN, too, where other users cannot see it.",
)
allow_host_option = click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="A further name under which the server may be asked, such as host.docker.internal. May be repeated.",
)
max_mb_option = click.option(
    "--max-mb", type=Whole(), default=64, show_default=True, help="Largest request that is taken, MB."
)
server_options = options(host_option, port_option, token_option, allow_host_option, max_mb_option)


@click.command(short_help="A page and annotation tools' interfaces for a bank.")
@click.argument("bank", type=ANY_PATH)
@options(server_options, weights_option)
@click.option(
    "--head",
    type=click.Choice(PHOTO_HEADS[:3]),
    default="auto",
    show_default=True,
    help="What answers. auto: the one that does best on annotated photos left out in turn.",
)
@click.option("--label-studio", metavar="URL", help="Label Studio whose photos may be fetched, http(s)://host:port.")
@click.option(
    "--label-studio-token",
    envvar="LABEL_STUDIO_API_KEY",
    metavar="TOKEN",
    help="Its access token; read from LABEL_STUDIO_API_KEY, too.",
)
@options(device_option, quiet_option)
def serve(
    bank: Path,
    host: str,
    port: int,
    token: str | None,
    names: tuple[str, ...],
    max_mb: int,
    weights: str | None,
    head: str,
    label_studio: str | None,
    label_studio_token: str | None,
    device: str,
    quiet: bool,
) -> None:
    """Serve a bank of annotated photos: a page where a photo is marked, corrected and downloaded, and what annotation
    tools ask.

    Label Studio: add http://ADDRESS:PORT as its model, and as its webhook to learn from what is submitted.
    X-AnyLabeling: choose "Remote Server". CVAT needs no server: see docs/serve.md. This machine only, unless --host and
    --token are given. Ctrl-C ends it.

    \b
    Example:
      hsnet serve cups.bank
    """
    set_up_logging(quiet)
    from pipeline.serve.server import require_server

    require_server()
    from pipeline.predict.prepare import Choices
    from pipeline.serve.app import create_app
    from pipeline.serve.engine import Engine
    from pipeline.serve.guard import Access
    from pipeline.serve.labelstudio import Studio

    max_bytes = max_mb << 20
    access = Access(host, port, token, names, max_bytes)
    if label_studio_token and not label_studio:
        label_studio_token = None  # from the environment, meant for other programs
    studio = None if label_studio is None else Studio(label_studio, label_studio_token, max_bytes)
    engine = Engine(bank, Choices(head=head, weights=weights, device=pick_device(device, None)))
    run(lambda: create_app(engine, access, studio), access, printable(bank), engine.prepared)


def run(make_app: Any, access: Any, what: str, warm_up: Any) -> None:
    """Take the port, get ready, say where, answer until interrupted."""
    from pipeline.serve.server import listen
    from pipeline.serve.server import serve as answer

    with listen(access.host, access.port) as taken:
        app = make_app()
        warm_up()
        name = f"[{access.host}]" if ":" in access.host else access.host
        click.echo(f"{what}: http://{name}:{taken.getsockname()[1]}/ (Ctrl-C ends it)")
        answer(app, taken, access.max_bytes)
