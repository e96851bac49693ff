"""Texts as arrays of tokens: prompts padded on the left, answers on the right."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int


class Codec(NamedTuple):
    """A tokenizer, and what its tokens mean to answers.

    Attributes:
        tokenizer: of Hugging Face's library.
        end_ids: tokens that end an answer; the first is padding, too.
        prompt_length, answer_length: of arrays, in tokens; answers end within it or are truncated.
    """

    tokenizer: tokenizers.Tokenizer
    end_ids: tuple[int, ...]
    prompt_length: int
    answer_length: int

    def encode_prompts(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "prompts columns"], Bool[np.ndarray, "prompts columns"]]:
        """Tokens and which are real.

        Raises:
            ValueError: for a prompt that is empty, too long, or has characters without a token.
        """
        encoded = [self._encode(text) for text in texts]
        tokens = np.full((len(texts), self.prompt_length), self.end_ids[0], np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(encoded):
            if not 0 < len(ids) <= self.prompt_length:
                raise ValueError(
                    f"prompt {texts[row]!r} has {len(ids)} tokens; it must have some and at most "
                    f"prompt_length={self.prompt_length}"
                )
            tokens[row, -len(ids) :], mask[row, -len(ids) :] = ids, True
        return tokens, mask

    def fits(self, prompt: str) -> bool:
        """Whether a prompt is neither empty nor too long."""
        return 0 < len(self._encode(prompt)) <= self.prompt_length

    def encode_answers(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "answers length"], Bool[np.ndarray, "answers length"]]:
        """Tokens with the end token, and which are the answer's.

        Raises:
            ValueError: for an answer that is too long, or has characters without a token.
        """
        tokens = np.full((len(texts), self.answer_length), self.end_ids[0], np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, text in enumerate(texts):
            ids = [*self._encode(text), self.end_ids[0]]
            if len(ids) > self.answer_length:
                raise ValueError(
                    f"answer {text!r} has {len(ids)} tokens with its end, more than "
                    f"answer_length={self.answer_length}"
                )
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return tokens, mask

    def decode(
        self,
        tokens: Int[np.ndarray, "answers length"],
        mask: Bool[np.ndarray, "answers length"],
    ) -> list[str]:
        """The texts of answers, without the tokens that end them."""
        ends = np.isin(tokens, self.end_ids)
        rows = [row[keep] for row, keep in zip(tokens, mask & ~ends, strict=True)]
        return self.tokenizer.decode_batch([row.tolist() for row in rows])

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library's own type
            raise ValueError(f"the tokenizer has no tokens for {text!r}: {error}") from error


def character_codec(alphabet: str, *, prompt_length: int, answer_length: int) -> Codec:
    """A token for each character, after one that ends answers.

    Raises:
        ValueError: if a character is there twice, or none.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet must be different characters, got {alphabet!r}")
    vocabulary = {"<end>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    # An unknown token that is not in the vocabulary is an error, not something else silently.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), "isolated"
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return Codec(tokenizer, (0,), prompt_length, answer_length)
