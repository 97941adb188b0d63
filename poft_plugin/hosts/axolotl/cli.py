"""`axolotl poft ...`: plan, score, export, import. Imports nothing heavy until a command runs."""

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from poft_plugin.hosts.axolotl.errors import one_message
from poft_plugin.hosts.axolotl.quiet import host_kept_quiet

if TYPE_CHECKING:
    from poft_plugin.hosts.axolotl.commands import Session

CONFIG = click.argument("config", type=click.Path(exists=True, dir_okay=False))


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Runs a command on an opened config; an error that a user can mend is one message."""

    @functools.wraps(function)
    def wrapper(config: str, **options: Any) -> None:
        os.environ["AXOLOTL_IS_PREPROCESS"] = "1"
        with one_message(), host_kept_quiet():
            from poft_plugin.hosts.axolotl.raw_config import check_asked_for

            check_asked_for(config)
            from poft_plugin.hosts.axolotl.commands import Session

            function(Session.open(config), **options)

    return wrapper


@click.group(short_help="PoFT and DEFT: plan, score, export and import scores of references and reward models.")
def poft() -> None:
    """Scores of aligned reference LLMs (`rl: poft`), reward models and start policies (`rl: deft_...`)."""


@poft.command()
def methods() -> None:
    """List the rl types that are installed, and the packages that they come from."""
    with one_message():
        from poft_plugin.plugins import registry

        found = registry()
        names = sorted(name for name, method in found.methods.items() if method.alone)
        width = max(map(len, names)) + 2
        for name in names:
            click.echo(f"{name:<{width}}{found.packages[name]:<16}{found.methods[name].paper}")


@poft.command()
@CONFIG
@click.option("--probe", type=click.IntRange(min=1), help="Time this many batches of each model.")
@_command
def plan(session: "Session", probe: int | None) -> None:
    """Check every model to score with and print what that would cost. Loads none (but for --probe)."""
    session.plan(probe)


@poft.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@CONFIG
@click.option(
    "--launcher",
    type=click.Choice(["python", "torchrun"]),
    default="python",
    show_default=True,
    help="torchrun: over N processes, `--launcher torchrun -- --nproc_per_node=N`.",
)
@click.option("--show", type=click.IntRange(min=1), help="Print which tokens are counted for this many rows, and stop.")
@click.option("--num-shards", type=click.IntRange(min=1), help="Score one share of N by hand (with --shard).")
@click.option("--shard", type=click.IntRange(min=0), help="Which share, from 0.")
@click.pass_context
def score(
    ctx: click.Context, config: str, launcher: str, show: int | None, num_shards: int | None, shard: int | None
) -> None:
    """Score every row that the cache lacks; prints the plan first."""
    if (num_shards is None) != (shard is None) or (shard is not None and shard >= (num_shards or 0)):
        raise click.UsageError("--num-shards N and --shard K go together, K from 0 to N - 1")
    if launcher == "torchrun":
        command = ["torchrun", *ctx.args, "-m", "poft_plugin.hosts.axolotl.cli", "score", config]
        sys.stdout.flush()
        os.execvp(command[0], command)
    if ctx.args:
        raise click.UsageError(f"unknown arguments {ctx.args}; launcher arguments need `--launcher torchrun`")
    if show is not None:
        _show(config, count=show)
    else:
        _score(config, num_shards=num_shards, shard=shard)


@poft.command()
@CONFIG
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="Parquet file to write.")
@click.option("--rows", is_flag=True, help="List every row's key and text, with a null reward where unscored.")
@click.option("--levels", help="Rows of these levels alone, such as A or A+B (`rl: deft_...`).")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["parquet", "jsonl"]),
    default="parquet",
    show_default=True,
    help="jsonl: the graded training rows themselves, ready to train on (`rl: deft_...`).",
)
@_command
def export(session: "Session", out: str, rows: bool, levels: str | None, file_format: str) -> None:
    """Write the cached scores to a file: row_key, model, reward, num_tokens (and response, level)."""
    chosen = tuple(levels.split("+")) if levels else ()
    if set(chosen) - {"A", "B", "C"}:
        raise click.UsageError(f"--levels {levels}: letters A, B, C, joined by +")
    session.export(out, list_rows=rows, levels=chosen, jsonl=file_format == "jsonl")


@poft.command(name="import")
@CONFIG
@click.argument("scores", type=click.Path(dir_okay=False))
@_command
def import_(session: "Session", scores: str) -> None:
    """Take a file of scores into the cache, after a check of every row key."""
    session.import_scores(scores)


@_command
def _show(session: "Session", count: int) -> None:
    session.show(count)


@_command
def _score(session: "Session", num_shards: int | None, shard: int | None) -> None:
    from poft_plugin.scoring.heartbeat import beating
    from poft_plugin.scoring.shares import Share

    with beating(session.context):  # from here on: the first process makes the plan while others wait for its share
        if num_shards is None:
            session.score()
        else:
            session.score_share(Share(shard, num_shards))


if __name__ == "__main__":
    poft()
