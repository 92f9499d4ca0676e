"""Image features of a frozen tower and projector, computed once an image: for policy and reference, in all epochs.

Model: `get_image_features`, the library's own interface between an image and the language model, is answered from what it
gave for the same pixels before. Each image goes through alone, so that its features do not depend on what else was in its
first batch, and a run that resumes ends bitwise equal. They are kept in the host's memory, the first `MAX_BYTES` of them:
epochs come to all images in turn, so making room would lose each just before it is needed again.

Limits: models whose processor gives one tensor an image of one size, and whose tower gives one an image back (LLaVA-1.5's
kind). With any other, where a tower has dropout, and where its weights are spread over processes (FSDP, DeepSpeed), all is
as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from training.model.loading import Model

MAX_BYTES = 8 * 2**30
Compute = Callable[..., Any]


class Features:
    """Stands for a model's `get_image_features`; one thread."""

    def __init__(self, compute: Compute, max_bytes: int = MAX_BYTES) -> None:
        self._compute = compute
        self._max_bytes = max_bytes
        self._known: dict[bytes, torch.Tensor] = {}
        self._num_bytes = 0
        self._is_off = False
        """Whether the model gave something else than one tensor an image."""

    def __call__(self, pixel_values: torch.Tensor, *sizes: Any, **options: Any) -> Any:
        """The features of `pixel_values`, (images, channels, height, width), as the model's own method gives them."""
        asked = {name: value for name, value in options.items() if value is not None and name != "return_dict"}
        if self._is_off or sizes or asked or pixel_values.dim() != 4 or pixel_values.requires_grad:
            return self._compute(pixel_values, *sizes, **options)
        features = []
        for image in pixel_values:
            if (feature := self._of(image)) is None:
                self._is_off = True
                return self._compute(pixel_values, **options)
            features.append(feature)
        return BaseModelOutputWithPooling(pooler_output=features)

    def _of(self, image: torch.Tensor) -> torch.Tensor | None:
        """One image's features, on its device; None where the model gives something else."""
        pixels = image.detach().cpu().contiguous().view(torch.uint8).numpy()
        key = blake2b(pixels.data, digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            return known.to(image.device)
        with torch.no_grad():
            given = self._compute(image.unsqueeze(0), return_dict=True)
        if type(given) is not BaseModelOutputWithPooling or not isinstance(given.pooler_output, list):
            return None
        feature: torch.Tensor = given.pooler_output[0]
        size = feature.numel() * feature.element_size()
        if self._num_bytes + size <= self._max_bytes:
            self._known[key] = feature.cpu()
            self._num_bytes += size
        return feature


def keep_features(model: Model) -> bool:
    """Have a PEFT model compute each image's features once; whether it can."""
    inner = model.get_base_model()
    backbone = getattr(inner, "model", None)
    vision = getattr(inner.config, "vision_config", None)
    drops = [
        value for name, value in (vision.to_dict() if vision else {}).items() if name.endswith("dropout") and value
    ]
    decoder = {id(parameter) for parameter in inner.get_decoder().parameters()}
    is_frozen = all(id(p) in decoder for p in inner.parameters() if p.requires_grad)
    if backbone is None or vision is None or not hasattr(backbone, "get_image_features") or drops or not is_frozen:
        return False
    backbone.get_image_features = Features(backbone.get_image_features)
    return True
