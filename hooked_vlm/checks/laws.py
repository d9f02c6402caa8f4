"""Checks that every wrapped model must pass; each runs the model.

Each check takes a `HookedVLM` and inputs and returns a `Finding`.  The checks verify that a
write at a site changes the logits or raises, that writing back a value that was read changes
nothing, that the parts of a block sum to its residual stream, and that the rows of a pattern
sum to one.  `hooked-vlm check MODEL` runs them on a user's model, and the conformance suite
on every architecture in transformers.  No check trains or changes weights.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from hooked_vlm.anatomy.source import forward_source
from hooked_vlm.checks.residual import BlockSums, same
from hooked_vlm.errors import GridError, HookedVLMWarning, HookError, counted
from hooked_vlm.hooks.names import PROJECTOR, VISION, count_layers, site_path
from hooked_vlm.hooks.patch_order import each, listed
from hooked_vlm.hooks.stand_ins import uncached
from hooked_vlm.inputs.pixel_routing import Routes, measure_routes
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region


Inputs = Mapping[str, Any]
Verdict = Literal["yes", "no", "n/a"]
YES: Final = "yes"
NO: Final = "no"
NONE: Final = "n/a"


@dataclass(frozen=True)
class Finding:
    """The result of one check on one model."""

    law: str
    verdict: Verdict
    """`"yes"`, `"no"`, or `"n/a"` where the check does not apply to the model."""
    note: str = ""


def finding(law: str, problems: Sequence[str], found: bool = True, note: str = "") -> Finding:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Finding(law, NO, f"{problems[0]}{more}")
    return Finding(law, YES if found else NONE, note)


@contextmanager
def quiet() -> Iterator[None]:
    """Runs without gradients, and without the warning that patterns use eager attention."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores or patterns", HookedVLMWarning)
        yield


SITE_GROUPS: dict[str, tuple[str, ...]] = {
    "embeddings": ("hook_embed", "hook_merged_embed", "ln_final.*", "hook_logits"),
    "LM residual": ("blocks.*.hook_resid_*", "blocks.*.ln?.hook_normalized"),
    "LM attention": ("blocks.*attn*",),
    "LM MLP": ("blocks.*.mlp.*", "blocks.*.hook_mlp_out"),
    "vision embeddings": (f"{VISION}.hook_*embed",),
    "vision residual": (f"{VISION}.blocks.*.hook_resid_*", f"{VISION}.blocks.*.ln?.*"),
    "vision attention": (f"{VISION}.blocks.*attn*",),
    "vision MLP": (f"{VISION}.blocks.*.mlp.*", f"{VISION}.blocks.*.hook_mlp_out"),
    "projector": (f"{VISION}.hook_out", f"{PROJECTOR}.*"),
}
"""Groups of sites, by patterns of their names; each is a column of the conformance table."""


def group_of(model: HookedVLM, group: str) -> list[str]:
    """Returns the names of a model's sites that belong to a group."""
    patterns = SITE_GROUPS[group]
    return [n for n in model.hook_names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def writing(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Returns a hook function that applies `function` to a tensor or to each tensor of a list."""
    return lambda value, hook: each(function, value)


def perturbed(tensor: Tensor) -> Tensor:
    """Returns a tensor that differs from the given one in every value, by about half of it."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    scale = tensor.float().clamp(-1e3, 1e3).std(correction=0).clamp(min=0.1)
    return (tensor.float() * 1.5 + scale * noise.to(tensor.device)).to(tensor.dtype)


def check_parity(model: HookedVLM, inputs: Inputs) -> Finding:
    """Verifies that logits without hooks, and with reading hooks, equal transformers' logits."""
    with quiet():
        base = model.hf_model(**inputs).logits
        problems = [] if torch.equal(model(inputs), base) else ["forward changes the logits"]
        fused = [n for n in model.hook_names if not n.endswith(("hook_pattern", "attn_scores"))]
        logits, _ = model.run_with_cache(inputs, fused)
        if not torch.equal(logits, base):
            problems.append(f"reading moves logits by {_gap(logits, base):.1e}")
    return finding("parity", problems)


def check_fires(model: HookedVLM, inputs: Inputs) -> Finding:
    """Verifies that every name in `hook_dict` fires on a run with an image."""
    ran: dict[str, int] = {}

    def note(_value: Any, hook: Any) -> None:
        ran[hook.name] = ran.get(hook.name, 0) + 1

    with quiet():
        warnings.filterwarnings("ignore", ".*never ran.*", HookedVLMWarning)
        model.run_with_hooks(inputs, [("*", note)])
    dead = [f"{name} never fires" for name in model.hook_names if name not in ran]
    return finding("fires", dead)


def check_sites(
    model: HookedVLM, inputs: Inputs, group: str, names: Sequence[str] | None = None
) -> Finding:
    """Verifies for each site of a group that a write changes the logits or raises.

    Writing back the value that was read must not change the logits.  `names` are the sites to
    check, by default all of the group.
    """
    names = group_of(model, group) if names is None else names
    problems = []
    with quiet():
        for name in names:
            problems += check_site(model, inputs, name)
    return finding(group, problems, bool(names))


def check_site(model: HookedVLM, inputs: Inputs, name: str) -> Iterator[str]:
    """Yields the problems of one site."""
    warnings.filterwarnings("ignore", ".*never ran.*", HookedVLMWarning)
    try:
        base = model.run_with_hooks(inputs, [(name, lambda _value, hook: None)])
        if model.sites[name].read_only:
            yield from _refuses(model, inputs, name)
            return
        same = model.run_with_hooks(inputs, [(name, writing(torch.clone))])
        if not torch.equal(same, base):
            yield f"{name}: writing back what was read moves logits by {_gap(same, base):.1e}"
        changed = model.run_with_hooks(inputs, [(name, writing(perturbed))])
    except Exception as error:  # noqa: BLE001 - any error of the model is the finding
        yield f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return
    if torch.equal(changed, base):
        yield f"{name}: a write changes nothing"
    elif not changed.isfinite().any():
        yield f"{name}: a write makes every logit NaN"


def _refuses(model: HookedVLM, inputs: Inputs, name: str) -> Iterator[str]:
    try:
        model.run_with_hooks(inputs, [(name, writing(perturbed))])
    except HookError:
        return
    yield f"{name}: is read-only, and a write was not refused"


def check_residual(model: HookedVLM, inputs: Inputs) -> Finding:
    """Verifies the sums of the residual stream.

    In each block `pre + attn_out == mid` and `mid + mlp_out == post`, and `post` equals the
    next block's `pre`.  The note names models that scale the parts before adding them, or add
    something between two blocks.
    """
    problems, notes = [], set()
    with quiet():
        cache = dict(model.run_with_cache(inputs, "*blocks.*.hook_*")[1].items())
        for prefix, stack in (("", model.anatomy.lm), (f"{VISION}.", model.anatomy.vision)):
            if stack is not None and any(block.post_norm for block in stack.blocks):
                notes.add("the residual is normalised after each addition")
                continue
            for i in range(count_layers(f"{prefix}blocks", cache)):
                part = BlockSums(cache, f"{prefix}blocks.{i}.hook_")
                for found in part.sums():
                    (notes.add if found.startswith("scaled") else problems.append)(found)
                following = cache.get(f"{prefix}blocks.{i + 1}.hook_resid_pre")
                if following is None or same(part.get("resid_post"), following):
                    continue
                if any(".deepstack." in name for name in model.sites):
                    notes.add("DeepStack adds between blocks; it has sites of its own")
                else:
                    problems.append(f"{prefix}blocks.{i}: a part without a site is added after it")
    return finding("residual", problems, note="; ".join(sorted(notes)))


def check_patterns(model: HookedVLM, inputs: Inputs) -> Finding:
    """Verifies that rows of patterns sum to one, and that zeroing a key equals masking it."""
    names = [n for n in model.hook_names if n.endswith("attn.hook_pattern")]
    problems, notes = [], set[str]()
    with quiet():
        base = model(inputs)
        logits, cache = model.run_with_cache(inputs, names) if names else (base, {})
        real = _real_rows(inputs, base)
        if not torch.allclose(logits[real], base[real], atol=1e-3, rtol=1e-3):
            problems.append(f"reading patterns moves logits by {_gap(logits, base):.1e}")
        # Rows sum to one, or to less in models with attention sinks.
        for name, value in cache.items():
            rows = [v.sum(-1) for v in listed(value)]
            if all(torch.allclose(r, torch.ones_like(r), atol=1e-3) for r in rows):
                continue
            below = all((r < 1).any() and (r < 1.001).all() and (r > 0).all() for r in rows)
            if below and _has_sinks(model, name):
                notes.add("attention sinks: rows sum to less than one")
            else:
                problems.append(f"{name}: rows do not sum to one")
        for tower in ("lm", VISION):
            own = [n for n in names if site_path(n).tower == tower and n in cache]
            own = [n for n in own if not model.sites[n].read_only]
            if own:
                problems += _zeroing_is_masking(model, inputs, own[0])
    return finding("patterns", problems, bool(names), "; ".join(notes))


def _has_sinks(model: HookedVLM, name: str) -> bool:
    """Whether the attention of a site has scores other than those of the keys."""
    attention = model.hf_model.get_submodule(model.sites[name].module)
    sources = [forward_source(type(module).forward) for module in attention.modules()]
    return any("sink" in source for source in sources)


def _real_rows(inputs: Inputs, logits: Tensor) -> Tensor:
    """Returns a mask of positions with a token; values at padding have no meaning."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:2]:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return mask.bool()


def _zeroing_is_masking(model: HookedVLM, inputs: Inputs, name: str) -> Iterator[str]:
    """Yields a problem when removing a key from a pattern differs from masking its scores."""

    def cut(weights: Tensor) -> Tensor:
        weights = weights.clone()
        # The divisor of a softmax without this key: the weights of the other keys and the
        # sinks.  1 - weight would be a rounding error where the key has almost all weight.
        rest = weights[..., 1:, 1:].sum(-1, keepdim=True)
        sinks = 1 - rest - weights[..., 1:, :1]
        rest = rest + sinks.where(sinks > 1e-5, torch.zeros_like(sinks))
        weights[..., 1:, 0] = 0
        weights[..., 1:, :] /= rest.clamp(min=1e-20)
        return weights

    def mask(weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights[..., 1:, 0] = torch.finfo(weights.dtype).min
        return weights

    scores = name.replace("hook_pattern", "hook_attn_scores")
    one = model.run_with_hooks(inputs, [(name, writing(cut))])
    two = model.run_with_hooks(inputs, [(scores, writing(mask))])
    real = _real_rows(inputs, one)
    one, two = one[real], two[real]
    if not torch.allclose(one, two, atol=1e-3, rtol=1e-3):
        yield f"{name}: zeroing a key is off by {_gap(one, two):.1e} from masking it"


def check_grid(model: HookedVLM, inputs: Inputs) -> Finding:
    """Verifies by a measurement that each cell of a grid has its pixels' rows and position.

    With attention between patches switched off, a position of the prompt depends only on its
    own patches (see `pixel_routing`).
    """
    no_grid = getattr(inputs, "no_grid", "")
    grids = model.grids(inputs)
    if no_grid or not any(grids):
        return Finding("grid", NONE, no_grid or "no image in these inputs")
    try:
        routes = measure_routes(model, inputs)
    except GridError as error:
        return Finding("grid", NONE, str(error))
    # The cells' rows at the encoder and at the projector.
    length, problems = inputs["input_ids"].shape[-1], []
    for row in grids:
        for grid in row:
            views = [grid] if grid.overview is None else [grid, grid.overview]
            for view in views:
                problems += _misplaced(view, routes, length)
    # Every position that a pixel reaches must belong to a grid.
    reached = {int(p) for p in routes.pixels.unique() if p >= 0}
    shown = {
        view.prompt * length + int(p)
        for row in grids
        for grid in row
        for view in (grid, grid.overview or grid)
        for p in view.positions.flatten()
    }
    if reached - shown:
        problems.append(f"{counted(len(reached - shown), 'visual token')} in no grid")
    shape = "; ".join(sorted({f"{g.rows}x{g.cols}" for row in grids for g in row}))
    return finding("grid", problems, note=shape)


def _misplaced(grid: TokenGrid, routes: Routes, length: int) -> Iterator[str]:
    """Yields the cells whose rows at the encoder or the projector differ from the measured ones."""
    for site, measured in routes.rows.items():
        token_site = site_path(site).tower == PROJECTOR
        given = grid.projected if token_site else grid.patches
        for cell in ((0, 0), (0, grid.cols - 1), (grid.rows - 1, 0), (grid.rows // 2, 0)):
            region = Region(grid.shape, (cell,))
            if given is not None:
                pairs = given[cell].tolist()
            elif token_site:
                pairs = [(0, int(t)) for t in region.tokens]
            else:
                pairs = [(0, int(p)) for p in region.patches(grid)]
            wanted = grid.prompt * length + int(grid.positions[cell])
            found = {int(measured[grid.image + i][r]) for i, r in pairs}
            if found != {wanted}:
                yield f"{site}: cell {cell} reaches {sorted(found)}, not position {wanted}"


def check_generate(model: HookedVLM, inputs: Inputs, steps: int = 4) -> Finding:
    """Verifies that generation under hooks equals transformers' own, with and without a cache."""
    greedy: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False}
    if model.anatomy.image_token_id is not None:  # a generated one would need an image
        greedy["suppress_tokens"] = [model.anatomy.image_token_id]
    watch = [("blocks.*.hook_resid_post", lambda _value, hook: None)]
    problems = []
    with quiet():
        expected = model.hf_model.generate(**inputs, **greedy)  # type: ignore[operator]
        if not torch.equal(model.generate(inputs, fwd_hooks=watch, **greedy), expected):
            problems.append("hooked generation differs")
        try:
            uncached = model.hf_model.generate(**inputs, use_cache=False, **greedy)  # type: ignore[operator]
        except Exception:  # noqa: BLE001 - some architectures cannot generate without a cache
            return finding("generate", problems, note="needs its cache")
        found = model.generate(inputs, fwd_hooks=watch, use_cache=False, **greedy)
        if not torch.equal(found, uncached):
            problems.append("hooked generation without a cache differs")
    return finding("generate", problems)


def check_start_layer(model: HookedVLM, inputs: Inputs) -> Finding:
    """Verifies that a run from a layer with its own residual stream gives the full logits."""
    with quiet():
        options: dict[str, Any] = uncached(model.hf_model)
        base = model(inputs, **options)
        layer = model.cfg.n_layers - 1
        residual, _ = model.run_with_cache(inputs, "hook_embed", stop_at_layer=layer)
        found = model.run_from_layer(inputs, residual, layer)
    problems = [] if torch.equal(found, base) else [f"off by {_gap(found, base):.1e}"]
    return finding("start layer", problems)


def _gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("nan")
    return float((a.float() - b.float()).abs().max())
