"""Places in an image and a prompt: token grids, regions of cells, and token positions."""

from hooked_vlm.regions.grid import TokenGrid as TokenGrid
from hooked_vlm.regions.overlay import draw_regions as draw_regions
from hooked_vlm.regions.pairs import swap_pairs as swap_pairs
from hooked_vlm.regions.positions import LastToken as LastToken
from hooked_vlm.regions.positions import Span as Span
from hooked_vlm.regions.region import Region as Region
