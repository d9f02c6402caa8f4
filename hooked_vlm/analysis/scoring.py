"""Computes answers and scores from next-token logits (protocol 2.4).

A one-token answer has several spellings: `red`, `Red`, ` red`, ` Red`.  A *candidate's*
probability is the softmax mass of its spellings, with each token id counted once (in some
tokenizers ` red` and `red` are one token).  A name is usable when `red` and `Red` are one
token each.  A spelling with a space that is not one token is left out, because its first
piece may belong to other words.

There are three measures of whether a patched run gives the outcome of a hypothesis:
* `target_probability`: the outcome's candidate probability.  The paper calls its mean over
  pairs IIA;
* `matches_answer`: whether the top answer is the outcome, interchange-intervention accuracy in
  the usual, binary sense; on clean runs its mean is the `accuracy`;
* `logit_difference`: log odds of two candidates, which does not saturate.

Everything is computed in float32 or better, because borderline answers change in bfloat16.
`logits` are those of the scored position, `[pair, *axes, d_vocab]`, with one answer per pair.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import has_values
from hooked_vlm.errors import ScoringError, counted, did_you_mean


@checked(ScoringError)
def spellings(name: str) -> tuple[str, str, str, str]:
    """Returns the four spellings of a name.

    >>> spellings("red")
    ('red', 'Red', ' red', ' Red')
    """
    lower, upper = name.lower(), name.capitalize()
    return lower, upper, f" {lower}", f" {upper}"


@checked(ScoringError)
def is_single_token(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Returns whether a name passes the paper's filter: `c` and `C` are one token each."""
    return all(_token(tokenizer, spelling) is not None for spelling in spellings(name)[:2])


@checked(ScoringError)
def answer_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Returns the token ids of a name's one-token spellings, each id once.

    No special tokens are added.

    Raises:
        ScoringError: the name is empty, or not one token in lower case and capitalised.
    """
    if not isinstance(name, str) or not normalise(name):
        raise ScoringError(f"The answer {name!r} has no letter or digit. Give a word.")
    for spelling in spellings(name)[:2]:
        if _token(tokenizer, spelling) is None:
            raise ScoringError(
                f"The answer {name!r} cannot be scored: spelled {spelling!r} it "
                f"{_pieces(tokenizer, spelling)}, and must be one token. Choose names for which "
                "is_single_token(tokenizer, name) is true."
            )
    ids = (_token(tokenizer, spelling) for spelling in spellings(name))
    return list(dict.fromkeys(index for index in ids if index is not None))


@checked(ScoringError, but=("logits",))
def candidate_probability(
    logits: Float[Tensor, "*batch d_vocab"],
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
) -> Float[Tensor, "*batch name"]:
    """Returns the softmax mass of each candidate, over the whole vocabulary.

    Raises:
        ScoringError: a name is not one token, two names share a token, or the logits have
            fewer entries than the tokenizer's ids need, or are not a number.
    """
    _require_numbers(logits)
    ids = _candidate_ids(tokenizer, names, logits.shape[-1])
    probabilities = _wide(logits).softmax(dim=-1)
    return torch.stack([probabilities[..., each].sum(dim=-1) for each in ids], dim=-1)


@checked(ScoringError, but=("logits",))
def target_probability(
    logits: Float[Tensor, "pair *axes d_vocab"],
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str],
) -> Float[Tensor, " pair *axes"]:
    """Returns the candidate probability of each pair's own answer.

    Raises:
        ScoringError: as `candidate_probability`, or not one answer per pair.
    """
    _require_numbers(logits)
    names, columns = _columns(answers, logits)
    return _own(candidate_probability(logits, tokenizer, names), columns)


@checked(ScoringError, but=("logits",))
def top_answer(
    logits: Float[Tensor, "batch d_vocab"], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Returns the most probable next token of each row, decoded and normalised.

    Raises:
        ScoringError: logits that are not a number.
    """
    _require_numbers(logits)
    if logits.ndim != 2:
        raise ScoringError(
            f"Logits of shape {tuple(logits.shape)} were given; expected [row, d_vocab]. Select "
            "the scored position: logits[:, -1]."
        )
    return _decoded(logits.argmax(dim=-1), tokenizer)


@checked(ScoringError)
def normalise(text: str) -> str:
    """Returns a text in lower case, with everything but letters and digits removed.

    >>> normalise(" Red.")
    'red'
    """
    return "".join(character for character in text.lower() if character.isalnum())


@checked(ScoringError, but=("logits",))
def matches_answer(
    logits: Float[Tensor, "pair *axes d_vocab"],
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str],
    *,
    candidates: Sequence[str] | None = None,
) -> Bool[Tensor, " pair *axes"]:
    """Returns whether each top answer is its pair's expected one: binary IIA.

    The top answer is the most probable token of the whole vocabulary, normalised; with
    `candidates`, it is the most probable of those names.

    Raises:
        ScoringError: not one answer per pair, an answer that is none of the candidates or no
            single token, or logits that are not a number.
    """
    _require_numbers(logits)
    names, columns = _columns(answers, logits)
    if candidates is None:
        for name in names:
            _require_reachable(tokenizer, name)
        wanted = [normalise(answer) for answer in answers]
        best = logits.argmax(dim=-1)
        rows = best.reshape(len(wanted), -1)
        hits = [
            [text == want for text in _decoded(row, tokenizer)]
            for row, want in zip(rows, wanted, strict=True)
        ]
        return torch.tensor(hits, dtype=torch.bool, device=logits.device).reshape(best.shape)
    places = torch.tensor([_place(name, candidates) for name in names])[columns]
    best = candidate_probability(logits, tokenizer, candidates).argmax(dim=-1)
    return best == places.to(best.device).reshape(-1, *[1] * (best.ndim - 1))


@checked(ScoringError, but=("logits",))
def accuracy(
    logits: Float[Tensor, "pair *axes d_vocab"],
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str],
) -> Float[Tensor, "*axes"]:
    """Returns the share of pairs whose top answer is correct (see `matches_answer`)."""
    return matches_answer(logits, tokenizer, answers).float().mean(dim=0)


@checked(ScoringError, but=("logits",))
def logit_difference(
    logits: Float[Tensor, "pair *axes d_vocab"],
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str],
    others: Sequence[str],
) -> Float[Tensor, " pair *axes"]:
    """Returns each pair's log odds of its answer against the other answer.

    A candidate's logit is the logsumexp over its spellings, so the difference is exactly
    log p(answer) - log p(other) of `candidate_probability`.  (The logit of the best spelling
    alone would jump when a model changes from `red` to `Red`.)  With one spelling each it is
    the usual difference of two logits.

    Raises:
        ScoringError: as `candidate_probability`, or not one answer and one other per pair.
    """
    _require_numbers(logits)
    answer_names, answer_columns = _columns(answers, logits)
    other_names, other_columns = _columns(others, logits)
    names = list(dict.fromkeys([*answer_names, *other_names]))
    ids = _candidate_ids(tokenizer, names, logits.shape[-1])
    wide = _wide(logits)
    merged = torch.stack([wide[..., each].logsumexp(dim=-1) for each in ids], dim=-1)
    place = torch.tensor([names.index(name) for name in answer_names])[answer_columns]
    other_place = torch.tensor([names.index(name) for name in other_names])[other_columns]
    return _own(merged, place) - _own(merged, other_place)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns a text's tokens: none for half of a character (a lone surrogate)."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        return []


def _token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Returns the id of a text that is one known token, else None."""
    ids = _encoded(tokenizer, text)
    # A word-level tokenizer encodes every unknown word as the same token.
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _require_reachable(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `ScoringError` for an answer that no single token can give."""
    forms = dict.fromkeys((*spellings(name), name.strip(), f" {name.strip()}"))
    if not normalise(name):
        raise ScoringError(f"The answer {name!r} has no letter or digit. Give a word.")
    if all(_token(tokenizer, form) is None for form in forms):
        raise ScoringError(
            f"The answer {name[:80]!r} can never be the top token: it "
            f"{_pieces(tokenizer, name)[:120]}. Give an answer of one token, or compare generated "
            "text."
        )


def _require_numbers(logits: Tensor) -> None:
    """Raises `ScoringError` for NaN and positive infinity, of which argmax makes an answer."""
    if not isinstance(logits, Tensor) or logits.ndim == 0 or not logits.is_floating_point():
        raise ScoringError(
            f"Logits were given as a {type(logits).__name__}"
            f"{f' of {logits.dtype}' if isinstance(logits, Tensor) else ''}; expected a tensor of "
            "floating point, [row, d_vocab]."
        )
    if not has_values(logits):
        raise ScoringError(f"Logits were given as {shown(logits)}; expected one with values.")
    wrong = logits.isnan() | (logits == float("inf"))
    if wrong.any():
        rows = int(wrong.flatten(1).any(dim=1).sum()) if logits.ndim > 1 else 1
        raise ScoringError(
            f"{rows} of {len(logits) if logits.ndim > 1 else 1} rows of logits have values that "
            "are NaN or infinite, so they give no answer. Load the model in float32 or bfloat16, "
            "or use smaller strengths."
        )


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = _encoded(tokenizer, text)
    if len(ids) == 1:
        return f"is unknown to the tokenizer (it becomes {tokenizer.unk_token!r})"
    pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
    return f"becomes {len(ids)} tokens ({pieces})"


def _candidate_ids(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], d_vocab: int
) -> list[list[int]]:
    if isinstance(names, str) or not len(names):
        raise ScoringError(
            f"Candidates were given as {names!r}; expected a non-empty list of names."
        )
    ids = [answer_ids(tokenizer, name) for name in names]
    owner: dict[int, str] = {}
    for name, mine in zip(names, ids, strict=True):
        for index in mine:
            if index >= d_vocab:
                raise ScoringError(
                    f"Token {index} of {name!r} is beyond the logits' {d_vocab} entries. Use the "
                    "tokenizer of this model."
                )
            if owner.setdefault(index, name) != name:
                raise ScoringError(
                    f"The candidates {owner[index]!r} and {name!r} share the token "
                    f"{tokenizer.convert_ids_to_tokens(index)!r}, so its probability would count "
                    "for both. Give names that differ by more than case."
                )
    return ids


def _columns(answers: Sequence[str], logits: Tensor) -> tuple[list[str], Int[Tensor, " pair"]]:
    """Returns the different names among the answers, and for each pair the index of its own."""
    if isinstance(answers, str) or len(answers) != len(logits):
        raise ScoringError(
            f"One answer is needed for each of {counted(len(logits), 'row')} of logits; got "
            f"{answers!r}"[:300]
            + "."
        )
    names = list(dict.fromkeys(answers))
    place = {name: column for column, name in enumerate(names)}
    return names, torch.tensor([place[answer] for answer in answers], dtype=torch.long)


def _own(values: Tensor, columns: Tensor) -> Tensor:
    """Returns entry `columns[i]` of the last axis of `values[i]`, for every pair i."""
    index = columns.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
    return values.gather(-1, index.expand(*values.shape[:-1], 1)).squeeze(-1)


def _place(name: str, candidates: Sequence[str]) -> int:
    known = list(map(str, candidates))  # a tensor cannot be asked for a text
    if name not in known:
        raise ScoringError(
            f"The answer {name!r} is none of the candidates {', '.join(known)}."
            + did_you_mean(name, known)
        )
    return known.index(name)


def _decoded(ids: Int[Tensor, " row"], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    listed = ids.tolist()
    text = {index: normalise(str(tokenizer.decode([index]))) for index in set(listed)}
    return [text[index] for index in listed]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
