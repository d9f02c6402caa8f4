"""Daily jobs of interpretability, each written in plain torch, with this package, and with others.

A module for each tool has one function for each of `JOBS`, of the same name.  It takes a `World`
and returns tensors, which are compared with those of `plain`.
"""

JOBS = {
    "residual_stream": "residual stream after a layer",
    "patch_last_token": "last token patched from another picture",
    "sweep_last_token": "the same, at every layer",
    "patch_box": "a box of the image patched",
    "ablate_head": "one head ablated",
    "logit_lens": "logit lens, last position, every layer",
    "logits_by_part": "logit difference by embedding, attention and MLP of each layer",
    "logits_by_head": "logit difference by head, every layer",
    "attention_map": "attention of the last token as maps of the image",
    "knockout": "attention of the last token on the image blocked in three layers",
    "gradient": "gradient of a logit at a layer",
    "integrated_gradients": "integrated gradients at a layer, from another picture",
    "steer_generated": "steering of generated tokens",
    "generation_activations": "activations of prompt and answer, with positions",
    "loss": "next-token loss over the text",
    "features": "last token's activations of many pictures, to disk in batches",
}
"""What each job computes, by the name of its function."""


class Cannot(Exception):  # noqa: N818 - an answer, as in `benchmarks.throughput.tasks`
    """A tool has no way to do a job; the message is the reason, in a few words."""
