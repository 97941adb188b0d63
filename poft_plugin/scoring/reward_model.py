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
from poft_plugin.scoring.loading import load_complete
from poft_plugin.scoring.neox_reward_model import CHAT_TEMPLATE, ROLE_TOKENS, NeoXRewardConfig, NeoXRewardModel
from poft_plugin.scoring.packs import lay_out, pack_inputs
from poft_plugin.scoring.pooling import linear, pooled_hidden, pooled_position, right_end, right_padded
from poft_plugin.scoring.pretrained import PretrainedScorer
from poft_plugin.scoring.reward_heads import check_one_label, completed_config, is_openrlhf, readable_tokens
from poft_plugin.scoring.reward_probe import check_alike, own_scores, probe_sequences
from poft_plugin.scoring.scorer import Identity, PreparedRow, Score

CONTRACT = "reward model, logit of the one label, version 2"

PROBE_ROWS = 4
"""Rows of the data, the shortest ones, that weights are tried on besides made-up ones."""

HEADLESS = "Use a checkpoint that was trained as a reward model"


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
    _seen: list[np.ndarray] = field(default_factory=list, init=False, repr=False)
    _renamed: dict[str, str] = field(default_factory=dict, init=False, repr=False)

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
        config, self._renamed = completed_config(super().config, self.checkpoint, self.title)
        return config

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
        if self.checkpoint.gguf is not None:
            raise ValueError(
                f"{self.title}: a GGUF file, which holds a language model and no score head. Give the folder or "
                "repository that the reward model was published in"
            )
        self._check_architecture()
        _ = self.attention
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
        self.check_ids(ids, where)
        whole = PreparedRow(key, ids, counted, rendered.skipped)
        if self.max_length is None or len(whole) <= self.max_length:
            self._seen = sorted([*self._seen, ids], key=len)[:PROBE_ROWS]
            return whole
        kept = right_end(ids, self.max_length, keep_first=int(ids[0]) in self._beginnings)
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
        renamed = {"key_mapping": self._renamed} if self._renamed else {}
        model = load_complete(
            NeoXRewardModel if self._is_neox else AutoModelForSequenceClassification,
            self.checkpoint.location,
            self.title,
            remedy=HEADLESS,
            config=self.config,
            dtype=self.dtype,
            device_map={"": device},
            attn_implementation=self.attention,
            **renamed,
            **source,
        )
        self._model, self._device = model.eval(), device
        self._check_scores()
        if self._is_neox or isinstance(self._linear_head, nn.Linear):
            self._try_packs()

    def _scores(self, batch: Sequence[PreparedRow], *, packed: bool) -> list[Score]:
        """Rewards of a batch of prepared rows, each row's own last token (or mean) pooled: as a pack, or padded."""
        if packed:
            rewards = self._packed_rewards(batch)
        else:
            rewards = self._rewards(*right_padded([row.input_ids for row in batch], filler=self._filler))
        return [Score(row.key, reward, len(row)) for row, reward in zip(batch, rewards.tolist(), strict=True)]

    def _packed_rewards(self, batch: Sequence[PreparedRow]) -> Tensor:
        """`(B,)`: what rows begin with in common is read once, and then pooled for each of them."""
        pack = lay_out(batch)
        with torch.inference_mode():
            hidden = self._model.base_model(**pack_inputs(pack, self._device), use_cache=False)[0][0]
            places = [torch.from_numpy(row).to(hidden.device) for row in pack.places]
            if self._is_neox and self._pooling == "mean":
                pooled = torch.stack([hidden[place].float().mean(0) for place in places])
            else:
                pooled = hidden[
                    torch.stack([place[self._pooled(row)] for row, place in zip(batch, places, strict=True)])
                ]
            return linear(pooled, self._linear_head)[:, 0]

    def _pooled(self, row: PreparedRow) -> int:
        """The position in a row that its score is made of."""
        return len(row) - 1 if self._is_neox else pooled_position(row.input_ids, self._padding)

    @property
    def _linear_head(self) -> Any:
        """The layer that makes a score of a pooled state, where the model has one by the usual name."""
        return self._model.out_proj if self._is_neox else getattr(self._model, "score", None)

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
            return linear(pooled_hidden(hidden, ids, mask, self._padding), head)[:, 0]

    def _check_scores(self) -> None:
        filler, special = self._filler, {*self.tokenizer.all_special_ids, self.config.get_text_config().pad_token_id}
        known = int(self._model.get_input_embeddings().num_embeddings)
        last = filler if isinstance(getattr(self._model, "score", None), nn.Linear) else None
        made_up = probe_sequences(known, special, self.max_length, last)
        group = self.batch_group(len(made_up[0]))
        rows = [*made_up, *(row for row in self._seen if self.batch_group(len(row)) == group)]
        alone = torch.cat([self._rewards(*right_padded([row], filler=filler)) for row in rows])
        others = {
            "in a padded batch": self._rewards(*right_padded(rows, filler=filler)),
            "from the model's own forward": own_scores(self._model, rows, self._padding, self._device),
        }
        check_alike(alone, others, self.dtype, f"{self.title}: {type(self._model).__name__}")

    def _check_architecture(self) -> None:
        if self._is_neox:
            if self._pooling not in ("mean", "last"):
                raise ValueError(f"{self.title}: pooling {self._pooling!r} in its config.json; known are mean and last")
            return
        check_one_label(self.config, self.settings, self.title)

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
    def _padding(self) -> int | None:
        """The id that its own pooling passes over; None where it pools the last token, whichever it is."""
        if is_openrlhf(self.config):
            return None
        padding: int | None = self.config.get_text_config().pad_token_id
        return padding

    @property
    def _filler(self) -> int:
        """An id to pad batches with: the model's own, where its weights have a row for it."""
        own = self.config.get_text_config().pad_token_id
        return own if own is not None and 0 <= own < self.config.get_text_config().vocab_size else 0

    @property
    def _pooling(self) -> str:
        return self.config.pooling or "last"

    @cached_property
    def _positions(self) -> int | None:
        """Tokens that the model can read; None where its config names no bound."""
        return readable_tokens(self.config.get_text_config())

    @cached_property
    def _beginnings(self) -> set[int | None]:
        """Ids that begin a text, before its first word."""
        return {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id}
