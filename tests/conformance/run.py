"""Runs the conformance suite and prints its table: `make conformance`.

    python tests/conformance/run.py [MODEL_TYPE ...] [--workers 2] [--write docs/measured/conformance.md]

Without names, every architecture of the installed transformers is tried.
"""

import argparse
import os
import platform
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers

from conformance.exceptions import EXCEPT
from conformance.suite import LAWS, Row, check
from conformance.tiny import architectures
from conformance.tiny_table import OTHER_TOWERS
from hooked_vlm.checks.laws import NO, NONE, YES


MARKS = {YES: "✓", NO: "✗", NONE: "–", "": " "}


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _end(number: int, _: object) -> None:
    """Ends the workers too, which would otherwise wait for work after this process is gone."""
    for worker in active_children():
        worker.terminate()
    os._exit(128 + number)


def run(names: list[str], workers: int) -> list[Row]:
    """Returns a row for each architecture, in the order of the names, with progress."""
    rows, start = {}, time.perf_counter()
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_prepare_worker
    ) as pool:
        futures = {pool.submit(check, name): name for name in names}
        for done, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            rows[row.model_type] = row
            spent = time.perf_counter() - start
            left = spent / done * (len(names) - done)
            word = "served" if row.served else ((row.reason and "not served") or "FAILS")
            print(
                f"[{done}/{len(names)}, about {left:.0f} s left] {row.model_type}: {word}",
                file=sys.stderr,
            )
    return [rows[name] for name in names]


def mark(row: Row, law: str) -> str:
    """Returns a cell of the table; `†` is a law that is broken for a reason that is known."""
    finding = row.findings.get(law)
    if finding is None:
        return " "
    if finding.verdict == NO and (row.model_type, law) in EXCEPT:
        return "†"
    return MARKS[finding.verdict]


def table(rows: list[Row]) -> str:
    """Returns the table in Markdown: architectures down, laws across."""
    lines = [
        "| architecture | " + " | ".join(LAWS) + " |",
        "|---|" + ":-:|" * len(LAWS),
    ]
    for row in rows:
        if not row.reason:
            cells = " | ".join(mark(row, law) for law in LAWS)
            lines.append(f"| `{row.model_type}` | {cells} |")
    return "\n".join(lines)


def notes(rows: list[Row]) -> str:
    """Returns the reasons of the marks: exceptions, what does not apply, what fails."""
    lines = []
    for row in rows:
        for law, finding in row.findings.items():
            reason = EXCEPT.get((row.model_type, law))
            if finding.verdict == NO:
                why = f"† {reason}" if reason else f"✗ {finding.note}"
                lines.append(f"- `{row.model_type}`, {law}: {why}")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Returns how many architectures are served, in a sentence."""
    served = [row for row in rows if row.served]
    apart = [row for row in rows if row.reason]
    failing = [row for row in rows if not row.served and not row.reason]
    text = f"{len(served)} of {len(rows)} architectures are served"
    if apart:
        text += f", {len(apart)} are none of the kind or could not be tried"
    if failing:
        text += f", {len(failing)} break a law: " + ", ".join(row.model_type for row in failing)
    return text + "."


def page(rows: list[Row], seconds: float) -> str:
    """Returns the page of the documentation."""
    where = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    apart = "\n".join(f"- `{row.model_type}`: {row.reason}" for row in rows if row.reason)
    grids = sorted(
        {
            f"- {finding.note.split(' has no grid here. ')[-1].split(' (')[0]} "
            for row in rows
            if (finding := row.findings.get("grid")) and finding.verdict == NONE
        }
    )
    ungridded = {
        line: [
            f"`{row.model_type}`"
            for row in rows
            if (f := row.findings.get("grid")) and f.verdict == NONE and line[2:].strip() in f.note
        ]
        for line in grids
    }
    no_grid = "\n".join(f"{line.strip()} ({', '.join(who)})" for line, who in ungridded.items())
    return "\n\n".join(
        [
            "# Conformance",
            "Generated by `make conformance`; edit nothing here. Every architecture that "
            "transformers lists for images and text is built small, with random weights and its "
            "own processor, wrapped, and held to the laws below. Real checkpoints were not run. "
            f"Of {', '.join(f'`{name}`' for name in OTHER_TOWERS)} the tower is one of "
            "transformers' in the place of the timm package's.",
            f"**{summary(rows)}** Made with {where}, in {seconds / 60:.0f} minutes.",
            "✓ holds · † does not, for the reason given below · – does not apply · ✗ fails",
            table(rows),
            "## Reasons",
            notes(rows) or "Every law holds wherever it applies.",
            "## Images without a grid",
            "Their visual tokens have no place in the image, or none that can be found; sites "
            "work as in the others, regions do not, and `inputs.grid` says why.\n\n" + no_grid,
            "## Not served",
            apart or "None.",
            "## The laws",
            LEGEND,
        ]
    )


LEGEND = """\
| law | what is checked, on inputs from the architecture's own processor |
|---|---|
| wraps | an image encoder, a decoder and a vocabulary projection are found in the module tree |
| parity | logits bit-identical to transformers', with no hook and with every site read (but scores and patterns) |
| fires | every name in `hook_dict` fires on a prompt with an image |
| embeddings … projector | each site of the group: writing back what was read changes no bit; a write changes the logits, or is refused |
| residual | `pre + attn_out == mid`, `mid + mlp_out == post`, `post` is the next block's `pre`, or what is added has a site; one factor for each feature is allowed (layer scale, residual multipliers) |
| decomposition | the parts of `cache.decompose_resid` sum to the residual stream, before a middle layer and after the last, or an error says why they cannot |
| patterns | rows sum to one (less with attention sinks); reading them leaves the logits; zeroing a key equals masking its score |
| grid | every cell's patches and projected rows reach the position of the prompt that the grid says, measured by gradients with attention between patches off |
| pixels | changing the pixels of one cell changes most what its own visual token is made of |
| wide image | parity, grid and pixels again for a picture twice as wide as high, which many cut into tiles |
| generate | greedy generation under hooks equals transformers', with and without the key-value cache |
| steered answer | edits of the prompt (of its last token, of an image, of a slot) give one answer with a cache, without one and with caches off by configuration, and it begins with what a forward pass gives |
| chunks | functions act on every chunk of a text prompt that is computed in chunks; interventions, whose places need the whole prompt, are refused |
| start layer | running from a layer with its own residual stream gives the full run's logits |
| lens | the logit lens at the last slot gives the run's logits, and in the middle what `run_from_layer` gives |
| attribution | what parts, heads and neurons add to a difference of logits sums to it, or an error says why it cannot |
| attend | knocking out the image for the last token, in scores and in patterns of all layers, equals a hand-written hook and changes the logits; a factor of 1 and the run's own pattern change nothing; in the encoder likewise |
| append | an answer appended to its prompt has the logits of the steps of its generation, and a cache cut to it their activations |
| on request | heads' results sum to the output of attention's last map, scales are what norms divide by, and writes to the input of a part reach that part alone |
| sweep | patches from another image at slots, merged embeddings, encoder blocks and after them: the growing batch, or what is taken in its place, gives the logits of plain hooked passes, within 5e-5 of the largest |
| padding | prompts of different lengths in one batch give what each gives alone |
| images | two images in a prompt, one image in two prompts, an image in one prompt of two, no image: parity and grids hold in each that the processor and transformers take |
| own output | what the architecture's own processor gives, without `prepare`: the same logits, and the same grids or none, or a refusal |
| videos | a prompt with a video and no image, for models that pack patches: parity, and interventions on positions act |
| 4-D mask | with a mask `[batch 1 query key]` that says the same, functions and interventions act as with the usual one |
| gradients | what a function adds at a site gets its gradient from the logits, and asking for it moves none |
| backward | `run_with_cache(incl_bwd=True)` gives at every writable site the gradient of a zero that a hook function adds there |
| mixed batch | of a batch in which one prompt has an image and one has none, each row gives what its prompt gives alone, also under an intervention |
| bf16 | parity, reading and writing in bfloat16 |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; all of them without")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", type=Path, help="write the page of the documentation here")
    arguments = parser.parse_args()
    known = architectures()
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, _end)
    start = time.perf_counter()
    rows = run(arguments.names or known, arguments.workers)
    print(table(rows), notes(rows), summary(rows), sep="\n\n")
    if arguments.write:
        arguments.write.write_text(page(rows, time.perf_counter() - start) + "\n")
    sys.exit(any(not row.served and not row.reason for row in rows))


if __name__ == "__main__":
    main()
