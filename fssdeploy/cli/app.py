"""The verbs of the `fssdeploy` command, one per file."""

from __future__ import annotations

import typer

from fssdeploy import __version__
from fssdeploy.cli.bank import bank_app
from fssdeploy.cli.batch import batch_app
from fssdeploy.cli.bench import bench_app
from fssdeploy.cli.client import client_app
from fssdeploy.cli.common import write_out
from fssdeploy.cli.data import data_app
from fssdeploy.cli.demo import demo
from fssdeploy.cli.distill import distill
from fssdeploy.cli.doctor import doctor
from fssdeploy.cli.enroll import enroll
from fssdeploy.cli.evaluate import evaluate
from fssdeploy.cli.export import export
from fssdeploy.cli.pretrain import pretrain_app
from fssdeploy.cli.repo import repo_app
from fssdeploy.cli.segment import segment
from fssdeploy.cli.serve import serve
from fssdeploy.cli.train import train_system

app = typer.Typer(
    name="fssdeploy",
    help="Few-shot segmentation in production: annotate one to five pictures, find the thing in every other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (export, enroll, segment, evaluate, distill, doctor, demo, serve):
    app.command()(verb)
app.command(name="train")(train_system)
app.add_typer(bank_app, name="bank")
app.add_typer(batch_app, name="batch")
app.add_typer(client_app, name="client")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(pretrain_app, name="pretrain")
app.add_typer(repo_app, name="repo")


def _print_version(wanted: bool) -> None:
    if wanted:
        write_out(f"fssdeploy {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Few-shot segmentation in production: annotate one to five pictures, find the thing in every other."""
