"""Good calls of the public functions: what each argument is given, and the kinds it takes besides.

`calls()` returns them.  `tests/helpers/fuzz.py` replaces one argument of one call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from PIL import Image

import hooked_vlm as hv
from helpers.bad_values import (
    ANYTHING,
    COUNT,
    FLAG,
    FUNCTION,
    INDEX,
    NAMED,
    NEAR,
    NO_ITEMS,
    NO_KEYS,
    NOTHING,
    NUMBER,
    OPTIONAL,
    POSITIVE,
    TEXT,
    WHOLE,
)
from helpers.prepared_models import prepared
from helpers.tiny_models import make_inputs, tiny
from hooked_vlm import stimuli, zoo
from hooked_vlm.analysis import directions, probes, scoring, statistics
from hooked_vlm.regions import pairs, positions
from hooked_vlm.stimuli import grids, objects, photographs, prompts, settings, shapes, squares
from hooked_vlm.stimuli.pairs import Question, final_token_pair, swap_pair, target_place
from hooked_vlm.sweeps import attribution_error, transformer_lens


@dataclass(frozen=True)
class Call:
    """A call that works, by keyword; `takes` are the kinds of values that are no mistake."""

    name: str
    function: Callable[..., Any]
    given: dict[str, Any]
    takes: dict[str, frozenset[str]]


Argument = tuple[Any, frozenset[str]]


def call(name: str, function: Callable[..., Any], /, **arguments: Argument) -> Call:
    return Call(
        name,
        function,
        {n: value for n, (value, _) in arguments.items()},
        {n: kinds for n, (_, kinds) in arguments.items()},
    )


def calls(folder: Path) -> list[Call]:
    """Returns all calls; `folder` is where they may write."""
    w = world()
    return [
        *_of_names_and_caches(w, folder),
        *_of_models(w),
        *_of_encoders(w),
        *_of_interventions(w),
        *_of_sweeps(w),
        *_of_grids(w),
        *_of_regions(w),
        *_of_places(w),
        *_of_attention(w),
        *_of_text(w),
        *_of_datasets(w, folder),
        *_of_directions_and_probes(w),
        *_of_scores(w),
        *_of_statistics(),
        *_of_stimuli(),
    ]


@cache
def world() -> SimpleNamespace:
    """Returns the models, inputs and other objects that calls share; none of them is changed."""
    model, rich = tiny("llava"), prepared("llava")
    inputs = make_inputs("llava")
    d = model.cfg.d_model
    _, cache_ = model.run_with_cache(inputs)
    grid = model.grids(inputs)[0][0]
    image = Image.new("RGB", (64, 64), "white")
    encoder = hv.HookedVisionEncoder(rich.hf_model, rich.processor.image_processor)
    probe = hv.LinearProbe(n_steps=3)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    y = np.array([0, 1, 2] * 4)
    examples = probes.Examples(x, y, np.repeat(np.arange(4), 3), np.arange(12))
    sweep = hv.Sweep(inputs, {"slot": [0, 1]}, _ablate_last)
    scores = xr.DataArray(np.arange(12.0).reshape(3, 4), dims=("slot", "batch"))
    return SimpleNamespace(
        model=model,
        rich=rich,
        inputs=inputs,
        d=d,
        cache=cache_,
        grid=grid,
        image=image,
        encoder=encoder,
        pictures=encoder.prepare(image),
        prepared=rich.prepare(image, "red"),
        row=positions.PromptRow(
            torch.arange(4), torch.ones(4, dtype=torch.long), ("The", " red", " is", " red")
        ),
        region=hv.Region.rectangle(grid.shape, (1, 3), (1, 3)),
        left=hv.Region.column_band(grid.shape, 0, 2),
        right=hv.Region.column_band(grid.shape, 4, 6),
        vectors=torch.eye(3, d),
        h=torch.ones(2, d),
        probe=probe.fit(x, y),
        x=x,
        y=y,
        examples=examples,
        sweep=sweep,
        scores=scores,
        logits=torch.zeros(2, len(rich.tokenizer)),
    )


def _ablate_last(slot: int) -> Any:
    return hv.Ablate(slot, at=hv.LastToken())


def _last_logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 0]


def _mean_logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 0].mean()


def _sum(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 0].sum()


def _same(activation: Any, hook: Any) -> Any:
    return activation


RESID = "blocks.1.hook_resid_post"
HEADS = "blocks.1.attn.hook_z"


def _of_names_and_caches(w: SimpleNamespace, folder: Path) -> list[Call]:
    cached = {"blocks.0.hook_mlp_out": torch.ones(1, 2, 4)}
    file = folder / "cache.safetensors"
    w.cache.save(file)

    def shared(**given: Any) -> None:
        with hv.shared_runs(**given):
            pass

    tower = (None, OPTIONAL)
    return [
        call(
            "get_act_name",
            hv.get_act_name,
            name=("resid_post", NAMED),
            layer=(3, OPTIONAL | INDEX | NAMED),
            layer_type=(None, OPTIONAL | TEXT),
        ),
        call("shared_runs", shared, model=(w.model, NOTHING), memory=(2**20, COUNT)),
        call(
            "ActivationCache",
            hv.ActivationCache,
            activations=(cached, NO_KEYS),
            n_layers=({"blocks": 1}, OPTIONAL | NO_KEYS | {"mapping"}),
        ),
        call("cache[]", lambda key: w.cache[key], key=("blocks.1.hook_resid_post", NOTHING)),
        call("cache.to", w.cache.to, device=("cpu", NOTHING)),
        call("cache.select", w.cache.select, rows=([0], frozenset(["list", "tuple", "no tensor"]))),
        call("cache.remove_batch_dim", w.cache.remove_batch_dim),
        call(
            "cache.stack",
            w.cache.stack,
            name=("mlp_out", NOTHING),
            layers=([0, 1], OPTIONAL),
            tower=tower,
        ),
        call(
            "cache.accumulated_resid",
            w.cache.accumulated_resid,
            layer=(1, OPTIONAL),
            incl_mid=(False, FLAG),
            return_labels=(True, FLAG),
            tower=tower,
        ),
        call(
            "cache.decompose_resid",
            w.cache.decompose_resid,
            layer=(1, OPTIONAL),
            mode=("attn", NOTHING),
            return_labels=(True, FLAG),
            tower=tower,
        ),
        call(
            "cache.stack_head_results",
            w.cache.stack_head_results,
            layer=(1, OPTIONAL),
            return_labels=(True, FLAG),
        ),
        call("cache.save", w.cache.save, path=(file, frozenset(["text"]))),
        call("cache.load", hv.ActivationCache.load, path=(file, NOTHING), device=("cpu", NOTHING)),
        call(
            "Inputs",
            hv.Inputs,
            tensors=(w.inputs, NO_KEYS | {"mapping"}),
            grids=(((w.grid,),), NO_ITEMS - {"dict", "set"}),
            texts=(("a",), frozenset(["list", "tuple", "texts", "no tensor", "array"])),
            no_grid=("", TEXT),
        ),
        call("inputs.to", w.prepared.to, device=("cpu", NOTHING)),
        call("inputs[]", lambda name: w.prepared[name], name=("input_ids", NOTHING)),
    ]


def _hooks_of(model: Any) -> Callable[..., Any]:
    def hooks(**given: Any) -> None:
        with model.hooks(**given):
            pass

    return hooks


def _of_models(w: SimpleNamespace) -> list[Call]:
    m = w.model
    inputs = (w.inputs, NOTHING)
    fwd_hooks = ([(RESID, _same)], frozenset(["list", "tuple"]))
    residual = m.run_with_cache(w.inputs, stop_at_layer=1)[0]
    return [
        call(
            "HookedVLM",
            hv.HookedVLM,
            hf_model=(m.hf_model, NOTHING),
            processor=(None, OPTIONAL | FUNCTION),
            name=("a", TEXT | OPTIONAL),
        ),
        call(
            "HookedVLM.from_pretrained",
            hv.HookedVLM.from_pretrained,
            name=("tiny-qwen2-vl", NOTHING),
            dtype=("auto", NOTHING),
            device=("cpu", OPTIONAL),
            device_map=(None, OPTIONAL),
        ),
        call(
            "prepare",
            w.rich.prepare,
            images=(w.image, OPTIONAL | {"list", "tuple", "nones", "integers"}),
            texts=("red", TEXT),
            system=(None, OPTIONAL | TEXT),
            chat=(False, FLAG | OPTIONAL),
            assistant=(None, OPTIONAL | TEXT - {"empty"}),
        ),
        call("grids", m.grids, inputs=inputs),
        call(
            "model()",
            m,
            inputs=inputs,
            return_type=("loss", OPTIONAL),
            loss_per_token=(False, FLAG),
        ),
        call(
            "run_with_hooks",
            m.run_with_hooks,
            inputs=inputs,
            fwd_hooks=fwd_hooks,
            bwd_hooks=fwd_hooks,
        ),
        call(
            "run_with_cache",
            m.run_with_cache,
            inputs=inputs,
            names_filter=("blocks.*.hook_resid_post", OPTIONAL | FUNCTION),
            stop_at_layer=(None, OPTIONAL | {"zero", "int"}),
            fwd_hooks=fwd_hooks,
            device=(None, OPTIONAL),
            check_memory=(True, FLAG),
            pos_slice=(None, OPTIONAL | INDEX | {"ints"}),
            remove_batch_dim=(False, FLAG),
        ),
        call(
            "run_with_cache(incl_bwd)",
            m.run_with_cache,
            inputs=inputs,
            names_filter=(RESID, OPTIONAL | FUNCTION),
            incl_bwd=(True, NOTHING),
            metric=(_sum, NOTHING),
        ),
        call(
            "generate_with_cache",
            m.generate_with_cache,
            inputs=inputs,
            names_filter=(RESID, OPTIONAL | FUNCTION),
            fwd_hooks=fwd_hooks,
            prefill_only=(True, FLAG),
            device=(None, OPTIONAL),
            check_memory=(True, FLAG),
            max_new_tokens=(1, COUNT | OPTIONAL),
        ),
        call(
            "generate",
            m.generate,
            inputs=inputs,
            fwd_hooks=fwd_hooks,
            prefill_only=(True, FLAG),
            max_new_tokens=(1, COUNT | OPTIONAL),
            do_sample=(False, FLAG | OPTIONAL),
        ),
        call(
            "run_from_layer",
            m.run_from_layer,
            inputs=inputs,
            residual=(residual, NOTHING),
            layer=(1, frozenset(["zero", "int"])),
            fwd_hooks=([], frozenset(["list", "tuple"])),
        ),
        call(
            "model.hooks",
            _hooks_of(m),
            fwd_hooks=fwd_hooks,
            inputs=(w.inputs, OPTIONAL | NO_KEYS | {"mapping"}),
            prefill_only=(False, FLAG),
            bwd_hooks=fwd_hooks,
        ),
        call(
            "record",
            hv.record,
            model=(m, NOTHING),
            inputs=inputs,
            names=(RESID, OPTIONAL | FUNCTION),
        ),
        call(
            "Recording",
            hv.Recording,
            inputs=(w.inputs, NO_KEYS | {"mapping"}),
            cache=(w.cache, NOTHING),
        ),
    ]


def _of_encoders(w: SimpleNamespace) -> list[Call]:
    m = w.encoder
    inputs = (w.pictures, NOTHING)
    site = "vision_encoder.blocks.0.hook_resid_post"
    fwd_hooks = ([(site, _same)], frozenset(["list", "tuple"]))
    return [
        call(
            "HookedVisionEncoder",
            hv.HookedVisionEncoder,
            hf_model=(m.hf_model, NOTHING),
            processor=(None, OPTIONAL | FUNCTION),
            name=("a", TEXT | OPTIONAL),
        ),
        call(
            "HookedVisionEncoder.from_pretrained",
            hv.HookedVisionEncoder.from_pretrained,
            name=("tiny-gemma-3", NOTHING),
            dtype=("auto", NOTHING),
            device=("cpu", OPTIONAL),
            device_map=(None, OPTIONAL),
        ),
        call("encoder.prepare", m.prepare, images=(w.image, frozenset(["integers"]))),
        call("encoder.grids", m.grids, inputs=inputs),
        call("encoder()", m, inputs=inputs),
        call("encoder.run_with_hooks", m.run_with_hooks, inputs=inputs, fwd_hooks=fwd_hooks),
        call(
            "encoder.run_with_cache",
            m.run_with_cache,
            inputs=inputs,
            names_filter=(site, OPTIONAL | FUNCTION),
            fwd_hooks=fwd_hooks,
            device=(None, OPTIONAL),
            check_memory=(True, FLAG),
        ),
    ]


def _run(w: SimpleNamespace, kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: w.model.run_with_hooks(w.inputs, [kind(**given)])


def _of_interventions(w: SimpleNamespace) -> list[Call]:
    m = w.model
    site = (RESID, frozenset(["zero", "int"]))  # slots
    at = (hv.LastToken(), OPTIONAL)
    heads = ((0,), OPTIONAL)
    by_heads = (HEADS, frozenset(["zero", "int"]))
    run = hv.record(m, w.inputs, [RESID, HEADS])
    ablate = hv.Ablate(RESID)
    attend = hv.Attend("blocks.0.attn", scale=0.5)
    return [
        call(
            "Ablate",
            _run(w, hv.Ablate),
            site=by_heads,
            at=at,
            heads=heads,
            to=("mean", NOTHING),
            reference=(run, NOTHING),
            reference_at=(None, OPTIONAL),
        ),
        call(
            "Ablate to a vector",
            _run(w, hv.Ablate),
            site=site,
            at=at,
            to=(torch.ones(w.d), frozenset(["scalar"])),
        ),
        call(
            "Patch",
            _run(w, hv.Patch),
            site=by_heads,
            at=at,
            heads=heads,
            source=(run, NOTHING),
            source_at=(None, OPTIONAL),
        ),
        call(
            "Steer",
            _run(w, hv.Steer),
            site=site,
            at=at,
            directions=(torch.ones(w.d), NOTHING),
            alpha=(1.5, NUMBER),
            mode=("add", NOTHING),
        ),
        *(
            call(
                f"Attend({kind})",
                _run(w, hv.Attend),
                site=("blocks.1.attn", NOTHING),
                query=(None, OPTIONAL),
                key=(positions.Positions((0, 1)) if kind != "to" else None, OPTIONAL),
                heads=heads,
                **{kind: value},
            )
            for kind, value in {
                "scale": (0.5, NUMBER),
                "bias": (0.5, NUMBER),
                "score_scale": (0.5, NUMBER),
                "to": (hv.record(m, w.inputs, "blocks.1.attn.hook_pattern"), NOTHING),
            }.items()
        ),
        call(
            "Attend(mask)",
            _run(w, hv.Attend),
            site=("blocks.1.attn", NOTHING),
            query=(hv.LastToken(), OPTIONAL),
            key=(w.region, NOTHING),
            mask=(True, FLAG),
        ),
        call(
            "Attend.window",
            attend.window,
            layer=(1, frozenset(["zero"])),
            width=(2, COUNT),
            n_layers=(3, COUNT),
        ),
        call("Attend.at_layers", attend.at_layers, layers=([0, 1], frozenset(["ints"]))),
        call("Attend.at_site", attend.at_site, site=("blocks.0.attn", INDEX | TEXT)),
        call(
            "attention_maps",
            hv.attention_maps,
            model=(m, NOTHING),
            inputs=(w.inputs, NOTHING),
            query=(hv.LastToken(), OPTIONAL),
            grid=(w.grid, OPTIONAL),
            layers=([1], OPTIONAL),
            max_new_tokens=(0, WHOLE),
            fwd_hooks=([], NO_ITEMS),
        ),
        call(
            "HookAt", _run(w, hv.HookAt), site=site, fn=(_same, FUNCTION), first_position=(0, WHOLE)
        ),
        call(
            "Chain",
            lambda part: m.run_with_hooks(w.inputs, [hv.Chain(part)]),
            part=(ablate, NOTHING),
        ),
        call(
            "place_index",
            hv.place_index,
            model=(m, NOTHING),
            inputs=(w.inputs, NOTHING),
            site=site,
            at=at,
        ),
        call("Ablate.check", ablate.check, model=(m, NOTHING), inputs=(w.inputs, NOTHING)),
        call("Ablate.hooks_for", ablate.hooks_for, model=(m, NOTHING), inputs=(w.inputs, NOTHING)),
        call("Ablate.at_site", ablate.at_site, site=(0, frozenset([*INDEX, *TEXT]))),
    ]


def _of_sweeps(w: SimpleNamespace) -> list[Call]:
    m = w.model
    model, inputs, metric = (m, NOTHING), (w.inputs, NOTHING), (_last_logit, FUNCTION)
    run = hv.record(m, w.inputs, [RESID, "blocks.0.hook_resid_pre"])
    frame = pd.DataFrame({"layer": [0], "pos": [1]})

    def swept(inputs: Any, axes: Any, make: Any, base: Any, **given: Any) -> Any:
        return hv.Sweep(inputs, axes, make, base, **given).run(m, _last_logit)

    def patching(function: Callable[..., Any], **more: Argument) -> Call:
        name = getattr(function, "__name__", "get_act_patch")
        return call(
            name,
            function,
            model=model,
            corrupted_inputs=inputs,
            clean_cache=(w.cache, NOTHING),
            patching_metric=(_mean_logit, FUNCTION),
            engine=("plain", NOTHING),
            on_progress=(None, OPTIONAL | FUNCTION),
            **more,
        )

    tl = transformer_lens
    tower = (None, OPTIONAL)
    exact = (w.scores, NOTHING)
    compared = {
        "estimate": (w.scores + 1, NOTHING),
        "exact": exact,
        "clean": (0.0, NUMBER | frozenset(["scalar"])),
        "prompt": ("batch", NOTHING),
        "n_resamples": (20, COUNT),
        "seed": (0, WHOLE),
    }
    return [
        call(
            "Sweep",
            swept,
            inputs=inputs,
            axes=({"slot": [0, 1]}, NOTHING),
            make=(_ablate_last, FUNCTION),
            base=((), frozenset(["list", "tuple"])),
        ),
        call(
            "Sweep.run",
            w.sweep.run,
            model=model,
            metric=metric,
            dims=(("batch",), NOTHING),
            coords=(None, OPTIONAL | NO_KEYS),
            on_progress=(None, OPTIONAL | FUNCTION),
            engine=("plain", NOTHING),
            pass_tokens=(64, COUNT),
            memory=(None, OPTIONAL | COUNT),
        ),
        call("Sweep.plan", w.sweep.plan, model=model),
        call(
            "plan.explain",
            w.sweep.plan(m).explain,
            pass_tokens=(64, COUNT),
            memory=(None, OPTIONAL | COUNT),
        ),
        call(
            "Sweep.attribution",
            w.sweep.attribution,
            model=model,
            metric=metric,
            dims=(("batch",), NOTHING),
            coords=(None, OPTIONAL | NO_KEYS),
        ),
        call(
            "attribution_patch",
            hv.attribution_patch,
            model=model,
            inputs=inputs,
            source=(run, NOTHING),
            metric=metric,
            sites=([RESID], OPTIONAL),
        ),
        *(
            call(
                name,
                function,
                model=model,
                inputs=inputs,
                metric=(_last_logit, NOTHING),
                site=(0, WHOLE),
                baseline=("zero", NOTHING),
                **more,
            )
            for name, function, more in (
                ("gradient_attribution", hv.gradient_attribution, {}),
                ("integrated_gradients", hv.integrated_gradients, {"steps": (1, COUNT)}),
            )
        ),
        call(
            "pixel_attribution",
            hv.pixel_attribution,
            model=model,
            inputs=inputs,
            metric=(_last_logit, NOTHING),
            integrated=(True, FLAG),
            baseline=("zero", NOTHING),
            steps=(1, COUNT),
        ),
        call("final_logits", hv.final_logits, logits=(torch.zeros(1, 2, 5), NOTHING)),
        call("attribution_error", attribution_error.attribution_error, **compared),
        call(
            "agreement_table",
            attribution_error.agreement_table,
            by=(["slot"], NO_ITEMS - {"dict", "set"}),
            **compared,
        ),
        patching(
            tl.generic_activation_patch,
            patch_setter=(tl.layer_pos_patch_setter, FUNCTION),
            activation_name=("resid_pre", NOTHING),
            index_df=(frame, NOTHING),
            return_index_df=(False, FLAG),
            tower=tower,
        ),
        patching(tl.get_act_patch_attn_head_out_all_pos, tower=tower),
    ]


PAIR = frozenset(["ints"])


def _of_grids(w: SimpleNamespace) -> list[Call]:
    g = w.grid
    name = ("a", TEXT)
    pixel = NUMBER - {"negative"}
    half = np.zeros(g.image_size[::-1], dtype=bool)
    half[:, :20] = True
    grid = {
        "positions": (torch.arange(4).reshape(2, 2), NOTHING),
        "patch_rows": (4, COUNT),
        "patch_cols": (4, COUNT),
        "n_prefix": (0, WHOLE),
        "image_size": ((8, 8), PAIR),
        "scale": ((1.0, 1.0), PAIR),
        "offset": ((0.0, 0.0), PAIR),
        "processed_size": ((8, 8), PAIR),
        "prompt": (0, WHOLE),
        "image": (0, WHOLE),
    }
    return [
        call("TokenGrid", hv.TokenGrid, **grid),
        call("grid.cell_box", g.cell_box, cell=((1, 2), NOTHING)),
        call("grid.at", g.at, x=(5, pixel), y=(6, pixel)),
        call("grid.cells", g.cells, cells=([(1, 2)], NO_ITEMS), name=name),
        call(
            "grid.strip",
            g.strip,
            orientation=("vertical", NOTHING),
            start=(0, frozenset(["zero"])),
            stop=(2, frozenset(["int"])),
            name=("a", TEXT | OPTIONAL),
        ),
        call("grid.all", g.all, name=name),
        call(
            "grid.background",
            lambda region, name: g.background(region, name=name),
            region=(w.region, NOTHING),
            name=name,
        ),
        call(
            "grid.box",
            g.box,
            x0=(0, pixel),
            y0=(0, pixel),
            x1=(20, pixel),
            y1=(20, pixel),
            rule=("any", frozenset()),
            name=name,
        ),
        call("grid.mask", g.mask, mask=(half, NOTHING), rule=(0.5, NOTHING), name=name),
        call("grid.cell_of_patch", g.cell_of_patch, patch=(g.n_prefix, WHOLE)),
        call("grid.cell_of_position", g.cell_of_position, position=(int(g.positions[0, 0]), WHOLE)),
        call(
            "draw_regions",
            hv.draw_regions,
            image=(Image.new("RGB", g.image_size), NOTHING),
            grid=(g, NOTHING),
            regions=([w.region], NO_ITEMS),
            opacity=(0.5, frozenset(["zero"])),
            labels=(True, FLAG),
            zoom=(1, COUNT),
        ),
    ]


def _of_regions(w: SimpleNamespace) -> list[Call]:
    r, name = w.region, ("a", TEXT)
    shape, part = ((6, 6), PAIR), ((1, 3), NOTHING)
    two = {
        "a": (w.left, NOTHING),
        "b": (w.right, NOTHING),
        "pairing": ("published", NOTHING),
        "objects": (None, OPTIONAL),
    }
    cells = ((0, 0), (0, 1))
    return [
        call("Region", hv.Region, shape=shape, cells=(((1, 2),), NO_ITEMS), name=name),
        call(
            "Region.from_mask",
            hv.Region.from_mask,
            mask=(np.eye(3, dtype=bool), NOTHING),
            name=name,
        ),
        call("Region.rectangle", hv.Region.rectangle, shape=shape, rows=part, cols=part, name=name),
        call(
            "Region.column_band",
            hv.Region.column_band,
            shape=shape,
            start=(0, frozenset(["zero"])),
            stop=(2, frozenset(["int"])),
            name=name,
        ),
        call(
            "Region.row_band",
            hv.Region.row_band,
            shape=shape,
            start=(0, frozenset(["zero"])),
            stop=(2, frozenset(["int"])),
            name=name,
        ),
        call("Region.everything", hv.Region.everything, shape=shape, name=name),
        call("region.named", r.named, name=name),
        call("region.isdisjoint", r.isdisjoint, other=(w.left, NOTHING)),
        call("region.ring", r.ring, width=(1, COUNT), name=("a", TEXT | OPTIONAL)),
        call(
            "region.shifted",
            r.shifted,
            rows=(1, frozenset(["zero"])),
            cols=(1, frozenset(["zero"])),
        ),
        call("region.positions", r.positions, where=(w.grid, NOTHING)),
        call("region.patches_by_cell", r.patches_by_cell, grid=(w.grid, NOTHING)),
        call("region.patches", r.patches, grid=(w.grid, NOTHING)),
        call("region.of_image", r.of_image, image=(0, INDEX)),
        call("swap_pairs", hv.swap_pairs, **two),
        call("pair_cells", pairs.pair_cells, **two),
        call(
            "CellPairs",
            pairs.CellPairs,
            shape=shape,
            targets=(cells, NOTHING),
            sources=(cells[::-1], NOTHING),
        ),
    ]


def _of_places(w: SimpleNamespace) -> list[Call]:
    row = (w.row, NOTHING)
    return [
        call("LastToken.positions", hv.LastToken().positions, where=row),
        call("Generated", hv.Generated, first=(0, WHOLE), last=(3, WHOLE | OPTIONAL)),
        call("Positions", positions.Positions, indices=((0, -1), frozenset(["ints"]))),
        call("Span", hv.Span, text=("red", TEXT - {"empty"}), occurrence=(0, OPTIONAL | INDEX)),
        call("Span.positions", hv.Span("red", 0).positions, where=row),
        call("TextTokens.positions", positions.TextTokens().positions, where=row),
        call("union", lambda place: positions.union(place), place=(hv.LastToken(), NOTHING)),
        call("InImage", positions.InImage, region=(w.region, NOTHING), image=(0, INDEX)),
        call("AnyOf", positions.AnyOf, parts=((hv.LastToken(),), NOTHING)),
    ]


def _of_attention(w: SimpleNamespace) -> list[Call]:
    pattern = torch.ones(1, 2, 3, 3)
    return [
        call(
            "attention_rollout",
            hv.attention_rollout,
            patterns=([pattern], NOTHING),
            residual=(0.5, NOTHING),
        ),
        call(
            "image_map",
            hv.image_map,
            weights=(torch.ones(60), NOTHING),
            grid=(w.grid, NOTHING),
            first_key=(0, WHOLE),
        ),
        call(
            "view",
            hv.view,
            model=(w.rich, NOTHING),
            image=(w.image, NOTHING),
            question=("red", TEXT),
            panels=(["lens"], NOTHING),
            slots=(None, OPTIONAL),
            limit_mb=(25, POSITIVE),
        ),
        call("patch_map", hv.patch_map, weights=(torch.ones(37), NOTHING), grid=(w.grid, NOTHING)),
    ]


def _of_text(w: SimpleNamespace) -> list[Call]:
    ids = frozenset(["int", "zero", "ints", "integers", "no tensor"])
    return [
        call("inputs.positions", w.prepared.positions, place=(hv.LastToken(), OPTIONAL)),
        call("inputs.to_str_tokens", w.prepared.to_str_tokens),
        call("cache.at", w.cache.at, place=(hv.LastToken(), OPTIONAL)),
        call(
            "append",
            w.rich.append,
            inputs=(w.prepared, NOTHING),
            ids=("red", TEXT - {"empty"} | {"ints"}),
        ),
        call(
            "to_tokens",
            w.rich.to_tokens,
            text=("red", TEXT | {"texts", "array"}),
            prepend_bos=(None, FLAG | OPTIONAL),
        ),
        call("to_string", w.rich.to_string, tokens=([5], ids)),
        call("to_single_token", w.rich.to_single_token, string=("d", NAMED | {"blank"})),
        call("to_single_str_token", w.rich.to_single_str_token, token=(5, WHOLE)),
    ]


def _of_datasets(w: SimpleNamespace, folder: Path) -> list[Call]:
    common = {
        "model": (w.rich, NOTHING),
        "dataset": ([(w.image, "red", "a")] * 2, NOTHING),
        "sites": (RESID, WHOLE | {"set"}),
        "at": (hv.LastToken(), OPTIONAL | FUNCTION),
        "batch": (2, COUNT),
        "text": (None, OPTIONAL | TEXT),
        "image_column": (None, OPTIONAL | TEXT),
        "text_column": (None, OPTIONAL | TEXT),
        "on_error": ("raise", NOTHING),
        "progress": (False, FLAG | FUNCTION | OPTIONAL),
    }
    out = folder / "features"
    made = hv.extract(w.rich, [(w.image, "red", c) for c in "abab"], RESID, out=folder / "made",
                      at=hv.LastToken(), pool="mean", progress=False)  # fmt: skip
    site = (RESID, NOTHING)
    return [
        call(
            "extract",
            hv.extract,
            **common,
            out=(out, frozenset(["text", "blank"])),
            pool=("mean", NOTHING),
            dtype=(None, OPTIONAL),
            label_column=(None, OPTIONAL | TEXT),
        ),
        call("dataset_means", hv.dataset_means, **common),
        call(
            "Features", hv.Features, folder=(out.with_name("made"), NOTHING), partial=(False, FLAG)
        ),
        call("features[]", lambda site: made[site], site=(RESID, WHOLE)),
        call("features.pca", made.pca, site=site, n_components=(1, NOTHING)),
        call("features.probe", made.probe, site=site, probe=(None, OPTIONAL), seed=(0, WHOLE)),
        call(
            "features.difference_of_means",
            made.difference_of_means,
            site=site,
            label=("a", NOTHING),
            other=("b", OPTIONAL),
        ),
    ]


def _of_directions_and_probes(w: SimpleNamespace) -> list[Call]:
    h, rows = (w.h, NOTHING), (w.vectors, NOTHING)
    number, seed = (0.5, NUMBER), (0, WHOLE)
    one = directions.Direction(torch.ones(4), "a")
    grid = hv.Region.everything((2, 2))

    def fitted(x: Any, y: Any, **given: Any) -> Any:
        return hv.LinearProbe(**{"n_steps": 2, **given}).fit(x, y)

    x = (w.x, NOTHING)
    return [
        call(
            "Direction",
            directions.Direction,
            vector=(torch.ones(4), NOTHING),
            name=("a", TEXT),
            provenance=("", TEXT),
        ),
        call("stack", directions.stack, directions=([one, one], NOTHING)),
        call("add", directions.add, h=h, w=(torch.ones(w.d), NOTHING), alpha=number),
        call("scale_projections", directions.scale_projections, h=h, directions=rows, alpha=number),
        call("orthonormalise", hv.orthonormalise, directions=rows, center=(True, FLAG)),
        call("projection_energy", directions.projection_energy, h=h, directions=rows),
        call(
            "random_controls",
            directions.random_controls,
            directions=rows,
            seeds=([0, 1], frozenset(["ints"])),
            match_energy_on=(None, OPTIONAL),
        ),
        call(
            "LinearProbe.fit",
            fitted,
            x=x,
            y=(w.y, NOTHING),
            lr=(0.1, POSITIVE | {"zero"}),
            weight_decay=(0.1, POSITIVE | {"zero"}),
            n_steps=(2, COUNT),
            seed=seed,
            device=(None, OPTIONAL),
        ),
        call("probe.predict", w.probe.predict, X=x),
        call("probe.predict_proba", w.probe.predict_proba, X=x),
        call("probe.decision_function", w.probe.decision_function, X=x),
        call("probe.score", w.probe.score, X=x, y=(w.y, NOTHING), sample_weight=(None, OPTIONAL)),
        call("probe.logits", w.probe.logits, features=x),
        call(
            "probe.probability_map",
            w.probe.probability_map,
            features=(torch.zeros(2, 2, 5), NOTHING),
        ),
        call(
            "Examples",
            probes.Examples,
            X=x,
            y=(w.y, NOTHING),
            images=(w.examples.images, NOTHING),
            objects=(w.examples.objects, NOTHING),
        ),
        call(
            "examples.of_images",
            w.examples.of_images,
            images=([0], frozenset(["list", "tuple", "ints", "no tensor"])),
        ),
        call(
            "object_examples",
            probes.object_examples,
            features=(torch.zeros(2, 4, 3), NOTHING),
            regions=([grid], NOTHING),
            pooled=(False, FLAG),
        ),
        call(
            "split_by_image",
            probes.split_by_image,
            n_images=(8, COUNT),
            test_size=(0.25, NOTHING),
            seed=seed,
        ),
        call("shuffled_labels", probes.shuffled_labels, examples=(w.examples, NOTHING), seed=seed),
        call(
            "held_out_accuracy",
            probes.held_out_accuracy,
            probe=(w.probe, NOTHING),
            examples=(w.examples, NOTHING),
            level=(0.9, NOTHING),
        ),
        call(
            "class_directions",
            probes.class_directions,
            probe=(w.probe, NOTHING),
            provenance=("", TEXT),
        ),
    ]


def _of_scores(w: SimpleNamespace) -> list[Call]:
    logits, tokenizer = (w.logits, NOTHING), (w.rich.tokenizer, NOTHING)
    letters = frozenset(["array"])  # each is a token
    answers, names = (["red", "blue"], letters), (["red", "blue"], letters)
    s = scoring
    return [
        call("spellings", s.spellings, name=("red", TEXT)),
        call("normalise", s.normalise, text=("red", TEXT)),
        call("is_single_token", s.is_single_token, tokenizer=tokenizer, name=("red", TEXT)),
        call("answer_ids", s.answer_ids, tokenizer=tokenizer, name=("red", NOTHING)),
        call(
            "candidate_probability",
            s.candidate_probability,
            logits=logits,
            tokenizer=tokenizer,
            names=names,
        ),
        call(
            "target_probability",
            s.target_probability,
            logits=logits,
            tokenizer=tokenizer,
            answers=answers,
        ),
        call("top_answer", s.top_answer, logits=logits, tokenizer=tokenizer),
        call(
            "matches_answer",
            s.matches_answer,
            logits=logits,
            tokenizer=tokenizer,
            answers=answers,
            candidates=(["red", "blue"], OPTIONAL),
        ),
        call("accuracy", s.accuracy, logits=logits, tokenizer=tokenizer, answers=answers),
        call(
            "logit_difference",
            s.logit_difference,
            logits=logits,
            tokenizer=tokenizer,
            answers=answers,
            others=(["blue", "red"], letters),
        ),
    ]


def _of_statistics() -> list[Call]:
    values = np.arange(12.0).reshape(6, 2)
    numbers = frozenset(["ints", "integers", "set"])
    rows, others = (values, numbers - {"set"}), (values[::-1], NOTHING)
    how = {"n_resamples": (20, COUNT), "seed": (0, WHOLE)}
    level = (0.9, NOTHING)
    interval = statistics.bootstrap(values, n_resamples=20)
    return [
        call("bootstrap", statistics.bootstrap, values=rows, level=level, **how),
        call(
            "bootstrap_of",
            statistics.bootstrap_of,
            values=rows,
            statistic=(lambda m: m[:, 0], FUNCTION),
            level=level,
            **how,
        ),
        call(
            "paired_difference", statistics.paired_difference, a=rows, b=others, level=level, **how
        ),
        call(
            "wilson",
            statistics.wilson,
            successes=(
                3,
                frozenset(
                    [
                        "int",
                        "zero",
                        "half",
                        "integers",
                        "no tensor",
                        "list",
                        "tuple",
                        "scalar",
                        "deep",
                    ]
                ),
            ),
            n=(9, frozenset(["int"])),
            level=level,
        ),
        call(
            "sign_flip_test", statistics.sign_flip_test, a=rows, b=(values[::-1], OPTIONAL), **how
        ),
        call(
            "holm",
            statistics.holm,
            p_values=(
                [0.1, 0.2],
                frozenset(["list", "tuple", "no tensor", "zero", "scalar", "integers", "deep"]),
            ),
        ),
        call("interval.covers", interval.covers, value=(1.0, NUMBER | {"infinite", "nan"})),
        call("interval.at", lambda index: interval.at(index), index=(0, frozenset(["zero"]))),
    ]


def _of_stimuli() -> list[Call]:
    geometry = stimuli.geometry_for(12, 4)
    triple = ("red", "green", "blue")
    objects_ = ("apple", "orange", "key")
    question = Question(triple, "left")
    squares_set = settings.stimulus_set("squares")
    placed = {
        "axis": ("horizontal", NOTHING),
        "geometry": (geometry, NOTHING),
        "background": (None, OPTIONAL),
    }
    entities = (triple, frozenset())
    directions_ = (("left",), frozenset(["list", "tuple"]))
    layout = grids.GridLayout(2, 8, 8)
    import random

    cells = grids.random_cells(2, random.Random(0))
    place = (0, frozenset(["zero"]))
    folder = (None, OPTIONAL | NAMED)
    return [
        call(
            "Geometry",
            stimuli.Geometry,
            n_tokens=(12, NOTHING),
            token_px=(4, COUNT),
            object_tokens=(2, frozenset()),
            gap_tokens=(2, frozenset(["zero"])),
            strips=((4, 4, 4), NOTHING),
        ),
        call("geometry_for", stimuli.geometry_for, n_tokens=(12, COUNT), token_px=(4, COUNT)),
        call("geometry.place_box", geometry.place_box, axis=("horizontal", NOTHING), place=place),
        call(
            "geometry.object_region",
            geometry.object_region,
            axis=("horizontal", NOTHING),
            place=place,
        ),
        call(
            "geometry.strip_region",
            geometry.strip_region,
            axis=("horizontal", NOTHING),
            place=place,
        ),
        call("geometry.background", geometry.background, axis=("horizontal", NOTHING)),
        call(
            "sample_tuples",
            stimuli.sample_tuples,
            names=(triple, frozenset(["array"])),
            k=(2, frozenset(["int"])),
            per_direction=(2, COUNT),
            seed=(0, WHOLE),
            accept=(None, OPTIONAL | FUNCTION),
            max_attempts=(20, COUNT),
            accept_batch=(None, OPTIONAL | FUNCTION),
            directions=directions_,
        ),
        call("swap_pair", swap_pair, direction=("left", NOTHING), names=(triple, NOTHING)),
        call(
            "final_token_pair",
            final_token_pair,
            direction=("left", NOTHING),
            names=((*triple, "black", "gray"), NOTHING),
        ),
        call("target_place", target_place, direction=("left", NOTHING)),
        call(
            "Question",
            lambda **given: Question(**given).target,
            entities=(triple, frozenset()),
            direction=("left", NOTHING),
        ),
        call(
            "side_prompt",
            prompts.side_prompt,
            subject=("cat", NAMED),
            reference=("dog", NAMED),
            axis=("vertical", NOTHING),
            style=("choice", NOTHING),
            swapped=(False, FLAG),
        ),
        call(
            "squares_prompt",
            prompts.squares_prompt,
            direction=("left", NOTHING),
            reference=("red", NAMED),
        ),
        call("squares.items", squares.items, directions=directions_),
        call("squares.prompt", squares.prompt, question=(question, NOTHING)),
        call("squares.draw", squares.draw, entities=entities, **placed),
        call("shapes.prompt", shapes.prompt, question=(question, NOTHING)),
        call("shapes.draw", shapes.draw, entities=entities, **placed),
        call("objects.prompt", objects.prompt, question=(question, NOTHING)),
        call(
            "objects.draw",
            objects.draw,
            entities=(objects_, frozenset()),
            cutouts=(None, OPTIONAL),
            **placed,
        ),
        call(
            "load_cutouts",
            objects.load_cutouts,
            folder=(Path(objects.__file__).parent / "assets" / "cutouts", NOTHING),
        ),
        call("photographs.shipped", photographs.shipped, name=("coffee", NOTHING)),
        call(
            "load_photographs",
            photographs.load_photographs,
            folder=(Path(objects.__file__).parent / "assets" / "photographs", NOTHING),
        ),
        call(
            "photographs.fitted",
            photographs.fitted,
            photograph=(photographs.shipped("coffee"), NOTHING),
            side=(20, COUNT),
        ),
        call(
            "stimulus_set",
            settings.stimulus_set,
            name=("squares", NOTHING),
            cutouts=folder,
            backgrounds=folder,
            data=folder,
            other_words=(False, FLAG),
        ),
        call(
            "register_setting",
            settings.register_setting,
            name=("fuzzed", TEXT),
            make=(lambda: squares_set, FUNCTION),
            replace=(True, FLAG),
        ),
        call("set.items", squares_set.items, directions=(("left",), OPTIONAL | {"list", "tuple"})),
        call(
            "set.picture",
            squares_set.picture,
            question=(question, NOTHING),
            layout=(geometry, NOTHING),
        ),
        call(
            "set.scene",
            squares_set.scene,
            entities=entities,
            axis=("horizontal", NOTHING),
            layout=(geometry, NOTHING),
            ground=(None, OPTIONAL),
        ),
        call(
            "GridLayout",
            grids.GridLayout,
            k=(2, frozenset(["int"])),
            n_tokens=(20, frozenset(["int"])),
            token_px=(2, COUNT),
        ),
        call("grids.draw", grids.draw, cells=(cells, NOTHING), layout=(layout, NOTHING)),
        call("zoo.folder", zoo.folder, name=("tiny-qwen2-vl", NOTHING)),
        call(
            "zoo.load",
            zoo.load,
            name=("tiny-qwen2-vl", NOTHING),
            dtype=(torch.float32, NOTHING),
            device=("cpu", NOTHING),
        ),
    ]


__all__ = ["ANYTHING", "NEAR", "Call", "calls"]
