"""Attention: training (flash_attention) and generation (decode_attention)."""
