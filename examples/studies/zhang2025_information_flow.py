"""Through which tokens does the image reach the answer?  (Zhang et al. 2025, arXiv:2411.18620)

    python examples/studies/zhang2025_information_flow.py [MODEL]

Attention knockout (Geva et al. 2023) in windows of three layers: from image to question, from image
to the last token, and from question to the last token.  What is measured is the change of the right
answer's probability, relative to the plain run.

In LLaVA models, Zhang et al. report that in lower layers the image's information goes to the
question's tokens, first of the whole image and then of the objects that are asked for, in middle
layers from there to the last token.
"""

import torch
from common import Study

from hooked_vlm import Attend, Chain, LastToken, Span, Sweep, final_logits
from hooked_vlm.analysis.scoring import target_probability


study = Study(__doc__)
model, geometry = study.model, study.geometry
questions = study.questions(12, ("left", "right"))
inputs, targets = study.prepare(questions), [q.target for q in questions]
asked, last, n_layers = Span("The color of the square to the"), LastToken(), model.cfg.n_layers
image = inputs.grids[0][0].all()
objects = geometry.object_region("horizontal", 0) | geometry.object_region("horizontal", 2)
flows = {
    "image to question": (asked, image),
    "image to last token": (last, image),
    "outer objects to last token": (last, objects),
    "question to last token": (last, asked),
}


def probability(logits: torch.Tensor) -> torch.Tensor:
    return target_probability(final_logits(logits), model.tokenizer, targets)


def knockout(flow: str, layer: int) -> Chain:
    query, key = flows[flow]
    one = Attend("blocks.0.attn", query=query, key=key, mask=True)
    return one.window(layer, 3, n_layers)


sweep = Sweep(inputs, {"flow": list(flows), "layer": range(n_layers)}, make=knockout)
scores = sweep.run(model, probability, dims=("pair",), logits_to_keep=1)
plain = probability(model(inputs)).numpy()
change = ((scores - plain) / plain).mean("pair") * 100
print("change of the right answer's probability in %, by the middle of the window")
print(change.to_pandas().round(0).to_string())

figure, ax = study.figure()
for flow in flows:
    ax.plot(range(n_layers), change.sel(flow=flow), marker="o", label=flow)
ax.set(xlabel="middle of the window of three layers", ylabel="change of probability, %")
ax.legend(fontsize=7)
study.save(figure)
