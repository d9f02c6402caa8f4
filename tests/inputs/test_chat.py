"""Chat templates that take the system message as a list of parts, or as a string."""

from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import Environment

from helpers.prepared_models import PIXTRAL_TEMPLATE, pixtral
from hooked_vlm.errors import DataError
from hooked_vlm.inputs.chat import chat_prompt


PARTS = (
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<i>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
LISTED = "{% for message in messages %}{{ message['role'] }}: " + PARTS + ";{% endfor %}"
PRINTED = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'system' %}{{ message['content'] }}{% else %}"
    + PARTS
    + "{% endif %};{% endfor %}"
)
DEAF = (
    "{% for message in messages %}{% if message['role'] == 'user' %}user: "
    + PARTS
    + ";{% endif %}{% endfor %}"
)


def processor(template: str) -> Any:
    made = Environment().from_string(template)
    return SimpleNamespace(apply_chat_template=lambda messages, **_: made.render(messages=messages))


@pytest.mark.parametrize(
    "template", [LISTED, PRINTED, PRINTED.replace("content'] }", "content'] | tojson }", 1)]
)
def test_b1_a_system_message_is_written_as_text_and_not_as_a_list(template: str) -> None:
    prompt = chat_prompt(processor(template), "Where?", 1, "Be brief.")
    assert "system: Be brief." in prompt.replace('"', "") and "user: <i>Where?;" in prompt
    assert "{" not in prompt


def test_b1_a_template_that_adds_the_system_message_to_a_string() -> None:
    prompt = chat_prompt(processor(PIXTRAL_TEMPLATE), "Where?", 1, "Be brief.")
    assert prompt == "[INST]Be brief.\n\n[IMG]Where?[/INST]"
    inputs = pixtral().prepare([], "Where?", system="Be brief.", chat=True)
    assert inputs.texts == ("[INST]Be brief.\n\nWhere?[/INST]",)


def test_b1_templates_without_a_system_message_are_refused_as_before() -> None:
    with pytest.raises(DataError, match="leaves out the system message"):
        chat_prompt(processor(DEAF), "Where?", 1, "Be brief.")
    with pytest.raises(
        DataError, match=r"refuses this prompt: .*has no attribute.*leave out system"
    ):
        chat_prompt(processor("{{ messages[0].nothing.at_all }}"), "Where?", 1, "Be brief.")
