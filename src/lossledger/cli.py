"""The command line: `lossledger demo`, `lossledger report RUN`, `lossledger compare FILE`,
`lossledger explain FILE`, `lossledger check FILE`, `lossledger diff A B`, `lossledger query RUN SQL`,
`lossledger watch RUN`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from lossledger.errors import LossledgerError


class _Commands(click.Group):
    """Commands whose errors are one line for the user, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LossledgerError as error:
            click.echo(f"lossledger: {error}", err=True)
            sys.exit(2)


@click.group(cls=_Commands, context_settings={"max_content_width": 80})
@click.version_option(package_name="lossledger")
def main() -> None:
    """The training loss, with its books open."""


@main.command()
@click.option("--scenes", default=1536, show_default=True, help="Training scenes; a quarter as many validate.")
@click.option("--size", default=64, show_default=True, help="Edge of a scene in pixels.")
@click.option("--epochs", default=20, show_default=True, help="Epochs of each of the two trainings.")
@click.option("--seed", default=0, show_default=True, help="Of scenes, weights and order.")
@click.option(
    "--weighting",
    type=click.Choice(["class", "pixel"]),
    default="class",
    show_default=True,
    help="Act two: a weight a column, or weights[argmax(y_true)] a pixel.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Where runs and report go.",
)
def demo(scenes: int, size: int, epochs: int, seed: int, weighting: str, folder: Path) -> None:
    """Train a segmentation U-Net twice on real digits, with the ledger on."""
    try:
        from lossledger.demo.run import Settings, run
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}. The demo needs more: pip install 'lossledger[demo]'.") from None
    run(Settings(scenes, size, epochs, seed, weighting, folder))


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), default=None, help="Path of the report; HTML in the run if not given."
)
@click.option(
    "--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A run to say the difference from."
)
@click.option("--text", "form", flag_value="text", help="Print to the terminal instead.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown instead.")
@click.option("--json", "form", flag_value="json", help="Print JSON instead.")
def report(run: Path, output: Path | None, against: Path | None, form: str | None) -> None:
    """Write the report of RUN, a run folder or a folder of runs."""
    from lossledger.report import as_json, as_markdown, as_text
    from lossledger.report.html import report as write
    from lossledger.report.html import view_of

    if form is not None and output is not None:
        raise click.UsageError(f"--{form} prints; to write it, let --output end in .md, .txt or .json instead.")
    if form is None:
        click.echo(write(run, output or run / "report.html", against))
    else:
        said = {"text": as_text, "markdown": as_markdown, "json": as_json}[form](view_of(run, against))
        click.echo(said, nl=not said.endswith("\n"))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--port", default=0, show_default=True, type=click.IntRange(0, 65535), help="0 for any that is free.")
@click.option("--open/--no-browser", "show", default=False, help="Show the page in a browser; not if not asked to.")
def watch(run: Path, port: int, show: bool) -> None:
    """Serve the report of RUN to this machine while it trains; it need not have begun."""
    from lossledger.report.watch import serve

    serve(run, port, show, click.echo)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--loss", required=True, help="Name of a loss, for example mse or BinaryCrossentropy.")
@click.option("--from-logits", is_flag=True, help="The predictions are logits.")
def compare(file: Path, loss: str, from_logits: bool) -> None:
    """Print every framework's loss of FILE, an .npz of y_true, y_pred, sample_weight, mask, class_weight."""
    from lossledger.conventions.compare import table_of

    click.echo(str(table_of({**_arrays(file), "loss": _chosen(loss, from_logits)})))


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--loss", required=True, help="Name of a loss, for example mse or BinaryCrossentropy.")
@click.option("--from-logits", is_flag=True, help="The predictions are logits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(file: Path, loss: str, from_logits: bool, as_json: bool) -> None:
    """Print what the loss of FILE is made of, an .npz of y_true, y_pred, sample_weight, mask, class_weight."""
    import json

    from lossledger.explain.explanation import explain as explained

    case = _arrays(file)
    names = ("y_true", "y_pred", "sample_weight", "mask", "class_weight")
    found = explained(_chosen(loss, from_logits), **{name: case[name] for name in names if name in case})
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))


def _arrays(file: Path) -> dict[str, Any]:
    """The arrays of a file of one batch, by name."""
    import numpy as np

    with np.load(file, allow_pickle=False) as arrays:
        missing = {"y_true", "y_pred"} - set(arrays.files)
        if missing:
            raise click.ClickException(f"{file}: no array {' or '.join(sorted(missing))}; found {arrays.files}.")
        return {name: arrays[name] for name in arrays.files}


def _chosen(loss: str, from_logits: bool) -> Any:
    """The loss of a name, told that it gets logits."""
    from lossledger.losses import get

    if not from_logits:
        return loss
    try:
        return type(get(loss))(from_logits=True)  # type: ignore[call-arg]
    except TypeError:
        raise click.ClickException(f"{loss} has no from_logits; leave --from-logits out.") from None


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--loss", required=True, help="Name of a loss, for example mse or BinaryCrossentropy.")
@click.option("--from-logits", is_flag=True, help="The predictions are logits.")
@click.option("--ignore", multiple=True, help="A code, or a family such as CLS, to leave out.")
@click.option("--logged", type=float, help="The loss that another program printed for these arrays.")
@click.option("--accumulate", default=1, show_default=True, help="Micro-batches that a loop would make of them.")
@click.option("--end-of-sequence", type=int, help="The class that ends a sequence.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    file: Path,
    loss: str,
    from_logits: bool,
    ignore: tuple[str, ...],
    logged: float | None,
    accumulate: int,
    end_of_sequence: int | None,
    as_json: bool,
) -> None:
    """Print what looks wrong about FILE, an .npz of y_true, y_pred, sample_weight, mask, class_weight.

    The exit code is 1 where there are warnings or errors.
    """
    import json

    from lossledger.explain.checks.run import check as find
    from lossledger.objective import Objective

    case = _arrays(file)
    objective = Objective(_chosen(loss, from_logits), class_weight=case.get("class_weight"))
    found = find(
        objective,
        case["y_true"],
        case["y_pred"],
        case.get("sample_weight"),
        case.get("mask"),
        ignore,
        logged,
        accumulate,
        end_of_sequence,
    )
    if as_json:
        click.echo(json.dumps([finding.to_dict() for finding in found], indent=1))
    else:
        click.echo("\n".join(map(str, found)) if found else "Nothing looks wrong.")
    sys.exit(1 if any(finding.severity != "note" for finding in found) else 0)


@main.command()
@click.argument("first", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("second", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--split", type=click.Choice(["training", "validation", "test"]), help="The validation where both have it."
)
@click.option("--epoch", type=int, help="Of the first run; its last if not given.")
@click.option("--other-epoch", type=int, help="Of the second run; its last if not given.")
@click.option("--by", default="class", show_default=True, help="Kind of the groups.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(
    first: Path, second: Path, split: str | None, epoch: int | None, other_epoch: int | None, by: str, as_json: bool
) -> None:
    """Print why the loss of run SECOND differs from that of run FIRST."""
    import json

    from lossledger.ledger import Ledger

    found = Ledger.open(first).diff(Ledger.open(second), split, epoch, other_epoch, by)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("sql")
@click.option("--csv", "form", flag_value="csv", help="Print CSV.")
@click.option("--json", "form", flag_value="json", help="Print JSON.")
def query(run: Path, sql: str, form: str | None) -> None:
    """Print what one SELECT finds in the tables ledger and metrics of RUN, a run folder or a folder of runs."""
    from lossledger.ledger import Ledger

    table = Ledger.open(run).query(sql)
    shown = {"csv": table.to_csv, "json": table.to_json}.get(form or "", table.__str__)()
    click.echo(shown, nl=not shown.endswith("\n"))
