"""Sweeps in one pass: a batch that grows where cells begin to differ from the clean run.

The clean run is made once, and its residual stream kept where cells start.  A second pass
through the wrapped model's own blocks carries every cell as rows of one batch: a cell's rows
join before the first block that it changes, and carry only the positions from the first
changed one on, with the clean run's keys and values before theirs.  Prompts that begin with the
same image go in one row: `[image | question 1 | question 2 | …]`.
"""

from hooked_vlm.engine.folded_run import separate_prompts as separate_prompts
from hooked_vlm.engine.shared import shared_runs as shared_runs
