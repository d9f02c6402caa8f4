"""How often does a model answer right? (paper, Table 1)

    python examples/e1_behaviour.py [MODEL [SETTING]]

Every item of a setting, in batches: the top token after the prompt against the target.
"""

import argparse

import torch

from hooked_vlm import HookedVLM
from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.stimuli import geometry_for
from hooked_vlm.stimuli.settings import stimulus_set


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
parser.add_argument("setting", nargs="?", default="squares", metavar="SETTING")
given = parser.parse_args()

torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained(given.model)
stimuli = stimulus_set(given.setting)
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))

for direction in stimuli.directions:
    questions = stimuli.items((direction,))
    right = 0
    for start in range(0, len(questions), 30):
        batch = questions[start : start + 30]
        pictures = [stimuli.picture(q, geometry) for q in batch]
        texts = [stimuli.prompt(q) for q in batch]
        logits = model(model.prepare(pictures, texts, system=stimuli.system))[:, -1]
        answers = top_answer(logits, model.tokenizer)
        right += sum(a == normalise(q.target) for a, q in zip(answers, batch, strict=True))
    print(f"{direction:<6} {wilson(right, len(questions))} of {len(questions)}")
