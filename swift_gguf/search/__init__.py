"""The search for what a draft pass can leave out."""
