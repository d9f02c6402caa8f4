"""Many interventions over sites, strengths and places, and what they will cost."""

from hooked_vlm.sweeps.attribution import attribution_patch as attribution_patch
from hooked_vlm.sweeps.sweep import Sweep as Sweep
from hooked_vlm.sweeps.sweep import final_logits as final_logits
