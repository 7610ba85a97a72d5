"""The names that callers of the original use, with their parameters and defaults (specification §1.4)."""

from __future__ import annotations

import importlib
import inspect

import pytest

EXPORTS = {
    "wan": "configs distributed modules WanI2V WanT2V WanFLF2V WanVace WanVaceMP MultiTalkPipeline",
    "wan.configs": "WAN_CONFIGS SIZE_CONFIGS MAX_AREA_CONFIGS SUPPORTED_SIZES",
    "wan.modules": "WanVAE WanModel VaceWanModel T5Model T5Encoder T5Decoder T5EncoderModel "
    "HuggingfaceTokenizer flash_attention",
    "wan.utils": "get_sampling_sigmas retrieve_timesteps FlowDPMSolverMultistepScheduler "
    "FlowUniPCMultistepScheduler VaceVideoProcessor",
    "wan.modules.multitalk_model": "WanModel AudioProjModel",
    "wan.modules.attention": "flash_attention attention SingleStreamAttention SingleStreamMutiAttention",
    "wan.modules.t5": "umt5_xxl",
    "wan.multitalk": "resize_and_centercrop timestep_transform",
    "wan.utils.multitalk_utils": "ASPECT_RATIO_627 ASPECT_RATIO_960 RotaryPositionalEmbedding1D "
    "MomentumBuffer",
    "wan.distributed.fsdp": "shard_model free_model",
}

_DIT = (
    "patch_size=(1, 2, 2), text_len=512, in_dim=16, dim=2048, ffn_dim=8192, freq_dim=256, text_dim=4096, "
    "out_dim=16, num_heads=16, num_layers=32, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, "
    "eps=1e-06"
)
_ATTENTION = (
    "q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None, causal=False, "
    "window_size=(-1, -1), deterministic=False, dtype=torch.bfloat16, "
)
_AUDIO_ATTENTION = (
    "dim, encoder_hidden_states_dim, num_heads, qkv_bias, qk_norm, norm_layer, attn_drop=0.0, proj_drop=0.0, "
    "eps=1e-06"
)
_STOCK = (
    "config, checkpoint_dir, device_id=0, rank=0, t5_fsdp=False, dit_fsdp=False, use_usp=False, t5_cpu=False"
)

SIGNATURES = {
    "wan.modules.multitalk_model:WanModel": f"model_type='i2v', {_DIT}, audio_window=5, "
    "intermediate_dim=512, "
    "output_dim=768, context_tokens=32, vae_scale=4, norm_input_visual=True, norm_output_audio=True, "
    "weight_init=True",
    "wan.modules.multitalk_model:WanModel.forward": "self, x, t, context, seq_len, clip_fea=None, y=None, "
    "audio=None, ref_target_masks=None",
    "wan.modules.multitalk_model:WanModel.teacache_init": "self, use_ret_steps=True, teacache_thresh=0.2, "
    "sample_steps=40, model_scale='multitalk-480'",
    "wan.modules.multitalk_model:WanModel.disable_teacache": "self",
    "wan.modules.multitalk_model:AudioProjModel": "seq_len=5, seq_len_vf=12, blocks=12, channels=768, "
    "intermediate_dim=512, output_dim=768, context_tokens=32, norm_output_audio=False",
    "wan.modules.multitalk_model:AudioProjModel.forward": "self, audio_embeds, audio_embeds_vf",
    "wan.modules.model:WanModel": f"model_type='t2v', {_DIT}",
    "wan.modules.model:WanModel.forward": "self, x, t, context, seq_len, clip_fea=None, y=None",
    "wan.modules.attention:flash_attention": f"{_ATTENTION}version=None",
    "wan.modules.attention:attention": f"{_ATTENTION}fa_version=None",
    "wan.modules.attention:SingleStreamAttention": _AUDIO_ATTENTION,
    "wan.modules.attention:SingleStreamAttention.forward": "self, x, encoder_hidden_states, shape=None, "
    "enable_sp=False, kv_seq=None",
    "wan.modules.attention:SingleStreamMutiAttention": f"{_AUDIO_ATTENTION}, class_range=24, "
    "class_interval=4",
    "wan.modules.attention:SingleStreamMutiAttention.forward": "self, x, encoder_hidden_states, shape=None, "
    "x_ref_attn_map=None, human_num=None",
    "wan.modules.vae:WanVAE": "z_dim=16, vae_pth=None, dtype=torch.float32, device='cuda'",
    "wan.modules.clip:CLIPModel": "dtype, device, checkpoint_path=None, tokenizer_path=None",
    "wan.modules.t5:T5EncoderModel": "text_len, dtype=torch.bfloat16, device=None, checkpoint_path=None, "
    "tokenizer_path=None, shard_fn=None, quant=None, quant_dir=None",
    "wan.multitalk:MultiTalkPipeline": "config, checkpoint_dir, quant_dir=None, device_id=0, rank=0, "
    "t5_fsdp=False, dit_fsdp=False, use_usp=False, t5_cpu=False, init_on_cpu=True, num_timesteps=1000, "
    "use_timestep_transform=True, lora_dir=None, lora_scales=None, quant=None",
    "wan.multitalk:MultiTalkPipeline.generate": "self, input_data, size_buckget='multitalk-480', "
    "motion_frame=25, "
    "frame_num=81, shift=5.0, sampling_steps=40, text_guide_scale=5.0, audio_guide_scale=4.0, n_prompt='', "
    "seed=-1, offload_model=True, max_frames_num=1000, face_scale=0.05, progress=True, "
    "color_correction_strength=0.0, extra_args=None",
    "wan.multitalk:MultiTalkPipeline.enable_vram_management": "self, num_persistent_param_in_dit=None",
    "wan.multitalk:resize_and_centercrop": "cond_image, target_size",
    "wan.multitalk:timestep_transform": "t, shift=5.0, num_timesteps=1000",
    "wan.wan_lora:WanLoraWrapper": "wan_model",
    "wan.wan_lora:WanLoraWrapper.load_lora": "self, lora_path, lora_name=None",
    "wan.wan_lora:WanLoraWrapper.apply_lora": "self, lora_name, alpha=1.0, param_dtype=torch.bfloat16, "
    "device='cpu'",
    "wan.utils.multitalk_utils:save_video_ffmpeg": "gen_video_samples, save_path, vocal_audio_list, fps=25, "
    "quality=5, high_quality_save=False",
    "wan.utils.multitalk_utils:adaptive_projected_guidance": "diff, pred_cond, momentum_buffer=None, "
    "eta=0.0, "
    "norm_threshold=55",
    "wan.utils.multitalk_utils:MomentumBuffer": "momentum",
    "wan.utils.multitalk_utils:match_and_blend_colors": "source_chunk, reference_image, strength",
    "wan.utils.multitalk_utils:get_attn_map_with_target": "visual_q, ref_k, shape, ref_target_masks=None, "
    "split_num=2, enable_sp=False",
    "wan.utils.multitalk_utils:normalize_and_scale": "column, source_range, target_range, epsilon=1e-08",
    "wan.utils.multitalk_utils:split_token_counts_and_frame_ids": "T, token_frame, world_size, rank",
    "wan.utils.multitalk_utils:RotaryPositionalEmbedding1D": "head_dim",
    "wan.utils.utils:cache_video": "tensor, save_file=None, fps=30, suffix='.mp4', nrow=8, normalize=True, "
    "value_range=(-1, 1), retry=5",
    "wan.utils.utils:cache_image": "tensor, save_file, nrow=8",
    "wan.utils.utils:str2bool": "v",
    "wan:WanI2V": f"{_STOCK}, init_on_cpu=True",
    "wan:WanT2V": _STOCK,
    "wan:WanFLF2V": f"{_STOCK}, init_on_cpu=True",
    "wan:WanVace": _STOCK,
    "wan:WanI2V.generate": "self, input_prompt, img, max_area=921600, frame_num=81, shift=5.0, "
    "sample_solver='unipc', sampling_steps=40, guide_scale=5.0, n_prompt='', seed=-1, offload_model=True",
    "wan:WanT2V.generate": "self, input_prompt, size=(1280, 720), frame_num=81, shift=5.0, "
    "sample_solver='unipc', sampling_steps=50, guide_scale=5.0, n_prompt='', seed=-1, offload_model=True",
    "wan.distributed.fsdp:shard_model": "model, device_id, param_dtype=torch.bfloat16, "
    "reduce_dtype=torch.float32, buffer_dtype=torch.float32, process_group=None, "
    "sharding_strategy=<ShardingStrategy.FULL_SHARD: 1>, sync_module_states=True",
    "wan.distributed.fsdp:free_model": "model",
}


@pytest.mark.parametrize("module", EXPORTS)
def test_exports(module: str) -> None:
    home = importlib.import_module(module)
    missing = [name for name in EXPORTS[module].split() if not hasattr(home, name)]
    assert not missing


@pytest.mark.parametrize("target", SIGNATURES)
def test_signature_begins_as_the_original(target: str) -> None:
    """Further parameters may follow; those of the original keep their order, names and defaults."""
    module, _, path = target.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    parameters = inspect.signature(found).parameters.values()
    got = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    want = SIGNATURES[target]
    assert ", ".join(got)[: len(want)] == want


def test_every_file_of_the_original_is_there() -> None:
    files = {
        "": "multitalk wan_lora image2video text2video first_last_frame2video vace",
        "configs": "shared_config wan_multitalk_14B wan_i2v_14B wan_t2v_14B wan_t2v_1_3B",
        "distributed": "fsdp xdit_context_parallel",
        "modules": "attention multitalk_model model vace_model vae t5 tokenizers clip xlm_roberta",
        "utils": "fm_solvers fm_solvers_unipc multitalk_utils utils prompt_extend qwen_vl_utils "
        "vace_processor",
    }
    for package, names in files.items():
        for name in names.split():
            importlib.import_module(".".join(filter(None, ("wan", package, name))))
