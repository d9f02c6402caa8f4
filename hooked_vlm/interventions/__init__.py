"""What is written into a run, where, and from what.

Interventions are printable data; use one wherever a hook is taken.
"""

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
