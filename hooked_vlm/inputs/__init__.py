"""Converts images and texts to model inputs, with a grid of visual tokens for every image."""

from hooked_vlm.inputs.prepared import Inputs as Inputs
