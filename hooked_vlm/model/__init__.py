"""`HookedVLM` and `HookedVisionEncoder`: load, run, cache, generate."""

from hooked_vlm.model.encoder import HookedVisionEncoder as HookedVisionEncoder
from hooked_vlm.model.vlm import HookedVLM as HookedVLM
