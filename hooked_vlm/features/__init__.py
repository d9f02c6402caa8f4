"""Activations of whole data sets: computed in batches, kept on disk, and what is fitted to them."""

from hooked_vlm.features.extract import dataset_means as dataset_means
from hooked_vlm.features.extract import extract as extract
from hooked_vlm.features.stored import Features as Features
