"""What the commands of `axolotl poft` do, on one opened config."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from poft_plugin.config import PoftConfig
from poft_plugin.data.columns import CONVERSATION
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.hosts.axolotl.datasets import load_host_rows
from poft_plugin.hosts.axolotl.plugin import PoftPlugin
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.report.console import make_console
from poft_plugin.report.tokens import coloured
from poft_plugin.scoring.cache import ScoreCache, cache_folder
from poft_plugin.scoring.exchange import export_scores, import_scores
from poft_plugin.scoring.plan import matmul_rate, plan_reference, print_plan, probe
from poft_plugin.scoring.references import Reference, check_revisions, open_references, reference_rewards
from poft_plugin.scoring.run import Share, accelerator, prepare_missing, score_prepared

console = make_console()


@dataclass
class Session:
    """A config with its rows, for one command.

    Args:
        cfg: the host's validated config.
        settings: the block `poft:`.
        cache: the score cache.
        context: this process.
    """

    cfg: DictDefault
    settings: PoftConfig
    cache: ScoreCache
    context: RunContext

    @classmethod
    def open(cls, config: str) -> "Session":
        """Loads a config as the host does; nothing of its launcher (DeepSpeed, FSDP) is set up, for nothing trains.

        Raises:
            ValueError: if it is no `rl: poft` config.
        """
        cfg = load_cfg(config, deepspeed=None, fsdp=None, fsdp_config=None)
        run = _method_run(config)
        if not isinstance(run.settings, PoftConfig):
            raise ValueError(f"{config}: `rl: {run.method.name}` has no references; `axolotl poft` is for `rl: poft`")
        cache = ScoreCache(cache_folder(run.settings.score_cache))
        return cls(cfg, run.settings, cache, RunContext.from_environment("score"))

    @cached_property
    def rows(self) -> Rows:
        """Every row of the training and evaluation sets once."""
        train, evaluation, _ = load_host_rows(self.cfg)
        tables = [part.rows.table for part in (train, evaluation) if part is not None]
        return Rows(pa.concat_tables(tables), {}).unique()

    @cached_property
    def references(self) -> list[Reference]:
        """The references, checked, not loaded."""
        return open_references(self.settings, self.cache)

    def plan(self, batches: int | None) -> None:
        """Prints the plan; with `batches`, times that many of each reference."""
        rows, references = self.rows, self.references
        planned = [plan_reference(reference, rows, self.cache) for reference in references]
        rates = [
            matmul_rate(accelerator(self.context, r.scorer.devices), r.scorer.dtype)
            if r.scorer is not None and plan.to_score
            else 1.0
            for r, (plan, _) in zip(references, planned, strict=True)
        ]
        print_plan([plan for plan, _ in planned], rates, self.cache, console)
        for reference, (plan, prepared) in zip(references, planned, strict=True):
            if batches is None or reference.scorer is None or not prepared:
                continue
            tokens = self.settings.batch_tokens
            measured = probe(reference.scorer, prepared, count=batches, batch_tokens=tokens, run=self.context)
            hours = plan.tokens / measured.tokens_per_second / 3600
            console.print(
                f"{plan.name}: measured {measured.rows_per_second:.1f} rows/s, "
                f"{measured.tokens_per_second:,.0f} tokens/s; {hours:.2g} hours for the rest on one process"
            )

    def score(self, num_shards: int | None, shard: int | None) -> None:
        """Scores what is missing: this process's share, or the share that was asked for."""
        if self.context.rank == 0:
            self.plan(None)
        rows = self.rows
        if num_shards is None:
            reference_rewards(rows, self.settings, self.context)
            return
        references = self.references
        check_revisions(references, self.cache, update=True)
        for reference in references:
            if reference.scorer is None:
                continue
            unscored = Rows(rows.table.filter(reference.lookup(rows, self.cache).missing), {})
            prepared = prepare_missing(reference.scorer, unscored, self.cache, Share(shard, num_shards))
            device, tokens = accelerator(self.context, reference.scorer.devices), self.settings.batch_tokens
            score_prepared(reference.scorer, prepared, unscored, self.cache, device=device, batch_tokens=tokens)
            console.print(f"{reference.settings.label}: shard {shard} of {num_shards}: {len(prepared)} rows scored")

    def show(self, count: int) -> None:
        """Prints the first rows as each reference sees them, counted tokens in colour."""
        rows = self.rows
        for reference in self.references:
            if reference.scorer is None:
                console.print(f"{reference.settings.label}: imported scores, no model to show")
                continue
            for index in range(min(count, len(rows))):
                where = rows.where(index)
                rendered = reference.scorer.render(rows.conversation(index), where)
                counts = f"{rendered.num_counted} of {len(rendered.input_ids)} tokens counted"
                console.rule(f"{reference.settings.label}: {where}: {counts}")
                console.print(coloured(rendered))

    def export(self, out: str, list_rows: bool) -> None:
        """Writes the cached scores."""
        rows, references = self.rows, self.references
        lookups = {r.settings.source: r.lookup(rows, self.cache) for r in references}
        identities = {r.settings.source: _identity(r) for r in references}
        texts = rows.table[CONVERSATION] if list_rows else None
        lines = export_scores(out, rows.keys, lookups, identities, texts)
        missing = {source: int(np.isnan(lookup.rewards).sum()) for source, lookup in lookups.items()}
        unscored = ", ".join(f"{source}: {count}" for source, count in missing.items() if count)
        console.print(f"{out}: {lines} lines" + (f"; rows without a score: {unscored}" if unscored else ""))

    def import_scores(self, path: str) -> None:
        """Takes a score file into the cache."""
        sources = [reference.source for reference in self.settings.references if reference.scores is None]
        for model, count in import_scores(path, sources, self.rows.keys, self.cache).items():
            console.print(f"{model}: {count} scores imported into {self.cache.folder}")


def _method_run(config: str) -> MethodRun:
    for plugin in PluginManager.get_instance().plugins.values():
        if isinstance(plugin, PoftPlugin) and plugin.method_run is not None:
            return plugin.method_run
    raise ValueError(f"{config}: not a config of ours: it needs `plugins: [poft_plugin.PoftPlugin]` and `rl: poft`")


def _identity(reference: Reference):  # type: ignore[no-untyped-def]
    if reference.scorer is not None:
        return reference.scorer.identity
    return reference.imported.identity if reference.imported else None
