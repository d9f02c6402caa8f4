"""The experiments by name: what each asks, of which setting, and what it returns.

They compute; how a result is drawn is `report`'s affair.
"""
