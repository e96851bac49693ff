"""Texts and tokens: round trips, padding, and limits that count tokens, not characters."""

import ml_collections
import numpy as np
import pytest
import tokenizers

from experiments import reasoning as experiment
from genjax_lab.objectives import overlong_penalty
from genjax_lab.reasoning import (
    Codec,
    JudgedAnswers,
    addition,
    character_codec,
    countdown,
    digit_sum,
)

WORDS = ("therefore", "consequently", "everything", "mathematics", "demonstrates")


@pytest.fixture(scope="module")
def long_tokens():
    """Byte-pair encoding that has learnt five words of nine letters and more, and two ends."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<stop>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *(f" {word}" for word in WORDS)] * 9, trainer)
    return Codec(tokenizer, (0, 1), prompt_length=6, answer_length=5)


@pytest.mark.parametrize("task", [digit_sum(4), addition(1), countdown(2, target=8)])
def test_characters_of_questions_and_answers_come_back(task):
    codec = character_codec(task.alphabet, prompt_length=9, answer_length=9)
    assert codec.tokenizer.get_vocab_size() == len(task.alphabet) + 1
    prompts = [p.prompt for p in task.train]
    answers = [task.demonstrate(np.random.default_rng(0), p) for p in task.train]
    assert codec.decode(*codec.encode_prompts(prompts)) == prompts
    assert codec.decode(*codec.encode_answers(answers)) == answers


def test_every_character_is_a_token_white_space_too():
    codec = character_codec("ab \n\té+", prompt_length=8, answer_length=9)
    text = "\na b\té+ "
    tokens, mask = codec.encode_answers([text])
    np.testing.assert_array_equal(tokens, [[4, 1, 3, 2, 5, 6, 7, 3, 0]])
    assert mask.all() and codec.decode(tokens, mask) == [text]


def test_prompts_are_padded_on_the_left_and_answers_end_on_the_right():
    codec = character_codec("abc", prompt_length=3, answer_length=4)
    tokens, mask = codec.encode_prompts(["a", "cba", "bc"])
    np.testing.assert_array_equal(tokens, [[0, 0, 1], [3, 2, 1], [0, 2, 3]])
    np.testing.assert_array_equal(mask, [[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)
    tokens, mask = codec.encode_answers(["", "c", "abc"])
    np.testing.assert_array_equal(tokens, [[0, 0, 0, 0], [3, 0, 0, 0], [1, 2, 3, 0]])
    # The token that ends an answer is the answer's.
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)


def test_what_is_too_long_or_empty_is_named():
    codec = character_codec("abc", prompt_length=3, answer_length=4)
    with pytest.raises(ValueError, match=r"prompt 'abca' has 4 tokens.*prompt_length=3"):
        codec.encode_prompts(["a", "abca"])
    with pytest.raises(ValueError, match="prompt '' has 0 tokens"):
        codec.encode_prompts(["a", ""])
    with pytest.raises(ValueError, match=r"answer 'abca' has 5 tokens.*answer_length=4"):
        codec.encode_answers(["a", "abca"])
    assert [codec.fits(text) for text in ("", "a", "abc", "abca")] == [False, True, True, False]


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_alphabets_are_different_characters(alphabet):
    with pytest.raises(ValueError, match="alphabet"):
        character_codec(alphabet, prompt_length=3, answer_length=3)


def test_decoding_leaves_out_ends_and_what_is_hidden():
    codec = character_codec("abc", prompt_length=3, answer_length=4)._replace(end_ids=(0, 3))
    tokens = np.array([[1, 2, 0, 0], [1, 2, 3, 0], [1, 2, 1, 2], [3, 1, 1, 1], [1, 2, 2, 2]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    assert codec.decode(tokens, mask) == ["ab", "ab", "abab", "", "ab"]


def test_long_tokens_come_back_and_limits_are_in_tokens(long_tokens):
    text = "therefore everything demonstrates mathematics"
    assert len(text) == 45
    tokens, mask = long_tokens.encode_answers([text, "therefore", ""])
    np.testing.assert_array_equal(mask.sum(axis=1), [5, 2, 1])
    assert tokens[0, -1] == 0 and long_tokens.decode(tokens, mask) == [text, "therefore", ""]
    assert long_tokens.fits(text) and not long_tokens.fits("xyzxyzx")
    prompts, shown = long_tokens.encode_prompts([text, "é="])
    np.testing.assert_array_equal(shown.sum(axis=1), [4, 3])
    assert (prompts[~shown] == 0).all()
    assert long_tokens.decode(prompts, shown) == [text, "é="]
    with pytest.raises(ValueError, match="has 6 tokens with its end"):
        long_tokens.encode_answers([text + " therefore"])


def test_half_a_character_does_not_break_decoding(long_tokens):
    first = long_tokens.tokenizer.encode("é", add_special_tokens=False).ids[:1]
    assert len(long_tokens.decode(np.array([first]), np.ones((1, 1), bool))) == 1


def test_overlong_answers_are_punished_by_tokens_not_by_characters(long_tokens):
    """Check of the shape: 0 up to max - buffer, -1/2 in the middle, -1 at the end and beyond."""
    texts = [" ".join([word] * count) for word in WORDS[:1] for count in (1, 2, 3, 4)]
    _, mask = long_tokens.encode_answers(texts)
    lengths = mask.sum(axis=1)
    np.testing.assert_array_equal(lengths, [2, 3, 4, 5])
    assert min(map(len, texts)) > 5  # in characters all would be beyond the end
    found = overlong_penalty(lengths, max_length=5, buffer=2)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1], atol=1e-7)
    np.testing.assert_allclose(
        overlong_penalty(np.array([0, 6, 100]), max_length=5, buffer=2, factor=3.0), [0, -3, -3]
    )
    # Continuous: no step is larger than that of the slope.
    fine = overlong_penalty(np.linspace(0, 8, 801), max_length=5, buffer=2)
    assert np.abs(np.diff(fine)).max() < 0.01 / 2 + 1e-6

    config = ml_collections.ConfigDict({"answer_length": 5})
    config.reward = {"signed": True, "overlong_buffer": 2, "overlong_factor": 0.5}
    outcome = np.float32([1, 0, 1, 0])
    answers = JudgedAnswers([], texts, outcome, lengths, np.zeros(4, bool))
    reward = experiment.reward_of(config)(answers)
    np.testing.assert_allclose(reward, [1, -1, 0.75, -1.5], atol=1e-7)
    assert reward.dtype == np.float32
    config.reward.signed = False
    reward = experiment.reward_of(config)(answers)
    np.testing.assert_allclose(reward, [1, 0, 0.75, -0.5], atol=1e-7)
    config.reward.update({"signed": True, "overlong_buffer": 0})
    reward = experiment.reward_of(config)(answers)
    np.testing.assert_array_equal(reward, [1, -1, 1, -1])
    config.reward.signed = False
    assert experiment.reward_of(config) is None


def test_characters_without_a_token_are_refused():
    codec = character_codec("0123=", prompt_length=4, answer_length=4)
    for encode in (codec.encode_prompts, codec.encode_answers, lambda texts: codec.fits(texts[0])):
        with pytest.raises(ValueError, match=r"no tokens for '1x='"):
            encode(["1x="])
