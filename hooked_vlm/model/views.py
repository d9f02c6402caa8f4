"""Hook points by attribute, as TransformerLens's users type them: `model.blocks[3].attn.hook_q`."""

from collections.abc import Iterator, Mapping
from typing import Any

from hooked_vlm.errors import UnknownNameError, did_you_mean
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.names import PROJECTOR, VISION
from hooked_vlm.hooks.sites import Site


_WEIGHTS = ("W_", "b_")


class Points:
    """The hook points below a name: attributes are parts and points, blocks are numbered.

    It holds no weight and computes nothing: modules are in `model.hf_model`.

    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> model.blocks[-1].attn.hook_q.name, len(model.blocks)
    ('blocks.5.attn.hook_q', 6)
    """

    def __init__(self, points: Mapping[str, HookPoint], name: str) -> None:
        self._points, self._name = points, name
        every = (*points, *getattr(points, "more", ()))
        self._below = [n[len(name) + 1 :] for n in every if n.startswith(f"{name}.")]

    def __getitem__(self, index: int | slice) -> Any:
        """Returns one block, or a list of blocks for a slice; raises `UnknownNameError`."""
        n = len(self)
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(n))]
        if not n or not isinstance(index, int) or not -n <= index < n:
            have = f"has 0 to {n - 1}" if n else "has no numbered parts"
            raise UnknownNameError(f"{self._name}[{str(index)[:40]}] is not there: it {have}.")
        return Points(self._points, f"{self._name}.{index % n}")

    def __len__(self) -> int:
        """Number of blocks; 0 for parts that are not numbered."""
        return len({n.split(".")[0] for n in self._below if n.split(".")[0].isdigit()})

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator["Points"]:
        return (self[i] for i in range(len(self)))

    def __dir__(self) -> list[str]:
        return sorted({n.split(".")[0] for n in self._below})

    def __repr__(self) -> str:
        return f"Points({self._name!r}: {', '.join(dir(self))[:200]})"

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UnknownNameError(
            f"model.{self._name} names hook points and computes nothing. The module is in "
            "model.hf_model; model.anatomy has its path. For a part of a run use run_from_layer."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        full = f"{self._name}.{name}"
        if any(n == name or n.startswith(f"{name}.") for n in self._below):
            return self._points[full] if name in self._below else Points(self._points, full)
        if name.startswith("hook_") or name in ("q", "k", "v", "o"):
            return _aliased(self._points, full, self._below)
        if name.startswith(_WEIGHTS):
            raise UnknownNameError(
                f"model.{full[:80]}: no weight is converted. model.hf_model has those of "
                "transformers, and model.anatomy names its modules."
            )
        raise UnknownNameError(
            f"There is no hook point at or below model.{full[:80]}.{did_you_mean(name, dir(self))}"
        )


def _aliased(points: Mapping[str, HookPoint], full: str, below: list[str]) -> Any:
    """Returns the hook point of another accepted spelling, such as `attn.q.hook_out`."""
    if not full.rpartition(".")[2].startswith("hook_"):
        return Points({**points, f"{full}.hook_out": points[f"{full}.hook_out"]}, full)
    try:
        return points[full]  # accepts the spellings that hooks do
    except UnknownNameError as error:
        near = did_you_mean(full.rpartition(".")[2], below)
        raise UnknownNameError(
            f"There is no hook point {full[:80]}.{near or f' {error}'}"
        ) from None


class HasPoints:
    """Gives a wrapped model its hook points by attribute."""

    sites: dict[str, Site]
    hook_dict: dict[str, HookPoint]

    def _add_on_request(self, sites: dict[str, Site]) -> None:
        """Makes sites known that run only where they are named."""
        points = [HookPoint(site.name, site.axes, site.read_only) for site in sites.values()]
        self.sites.more = sites  # type: ignore[attr-defined]
        self.hook_dict.more = {point.name: point for point in points}  # type: ignore[attr-defined]

    @property
    def blocks(self) -> Points:
        """The hook points of the language model's blocks: `model.blocks[3].attn.hook_q`."""
        return Points(self.hook_dict, "blocks")

    @property
    def vision_encoder(self) -> Points:
        """The hook points of the vision encoder: `model.vision_encoder.blocks[0].hook_mlp_out`."""
        return Points(self.hook_dict, VISION)

    @property
    def vision_projector(self) -> Points:
        """The hook points of the projector."""
        return Points(self.hook_dict, PROJECTOR)

    @property
    def ln_final(self) -> Points:
        """The hook points of the final norm."""
        return Points(self.hook_dict, "ln_final")
