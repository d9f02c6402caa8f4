"""What streams and their parts say about logits: the lens, and direct logit attribution."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError
from hooked_vlm.hooks.cut import PosSlice, at_positions
from hooked_vlm.hooks.stream import ResidualStream, one_tensor


Tokens = str | int | Int[Tensor, "*prompts"]
"""A token's text or id, or ids by prompt, or by prompt and position."""


class LogitParts(ResidualStream):
    """The part of a cache that leads from residual streams to logits."""

    @checked(DataError)
    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "part *pos d_model"],
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: PosSlice = None,
    ) -> Float[Tensor, " part *pos"]:
        """Returns how much each part of the final stream adds to a token's logit.

        With `incorrect_tokens`, to the difference of the two logits.  The final norm is applied at
        the run's own scale, gain included, then the unembedding and a factor, if the model has one.
        The sum over all parts, plus `logit_bias`, is the logit.  Where the model caps its logits
        it is the logit before the cap, and there is a warning.

        `tokens` are a text of one token, an id, or ids `[batch]` or `[batch, pos]`; `pos_slice` are
        the positions that the stack was made for.  Source: Elhage et al. (2021), direct logit
        attribution.

        Raises `DataError` for a stack, tokens or a run whose shapes do not fit.

        >>> from PIL import Image
        >>> from hooked_vlm import HookedVLM
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> inputs = model.prepare(Image.new("RGB", (96, 96)), "What is this?")
        >>> logits, cache = model.run_with_cache(inputs, ["blocks.*resid*", "blocks.*_out"])
        >>> parts, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
        >>> attrs = cache.logit_attrs(parts, tokens=7, pos_slice=-1)
        >>> torch.testing.assert_close(attrs.sum(0), logits[:, -1, 7])
        """
        normed = self.apply_ln_to_stack(residual_stack, pos_slice=pos_slice)
        directions, _ = self._directions(tokens, incorrect_tokens, pos_slice)
        return (normed * directions).sum(-1)

    @checked(DataError)
    def logit_bias(
        self, tokens: Tokens, incorrect_tokens: Tokens | None = None, pos_slice: PosSlice = None
    ) -> Float[Tensor, "*pos"]:
        """Returns what biases of the final norm and the unembedding add to a logit of the run.

        It belongs to no part of the stream; most models have none, and it is 0.
        """
        _, norm = self._reads().norm(self._n_layers(None), False)
        directions, bias = self._directions(tokens, incorrect_tokens, pos_slice)
        return (norm.bias.to(directions) * directions).sum(-1) + bias

    @checked(DataError)
    def logit_lens(self, pos_slice: PosSlice = None) -> Float[Tensor, "slot ..."]:
        """Returns the logits that the model would give from the residual stream of every slot.

        They are `[slot, batch, pos, d_vocab]`, and slots are those of `accumulated_resid`.  Each
        stream goes through the model's own final norm and head, with whatever else the model does
        to logits (a scale, a soft cap), at text and image tokens alike.  Those of the last slot
        are the logits of the run.  `pos_slice` selects positions: an index (whose axis goes), a
        slice, or a list.  All positions of all slots may take much memory: their number times the
        size of the vocabulary.

        Warns where those of the last slot are not the run's logits at the last position: a hook of
        the run acted after the last block.

        Needs `resid_pre` of block 0 and `resid_post` of every block, and the model of the run.
        Raises `UnknownHookError` for a stream that was not cached, and `DataError` for a cache
        without its model (from a file) or a position that is not there.  Source: nostalgebraist
        (2020), on visual tokens Neo et al. (2024).

        >>> from PIL import Image
        >>> from hooked_vlm import HookedVLM
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> inputs = model.prepare(Image.new("RGB", (96, 96)), "What is this?")
        >>> logits, cache = model.run_with_cache(inputs, "*resid*")
        >>> cache.logit_lens(pos_slice=-1).shape
        torch.Size([7, 1, 556])
        """
        streams = self.accumulated_resid()
        assert isinstance(streams, Tensor)
        read = self.read_streams(streams, pos_slice)
        if pos_slice is None or pos_slice == -1:
            last = read[-1] if pos_slice == -1 else read[-1][..., -1, :]
            self._reads().compare_last(last)
        return read

    @checked(DataError)
    def read_streams(
        self, streams: Float[Tensor, "slot *pos d_model"], pos_slice: PosSlice = None
    ) -> Float[Tensor, "slot ..."]:
        """Returns the logits that the model would give from streams after its last block.

        `logit_lens` reads those of the run by it; these may be translated, mixed or made by hand.
        They have all positions of the run, of which `pos_slice` selects some.
        """
        reads = self._reads()
        expected = one_tensor(self._stream(self._n_layers(None), None)).shape
        if streams.shape[1:] != expected:
            raise DataError(
                f"streams has shape {tuple(streams.shape)}; expected "
                f"[slot, {', '.join(map(str, expected))}], as the run's."
            )
        without_batch = streams.ndim == 3
        if without_batch:
            streams = streams[:, None]
        kept = [pos_slice] if isinstance(pos_slice, int) else pos_slice
        logits = reads.logits(streams, lambda x: at_positions(x, kept, axis=2))
        if isinstance(pos_slice, int):
            logits = logits[:, :, 0]
        return logits[:, 0] if without_batch else logits

    def _directions(
        self, tokens: Tokens, incorrect: Tokens | None, pos_slice: PosSlice
    ) -> tuple[Tensor, Tensor]:
        """Returns the directions `[*pos, d_model]` of tokens in the normed stream, and biases."""
        reads = self._reads()
        whole = one_tensor(self._stream(self._n_layers(None), None))
        stream = at_positions(whole, pos_slice)
        directions, bias = reads.directions(self._ids(tokens, stream, "tokens"), whole)
        if incorrect is not None:
            ids = self._ids(incorrect, stream, "incorrect_tokens")
            others, other_bias = reads.directions(ids, whole)
            directions, bias = directions - others, bias - other_bias
        return directions, bias

    def _ids(self, tokens: Tokens, stream: Tensor, name: str) -> Tensor:
        """Returns tokens as ids whose axes are those of the stream's positions, or 1."""
        if isinstance(tokens, str):
            tokens = self._reads().token_id(tokens)
        ids = torch.as_tensor(tokens)
        places = stream.shape[:-1]
        if ids.ndim == 0:
            return ids.view([1] * len(places))
        if ids.ndim == 1 and len(places) == 2 and len(ids) == places[0]:
            return ids[:, None]
        if ids.shape != places:
            raise DataError(
                f"{name} has shape {tuple(ids.shape)}, and the stream {tuple(places)} without its "
                "features. Give one id, one for each prompt, or one for each prompt and position."
            )
        return ids
