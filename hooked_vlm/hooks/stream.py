"""What a cache says about a residual stream: its slots, and the parts that it is summed from.

Methods, names and labels are TransformerLens's.  Weights come from the model of the run, through
`Reads`: nothing is folded, so norms are followed at the run's own scale (see `linear_norm`), and
sums are verified.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.errors import DataError, UnknownHookError
from hooked_vlm.hooks.cut import PosSlice, at_positions
from hooked_vlm.hooks.decomposition import added_by, parts_of
from hooked_vlm.hooks.linear_norm import LinearNorm
from hooked_vlm.hooks.names import VISION, count_layers, tower_of
from hooked_vlm.hooks.output_parts import Summands, rounding


Mode = Literal["all", "attn", "mlp"]


@runtime_checkable
class Reads(Protocol):
    """The weights of the model whose run was cached, as far as a cache reads them."""

    def logits(self, streams: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor: ...

    def norm(self, layer: int, mlp_input: bool) -> tuple[str, LinearNorm]: ...

    def normed(self, path: str, stream: Tensor) -> Tensor: ...

    def summands(self, kind: str, layer: int, tower: str | None) -> Summands | None: ...

    def directions(self, tokens: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]: ...

    def compare_last(self, logits: Tensor) -> None: ...

    def of_rows(self, rows: Any) -> "Reads": ...

    def token_id(self, text: str) -> int: ...


class ResidualStream(Mapping[Any, Any]):
    """The part of a cache that reads residual streams."""

    n_layers: dict[str, int]
    readout: Reads | None = None
    """The weights of the model of the run; None for a cache that no run of a model made."""
    _no_run = "it is from a file, or was made by hand. Run model.run_with_cache(inputs)"
    """Why a cache has no run to ask, and what to do."""

    @checked(DataError)
    def accumulated_resid(
        self,
        layer: int | None = -1,
        incl_mid: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        return_labels: bool = False,
        *,
        tower: str | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """Returns the residual stream before every block up to `layer`: `[slot, batch, pos, ...]`.

        Slot l is the input of block l (`"3_pre"`), with `incl_mid` followed by the stream between
        its attention and MLP (`"3_mid"`).  With `layer=-1` (or None) all blocks are there, and
        after them the output of the last one (`"final_post"`): slot l is then slot l of the
        paper.  Where `resid_pre` of a block was not cached, `resid_post` of the block below is
        there (`"2_post"`); they differ where a model adds something in between (DeepStack).

        `pos_slice` selects positions; the axis of a single one (`-1`) goes, as in TransformerLens.
        `apply_ln` applies the norm before block `layer` (the final one), see `apply_ln_to_stack`.
        """
        n_layers = self._n_layers(tower)
        stop = self._layer(layer, n_layers)
        found: list[tuple[str, Any]] = []
        for block in range(stop + 1):
            if block == n_layers:
                found.append(("final_post", self["resid_post", block - 1, tower]))
                continue
            found.append(self._before(block, tower))
            if incl_mid and block < stop:
                found.append((f"{block}_mid", self["resid_mid", block, tower]))
        stack = torch.stack([at_positions(one_tensor(x), pos_slice) for _, x in found])
        if apply_ln:
            stack = self._with_ln(stack, stop, pos_slice, tower)
        return (stack, [label for label, _ in found]) if return_labels else stack

    @checked(DataError)
    def decompose_resid(
        self,
        layer: int | None = -1,
        mode: Mode = "all",
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        return_labels: bool = False,
        *,
        incl_embeds: bool = True,
        tower: str | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """Returns the contribution of each part to the residual stream: `[part, batch, pos, ...]`.

        Parts are the input of block 0 (`embed`, unless `incl_embeds=False`), then the attention and
        MLP output of every layer below `layer` (`0_attn_out`, `0_mlp_out`; `mode` keeps one kind),
        as they are added: a model may scale them.  What else a model adds is a part of its own:
        `before_1` between two blocks (DeepStack), `0_per_layer_out` inside of one (inputs of each
        layer).  The sum of all is the stream before block `layer`; with -1 (or None), the stream
        after the last block.  It is verified on the cached stream.

        `pos_slice` selects positions; the axis of a single one (`-1`) goes.  `apply_ln` applies the
        norm before block `layer` to the parts, see `apply_ln_to_stack`.

        Raises `DataError` when the parts do not sum to the stream: the model scales or normalises
        it, adds something that has no site, or a hook wrote to it.
        """
        n_layers = self._n_layers(tower)
        stop = self._layer(layer, n_layers)
        parts = parts_of(self, tower, stop, layer in (None, -1, n_layers))
        if mode != "all":
            parts = [part for part in parts if part[0] == "embed" or f"_{mode}_out" in part[0]]
        parts = [part for part in parts if incl_embeds or part[0] != "embed"]
        if not parts:
            raise DataError(
                f"decompose_resid(layer={layer}, mode={mode!r}, incl_embeds={incl_embeds}) leaves "
                "no part. Take a later layer, or more parts."
            )
        stack = torch.stack([at_positions(part, pos_slice) for _, part in parts])
        if apply_ln:
            stack = self._with_ln(stack, stop, pos_slice, tower)
        return (stack, [label for label, _ in parts]) if return_labels else stack

    @checked(DataError)
    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        *,
        tower: str | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """Returns what each attention head below `layer` adds: `[head, batch, pos, d_model]`.

        Heads are labelled `L0H0`, `L0H1`, …, in TransformerLens's order.  A head's result is its
        value vectors through the output projection, and through what a model has after it: a norm
        at the run's own scale (Gemma), a factor.  The sum over the heads of a layer, with the
        bias, which belongs to no head, is verified to be what attention adds.  Heads of a
        cross-attention beside self-attention are not among them.  With `incl_remainder` the last
        row, `remainder`, is all else in the stream before block `layer` (at -1 after the last).

        Needs `attn.hook_z`, the streams and the outputs of all parts of these layers, and the model
        of the run.  Raises `DataError` where the heads do not sum to attention's output, and
        `UnknownHookError` for a cache that holds too little.
        """
        return self._pieces(
            "heads", layer, None, return_labels, incl_remainder, pos_slice, apply_ln, tower
        )

    @checked(DataError)
    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: PosSlice = None,
        neuron_slice: int | slice | Sequence[int] | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        *,
        tower: str | None = None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        """Returns what each MLP neuron below `layer` adds: `[neuron, batch, pos, d_model]`.

        As `stack_head_results`, with labels `L0N0`, …; `neuron_slice` selects neurons of each
        layer, since all of them take `d_mlp` times the memory of a stream.

        Needs `mlp.hook_post`, the streams and the outputs of all parts of these layers, and the
        model of the run.
        """
        return self._pieces(
            "neurons",
            layer,
            neuron_slice,
            return_labels,
            incl_remainder,
            pos_slice,
            apply_ln,
            tower,
        )

    @checked(DataError)
    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "part *pos d_model"],
        layer: int | None = -1,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
    ) -> Float[Tensor, "part *pos d_model"]:
        """Returns parts of a residual stream as a norm passes them on at the run's own scale.

        The norm is the final one (`layer=-1`, None or n_layers), or that before attention (with
        `mlp_input` the MLP) of block `layer`.  It divides the stream by one number for each
        position; with the run's number it is linear.  Parts are centred where the norm centres, and
        multiplied by its gain.  Its bias belongs to no part (see `logit_bias`).

        `pos_slice` are the positions that the stack was made for.
        Raises `DataError` where the shapes do not fit the run, or a hook wrote after the norm.
        """
        n_layers = self._n_layers(None)
        return self._with_ln(
            residual_stack, self._layer(layer, n_layers), pos_slice, None, mlp_input
        )

    # --- helpers --------------------------------------------------------------------------

    def _pieces(
        self,
        kind: str,
        layer: int | None,
        neurons: int | slice | Sequence[int] | None,
        return_labels: bool,
        incl_remainder: bool,
        pos_slice: PosSlice,
        apply_ln: bool,
        tower: str | None,
    ) -> Tensor | tuple[Tensor, list[str]]:
        n_layers, reads = self._n_layers(tower), self._reads()
        stop = self._layer(layer, n_layers)
        found: list[Tensor] = []
        labels: list[str] = []
        part = "attn_out" if kind == "heads" else "mlp_out"
        for block in range(stop):
            summands = reads.summands(kind, block, tower)  # None: tokens are mixed by other means
            added, factor = added_by(self, block, summands and part, tower)
            if factor != 1:  # of the whole stream, with all that was added below
                found = [factor * pieces for pieces in found]
            if summands is None or added is None:
                continue
            made = self._pieces_of(kind, summands, added, block, neurons, pos_slice, tower)
            found.append(made[0])
            labels += made[1]
        if not found:
            raise DataError(
                f"No block below {stop} has {kind} whose outputs are summed by one linear map. "
                "Use decompose_resid() for the outputs of attention and MLPs."
            )
        stack = torch.cat(found)
        if incl_remainder:
            whole = at_positions(one_tensor(self._stream(stop, tower)), pos_slice)
            stack = torch.cat([stack, (whole - stack.sum(0))[None].to(stack.dtype)])
            labels.append("remainder")
        if apply_ln:
            stack = self._with_ln(stack, stop, pos_slice, tower)
        return (stack, labels) if return_labels else stack

    def _pieces_of(
        self,
        kind: str,
        summands: Summands,
        added: Tensor,
        block: int,
        neurons: int | slice | Sequence[int] | None,
        pos_slice: PosSlice,
        tower: str | None,
    ) -> tuple[Tensor, list[str]]:
        """Returns what the heads or neurons of a block add, with labels."""
        values = one_tensor(self["z" if kind == "heads" else "post", block, tower])
        part = "attn_out" if kind == "heads" else "mlp_out"
        name = f"{tower + '.' if tower else ''}blocks.{block}.hook_{part}"
        flat = values.flatten(-2) if kind == "heads" else values
        to_stream = summands.to_stream(flat, added, name)

        def at(x: Tensor) -> Tensor:
            return at_positions(x, pos_slice)

        if kind == "heads":
            chosen = list(range(values.shape[-2]))
            pieces = summands.of_heads(at_positions(values, pos_slice, values.ndim - 3))
        else:
            chosen = _chosen(neurons, values.shape[-1])
            pieces = summands.of_neurons(at(values), chosen)
        dtype = torch.promote_types(added.dtype, torch.float32)
        labels = [f"L{block}{'H' if kind == 'heads' else 'N'}{i}" for i in chosen]
        return to_stream.through(pieces, at).to(dtype), labels

    def _with_ln(
        self,
        stack: Tensor,
        layer: int,
        pos_slice: PosSlice,
        tower: str | None,
        mlp_input: bool = False,
    ) -> Tensor:
        if tower_of(tower):
            raise DataError(
                "Norms are applied to streams of the language model only. Leave out apply_ln, or "
                "tower."
            )
        reads = self._reads()
        path, norm = reads.norm(layer, mlp_input)
        whole = self["resid_mid", layer] if mlp_input else self._stream(layer, None)
        stream = at_positions(one_tensor(whole), pos_slice)
        if stack.shape[1:] != stream.shape:
            raise DataError(
                f"residual_stack has shape {tuple(stack.shape)}, and the run's stream at "
                f"pos_slice={shown(pos_slice)} {tuple(stream.shape)}: expected "
                f"[part, {', '.join(map(str, stream.shape))}]. Give the pos_slice of the stack."
            )
        normed = reads.normed(path, stream)
        self._require_normed(layer, mlp_input, normed, pos_slice)
        dtype = torch.promote_types(stack.dtype, torch.float32)
        return norm.through(stack, norm.scale(stream, normed)).to(dtype)

    def _require_normed(
        self, layer: int, mlp_input: bool, normed: Tensor, pos_slice: PosSlice
    ) -> None:
        """Raises `DataError` where the run's norm gave something else than it gives now."""
        final = layer == self._n_layers(None)
        key = ("normalized",) if final else ("normalized", layer, "ln2" if mlp_input else "ln1")
        if key not in self:
            return
        cached = at_positions(one_tensor(self[key]), pos_slice)
        allowed = rounding(cached.dtype) * float(cached.abs().max())
        if cached.shape != normed.shape or not bool(((cached - normed).abs() <= allowed).all()):
            raise DataError(
                f"The norm of layer {layer} gave something else in the run than it gives for the "
                "cached stream: a hook wrote there, or the norm reads another stream."
            )

    def _stream(self, layer: int, tower: str | None) -> Any:
        """Returns the stream before a block, or after the last one."""
        if layer == self._n_layers(tower):
            return self["resid_post", layer - 1, tower]
        return self._before(layer, tower)[1]

    def _before(self, block: int, tower: str | None) -> tuple[str, Any]:
        if block and ("resid_pre", block, tower) not in self:
            return f"{block - 1}_post", self["resid_post", block - 1, tower]
        return f"{block}_pre", self["resid_pre", block, tower]

    def _layer(self, layer: int | None, n_layers: int) -> int:
        if layer is None or layer == -1:
            return n_layers
        if not 0 <= layer <= n_layers:
            raise UnknownHookError(
                f"layer={layer} was given; expected 0 to {n_layers} (after the last block), or -1 "
                "for that."
            )
        return layer

    def _n_layers(self, tower: str | None) -> int:
        prefix = f"{VISION}.blocks" if tower_of(tower) else "blocks"
        return self.n_layers.get(prefix) or count_layers(prefix, self)

    def _reads(self) -> Reads:
        if self.readout is None:
            raise DataError(
                f"This cache has no model to read weights of: {self._no_run}; for a single stream, "
                "model.run_from_layer(inputs, stream, n_layers) gives the lens."
            )
        return self.readout


def one_tensor(found: Any) -> Tensor:
    if isinstance(found, list):
        raise DataError(
            "The activation is a list by image (sizes differ), so it cannot be stacked. Take the "
            "cache of one image."
        )
    return found


def _chosen(neurons: int | slice | Sequence[int] | None, n: int) -> list[int]:
    """Returns the numbers of chosen neurons; raises `DataError` for others than there are."""
    if neurons is None:
        return list(range(n))
    if isinstance(neurons, slice):
        return list(range(n))[neurons]
    listed = [neurons] if isinstance(neurons, int) else list(neurons)
    if not listed or any(not -n <= i < n for i in listed):
        raise DataError(
            f"neuron_slice={shown(neurons)} was given; a layer has neurons 0 to {n - 1}."
        )
    return [i % n for i in listed]
