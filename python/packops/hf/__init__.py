"""Packed training of Hugging Face models. Needs ``pip install 'packops[hf]'``; importing this changes nothing in transformers."""
