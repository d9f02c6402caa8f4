import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.toy_grids import make_grid
from hooked_vlm.errors import RegionError
from hooked_vlm.regions.positions import (
    LastToken,
    Positions,
    PromptRow,
    Span,
    TextTokens,
    TokenSelector,
    token_pieces,
    union,
)


PIECES = ("<bos>", "The", " color", " left", " of", " the", " red", " the", " blu", "e", " is")


def prompt(padding: int = 0, side: str = "left", tokens=PIECES, grids=()) -> PromptRow:
    n = len(tokens)
    mask = torch.tensor([0] * padding + [1] * n if side == "left" else [1] * n + [0] * padding)
    pad = ("<pad>",) * padding
    text = pad + tokens if side == "left" else tokens + pad
    return PromptRow(torch.zeros(n + padding, dtype=torch.long), mask, text, grids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "place",
    [LastToken(), Positions((0, 3, -1)), Span("red"), Span("blue"), Span("e", 0), TextTokens()],
    ids=str,
)
def test_padding_moves_positions_and_changes_nothing_else(place, side):
    plain = place.positions(prompt())
    shift = 3 if side == "left" else 0
    assert torch.equal(place.positions(prompt(3, side)), plain + shift)
    assert isinstance(place, TokenSelector)


def test_last_token_and_positions():
    assert LastToken().positions(prompt(2, "right")).tolist() == [10]
    assert Positions((-1, 0, -11)).positions(prompt(2)).tolist() == [2, 12]
    with pytest.raises(RegionError, match="Position 11 is not in a prompt of 11 tokens"):
        Positions((11,)).positions(prompt(4))
    with pytest.raises(RegionError, match="names no position"):
        Positions(())
    with pytest.raises(RegionError, match="attention mask is 0 everywhere"):
        LastToken().positions(prompt(3, tokens=()))


def test_span_takes_every_token_that_has_a_character_of_it():
    assert Span("red").positions(prompt()).tolist() == [6]
    assert Span("the red").positions(prompt()).tolist() == [5, 6]
    assert Span("lu").positions(prompt()).tolist() == [8]
    assert Span("blue").positions(prompt()).tolist() == [8, 9]
    assert Span("the", occurrence=-1).positions(prompt()).tolist() == [7]


def test_span_says_what_is_wrong():
    with pytest.raises(RegionError, match=r"contains 'the' 2 times.*occurrence=0"):
        Span("the").positions(prompt())
    with pytest.raises(RegionError, match="2 times, so there is no occurrence 2"):
        Span("the", occurrence=2).positions(prompt())
    with pytest.raises(RegionError, match=r"does not contain 'green'\. Its text is '<bos>The"):
        Span("green").positions(prompt())
    with pytest.raises(RegionError, match="does not contain"):
        Span("<pad>").positions(prompt(3))
    with pytest.raises(RegionError, match="needs the text of each token"):
        Span("red").positions(PromptRow(torch.zeros(2).long(), torch.ones(2).long()))
    with pytest.raises(RegionError, match="is empty"):
        Span("")


def test_text_tokens_are_what_no_image_has():
    grid = make_grid(2, 2, first=3)
    assert TextTokens().positions(prompt(1, grids=(grid,))).tolist() == [1, 2, 7, 8, 9, 10, 11]
    all_image = prompt(3, tokens=("x",) * 4, grids=(make_grid(2, 2, first=3),))
    with pytest.raises(RegionError, match="no text token"):
        TextTokens().positions(all_image)


def test_unions_are_flat_sorted_and_have_each_position_once():
    both = LastToken() | Span("red") | Positions((6, -1))
    assert both.positions(prompt()).tolist() == [6, 10]
    assert len(both.parts) == 3 and str(both) == "last token | text 'red' | positions 6, -1"
    assert union(both, LastToken()).positions(prompt()).tolist() == [6, 10]
    with pytest.raises(RegionError, match="union of no places"):
        union()


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that one character can be several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Words with a leading '▁', which decoding strips from the first one."""
    vocab = ["<unk>", "▁the", "▁red", "▁square", "s", "▁a", "<image>"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@given(st.text(alphabet="aé →🙂", min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_pieces_join_to_the_text_whatever_bytes_a_character_has(text):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text


def test_a_span_of_a_character_of_several_tokens_has_them_all():
    tokenizer = byte_level()
    ids = torch.tensor(tokenizer("café 🙂")["input_ids"])
    row = PromptRow(ids, torch.ones_like(ids), token_pieces(tokenizer, ids))
    assert Span("é").positions(row).tolist() == [3, 4]
    assert Span("🙂").positions(row).tolist() == [6, 7, 8, 9]
    assert Span("caf").positions(row).tolist() == [0, 1, 2]


def test_pieces_of_a_sentence_piece_tokenizer_keep_their_spaces():
    tokenizer = sentence_piece()
    assert token_pieces(tokenizer, [1, 2, 3, 4, 6, 6, 5]) == (
        *("the", " red", " square", "s"),
        *("<image>", "<image>", " a"),
    )
