"""Adds sites of the user's own to a wrapped model."""

from typing import Any

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Name
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.own_sites import insert, own_site
from hooked_vlm.hooks.sites import Site


class TakesSites:
    """Gives a wrapped model `add_site`."""

    hf_model: Any
    sites: dict[str, Site]
    hook_dict: dict[str, HookPoint]
    _footprint: Any

    def turn(self) -> Any:
        """Returns a context manager inside which no other thread runs this model."""
        raise NotImplementedError

    @checked(HookError)
    def add_site(
        self, name: Name, module: Name, where: Name = "output", axes: Name | None = None
    ) -> HookPoint:
        """Adds a site: the output (or `where="input"`) of a module, by its path in `hf_model`.

        From then on it is a site like the others, for this wrapped model: caches have it,
        functions and interventions act there, sweeps go over it, and `describe` lists it.  Of a
        tuple, the first element counts.

        The name says where the module is, as all names do: `blocks.3.hook_…` in block 3,
        `vision_encoder.blocks.3.hook_…`, `vision_projector.hook_…`; elsewhere `hook_…`.

        `axes` names the activation's axes, by default `"batch pos feature"` (`"image patch
        feature"` in the encoder, `"image token feature"` in the projector); a name of a size that
        the model has (`d_model`, `d_mlp`) lets that size be checked before a run.

        Raises `HookError` for a module that does not exist, for a name that is taken or says
        another place, and for what is a site already.  In a run, it is raised for an activation
        that has other axes, and for a module that runs more than once in a pass.

        >>> from PIL import Image
        >>> from hooked_vlm import HookedVLM
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> block = model.sites["blocks.2.hook_resid_pre"].module
        >>> model.add_site("blocks.2.mlp.hook_act", f"{block}.mlp.act_fn").axes
        'batch pos feature'
        >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
        >>> logits, cache = model.run_with_cache(inputs, "blocks.2.mlp.hook_act")
        >>> cache["blocks.2.mlp.hook_act"].shape
        torch.Size([1, 42, 256])
        """
        site = own_site(self, name, module, where, axes)
        with self.turn():
            insert(self.sites, name, site)
            insert(self.hook_dict, name, HookPoint(name, site.axes))
            self._footprint = None
        return self.hook_dict[name]
