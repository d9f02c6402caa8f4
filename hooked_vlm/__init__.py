"""hooked_vlm: every activation of a vision-language model by name.

Wrap a Hugging Face VLM, read any activation of its vision encoder, projector or
language model, replace it, steer it, and sweep such interventions over layers and
regions of the image.

Names are imported when they are first used, so that `import hooked_vlm` and the command
line's `--help` do not wait for torch and transformers.
"""

import ast
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # for type checkers and editors, and read by `_homes`
    from hooked_vlm.analysis.attention import attention_rollout as attention_rollout
    from hooked_vlm.analysis.attention import image_map as image_map
    from hooked_vlm.analysis.attention import patch_map as patch_map
    from hooked_vlm.analysis.directions import orthonormalise as orthonormalise
    from hooked_vlm.analysis.probes import LinearProbe as LinearProbe
    from hooked_vlm.engine.shared import shared_runs as shared_runs
    from hooked_vlm.errors import HookedVLMError as HookedVLMError
    from hooked_vlm.errors import HookedVLMWarning as HookedVLMWarning
    from hooked_vlm.experiments.registry import register_experiment as register_experiment
    from hooked_vlm.features.extract import dataset_means as dataset_means
    from hooked_vlm.features.extract import extract as extract
    from hooked_vlm.features.stored import Features as Features
    from hooked_vlm.hooks.cache import ActivationCache as ActivationCache
    from hooked_vlm.hooks.generation_cache import GenerationCache as GenerationCache
    from hooked_vlm.hooks.hook_point import HookPoint as HookPoint
    from hooked_vlm.hooks.names import get_act_name as get_act_name
    from hooked_vlm.inputs.prepared import Inputs as Inputs
    from hooked_vlm.interventions.ablate import Ablate as Ablate
    from hooked_vlm.interventions.attend import Attend as Attend
    from hooked_vlm.interventions.chain import Chain as Chain
    from hooked_vlm.interventions.hook_at import HookAt as HookAt
    from hooked_vlm.interventions.patch import Patch as Patch
    from hooked_vlm.interventions.protocol import Intervention as Intervention
    from hooked_vlm.interventions.protocol import place_index as place_index
    from hooked_vlm.interventions.recording import Recording as Recording
    from hooked_vlm.interventions.recording import record as record
    from hooked_vlm.interventions.steer import Steer as Steer
    from hooked_vlm.model.attention_maps import attention_maps as attention_maps
    from hooked_vlm.model.encoder import HookedVisionEncoder as HookedVisionEncoder
    from hooked_vlm.model.vlm import HookedVLM as HookedVLM
    from hooked_vlm.regions.generated import Generated as Generated
    from hooked_vlm.regions.grid import TokenGrid as TokenGrid
    from hooked_vlm.regions.overlay import draw_regions as draw_regions
    from hooked_vlm.regions.pairs import swap_pairs as swap_pairs
    from hooked_vlm.regions.positions import Answer as Answer
    from hooked_vlm.regions.positions import LastToken as LastToken
    from hooked_vlm.regions.positions import Positions as Positions
    from hooked_vlm.regions.positions import Span as Span
    from hooked_vlm.regions.positions import TextTokens as TextTokens
    from hooked_vlm.regions.region import Region as Region
    from hooked_vlm.report.progress import progress_bar as progress_bar
    from hooked_vlm.stimuli.settings import register_setting as register_setting
    from hooked_vlm.sweeps.attribution import attribution_patch as attribution_patch
    from hooked_vlm.sweeps.integrated import Attribution as Attribution
    from hooked_vlm.sweeps.integrated import gradient_attribution as gradient_attribution
    from hooked_vlm.sweeps.integrated import integrated_gradients as integrated_gradients
    from hooked_vlm.sweeps.pixels import PixelAttribution as PixelAttribution
    from hooked_vlm.sweeps.pixels import pixel_attribution as pixel_attribution
    from hooked_vlm.sweeps.sweep import Sweep as Sweep
    from hooked_vlm.sweeps.sweep import final_logits as final_logits
    from hooked_vlm.sweeps.tuned_lens import TunedLens as TunedLens
    from hooked_vlm.viewer.measured import SlotProbes as SlotProbes
    from hooked_vlm.viewer.order_probes import order_probes as order_probes
    from hooked_vlm.viewer.view import View as View
    from hooked_vlm.viewer.view import view as view


@cache
def _homes() -> dict[str, str]:
    """Returns the module of each public name, read off the imports above, where they stand once."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: str(node.module) for node in imports for alias in node.names if alias.asname
    }


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return list(_homes())
    if name == "__version__":
        return version("hooked-vlm")
    if name.startswith("_") or name not in _homes():
        raise AttributeError(f"module 'hooked_vlm' has no attribute {name!r}")
    return getattr(import_module(_homes()[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_homes()]
