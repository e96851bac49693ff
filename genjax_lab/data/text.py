"""Text, or the pixels of images, to tokens to batches: any TFDS data set, one way for all.

    documents -> tokens, with a separator after each -> sequences of one length -> batches

Tokenizers are those of the `tokenizers` library, learned from the training split or read from a
file. Sequences follow one another in the stream of all documents, so they start and end anywhere,
and no token is left out but those behind the last whole sequence.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from genjax_lab.data import prepared
from genjax_lab.data.loader import IN_MEMORY_PREFETCH, Loader, make_order

KINDS = ("word", "character", "byte", "bpe")
SEPARATOR = "<|endoftext|>"
UNKNOWN = "<|unknown|>"


def read_documents(
    name: str, split: str, *, feature: str = "text", data_dir: prepared.DataDir = None
) -> list[str]:
    """The documents of a TFDS data set, in their order.

    `pydoc` and `kjv` are written to disk on first use; other data sets must have been prepared
    (`genjax_lab.data.prepare`).

    Args:
        name: a TFDS name: "pydoc", "kjv", "lm1b", "wikipedia/20230601.en".
        split: a TFDS split.
        feature: which of its features the text is.
        data_dir: where data sets live, as for `make_loader`.

    Raises:
        ValueError: if the data set or split cannot be had, or it has no such feature.
    """
    builder = prepared.prepared_builder(name, data_dir)
    if feature not in builder.info.features:
        raise ValueError(
            f"data set {name!r} has no feature {feature!r}, it has {list(builder.info.features)}"
        )
    number, read = prepared.open_split(builder, split)
    documents = [example[feature] for example in read(np.arange(number))]
    return [text.decode() if isinstance(text, bytes) else str(text) for text in documents]


def learn_tokenizer(
    kind: str, documents: Sequence[str], *, vocab_size: int | None = None
) -> tokenizers.Tokenizer:
    """A tokenizer of `SEPARATOR` and what documents are made of.

    Args:
        kind: "word" takes words and single other signs, and leaves out spaces; "character" the
            characters that there are; "byte" bytes of UTF-8; "bpe" the byte pairs of GPT-2,
            learned.
        documents: to learn from; "byte" needs none.
        vocab_size: of all tokens together, for "word" and "character", where the rarer ones become
            `UNKNOWN`, and "bpe"; None takes every word or character, and 8192 for "bpe".

    Returns:
        The tokenizer; the separator has the id 0. Decoding gives back the text, but of "word",
        where a space stands between all tokens.

    Raises:
        ValueError: for another kind, or a vocabulary that is too small.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not in {KINDS}")
    if vocab_size is not None and (kind == "byte" or vocab_size < (258 if kind == "bpe" else 3)):
        raise ValueError(f"vocab_size={vocab_size} does not fit kind={kind!r}")
    if kind == "word":
        return _words(documents, vocab_size, r"\w+|[^\w\s]")
    if kind == "character":
        tokenizer = _words(documents, vocab_size, r"[\s\S]")
        tokenizer.decoder = tokenizers.decoders.Fuse()
        return tokenizer
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    use_regex = kind == "bpe"
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=use_regex
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257 if kind == "byte" else vocab_size or 8192,
        special_tokens=[SEPARATOR],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([] if kind == "byte" else documents, trainer)
    return tokenizer


def _words(documents: Sequence[str], vocab_size: int | None, pattern: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(pattern), "removed", invert=True
    )
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=vocab_size or 2**31 - 1,
        special_tokens=[SEPARATOR, UNKNOWN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def read_tokenizer(
    path: str | os.PathLike, *, separator: str | None = SEPARATOR
) -> tokenizers.Tokenizer:
    """A tokenizer from a `tokenizer.json`, such as every Hugging Face model has.

    Args:
        path: of the file.
        separator: a token that it must have; None for any tokenizer.

    Raises:
        ValueError: if there is none, or it has no such token.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(Path(path)))
    except Exception as error:  # the library's own, for what is missing or damaged
        raise ValueError(f"{os.fspath(path)!r} holds no tokenizer: {error}") from error
    if separator is not None and tokenizer.token_to_id(separator) is None:
        raise ValueError(f"the tokenizer in {os.fspath(path)!r} has no token {separator!r}")
    return tokenizer


def read_levels(
    name: str, split: str, *, feature: str = "image", data_dir: prepared.DataDir = None
) -> Int[np.ndarray, "images pixels"]:
    """Pixels as tokens: images of a TFDS data set, row after row, channels innermost.

    Raises:
        ValueError: as `read_documents`, or if the images differ in size or are no integers.
    """
    builder = prepared.prepared_builder(name, data_dir)
    if feature not in builder.info.features:
        raise ValueError(
            f"data set {name!r} has no feature {feature!r}, it has {list(builder.info.features)}"
        )
    number, read = prepared.open_split(builder, split)
    images = [np.asarray(example[feature]) for example in read(np.arange(number))]
    if len({image.shape for image in images}) > 1 or not np.issubdtype(images[0].dtype, np.integer):
        raise ValueError(f"images of {name!r} differ in size or are no integers")
    return np.stack(images).reshape(number, -1).astype(np.int32)


def to_sequences(
    tokenizer: tokenizers.Tokenizer, documents: Sequence[str], length: int
) -> Int[np.ndarray, "sequences length"]:
    """The stream of all documents' tokens, a separator after each, cut into sequences.

    Raises:
        ValueError: if there are too few tokens for one sequence.
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    stream: list[int] = []
    for start in range(0, len(documents), 1024):
        for encoding in tokenizer.encode_batch(documents[start : start + 1024]):
            stream.extend(encoding.ids)
            stream.append(separator)
    number = len(stream) // length if length > 0 else 0
    if number < 1:
        raise ValueError(f"{len(stream)} tokens are too few for a sequence of {length}")
    return np.asarray(stream[: number * length], np.int32).reshape(number, length)


def make_token_loader(
    tokens: Int[np.ndarray, "sequences length"], batch_size: int, seed: int, **options: Any
) -> Loader:
    """Batches {"tokens": int32 [batch, length]} in the orders of `make_loader`.

    Args:
        tokens: sequences.
        batch_size: rows of the global batch.
        seed: of the order.
        **options: `num_epochs`, `shuffle`, `drop_remainder`, `shard_index` and `shard_count` of
            `make_loader`.

    Raises:
        ValueError: if tokens are not integers [sequences, length], or the numbers do not fit.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers [sequences, length], got {tokens.dtype} {tokens.shape}"
        )
    settings = {"num_epochs": None, "shuffle": True, "drop_remainder": True}
    settings |= {"shard_index": None, "shard_count": None, **options}
    order = make_order(len(tokens), batch_size, seed, **settings)
    tokens = tokens.astype(np.int32)
    return Loader(order, lambda rows: {"tokens": tokens[rows]}, None, (), IN_MEMORY_PREFETCH)
