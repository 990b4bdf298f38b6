"""Vision-language models under packops.hf: text is patched, towers keep what they have, images give what they gave."""

from __future__ import annotations

import pytest
import torch

import packops
import packops.hf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE = 50
TEXT = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN = {
    "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "image_token_id": IMAGE, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53,
}  # fmt: skip
PATCHES = {"num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 28, 28)}


def paligemma():
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**TOWER, projection_dim=32),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 28, 28)}


def mistral3():
    tower = {**TOWER, "image_size": 56}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT),
        vision_config=transformers.PixtralVisionConfig(**tower),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    inputs = {"pixel_values": torch.randn(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    return transformers.Mistral3ForConditionalGeneration(config), inputs


def qwen2_vl():
    tower = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **PATCHES}
    config = transformers.Qwen2VLConfig(vision_config=tower, **QWEN)
    return transformers.Qwen2VLForConditionalGeneration(config), qwen_image()


def qwen2_5_vl():
    tower = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 28,
        "fullatt_block_indexes": [1], **PATCHES,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(vision_config=tower, **QWEN)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), qwen_image()


def qwen_image():
    return {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}


MODELS = {make.__name__: make for make in (llava, paligemma, mistral3, qwen2_vl, qwen2_5_vl)}


def build(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8]])
    inputs |= {"input_ids": ids, "labels": ids, "use_cache": False}
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return model.eval(), inputs


@pytest.mark.parametrize("attention", [None, "packops_varlen"])
@pytest.mark.parametrize("name", MODELS)
def test_images_give_what_they_gave(name, attention):
    model, inputs = build(name)
    stock = model(**inputs)
    tower = model.config.vision_config._attn_implementation
    packops.hf.apply(model, attention=attention)
    assert packops.hf.report(model).replaced.get("attention") == attention
    assert model.config.vision_config._attn_implementation == tower == "sdpa"
    assert model.config.get_text_config()._attn_implementation == (attention or "sdpa")
    bounds = {"cu_seq_lens_q": torch.tensor([0, 8], dtype=torch.int32), "max_length_q": 8} if attention else {}
    ours = model(**inputs, **bounds)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-5, atol=0)
    packops.hf.revert(model)
    assert torch.equal(model(**inputs).logits, stock.logits)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_text_are_refused_for_images(name):
    """Such a model's own positions have three dimensions; those of a packed row of text would be taken for all three."""
    model, inputs = build(name)
    packops.hf.apply(model)
    text = torch.arange(8)[None]
    with pytest.raises(ValueError, match=r"pixel_values with position_ids of shape \(1, 8\).*M-RoPE"):
        model(**inputs, position_ids=text)
    expected = model(**inputs).logits
    types = {"mm_token_type_ids": inputs["mm_token_type_ids"]}
    positions, _ = model.model.get_rope_index(inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"], **types)
    torch.testing.assert_close(model(**inputs, position_ids=positions).logits, expected)
    only_text = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": text[:, :3]}
    model(**only_text)


def test_what_attends_in_another_pattern_says_so():
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    model = packops.hf.apply(transformers.Gemma3ForConditionalGeneration(config).eval(), attention="packops_varlen")
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8]])
    with pytest.raises(NotImplementedError, match="this model masks with or_masks"):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28), token_type_ids=(ids == IMAGE).long())
