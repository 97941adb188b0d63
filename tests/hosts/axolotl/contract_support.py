"""What the contract tests share: how a broken fact is reported, and tiny host inputs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")  # else its telemetry client hangs at exit

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest import mock

import axolotl
import pytest
import torch
from axolotl.integrations import base
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers import multipack
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SINCE_0_20, SINCE_0_21 = (Version(axolotl.__version__) >= Version(since) for since in ("0.20.0", "0.21.0"))
"""Where a fact differs by version, its test says so for each."""

WORDS = "<unk> <s> </s> <pad> user assistant system a b c d e f g h".split()
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' + eos_token + ' ' }}{% endfor %}"


class host_fact(ContextDecorator):  # noqa: N801 - reads as a decorator
    """Marks a test of a host fact; when it fails, says what that breaks and where to look.

    Args:
        fact: what Axolotl (or Transformers) does today.
        breaks: what in `poft_plugin` leans on it.
        look: where in the host the fact lives.
    """

    def __init__(self, fact: str, *, breaks: str, look: str) -> None:
        self.note = f"HOST CONTRACT BROKEN\n  fact:   {fact}\n  breaks: {breaks}\n  look:   {look}"

    def __enter__(self) -> host_fact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.note)


class Recorder(BasePlugin):
    """Notes the calls of the hooks we implement, with the signatures we give them."""

    def __init__(self, datasets: str | None = None, collator: tuple[Any, Any] | None = None) -> None:
        super().__init__()
        self.datasets, self.collator = datasets, collator
        self.calls: list[Any] = []

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> str | None:
        self.calls.append(("load_datasets", preprocess))
        return self.datasets

    def get_collator_cls_and_kwargs(self, cfg: DictDefault, is_eval: bool = False) -> tuple[Any, Any] | None:
        self.calls.append(("collator", is_eval))
        return self.collator

    def get_trainer_cls(self, cfg: DictDefault) -> type | None:
        return None if self.datasets is None else dict

    def post_train_unload(self, cfg: DictDefault) -> None:
        self.calls.append("post_train_unload")


def raw_config(**changes: Any) -> DictDefault:
    """A minimal raw SFT config, as it comes out of a YAML file."""
    entry = {"path": "rows.jsonl", "ds_type": "json", "type": "chat_template"}
    config = {
        "base_model": "no-such-model",
        "datasets": [entry],
        "output_dir": "unused",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 0.001,
        "optimizer": "adamw_torch",
        "sequence_len": 32,
        "dataset_num_proc": 1,
        "attn_implementation": "sdpa",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
    }
    return DictDefault({**config, **changes})


def valid_config(**changes: Any) -> DictDefault:
    """The same config after the host's validator, with what its normaliser would add."""
    cfg = validate_config(raw_config(**changes))
    cfg.model_config_type = "llama"
    cfg.batch_size = cfg.micro_batch_size * cfg.gradient_accumulation_steps
    cfg.world_size = 1
    cfg.dataset_num_proc = None  # no worker processes
    return cfg


@contextmanager
def only_plugins(*plugins: BasePlugin) -> Iterator[PluginManager]:
    """The plugin manager with exactly these plugins; what it held before comes back.

    The singleton itself stays: host modules may keep a reference to it. Nor are there any installed plugins, which
    Axolotl 0.21 adds whenever it is asked for the manager.
    """
    manager = PluginManager.get_instance()
    before, before_cfg = manager.plugins, manager.cfg
    manager.plugins = OrderedDict((f"plugin-{index}", plugin) for index, plugin in enumerate(plugins))
    with ExitStack() as stack:
        if SINCE_0_21:
            stack.enter_context(mock.patch.object(base, "get_builtin_plugins", tuple))
        try:
            yield manager
        finally:
            manager.plugins, manager.cfg = before, before_cfg


def pack_without_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multipack sampler collects garbage at every call, 0.2 s each; tests leave that out."""
    monkeypatch.setattr(multipack, "gc", SimpleNamespace(collect=int))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` with a chat template."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama() -> LlamaForCausalLM:
    """A one-layer Llama with random weights, in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    """A conversation whose turns alternate between user and assistant."""
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": turns, **fields}


def token_row(*ids: int, **columns: Any) -> dict[str, Any]:
    """A tokenized row as the host prepares it for packing; every token is trained on."""
    size = len(ids)
    row = {"input_ids": list(ids), "labels": list(ids), "attention_mask": [1] * size}
    return {**row, "position_ids": list(range(size)), "length": size, **columns}
