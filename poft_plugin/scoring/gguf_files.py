"""Models in GGUF files. transformers reads config, tokenizer and weights out of them; here is what it reads wrongly."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from poft_plugin.scoring.checkpoints import Checkpoint

SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Attributes of a tokenizer, and their names in the file: `tokenizer.ggml.NAME_token_id`."""


def check_gguf_installed(title: str) -> None:
    """Refuses GGUF files where they cannot be read.

    Args:
        title: the model in messages.

    Raises:
        ValueError: with what to install.
    """
    if find_spec("gguf") is None:
        raise ValueError(f"{title}: a GGUF file, and the package `gguf` is not there to read it: `pip install gguf`")


@contextmanager
def gguf_errors(checkpoint: Checkpoint, title: str) -> Iterator[None]:
    """What goes wrong while a GGUF file is read, as an error that names it; other checkpoints' errors as they are.

    Args:
        checkpoint: that is read.
        title: the model in messages.

    Raises:
        ValueError: with the remedies.
    """
    try:
        yield
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        if checkpoint.gguf is None:
            raise
        raise ValueError(
            f"{title}: {checkpoint.gguf} cannot be read: {error}. Download it again, or, where it is whole and "
            "transformers does not know such files, give the folder or repository that it was made from"
        ) from error


def gguf_path(checkpoint: Checkpoint) -> Path:
    """Where the file lies, downloaded if it has to be."""
    assert checkpoint.gguf is not None
    found = cached_file(checkpoint.location, checkpoint.gguf, revision=checkpoint.commit or "main")
    return Path(str(found))


def dequantized() -> dict[str, Any]:
    """Keywords of `from_pretrained` for plain weights, on every machine.

    transformers 5.20 leaves them in the file's blocks where it finds kernels, which round in their own way; 5.16 never
    does.
    """
    config: Any = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def correct_special_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Sets the special tokens that the file names.

    transformers (5.16 to 5.20) takes the token that begins a text for the one that ends it, so that a template that
    writes `eos_token` would write another one.

    Args:
        tokenizer: as transformers read it, changed in place.
        path: the file.
    """
    import gguf

    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"]
    for attribute, name in SPECIAL_TOKENS.items():
        field: Any = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            setattr(tokenizer, attribute, tokens.contents(int(field.contents())))
