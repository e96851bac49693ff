"""Text to tokens to batches."""

import numpy as np
import pytest

from genjax_lab.data import (
    learn_tokenizer,
    make_token_loader,
    read_documents,
    read_levels,
    read_tokenizer,
    to_sequences,
)
from genjax_lab.data.text import KINDS, SEPARATOR, UNKNOWN

TEXT = ["Ein Männlein steht im Walde, ganz still und stumm.", "still, still!\n\tganz still"]


@pytest.fixture(scope="module")
def pydoc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    return {split: read_documents("pydoc", split, data_dir=folder) for split in ("train", "test")}


def test_pydoc_is_the_language_reference(pydoc):
    everything = [text for documents in pydoc.values() for text in documents]
    assert sum(map(len, everything)) > 300_000
    assert any(text.startswith('The "while" statement') for text in everything)
    sizes = {split: sum(map(len, documents)) for split, documents in pydoc.items()}
    assert 0.05 < sizes["test"] / sizes["train"] < 0.2
    assert not set(pydoc["train"]) & set(pydoc["test"])


def test_kjv_is_a_million_words_of_english(tmp_path):
    train, test = (read_documents("kjv", split, data_dir=tmp_path) for split in ("train", "test"))
    assert len(train) == 1070 and len(test) == 119 and not set(train) & set(test)
    start = "In the beginning God created the heaven and the earth."
    assert any(chapter.startswith(start) for chapter in train)
    everything = "".join(train + test)
    assert len(everything) > 4_000_000 and not set("[]0123456789") & set(everything)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_give_back_their_text(kind):
    size = 300 if kind == "bpe" else None
    tokenizer = learn_tokenizer(kind, TEXT, vocab_size=size)
    assert tokenizer.token_to_id(SEPARATOR) == 0
    for text in TEXT:
        ids = tokenizer.encode(text).ids
        back = tokenizer.decode(ids)
        if kind == "character":
            assert tokenizer.get_vocab_size() == 2 + len(set("".join(TEXT)))
            assert len(ids) == len(text)
        if kind == "word":
            assert back.replace(" ", "") == "".join(text.split())
        else:
            assert back == text
        assert max(ids) < tokenizer.get_vocab_size()
    if kind == "byte":
        assert tokenizer.get_vocab_size() == 257 and len(ids) == len(text.encode())


def test_pixels_are_levels(tmp_path):
    levels = read_levels("digits", "test", data_dir=tmp_path)
    assert levels.shape[1] == 64 and levels.min() == 0 and levels.max() == 16
    with pytest.raises(ValueError, match="feature"):
        read_levels("digits", "test", feature="picture", data_dir=tmp_path)
    with pytest.raises(ValueError, match="integers"):
        read_levels("pydoc", "test", feature="text", data_dir=tmp_path)


def test_rare_words_are_unknown():
    tokenizer = learn_tokenizer("word", TEXT, vocab_size=4)
    assert tokenizer.get_vocab_size() == 4
    assert tokenizer.encode("still ruht der See").tokens == ["still", UNKNOWN, UNKNOWN, UNKNOWN]


def test_tokenizers_are_read_from_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    learn_tokenizer("bpe", TEXT, vocab_size=280).save(str(path))
    assert read_tokenizer(path).encode(TEXT[0]).ids
    path.write_text(path.read_text()[:-20])
    for wrong in (path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match="holds no tokenizer"):
            read_tokenizer(wrong)


def test_sequences_are_the_stream_of_all_documents():
    tokenizer = learn_tokenizer("byte", [])
    sequences = to_sequences(tokenizer, ["abc", "de"], 3)
    names = [[tokenizer.id_to_token(i) for i in row] for row in sequences.tolist()]
    assert names == [["a", "b", "c"], [SEPARATOR, "d", "e"]]
    assert sequences.dtype == np.int32
    with pytest.raises(ValueError, match="too few"):
        to_sequences(tokenizer, ["abc"], 100)


def test_batches_go_over_every_sequence_and_on_after_a_restart():
    tokens = np.arange(20).reshape(10, 2)
    loader = make_token_loader(tokens, 5, seed=0)
    batches = [next(loader)["tokens"] for _ in range(4)]
    for epoch in (batches[:2], batches[2:]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)[:, 0]), tokens[:, 0])
    again = make_token_loader(tokens, 5, seed=0)
    again.set_state(loader.get_state())
    np.testing.assert_array_equal(next(again)["tokens"], next(loader)["tokens"])
    parts = [
        make_token_loader(tokens, 4, seed=0, shard_index=i, shard_count=2)[0]["tokens"]
        for i in range(2)
    ]
    whole = make_token_loader(tokens, 4, seed=0)[0]["tokens"]
    assert {tuple(row) for part in parts for row in part} == {tuple(row) for row in whole}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learn_tokenizer("letters", TEXT), "kind"),
        (lambda: learn_tokenizer("byte", TEXT, vocab_size=300), "vocab_size"),
        (lambda: learn_tokenizer("bpe", TEXT, vocab_size=100), "vocab_size"),
        (lambda: make_token_loader(np.zeros((2, 3)), 1, 0), "integers"),
        (lambda: make_token_loader(np.zeros(3, int), 1, 0), "integers"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_data_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no feature 'text'"):
        read_documents("digits", "test", data_dir=tmp_path)
