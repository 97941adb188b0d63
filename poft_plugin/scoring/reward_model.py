"""The scorer of DEFT: a reward model's logit for a prompt with its response, under the model's own template."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from poft_plugin.config import RewardModelConfig
from poft_plugin.data.render import Renderer
from poft_plugin.data.rows import Conversation, RowError
from poft_plugin.scoring.neox_reward_model import CHAT_TEMPLATE, ROLE_TOKENS, NeoXRewardConfig, NeoXRewardModel
from poft_plugin.scoring.pooling import last_hidden, linear, right_padded
from poft_plugin.scoring.pretrained import PretrainedScorer
from poft_plugin.scoring.scorer import Identity, PreparedRow, Score

CONTRACT = "reward model, logit of the one label, version 1"

OFFSET_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
     "xlm-roberta-xl", "xmod"}
)  # fmt: skip
"""Model types whose first `pad_token_id + 1` positions are never a token's."""

PROBE_TOKENS = 12
PROBE_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Of the largest score in the probe. A wrong pooling is off by as much as scores differ from row to row."""


@dataclass
class RewardModelScorer(PretrainedScorer):
    """Scores rows with the reward model: the whole rendered text goes in, the logit of the one label comes out.

    Args:
        settings: the block `reward_model`.
        checkpoint: where it is.
    """

    settings: RewardModelConfig
    _cut: set[str] = field(default_factory=set, init=False, repr=False)
    _cut_responses: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def kind(self) -> str:
        """What it is in messages."""
        return "reward model"

    @cached_property
    def config(self) -> Any:
        """Its transformers config, or that of a `gpt_neox_reward_model`."""
        location, revision = self.checkpoint.location, self._source["revision"]
        stored, _ = PreTrainedConfig.get_config_dict(location, revision=revision)
        if stored.get("model_type") == NeoXRewardConfig.model_type:
            return NeoXRewardConfig.from_pretrained(location, revision=revision)
        return super().config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        if not self._is_neox:
            return super().tokenizer
        # found by its own name; the auto class would look for the config, which it does not know
        return AutoTokenizer.from_pretrained(self.checkpoint.location, config=self.config, **self._source)

    @property
    def max_length(self) -> int | None:
        """Tokens of a row as scored; longer ones are cut on the left. None where neither config names a bound."""
        return self.settings.max_length or self._positions

    @property
    def context_length(self) -> int | None:
        """None: no row is too long, since long ones are cut."""
        return None

    @property
    def drops_long_rows(self) -> bool:
        """No row is dropped."""
        return False

    @property
    def devices(self) -> int:
        """Accelerators that one copy takes."""
        return 1

    @cached_property
    def identity(self) -> Identity:
        """What its scores depend on."""
        pooling = {"pooling": self._pooling} if self._is_neox else {}
        return self._identity(CONTRACT, max_length=self.max_length, **pooling)

    def check(self) -> None:
        """Opens tokenizer, config and template, without weights.

        Raises:
            ValueError: if the checkpoint is no reward model with one label, has no chat template or no fast tokenizer,
                or `max_length` is above its context.
        """
        self._check_architecture()
        if self._positions is not None and (self.settings.max_length or 0) > self._positions:
            raise ValueError(
                f"{self.title}: max_length: {self.settings.max_length} is above the {self._positions} tokens that the "
                "model can read. Lower it, or leave it out"
            )
        _ = self.renderer

    def prepare(self, key: str, conversation: Conversation, where: str) -> PreparedRow:
        """Tokenizes a row; one longer than `max_length` loses its left, except for a token that begins every text.

        Raises:
            RowError: as the renderer, or if nothing of the response is left.
        """
        rendered = self.render(conversation, where)
        ids, counted = np.asarray(rendered.input_ids, dtype=np.int32), np.asarray(rendered.counted, dtype=bool)
        whole = PreparedRow(key, ids, counted, rendered.skipped)
        if self.max_length is None or len(whole) <= self.max_length:
            return whole
        kept = _right_end(ids, self.max_length, keep_first=int(ids[0]) in self._beginnings)
        row = PreparedRow(key, ids[kept], counted[kept], rendered.skipped)
        if counted.any() and not row.counted.any():
            raise RowError(
                f"{where}: {self.title}: its template writes {self.max_length} tokens or more after the response; "
                "nothing of the response is left. Raise `max_length:` or change `chat_template:`"
            )
        self._cut.add(key)
        if row.counted.sum() < counted.sum():
            self._cut_responses.add(key)
        return row

    def remark(self, prepared: Sequence[PreparedRow]) -> str | None:
        """How many of these rows were cut, and how many lost part of their response."""
        cut = sum(row.key in self._cut for row in prepared)
        lost = sum(row.key in self._cut_responses for row in prepared)
        skipped = self.skipped_remark(prepared)
        if not cut:
            return skipped
        return (f"{skipped}\n" if skipped else "") + (
            f"{self.title}: {cut:,} of {len(prepared):,} rows longer than {self.max_length} tokens, cut on the left; "
            f"{lost:,} lost part of the response"
        )

    def flops(self, tokens: int, response_tokens: int) -> float:
        """Of one forward: `2 x parameters` per token, embeddings aside."""
        return 2.0 * self._sizes.body * tokens

    def load(self, device: str) -> None:
        """Loads the weights, and tries them on a few rows.

        Raises:
            ValueError: if the checkpoint lacks weights (its head would be random), or scores depend on padding, or
                are not the model's own.
        """
        source = {"revision": self._source["revision"]} if self._is_neox else self._source
        model_class: Any = NeoXRewardModel if self._is_neox else AutoModelForSequenceClassification
        model, report = model_class.from_pretrained(
            self.checkpoint.location,
            config=self.config,
            dtype=self.dtype,
            device_map={"": device},
            output_loading_info=True,
            **source,
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"{self.title}: its checkpoint lacks {len(missing)} weights, {missing[0]} among them, which would be "
                "random. Use a checkpoint that was trained as a reward model"
            )
        self._model, self._device = model.eval(), device
        self._check_scores()

    def score(self, batch: Sequence[PreparedRow]) -> list[Score]:
        """Rewards of a batch of prepared rows: right-padded, masked, each row's own last token (or mean) pooled."""
        ids, mask = right_padded([row.input_ids for row in batch], filler=0)
        return [
            Score(row.key, reward, len(row))
            for row, reward in zip(batch, self._rewards(ids, mask).tolist(), strict=True)
        ]

    def _rewards(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`(B,)`. A decoder's linear head is applied here; other heads pool in ways of their own."""
        model = self._model
        ids, mask = ids.to(self._device), mask.to(self._device)
        head = getattr(model, "score", None)
        with torch.inference_mode():
            if not isinstance(head, nn.Linear):
                logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
                return logits[:, 0].double()
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            return linear(last_hidden(hidden, mask), head)[:, 0]

    def _check_scores(self) -> None:
        rows, filler = self._probe()
        together = self._rewards(*right_padded(rows, filler=filler))
        alone = torch.cat([self._rewards(*right_padded([row], filler=filler)) for row in rows])
        with torch.inference_mode():
            own = torch.cat(
                [self._model(input_ids=right_padded([row], 0)[0].to(self._device)).logits[:, 0] for row in rows]
            )
        allowed = PROBE_TOLERANCE[self.dtype] * float(alone.abs().max())
        for other, what in ((together, "in a padded batch"), (own.double(), "from the model's own forward")):
            worst = float((alone - other).abs().max())
            if not worst <= allowed:
                raise ValueError(
                    f"{self.title}: {type(self._model).__name__}: a row's score differs by {worst:.3g} {what} "
                    f"(allowed: {allowed:.3g}, in {str(self.dtype).removeprefix('torch.')}); what its head does is not "
                    "known here. This architecture cannot be used"
                )

    def _probe(self) -> tuple[list[np.ndarray], int]:
        """Rows of two lengths without special tokens, and what to pad them with: a word like any other."""
        special = set(self.tokenizer.all_special_ids) | {self.config.get_text_config().pad_token_id}
        words = [i for i in range(self._model.get_input_embeddings().num_embeddings) if i not in special][:1000]
        long = min(PROBE_TOKENS, self.max_length or PROBE_TOKENS)
        random = np.random.default_rng(0)
        return [random.choice(words, size) for size in (long, long // 2) * 3], words[-1]

    def _check_architecture(self) -> None:
        if self._is_neox:
            if self._pooling not in ("mean", "last"):
                raise ValueError(f"{self.title}: pooling {self._pooling!r} in its config.json; known are mean and last")
            return
        named = self.config.architectures or []
        own_code = self.settings.trust_remote_code and "AutoModelForSequenceClassification" in (
            getattr(self.config, "auto_map", None) or {}
        )
        if named and not own_code and not any(name.endswith("ForSequenceClassification") for name in named):
            raise ValueError(
                f"{self.title} ({self.settings.model}): a {', '.join(named)}, no reward model; its head would be "
                "random. Give a sequence classifier with one label (`...ForSequenceClassification`)"
            )
        if self.config.is_encoder_decoder:
            raise ValueError(f"{self.title}: an encoder-decoder; use a decoder or an encoder with a one-label head")
        if self.config.num_labels != 1:
            raise ValueError(
                f"{self.title}: a reward model with several labels ({self.config.num_labels}); which of them is the "
                "reward is not known. Use a model with one label (`num_labels: 1` in its config.json)"
            )

    def _default_template(self) -> str:
        tokens = [ROLE_TOKENS["user"], ROLE_TOKENS["assistant"]]
        if self._is_neox and self.tokenizer.eos_token and {*tokens} <= self.tokenizer.get_vocab().keys():
            return CHAT_TEMPLATE
        raise ValueError(
            f"{self.title} ({self.settings.model}): its tokenizer has no chat template. Give the format that it was "
            "trained on as `chat_template:` (a file or Jinja text)"
        )

    def _make_renderer(self) -> Renderer:
        """A score needs the rendered text alone; where the response stands in it is for messages."""
        return replace(super()._make_renderer(), needs_response=False)

    def _empty_model(self) -> Any:
        if self._is_neox:
            return NeoXRewardModel(self.config)
        code = self.settings.trust_remote_code
        return AutoModelForSequenceClassification.from_config(self.config, trust_remote_code=code)

    @property
    def _is_neox(self) -> bool:
        return isinstance(self.config, NeoXRewardConfig)

    @property
    def _pooling(self) -> str:
        return self.config.pooling or "last"

    @cached_property
    def _positions(self) -> int | None:
        """Tokens that the model can read; None where its config names no bound."""
        config = self.config.get_text_config()
        bound = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if bound is not None and config.model_type in OFFSET_POSITIONS:
            bound -= (config.pad_token_id or 0) + 1
        return bound

    @cached_property
    def _beginnings(self) -> set[int | None]:
        """Ids that begin a text, before its first word."""
        return {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id}


def _right_end(ids: np.ndarray, length: int, *, keep_first: bool) -> np.ndarray:
    """Positions of the last `length` tokens, the first one of the row in the place of the first of these if asked.

    Examples:
        >>> [_right_end(np.arange(7), 3, keep_first=keep).tolist() for keep in (False, True)]
        [[4, 5, 6], [0, 5, 6]]
    """
    positions = np.arange(len(ids) - length, len(ids))
    positions[:1] *= not keep_first
    return positions
