"""Patch the last token at every slot of the language model, in one sweep.

    python examples/sweep_over_slots.py

The source image shows the same squares in reverse order. The sweep shows from which slot on
the last token carries the answer.
"""

from hooked_vlm import HookedVLM, LastToken, Patch, Sweep, final_logits
from hooked_vlm.analysis.scoring import target_probability
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for
from hooked_vlm.stimuli.squares import draw


model = HookedVLM.from_pretrained("tiny-qwen2-vl")
geometry = geometry_for(n_tokens=12, token_px=16)
question = "The color of the square to the left of the green square is "
rows = [["red", "green", "blue"], ["gray", "green", "black"], ["brown", "green", "red"]]
questions = [question] * len(rows)
images = [draw(row, "horizontal", geometry) for row in rows]
reversed_images = [draw(row[::-1], "horizontal", geometry) for row in rows]
inputs = model.prepare(images, questions, system=SYSTEM_PROMPT)
source = model.prepare(reversed_images, questions, system=SYSTEM_PROMPT)

# A sweep consists of named axes and a function that returns the intervention for each value.
sweep = Sweep(
    inputs,
    {"slot": range(model.cfg.n_layers + 1)},
    make=lambda slot: Patch(slot, at=LastToken(), source=source),
)
print(sweep.plan(model).explain(logits_to_keep=1), "\n")  # the cost, before anything runs


def source_answer(logits):  # one score per prompt
    answers = [row[2] for row in rows]
    return target_probability(final_logits(logits), model.tokenizer, answers)


scores = sweep.run(model, source_answer, dims=("prompt",), logits_to_keep=1)
print("engine:", scores.attrs["engine"])
print("probability of the source's answer, by slot (mean over prompts)")
for slot in scores["slot"].values:
    value = float(scores.sel(slot=slot).mean())
    print(f"slot {slot}: {value:.2f} {'#' * round(40 * value)}")
