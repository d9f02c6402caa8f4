"""The command line: `hooked-vlm run`, `demo`, `reproduce`, `report`, `compare`, `plan` …

Only this package prints results and exits.  It converts arguments to a `Job`, shows the job's
progress, and prints every `HookedVLMError` as one line with exit status 2.  torch and
transformers take seconds to import, so each command imports them only when it runs: `--help` and
`--version` answer at once, and every other command writes a line before it waits for them.
"""

from hooked_vlm.cli import running as running  # imports add commands to `app`, in this order
from hooked_vlm.cli import showing as showing
from hooked_vlm.cli import viewing as viewing
from hooked_vlm.cli.app import app as app
from hooked_vlm.cli.app import main as main
