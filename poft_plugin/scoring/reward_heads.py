"""What a sequence-classification checkpoint is by its head, where its config.json does not say it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.utils.hub import cached_file

from poft_plugin.config import RewardModelConfig
from poft_plugin.scoring.checkpoints import Checkpoint

OPENRLHF = "RewardModel"
"""The architecture that OpenRLHF's checkpoints name: a sequence classifier's weights, its own way of pooling."""

HEADS = ("score.weight", "classifier.weight", "value_head.weight")
OFFSET_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
     "xlm-roberta-xl", "xmod"}
)  # fmt: skip
"""Model types whose first `pad_token_id + 1` positions are never a token's."""

FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Head:
    """The head of a checkpoint.

    Args:
        name: of its weight.
        rows: outputs, one per label.
    """

    name: str
    rows: int


def is_openrlhf(config: Any) -> bool:
    """Whether a checkpoint is OpenRLHF's, by its config."""
    return list(config.architectures or []) == [OPENRLHF]


def stored_head(checkpoint: Checkpoint, names: Sequence[str] = HEADS) -> Head | None:
    """The head that lies in a checkpoint's files; None where none of the known names is there.

    Only names and shapes are read (of a hub model, its files are fetched first).

    Args:
        checkpoint: resolved.
        names: that a head may have.
    """
    for name in FILES:
        path = _file(checkpoint, name)
        if path is not None:
            return _head_of(path, names)
        index = _file(checkpoint, f"{name}.index.json")
        if index is not None:
            files = json.loads(index.read_text())["weight_map"]
            held = next((head for head in names if head in files), None)
            path = None if held is None else _file(checkpoint, files[held])
            return None if path is None else _head_of(path, names)
    return None


def completed_config(config: Any, checkpoint: Checkpoint, title: str) -> tuple[Any, dict[str, str]]:
    """A config whose number of labels is that of the head, and how the head's weight is to be renamed.

    OpenRLHF saves neither `num_labels` (whose default is 2) nor, always, the usual name: `value_head_prefix` says it.

    Args:
        config: transformers' config, changed in place.
        checkpoint: where it is from.
        title: the model in messages.

    Returns:
        The config, and `key_mapping` of `from_pretrained`.

    Raises:
        ValueError: for OpenRLHF's checkpoints that are not scored as they are, with what to change in config.json.
    """
    own = is_openrlhf(config)
    if not own and (config.num_labels == 1 or not _is_classifier(config)):
        return config, {}
    names = _head_names(config)
    head = stored_head(checkpoint, names)
    if own:
        _check_openrlhf(config, head, names, title)
    if head is not None and head.rows == 1:
        config.num_labels = 1
    if head is not None and head.name not in HEADS[:2]:
        return config, {rf"^{re.escape(head.name.removesuffix('weight'))}": "score."}
    return config, {}


def check_one_label(config: Any, settings: RewardModelConfig, title: str) -> None:
    """Refuses what is no sequence classifier with one label.

    Raises:
        ValueError: naming what it is.
    """
    named = config.architectures or []
    own_code = settings.trust_remote_code and "AutoModelForSequenceClassification" in (
        getattr(config, "auto_map", None) or {}
    )
    if named and not own_code and not _is_classifier(config):
        raise ValueError(
            f"{title} ({settings.model}): a {', '.join(named)}, no reward model; its head would be "
            "random. Give a sequence classifier with one label (`...ForSequenceClassification`)"
        )
    if config.is_encoder_decoder:
        raise ValueError(f"{title}: an encoder-decoder; use a decoder or an encoder with a one-label head")
    if config.num_labels != 1:
        raise ValueError(
            f"{title}: a reward model with several labels ({config.num_labels}); which of them is the "
            "reward is not known. Use a model with one label (`num_labels: 1` in its config.json)"
        )


def readable_tokens(config: Any) -> int | None:
    """Tokens that a model can read, by the config of its text part; None where it names no bound."""
    bound: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if bound is not None and config.model_type in OFFSET_POSITIONS:
        bound -= (config.pad_token_id or 0) + 1
    return bound


def _is_classifier(config: Any) -> bool:
    named = config.architectures or []
    return is_openrlhf(config) or any(name.endswith("ForSequenceClassification") for name in named)


def _head_names(config: Any) -> tuple[str, ...]:
    """The names that a head may have: the one that OpenRLHF's config says comes first."""
    prefix = getattr(config, "value_head_prefix", None)
    return HEADS if not prefix else tuple(dict.fromkeys((f"{prefix}.weight", *HEADS)))


def _check_openrlhf(config: Any, head: Head | None, names: Sequence[str], title: str) -> None:
    """Refuses what OpenRLHF's own forward does besides, and bodies without a sequence classifier."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{title}: a {OPENRLHF} over {config.model_type}, for which there is no sequence classifier")
    if head is None:
        raise ValueError(
            f"{title}: a {OPENRLHF} (as OpenRLHF saves them), and no head named {' or '.join(names)} in its "
            "weights. Rename it to score.weight there, or download the weights first"
        )
    if getattr(config, "normalize_reward", False):
        raise ValueError(
            f"{title}: normalize_reward: true in its config.json: OpenRLHF shifts and scales the scores of such a "
            "model by a mean and a deviation, which is not done here. Set it to false there to have the bare scores, "
            "in the same order"
        )


def _file(checkpoint: Checkpoint, name: str) -> Path | None:
    found = cached_file(
        checkpoint.location,
        name,
        revision=checkpoint.commit or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _head_of(path: Path, names: Sequence[str]) -> Head | None:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in names if name in stored.keys()}  # noqa: SIM118
    else:
        weights = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        shapes = {name: list(weights[name].shape) for name in names if name in weights}
    return next((Head(name, int(shape[0])) for name, shape in shapes.items() if len(shape) == 2), None)
