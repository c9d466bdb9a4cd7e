"""`plugins/kernels/fasa.h` in ctypes. Field meanings are documented there."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p


class Pool(Structure):
    _fields_ = (
        ("primary", c_void_p),
        ("secondary", c_void_p),
        ("offsets", c_void_p),
        ("max_blocks", c_int32),
        ("tokens_per_block", c_int32),
        ("num_kv_heads", c_int32),
        ("heads_per_block", c_int32),
        ("head_dim", c_int32),
        ("dtype", c_int),
    )


class Labels(Structure):
    _fields_ = (
        ("kind", c_int),
        ("n_tip", c_int32),
        ("labels", c_void_p),
        ("scales", c_void_p),
        ("offset_divisor", c_int32),
        ("secondary_distance", c_int64),
        ("label_block_stride", c_int64),
        ("label_token_stride", c_int64),
        ("label_head_stride", c_int64),
        ("scale_block_stride", c_int64),
        ("scale_token_stride", c_int64),
        ("scale_head_stride", c_int64),
    )


class DecodeParams(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("out", c_void_p),
        ("lengths", c_void_p),
        ("num_seqs", c_int32),
        ("num_q_heads", c_int32),
        ("max_length", c_int32),
        ("dense_below", c_int32),
        ("budget", c_int32),
        ("sink", c_int32),
        ("recent", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int32),
        ("reduction", c_int),
        ("pool", Pool),
        ("labels", Labels),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    )


class AppendParams(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_token_stride", c_int64),
        ("k_token_stride", c_int64),
        ("v_token_stride", c_int64),
        ("q_out", c_void_p),
        ("sequence", c_void_p),
        ("position", c_void_p),
        ("inv_freq", c_void_p),
        ("rope_scale", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("norm_eps", c_float),
        ("num_tokens", c_int32),
        ("num_q_heads", c_int32),
        ("pool", Pool),
        ("labels", Labels),
    )


class PrefillParams(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("q_token_stride", c_int64),
        ("out", c_void_p),
        ("query_lengths", c_void_p),
        ("lengths", c_void_p),
        ("num_seqs", c_int32),
        ("num_tokens", c_int32),
        ("num_q_heads", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int32),
        ("pool", Pool),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    )


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the library's functions their signatures."""
    library.fasa_decode_workspace.argtypes = [POINTER(DecodeParams)]
    library.fasa_decode_workspace.restype = c_size_t
    library.fasa_decode.argtypes = [POINTER(DecodeParams), c_void_p]
    library.fasa_dense_below.argtypes = [POINTER(DecodeParams)]
    library.fasa_dense_below.restype = c_int32
    library.fasa_reserve_l2.argtypes = []
    library.fasa_append.argtypes = [POINTER(AppendParams), c_void_p]
    library.fasa_dense_decode_workspace.argtypes = [POINTER(DecodeParams)]
    library.fasa_dense_decode_workspace.restype = c_size_t
    library.fasa_dense_decode.argtypes = [POINTER(DecodeParams), c_void_p]
    library.fasa_prefill_workspace.argtypes = [POINTER(PrefillParams)]
    library.fasa_prefill_workspace.restype = c_size_t
    library.fasa_prefill.argtypes = [POINTER(PrefillParams), c_void_p]
    library.fasa_status_text.argtypes = [c_int]
    library.fasa_status_text.restype = ctypes.c_char_p
    return library
