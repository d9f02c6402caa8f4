"""Arrays in, numbers out: statistics, scores, probes and directions."""

from hooked_vlm.analysis.directions import orthonormalise as orthonormalise
from hooked_vlm.analysis.probes import LinearProbe as LinearProbe
