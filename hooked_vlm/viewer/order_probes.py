"""Probes of the order of three squares, at every slot: what a viewer's probe maps show by default.

The recipe is that of E3 (`LinearProbe` on object tokens, labelled by place, split by picture), on
the residual stream of every slot instead of the projector's output alone.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hooked_vlm.analysis.probes import (
    Examples,
    LinearProbe,
    object_examples,
    split_by_image,
)
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Count, Model, Seed
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.loop import silent
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.stimuli.settings import stimulus_set
from hooked_vlm.viewer.measured import SlotProbes


PLACES = {"horizontal": ("left", "middle", "right"), "vertical": ("top", "middle", "bottom")}


@checked(DataError)
def order_probes(
    model: Model,
    *,
    setting: str = "squares",
    pictures: Count = 48,
    slots: Sequence[int] | None = None,
    seed: Seed = 0,
    batch_size: Count = 8,
    on_progress: Callable[[int, int], None] = silent,
) -> dict[str, SlotProbes]:
    """Returns probes that read an object's place from the residual stream, by axis.

    For each axis of the setting, `pictures` of its questions are drawn, and a `LinearProbe` is
    fitted for each slot to the tokens of the three objects on three quarters of them; `accuracy` is
    that on the others.  `slots` defaults to all.

    Raises `DataError` for fewer than four pictures or a slot that the model does not have, and what
    `Setting` raises for a model that cannot be shown these pictures.

    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> probes = order_probes(model, pictures=4, slots=[0])
    >>> list(probes), probes["horizontal"].classes
    (['horizontal', 'vertical'], ('left', 'middle', 'right'))
    """
    chosen = slots_of(model, slots)
    drawn = Setting(model, stimulus_set(setting), batch_size)
    if pictures < 4:
        raise DataError(
            f"pictures={pictures} was given; expected at least 4, of which one is held out."
        )
    made, done = {}, 0
    for axis in drawn.axes:
        asked = drawn.stimuli.items(("left",) if axis == "horizontal" else ("above",))
        asked = random.Random(int(seed)).sample(asked, min(pictures, len(asked)))
        total = len(asked) * len(drawn.axes)
        parts: dict[int, list[torch.Tensor]] = {slot: [] for slot in chosen}
        for batch in drawn.batches(asked):
            for slot, found in _streams(drawn, batch, chosen).items():
                parts[slot].append(found)
            done += len(batch)
            on_progress(done, total)
        regions = [drawn.geometry.object_region(axis, place) for place in range(3)]
        examples = {
            slot: object_examples(torch.cat(found), regions) for slot, found in parts.items()
        }
        made[axis] = _fitted(examples, axis, len(asked), drawn.stimuli.title, seed)
    return made


def slots_of(model: Model, slots: Sequence[int] | None) -> dict[int, str]:
    """Returns the hook names of slots (default: of all); raises `DataError` for others."""
    n_layers = model.cfg.n_layers
    wanted = list(range(n_layers + 1)) if slots is None else list(dict.fromkeys(slots))
    wrong = [slot for slot in wanted if not 0 <= slot <= n_layers]
    if wrong or not wanted:
        raise DataError(
            f"slots={slots} was given; expected some of 0 to {n_layers}: slot 0 is the input of "
            "block 0, and slot l the output of block l-1."
        )
    return {slot: slot_name(slot, n_layers) for slot in wanted}


def _streams(setting: Setting, batch: list, slots: dict[int, str]) -> dict[int, torch.Tensor]:
    """Returns the stream of the pictures' cells `[picture, cell, d]` at each slot."""
    inputs = setting.inputs(batch)
    with torch.no_grad():
        _, cache = setting.model.run_with_cache(inputs, list(slots.values()), logits_to_keep=1)
    cells = torch.stack([row[0].positions.flatten() for row in inputs.grids])
    rows = torch.arange(len(cells))[:, None]
    return {slot: cache[name].float().cpu()[rows, cells] for slot, name in slots.items()}


def _fitted(examples: dict[int, Examples], axis: str, n: int, title: str, seed: int) -> SlotProbes:
    train, test = split_by_image(n, seed=seed)
    probes, accuracy = {}, {}
    for slot, own in examples.items():
        part = own.of_images(train)
        names = np.array(PLACES[axis])
        probes[slot] = LinearProbe(seed=seed).fit(part.X, names[part.y])
        held = own.of_images(test)
        right = probes[slot].predict(held.X) == names[held.y]
        accuracy[slot] = float(right.mean())
    about = (
        f"Fitted to the object tokens of {len(train)} pictures of {title}, labelled by the "
        f"object's place; accuracy is that of object tokens of {len(test)} other pictures."
    )
    return SlotProbes(probes, accuracy, about)
