"""Writes files and folders as a whole or not at all."""
