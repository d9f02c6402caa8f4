"""Checks what public functions are given, before they begin.

`checked.checked` compares arguments with their annotations; `kinds` has annotations with a range.
Names that are looked up are compared where they are looked up, with the nearest known name.
"""
