"""Answers to numbers, on four kinds of tokenizer and by hand-made logits."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hooked_vlm.analysis.scoring import (
    accuracy,
    answer_ids,
    candidate_probability,
    is_single_token,
    logit_difference,
    matches_answer,
    normalise,
    spellings,
    target_probability,
    top_answer,
)
from hooked_vlm.errors import ScoringError


def unigram(pieces, prepend):
    """SentencePiece's way: a space is part of the piece, `▁`."""
    vocabulary = [("<unk>", 0.0), *((piece, -1.0) for piece in pieces)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def byte_level(words):
    """GPT-2's and Qwen's way: whole words as bytes, a space is `Ġ`; the rest in letters."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    ids = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(ids, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def word_level(words):
    ids = {word: index for index, word in enumerate(["<unk>", *words])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


FOUR = ["red", "Red", "Ġred", "ĠRed", "blue", "Blue", "Ġblue", "ĠBlue", "green", "Green"]
BYTES = byte_level(FOUR)


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_spellings_are_the_papers():
    assert spellings("red") == ("red", "Red", " red", " Red")
    assert spellings("Red") == spellings("red")


def test_byte_level_spellings_are_four_tokens():
    assert tokens(BYTES, answer_ids(BYTES, "red")) == ["red", "Red", "Ġred", "ĠRed"]


def test_a_spaced_spelling_of_two_tokens_is_left_out():
    # "Ġgreen" is not in the vocabulary: its first piece, the bare space, is no answer.
    assert is_single_token(BYTES, "green")
    assert tokens(BYTES, answer_ids(BYTES, "green")) == ["green", "Green"]


def test_sentencepiece_with_and_without_a_prepended_space():
    plain = unigram(["red", "Red", "▁red", "▁Red", "▁", "r", "e", "d"], "never")
    assert tokens(plain, answer_ids(plain, "red")) == ["red", "Red", "▁red", "▁Red"]
    prepending = unigram(["red", "Red", "▁red", "▁Red", "▁", "r", "e", "d"], "always")
    assert tokens(prepending, answer_ids(prepending, "red")) == ["▁red", "▁Red"]


def test_word_level_ids_are_de_duplicated():
    words = word_level(["red", "Red"])
    assert answer_ids(words, "red") == [1, 2]


def test_a_slow_tokenizer_is_scored_too():
    """ByT5's is written in Python: a letter is a token, a word is not."""
    slow = ByT5Tokenizer(extra_ids=0)
    assert not slow.is_fast
    assert answer_ids(slow, "a") == [ord("a") + 3, ord("A") + 3]
    with pytest.raises(ScoringError, match=r"3 tokens \('r', 'e', 'd'\)"):
        answer_ids(slow, "red")


def test_special_tokens_are_never_added():
    slow = ByT5Tokenizer(extra_ids=0)
    assert len(slow("a").input_ids) == 2  # the end of sequence, by default
    assert is_single_token(slow, "a")


@pytest.mark.parametrize(
    ("tokenizer", "name", "message"),
    [
        (BYTES, "gray", r"'gray' it becomes 4 tokens \('g', 'r', 'a', 'y'\)"),
        (word_level(["red"]), "red", r"'Red' it is unknown to the tokenizer .*'<unk>'"),
        (word_level(["red"]), "grey", "'grey' it is unknown"),
        (BYTES, " .", "no letter or digit"),
    ],
)
def test_an_answer_that_is_not_one_token_is_refused(tokenizer, name, message):
    assert not is_single_token(tokenizer, name)
    with pytest.raises(ScoringError, match=message):
        answer_ids(tokenizer, name)


def logits_for(rows):
    """Logits `[len(rows), d_vocab]` with the given probabilities, `{token: p}` per row."""
    logits = torch.full((len(rows), len(BYTES)), -1e4)
    for row, wanted in zip(logits, rows, strict=True):
        for token, probability in wanted.items():
            row[BYTES.convert_tokens_to_ids(token)] = torch.tensor(probability).log()
    return logits


ROWS = logits_for(
    [
        {"red": 0.1, "Red": 0.2, "Ġred": 0.05, "ĠRed": 0.05, "blue": 0.35, "g": 0.25},
        {"ĠBlue": 0.6, "green": 0.3, "red": 0.1},
    ]
)


def test_candidate_probability_adds_up_spellings():
    probability = candidate_probability(ROWS, BYTES, ["red", "blue", "green"])
    expected = torch.tensor([[0.4, 0.35, 0.0], [0.1, 0.6, 0.3]])
    torch.testing.assert_close(probability, expected)


def test_de_duplicated_ids_are_counted_once():
    words = word_level(["red", "Red", "blue", "Blue"])
    probability = candidate_probability(torch.zeros(1, 5), words, ["red", "blue"])
    torch.testing.assert_close(probability, torch.tensor([[0.4, 0.4]]))


def test_probability_is_float32_from_half_precision():
    half = torch.randn(4, len(BYTES)).bfloat16()
    probability = candidate_probability(half, BYTES, ["red"])
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, candidate_probability(half.float(), BYTES, ["red"]))
    assert candidate_probability(half.double(), BYTES, ["red"]).dtype == torch.float64


def test_target_probability_takes_each_pairs_own_answer_on_any_axes():
    torch.testing.assert_close(
        target_probability(ROWS, BYTES, ["red", "blue"]), torch.tensor([0.4, 0.6])
    )
    sweep = torch.stack([ROWS, ROWS.flip(0), ROWS], dim=1)[:, :, None]  # pair slot kind d_vocab
    own = target_probability(sweep, BYTES, ["red", "blue"])
    torch.testing.assert_close(own[..., 0], torch.tensor([[0.4, 0.1, 0.4], [0.6, 0.35, 0.6]]))


def test_the_papers_iia_and_binary_agreement_differ():
    """Row 0: `red` has more mass than `blue`, spread over spellings; the top token is `blue`."""
    answers = ["red", "blue"]
    assert top_answer(ROWS, BYTES) == ["blue", "blue"]
    assert matches_answer(ROWS, BYTES, answers).tolist() == [False, True]
    assert matches_answer(ROWS, BYTES, answers, candidates=["blue", "red"]).tolist() == [True, True]
    assert accuracy(ROWS, BYTES, answers).item() == 0.5
    assert target_probability(ROWS, BYTES, answers).mean().item() == pytest.approx(0.5)


def test_agreement_follows_the_axes_of_a_sweep():
    sweep = torch.stack([ROWS, ROWS.flip(0)], dim=1)
    for candidates in (None, ["red", "blue"]):
        hits = matches_answer(sweep, BYTES, ["red", "blue"], candidates=candidates)
        expected = [[candidates is not None, False], [True, candidates is None]]
        assert hits.tolist() == expected
    assert accuracy(sweep, BYTES, ["red", "blue"]).tolist() == [0.5, 0.5]


def test_top_answer_is_normalised():
    assert [normalise(text) for text in (" Red.", "RED\n", "▁red", "in-front")] == [
        "red",
        "red",
        "red",
        "infront",
    ]
    assert top_answer(logits_for([{"ĠRed": 1.0}]), BYTES) == ["red"]
    words = unigram(["▁Red", "▁red"], "always")
    assert top_answer(torch.eye(3)[1:], words) == ["red", "red"]


def test_logit_difference_is_the_log_odds_of_the_candidates():
    logits = torch.randn(3, 2, len(BYTES))
    answers, others = ["red", "blue", "green"], ["blue", "green", "red"]
    probability = candidate_probability(logits, BYTES, ["red", "blue", "green"])
    expected = torch.stack(
        [
            probability[0, :, 0].log() - probability[0, :, 1].log(),
            probability[1, :, 1].log() - probability[1, :, 2].log(),
            probability[2, :, 2].log() - probability[2, :, 0].log(),
        ]
    )
    difference = logit_difference(logits, BYTES, answers, others)
    torch.testing.assert_close(difference, expected)
    torch.testing.assert_close(difference, -logit_difference(logits, BYTES, others, answers))


def test_logit_difference_of_one_spelling_is_a_difference_of_logits():
    slow = ByT5Tokenizer(extra_ids=0)
    logits = torch.full((1, len(slow)), -torch.inf)
    logits[0, ord("a") + 3], logits[0, ord("b") + 3] = 2.0, 0.5
    assert logit_difference(logits, slow, ["a"], ["b"]).item() == 1.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: candidate_probability(ROWS, BYTES, ["red", "Red"]), "share the token 'red'"),
        (lambda: candidate_probability(ROWS, BYTES, []), "expected a non-empty list of names"),
        (lambda: candidate_probability(ROWS[:, :20], BYTES, ["red"]), "beyond the logits' 20"),
        (lambda: target_probability(ROWS, BYTES, ["red"]), "2 rows of logits"),
        (
            lambda: matches_answer(ROWS, BYTES, ["rid", "blue"], candidates=["red", "blue"]),
            "mean 'red'",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ScoringError, match=message):
        call()
