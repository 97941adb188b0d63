"""What every scorer with a checkpoint shares: tokenizer, config, chat template, renderer, dtype, common identity."""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateSyntaxError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from poft_plugin.attention.shared import attention_of, use_shared_attention, window_of
from poft_plugin.config import ReferenceConfig, RewardModelConfig
from poft_plugin.data.preparation import Rows
from poft_plugin.data.render import Rendered, Renderer
from poft_plugin.data.rows import Conversation
from poft_plugin.data.templates import EndlessTemplateError, TemplateFailedError, render_template
from poft_plugin.losses.head import unwrapped
from poft_plugin.scorers.attention import complete_attention
from poft_plugin.scorers.chat_templates import own_template, resolve_template
from poft_plugin.scorers.gguf_files import check_gguf_installed, correct_special_tokens, gguf_errors, gguf_path
from poft_plugin.scorers.rope import RopeBounds, rope_bounds
from poft_plugin.scorers.sizes import Sizes
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.identity import Identity, Score
from poft_plugin.scoring.packs import probe_rows
from poft_plugin.scoring.scorer import PreparedRow

SKIPPED = "skipped "
"""Before a role, the name of its number in a tally."""

PACK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
"""Of the largest score of the rows that packs are tried on. A row that misses its beginning is off by far more."""

PROBE_TOKENS = 12
PROBE_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Of the largest score in the probe. A wrong pooling is off by as much as scores differ from row to row."""

_PROBE = [{"role": "user", "content": "?"}]


@dataclass
class PretrainedScorer(ABC):
    """A checkpoint with a tokenizer and a chat template; what it measures is its subclass's.

    Args:
        settings: its config entry.
        checkpoint: where it is.
    """

    settings: ReferenceConfig | RewardModelConfig
    checkpoint: Checkpoint
    _model: Any = field(default=None, init=False, repr=False)
    _device: str = field(default="cpu", init=False, repr=False)
    _pack_length: int = field(default=0, init=False, repr=False)

    @property
    def name(self) -> str:
        """Short name in tables."""
        return self.settings.label

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is in messages."""

    @property
    def title(self) -> str:
        """Kind and name, as messages begin."""
        return f"{self.kind} {self.name!r}"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        source = self._source
        with gguf_errors(self.checkpoint, self.title):
            tokenizer = AutoTokenizer.from_pretrained(self.checkpoint.location, **source)
            if self.checkpoint.gguf is not None:
                correct_special_tokens(tokenizer, gguf_path(self.checkpoint))
        return tokenizer

    @cached_property
    def config(self) -> Any:
        """Its transformers config."""
        source = self._source
        with gguf_errors(self.checkpoint, self.title):
            return AutoConfig.from_pretrained(self.checkpoint.location, **source)

    @cached_property
    def chat_template(self) -> str:
        """The template's Jinja text.

        Raises:
            ValueError: if neither the config nor the tokenizer has one, or the config's is not known.
        """
        template = resolve_template(self.settings.chat_template, own_template(self.tokenizer), self.title)
        return template or self._default_template()

    @cached_property
    def renderer(self) -> Renderer:
        """Renders rows for it.

        Raises:
            ValueError: if its template is not valid Jinja.
        """
        try:
            render_template(self.tokenizer, _PROBE, chat_template=self.chat_template)
        except EndlessTemplateError as error:
            raise ValueError(f"{self.title}: its chat template: {error}. Correct `chat_template:`") from error
        except TemplateFailedError as error:  # it may refuse a conversation like this one
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise ValueError(
                    f"{self.title}: its chat template is not valid Jinja: {error}. Correct `chat_template:`"
                ) from error
        return self._make_renderer()

    @cached_property
    def attention(self) -> str | None:
        """Transformers' name of the attention to score with; None for its own choice.

        Raises:
            ValueError: if the chosen one leaves out what the model's config asks for.
        """
        return complete_attention(self.config.get_text_config(), self.settings.attn_implementation, self.title)

    @cached_property
    def rope(self) -> RopeBounds:
        """Lengths at which its rotary positions change their frequencies."""
        return rope_bounds(self.config.get_text_config())

    def batch_group(self, length: int) -> tuple[int, int]:
        """Rows of this many tokens share batches only with rows of the same group."""
        return self.rope.group(length)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, `auto` resolved."""
        if self.settings.dtype != "auto":
            chosen: torch.dtype = getattr(torch, self.settings.dtype)
            return chosen
        stored = self.config.dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32

    def prepare_row(self, rows: Rows, index: int) -> PreparedRow:
        """Tokenizes one of the rows, whatever its length; `RowError` where it cannot be scored."""
        return self.prepare(rows.keys[index].as_py(), rows.conversation(index), rows.where(index))

    def render_row(self, rows: Rows, index: int) -> Rendered | None:
        """One of the rows as the model reads it, counted tokens marked."""
        return self.render(rows.conversation(index), rows.where(index))

    def check_ids(self, ids: np.ndarray, where: str) -> None:
        """Refuses tokens that the weights have no row for.

        Looked for in rows, not in the vocabulary: tokenizers hold tokens beyond the weights that no text has
        (Gemma 3's of images).

        Raises:
            ValueError: naming token and sizes; it is the model that does not fit, not the row.
        """
        known = int(self.config.get_text_config().vocab_size)
        highest = int(ids.max(initial=0))
        if highest >= known:
            raise ValueError(
                f"{self.title} ({self.settings.model}): its tokenizer has {len(self.tokenizer)} tokens, its weights "
                f"{known}: {self.tokenizer.convert_ids_to_tokens(highest)!r} (id {highest}, in {where}) has none. Save "
                "the model with resized embeddings, trained ones, or give it the tokenizer that belongs to it"
            )

    @abstractmethod
    def prepare(self, key: str, conversation: Conversation, where: str) -> PreparedRow:
        """Tokenizes a conversation."""

    def render(self, conversation: Conversation, where: str) -> Rendered:
        """One row as this model sees it."""
        return self.renderer(conversation, where)

    def tally(self, prepared: Sequence[PreparedRow]) -> dict[str, int]:
        """Rows, and in how many of them its template leaves out turns of each role."""
        skipped = Counter(f"{SKIPPED}{role}" for row in prepared for role in row.skipped)
        return {"rows": len(prepared), **skipped}

    def skipped_remark(self, counts: Mapping[str, int]) -> str | None:
        """A warning where its template leaves out turns of the prompt: the model judges what it has not read."""
        roles = {name.removeprefix(SKIPPED): count for name, count in counts.items() if name.startswith(SKIPPED)}
        if not roles:
            return None
        left_out = ", ".join(
            f"turns of role {role!r} in {count:,} of {counts['rows']:,} rows" for role, count in roles.items()
        )
        merge = "`system_turns: merge` or " if "system" in roles else ""
        return (
            f"WARNING: {self.title}: its chat template leaves out {left_out}: it scores answers without having read "
            f"them. Set {merge}another `chat_template:` for it, or remove such rows"
        )

    def num_parameters(self) -> tuple[int, int]:
        """Parameters of the model, and of its head, from the config alone."""
        return self._sizes.total, self._sizes.head

    @property
    def pack_length(self) -> int:
        """Tokens of the longest row that the loaded model reads in a pack, prefixes once; 0 where it reads none."""
        return self._pack_length

    def score(self, batch: Sequence[PreparedRow]) -> list[Score]:
        """Scores one batch of prepared rows: as a pack, where the model reads packs and all rows fit, or padded."""
        return self._scores(batch, packed=max(map(len, batch)) <= self._pack_length)

    @abstractmethod
    def _scores(self, batch: Sequence[PreparedRow], *, packed: bool) -> list[Score]:
        """Scores of a batch in one of the two ways."""

    def unload(self) -> None:
        """Frees the weights."""
        self._model, self._pack_length = None, 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @abstractmethod
    def _default_template(self) -> str:
        """The template where neither the config nor the tokenizer has one; an error where there is none."""

    @abstractmethod
    def _empty_model(self) -> Any:
        """The model as its config describes it, with new weights."""

    def _make_renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.chat_template, self.title, self.settings.system_turns)

    def _identity(self, contract: str, **fields: Any) -> Identity:
        """What every scorer's scores depend on, and the fields that are its own."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        return Identity(
            {
                "contract": contract,
                **self.checkpoint.identity,
                "dtype": str(self.dtype).removeprefix("torch."),
                "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
                "special_tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
                "chat_template": self.chat_template,
                "system_turns": self.settings.system_turns,
                **fields,
            }
        )

    def _try_packs(self) -> None:
        """Lets the loaded model read packs, if a few rows get there the scores that they get apart; says so if not."""
        if attention_of(self._model) != "sdpa":
            return
        rows = probe_rows(int(self._model.get_input_embeddings().num_embeddings))
        apart = np.array([self._scores([row], packed=False)[0].value for row in rows])
        use_shared_attention(self._model)
        try:
            together = [score.value for score in self._scores(rows, packed=True)]
        except (TypeError, ValueError):  # it takes no position ids, or masks more than a pack does
            together = [float("nan")] * len(rows)
        if np.abs(apart - together).max() <= PACK_TOLERANCE[self.dtype] * np.abs(apart).max():
            self._pack_length = window_of(self.config.get_text_config()) or sys.maxsize
            return
        unwrapped(self._model).set_attn_implementation("sdpa")
        print(f"{self.title}: {type(self._model).__name__} reads each row whole: it cannot share prompts", flush=True)

    @cached_property
    def _sizes(self) -> Sizes:
        with torch.device("meta"):
            model = self._empty_model()
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
        if output is None:  # no language model: what lies outside the base model is the head
            head = {id(p): p.numel() for p in model.parameters()}
            for parameter in model.base_model.parameters():
                head.pop(id(parameter), None)
        else:
            head = {id(output.weight): output.weight.numel()}
        total = sum(p.numel() for p in model.parameters())
        outside = {id(embedding): embedding.numel(), **head}
        return Sizes(total, sum(head.values()), total - sum(outside.values()))

    @property
    def _source(self) -> dict[str, Any]:
        code = {"trust_remote_code": self.settings.trust_remote_code}
        if self.checkpoint.gguf is not None:
            check_gguf_installed(self.title)
        file = {} if self.checkpoint.gguf is None else {"gguf_file": self.checkpoint.gguf}
        return {"revision": self.checkpoint.commit or "main", **code, **file}
