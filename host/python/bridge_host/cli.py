"""`jupyter bridge`: the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ("app", "main")

app = typer.Typer(
    name="jupyter bridge",
    help="Drive stateless Python kernels: the host owns the state, kernels compute and forget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    svg: Annotated[Path | None, typer.Option(help="Also write what is shown as a picture to this file.")] = None,
) -> None:
    """Run a real DSPy program, kill its kernel in the middle, and show that nothing is lost.

    Uses a small language model on this machine. MODEL=openai/… with a key in the environment uses that instead.
    """
    from .demo import run

    raise typer.Exit(run(svg))


@app.command()
def top(
    pid: Annotated[int | None, typer.Option(help="The host's process, if there are several.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one page and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON and exit.")] = False,
    only_list: Annotated[bool, typer.Option("--list", help="List your hosts on this machine and exit.")] = False,
) -> None:
    """Show a host that runs in another process, live: kernels, queue, rates, latencies, errors. `q` quits."""
    from .telemetry.page.top import run

    raise typer.Exit(run(pid, once=once, as_json=as_json, only_list=only_list))


@app.command()
def contract() -> None:
    """Print the OpenRPC document: every method, schema and error of the wire, as JSON."""
    import msgspec

    from bridge_kernel.contract.openrpc import document

    typer.echo(msgspec.json.format(msgspec.json.encode(document()), indent=2).decode())


@app.command()
def version() -> None:
    """Print the version of Bridge and of its protocol."""
    from bridge_kernel._version import __version__
    from bridge_kernel.contract.messages import PROTOCOL_VERSION

    typer.echo(f"bridge {__version__}, protocol {'.'.join(map(str, PROTOCOL_VERSION))}")


def main() -> None:
    """The entry point of `jupyter-bridge`, which is what `jupyter bridge` runs."""
    app(prog_name="jupyter bridge")
