"""Applies a processor's chat template to a text, its images and a system message.

Templates differ in how they take the system message: most take a list of parts, as for the
user's message, and some (Pixtral's) take a string.  A template of strings fails on a list, or
writes the list itself into the prompt, where the model would read its brackets and quotes.
"""

import re
from typing import Any

from hooked_vlm.errors import DataError


def chat_prompt(processor: Any, text: str, n_images: int, system: str | None) -> str:
    """Returns the prompt of a text after its images, with the system message if one is given.

    Raises `DataError` when the template refuses the messages, or leaves out the system message.
    """
    part = {"type": "text", "text": text}
    user = {"role": "user", "content": [*[{"type": "image"}] * n_images, part]}
    if system is None:
        return _applied(processor, [user])
    own = len(_PART.findall(text + system))
    refused = []
    for content in ([{"type": "text", "text": system}], system):
        try:
            prompt = _applied(processor, [{"role": "system", "content": content}, user])
        except DataError as error:
            refused.append(error)
            continue
        if _without_space(system) in _without_space(prompt) and len(_PART.findall(prompt)) <= own:
            return prompt
    if len(refused) == 2:
        raise refused[0]
    raise DataError(
        "The model's chat template leaves out the system message. Give it as part of the text."
    )


def _applied(processor: Any, messages: list[dict[str, Any]]) -> str:
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's authors
        raise DataError(
            f"The model's chat template refuses this prompt: {str(error)[:150]}. Give other texts, "
            "leave out system=…, or use chat=False."
        ) from error


_PART = re.compile(r"""\{\s*['"](type|text)['"]\s*:""")
"""The beginning of a part that was written as a dictionary instead of its text."""


def _without_space(text: str) -> str:
    """Returns a text without white space, which templates may change."""
    return "".join(text.split())
