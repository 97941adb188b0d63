"""The scorer of PoFT: a causal language model's mean log-probability of the response, under its own template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from poft_plugin.config import ReferenceConfig
from poft_plugin.data.render import EndOfTurn, Renderer
from poft_plugin.data.rows import Conversation, RowError
from poft_plugin.losses import install_response_forward, mean_logps, response_positions
from poft_plugin.losses.head import check_head
from poft_plugin.losses.logps import IGNORED
from poft_plugin.scoring.gguf_files import dequantized
from poft_plugin.scoring.loading import load_complete
from poft_plugin.scoring.packs import lay_out, pack_inputs, predictions
from poft_plugin.scoring.pretrained import PROBE_TOKENS, PROBE_TOLERANCE, PretrainedScorer
from poft_plugin.scoring.scorer import Identity, PreparedRow, Score

CONTRACT = "causal LM, mean log-probability of the response, version 2"


@dataclass
class CausalLMScorer(PretrainedScorer):
    """Scores rows with one reference.

    Args:
        settings: its entry under `poft.references`.
        checkpoint: where it is.
        include_end_of_turn: count end-of-turn tokens; `auto`: where the policy's labels hold one.
    """

    settings: ReferenceConfig
    include_end_of_turn: EndOfTurn = "auto"

    @property
    def kind(self) -> str:
        """What it is in messages."""
        return "reference"

    @property
    def context_length(self) -> int | None:
        """Longest row it can read, in tokens; None where its config names no bound."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def identity(self) -> Identity:
        """What its scores depend on."""
        identity = self._identity(
            CONTRACT,
            quantization=self.settings.quantization,
            **self.stored_quantization,
            truncated_to=self.context_length if self.settings.on_long_row == "truncate" else None,
            include_end_of_turn=self.include_end_of_turn,
        )
        return replace(identity, highest=0.0)

    def check(self) -> None:
        """Opens tokenizer, config and template, without weights.

        Raises:
            ValueError: for a missing template, a slow tokenizer, or settings that do not fit the model.
        """
        if self.checkpoint.gguf is not None and self.settings.quantization is not None:
            raise ValueError(
                f"{self.title}: quantization: {self.settings.quantization} cannot be had on top of a GGUF file, whose "
                "weights are dequantised; remove it"
            )
        _ = self.attention, self.renderer

    def prepare(self, key: str, conversation: Conversation, where: str) -> PreparedRow:
        """Tokenizes a row; with `on_long_row: truncate` it is cut at its end to the context length.

        Raises:
            RowError: as the renderer, or if nothing of the response is left.
        """
        rendered = self.render(conversation, where)
        self.check_ids(np.asarray(rendered.input_ids), where)
        length = self.context_length if self.settings.on_long_row == "truncate" else None
        counted = np.asarray(rendered.counted[:length], dtype=bool)
        if not counted.any():
            raise RowError(
                f"{where}: {self.title}: the prompt alone fills its context of {length} tokens; nothing of "
                "the response is left after truncation. Set `on_long_row: drop` or remove the row"
            )
        ids = np.asarray(rendered.input_ids[:length], dtype=np.int32)
        return PreparedRow(key, ids, counted, rendered.skipped, rendered.lacks_end)

    @property
    def drops_long_rows(self) -> bool:
        """Whether rows longer than that are dropped; an error otherwise."""
        return self.settings.on_long_row == "drop"

    @property
    def devices(self) -> int:
        """Accelerators that one copy takes."""
        return self.settings.devices

    def load(self, device: str) -> None:
        """Loads the weights onto `device` and the next ones that a copy takes.

        Raises:
            ValueError: if the checkpoint is not complete, the head does not give what the model's own logits say, or
                a row's score depends on the rows beside it.
        """
        # not None where it is not to be shrunk: that would hide how a checkpoint was quantized already
        config = self.quantization_config
        shrunk: dict[str, Any] = {} if config is None else {"quantization_config": config}
        if self.checkpoint.gguf is not None:
            shrunk = dequantized()
        model = load_complete(
            AutoModelForCausalLM,
            self.checkpoint.location,
            self.title,
            dtype=self.dtype,
            attn_implementation=self.attention,
            **shrunk,
            **_placement(device, self.settings.devices),
            **self._source,
        ).eval()
        parts = install_response_forward(model)
        self._model, self._device = model, device
        check_head(model, parts.transform, int(parts.head.weight.shape[0]), torch.device(device))
        self._check_batches()
        self._try_packs()

    @property
    def stored_quantization(self) -> dict[str, str]:
        """How its checkpoint is quantized already, as a part of its identity; nothing where it is not."""
        stored = getattr(self.config, "quantization_config", None)
        if stored is None:
            return {}
        found = stored if isinstance(stored, dict) else stored.to_dict()
        return {"stored_quantization": str(found.get("quant_method"))}

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """How bitsandbytes is to shrink the weights, or None."""
        return _quantization(self.settings.quantization, self.dtype)

    def _scores(self, batch: Sequence[PreparedRow], *, packed: bool) -> list[Score]:
        """Rewards of a batch of prepared rows, the head on response positions only: as a pack, or right-padded."""
        if self.rope.forgets(max(map(len, batch))):
            self._forget_longer_rows(int(batch[0].input_ids[0]))
        with torch.inference_mode():
            logps, numbers = self._packed(batch) if packed else self._padded(batch)
            rewards, counts = mean_logps(logps.double(), numbers.to(logps.device), len(batch))
        return [
            Score(row.key, reward, int(count))
            for row, reward, count in zip(batch, rewards.tolist(), counts.tolist(), strict=True)
        ]

    def _packed(self, batch: Sequence[PreparedRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """`(N,)` log-probabilities of counted tokens and their rows, what rows begin with in common read once."""
        pack = lay_out(batch)
        positions, targets, numbers = map(torch.from_numpy, predictions(batch, pack))
        logps = self._model(
            **pack_inputs(pack, self._device),
            use_cache=False,
            response_positions=positions.to(self._device),
            response_targets=targets.to(self._device),
        )
        return logps, numbers

    def _padded(self, batch: Sequence[PreparedRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from a right-padded batch.

        No attention mask: in a causal model no token sees the padding that comes after it, and without a mask
        attention takes its fast way.
        """
        ids, labels, sequences = (tensor.to(self._device) for tensor in _padded(batch))
        positions, targets, numbers = response_positions(labels, sequences)
        logps = self._model(input_ids=ids, use_cache=False, response_positions=positions, response_targets=targets)
        return logps, numbers

    def _forget_longer_rows(self, token: int) -> None:
        """Brings dynamic frequencies back to where they began, as a short row does."""
        with torch.inference_mode():
            self._model.base_model(input_ids=torch.tensor([[token]], device=self._device), use_cache=False)

    def _check_batches(self) -> None:
        """A row's score must be that of the row alone; few models break that (some that look at what comes after)."""
        random = np.random.default_rng(0)
        words = random.integers(0, self._model.get_input_embeddings().num_embeddings, PROBE_TOKENS)
        rows = [PreparedRow("", ids, np.arange(len(ids)) > 0) for ids in (words, words[: PROBE_TOKENS // 2])]
        alone = np.array([self._scores([row], packed=False)[0].reward for row in rows])
        worst = float(np.abs(alone - [score.reward for score in self._scores(rows, packed=False)]).max())
        allowed = PROBE_TOLERANCE[self.dtype] * float(np.abs(alone).max())
        if worst > allowed:
            raise ValueError(
                f"{self.title}: {type(self._model).__name__}: a row's score differs by {worst:.3g} in a padded batch "
                f"(allowed: {allowed:.3g}, in {str(self.dtype).removeprefix('torch.')}). This architecture cannot be "
                "used"
            )

    def remark(self, prepared: Sequence[PreparedRow]) -> str | None:
        """What its template leaves out: turns of the prompt, or the token that ends a response."""
        lacking = sum(row.lacks_end for row in prepared)
        remarks = [self.skipped_remark(prepared)]
        if lacking:
            remarks.append(
                f"{self.title}: {lacking:,} of {len(prepared):,} rows are scored without an end-of-turn token, which "
                "the policy is trained on: its template writes no special token there"
            )
        return "\n".join(filter(None, remarks)) or None

    def flops(self, tokens: int, response_tokens: int) -> float:
        """Of one forward: `2 x parameters` per token, the head on response tokens only."""
        return 2.0 * self._sizes.body * tokens + 2.0 * self._sizes.head * response_tokens

    def _default_template(self) -> str:
        raise ValueError(
            f"{self.title} ({self.settings.model}): its tokenizer has no chat template. A reference must be an aligned "
            "model; give its format as `chat_template:` (a file or Jinja text)"
        )

    def _make_renderer(self) -> Renderer:
        return replace(super()._make_renderer(), include_end_of_turn=self.include_end_of_turn)

    def _empty_model(self) -> Any:
        return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.settings.trust_remote_code)


def _padded(batch: Sequence[PreparedRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(R, L)` ids, labels and sequence numbers; padding is told by its number -1, never by its id."""
    shape = len(batch), max(map(len, batch))
    ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    sequences = np.full(shape, -1, dtype=np.int64)
    for number, row in enumerate(batch):
        ids[number, : len(row)] = row.input_ids
        labels[number, : len(row)][row.counted] = row.input_ids[row.counted]
        sequences[number, : len(row)] = number
    return torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(sequences)


def _quantization(name: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if name is None:
        return None
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _placement(device: str, devices: int) -> dict[str, Any]:
    """The whole model on one device, or balanced over the `devices` GPUs that begin at `device`."""
    if devices == 1:
        return {"device_map": {"": device}}
    first = torch.device(device).index or 0
    gpus = range(first, first + devices)
    return {"device_map": "balanced", "max_memory": {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}}
