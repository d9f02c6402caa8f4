"""Detects the parts of a transformers model from its module tree and its source code.

Detection never uses the name of a model family and never runs the model.
"""
