"""How the shipped models of `hooked_vlm.zoo` were made; not part of the wheel.

`python -m training.train NAME --out FOLDER` trains one, `python -m training.evaluate NAME` asks it.
"""
