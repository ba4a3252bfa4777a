"""Vision-language families as data: a tiny configuration, one image's tokens, and what the model is given for images.

IMAGE stands for the family's own placeholder of an image token. What surrounds it is what the family's processor
writes around an image: tokens of text. Nothing here knows vista_patch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

PAD, BOS, IMAGE, VIDEO, START, END, BREAK = 0, 1, 90, 91, 92, 93, 94  # ids; text is 3..79
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "in_chans": 3,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def squares(counts: list[int], side: int = 8) -> dict:
    """One [3, side, side] an image, in the order of the rows. `counts`: images of each row."""
    return {"pixel_values": noise(sum(counts), 3, side, side)}


def sized(counts: list[int]) -> dict:
    return squares(counts) | {"image_sizes": torch.tensor([[8, 8]] * sum(counts))}


def crops(counts: list[int]) -> dict:
    """An image of 8 x 16 as LLaVA-NeXT cuts it: the whole and two squares."""
    return {"pixel_values": noise(sum(counts), 3, 3, 8, 8), "image_sizes": torch.tensor([[8, 16]] * sum(counts))}


def patches(counts: list[int]) -> dict:
    """Qwen's: an image of 16 x 16 is 16 patches of 4 x 4, each twice in time; 4 tokens after the merge."""
    n = sum(counts)
    return {"pixel_values": noise(16 * n, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def by_row(counts: list[int]) -> dict:
    """Idefics': [rows, most images, 3, side, side]; an image of zeros is none."""
    pixels = torch.zeros(len(counts), max(counts), 3, 8, 8)
    for row, n in enumerate(counts):
        pixels[row, :n] = noise(n, 3, 8, 8) + row if n else 0
    return {"pixel_values": pixels}


@dataclass(frozen=True)
class Family:
    model: str
    config: dict
    image: list[int]
    pixels: Callable[[list[int]], dict]
    types: str = ""  # the name of the types of tokens, where training needs them
    type_of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.long  # from where the image tokens are
    placeholders: tuple[int, ...] = (IMAGE,)  # ids whose positions get something else than their embedding
    scale: float = 1.0  # of the vectors that the decoder gets, over the rows of the embedding's table
    dtype: torch.dtype = torch.float64  # of the comparison: experts' kernels take fp32 at most
    refused: str = ""  # why, as in the message after the model's class


def llama(**settings) -> dict:
    return {"model_type": "llama", **TEXT, **settings}


def qwen2(**settings) -> dict:
    return {"model_type": "qwen2", **TEXT, **settings}


CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
PIXTRAL = {"model_type": "pixtral", **VISION, "head_dim": 8}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 88,
    "video_end_token_id": 89,
}
GLM_V = {**QWEN_VISION, "image_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
LLAVA = {"image_token_index": IMAGE, "image_seq_length": 4, "tie_word_embeddings": False}

FAMILIES = {
    "LLaVA": Family(
        "LlavaForConditionalGeneration",
        LLAVA | {"vision_config": CLIP, "text_config": llama(), "vision_feature_layer": -2},
        [IMAGE] * 4,
        squares,
    ),
    "Pixtral in LLaVA": Family(
        "LlavaForConditionalGeneration",
        LLAVA
        | {"vision_config": PIXTRAL, "text_config": {"model_type": "mistral", **TEXT}}
        | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        [IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END],
        sized,
    ),
    "LLaVA-NeXT": Family(
        "LlavaNextForConditionalGeneration",
        LLAVA | {"vision_config": CLIP, "text_config": llama(), "image_grid_pinpoints": [[8, 16], [16, 8]]},
        [IMAGE] * (4 + 2 * (4 + 1)),  # the whole; two rows of four and their newline
        crops,
    ),
    "LLaVA-OneVision": Family(
        "LlavaOnevisionForConditionalGeneration",
        {"vision_config": SIGLIP, "text_config": qwen2(), "image_grid_pinpoints": [[8, 16], [16, 8]]}
        | {"image_token_index": IMAGE, "video_token_index": VIDEO, "tie_word_embeddings": False},
        [IMAGE] * (4 + 2 * (4 + 1)),
        crops,
    ),
    "VipLLaVA": Family(
        "VipLlavaForConditionalGeneration",
        LLAVA | {"vision_config": CLIP, "text_config": llama(), "vision_feature_layers": [-2, -1]},
        [IMAGE] * 4,
        squares,
    ),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        QWEN_IDS
        | {"vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}}
        | TEXT
        | {"rope_scaling": MROPE},
        [START, *[IMAGE] * 4, END],
        patches,
        types="mm_token_type_ids",
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_IDS
        | {
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 32, "intermediate_size": 24, "window_size": 16, "fullatt_block_indexes": [1]}
        }
        | TEXT
        | {"rope_scaling": MROPE},
        [START, *[IMAGE] * 4, END],
        patches,
        types="mm_token_type_ids",
    ),
    "Qwen3-VL": Family(
        "Qwen3VLForConditionalGeneration",
        QWEN_IDS
        | {"text_config": {**TEXT, "head_dim": 8, "rope_scaling": MROPE}, "tie_word_embeddings": False}
        | {
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16}
            | {"deepstack_visual_indexes": [0]}
        },
        [START, *[IMAGE] * 4, END],
        patches,
        types="mm_token_type_ids",
    ),
    "Qwen3.5": Family(
        "Qwen3_5ForConditionalGeneration",
        QWEN_IDS
        | {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "rope_parameters": MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
            },
            "tie_word_embeddings": False,
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16},
        },
        [START, *[IMAGE] * 4, END],
        patches,
        types="mm_token_type_ids",
    ),
    "InternVL": Family(
        "InternVLForConditionalGeneration",
        {
            "vision_config": {
                "model_type": "internvl_vision",
                **VISION,
                "image_size": [8, 8],
                "patch_size": [2, 2],
                "layer_scale_init_value": 1.0,
            },
            "text_config": qwen2(),
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        squares,
    ),
    "Idefics3": Family(
        "Idefics3ForConditionalGeneration",
        {
            "vision_config": {"model_type": "idefics3_vision", **VISION, "patch_size": 2},
            "text_config": llama(),
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
            "tie_word_embeddings": False,
        },
        [START, BREAK, *[IMAGE] * 4, START],
        by_row,
    ),
    "SmolVLM": Family(
        "SmolVLMForConditionalGeneration",
        {
            "vision_config": {"model_type": "smolvlm_vision", **VISION, "patch_size": 2},
            "text_config": llama(),
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
            "tie_word_embeddings": False,
        },
        [START, BREAK, *[IMAGE] * 4, START],
        by_row,
    ),
    "Gemma 3": Family(
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": SIGLIP | {"image_size": 16},
            "text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 8, "sliding_window": 8}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        lambda counts: squares(counts, 16),
        types="token_type_ids",
        scale=32**0.5,
    ),
    "Mistral 3": Family(
        "Mistral3ForConditionalGeneration",
        {
            "vision_config": PIXTRAL | {"image_size": 16},
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 8},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        [IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END],
        lambda counts: squares(counts, 16) | {"image_sizes": torch.tensor([[16, 16]] * sum(counts))},
    ),
    "Aya Vision": Family(
        "AyaVisionForConditionalGeneration",
        {
            "vision_config": SIGLIP | {"image_size": 16},
            "text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 8}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            "downsample_factor": 2,
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        lambda counts: squares(counts, 16),
    ),
    "Cohere2 Vision": Family(
        "Cohere2VisionForConditionalGeneration",
        {
            "vision_config": SIGLIP | {"image_size": 16},
            "text_config": {
                "model_type": "cohere2",
                **TEXT,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "downsample_factor": 2,
            "image_token_id": IMAGE,
            "alignment_intermediate_size": 48,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        lambda c: squares(c, 16),
    ),
    "GLM-4V": Family(
        "Glm4vForConditionalGeneration",
        GLM_IDS
        | {
            "text_config": {
                **TEXT,
                "rope_scaling": MROPE | {"partial_rotary_factor": 1.0},
                "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
            },
            "vision_config": GLM_V,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        patches,
        types="mm_token_type_ids",
    ),
    "GLM-4.6V": Family(
        "Glm46VForConditionalGeneration",
        GLM_IDS
        | {
            "text_config": {
                "model_type": "glm4v_text",
                **TEXT,
                "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
            },
            "vision_config": {"model_type": "glm4v_vision", **GLM_V},
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        patches,
        types="mm_token_type_ids",
    ),
    "Ovis2": Family(
        "Ovis2ForConditionalGeneration",
        {
            "vision_config": {**VISION, "vocab_size": 24, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
            "text_config": qwen2(),
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [85, 86, 87, 88, 89],
            "vocab_size": 96,
            "hidden_size": 32,
            "tie_word_embeddings": False,
        },
        [85, *[IMAGE] * 1, 86],
        squares,
        placeholders=(IMAGE, 85, 86, 87, 88, 89),
    ),
    "VideoLLaMA 3": Family(
        "VideoLlama3ForConditionalGeneration",
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
            },
            "text_config": qwen2(),
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        [IMAGE] * 4,
        lambda c: {
            "pixel_values": noise(16 * sum(c), 3 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(c)),
            "image_merge_sizes": torch.tensor([2] * sum(c)),
        },
    ),
    "GOT-OCR2": Family(
        "GotOcr2ForConditionalGeneration",
        {
            "vision_config": {
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 4,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 24,
            },
            "text_config": qwen2(),
            "image_token_index": IMAGE,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        lambda c: squares(c, 32),
    ),
    "Idefics2": Family(
        "Idefics2ForConditionalGeneration",
        {
            "vision_config": VISION,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 8},
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 3, START],
        by_row,
    ),
    "Aria": Family(
        "AriaForConditionalGeneration",
        {
            "vision_config": {"model_type": "idefics3_vision", **VISION},
            "text_config": {
                "model_type": "aria_text",
                **TEXT,
                "moe_num_experts": 2,
                "moe_topk": 1,
                "moe_num_shared_experts": 1,
                "head_dim": 8,
            },
            "projector_patch_to_query_dict": {4: 3},
            "image_token_index": IMAGE,
        },
        [IMAGE] * 3,
        squares,
        dtype=torch.float32,
    ),
    "Janus": Family(
        "JanusForConditionalGeneration",
        {
            "vision_config": {**VISION, "mlp_ratio": 2.0, "projection_dim": 32, "num_image_tokens": 4},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 2,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
            "text_config": llama(),
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        squares,
    ),
    "LightOn OCR": Family(
        "LightOnOcrForConditionalGeneration",
        {
            "vision_config": PIXTRAL | {"image_size": 16},
            "text_config": {"model_type": "qwen3", **TEXT, "head_dim": 8},
            "image_token_id": IMAGE,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        [IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END],
        lambda c: squares(c, 16) | {"image_sizes": torch.tensor([[16, 16]] * sum(c))},
    ),
    "DeepSeek-VL": Family(
        "DeepseekVLForConditionalGeneration",
        {"vision_config": SIGLIP, "text_config": llama(), "image_token_id": IMAGE, "tie_word_embeddings": False},
        [IMAGE] * 4,
        squares,
    ),
    "LFM2-VL": Family(
        "Lfm2VlForConditionalGeneration",
        {
            "vision_config": {
                "model_type": "siglip2_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_patches": 16,
                "patch_size": 4,
                "vision_use_head": False,
            },
            "text_config": {
                "model_type": "lfm2",
                **TEXT,
                "layer_types": ["conv", "full_attention"],
                "block_ff_dim": 48,
                "block_multiple_of": 8,
            },
            "image_token_id": IMAGE,
            "projector_hidden_size": 24,
            "downsample_factor": 2,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        lambda c: {
            "pixel_values": noise(sum(c), 16, 48),
            "pixel_attention_mask": torch.ones(sum(c), 16).long(),
            "spatial_shapes": torch.tensor([[4, 4]] * sum(c)),
        },
    ),
    "Kimi K2.5": Family(
        "Kimi_K25ForConditionalGeneration",
        {
            "vision_config": {
                "patch_size": 4,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
            },
            "text_config": llama(),
            "projection_hidden_size": 16,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "tie_word_embeddings": False,
        },
        [START, *[IMAGE] * 4, END],
        lambda c: {"pixel_values": noise(16 * sum(c), 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(c))},
    ),
    "LLaVA-NeXT-Video": Family(
        "LlavaNextVideoForConditionalGeneration",
        LLAVA
        | {
            "vision_config": CLIP,
            "text_config": llama(),
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[8, 16], [16, 8]],
        },
        [IMAGE] * 14,
        crops,
    ),
    "Chameleon": Family(
        "ChameleonForConditionalGeneration",
        {
            **TEXT,
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "resolution": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
            },
            "vocabulary_map": {
                "<image>": IMAGE,
                **{"IMGIMG" + "".join(chr(65 + int(d)) for d in str(i)) + "Z": 40 + i for i in range(16)},
            },
        },
        [START, *[IMAGE] * 16, END],
        squares,
        refused="its decoder, ChameleonModel, was given images by another way",
    ),
    "PaliGemma": Family(
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": SIGLIP | {"projection_dim": 32},
            "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
            "image_token_index": IMAGE,
            "projection_dim": 32,
            "tie_word_embeddings": False,
        },
        [IMAGE] * 4,
        squares,
        types="token_type_ids",
        type_of=lambda image: 0 * image.long(),  # all of it is the prefix, whose tokens see each other
        refused="its image tokens attend to later text",
    ),
    "Llama 3.2 Vision": Family(
        "MllamaForConditionalGeneration",
        {
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
            "text_config": {"model_type": "mllama_text_model", **TEXT, "num_hidden_layers": 3}
            | {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}},
            "image_token_index": IMAGE,
        },
        [IMAGE],
        lambda counts: {
            "pixel_values": noise(len(counts), max(counts), 1, 3, 8, 8),
            "aspect_ratio_ids": torch.ones(len(counts), max(counts)).long(),
            "aspect_ratio_mask": torch.ones(len(counts), max(counts), 1).long(),
        },
        refused="its decoder, MllamaTextModel, reads images by cross-attention",
    ),
}
