"""Hugging Face: a real transformers model whose attention layers may borrow pool ranks."""

from fapool_plugin.integrations.huggingface.model import FAPoolForCausalLM

__all__ = ["FAPoolForCausalLM"]
