"""What an intervention is to this package: the protocol for interventions of the user's own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import InterventionError
from hooked_vlm.interventions.placing import Places, SiteName, site_of
from hooked_vlm.model.base import HookedModel


@runtime_checkable
class Intervention(Protocol):
    """What `run_with_hooks`, `run_with_cache`, `hooks`, `generate`, `Chain` and `Sweep` take.

    One method is needed.  `hooks_for(model, inputs)` returns a list of pairs: the name of a site
    (or a pattern of names), and a function `fn(activation, hook)` that returns a tensor of the
    activation's shape, dtype and device, or None to leave it as it is (an edit in place counts).
    It is called before a run, and is the place for checks: raise an error there, and nothing runs.
    As all interventions, it acts on the prompts of `inputs` alone, not on tokens generated after
    them, and a run on other inputs raises.

    Further names are used where they exist:

    - `check(model, inputs)` raises what is wrong; a sweep calls it for all cells before it runs.
    - `at_site(site)` returns the same intervention at another site; a `Chain` needs it for its own.
    - `first_position`, a whole number, says that positions of the prompts before it are neither
      read nor changed.  With it, a sweep may run the intervention in a growing batch (there, the
      function may be shown zeros before that position); without it, the sweep takes one pass for
      each cell, with a warning.
    - `each_step = True` lets the functions act at every step of a generation.

    A frozen dataclass has a readable `repr`, which messages and labels of sweeps show.

    >>> from dataclasses import dataclass
    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM, Intervention
    >>> @dataclass(frozen=True)
    ... class Scale:
    ...     site: str
    ...     factor: float
    ...
    ...     def hooks_for(self, model, inputs):
    ...         return [(self.site, lambda activation, hook: activation * self.factor)]
    >>> isinstance(Scale("blocks.0.hook_mlp_out", 0.0), Intervention)
    True
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> model.run_with_hooks(inputs, [Scale("blocks.0.hook_mlp_out", 0.0)]).shape
    torch.Size([1, 42, 556])
    """

    def hooks_for(
        self, model: Any, inputs: Mapping[str, Any]
    ) -> Sequence[tuple[Any, Callable[..., Any]]]:
        """Returns pairs of a site and a function that carry this out on some inputs."""
        ...


@checked(InterventionError, but=("at",))
def place_index(
    model: HookedModel, inputs: Mapping[str, Any], site: SiteName, at: Any = None
) -> tuple[Int[Tensor, " index"], Int[Tensor, " index"]]:
    """Returns where a place is in a site's activation: two indices, so that `activation[index]`.

    `at` is what `Patch(at=…)` takes: a Region, `LastToken()`, `Span(…)`, …; None is every
    position of the prompts (or of the images, at sites of the vision encoder).  The first index
    is that of the prompt or image, the second that of the position, patch or token.

    Raises what `Patch` raises for a place or a site that does not exist.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM, LastToken
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> [index.tolist() for index in place_index(model, inputs, 2, LastToken())]
    [[0], [41]]
    """
    found = Places(model).located(site_of(model, site), inputs, at)
    rows, positions = found.index(None, model.device)
    return rows, positions
