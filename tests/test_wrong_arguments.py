"""Wrong values and types given to the API raise an error of ours, with a remedy.

The cases run in a process without checks of types, as a user's do: with those checks a wrong
type raises before it reaches our code.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest


CASES = {
    # Answers and logits that cannot be scored.
    "g7 an answer of two tokens": (
        "scoring.matches_answer(logits, tok, ['red green', 'red'])",
        "ScoringError: The answer 'red green' can never be the top token",
    ),
    "g7 nan, top answer": ("scoring.top_answer(nan, tok)", "ScoringError: 1 of 2 rows"),
    "g7 infinite, top answer": ("scoring.top_answer(1 / logits, tok)", "ScoringError: 2 of 2"),
    "g7 nan, matches": (
        "scoring.matches_answer(nan, tok, ['red', 'blue'])",
        "ScoringError: 1 of 2 rows",
    ),
    "g7 nan, probability": (
        "scoring.candidate_probability(nan, tok, ['red', 'blue'])",
        "ScoringError: 1 of 2 rows",
    ),
    "g7 nan, difference": (
        "scoring.logit_difference(nan, tok, ['red', 'blue'], ['blue', 'red'])",
        "ScoringError: 1 of 2 rows",
    ),
    # Integers and NaN in directions.
    "g8 integers, orthonormalise": (
        "directions.orthonormalise(torch.tensor([[2, 1, 0], [0, 1, 0]]))",
        "DataError: orthonormalise was given directions=a tensor of int64",
    ),
    "g8 integers, controls": (
        "directions.random_controls(torch.tensor([[2, 1, 0], [0, 1, 0]]), [0])",
        "DataError: random_controls was given directions=a tensor of int64",
    ),
    "g8 integers, add": (
        "directions.add(torch.ones(3, dtype=torch.long), torch.ones(3), 0.5)",
        "DataError: add was given h=a tensor of int64",
    ),
    "g8 integers, scale": (
        "directions.scale_projections(torch.ones(2, 3, dtype=torch.int), torch.ones(1, 3), 0.5)",
        "DataError: scale_projections was given h=a tensor of int32",
    ),
    "g8 nan, alpha": (
        "directions.add(torch.ones(3), torch.ones(3), float('nan'))",
        "DataError: add was given alpha=nan",
    ),
    "g8 nan, steer": (
        "run(Steer(site, directions=torch.ones(d), alpha=float('nan')))",
        "InterventionError: Steer(alpha=nan)",
    ),
    "g8 nan, steer along": (
        "run(Steer(site, directions=torch.full((d,), float('nan')), alpha=1.0))",
        "InterventionError: Steer(directions=…) has values that are NaN",
    ),
    "g8 a hook without a name": (
        "run((None, lambda a, hook: a))",
        "HookError: The name of a hook is None",
    ),
    "g8 a picture without pixels": (
        "gemma.prepare(Image.new('RGB', (0, 0)), 'x')",
        "DataError: An image of 0x0 px",
    ),
    "g8 a picture without width": (
        "qwen.prepare(Image.new('RGB', (0, 5)), 'x')",
        "DataError: An image of 0x5 px",
    ),
    "g8 a system message without template": (
        "qwen.prepare(image, 'x', system='brief', chat=False)",
        "DataError: system=… was given",
    ),
    "g8 a system message that the template drops": (
        "dropping.prepare(image, 'x', system='brief')",
        "DataError: The model's chat template leaves out the system message",
    ),
    # Pictures.
    "i4 a png cut short": (
        "qwen.prepare(Image.open(folder / 'cut.png'), 'x')",
        "DataError: The image of the file '{folder}/cut.png' cannot be read",
    ),
    "i4 a jpeg cut short": (
        "qwen.prepare(Image.open(folder / 'cut.jpg'), 'x')",
        "DataError: The image of the file '{folder}/cut.jpg' cannot be read",
    ),
    "i4 an aspect ratio of 400": (
        "qwen.prepare(Image.new('RGB', (4000, 10)), 'x')",
        "DataError: The model's processor refuses these inputs: absolute aspect ratio",
    ),
    "i4 a picture of one pixel": (
        "gemma.prepare(Image.new('RGB', (1, 1)), 'x').grid",
        "NoGridError: An image of 1x1 px has no grid here. The image is so small",
    ),
    # Interventions.
    "i4 at text": ("run(Ablate(site, at='last'))", "InterventionError: at='last' is no place"),
    "i4 at a number": ("run(Ablate(site, at=5))", "InterventionError: at=5 is no place"),
    "i4 patch at text": (
        "run(Patch(site, at='last', source=inputs))",
        "InterventionError: at='last' is no place",
    ),
    "i4 source at a number": (
        "run(Patch(site, at=LastToken(), source_at=3, source=inputs))",
        "InterventionError: at=3 is no place",
    ),
    "i4 no source": ("run(Patch(site, source=None))", "InterventionError: A source was given as"),
    "i4 a reference of text": (
        "run(Ablate(site, to='mean', reference='x'))",
        "InterventionError: A source was given as 'x'",
    ),
    "i4 no heads": ("run(Ablate(heads, heads=()))", "InterventionError: heads=() was given"),
    "i4 a list of heads": ("run(Ablate(heads, heads=[0]))", "InterventionError: heads=[0]"),
    "i4 a head": ("run(Ablate(heads, heads=0))", "InterventionError: heads=0 was given"),
    "i4 ablate to a number": ("run(Ablate(site, to=0))", "InterventionError: Ablate(to=0)"),
    "i4 ablate to nothing": ("run(Ablate(site, to=None))", "InterventionError: Ablate(to=None)"),
    "i4 steer along a list": (
        "run(Steer(site, directions=[1.0] * d, alpha=1.0))",
        "InterventionError: Steer(directions=…) was given a list",
    ),
    "i4 steer along three axes": (
        "run(Steer(site, directions=torch.ones(1, 1, d), alpha=1.0))",
        "InterventionError: Steer(directions=…) was given a Tensor of shape (1, 1, 128)",
    ),
    "i4 steer by text": (
        "run(Steer(site, directions=torch.ones(d), alpha='1'))",
        "InterventionError: Steer(alpha='1')",
    ),
    "i4 steer without a mode": (
        "run(Steer(site, directions=torch.ones(d), alpha=1.0, mode=None))",
        "InterventionError: Steer(mode=None)",
    ),
    "i4 no site": ("run(Ablate(None))", "UnknownHookError: A site was given as None"),
    "i4 a site between two": ("run(Ablate(1.5))", "UnknownHookError: A site was given as 1.5"),
    "i4 a function at no site": (
        "run(HookAt(1.5, lambda a, hook: a))",
        "UnknownHookError: A site was given as 1.5",
    ),
    "i4 a slot of numpy": ("run(Ablate(np.int64(1)))", "no error"),
    # Runs.
    "i4 stop at text": (
        "qwen.run_with_cache(inputs, stop_at_layer='a')",
        "UnknownHookError: stop_at_layer='a'",
    ),
    "i4 stop between two": (
        "qwen.run_with_cache(inputs, stop_at_layer=1.5)",
        "UnknownHookError: stop_at_layer=1.5",
    ),
    "i4 hooks of none": (
        "qwen.run_with_hooks(inputs, None)",
        "HookError: fwd_hooks=None was given",
    ),
    "i4 one hook": ("qwen.run_with_hooks(inputs, Ablate(site))", "HookError: fwd_hooks=Ablate("),
    "i4 no text": ("qwen.prepare(image, None)", "DataError: prepare was given texts=None"),
    "i4 a number as text": ("qwen.prepare(image, [3])", "DataError: prepare was given texts=[3]"),
    "i4 a metric of none": (
        "Sweep(inputs, {'slot': [0]}, lambda slot: Ablate(slot)).run(qwen, None)",
        "InterventionError: metric=None was given",
    ),
    "i4 a sweep without make": (
        "Sweep(inputs, {'slot': [0]}, None).run(qwen, lambda logits: logits[:, -1, 0])",
        "InterventionError: Sweep(inputs, axes, make) was given",
    ),
    "i4 a sweep without inputs": (
        "Sweep(None, {'slot': [0]}, lambda slot: Ablate(slot)).run(qwen, lambda logits: logits)",
        "InterventionError: Sweep(inputs, axes, make) was given",
    ),
    "i4 a sweep without axes": (
        "Sweep(inputs, None, lambda: Ablate(site)).run(qwen, lambda logits: logits[:, -1, 0])",
        "InterventionError: A sweep needs named axes",
    ),
    "i4 a number as filter": (
        "qwen.run_with_cache(inputs, 3)",
        "UnknownHookError: The names_filter is 3",
    ),
    "i4 none in a filter": (
        "qwen.run_with_cache(inputs, [None])",
        "UnknownHookError: The names_filter is [None]",
    ),
    "i4 a number as hook name": (
        "run((3, lambda a, hook: a))",
        "UnknownHookError: The names_filter is 3",
    ),
    "i4 a number in a cache": ("ActivationCache({})[3]", "UnknownHookError: cache[3]"),
    "i4 four parts in a cache": (
        "ActivationCache({})['q', 0, None, 1]",
        "UnknownHookError: cache[('q', 0, None, 1)]",
    ),
    "i4 text as position": ("Positions(('a',))", "RegionError: Positions(('a',)) was given"),
    "i4 a number as positions": ("Positions(3)", "RegionError: Positions(3) was given"),
    "i4 half a position": ("Positions((1.5,))", "RegionError: Positions((1.5,)) was given"),
    "i4 a number as span": ("Span(3)", "RegionError: Span(3) was given"),
    "i4 half a column": ("Region.column_band((4, 4), 0.5, 2)", "RegionError: A region was given"),
    "i4 a chain of none": ("Chain(None)", "InterventionError: Chain was given None"),
    "i4 ablate to a matrix": (
        "run(Ablate(site, to=torch.zeros(3, d)))",
        "InterventionError: Ablate(to=…) was given a tensor of shape (3, 128)",
    ),
    "g8 ablate to nan": (
        "run(Ablate(site, to=torch.full((d,), float('nan'))))",
        "InterventionError: Ablate(to=…) has values that are NaN",
    ),
    "i4 steer along nothing": (
        "run(Steer(site, directions=torch.ones(0, d), alpha=1, mode='project'))",
        "InterventionError: Steer(directions=…) was given a Tensor of shape (0, 128)",
    ),
    "g7 logits of every position": (
        "scoring.top_answer(logits[None], tok)",
        "ScoringError: Logits of shape (1, 2, ",
    ),
    "g7 logits of integers": (
        "scoring.candidate_probability(logits.long(), tok, ['red', 'blue'])",
        "ScoringError: Logits were given as a Tensor of torch.int64",
    ),
    "i4 a list as logits": (
        "scoring.candidate_probability([[1.0]], tok, ['red'])",
        "ScoringError: Logits were given as a list",
    ),
    "i4 statistics of text": (
        "statistics.bootstrap(['a', 'b'])",
        "DataError: Statistics over pairs need an array of numbers",
    ),
    "i4 a setting of none": ("stimulus_set(None)", "DataError: There is no setting None"),
    "i4 tokens without pixels": ("geometry_for(12, token_px=0)", "DataError: token_px=0"),
    "i4 a folder as text": ("load_cutouts('x')", "DataError: There are no <name>.png files"),
    # Files and loading.
    "i4 a model without a name": (
        "HookedVLM.from_pretrained(None)",
        "UnsupportedModelError: The model's name is None",
    ),
    "i4 an unknown attention": (
        "HookedVLM.from_pretrained('tiny-qwen2-vl', attn_implementation='fast')",
        "UnsupportedModelError: Could not load 'tiny-qwen2-vl': transformers reports",
    ),
    "i4 an unknown option": (
        "HookedVLM.from_pretrained('tiny-qwen2-vl', nonsense=3)",
        "UnsupportedModelError: Could not load 'tiny-qwen2-vl': transformers reports",
    ),
    "i4 an unknown dtype": (
        "HookedVLM.from_pretrained('tiny-qwen2-vl', dtype='float31')",
        "UnsupportedModelError: dtype='float31' was given",
    ),
    "i4 an unknown device": (
        "HookedVLM.from_pretrained('tiny-qwen2-vl', device='gpu')",
        "UnsupportedModelError: from_pretrained was given device='gpu'",
    ),
    "i4 no name": ("HookedVLM.from_pretrained('')", "UnsupportedModelError: The model's name is"),
    "i4 a sparse tensor": (
        "directions.add(torch.ones(3), torch.ones(3).to_sparse(), 0.5)",
        "DataError: add was given w=a sparse tensor of float32",
    ),
    "i4 a tensor on meta": (
        "directions.orthonormalise(torch.ones(2, 3, device='meta'))",
        "DataError: orthonormalise was given directions=a meta tensor of float32",
    ),
    "i4 a fraction": (
        "directions.add(torch.ones(3), torch.ones(3), __import__('fractions').Fraction(1, 3))",
        "DataError: add was given alpha=",
    ),
    "i4 a number of a hundred bits": (
        "qwen.run_with_cache(inputs, site)[1].select([2**100])",
        "DataError: select was given rows=[1267650600228229401496703205376]",
    ),
    "i4 no direction": (
        "directions.orthonormalise(torch.ones(0, 3))",
        "DataError: There is no direction in a tensor of shape (0, 3)",
    ),
    "i4 controls of no direction": (
        "directions.random_controls(torch.ones(0, 3), [0])",
        "DataError: There is no direction in a tensor of shape (0, 3)",
    ),
    "i4 a seed of numpy": (
        "directions.random_controls(torch.ones(1, 3), np.arange(2))",
        "no error",
    ),
    "i4 a split's seed of numpy": ("split_by_image(9, seed=np.int64(3))", "no error"),
    "i4 a sample's seed of numpy": ("sample_tuples(list('abcd'), 3, 2, np.int64(3))", "no error"),
    "i4 half a character": (
        "scoring.answer_ids(tok, 'a\\ud800')",
        "ScoringError: The answer 'a\\ud800' cannot be scored",
    ),
    "i4 sparse logits": (
        "scoring.top_answer(logits.to_sparse(), tok)",
        "ScoringError: Logits were given as a sparse tensor",
    ),
    "i4 logits on meta": (
        "scoring.top_answer(logits.to('meta'), tok)",
        "ScoringError: Logits were given as a meta tensor",
    ),
    "i4 features on meta": (
        "LinearProbe(n_steps=1).fit(torch.ones(4, 2, device='meta'), [0, 1, 0, 1])",
        "DataError: The probe was given a meta tensor of float32",
    ),
    "i4 an axis that make does not take": (
        "Sweep(inputs, {'slto': [0, 1]}, lambda slot: Ablate(slot)).plan(qwen)",
        "InterventionError: make cannot be called with the axes slto",
    ),
    "i4 text in the clean cache": (
        "get_act_patch_resid_pre(qwen, inputs, dict.fromkeys(qwen.hook_names, 'x'), lambda x: x)",
        "InterventionError: blocks.0.hook_resid_pre is 'x' in the clean cache",
    ),
    "i3 a text of 20000 characters": (
        "stimulus_set('squares' * 3000)",
        "DataError: There is no setting 'squaressquares",
    ),
    "i4 a cache of other tensors": (
        "ActivationCache.load(folder / 'plain.safetensors')",
        "DataError: '{folder}/plain.safetensors' is not a file of ActivationCache.save",
    ),
    "i4 a damaged cache": (
        "ActivationCache.load(folder / 'cut.png')",
        "DataError: '{folder}/cut.png' is not a file of ActivationCache.save",
    ),
    "i4 no cache": (
        "ActivationCache.load(folder / 'none.safetensors')",
        "DataError: '{folder}/none.safetensors' is not a file of ActivationCache.save",
    ),
    "g7 an empty tensor of candidates": (
        "scoring.matches_answer(logits, tok, ['red', 'blue'], candidates=torch.zeros(0))",
        "ScoringError: The answer 'red' is none of the candidates",
    ),
    "g8 bools as p-values": (
        "statistics.holm([True, False])",
        "DataError: holm was given p_values=[True, False]; expected numbers from 0 to 1",
    ),
    "g8 a bool as a p-value": ("statistics.holm(True)", "DataError: holm was given p_values=True"),
    "i4 a cache in no file": (
        "qwen.run_with_cache(inputs)[1].save('')",
        "DataError: save was given path=''; expected the path of a file",
    ),
    "i4 a cache in a file of blanks": (
        "qwen.run_with_cache(inputs)[1].save('  ')",
        "DataError: save was given path='  '; expected the path of a file",
    ),
    "i4 a cache in a folder": (
        "qwen.run_with_cache(inputs)[1].save(Path('.'))",
        "DataError: The cache cannot be written to '.'",
    ),
    "i4 a cache of no file": (
        "ActivationCache.load('')",
        "DataError: load was given path=''; expected the path of a file",
    ),
    "i4 backgrounds without a name": (
        "stimulus_set('squares-photos', backgrounds='')",
        "DataError: stimulus_set was given backgrounds=''; expected a path (a text that is not",
    ),
    "i4 a site without a name": (
        "get_act_name(' ', 3)",
        "UnknownHookError: get_act_name was given name=' '; expected a text that is not empty",
    ),
    "i4 an axis without a name": (
        "Sweep(inputs, {'slot': [0, 1]}, lambda slot: Ablate(slot)).run(qwen, len, dims=[''])",
        "InterventionError: run was given dims=['']; expected a sequence of",
    ),
    "i4 an object without a name": (
        "squares_prompt('left', '')",
        "DataError: squares_prompt was given reference=''; expected a text that is not empty",
    ),
    "i4 a job without a folder": (
        "job.check(job.Job('behaviour', 'tiny-gemma-3', ''))",
        "DataError: out='' was given; expected a pathlib.Path of a folder.",
    ),
    "i4 a configuration with a folder without a name": (
        "Config(cutouts='')",
        "DataError: --cutouts must be a pathlib.Path or None (got '').",
    ),
    "i5 nan directions are not zero": (
        "directions.scale_projections(torch.ones(2, 3), torch.full((1, 3), float('nan')), 1.0)",
        "DataError: 1 of 1 directions have values that are NaN or infinite",
    ),
    "i5 nan directions, controls": (
        "directions.random_controls(torch.full((1, 3), float('nan')), [0])",
        "DataError: 1 of 1 directions have values that are NaN or infinite",
    ),
}

SCRIPT = """
import copy, json, sys, warnings
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from hooked_vlm import Ablate, Chain, HookedVLM, LastToken, Patch, Region, Span, Steer, Sweep
from hooked_vlm import get_act_name
from hooked_vlm.analysis import directions, scoring, statistics
from hooked_vlm.analysis.probes import LinearProbe, split_by_image
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.experiments.options import Config
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.interventions.hook_at import HookAt
from hooked_vlm.regions.positions import Positions
from hooked_vlm.report import job
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.objects import load_cutouts
from hooked_vlm.stimuli.pairs import sample_tuples
from hooked_vlm.stimuli.prompts import squares_prompt
from hooked_vlm.stimuli.settings import stimulus_set
from hooked_vlm.sweeps.transformer_lens import get_act_patch_resid_pre

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
for name in ("cut.png", "cut.jpg"):
    Image.fromarray(noise).save(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:1500])
save_file({"a": torch.zeros(2)}, folder / "plain.safetensors", {"format": "pt"})
qwen, gemma = (HookedVLM.from_pretrained(n) for n in ("tiny-qwen2-vl", "tiny-gemma-3"))
dropping = HookedVLM(qwen.hf_model, copy.deepcopy(qwen.processor))
dropping.processor.chat_template = "{{ messages[-1]['content'][-1]['text'] }}"
image = Image.new("RGB", (96, 96))
inputs, tok, d = qwen.prepare(image, "x"), qwen.tokenizer, qwen.cfg.d_model
site, heads = "blocks.0.hook_resid_post", "blocks.0.attn.hook_z"
logits = torch.zeros(2, len(tok))
nan = logits.clone()
nan[0, 3] = float("nan")


def run(hook):
    return qwen.run_with_hooks(inputs, [hook])


said = {}
for code in json.loads(sys.stdin.read()):
    try:
        eval(code)
        said[code] = "no error"
    except HookedVLMError as error:
        said[code] = f"{type(error).__name__}: {error}"
    except Exception as error:
        said[code] = f"raw {type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("files")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        input=json.dumps([code for code, _ in CASES.values()]),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder


@pytest.mark.parametrize("name", CASES)
def test_g7_g8_i4_i5_a_wrong_argument(said: tuple[dict[str, str], Path], name: str) -> None:
    answers, folder = said
    code, expected = CASES[name]
    answer = answers[code]
    assert answer.startswith(expected.replace("{folder}", str(folder)))
    assert len(answer) <= 400
