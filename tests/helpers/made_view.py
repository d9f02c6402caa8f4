"""A viewer's page with every panel, of a shipped model."""

from hooked_vlm import HookedVLM, View, order_probes, view
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.squares import draw


def made_view() -> View:
    """Returns what a viewer shows of squares: attention, lens, patches and probes."""
    model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
    places = geometry_for(6, token_px=16)
    orders = (["red", "green", "blue"], ["blue", "green", "red"])
    images = [draw(names, "horizontal", places) for names in orders]
    probes = order_probes(model, pictures=8, slots=[0, 3], batch_size=8)
    question = "The color of the square to the left of the green square is "
    return view(model, images[0], question, source=images[1], probes=probes)
