"""The two constant prompts' embeddings, from the text encoder in an LDM checkpoint; the encoder is then released."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featinv.diffusion.prior import PROMPT
from featinv.errors import UserError

log = logging.getLogger(__name__)

_CLIP = "transformer.text_model."
_CONTEXT = 77  # CLIP's


def prompt_embeddings(state: Mapping[str, Tensor], width: int, heads: int | None = None) -> dict[str, Tensor]:
    """Embeddings (1, L, D) of the recipe's prompt and of the empty one.

    Args:
        state: Tensors beneath cond_stage_model; none where the text encoder was not kept.
        width: D that the UNet takes.
        heads: Of the text encoder; None takes 64 channels for each.

    Returns:
        By "prompt" and "null"; zeros, with a warning, where there is no text encoder that can be read.
    """
    own = {name.removeprefix(_CLIP): value for name, value in state.items() if name.startswith(_CLIP)}
    words = own.get("embeddings.token_embedding.weight")
    ids = token_ids()
    if words is None or len(words) <= int(ids.max()):
        log.warning(
            "the checkpoint holds no CLIP text encoder with CLIP's vocabulary, so the prompt's embeddings are zeros; "
            "to give others, set prior.text"
        )
        return {name: torch.zeros(1, _CONTEXT, width) for name in ("prompt", "null")}
    tower = clip_tower(own, heads)
    with torch.no_grad():
        prompt, null = tower(ids[:, : tower.config.max_position_embeddings]).last_hidden_state.split(1)
    return {"prompt": prompt, "null": null}


def token_ids() -> Tensor:
    """CLIP's token ids (2, 77) of the prompt and of the empty one, filled with the end token as the LDM code does."""
    import open_clip

    ids = open_clip.tokenize([PROMPT, ""], context_length=_CONTEXT)
    end = int(ids.max())
    return torch.where((ids == end).cumsum(1) > 0, end, ids)


def clip_tower(state: Mapping[str, Tensor], heads: int | None = None) -> Any:
    """A `transformers.CLIPTextModel` of the sizes that the tensors have, named as beneath text_model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from featinv.diffusion.ldm import load_exactly

    words, places = (state[f"embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    layers = 0
    while f"encoder.layers.{layers}.layer_norm1.weight" in state:
        layers += 1
    width = words.shape[1]
    heads = heads or max(1, width // 64)
    if not layers or width % heads:
        raise UserError(f"the text encoder has {layers} layers of width {width}, which {heads} heads do not divide.")
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=len(places),
        hidden_act="quick_gelu",
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    tower = CLIPTextModel(config).eval()
    # Releases of transformers differ in whether the names start with text_model.
    prefix = "text_model." if any(name.startswith("text_model.") for name in tower.state_dict()) else ""
    kept = {prefix + name: value for name, value in state.items() if name != "embeddings.position_ids"}
    load_exactly(tower, kept, "the text encoder")
    return tower
