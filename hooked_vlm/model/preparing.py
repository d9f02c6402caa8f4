"""From images and texts to a model's inputs: what `HookedVLM` prepares, and the grids of images."""

from typing import Any

from torch import nn

from hooked_vlm.anatomy.sizes import HookedVLMConfig, VisionConfig
from hooked_vlm.arguments.checked import checked
from hooked_vlm.errors import DataError, HookError, UnsupportedModelError
from hooked_vlm.inputs.append import append
from hooked_vlm.inputs.given import given_grids
from hooked_vlm.inputs.grid_finder import GridFinder, Grids
from hooked_vlm.inputs.prepare import Images, Texts, prepare_inputs
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.model.base import ModelInputs
from hooked_vlm.model.keywords import require_processed


class Prepares:
    """Gives a wrapped vision-language model `prepare` and `grids`."""

    hf_model: nn.Module
    cfg: HookedVLMConfig
    processor: Any
    grid_finder: GridFinder
    require_call: Any

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; raises `UnsupportedModelError` when there is no processor."""
        if self.processor is None:
            raise UnsupportedModelError(
                "This HookedVLM was made without a processor, so it has no tokenizer. Pass one: "
                "HookedVLM(hf_model, processor)."
            )
        return getattr(self.processor, "tokenizer", self.processor)

    def require_vision(self) -> VisionConfig:
        """Returns the vision encoder's sizes; raises `UnsupportedModelError` if there is none."""
        if self.cfg.vision is None:
            raise UnsupportedModelError(
                f"{self.cfg.model_name} has no vision encoder, so it takes no images and has no "
                "vision_encoder or vision_projector sites. Load a vision-language model."
            )
        return self.cfg.vision

    @checked(DataError)
    def prepare(
        self,
        images: Images = None,
        texts: Texts = "",
        *,
        system: str | None = None,
        chat: bool | None = None,
        assistant: Texts | None = None,
        **processor_kwargs: Any,
    ) -> Inputs:
        """Converts images and prompts to model inputs, with a `TokenGrid` for every image.

        For one prompt, give an image (or a list of images) and a string.  For a batch, give a
        list of strings and a list with each prompt's image or list of images.  Images are
        PIL, numpy `[height, width, 3]` or tensors `[3, height, width]`, with values in
        0..255 (integers) or 0..1 (floats).  The chat template is used unless
        `chat=False` or the processor has none; images come before the text.  Prompts
        of different lengths are padded on the left, and positions count from each prompt's
        first token, so padding changes no result.  `assistant` is the beginning of the answer (of
        each prompt, or of all), appended as by `append`.

        Warns when the processor resizes an image, because this changes the size of cells.
        """
        if self.processor is None:
            raise UnsupportedModelError(
                "This HookedVLM was made without a processor, so it cannot prepare images and "
                "texts. Pass one, HookedVLM(hf_model, processor), or give forward() the tensors "
                "that the wrapped model takes."
            )
        if images is not None:
            self.require_vision()
        require_processed(self.processor, processor_kwargs)
        options = {"system": system, "chat": chat, "processor_kwargs": processor_kwargs}
        made = prepare_inputs(self.grid_finder, images, texts, **options)
        return made if assistant is None else append(self, made, assistant)  # type: ignore[arg-type]

    @checked(HookError, but=("inputs",))
    def grids(self, inputs: ModelInputs) -> Grids:
        """Returns the `TokenGrid`s of the inputs, a tuple for each prompt.

        For inputs that `prepare` did not make, pixels are those of the processed images.  The
        rule that gives their grids is compared with a measurement, once for each layout.

        Raises `GridError` when these inputs determine no grid, and `NoGridError` where the model
        does not follow the rule: `prepare` then measures the grids, if there are any.
        """
        self.require_call(inputs, ())
        return inputs.grids if isinstance(inputs, Inputs) else given_grids(self.grid_finder, inputs)
