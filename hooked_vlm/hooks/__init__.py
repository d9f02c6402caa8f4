"""Named activations: their modules, their shapes, and the functions that run on them.

Names are TransformerLens's.  Activations of a vision encoder are in raster order, by image.
"""

from hooked_vlm.hooks.cache import ActivationCache as ActivationCache
from hooked_vlm.hooks.hook_point import HookPoint as HookPoint
from hooked_vlm.hooks.names import get_act_name as get_act_name
