"""An example of a package that adds an experiment, a setting and an intervention to hooked_vlm."""
