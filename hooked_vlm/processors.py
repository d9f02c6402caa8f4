"""Loading processors where torchvision is missing.

transformers' video processors need torchvision, and a processor that can take videos
will not load without one even when only images are wanted.  `images_only` makes the
same processor class without that part; image processors fall back to PIL by themselves.
"""

import inspect
from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


def images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Returns a processor class of the same name and behaviour that has no video processor."""
    if "video_processor" not in inspect.signature(processor_class.__init__).parameters:
        return processor_class

    members = {
        # transformers reads a processor's parts off this function's code: nothing may wrap it.
        "__init__": lambda self, image_processor=None, tokenizer=None, chat_template=None, **more: (
            processor_class.__init__(
                self,
                image_processor=image_processor,
                tokenizer=tokenizer,
                video_processor=None,
                chat_template=chat_template,
                **more,
            )
        ),
        "video_processor": None,
        "__doc__": processor_class.__doc__,
    }
    made = type(processor_class.__name__, (processor_class,), members)
    made.__module__ = processor_class.__module__
    return made


def load_processor(name: str, **kwargs: Any) -> Any:
    """Returns the processor of a folder or hub name, without its video part if that cannot load."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(name, **kwargs)
    config = AutoConfig.from_pretrained(name, **kwargs)
    known = type(config) in PROCESSOR_MAPPING
    if not known or kwargs.get("trust_remote_code"):
        return AutoProcessor.from_pretrained(name, **kwargs)
    processor_class: Any = PROCESSOR_MAPPING[type(config)]
    return images_only(processor_class).from_pretrained(name, **kwargs)
