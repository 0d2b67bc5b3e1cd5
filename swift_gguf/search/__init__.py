"""The search for the sub-layers that a draft pass can skip."""
