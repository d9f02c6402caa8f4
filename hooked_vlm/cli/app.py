"""The application, the options before a command, and how mistakes are printed."""

import json
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from hooked_vlm.disk.files import lacking
from hooked_vlm.errors import HookedVLMError


FAILED, USER_ERROR, SIGNALLED = 1, 2, 128  # a signal's number is added to the last

app = typer.Typer(
    name="hooked-vlm",
    help="Interpretability experiments on vision-language models, from a model to a report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"hooked-vlm {version('hooked-vlm')}")
        raise typer.Exit
    return wanted


@app.callback()
def before_any_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Interpretability experiments on vision-language models, from a model to a report."""


def importing() -> None:
    """Writes a line before torch and transformers are imported, which takes seconds."""
    if "torch" not in sys.modules:
        print("hooked-vlm: importing torch and transformers …", file=sys.stderr, flush=True)


def show(text: str, found: Any, as_json: bool) -> None:
    """Prints a result as text, or as one JSON document."""
    print(json.dumps(found, indent=2, default=_plain) if as_json else text)


def _plain(value: Any) -> Any:
    """Returns what JSON has of an object: its `summary`, else its text."""
    return getattr(value, "summary", None) or str(value)


def main() -> None:
    """Runs the command line; prints a `HookedVLMError` as one line on stderr, with status 2.

    Where memory, the disk or a permission is lacking, prints one line and exits with status 1.
    """
    try:
        app()
    except HookedVLMError as error:
        print(f"hooked-vlm: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except (OSError, MemoryError, RuntimeError) as error:
        missing = lacking(error)
        if missing is None:
            raise
        print(f"hooked-vlm: {missing[0]}. {missing[1]}.", file=sys.stderr)
        sys.exit(FAILED)
