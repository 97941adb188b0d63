"""OpenAssistant's reward models (`model_type: gpt_neox_reward_model`), unknown to transformers' auto classes.

A GPT-NeoX body, hidden states pooled over the row, a linear layer with bias. Nothing is registered with transformers.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXModel, GPTNeoXPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from poft_plugin.scorers.pooling import last_hidden, linear, mean_hidden

ROLE_TOKENS = {"system": "<|system|>", "user": "<|prompter|>", "assistant": "<|assistant|>"}

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    + "".join(
        f"{{% {'elif' if number else 'if'} m['role'] == '{role}' %}}{token}"
        for number, (role, token) in enumerate(ROLE_TOKENS.items())
    )
    + "{% else %}{{ raise_exception('only system, user and assistant turns') }}{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
"""Their format: `<|prompter|>TEXT<|endoftext|><|assistant|>TEXT<|endoftext|>`."""


class NeoXRewardConfig(GPTNeoXConfig):
    """GPT-NeoX's config and `pooling`: `mean` over the row's tokens, or its `last` one."""

    model_type = "gpt_neox_reward_model"

    pooling: str | None = "last"


class NeoXRewardModel(GPTNeoXPreTrainedModel):
    """`gpt_neox.*` and `out_proj.*`, as such checkpoints name their weights."""

    config_class = NeoXRewardConfig
    # buffers that old checkpoints carry, and that are computed nowadays
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"attention\.bias$",
        r"attention\.masked_bias$",
        r"rotary_emb\.inv_freq$",
    ]

    def __init__(self, config: NeoXRewardConfig):
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """Scores of a batch that is padded on the right.

        Args:
            input_ids: `(B, L)`.
            attention_mask: `(B, L)`, 1 on real tokens; None where all are.

        Returns:
            `logits` `(B, 1)`, float32.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.gpt_neox(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        pooled = mean_hidden(hidden, mask) if self.config.pooling == "mean" else last_hidden(hidden, mask)
        logits = linear(pooled, self.out_proj).float()
        return SequenceClassifierOutput(logits=cast(torch.FloatTensor, logits))
