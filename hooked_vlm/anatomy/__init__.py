"""What a transformers model is made of, read from its modules and their source.

Nothing here asks for a family's name, and nothing runs the model.
"""
