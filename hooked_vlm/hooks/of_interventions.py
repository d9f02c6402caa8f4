"""The hook functions of interventions of the user's own, made to act as all interventions do."""

from collections.abc import Callable, Mapping
from typing import Any

from hooked_vlm.arguments.checked import shown
from hooked_vlm.arguments.kinds import is_whole
from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.hook_point import HookPoint, require_hook_function
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.hooks.prompts import OnGenerated, OnPrompt


def hooks_of(intervention: Any, model: Any, inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Returns what an intervention's `hooks_for` returns: pairs of a site and a function.

    The number of a slot stands for its site.

    A function that an intervention of the user's own returns acts on the prompts of `inputs`, once
    for each copy of them that a generation makes, and not on what is generated after them; unless
    the intervention has `each_step = True`.

    Raises `InterventionError` for anything but a list of such pairs.
    """
    found = intervention.hooks_for(model, inputs)
    pairs = list(found) if isinstance(found, list | tuple) else [found]
    if not isinstance(found, list | tuple) or not all(map(_is_pair, pairs)):
        raise InterventionError(
            f"{type(intervention).__name__}.hooks_for returned {shown(found)}; expected a list of "
            "pairs (name of a site, function), with functions fn(activation, hook)."
        )
    return [(_named(site, model), _on_prompt(intervention, fn, inputs)) for site, fn in pairs]


def _named(site: Any, model: Any) -> Any:
    return slot_name(int(site), model.cfg.n_layers) if is_whole(site) else site


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and callable(item[1])


def _on_prompt(intervention: Any, fn: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    if isinstance(fn, OnPrompt | OnGenerated) or getattr(intervention, "each_step", False):
        return fn
    require_hook_function(fn, InterventionError)

    def edit(activation: Any, hook: HookPoint) -> Any:
        found = fn(activation, hook=hook)
        return activation if found is None else found

    edit.__name__ = f"{getattr(fn, '__name__', type(fn).__name__)} of {type(intervention).__name__}"
    return OnPrompt(edit, inputs, None)
