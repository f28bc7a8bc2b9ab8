"""The command line: parses and prints, nothing else."""

import click
from rich.console import Console
from rich.table import Table

import fastxent


@click.group()
@click.version_option(fastxent.__version__)
def main():
    """Cross entropy of huge batches of logits."""


@main.command()
def demo():
    """Train a classifier of handwritten digits and score it."""
    from fastxent import demo as demonstration

    console = Console()
    table = Table(title="A softmax classifier of handwritten digits")
    for column in ("step", "loss", "held-out loss", "held-out accuracy"):
        table.add_column(column, justify="right")
    *steps, _ = demonstration.train()
    for step in steps:
        table.add_row(
            f"{step.step}", f"{step.train_loss:.4f}", f"{step.held_out_loss:.4f}", f"{step.held_out_accuracy:.1%}"
        )
    console.print(table)
