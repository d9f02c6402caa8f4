"""What does the final token carry, slot by slot? (paper, 5.1, Fig. 3)

    python examples/e2_final_token.py [MODEL]

The last position's residual vector is replaced by that of a run on other colours under the
opposite question.  Three answers tell what came along: the clean one (nothing), the clean
picture's colour at the other place (the place), the other picture's colour (the answer).
"""

import argparse

import torch

from hooked_vlm import HookedVLM, LastToken, Patch, Sweep, final_logits
from hooked_vlm.analysis.scoring import target_probability
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for, sample_tuples
from hooked_vlm.stimuli.pairs import final_token_pair
from hooked_vlm.stimuli.squares import COLORS, draw, prompt


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

model = HookedVLM.from_pretrained(given.model)
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))

tuples = sample_tuples(list(COLORS), k=5, per_direction=12)["left"]
pairs = [final_token_pair("left", names) for names in tuples]


def ask(questions):
    pictures = [draw(q.entities, q.axis, geometry) for q in questions]
    return model.prepare(pictures, [prompt(q) for q in questions], system=SYSTEM_PROMPT)


clean, other = ask([p.clean for p in pairs]), ask([p.counterfactual for p in pairs])
sweep = Sweep(
    clean,
    {"slot": range(model.cfg.n_layers + 1)},
    make=lambda slot: Patch(slot, at=LastToken(), source=other),
)


def three_answers(logits: torch.Tensor) -> torch.Tensor:
    last = final_logits(logits)
    kinds = ("clean_answer", "ordering_answer", "attribute_answer")
    columns = [
        target_probability(last, model.tokenizer, [getattr(pair, kind) for pair in pairs])
        for kind in kinds
    ]
    return torch.stack(columns, dim=-1)


coords = {"answer": ("clean", "ordering", "attribute")}
scores = sweep.run(model, three_answers, dims=("pair", "answer"), coords=coords)
print("probability of each answer, by slot")
print(scores.mean("pair").to_pandas().round(2).to_string())
