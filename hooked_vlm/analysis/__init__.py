"""Statistics, scores, probes and directions: functions from arrays to numbers."""

from hooked_vlm.analysis.directions import orthonormalise as orthonormalise
from hooked_vlm.analysis.probes import LinearProbe as LinearProbe
