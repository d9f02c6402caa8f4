"""The activations of one run, by name.

An `ActivationCache` is a read-only mapping from hook names to tensors that also accepts
TransformerLens's short forms: `cache["resid_post", 3]`, `cache["k6"]`, and
`cache["pattern", 0, "vision_encoder"]` for the vision encoder.  It holds no weights; its logit lens
reads streams with the model of the run, which it does not keep from being deleted.
Vision sites of images of different sizes are lists by image.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.displayed import brief, html_block, html_table
from hooked_vlm.arguments.kinds import Device, File
from hooked_vlm.errors import DataError, UnknownHookError, counted, did_you_mean
from hooked_vlm.hooks.cut import Cuts
from hooked_vlm.hooks.files import write_tensors
from hooked_vlm.hooks.logit_parts import LogitParts
from hooked_vlm.hooks.names import (
    get_act_name,
    layer_out_of_range,
    resolve_name,
    site_path,
    tower_of,
)
from hooked_vlm.hooks.patch_order import VisionActivation, each, listed
from hooked_vlm.hooks.stream import Reads


_NAMES = "names"
"""The entry of a file's metadata with the names of the sites, in the order of the cache."""


class ActivationCache(Cuts, LogitParts):
    """A mapping from hook names to the activations of one run.

    `model.run_with_cache(inputs)` returns the logits and such a cache.

    >>> cache = ActivationCache({"blocks.0.hook_resid_post": torch.zeros(1, 5, 8)})
    >>> cache["resid_post", 0].shape
    torch.Size([1, 5, 8])
    >>> cache.nbytes
    160
    """

    @checked(DataError)
    def __init__(
        self, activations: Mapping[str, VisionActivation], n_layers: Mapping[str, int] | None = None
    ) -> None:
        """`n_layers` are the model's numbers of layers, by stack (`"blocks"`,
        `"vision_encoder.blocks"`): negative layers count from them.  Without `n_layers`,
        negative layers count from the last cached layer."""
        self._activations = dict(activations)
        self.n_layers = dict(n_layers or {})
        self.readout: Reads | None = None

    def __getitem__(self, key: str | tuple) -> Any:
        """Returns an activation by full name, short name, or `(short name, layer[, type])`.

        The result is a tensor, or a list of tensors by image at vision sites when the images
        have different sizes.  Raises `UnknownHookError` when the activation was not cached.
        """
        parts = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
            raise UnknownHookError(
                f"cache[{repr(key)[:80]}] was asked for; expected a name, or (short name, layer), "
                "such as cache['resid_post', 3]."
            )
        name = get_act_name(*key) if isinstance(key, tuple) else key
        if name in self._activations:
            return self._activations[name]
        for spelling in (name, get_act_name(name)):
            try:
                return self._activations[resolve_name(spelling, self._activations, self.n_layers)]
            except UnknownHookError:
                continue
        if wrong := layer_out_of_range(get_act_name(name), self.n_layers):
            raise UnknownHookError(f"The cache holds no {name!r}: {wrong}")
        raise UnknownHookError(
            f"The cache holds no {name!r}: it has {counted(len(self), 'site')}."
            f"{did_you_mean(get_act_name(name), self._activations)} "
            f"{self.left_out or 'Widen names_filter (or stop_at_layer) to cache more.'}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (UnknownHookError, TypeError):
            return False
        return True

    def __repr__(self) -> str:
        return f"ActivationCache({counted(len(self), 'site')}, {self.nbytes / 2**20:.1f} MiB)"

    def _repr_html_(self) -> str:
        # One row for sites that differ only in the layer and have equal shapes.
        layers: dict[tuple[str, str], list[str]] = {}
        for name, value in self.items():
            layer = site_path(name).layer
            folded = name if layer is None else name.replace(f".{layer}.", ".{l}.", 1)
            numbers = layers.setdefault((folded, brief(value)), [])
            numbers += [] if layer is None else [str(layer)]
        rows = [(name, shape, ", ".join(own)) for (name, shape), own in layers.items()]
        return html_block(repr(self), html_table(("site", "activation", "l"), rows))

    @property
    def nbytes(self) -> int:
        """Size of the cached tensors in bytes."""
        return sum(t.nbytes for value in self.values() for t in listed(value))

    @checked(DataError)
    def to(self, device: Device) -> "ActivationCache":
        """Returns the cache with every tensor on a device."""
        return self._map(lambda t: t.to(device))

    @checked(DataError)
    def remove_batch_dim(self) -> "ActivationCache":
        """Returns the cache without the batch axis of LM sites; raises `DataError` unless it is 1.

        Vision sites keep their image axis: a prompt may hold several images.
        """
        by_prompt = self._by_prompt()
        sizes = {v.shape[0] for v in by_prompt.values()}
        if sizes - {1}:
            raise DataError(
                f"The cache holds batches of {sorted(sizes)}; only 1 can be removed. Select one "
                "prompt first: cache.select([0])."
            )
        made = self._with({**self, **{n: v[0] for n, v in by_prompt.items()}})
        made.has_batch_dim = False
        return made

    @checked(DataError)
    def select(self, rows: slice | Sequence[int]) -> "ActivationCache":
        """Returns the cache for some prompts of the batch, without vision sites.

        Vision sites are by image and not by prompt, so they are left out.
        """
        by_prompt = self._by_prompt()
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows).long()
        if isinstance(index, Tensor):
            batch = min((len(v) for v in by_prompt.values()), default=0)
            if index.ndim != 1 or not bool(((-batch <= index) & (index < batch)).all()):
                raise DataError(
                    f"rows={shown(rows)} was given; the cache holds {counted(batch, 'prompt')}: "
                    "give a list of their numbers, from 0 on, or a slice."
                )
        made = self._with({n: v[index] for n, v in by_prompt.items()})
        made.readout = self.readout and self.readout.of_rows(index)
        batch = min((len(v) for v in by_prompt.values()), default=0)
        made.prompts = (torch.arange(batch) if self.prompts is None else self.prompts)[index]
        return made

    def _by_prompt(self) -> dict[str, Tensor]:
        """Returns the activations whose first axis is prompts."""
        tensors = ((n, v) for n, v in self.items() if isinstance(v, Tensor))
        return {n: v for n, v in tensors if not site_path(n).is_vision}

    @checked(DataError)
    def stack(
        self, name: str, layers: Sequence[int] | None = None, tower: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """Returns one site of every cached layer (or of `layers`), stacked along a first axis.

        >>> cache = ActivationCache(
        ...     {f"blocks.{i}.hook_mlp_out": torch.ones(1, 2, 4) for i in (0, 1)}
        ... )
        >>> cache.stack("mlp_out").shape
        torch.Size([2, 1, 2, 4])
        """
        if layers is None:
            layers = [i for i in range(self._n_layers(tower)) if (name, i, tower) in self]
        tower_of(tower)
        if not len(layers):
            raise UnknownHookError(
                f"The cache holds no layer of {name!r}. Widen names_filter to cache it."
            )
        found = [self[name, layer, tower] for layer in layers]
        if any(isinstance(value, list) for value in found):
            raise DataError(
                f"{name!r} is a list by image (sizes differ) or by pass (of a generation), so its "
                "layers cannot be stacked. Stack the layers of one entry."
            )
        return torch.stack(found)  # type: ignore[arg-type]

    @checked(DataError)
    def save(self, path: File) -> None:
        """Writes the cache to a safetensors file; an interrupted write leaves no file at `path`.

        Raises `DataError` for a path that cannot be written to.
        """
        tensors = {}
        for name, value in self.items():
            for i, tensor in enumerate(listed(value)):
                key = f"{name}#{i}" if isinstance(value, list) else name
                tensors[key] = tensor.detach().cpu().contiguous().clone()
        about = {_NAMES: json.dumps(list(self))}  # safetensors sorts by dtype and name
        about |= {n: str(layers) for n, layers in self.n_layers.items()}
        write_tensors(tensors, path, about, "cache")

    @classmethod
    @checked(DataError)
    def load(cls, path: File, device: Device = "cpu") -> "ActivationCache":
        """Returns the cache that `save` wrote to `path`; raises `DataError` for another file."""
        found: dict[str, VisionActivation] = {}
        lists: dict[str, dict[int, Tensor]] = {}
        try:
            with safe_open(path, framework="pt", device=device) as file:
                about = dict(file.metadata() or {})
                names = json.loads(about.pop(_NAMES, "[]"))
                n_layers = {n: int(layers) for n, layers in about.items()}
                for key in file.keys():  # noqa: SIM118 (not a dict: it has no iterator)
                    name, _, index = key.partition("#")
                    if index:
                        lists.setdefault(name, {})[int(index)] = file.get_tensor(key)
                    else:
                        found[name] = file.get_tensor(key)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(
                f"'{path}' is not a file of ActivationCache.save: {str(error)[:120]}. For other "
                "safetensors use safetensors.torch.load_file."
            ) from None
        found |= {name: [parts[i] for i in sorted(parts)] for name, parts in lists.items()}
        found = {name: found[name] for name in names if name in found} | found
        return cls(found, n_layers)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "ActivationCache":
        return self._with({n: each(function, v) for n, v in self.items()})

    def _with(self, activations: Mapping[str, VisionActivation]) -> "ActivationCache":
        """Returns a cache of the same run with other activations."""
        made = ActivationCache(activations, self.n_layers)
        made.readout, made.where, made.prompts = self.readout, self.where, self.prompts
        made.has_batch_dim, made.left_out = self.has_batch_dim, self.left_out
        return made
