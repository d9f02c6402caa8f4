"""The page of the documentation, from what was found."""

from typing import Any

from benchmarks.jobs import JOBS
from benchmarks.jobs.tools import TOLERANCE
from benchmarks.jobs.world import MODELS, WINDOW


NAMES = {
    "plain": "torch",
    "ours": "hooked_vlm",
    "transformer-lens": "TransformerLens",
    "nnsight": "nnsight",
}
MODEL_NAMES = {"tiny-gemma-3": "Gemma 3", "tiny-qwen2-vl": "Qwen2-VL"}
COMMAND = "python -m benchmarks.jobs"
TOP = f"""# Daily jobs

This page compares the number of lines that {len(JOBS)} daily jobs take, and whether their values \
are right. Each job is one function of the same name in each file of `benchmarks/jobs`: `plain.py` \
(torch and transformers alone), `ours.py`, `lens.py` (TransformerLens) and `tracing.py` (nnsight).

```sh
{COMMAND:<61}  # hooked_vlm beside plain torch
python -m benchmarks.throughput.environment --at .venv-rivals  # once, for the other tools
.venv-rivals/bin/{{command}}
```

The last command wrote this page.

**Setup.** {{versions}}. CPU, float32, eager attention. The models are the shipped `tiny-gemma-3` \
and `tiny-qwen2-vl` with noise added to every gain of a norm, since an error in gains near 1 would \
not show. Gemma's sliding window is {WINDOW} tokens, so that a part of the image is out of sight \
in the layers that have one.

**Lines** are those of a function's body as the formatter writes them (100 columns), without blank \
lines and comments. Not counted, for any tool: imports, loading the model, preparing inputs (as a \
mapping, and for TransformerLens split into ids and the rest), and the positions of visual tokens \
and of a box of the image, which all tools are given. TransformerLens and nnsight have no function \
for a box; here it is `inputs.grid.box(…)`.

**Values** are compared with those of `plain.py`. The number is the largest difference divided by \
the largest value; at most {TOLERANCE:g} is right. A wrong value is given with its difference and \
the largest value.
"""
BOTTOM = """
## Notes

- **By head.** Gemma 3 has a norm after attention. TransformerLens's heads are what the \
output projection gives: they sum to the norm's input, and not to `attn_out`. Its cache has the \
norm's input and output, from which users can compute the factor. The other columns have this \
factor, at the run's own scale.
- **By part.** `enable_compatibility_mode` folds the gain of the final norm into the unembedding, \
and changes the bridge's weights. Without it, `logit_attrs` of TransformerLens leaves the gain \
out; `direct_logit_attribution` raises an error.
- **Analyses by hand.** nnsight has traces and gradients in them, but no functions for the logit \
lens, attribution of logits, integrated gradients or maps. Its functions here are torch inside \
traces. They name modules, and depend on what comes after attention and MLP in Gemma and on tuples \
that modules return, so they are correct for these two architectures. The functions of hooked_vlm \
and of TransformerLens name no modules.
- **Sweeps.** The functions of TransformerLens and nnsight run the model once for each layer. Here \
all layers run in one batch ([Throughput](throughput.md)).
- **Features.** The loops of the other columns have no resumption, no check of the model and the \
items, and no handling of items that cannot be read ([Features of data sets](../guide/datasets.md)).
- **Generations.** TransformerLens's `generate(return_cache=True)` raises an error for images. The \
functions for torch, TransformerLens and nnsight collect what hooks see, and number it from 0: \
this is correct for one prompt without beams, with a key-value cache.
- **Edits.** An edit in a hook or a trace is one assignment; the other lines record the source and \
attach the hook. `Patch`, `Ablate` and `Attend` compare sizes, grids and names before the model \
runs; the assignments do not.
"""


def page(found: dict[str, Any]) -> str:
    """Returns the page for what `benchmarks.jobs` found."""
    tools, verdicts = found["tools"], found["verdicts"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    top = TOP.replace("{versions}", versions).replace("{command}", command(tools))
    parts = [top, *refusals(tools, verdicts), table(found), *shorter(found), BOTTOM.lstrip("\n")]
    return "\n".join(parts)


def command(tools: list[str]) -> str:
    """Returns the command that wrote a page of some tools."""
    return f"{COMMAND} --tools {','.join(tools)} --write docs/measured/jobs.md"


def refusals(tools: list[str], verdicts: dict[str, Any]) -> list[str]:
    """Returns a sentence for each model that a tool does not take."""
    found = []
    for tool in tools:
        for model in MODELS:
            first = verdicts[model][tool]["residual_stream"]
            if first["kind"] == "refused":
                name = f"{NAMES[tool]} does not take {MODEL_NAMES[model]}"
                found.append(f'**Refused.** {name}: "{first["why"]}".\n')
    return found


def columns(tool: str, verdicts: dict[str, Any]) -> dict[str, list[str]]:
    """Returns a tool's columns of values, and the models of each: one where they agree."""
    taken = [m for m in MODELS if verdicts[m][tool]["residual_stream"]["kind"] != "refused"]
    kinds = [[verdicts[model][tool][job]["kind"] for job in JOBS] for model in taken]
    if len(taken) > 1 and all(kind == kinds[0] for kind in kinds):
        return {"value": taken}
    return {MODEL_NAMES[model]: [model] for model in taken}


def table(found: dict[str, Any]) -> str:
    """Returns the table, with the sums of the lines."""
    lines, verdicts = found["lines"], found["verdicts"]
    head, rule = ["job", "torch: lines"], ["---", "---:"]
    shown = {tool: columns(tool, verdicts) for tool in found["tools"]}
    for tool, models in shown.items():
        head += [f"{NAMES[tool]}: lines", *models]
        rule += ["---:", *["---"] * len(models)]
    rows = []
    for job, title in JOBS.items():
        row = [title, str(lines["plain"][job])]
        for tool, models in shown.items():
            row.append(str(lines[tool][job]))
            row += [cell([verdicts[m][tool][job] for m in group]) for group in models.values()]
        rows.append(row)
    total = ["all", str(sum(lines["plain"].values()))]
    for tool, models in shown.items():
        total += [str(sum(lines[tool].values())), *[""] * len(models)]
    start = f"| {' | '.join(head)} |\n|{'|'.join(rule)}|\n"
    return start + "".join(f"| {' | '.join(row)} |\n" for row in [*rows, total])


def cell(verdicts: list[dict[str, Any]]) -> str:
    """Returns the worst of some verdicts in words.

    >>> cell([{"kind": "right", "difference": 1e-6, "of": 2.0}])
    'right (5e-07)'
    """
    if "why" in verdicts[0]:
        return f"{verdicts[0]['kind']}: {verdicts[0]['why']}"
    worst = max(verdicts, key=lambda v: v["difference"] / max(v["of"], 1e-30))
    if worst["kind"] == "right":
        relative = worst["difference"] / max(worst["of"], 1e-30)
        return "right (0)" if not relative else f"right ({relative:.0e})"
    return f"**wrong** ({worst['difference']:.2g} of {worst['of']:.2g})"


def shorter(found: dict[str, Any]) -> list[str]:
    """Returns sentences on where others need no more lines than ours; none where they do."""
    sentences, lines = [], found["lines"]
    for words, holds in (("fewer lines than", int.__lt__), ("as many lines as", int.__eq__)):
        for tool in ("plain", *(t for t in found["tools"] if t != "ours")):
            named = [
                f"{title.replace(',', '')} ({lines[tool][job]} and {lines['ours'][job]})"
                for job, title in JOBS.items()
                if holds(lines[tool][job], lines["ours"][job])
            ]
            if named:
                start = f"{NAMES[tool]} needs {words} hooked_vlm in {len(named)} of the jobs"
                sentences.append(f"{start}: {', '.join(named)}.\n")
    return sentences
