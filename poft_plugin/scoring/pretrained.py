"""What every scorer with a checkpoint shares: tokenizer, config, chat template, renderer, dtype, common identity."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from poft_plugin.config import ReferenceConfig, RewardModelConfig
from poft_plugin.data.preparation import Rows
from poft_plugin.data.render import Rendered, Renderer
from poft_plugin.data.rows import Conversation
from poft_plugin.scoring.chat_templates import own_template, resolve_template
from poft_plugin.scoring.checkpoints import Checkpoint
from poft_plugin.scoring.scorer import Identity, PreparedRow

_PROBE = [{"role": "user", "content": "?"}]


class Sizes(NamedTuple):
    """Parameters of a model, each counted once.

    Args:
        total: of the whole model.
        head: of its head (of the embeddings too, where the two are tied).
        body: what every token passes through: neither embeddings nor head.
    """

    total: int
    head: int
    body: int


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
        return AutoTokenizer.from_pretrained(self.checkpoint.location, **self._source)

    @cached_property
    def config(self) -> Any:
        """Its transformers config."""
        return AutoConfig.from_pretrained(self.checkpoint.location, **self._source)

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
            self.tokenizer.apply_chat_template(_PROBE, chat_template=self.chat_template, tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{self.title}: its chat template is not valid Jinja: {error}. Correct `chat_template:`"
            ) from error
        except (TemplateError, ValueError, TypeError, KeyError, IndexError):
            pass  # it may refuse a conversation like this one
        return self._make_renderer()

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

    @abstractmethod
    def prepare(self, key: str, conversation: Conversation, where: str) -> PreparedRow:
        """Tokenizes a conversation."""

    def render(self, conversation: Conversation, where: str) -> Rendered:
        """One row as this model sees it."""
        return self.renderer(conversation, where)

    def skipped_remark(self, prepared: Sequence[PreparedRow]) -> str | None:
        """A warning where its template leaves out turns of the prompt: the model judges what it has not read."""
        roles = Counter(role for row in prepared for role in row.skipped)
        if not roles:
            return None
        left_out = ", ".join(
            f"turns of role {role!r} in {count:,} of {len(prepared):,} rows" for role, count in roles.items()
        )
        merge = "`system_turns: merge` or " if "system" in roles else ""
        return (
            f"WARNING: {self.title}: its chat template leaves out {left_out}: it scores answers without having read "
            f"them. Set {merge}another `chat_template:` for it, or remove such rows"
        )

    def num_parameters(self) -> tuple[int, int]:
        """Parameters of the model, and of its head, from the config alone."""
        return self._sizes.total, self._sizes.head

    def unload(self) -> None:
        """Frees the weights."""
        self._model = None
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
        return {"revision": self.checkpoint.commit or "main", "trust_remote_code": self.settings.trust_remote_code}
