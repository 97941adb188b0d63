"""What the commands of `axolotl poft` do, on one opened config: each a loop over the jobs of the run's stages."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from poft_plugin.data.columns import CONVERSATION, LEVEL, ROW_NUMBER, SCORES, SOURCE
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.data.render import Rendered
from poft_plugin.hosts.axolotl.datasets import run_context
from poft_plugin.hosts.axolotl.entries import ENTRIES, SALT_FIELD
from poft_plugin.hosts.axolotl.plugin import PoftPlugin
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.hosts.axolotl.stages import RunStages, is_complete
from poft_plugin.report.console import make_console
from poft_plugin.report.tokens import marked
from poft_plugin.scoring.cache import Lookup
from poft_plugin.scoring.checkpoints import MissingCheckpointError
from poft_plugin.scoring.engines import Engine, ShareEngine
from poft_plugin.scoring.exchange import Scored, export_scores, import_scores
from poft_plugin.scoring.graded import export_graded, write_graded_rows
from poft_plugin.scoring.identity import Identity
from poft_plugin.scoring.opened import OpenedJob
from poft_plugin.scoring.plan import matmul_rate, plan_job, print_plan, probe
from poft_plugin.scoring.run import accelerator
from poft_plugin.scoring.shares import Share
from poft_plugin.scoring.stages import AskedJob

console = make_console()


@dataclass
class Session:
    """A config with its rows, for one command.

    Args:
        config: the config file, for messages.
        cfg: the host's validated config.
        run: the method and its settings.
        context: this process.
        engine: how jobs are done; None: by the processes of this launch.
    """

    config: str
    cfg: DictDefault
    run: MethodRun
    context: RunContext
    engine: Engine | None = None

    @classmethod
    def open(cls, config: str) -> "Session":
        """Loads a config as the host does; nothing of its launcher (DeepSpeed, FSDP) is set up, for nothing trains.

        Raises:
            ValueError: if it is not a config of ours.
        """
        cfg = load_cfg(config, deepspeed=None, fsdp=None, fsdp_config=None)
        run = _method_run(config)
        sets = [ENTRIES[entry[SALT_FIELD]].label for entry in [*cfg.datasets, *(cfg.test_datasets or [])]]
        console.print(f"{config}: rl: {run.method.name} ({run.method.paper}); reading {', '.join(sets)}")
        return cls(config, cfg, run, run_context(cfg, "score"))

    @cached_property
    def stages(self) -> RunStages:
        """The stages of its rows."""
        return RunStages(self.cfg, self.run, self.context, self.engine)

    def plan(self, batches: int | None) -> None:
        """Prints the plan, with `batches` the time of that many of each model; and grades that need no scoring."""
        self._plan_scoring(batches)
        if is_complete(self.stages.first):
            _ = self.stages.graded  # prints what its preprocessors have to say of the rows
        elif self.run.preprocessors("training"):
            console.print("grades: after scoring, here again")

    def _plan_scoring(self, batches: int | None) -> None:
        asked = [(job, planned.at_most) for planned in self.stages.planned() for job in planned.stage.jobs]
        if not asked:
            console.print("nothing to score: no model is asked for with these settings")
            return
        opened = [job.open() for job, _ in asked]
        planned = [
            plan_job(found, job.cache, at_most=at_most) for (job, at_most), found in zip(asked, opened, strict=True)
        ]
        rates = [
            matmul_rate(accelerator(self.context, found.scorer.devices), found.scorer.dtype)
            if found.scorer is not None and plan.to_score
            else 1.0
            for found, (plan, _) in zip(opened, planned, strict=True)
        ]
        print_plan([plan for plan, _ in planned], rates, asked[0][0].cache, console)
        for (job, _), found, (plan, prepared) in zip(asked, opened, planned, strict=True):
            if batches is None or found.scorer is None or not prepared:
                continue
            tokens = job.settings.batch_tokens
            measured = probe(found.scorer, prepared, count=batches, batch_tokens=tokens, run=self.context)
            hours = plan.tokens / measured.tokens_per_second / 3600
            console.print(
                f"{plan.name}: measured {measured.rows_per_second:.1f} rows/s, "
                f"{measured.tokens_per_second:,.0f} tokens/s; {hours:.2g} hours for the rest on one process"
            )

    def score(self) -> None:
        """Scores what is missing, stage by stage: grading and filters come between."""
        if self.context.rank == 0:
            self._plan_scoring(None)
        _ = self.stages.kept

    def score_share(self, share: Share) -> None:
        """Scores one share of what is missing; a stage that is behind other shares' scores is left for later."""
        self._plan_scoring(None)
        for planned in self.stages.planned():
            for asked in planned.stage.jobs:
                if planned.at_most:
                    console.print(
                        f"{asked.job.kind} {asked.job.settings.label}: after all shares, with every share again"
                    )
                else:
                    ShareEngine(share).score([asked.open()], asked.cache, asked.settings, self.context)

    def show(self, count: int) -> None:
        """Prints the first rows as each model sees them, counted tokens marked: all responses of a row together."""
        opened = [job.open() for planned in self.stages.planned() for job in planned.stage.jobs]
        shown = [(each, index, row) for each in opened for index, row in _rendered(each, count)]
        if not shown:
            console.print("nothing to show: no reference and no reward model reads these rows (`axolotl preprocess "
                          "--debug` prints what the policy reads)")  # fmt: skip
        elif not console.is_terminal:
            console.print("each token that counts is between « and »")
        for each in opened:
            if each.scorer is None:
                console.print(f"{each.label}: imported scores, no model to show")
        for each, index, row in shown:
            title = f"{each.label}: {each.job.rows.title(index)}"
            console.rule(f"{title}: {row.num_counted} of {len(row.input_ids)} tokens counted")
            console.print(marked(row, in_colour=console.color_system is not None))

    def export(self, out: str, *, list_rows: bool, levels: tuple[str, ...], jsonl: bool) -> None:
        """Writes the cached scores, or the graded rows themselves.

        Raises:
            ValueError: where grades are asked for, and these settings grade nothing.
        """
        grades = bool(self.run.preprocessors("training"))
        if (levels or jsonl) and not grades:
            raise ValueError("--levels and --format jsonl go with an `rl: deft_...`, which grades rows")
        if not grades or (list_rows and not levels and not jsonl):
            self._export_scores(out, list_rows=list_rows)
            return
        graded = [part.rows for part in self.stages.graded]
        if LEVEL not in graded[0].attached:
            raise ValueError(f"{self.config}: `rl: {self.run.method.name}` with these settings grades nothing")
        if jsonl:
            count = write_graded_rows(Path(out), graded[0], levels)
        else:
            count = export_graded(Path(out), graded, levels, self._graded_by(), texts=list_rows)
        console.print(f"{out}: {count} lines")

    def _export_scores(self, out: str, *, list_rows: bool) -> None:
        asked = [job for planned in self.stages.planned() for job in planned.stage.jobs]
        # rows that are tokens are listed for nobody: they can be scored by the policy's own weights alone
        scored = [_scored(job) for job in asked if not list_rows or CONVERSATION in job.job.rows.table.column_names]
        if not scored:
            raise ValueError(f"{self.config}: no model is asked for with these settings whose scores could be exported")
        lines = export_scores(out, scored, list_rows=list_rows)
        missing = {each.job.name: int(each.lookup.missing_or_long.sum()) for each in scored}
        unscored = ", ".join(f"{name}: {count}" for name, count in missing.items() if count)
        console.print(f"{out}: {lines} lines" + (f"; rows without a score: {unscored}" if unscored else ""))

    def _graded_by(self) -> dict[str, Identity | None]:
        name = self.stages.scored_by.get(SCORES)
        return {asked.job.name: asked.open().identity for asked in self.stages.first.jobs if asked.job.name == name}

    def import_scores(self, path: str) -> None:
        """Takes a score file into the cache.

        Raises:
            ValueError: if no model is asked for, or as `import_scores`.
        """
        asked = [job for stage in self.stages.importable() for job in stage.jobs if job.job.scores is None]
        if not asked:
            raise ValueError(f"{self.config}: no model is asked for with these settings whose scores could be imported")
        cache = asked[0].cache
        for name, count in import_scores(path, [job.job for job in asked], cache).items():
            console.print(f"{name}: {count} scores imported into {cache.folder}")


def _scored(asked: AskedJob) -> Scored:
    """What is known of a job's rows, which may be listed where the model is not."""
    try:
        opened = asked.open()
    except MissingCheckpointError:
        count = len(asked.job.rows)
        return Scored(asked.job, Lookup(np.full(count, np.nan), np.zeros(count, np.int32)), None)
    return Scored(asked.job, opened.lookup(asked.cache), opened.identity)


def _rendered(opened: OpenedJob, count: int) -> Iterator[tuple[int, Rendered]]:
    """The job's first rows, as far as its scorer reads text."""
    for index in _first(opened.job.rows, count):
        rendered = None if opened.scorer is None else opened.scorer.render_row(opened.job.rows, index)
        if rendered is not None:
            yield index, rendered


def _first(rows: Rows, count: int) -> Iterator[int]:
    """The first rows of the data: where a row has several responses, all of them."""
    seen: set[tuple[str, int]] = set()
    for index, where in enumerate(zip(*(rows.table[name].to_pylist() for name in (SOURCE, ROW_NUMBER)), strict=True)):
        seen.add(where)
        if len(seen) > count:
            return
        yield index


def _method_run(config: str) -> MethodRun:
    for plugin in PluginManager.get_instance().plugins.values():
        if isinstance(plugin, PoftPlugin) and plugin.method_run is not None:
            return plugin.method_run
    raise ValueError(f"{config}: poft_plugin was not loaded; `plugins:` needs the line poft_plugin.PoftPlugin")
