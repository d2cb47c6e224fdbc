"""A tokenizer trained on the spot (byte-level BPE: every text has an encoding), or a given one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamask.errors import UsageError
from dynamask.hub import check_local_or_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: what to learn the merges from.
        vocab_size: number of tokens, at least 257: 256 bytes and the end of text.

    Raises:
        UsageError: a vocabulary too small for the bytes.
    """
    if vocab_size < 257:
        raise UsageError(f"a byte-level vocabulary needs at least 257 tokens; got vocab_size={vocab_size}")
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def load_tokenizer(name_or_path: str | Path) -> Any:
    """Load a tokenizer from a folder or the hub.

    Raises:
        UsageError: it cannot be loaded, or has no end-of-text token to separate documents with.
    """
    if not isinstance(name_or_path, Path):
        check_local_or_hub(name_or_path, "tokenizer folder")
    if Path(name_or_path).is_dir() and not any(Path(name_or_path).glob("*token*")):
        raise UsageError(f"{name_or_path} holds no tokenizer (no tokenizer.json or tokenizer_config.json)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception of the tokenizers library
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"cannot load the tokenizer {str(name_or_path)!r}: {message}") from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer {str(name_or_path)!r} has no eos token, which separates the documents")
    return tokenizer


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode a text in which a special token that is spelled out stays text.

    Args:
        tokenizer: of transformers.
        text: any text; "<|endoftext|>" inside it becomes the tokens of these characters.

    Returns:
        Token ids, without special tokens.
    """
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def opening_tokens(tokenizer: Any, text: str = "a") -> list[int]:
    """Return the special tokens that a tokenizer puts before a text, such as the beginning of a sequence.

    Args:
        tokenizer: of transformers.
        text: the text that begins a sequence. The default serves where any text begins alike.

    Returns:
        Token ids before those of the text in `tokenizer(text)`; none where the tokenizer adds none, and none for a
        text without tokens. Tokens that it adds behind the text are not among them.
    """
    plain = encode_text(tokenizer, text)
    whole = list(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
    if not plain:
        return []
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:start] for start in starts if whole[start : start + len(plain)] == plain), [])


def encode_beginning(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that begins a sequence: the opening tokens, then the text as `encode_text` encodes it.

    Args:
        tokenizer: of transformers.
        text: any text.

    Returns:
        Token ids; none for a text without tokens.
    """
    return [*opening_tokens(tokenizer, text), *encode_text(tokenizer, text)]
