"""What the commands of `axolotl poft` do, on one opened config."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from poft_plugin.config import DeftConfig, PoftConfig, RankingConfig, ScoringBlock
from poft_plugin.data.columns import CONVERSATION
from poft_plugin.data.preparation import Rows, RunContext
from poft_plugin.data.render import Rendered
from poft_plugin.hosts.axolotl.datasets import graded_rows, load_host_rows, run_context, unique_rows
from poft_plugin.hosts.axolotl.entries import ENTRIES, SALT_FIELD
from poft_plugin.hosts.axolotl.plugin import PoftPlugin
from poft_plugin.hosts.axolotl.run import MethodRun
from poft_plugin.report.console import make_console
from poft_plugin.report.tokens import marked
from poft_plugin.scoring.cache import Lookup, ScoreCache, cache_folder
from poft_plugin.scoring.checkpoints import MissingCheckpointError
from poft_plugin.scoring.exchange import export_scores, import_scores
from poft_plugin.scoring.graded import export_graded, write_graded_rows
from poft_plugin.scoring.plan import matmul_rate, plan_reference, print_plan, probe
from poft_plugin.scoring.pretrained import PretrainedScorer
from poft_plugin.scoring.references import open_references, reference_rewards
from poft_plugin.scoring.rewards import KIND as REWARD_MODEL
from poft_plugin.scoring.rewards import needs_scores, open_reward_model, response_rows, rows_to_score
from poft_plugin.scoring.run import Share, accelerator, prepare_missing, score_prepared
from poft_plugin.scoring.sources import Source, check_revisions, score_all
from poft_plugin.scoring.start_policy import KIND as START_POLICY
from poft_plugin.scoring.start_policy import open_start_policy, token_rows

console = make_console()


@dataclass(frozen=True)
class Job:
    """What one model is to score.

    Args:
        source: the model, or scores made elsewhere.
        rows: unique rows, as that model gets them.
    """

    source: Source
    rows: Rows


@dataclass
class Session:
    """A config with its rows, for one command.

    Args:
        config: the config file, for messages.
        cfg: the host's validated config.
        run: the method and its settings.
        scoring: the scoring keys of its block.
        context: this process.
    """

    config: str
    cfg: DictDefault
    run: MethodRun
    scoring: ScoringBlock
    context: RunContext

    @classmethod
    def open(cls, config: str) -> "Session":
        """Loads a config as the host does; nothing of its launcher (DeepSpeed, FSDP) is set up, for nothing trains.

        Raises:
            ValueError: if it is not a config of ours, or its method scores nothing.
        """
        cfg = load_cfg(config, deepspeed=None, fsdp=None, fsdp_config=None)
        run = _method_run(config)
        settings = run.settings
        if not isinstance(settings, (PoftConfig, RankingConfig)):
            raise ValueError(f"{config}: `rl: {run.method.name}` has nothing to score that is known here")
        sets = [ENTRIES[entry[SALT_FIELD]].label for entry in [*cfg.datasets, *(cfg.test_datasets or [])]]
        console.print(f"{config}: rl: {run.method.name} ({run.method.paper}); reading {', '.join(sets)}")
        return cls(config, cfg, run, settings, run_context(cfg, "score"))

    @property
    def cache(self) -> ScoreCache:
        """The score cache."""
        return ScoreCache(cache_folder(self.scoring.score_cache))

    @cached_property
    def rows(self) -> Rows:
        """Every row of the training and evaluation sets once."""
        train, evaluation, _ = load_host_rows(self.cfg)
        return unique_rows(train, evaluation)

    @cached_property
    def jobs(self) -> list[Job]:
        """What is scored for this config, checked, not loaded; maybe nothing."""
        settings = self.run.settings
        if isinstance(settings, PoftConfig):
            return [Job(source, self.rows) for source in open_references(settings, self.cache)]
        jobs = []
        assert isinstance(settings, RankingConfig)
        if settings.reward_model is not None and needs_scores(settings):
            responses = self._responses(rows_to_score(self.rows, settings))
            jobs.append(Job(open_reward_model(settings.reward_model, self.cache), responses))
        if self.run.method.needs_start_policy:
            policy = self.context.policy
            assert policy is not None
            sequences, _ = token_rows(self.rows, policy.sequence_len)
            jobs.append(Job(open_start_policy(policy, self.cache), sequences))
        return jobs

    def plan(self, batches: int | None) -> None:
        """Prints the plan, with `batches` the time of that many of each model; and grades that need no scoring."""
        self._plan_scoring(batches)
        settings = self.run.settings
        if not isinstance(settings, DeftConfig) or not settings.grades:
            return
        graders = [job for job in self.jobs if job.source.kind == REWARD_MODEL]
        if any(job.source.lookup(job.rows, self.cache).missing.any() for job in graders):
            console.print("grades: after scoring, here again")
            return
        graded_alone = replace(self.run.method, preprocessors=("response_scores",))  # no start policy is asked for
        graded_rows(self.cfg, replace(self.run, method=graded_alone), self.context)

    def _plan_scoring(self, batches: int | None) -> None:
        if not self.jobs:
            console.print("nothing to score: no model is asked for with these settings")
            return
        planned = [plan_reference(job.source, job.rows, self.cache) for job in self.jobs]
        scorers = [job.source.scorer for job in self.jobs]
        rates = [
            matmul_rate(accelerator(self.context, scorer.devices), scorer.dtype)
            if scorer is not None and plan.to_score
            else 1.0
            for scorer, (plan, _) in zip(scorers, planned, strict=True)
        ]
        print_plan([plan for plan, _ in planned], rates, self.cache, console)
        for scorer, (plan, prepared) in zip(scorers, planned, strict=True):
            if batches is None or scorer is None or not prepared:
                continue
            tokens = self.scoring.batch_tokens
            measured = probe(scorer, prepared, count=batches, batch_tokens=tokens, run=self.context)
            hours = plan.tokens / measured.tokens_per_second / 3600
            console.print(
                f"{plan.name}: measured {measured.rows_per_second:.1f} rows/s, "
                f"{measured.tokens_per_second:,.0f} tokens/s; {hours:.2g} hours for the rest on one process"
            )

    def score(self, num_shards: int | None, shard: int | None) -> None:
        """Scores what is missing: this process's share, or the share that was asked for."""
        if self.context.rank == 0:
            self._plan_scoring(None)
        if num_shards is not None:
            self._score_shard(Share(shard, num_shards))
        elif isinstance(self.run.settings, PoftConfig):
            reference_rewards(self.rows, self.run.settings, self.context)
        else:
            check_revisions([job.source for job in self.jobs], self.cache, update=True)
            for job in self.jobs:
                score_all([job.source], job.rows, self.cache, settings=self.scoring, run=self.context)

    def _score_shard(self, share: Share) -> None:
        check_revisions([job.source for job in self.jobs], self.cache, update=True)
        for job in self.jobs:
            scorer = job.source.scorer
            if scorer is None:
                continue
            unscored = Rows(job.rows.table.filter(job.source.lookup(job.rows, self.cache).missing), {})
            prepared = prepare_missing(scorer, unscored, self.cache, share)
            device, tokens = accelerator(self.context, scorer.devices), self.scoring.batch_tokens
            score_prepared(scorer, prepared, unscored, self.cache, device=device, batch_tokens=tokens)
            console.print(f"{job.source.label}: shard {share.index} of {share.count}: {len(prepared)} rows scored")

    def show(self, count: int) -> None:
        """Prints the first rows as each model sees them, counted tokens marked: all responses of a row together."""
        # the start policy reads the policy's own tokens
        shown = [job for job in self.jobs if job.source.kind != START_POLICY]
        if not shown:
            console.print("nothing to show: no reference and no reward model reads these rows (`axolotl preprocess "
                          "--debug` prints what the policy reads)")  # fmt: skip
        elif not console.is_terminal:
            console.print("each token that counts is between « and »")
        for job in shown:
            if not isinstance(job.source.scorer, PretrainedScorer):
                console.print(f"{job.source.label}: imported scores, no model to show")
                continue
            for index in range(min(count, len(self.rows))):
                self._show_row(job.source.scorer, index)

    def _show_row(self, scorer: PretrainedScorer, index: int) -> None:
        where = self.rows.where(index)
        if isinstance(self.run.settings, PoftConfig):
            _print_rendered(scorer.render(self.rows.conversation(index), where), f"{scorer.name}: {where}")
            return
        sample = self.rows.sample(index)
        names = [f"response {number + 1} of {len(sample.responses)}" for number in range(len(sample.responses))]
        for number, name in enumerate(["chosen", "rejected"] if len(names) == 2 else names):
            rendered = scorer.render(sample.conversation(number), where)
            _print_rendered(rendered, f"{scorer.name}: {where}: {name}")

    def export(self, out: str, *, list_rows: bool, levels: tuple[str, ...], jsonl: bool) -> None:
        """Writes the cached scores, or the graded rows themselves."""
        if isinstance(self.run.settings, PoftConfig):
            if levels or jsonl:
                raise ValueError("--levels and --format jsonl go with an `rl: deft_...`, which grades rows")
            self._export_references(out, list_rows)
            return
        if list_rows and not levels and not jsonl:
            self._export_responses(out)
            return
        if not (isinstance(self.run.settings, DeftConfig) and self.run.settings.grades):
            raise ValueError(f"{self.config}: `rl: {self.run.method.name}` with these settings grades nothing")
        graded = graded_rows(self.cfg, self.run, self.context)
        if jsonl:
            count = write_graded_rows(Path(out), graded[0], levels)
        else:
            count = export_graded(Path(out), graded, levels, self._reward_model(), texts=list_rows)
        console.print(f"{out}: {count} lines")

    def _export_references(self, out: str, list_rows: bool) -> None:
        lookups = {job.source.settings.source: job.source.lookup(self.rows, self.cache) for job in self.jobs}
        identities = {job.source.settings.source: job.source.identity for job in self.jobs}
        texts = self.rows.table[CONVERSATION] if list_rows else None
        lines = export_scores(out, self.rows.keys, lookups, identities, texts)
        missing = {source: int(lookup.missing_or_long.sum()) for source, lookup in lookups.items()}
        unscored = ", ".join(f"{source}: {count}" for source, count in missing.items() if count)
        console.print(f"{out}: {lines} lines" + (f"; rows without a score: {unscored}" if unscored else ""))

    def _export_responses(self, out: str) -> None:
        """Every response with its key and text, for scoring elsewhere; the reward model need not be here."""
        settings = self.run.settings
        assert isinstance(settings, RankingConfig)
        if settings.reward_model is None:
            raise ValueError(f"{self.config}: no `deft.reward_model` to score these responses with")
        responses = self._responses(rows_to_score(self.rows, settings))
        name = settings.reward_model.source
        try:
            source = open_reward_model(settings.reward_model, self.cache)
            lookup, identity = source.lookup(responses, self.cache), source.identity
        except MissingCheckpointError:
            nothing = np.full(len(responses), np.nan), np.zeros(len(responses), np.int32)
            lookup, identity = Lookup(*nothing), None
        texts = responses.table[CONVERSATION]
        lines = export_scores(out, responses.keys, {name: lookup}, {name: identity}, texts)
        console.print(f"{out}: {lines} lines; responses without a score: {int(lookup.missing_or_long.sum())}")

    def import_scores(self, path: str) -> None:
        """Takes a score file into the cache."""
        settings = self.run.settings
        if isinstance(settings, PoftConfig):
            sources = [reference.source for reference in settings.references if reference.scores is None]
            taken = import_scores(path, sources, self.rows.keys, self.cache)
        elif settings.reward_model is None:
            raise ValueError(f"{self.config}: no `deft.reward_model` whose scores could be imported")
        else:
            responses = self._responses(np.ones(len(self.rows), dtype=bool))
            source = settings.reward_model.source
            taken = import_scores(path, [source], responses.keys, self.cache, log_probabilities=False)
        for model, count in taken.items():
            console.print(f"{model}: {count} scores imported into {self.cache.folder}")

    def _responses(self, wanted: np.ndarray) -> Rows:
        """The responses of these rows, each after its prompt."""
        rows = Rows(self.rows.table.filter(pa.array(wanted)), {})
        return response_rows([rows.sample(index) for index in range(len(rows))], rows)[0]

    def _reward_model(self) -> Source | None:
        settings = self.run.settings.reward_model
        return None if settings is None else open_reward_model(settings, self.cache)


def _print_rendered(rendered: Rendered, title: str) -> None:
    console.rule(f"{title}: {rendered.num_counted} of {len(rendered.input_ids)} tokens counted")
    console.print(marked(rendered, in_colour=console.color_system is not None))


def _method_run(config: str) -> MethodRun:
    for plugin in PluginManager.get_instance().plugins.values():
        if isinstance(plugin, PoftPlugin) and plugin.method_run is not None:
            return plugin.method_run
    raise ValueError(f"{config}: poft_plugin was not loaded; `plugins:` needs the line poft_plugin.PoftPlugin")
